//! What the pages and the debug API look at: the loop's world and goal, copied as pointers and indexed here, so that the
//! loop is held up by no reader.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use npm_policy::goal::{Family, Goal, Member, Program, Set, SetKey};
use npm_policy::model::{PodKey, PolicyKey};
use npm_policy::names::{SetNames, name_sets};
use npm_policy::world::{Objects, World};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::timeout;

use crate::reconcile::{Ask, Sight};
use crate::status::report::Status;

/// How long a reader waits for the loop: the first compile of a large cluster takes seconds on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a view is kept after it was last looked at: for whoever goes from page to page.
const KEPT: Duration = Duration::from_secs(60);

/// World and goal at one moment.
#[derive(Debug)]
pub(super) struct View {
    /// Another number, another world or goal.
    pub(super) revision: u64,
    /// The goal's number, as in the status.
    pub(super) generation: u64,
    /// The node.
    pub(super) node: String,
    /// The cluster.
    pub(super) world: World,
    /// What the node is to enforce.
    pub(super) goal: Goal,
    /// The names of the goal's sets.
    pub(super) names: BTreeMap<SetKey, SetNames>,
    /// The sets of subjects in each namespace.
    subjects: BTreeMap<Arc<str>, Vec<Subjects>>,
}

/// A set of subjects, with the policies that select them.
#[derive(Debug)]
struct Subjects {
    set: Set,
    policies: Vec<(PolicyKey, Arc<Program>)>,
}

/// The policies of this node that isolate a pod.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Isolation<'a> {
    pub(super) ingress: Vec<&'a PolicyKey>,
    pub(super) egress: Vec<&'a PolicyKey>,
}

impl View {
    /// Indexes what the loop gave.
    pub(super) fn of(node: String, generation: u64, revision: u64, objects: Objects, goal: Goal) -> Self {
        let names = name_sets(goal.sets.keys());
        // A policy selects pods of its own namespace only; many may select the same ones.
        let mut by_set: BTreeMap<(Arc<str>, &SetKey), Subjects> = BTreeMap::new();
        for (key, program) in &goal.programs {
            let Some(set) = goal.sets.get(&program.subjects) else { continue };
            let entry = by_set.entry((Arc::clone(&key.namespace), &program.subjects));
            let subjects = entry.or_insert_with(|| Subjects { set: set.clone(), policies: Vec::new() });
            subjects.policies.push((key.clone(), Arc::clone(program)));
        }
        let mut subjects: BTreeMap<Arc<str>, Vec<Subjects>> = BTreeMap::new();
        for ((namespace, _), of_set) in by_set {
            subjects.entry(namespace).or_default().push(of_set);
        }
        Self { revision, generation, node, world: objects.into(), goal, names, subjects }
    }

    /// By which policies a pod of this node is isolated, in order.
    pub(super) fn isolation(&self, pod: &PodKey) -> Isolation<'_> {
        let mut isolation = Isolation::default();
        let Some(held) = self.goal.subjects.get(pod) else { return isolation };
        let sets = self.subjects.get(&pod.namespace).into_iter().flatten();
        for (key, program) in sets.filter(|of| holds(&of.set, held)).flat_map(|of| &of.policies) {
            let Program { subjects: _, ingress, egress } = &**program;
            if ingress.is_some() {
                isolation.ingress.push(key);
            }
            if egress.is_some() {
                isolation.egress.push(key);
            }
        }
        isolation.ingress.sort_unstable();
        isolation.egress.sort_unstable();
        isolation
    }

    /// The pods of this node that a program applies to.
    pub(super) fn subjects<'a>(
        &'a self,
        policy: &'a PolicyKey,
        program: &Program,
    ) -> impl Iterator<Item = &'a PodKey> + use<'a> {
        let set = self.goal.sets.get(&program.subjects);
        let first = PodKey::new(Arc::clone(&policy.namespace), "");
        let own = self.goal.subjects.range(first..);
        let own = own.take_while(|(pod, _)| pod.namespace == policy.namespace);
        own.filter(move |(_, held)| set.is_some_and(|set| holds(set, held))).map(|(pod, _)| pod)
    }

    /// The names that a set has in the kernel (`ipset`), of each family that it can hold.
    pub(super) fn kernel_names<'a>(
        &self,
        key: &SetKey,
        names: &'a SetNames,
    ) -> impl Iterator<Item = (Family, &'a str)> {
        let held = Family::BOTH.map(|family| key.can_hold(family).then(|| (family, &**names.kernel(family))));
        held.into_iter().flatten()
    }

    /// A set's name for people.
    pub(super) fn name<'a>(&'a self, set: &SetKey) -> &'a str {
        self.names.get(set).map_or("", |names| &names.name)
    }
}

/// Whether a set has one of these addresses.
fn holds(set: &Set, addresses: &BTreeSet<IpAddr>) -> bool {
    addresses.iter().any(|address| {
        let member = Member::Address(*address);
        set.family(member.family()).contains(&member)
    })
}

/// Looks, and keeps what it has seen for those who look next.
#[derive(Debug)]
pub(super) struct Viewer {
    asks: mpsc::Sender<Ask>,
    kept: Mutex<Option<Kept>>,
}

#[derive(Debug)]
struct Kept {
    view: Arc<View>,
    last_seen: Instant,
}

impl Viewer {
    pub(super) fn new(asks: mpsc::Sender<Ask>) -> Self {
        Self { asks, kept: Mutex::new(None) }
    }

    /// How things stand, and the view of now; one of a revision is made once. `None`: the loop does not answer.
    pub(super) async fn look(self: &Arc<Self>) -> Option<(Status, Arc<View>)> {
        let mut kept = self.kept.lock().await;
        let known = kept.as_ref().map(|kept| kept.view.revision);
        let Sight { status, revision, objects, goal } = self.sight(known).await?;
        let view = match (objects, &*kept) {
            (None, Some(kept)) => Arc::clone(&kept.view),
            // Objects come unless they are known.
            (None, None) => return None,
            (Some(objects), _) => {
                let (node, generation) = (status.node.clone(), status.generation);
                // Indexing a large world takes as long as a few hundred requests.
                let indexed = move || View::of(node, generation, revision, objects, goal);
                Arc::new(tokio::task::spawn_blocking(indexed).await.ok()?)
            }
        };
        let is_first = kept.is_none();
        *kept = Some(Kept { view: Arc::clone(&view), last_seen: Instant::now() });
        if is_first {
            tokio::spawn(forget(Arc::downgrade(self)));
        }
        Some((status, view))
    }

    async fn sight(&self, known: Option<u64>) -> Option<Sight> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.asks.send(Ask::Sight { known, reply }).await.ok()?;
            answer.await.ok()
        };
        timeout(PATIENCE, asked).await.ok().flatten()
    }
}

/// Frees the view once nobody has looked for a while.
async fn forget(viewer: Weak<Viewer>) {
    loop {
        tokio::time::sleep(KEPT).await;
        let Some(viewer) = viewer.upgrade() else { return };
        let mut kept = viewer.kept.lock().await;
        if kept.as_ref().is_none_or(|kept| kept.last_seen.elapsed() >= KEPT) {
            *kept = None;
            return;
        }
    }
}

#[cfg(test)]
pub(super) mod fixture;
