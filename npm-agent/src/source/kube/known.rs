//! What has been told of the objects of one kind: enough to tell news from what is known, and to find after a list
//! what has vanished. The objects themselves are the world's.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use npm_policy::model::{PodKey, PolicyKey};
use npm_policy::world::Change;

use super::pools::Pools;
use super::wire::Item;
use crate::source::Problem;
use crate::source::convert::{self, Kind, Object, Received};
use crate::source::key::Key;

/// How many deletions are remembered at most until the server says that all before them has been sent.
const MAX_GONE: usize = 10_000;

/// A resource version. The API calls it opaque; since Kubernetes 1.35 (KEP-5504) it is a number that grows, as etcd's
/// always was. `None`: it is no number, and nothing is known of the order.
pub(super) type Version = Option<u64>;

/// Reads a resource version.
pub(super) fn version(text: Option<&str>) -> Version {
    text?.parse().ok()
}

/// One object, as told.
#[derive(Debug)]
struct Seen {
    version: Version,
    /// Of what was told: two that are equal were told alike. `None`: whatever comes next is news.
    digest: Option<u64>,
    /// Whether a problem was told.
    troubled: bool,
    /// The list that it was last in (or a change since).
    listing: u32,
}

/// News for the loop.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Objects, each as it is from now on.
    pub(super) changes: Vec<Change>,
    /// What is wrong with objects, by origin; empty: nothing any more.
    pub(super) problems: Vec<(String, Vec<Problem>)>,
}

/// What has been told of the objects of one kind.
#[derive(Debug)]
pub(super) struct Known {
    kind: Kind,
    hasher: RandomState,
    objects: BTreeMap<Key, Seen>,
    /// Deleted objects with the versions of their deletions: what was changed before that is no news.
    gone: BTreeMap<Key, u64>,
    /// Everything up to this version was sent, by the last list or bookmark: what comes of it again is no news.
    sent: Version,
    listing: u32,
    pools: Pools,
}

impl Known {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            hasher: RandomState::new(),
            objects: BTreeMap::new(),
            gone: BTreeMap::new(),
            sent: None,
            listing: 0,
            pools: Pools::default(),
        }
    }

    /// How many objects there are.
    pub(super) fn len(&self) -> usize {
        self.objects.len()
    }

    /// From here to [`Known::end_list`] come all objects that there are.
    pub(super) fn begin_list(&mut self) {
        self.listing = self.listing.wrapping_add(1);
    }

    /// An object of a list. A list is the truth, also where it is older than what was known (the server's store may
    /// have been restored from a backup).
    pub(super) fn listed(&mut self, item: Item, news: &mut News) {
        self.put(item, news);
    }

    /// The list, of this version, was complete: what was not in it is gone.
    pub(super) fn end_list(&mut self, at: Version, news: &mut News) {
        let listing = self.listing;
        let vanished = self.objects.extract_if(.., |_, seen| seen.listing != listing);
        for (key, seen) in vanished {
            tell_gone(key, &seen, news);
        }
        self.gone.clear();
        self.sent = at;
    }

    /// An object was made or changed. What is older than what is known of it, or the same, is no news.
    pub(super) fn applied(&mut self, item: Item, news: &mut News) {
        let at = version(item.version());
        if let Some(key) = self.key(&item) {
            let known = self.objects.get(&key).and_then(|seen| seen.version);
            if is_old(at, self.sent) || is_old(at, known) || is_old(at, self.gone.get(&key).copied()) {
                return;
            }
            self.gone.remove(&key);
        }
        self.put(item, news);
    }

    /// An object was deleted; `item` is its last state, with the version of the deletion.
    pub(super) fn deleted(&mut self, item: &Item, news: &mut News) {
        let Some(key) = self.key(item) else { return };
        let at = version(item.version());
        let known = self.objects.get(&key).and_then(|seen| seen.version);
        // One of the same version would be strange; to believe it loses less than to pass it over.
        if is_old(at, self.sent) || (at.is_some() && at < known) {
            return;
        }
        if let Some(at) = at {
            if self.gone.len() >= MAX_GONE {
                self.gone.clear();
            }
            self.gone.insert(key.clone(), at);
        }
        if let Some(seen) = self.objects.remove(&key) {
            tell_gone(key, &seen, news);
        }
    }

    fn key(&self, item: &Item) -> Option<Key> {
        match item {
            Item::Whole(received) => received.object.change.as_ref().map(Key::of),
            Item::Broken { name, .. } => Some(name.key(self.kind)),
        }
    }

    /// The server has sent everything up to here.
    pub(super) fn sent_up_to(&mut self, at: Version) {
        if let Some(at) = at {
            self.gone.retain(|_, gone| *gone > at);
            self.sent = Some(at);
        }
    }

    fn put(&mut self, item: Item, news: &mut News) {
        match item {
            Item::Whole(received) => self.put_whole(received, news),
            Item::Broken { name, version: at, reason } => {
                self.put_broken(&name, version(at.as_deref()), &reason, news);
            }
        }
    }

    /// Takes what an object is. A pod or namespace that can't be taken as it stands stays as it was, if it was known: a
    /// pod without an address would be a pod that nothing isolates.
    fn put_whole(&mut self, Received { object, version: at }: Received, news: &mut News) {
        let digest = Some(self.hasher.hash_one(&object));
        let Object { change, problems } = object;
        let Some(change) = change else { return };
        let mut key = Key::of(&change);
        let troubled = !problems.is_empty();
        let before = self.objects.get(&key);
        let stays = match self.kind {
            Kind::Pod | Kind::Namespace => troubled && before.is_some(),
            Kind::NetworkPolicy => false,
        };
        if before.is_none_or(|seen| seen.digest != digest) {
            if troubled || before.is_some_and(|seen| seen.troubled) {
                news.problems.push((origin(&key), problems));
            }
            if !stays {
                let change = self.pools.shared(change);
                key = Key::of(&change);
                news.changes.push(change);
            }
        }
        let seen = Seen { version: version(at.as_deref()), digest, troubled, listing: self.listing };
        self.objects.insert(key, seen);
    }

    /// An object of this name is there, and nothing else of it can be understood. What is known of it stays; a policy
    /// of which nothing is known isolates its namespace.
    fn put_broken(&mut self, name: &ObjectName, at: Version, reason: &str, news: &mut News) {
        let key = name.key(self.kind);
        let (change, done) = match (self.kind, self.objects.contains_key(&key)) {
            (Kind::Pod | Kind::Namespace | Kind::NetworkPolicy, true) => (None, "it stays as it was"),
            (Kind::Pod | Kind::Namespace, false) => (None, "it is left out"),
            (Kind::NetworkPolicy, false) => {
                let policy = convert::unknown_policy(&name.namespace, &name.name);
                (policy.change, "it isolates all pods of its namespace and allows nothing")
            }
        };
        let message = format!("{reason}; {done}");
        news.problems.push((origin(&key), vec![Problem { object: key.name(), message }]));
        news.changes.extend(change);
        self.objects.insert(key, Seen { version: at, digest: None, troubled: true, listing: self.listing });
    }
}

