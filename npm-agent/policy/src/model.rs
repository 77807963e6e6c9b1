//! Parsed inputs: the Kubernetes objects that decide, with no ambiguity left.
//!
//! Whatever the API leaves to defaulting (missing, null, empty, "TCP if absent") is decided by the converter
//! that builds these values, once; the types here cannot express the question. Strings are `Arc<str>` because
//! a cluster repeats few of them many times.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::shared::{Pool, Shared};

/// The label that Kubernetes puts on every namespace, with the namespace's name as its value
/// (Kubernetes documentation, "Automatic labelling"; immutable).
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// Labels of a pod or a namespace. Many pods have the same.
pub type Labels = Shared<BTreeMap<Arc<str>, Arc<str>>>;

/// Identifies a pod, a policy: a name within a namespace. Prints as `namespace/name`.
macro_rules! namespaced_key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name {
            /// The namespace's name.
            pub namespace: Arc<str>,
            /// The object's name.
            pub name: Arc<str>,
        }

        impl $name {
            /// Makes a key of the two names, as they are.
            pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
                Self { namespace: namespace.into(), name: name.into() }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}/{}", self.namespace, self.name)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}/{}", self.namespace, self.name)
            }
        }
    };
}

namespaced_key!(
    /// Identifies a pod.
    PodKey
);
namespaced_key!(
    /// Identifies a NetworkPolicy.
    PolicyKey
);

/// A pod, as far as policy is concerned.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pod {
    /// Who it is.
    pub key: PodKey,
    /// `spec.nodeName`; `None` while it is not scheduled.
    pub node: Option<Arc<str>>,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `status.podIPs` (and `status.podIP`): all of the pod's addresses, of both families.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether its addresses are its own.
    pub network: PodNetwork,
    /// Whether it has ended for good.
    pub phase: PodPhase,
    /// Named container ports, of init and sidecar containers too. Ports without a name decide nothing.
    pub ports: Shared<BTreeSet<NamedPort>>,
    /// `metadata.creationTimestamp` in seconds since 1970; 0 when unknown. Of two pods that claim an address the
    /// one created last holds it (see [`crate::world::World`]).
    pub created: i64,
}

/// Whether a pod's addresses are its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum PodNetwork {
    /// `hostNetwork: true`: the addresses are the node's, so the pod is neither a subject nor a peer.
    #[default]
    Host,
    /// The pod has a network namespace and addresses of its own.
    Own,
}

/// How far a pod's life has come, as far as policy is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum PodPhase {
    /// `Succeeded` or `Failed`: it sends nothing more and its address may be another's already.
    #[default]
    Ended,
    /// Its containers have not all started. With an address it counts as [`PodPhase::Active`] does (init containers run),
    /// but tables of who can talk to whom leave it out.
    Pending,
    /// Running or Unknown, also while terminating: it may send.
    Active,
}

/// A named port of a pod's container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// `ports[].name`.
    pub name: Arc<str>,
    /// `ports[].protocol`.
    pub protocol: Protocol,
    /// `ports[].containerPort`, 1 to 65535.
    pub port: u16,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Namespace {
    /// Its name.
    pub name: Arc<str>,
    /// Its labels. The converter has set [`NAMESPACE_NAME_LABEL`].
    pub labels: Labels,
}

impl Namespace {
    /// Makes a namespace with these labels and [`NAMESPACE_NAME_LABEL`], whatever `labels` say of that one.
    pub fn new(name: impl Into<Arc<str>>, mut labels: Labels) -> Self {
        let name = name.into();
        labels.insert(NAMESPACE_NAME_LABEL.into(), Arc::clone(&name));
        Self { name, labels }
    }
}

/// A NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Who it is; it selects pods of its own namespace only.
    pub key: PolicyKey,
    /// `spec.podSelector`.
    pub subjects: Selector,
    /// `None`: the policy does not isolate its subjects for ingress. `Some(rules)`: it does, and allows the
    /// union of the rules (nothing, if there is none).
    pub ingress: Option<Vec<Rule>>,
    /// The same for egress.
    pub egress: Option<Vec<Rule>>,
}

/// One ingress or egress rule: allows the flows that match `peers` AND `ports`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// `from` or `to`.
    pub peers: Peers,
    /// `ports`.
    pub ports: Ports,
}

/// Whom a rule allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peers {
    /// The union of these peers; nobody, if there is none.
    Only(Vec<Peer>),
    /// Anybody, addresses outside the cluster included (`from`/`to` missing or empty).
    Any,
}

/// One entry of `from` or `to`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Pods that match `pods` in the namespaces of `namespaces`.
    Pods {
        /// Where the pods are.
        namespaces: NamespaceScope,
        /// `podSelector`; everything when only `namespaceSelector` is given.
        pods: Selector,
    },
    /// Addresses, of pods too.
    Block(Block),
}

/// The namespaces that a pod peer looks in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamespaceScope {
    /// This namespace: the policy's own, where no `namespaceSelector` is given.
    Named(Arc<str>),
    /// All namespaces whose labels match.
    Matching(Selector),
}

/// An `ipBlock`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    /// `cidr` without host bits.
    pub cidr: IpNet,
    /// `except`, without host bits, each inside `cidr` and smaller. They cut this block only.
    pub except: BTreeSet<IpNet>,
}

/// Which ports a rule allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ports {
    /// The union of these ports; none, if there is none.
    Only(Vec<Port>),
    /// Everything, protocols without ports (ICMP and others) included (`ports` missing or empty).
    Any,
}

/// One entry of `ports`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// `port` to `endPort`, inclusive. Without `port`: 0 to 65535.
    Range {
        /// The protocol; the converter has put TCP where it was missing.
        protocol: Protocol,
        /// The first port.
        first: u16,
        /// The last port, not below `first`.
        last: u16,
    },
    /// A port name, looked up by name and protocol on the destination pod, pod by pod.
    Named {
        /// The protocol that the container port must have.
        protocol: Protocol,
        /// The name.
        name: Arc<str>,
    },
}

/// The protocols that a NetworkPolicy can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// IP protocol 6.
    Tcp,
    /// IP protocol 17.
    Udp,
    /// IP protocol 132.
    Sctp,
}

impl Protocol {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The IANA protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A label selector: every requirement must hold. No requirement: matches everything.
///
/// `matchLabels` entries are `In` requirements with one value. Requirements are kept sorted and without
/// duplicates, so that equal conjunctions compare equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Selector {
    requirements: Shared<BTreeSet<Requirement>>,
}

impl Selector {
    /// Makes a selector of these requirements.
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        Self { requirements: requirements.into_iter().collect() }
    }

    /// The selector that matches everything.
    pub fn everything() -> Self {
        Self::default()
    }

    /// The same, shared with the pool's.
    pub fn shared(&self, pool: &mut Pool<Shared<BTreeSet<Requirement>>>) -> Self {
        Self { requirements: pool.shared(self.requirements.clone()) }
    }

    /// The requirements, in order.
    pub fn requirements(&self) -> impl ExactSizeIterator<Item = &Requirement> {
        self.requirements.iter()
    }
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    /// The label key.
    pub key: Arc<str>,
    /// What must hold of the key's value.
    pub operator: Operator,
}

/// The operators of `matchExpressions` (apimachinery, `labels.Requirement.Matches`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// The key is there and its value is one of these. `""` is a value like any other.
    In(BTreeSet<Arc<str>>),
    /// The key is missing, or its value is none of these.
    NotIn(BTreeSet<Arc<str>>),
    /// The key is there.
    Exists,
    /// The key is missing.
    DoesNotExist,
}
