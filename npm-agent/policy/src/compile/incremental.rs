//! The compiler that keeps a Goal up to date by looking only at what a change touches.
//!
//! ```text
//! pod change ──► the pods whose (labels, addresses held, node) differ ──► anchors ──► the sets they may be in
//!                                                                └──────► anchors ──► the policies they are subjects of
//! policy change ──► its program; its sets are filled when the first active program names them
//! namespace change ──► the namespace selectors that flip, times the namespace's pods
//! ```
//! A policy is active while it selects a pod of this node; only the sets of active policies exist.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdSet;

use super::anchor::AnchorIndex;
use super::census::{Census, Counter};
use super::contribution::{View, contribution};
use super::matching::selects;
use super::program::program;
use super::{Warning, contested, fill};
use crate::few::Few;
use crate::goal::{Expression, Goal, Holders, Member, Program, Set, SetKey};
use crate::model::{Labels, NamespaceScope, Operator, Pod, PodKey, Policy, PolicyKey};
use crate::world::{Change, World};

/// A world, and the Goal of one node for it.
#[derive(Clone, Debug)]
pub struct Compiler {
    node: Arc<str>,
    world: World,
    goal: Goal,
    /// Every policy of the cluster that isolates. The programs of those that select pods of this node are the goal's; the
    /// others' are made again when they are asked for, which is seldom: kept, they would be most of what a node holds.
    programs: BTreeMap<PolicyKey, Compiled>,
    /// Every subject expression: the policies that have it, and this node's pods that match it now.
    subjects: BTreeMap<Expression, Subjects>,
    subject_index: AnchorIndex<Expression>,
    /// This node's pods that match some subject expression, with those expressions.
    selected: BTreeMap<PodKey, BTreeSet<Expression>>,
    /// How many active programs name a set.
    references: BTreeMap<SetKey, usize>,
    set_index: AnchorIndex<SetKey>,
    /// The sets of named ports of a block's pods, by the port's name.
    block_ports: BTreeMap<Arc<str>, BTreeSet<SetKey>>,
    counter: Counter,
    operations: u64,
    writes: u64,
}

#[derive(Clone, Debug)]
struct Compiled {
    subjects: Expression,
    warnings: Vec<Warning>,
}

#[derive(Clone, Debug, Default)]
struct Subjects {
    policies: Few<PolicyKey>,
    pods: BTreeSet<PodKey>,
}

/// What one pod was and is.
pub(super) struct Transition {
    key: PodKey,
    pub(super) before: Option<View>,
    pub(super) after: Option<View>,
}

impl Compiler {
    /// An empty world, compiled for the node of this name.
    pub fn new(node: impl Into<Arc<str>>) -> Self {
        Self {
            node: node.into(),
            world: World::default(),
            goal: Goal::default(),
            programs: BTreeMap::new(),
            subjects: BTreeMap::new(),
            subject_index: AnchorIndex::default(),
            selected: BTreeMap::new(),
            references: BTreeMap::new(),
            set_index: AnchorIndex::default(),
            block_ports: BTreeMap::new(),
            counter: Counter::default(),
            operations: 0,
            writes: 0,
        }
    }

    /// The same, with [`Goal::locals`] kept up to date as well. It is for a compiler that has seen no changes yet.
    pub fn with_locals(mut self) -> Self {
        self.goal.locals = Some(OrdSet::new());
        self
    }

