//! The present cluster: the objects as last seen, and indexes over them.
//!
//! A [`World`] is a function of the objects it holds, never of the order in which they came. It stores and finds; it
//! decides nothing about policies.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use imbl::OrdSet;

use crate::few::Few;
use crate::model::{Labels, Namespace, Pod, PodKey, PodNetwork, PodPhase, Policy, PolicyKey};

/// One object as it is from now on; `None`: it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// A pod.
    Pod(PodKey, Option<Pod>),
    /// A namespace.
    Namespace(Arc<str>, Option<Namespace>),
    /// A policy.
    Policy(PolicyKey, Option<Policy>),
}

/// A label, as an index key.
type Label = (Arc<str>, Arc<str>);

/// A pod in the place of its key: in a large cluster the keys of all indexes would be more than the pods.
#[derive(Clone, Debug)]
struct ByKey(Arc<Pod>);

impl Borrow<PodKey> for ByKey {
    fn borrow(&self) -> &PodKey {
        &self.0.key
    }
}

impl Ord for ByKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.key.cmp(&other.0.key)
    }
}

/// A pod that claims an address, in the place of (created, key).
#[derive(Clone, Debug)]
struct ByAge(Arc<Pod>);

impl Ord for ByAge {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.0.created, &self.0.key).cmp(&(other.0.created, &other.0.key))
    }
}

/// Compared as they are ordered.
macro_rules! compared {
    ($of:ty) => {
        impl PartialEq for $of {
            fn eq(&self, other: &Self) -> bool {
                self.cmp(other).is_eq()
            }
        }

        impl Eq for $of {}

        impl PartialOrd for $of {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }
    };
}
compared!(ByKey);
compared!(ByAge);

/// The present cluster.
#[derive(Clone, Debug, Default)]
pub struct World {
    pods: BTreeSet<ByKey>,
    namespaces: BTreeMap<Arc<str>, Arc<Namespace>>,
    policies: BTreeMap<PolicyKey, Arc<Policy>>,
    /// Who claims an address, the holder last: see [`World::holder`].
    claims: BTreeMap<IpAddr, Few<ByAge>>,
    /// The addresses that have more than one claim.
    contested: BTreeSet<IpAddr>,
    pods_by_label: BTreeMap<Label, Few<ByKey>>,
}

/// How many objects of each kind there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WorldSize {
    /// Pods of all nodes, those that have ended or are on the host's network included.
    pub pods: usize,
    /// Namespaces that were seen.
    pub namespaces: usize,
    /// Policies, those that select nothing included.
    pub policies: usize,
}

/// The objects of a [`World`], each kind in order of its keys, without the indexes over them. A copy shares the objects.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Objects {
    /// The pods.
    pub pods: Vec<Arc<Pod>>,
    /// The namespaces that were seen.
    pub namespaces: Vec<Arc<Namespace>>,
    /// The policies.
    pub policies: Vec<Arc<Policy>>,
}

impl From<Objects> for World {
    /// The same world: what [`World::objects`] gave, indexed again.
    fn from(Objects { pods, namespaces, policies }: Objects) -> Self {
        let mut world = Self::default();
        for pod in pods {
            world.index(&pod);
            world.pods.insert(ByKey(pod));
        }
        world.namespaces = namespaces.into_iter().map(|it| (Arc::clone(&it.name), it)).collect();
        world.policies = policies.into_iter().map(|it| (it.key.clone(), it)).collect();
        world
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        // The other fields are indexes over these.
        self.pods().eq(other.pods()) && self.namespaces == other.namespaces && self.policies == other.policies
    }
}