/// The name of an object that can't be understood otherwise.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ObjectName {
    /// Empty for a namespace.
    pub(super) namespace: String,
    pub(super) name: String,
}

impl ObjectName {
    fn key(&self, kind: Kind) -> Key {
        let Self { namespace, name } = self;
        match kind {
            Kind::Pod => Key::Pod(PodKey::new(namespace.as_str(), name.as_str())),
            Kind::Namespace => Key::Namespace(name.as_str().into()),
            Kind::NetworkPolicy => Key::Policy(PolicyKey::new(namespace.as_str(), name.as_str())),
        }
    }
}

/// Whether something of version `at` is older than what is known, or the same.
fn is_old(at: Version, known: Version) -> bool {
    matches!((at, known), (Some(at), Some(known)) if at <= known)
}

/// The object's path in the API.
fn origin(key: &Key) -> String {
    match key {
        Key::Namespace(name) => format!("/api/v1/namespaces/{name}"),
        Key::Pod(PodKey { namespace, name }) => format!("/api/v1/namespaces/{namespace}/pods/{name}"),
        Key::Policy(PolicyKey { namespace, name }) => {
            format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/{name}")
        }
    }
}

fn tell_gone(key: Key, seen: &Seen, news: &mut News) {
    if seen.troubled {
        news.problems.push((origin(&key), Vec::new()));
    }
    news.changes.push(key.gone());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::source::convert::received;

    fn pod(name: &str, version: &str, address: &str) -> Item {
        let value = json!({
            "metadata": {"namespace": "x", "name": name, "resourceVersion": version},
            "status": {"podIP": address},
        });
        Item::Whole(received(Kind::Pod, &value.to_string()).unwrap())
    }

    /// What the news are, in short.
    fn told(act: impl FnOnce(&mut News)) -> Vec<String> {
        let mut news = News::default();
        act(&mut news);
        let changes = news.changes.iter().map(|change| match change {
            Change::Pod(key, Some(pod)) => format!("{key} {:?}", pod.addresses),
            Change::Pod(key, None) => format!("{key} gone"),
            Change::Namespace(..) | Change::Policy(..) => format!("{change:?}"),
        });
        let problems = news.problems.iter().map(|(origin, problems)| match problems.as_slice() {
            [] => format!("{origin}: no problem"),
            problems => format!("{origin}: {}", problems[0].message),
        });
        changes.chain(problems).collect()
    }

    #[test]
    fn what_comes_late_or_twice_is_no_news() {
        let mut known = Known::new(Kind::Pod);
        let one = told(|news| known.applied(pod("a", "5", "10.0.0.1"), news));
        assert_eq!(one, ["x/a {10.0.0.1}"]);
        assert_eq!(told(|news| known.applied(pod("a", "5", "10.0.0.1"), news)), [""; 0], "twice");
        assert_eq!(told(|news| known.applied(pod("a", "4", "10.0.0.9"), news)), [""; 0], "late");
        assert_eq!(told(|news| known.applied(pod("a", "6", "10.0.0.1"), news)), [""; 0], "nothing new");
        assert_eq!(told(|news| known.deleted(&pod("a", "3", "10.0.0.1"), news)), [""; 0], "of one before");
        assert_eq!(told(|news| known.deleted(&pod("a", "7", "10.0.0.1"), news)), ["x/a gone"]);
        assert_eq!(told(|news| known.applied(pod("a", "6", "10.0.0.1"), news)), [""; 0], "it is gone");
        let again = told(|news| known.applied(pod("a", "8", "10.0.0.2"), news));
        assert_eq!(again, ["x/a {10.0.0.2}"], "one of the same name");
        known.deleted(&pod("a", "9", "10.0.0.2"), &mut News::default());
        known.sent_up_to(Some(8));
        assert_eq!(known.gone.len(), 1, "something older may still come");
        known.sent_up_to(Some(9));
        assert_eq!(known.gone.len(), 0);
        assert_eq!(told(|news| known.applied(pod("a", "8", "10.0.0.2"), news)), [""; 0], "it was sent");
    }

    #[test]
    fn versions_that_are_no_numbers_have_no_order() {
        let mut known = Known::new(Kind::Pod);
        for (version, address) in [("b", "10.0.0.1"), ("a", "10.0.0.2")] {
            let news = told(|news| known.applied(pod("a", version, address), news));
            assert_eq!(news, [format!("x/a {{{address}}}")]);
        }
        assert_eq!(told(|news| known.deleted(&pod("a", "0", "10.0.0.2"), news)), ["x/a gone"]);
    }

    #[test]
    fn what_a_list_does_not_have_is_gone() {
        let mut known = Known::new(Kind::Pod);
        let mut list = |items: Vec<Item>| {
            told(|news| {
                known.begin_list();
                items.into_iter().for_each(|item| known.listed(item, news));
                known.end_list(None, news);
            })
        };
        let two = list(vec![pod("a", "5", "10.0.0.1"), pod("b", "6", "10.0.0.2")]);
        assert_eq!(two, ["x/a {10.0.0.1}", "x/b {10.0.0.2}"]);
        assert_eq!(list(vec![pod("a", "5", "10.0.0.1")]), ["x/b gone"]);
        let restored = list(vec![pod("a", "3", "10.0.0.3")]);
        assert_eq!(restored, ["x/a {10.0.0.3}"], "a store that was restored is the truth");
        assert_eq!(list(vec![]), ["x/a gone"]);
        // A list that broke off deletes nothing.
        known.begin_list();
        known.listed(pod("c", "9", "10.0.0.4"), &mut News::default());
        known.begin_list();
        known.listed(pod("d", "10", "10.0.0.5"), &mut News::default());
        assert_eq!(known.len(), 2);
        assert_eq!(told(|news| known.end_list(Some(10), news)), ["x/c gone"]);
        assert_eq!(told(|news| known.applied(pod("c", "9", "10.0.0.4"), news)), [""; 0], "before the list");
    }

    fn broken(name: &str, version: &str) -> Item {
        let name = ObjectName { namespace: "x".into(), name: name.into() };
        Item::Broken { name, version: Some(version.into()), reason: "odd".into() }
    }

    #[test]
    fn what_cannot_be_understood_stays_what_it_was() {
        let mut known = Known::new(Kind::Pod);
        known.applied(pod("a", "1", "10.0.0.1"), &mut News::default());
        let origin = "/api/v1/namespaces/x/pods/a";
        let odd = told(|news| known.applied(pod("a", "2", "10.0.0.256"), news));
        let reason = r#"status.podIP: "10.0.0.256" is not an IP address; left out"#;
        assert_eq!(odd, [format!("{origin}: {reason}")]);
        let odd = told(|news| known.applied(broken("a", "3"), news));
        assert_eq!(odd, [format!("{origin}: odd; it stays as it was")]);
        let good = told(|news| known.applied(pod("a", "4", "10.0.0.1"), news));
        assert_eq!(good, ["x/a {10.0.0.1}".to_owned(), format!("{origin}: no problem")]);
        known.applied(broken("a", "5"), &mut News::default());
        let gone = told(|news| known.deleted(&pod("a", "6", "10.0.0.1"), news));
        assert_eq!(gone, ["x/a gone".to_owned(), format!("{origin}: no problem")]);

        let mut policies = Known::new(Kind::NetworkPolicy);
        let mut news = News::default();
        policies.applied(broken("p", "1"), &mut news);
        let [Change::Policy(key, Some(policy))] = news.changes.as_slice() else { panic!("{news:?}") };
        assert_eq!((key.to_string().as_str(), policy.ingress.as_deref()), ("x/p", Some(&[][..])));
        assert_eq!(policy.egress, Some(vec![]), "it isolates its namespace both ways");
    }
}