    /// Takes in changes, in order.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            match change {
                Change::Pod(key, pod) => self.apply_pod(key, pod),
                Change::Namespace(name, namespace) => {
                    let before = self.world.namespace_labels(&name);
                    self.world.apply(Change::Namespace(Arc::clone(&name), namespace));
                    let after = self.world.namespace_labels(&name);
                    self.counter.relabel_namespace(&self.world, &name, &before, &after);
                    self.relabel_namespace(&name, &before, &after);
                }
                Change::Policy(key, policy) => {
                    let old = self.world.policy(&key).cloned();
                    self.world.apply(Change::Policy(key.clone(), policy.clone()));
                    self.apply_policy(key, old.as_deref(), policy.as_ref());
                }
            }
        }
    }

    /// The Goal of the world now. A copy costs a few pointers.
    pub fn goal(&self) -> Goal {
        self.goal.clone()
    }

    /// Counts over the whole cluster's policies now; equal to what [`super::census()`] says. A copy costs a few pointers.
    pub fn census(&self) -> Census {
        self.counter.census()
    }

    /// How often the Goal was written to since the start. A change that leaves this as it was concerns other nodes.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The world now.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The node that is compiled for.
    pub fn node(&self) -> &Arc<str> {
        &self.node
    }

    /// What an operator should know about the world now; equal to what [`super::compile`] says.
    pub fn warnings(&self) -> Vec<Warning> {
        let active = self.goal.programs.keys().filter_map(|key| self.programs.get(key));
        let mut warnings = contested(&self.world);
        warnings.extend(active.flat_map(|compiled| compiled.warnings.iter().cloned()));
        warnings.sort();
        warnings
    }

    /// How often a pod has been tested against a set or a subject expression since the start: the measure of work,
    /// for tests and metrics.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    fn apply_pod(&mut self, key: PodKey, pod: Option<Pod>) {
        // Whoever shares an address with the pod may win or lose it.
        let mut addresses: BTreeSet<IpAddr> =
            pod.iter().flat_map(|pod| pod.addresses.iter().copied()).collect();
        addresses.extend(self.world.pod(&key).iter().flat_map(|old| old.addresses.iter().copied()));
        let mut touched: BTreeSet<PodKey> = addresses
            .iter()
            .filter_map(|address| self.world.holder(*address))
            .map(|pod| pod.key.clone())
            .collect();
        touched.insert(key.clone());
        let before: BTreeMap<PodKey, Option<View>> =
            touched.iter().map(|key| (key.clone(), self.view(key))).collect();
        self.world.apply(Change::Pod(key, pod));
        touched.extend(
            addresses.iter().filter_map(|address| self.world.holder(*address)).map(|pod| pod.key.clone()),
        );
        let transitions: Vec<Transition> = touched
            .into_iter()
            .map(|key| Transition {
                // A pod that holds an address only from now on held none of these before, and is unchanged otherwise.
                before: match before.get(&key) {
                    Some(view) => view.clone(),
                    None => self.view(&key).map(|view| View {
                        held: view.held.difference(&addresses).copied().collect(),
                        ..view
                    }),
                },
                after: self.view(&key),
                key,
            })
            .filter(|transition| transition.before != transition.after)
            .collect();
        self.counter.move_members(&transitions);
        self.move_members(&transitions);
        self.move_locals(&transitions);
        for transition in &transitions {
            self.move_subject(transition);
        }
    }

    /// Brings the addresses of this node's pods up to date, deletions first: an address may go from one pod to another.
    fn move_locals(&mut self, transitions: &[Transition]) {
        let Some(locals) = &mut self.goal.locals else { return };
        let held = |view: &Option<View>| -> BTreeSet<IpAddr> {
            view.iter().filter(|view| view.local).flat_map(|view| view.held.iter().copied()).collect()
        };
        let before: BTreeSet<IpAddr> = transitions.iter().flat_map(|pod| held(&pod.before)).collect();
        let after: BTreeSet<IpAddr> = transitions.iter().flat_map(|pod| held(&pod.after)).collect();
        for address in before.difference(&after) {
            locals.remove(address);
            self.writes += 1;
        }
        for address in after.difference(&before) {
            locals.insert(*address);
            self.writes += 1;
        }
    }

    fn view(&self, key: &PodKey) -> Option<View> {
        let view = View::of(&self.world, &self.node, self.world.pod(key)?);
        (!view.held.is_empty()).then_some(view)
    }

    /// Brings the members of the sets that exist up to date. All deletions come before all additions, because an
    /// address may go from one pod to another, in the same set.
    fn move_members(&mut self, transitions: &[Transition]) {
        let mut deletions: Vec<(SetKey, Member)> = Vec::new();
        let mut additions: Vec<(SetKey, Member)> = Vec::new();
        for transition in transitions {
            let mut keys = BTreeSet::new();
            for view in transition.before.iter().chain(&transition.after) {
                keys.extend(self.set_candidates(view));
            }
            for key in keys {
                self.operations += 1;
                let members = |view: &Option<View>| match view {
                    Some(view) => contribution(&key, view),
                    None => Vec::new(),
                };
                deletions.extend(members(&transition.before).into_iter().map(|member| (key.clone(), member)));
                additions.extend(members(&transition.after).into_iter().map(|member| (key.clone(), member)));
            }
        }
        let kept: BTreeSet<(SetKey, Member)> = additions.iter().cloned().collect();
        deletions.retain(|deletion| !kept.contains(deletion));
        for (key, member) in deletions {
            self.delete_member(&key, &member);
        }
        for (key, member) in additions {
            let present =
                self.goal.sets.get(&key).is_some_and(|set| set.family(member.family()).contains(&member));
            if !present {
                self.insert_member(&key, member);
            }
        }
    }

    fn insert_member(&mut self, key: &SetKey, member: Member) {
        if let Some(set) = self.goal.sets.get_mut(key) {
            set.family_mut(member.family()).insert(member);
            self.writes += 1;
        }
    }

    fn delete_member(&mut self, key: &SetKey, member: &Member) {
        if let Some(set) = self.goal.sets.get_mut(key) {
            set.family_mut(member.family()).remove(member);
            self.writes += 1;
        }
    }

    fn set_candidates(&self, view: &View) -> BTreeSet<SetKey> {
        let namespace = &view.pod.key.namespace;
        let mut keys = self.set_index.candidates(namespace, &view.namespace, &view.pod.labels);
        for port in &view.pod.ports {
            keys.extend(self.block_ports.get(&port.name).into_iter().flatten().cloned());
        }
        keys
    }

    /// Brings up to date whose subject the pod is, and which policies are active.
    fn move_subject(&mut self, transition: &Transition) {
        let mut candidates = BTreeSet::new();
        for view in transition.before.iter().chain(&transition.after).filter(|view| view.local) {
            let namespace = &view.pod.key.namespace;
            let found = self.subject_index.candidates(namespace, &view.namespace, &view.pod.labels);
            candidates.extend(found);
        }
        for expression in candidates {
            self.operations += 1;
            match transition.after.as_ref().is_some_and(|view| view.local && view.matches(&expression)) {
                true => self.select(&transition.key, &expression),
                false => self.unselect(&transition.key, &expression),
            }
        }
        self.record_subject(&transition.key);
    }

    /// Notes that a pod of this node matches a subject expression; its first pod makes the policies active.
    fn select(&mut self, pod: &PodKey, expression: &Expression) {
        let Some(subjects) = self.subjects.get_mut(expression) else { return };
        let first = subjects.pods.is_empty();
        if subjects.pods.insert(pod.clone()) {
            let policies = if first { subjects.policies.clone() } else { Few::default() };
            self.selected.entry(pod.clone()).or_default().insert(expression.clone());
            policies.iter().for_each(|policy| self.activate(policy));
        }
    }

    /// Notes that a pod of this node no longer matches a subject expression; the last one's going makes the policies
    /// inactive.
    fn unselect(&mut self, pod: &PodKey, expression: &Expression) {
        let Some(subjects) = self.subjects.get_mut(expression) else { return };
        if subjects.pods.remove(pod) {
            let policies = if subjects.pods.is_empty() { subjects.policies.clone() } else { Few::default() };
            self.forget_selection(pod, expression);
            policies.iter().for_each(|policy| self.deactivate(policy));
        }
    }

    fn forget_selection(&mut self, pod: &PodKey, expression: &Expression) {
        if let Some(expressions) = self.selected.get_mut(pod) {
            expressions.remove(expression);
            if expressions.is_empty() {
                self.selected.remove(pod);
            }
        }
    }

    /// Puts the pod into, or takes it out of, the Goal's subjects.
    fn record_subject(&mut self, pod: &PodKey) {
        match (self.selected.contains_key(pod), self.view(pod)) {
            (true, Some(view)) => {
                if self.goal.subjects.get(pod) != Some(&view.held) {
                    self.goal.subjects.insert(pod.clone(), view.held);
                    self.writes += 1;
                }
            }
            (true, None) | (false, _) => {
                if self.goal.subjects.contains_key(pod) {
                    self.goal.subjects.remove(pod);
                    self.writes += 1;
                }
            }
        }
    }

    fn apply_policy(&mut self, key: PolicyKey, old: Option<&Policy>, policy: Option<&Policy>) {
        let new = policy.map(program).filter(|(program, _)| program.isolates()).map(|(program, warnings)| {
            let SetKey::Local(subjects) = &program.subjects else {
                unreachable!("a program's subjects are a Local set, by construction in program()")
            };
            (Compiled { subjects: subjects.clone(), warnings }, Arc::new(program))
        });
        let old_program =
            self.programs.contains_key(&key).then(|| match (self.goal.programs.get(&key), old) {
                (Some(program), _) => Arc::clone(program),
                (None, Some(old)) => Arc::new(program(old).0),
                (None, None) => unreachable!("what is compiled is a policy of the world"),
            });
        if let (Some(old), Some((new, new_program))) = (&old_program, &new)
            && old == new_program
        {
            if let Some(compiled) = self.programs.get_mut(&key) {
                compiled.warnings.clone_from(&new.warnings);
            }
            return;
        }
        let new_program = new.as_ref().map(|(_, program)| &**program);
        self.counter.replace(&self.world, old_program.as_deref(), new_program);
        // The new program comes before the old one goes, so that the sets that both name are not filled twice.
        let old = self.programs.remove(&key);
        let was_active = self.goal.programs.contains_key(&key);
        if let Some((new, program)) = new {
            let expression = new.subjects.clone();
            self.programs.insert(key.clone(), new);
            self.register(&key, &expression);
            if !self.subjects.get(&expression).is_none_or(|subjects| subjects.pods.is_empty()) {
                self.refer(&program);
                self.goal.programs.insert(key.clone(), program);
                self.writes += 1;
            } else if was_active {
                self.goal.programs.remove(&key);
                self.writes += 1;
            }
        } else if was_active {
            self.goal.programs.remove(&key);
            self.writes += 1;
        }
        if let Some(old) = old {
            let same = self.programs.get(&key).is_some_and(|new| new.subjects == old.subjects);
            if !same {
                self.unregister(&key, &old.subjects);
            }
            if was_active && let Some(program) = old_program {
                self.release(&program);
            }
        }
    }

    /// Files a policy under its subject expression, and finds the expression's pods if it is new.
    fn register(&mut self, policy: &PolicyKey, expression: &Expression) {
        if let Some(subjects) = self.subjects.get_mut(expression) {
            subjects.policies.insert(policy.clone());
            return;
        }
        self.subject_index.insert(expression, expression);
        let NamespaceScope::Named(namespace) = &expression.namespaces else {
            unreachable!("subjects are pods of the policy's own namespace, by construction in program()")
        };
        let mut pods = BTreeSet::new();
        for pod in self.world.pods_in(namespace).filter(|pod| pod.node.as_ref() == Some(&self.node)) {
            self.operations += 1;
            if selects(&expression.pods, &pod.labels) && !self.world.addresses_held(pod).is_empty() {
                pods.insert(pod.key.clone());
            }
        }
        for pod in &pods {
            self.selected.entry(pod.clone()).or_default().insert(expression.clone());
        }
        let subjects = Subjects { policies: Few::of(policy.clone()), pods: pods.clone() };
        self.subjects.insert(expression.clone(), subjects);
        for pod in &pods {
            self.record_subject(pod);
        }
    }

    fn unregister(&mut self, policy: &PolicyKey, expression: &Expression) {
        let Some(subjects) = self.subjects.get_mut(expression) else { return };
        subjects.policies.remove(policy);
        if !subjects.policies.is_empty() {
            return;
        }
        let pods = std::mem::take(&mut subjects.pods);
        self.subjects.remove(expression);
        self.subject_index.remove(expression, expression);
        for pod in pods {
            self.forget_selection(&pod, expression);
            self.record_subject(&pod);
        }
    }

    fn activate(&mut self, policy: &PolicyKey) {
        let Some(program) = self.world.policy(policy).map(|policy| Arc::new(program(policy).0)) else {
            return;
        };
        self.refer(&program);
        self.goal.programs.insert(policy.clone(), program);
        self.writes += 1;
    }

    fn deactivate(&mut self, policy: &PolicyKey) {
        if let Some(program) = self.goal.programs.remove(policy) {
            self.writes += 1;
            self.release(&program);
        }
    }

    /// Counts one more program that names these sets, and fills those that nobody named before.
    fn refer(&mut self, program: &Program) {
        for key in program.sets() {
            let count = self.references.entry(key.clone()).or_default();
            *count += 1;
            if *count == 1 {
                self.file(&key);
                let set = self.fill_from_index(&key);
                self.goal.sets.insert(key, set);
            }
        }
    }

    fn release(&mut self, program: &Program) {
        for key in program.sets() {
            let Some(count) = self.references.get_mut(&key) else { continue };
            *count -= 1;
            if *count == 0 {
                self.references.remove(&key);
                self.unfile(&key);
                self.goal.sets.remove(&key);
            }
        }
    }

    fn file(&mut self, key: &SetKey) {
        match (expression_of(key), key) {
            (Some(expression), _) => self.set_index.insert(expression, key),
            (None, SetKey::Ports { name, of: _ }) => {
                self.block_ports.entry(Arc::clone(name)).or_default().insert(key.clone());
            }
            (None, SetKey::Pods(_) | SetKey::Local(_) | SetKey::Block(_)) => {}
        }
    }

    fn unfile(&mut self, key: &SetKey) {
        match (expression_of(key), key) {
            (Some(expression), _) => self.set_index.remove(expression, key),
            (None, SetKey::Ports { name, of: _ }) => {
                if let Some(keys) = self.block_ports.get_mut(name) {
                    keys.remove(key);
                    if keys.is_empty() {
                        self.block_ports.remove(name);
                    }
                }
            }
            (None, SetKey::Pods(_) | SetKey::Local(_) | SetKey::Block(_)) => {}
        }
    }

    /// [`fill`], over the fewest pods that an index offers.
    fn fill_from_index(&mut self, key: &SetKey) -> Set {
        let view = |pod| View::of(&self.world, &self.node, pod);
        let mut tested = 0;
        let set = match (expression_of(key), key) {
            (Some(expression), _) => {
                fill(key, likely_pods(&self.world, expression).inspect(|_| tested += 1).map(view))
            }
            (None, SetKey::Ports { .. }) => fill(key, self.world.pods().inspect(|_| tested += 1).map(view)),
            // Nothing in these depends on pods.
            (None, SetKey::Block(_) | SetKey::Pods(_) | SetKey::Local(_)) => fill::<View>(key, []),
        };
        self.operations += tested;
        set
    }

    /// A namespace's labels changed: sets whose namespace selector it enters or leaves gain or lose its pods.
    /// Subjects don't depend on namespace labels.
    fn relabel_namespace(&mut self, name: &Arc<str>, before: &Labels, after: &Labels) {
        if before == after {
            return;
        }
        let flips: Vec<SetKey> = self
            .references
            .keys()
            .filter(|key| match expression_of(key).map(|expression| &expression.namespaces) {
                Some(NamespaceScope::Matching(selector)) => {
                    selects(selector, before) != selects(selector, after)
                }
                Some(NamespaceScope::Named(_)) | None => false,
            })
            .cloned()
            .collect();
        if flips.is_empty() {
            return;
        }
        let views: Vec<View> =
            self.world.pods_in(name).map(|pod| View::of(&self.world, &self.node, pod)).collect();
        for key in &flips {
            for view in &views {
                self.operations += 1;
                let was = View { namespace: before.clone(), ..view.clone() };
                for member in contribution(key, &was) {
                    self.delete_member(key, &member);
                }
                for member in contribution(key, view) {
                    self.insert_member(key, member);
                }
            }
        }
    }
}