impl World {
    /// Replaces one object. The key of the change counts, also for a pod or a policy that has another by the caller's
    /// mistake.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Pod(key, pod) => {
                if let Some(ByKey(old)) = self.pods.take(&key) {
                    self.unindex(&old);
                }
                if let Some(pod) = pod {
                    let pod = Arc::new(Pod { key, ..pod });
                    self.index(&pod);
                    self.pods.insert(ByKey(pod));
                }
            }
            Change::Namespace(name, namespace) => match namespace {
                Some(namespace) => drop(self.namespaces.insert(name, Arc::new(namespace))),
                None => drop(self.namespaces.remove(&name)),
            },
            Change::Policy(key, policy) => match policy {
                Some(policy) => drop(self.policies.insert(key, Arc::new(policy))),
                None => drop(self.policies.remove(&key)),
            },
        }
    }

    /// How many objects of each kind there are, without counting them.
    pub fn size(&self) -> WorldSize {
        WorldSize { pods: self.pods.len(), namespaces: self.namespaces.len(), policies: self.policies.len() }
    }

    /// All objects, as pointers: for somebody who wants to look at a whole world elsewhere, at the price of counting them.
    pub fn objects(&self) -> Objects {
        Objects {
            pods: self.pods().cloned().collect(),
            namespaces: self.namespaces.values().cloned().collect(),
            policies: self.policies.values().cloned().collect(),
        }
    }

    /// All pods, in order of their keys.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.iter().map(|ByKey(pod)| pod)
    }

    /// One pod.
    pub fn pod(&self, key: &PodKey) -> Option<&Arc<Pod>> {
        self.pods.get(key).map(|ByKey(pod)| pod)
    }

    /// The pods of a namespace.
    pub fn pods_in<'a>(&'a self, namespace: &'a Arc<str>) -> impl Iterator<Item = &'a Arc<Pod>> {
        let first = PodKey::new(Arc::clone(namespace), "");
        self.pods
            .range((Bound::Included(first), Bound::Unbounded))
            .map(|ByKey(pod)| pod)
            .take_while(move |pod| pod.key.namespace == *namespace)
    }

    /// The pods that carry a label, in all namespaces and in order of their keys.
    pub fn pods_with<'a>(
        &'a self,
        key: &Arc<str>,
        value: &Arc<str>,
    ) -> impl Iterator<Item = &'a Arc<Pod>> + use<'a> {
        let pods = self.pods_by_label.get(&(Arc::clone(key), Arc::clone(value)));
        pods.into_iter().flat_map(Few::iter).map(|ByKey(pod)| pod)
    }

    /// All namespaces that have been seen, in order of their names.
    pub fn namespaces(&self) -> impl Iterator<Item = &Arc<Namespace>> {
        self.namespaces.values()
    }

    /// One namespace, if it has been seen.
    pub fn namespace(&self, name: &str) -> Option<&Arc<Namespace>> {
        self.namespaces.get(name)
    }

    /// The labels of a namespace. One that has not been seen (a pod came before it, or a directory of manifests
    /// names none) has what every namespace has: [`crate::model::NAMESPACE_NAME_LABEL`].
    pub fn namespace_labels(&self, name: &Arc<str>) -> Labels {
        match self.namespaces.get(name) {
            Some(namespace) => namespace.labels.clone(),
            None => Namespace::new(Arc::clone(name), Labels::new()).labels,
        }
    }

    /// All policies, in order of their keys.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// One policy.
    pub fn policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// The pod that holds an address: of the active pods with a network of their own that claim it, the one
    /// created last (then the greatest key). So an address that was given to a new pod before the old one's end
    /// was seen is the new pod's, in whatever order the events come.
    pub fn holder(&self, address: IpAddr) -> Option<&Arc<Pod>> {
        let ByAge(pod) = self.claims.get(&address)?.last()?;
        Some(pod)
    }

    /// Everybody who claims an address, the holder last.
    pub fn claimants(&self, address: IpAddr) -> impl DoubleEndedIterator<Item = &PodKey> {
        self.claims.get(&address).into_iter().flat_map(Few::iter).map(|ByAge(pod)| &pod.key)
    }

    /// The addresses that a pod holds: none for one that has ended or is on the host's network.
    pub fn addresses_held(&self, pod: &Pod) -> BTreeSet<IpAddr> {
        if !claims_addresses(pod) {
            return BTreeSet::new();
        }
        let holds = |address: &&IpAddr| self.holder(**address).is_some_and(|holder| holder.key == pod.key);
        pod.addresses.iter().filter(holds).copied().collect()
    }

    /// The addresses that pods of a node hold: the definition of [`crate::goal::Goal::locals`].
    pub fn local_addresses(&self, node: &str) -> OrdSet<IpAddr> {
        let local = self.pods().filter(|pod| pod.node.as_deref() == Some(node));
        local.flat_map(|pod| self.addresses_held(pod)).collect()
    }

    /// The addresses that more than one pod claims.
    pub fn contested(&self) -> impl Iterator<Item = IpAddr> {
        self.contested.iter().copied()
    }

    fn index(&mut self, pod: &Arc<Pod>) {
        for (name, value) in &pod.labels {
            let label = (Arc::clone(name), Arc::clone(value));
            self.pods_by_label.entry(label).or_default().insert(ByKey(Arc::clone(pod)));
        }
        if claims_addresses(pod) {
            for address in &pod.addresses {
                let claims = self.claims.entry(*address).or_default();
                claims.insert(ByAge(Arc::clone(pod)));
                if claims.len() > 1 {
                    self.contested.insert(*address);
                }
            }
        }
    }

    fn unindex(&mut self, pod: &Arc<Pod>) {
        for (name, value) in &pod.labels {
            let label = (Arc::clone(name), Arc::clone(value));
            if let Some(pods) = self.pods_by_label.get_mut(&label) {
                pods.remove(&ByKey(Arc::clone(pod)));
                if pods.is_empty() {
                    self.pods_by_label.remove(&label);
                }
            }
        }
        if claims_addresses(pod) {
            for address in &pod.addresses {
                if let Some(claims) = self.claims.get_mut(address) {
                    claims.remove(&ByAge(Arc::clone(pod)));
                    if claims.len() < 2 {
                        self.contested.remove(address);
                    }
                    if claims.is_empty() {
                        self.claims.remove(address);
                    }
                }
            }
        }
    }
}

/// Whether the pod's addresses are its own and in use.
fn claims_addresses(pod: &Pod) -> bool {
    match (pod.network, pod.phase) {
        (PodNetwork::Own, PodPhase::Pending | PodPhase::Active) => true,
        (PodNetwork::Own, PodPhase::Ended) => false,
        (PodNetwork::Host, PodPhase::Ended | PodPhase::Pending | PodPhase::Active) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_of_the_objects_of_another_is_the_same_with_its_indexes() {
        let mut world = World::default();
        for (name, created, network, phase) in [
            ("old", 1, PodNetwork::Own, PodPhase::Active),
            ("new", 2, PodNetwork::Own, PodPhase::Active),
            ("host", 3, PodNetwork::Host, PodPhase::Active),
            ("ended", 4, PodNetwork::Own, PodPhase::Ended),
        ] {
            let key = PodKey::new("x", name);
            let pod = Pod {
                key: key.clone(),
                node: None,
                labels: Labels::from([("app".into(), name.into()), ("all".into(), "".into())]),
                addresses: [IpAddr::from([10, 0, 0, 1])].into(),
                network,
                phase,
                ports: [].into(),
                created,
            };
            world.apply(Change::Pod(key, Some(pod)));
        }
        world.apply(Change::Namespace("x".into(), Some(Namespace::new("x", Labels::new()))));
        let key = PolicyKey::new("x", "p");
        let subjects = crate::model::Selector::everything();
        let policy = Policy { key: key.clone(), subjects, ingress: None, egress: Some(vec![]) };
        world.apply(Change::Policy(key, Some(policy)));

        let again = World::from(world.objects());
        assert_eq!(again, world);
        assert_eq!((again.size(), again.objects()), (world.size(), world.objects()));
        assert_eq!((&again.claims, &again.pods_by_label), (&world.claims, &world.pods_by_label));
        assert_eq!(again.holder([10, 0, 0, 1].into()).map(|pod| &*pod.key.name), Some("new"));
    }
}