/// The expression that says which pods are in a set, if one does.
pub(super) fn expression_of(key: &SetKey) -> Option<&Expression> {
    match key {
        SetKey::Pods(expression) | SetKey::Local(expression) => Some(expression),
        SetKey::Ports { name: _, of: Holders::Pods(expression) | Holders::Local(expression) } => {
            Some(expression)
        }
        SetKey::Ports { name: _, of: Holders::Block(_) } | SetKey::Block(_) => None,
    }
}

/// At least the pods that match, by the index that offers the fewest; none of a namespace that does not.
pub(super) fn likely_pods<'a>(
    world: &'a World,
    expression: &'a Expression,
) -> Box<dyn Iterator<Item = &'a Arc<Pod>> + 'a> {
    let selector = match &expression.namespaces {
        NamespaceScope::Named(namespace) => return Box::new(world.pods_in(namespace)),
        NamespaceScope::Matching(selector) => selector,
    };
    // Pods come in order of their namespaces, so that each of these is looked at once.
    let mut last: Option<(&Arc<str>, bool)> = None;
    let is_in_scope = move |pod: &&'a Arc<Pod>| match last {
        Some((name, is_in)) if *name == pod.key.namespace => is_in,
        Some(_) | None => {
            let is_in = selects(selector, &world.namespace_labels(&pod.key.namespace));
            last = Some((&pod.key.namespace, is_in));
            is_in
        }
    };
    let label = expression.pods.requirements().find_map(|requirement| match &requirement.operator {
        Operator::In(values) if values.len() == 1 => Some((&requirement.key, values.first()?)),
        Operator::In(_) | Operator::NotIn(_) | Operator::Exists | Operator::DoesNotExist => None,
    });
    match label {
        Some((name, value)) => Box::new(world.pods_with(name, value).filter(is_in_scope)),
        None => Box::new(world.pods().filter(is_in_scope)),
    }
}
