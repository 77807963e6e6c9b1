//! The debug API: world, goal and sets as JSON, and Azure NPM's `manager`.
//!
//! | path | answers |
//! | --- | --- |
//! | `/debug/world` | the cluster's objects, as far as policy is concerned |
//! | `/debug/goal` | what this node is to enforce: compiled policies and the pods they apply to |
//! | `/debug/sets` | the sets that the policies name, with their members and their names in the kernel |
//! | `/npm/v1/debug/manager` | what Azure NPM's tools read: see [`manager`] |

pub(super) mod manager;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use npm_policy::goal::{Clause, Family, Member, NamedMatch, PeerMatch, PortMatch, PortRange};
use npm_policy::model::{
    Block, Labels, NamedPort, NamespaceScope, Operator, Peer, Peers, Pod, PodNetwork, PodPhase, Policy, Port,
    Ports, Requirement, Rule, Selector,
};
use serde::{Serialize, Serializer};

use super::view::View;

/// Where Azure NPM's tools look (`npm/http/api/api.go`).
pub(super) const MANAGER_PATH: &str = "/npm/v1/debug/manager";

/// A document of the debug API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Document {
    World,
    Goal,
    Sets,
    Manager,
}

impl Document {
    pub(super) const ALL: [Self; 4] = [Self::World, Self::Goal, Self::Sets, Self::Manager];

    pub(super) fn path(self) -> &'static str {
        match self {
            Self::World => "/debug/world",
            Self::Goal => "/debug/goal",
            Self::Sets => "/debug/sets",
            Self::Manager => MANAGER_PATH,
        }
    }

    pub(super) fn render(self, view: &View) -> String {
        let text = match self {
            Self::World => serde_json::to_string(&world(view)),
            Self::Goal => serde_json::to_string(&goal(view)),
            Self::Sets => serde_json::to_string(&sets(view)),
            Self::Manager => serde_json::to_string(&manager::Manager::of(view)),
        };
        text.expect("strings, numbers and maps with string keys always serialise") + "\n"
    }
}

/// A list that is written as it is walked: a copy of a large world in another form would be as large again.
struct List<F>(F);

impl<T: Serialize, I: Iterator<Item = T>, F: Fn() -> I> Serialize for List<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

/// The same for an object with keys.
struct Map<F>(F);

impl<K: Serialize, V: Serialize, I: Iterator<Item = (K, V)>, F: Fn() -> I> Serialize for Map<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map((self.0)())
    }
}

fn world(view: &View) -> impl Serialize {
    #[derive(Serialize)]
    struct World<'a, N, P, O> {
        node: &'a str,
        namespaces: N,
        pods: P,
        policies: O,
    }
    #[derive(Serialize)]
    struct NamespaceJson<'a> {
        name: &'a str,
        labels: BTreeMap<&'a str, &'a str>,
    }
    World {
        node: &view.node,
        namespaces: List(|| {
            view.world.namespaces().map(|it| NamespaceJson { name: &it.name, labels: labels(&it.labels) })
        }),
        pods: List(|| view.world.pods().map(|pod| PodJson::of(pod))),
        policies: List(|| view.world.policies().map(|policy| PolicyJson::of(policy))),
    }
}

fn labels(labels: &Labels) -> BTreeMap<&str, &str> {
    labels.iter().map(|(key, value)| (&**key, &**value)).collect()
}

#[derive(Serialize)]
struct PodJson<'a> {
    namespace: &'a str,
    name: &'a str,
    node: Option<&'a str>,
    labels: BTreeMap<&'a str, &'a str>,
    addresses: Vec<&'a IpAddr>,
    host_network: bool,
    phase: &'static str,
    ports: Vec<NamedPortJson<'a>>,
    created: i64,
}

#[derive(Serialize)]
struct NamedPortJson<'a> {
    name: &'a str,
    protocol: String,
    port: u16,
}

impl<'a> PodJson<'a> {
    fn of(pod: &'a Pod) -> Self {
        let Pod { key, node, labels: of, addresses, network, phase, ports, created } = pod;
        let port = |NamedPort { name, protocol, port }: &'a NamedPort| NamedPortJson {
            name,
            protocol: protocol.to_string(),
            port: *port,
        };
        Self {
            namespace: &key.namespace,
            name: &key.name,
            node: node.as_deref(),
            labels: labels(of),
            addresses: addresses.iter().collect(),
            host_network: match network {
                PodNetwork::Host => true,
                PodNetwork::Own => false,
            },
            phase: match phase {
                PodPhase::Active => "active",
                PodPhase::Pending => "pending",
                PodPhase::Ended => "ended",
            },
            ports: ports.iter().map(port).collect(),
            created: *created,
        }
    }
}

/// A policy in words of the API, without what the API leaves to defaulting: `any` is any, a list is no more than it holds,
/// and a direction that is not isolated is null.
#[derive(Serialize)]
struct PolicyJson<'a> {
    namespace: &'a str,
    name: &'a str,
    pod_selector: Vec<RequirementJson<'a>>,
    ingress: Option<Vec<RuleJson<'a>>>,
    egress: Option<Vec<RuleJson<'a>>>,
}

impl<'a> PolicyJson<'a> {
    fn of(policy: &'a Policy) -> Self {
        let Policy { key, subjects, ingress, egress } = policy;
        let rules = |rules: &'a Option<Vec<Rule>>| Some(rules.as_ref()?.iter().map(RuleJson::of).collect());
        Self {
            namespace: &key.namespace,
            name: &key.name,
            pod_selector: requirements(subjects),
            ingress: rules(ingress),
            egress: rules(egress),
        }
    }
}

/// `"any"`, or a list of what it is.
#[derive(Serialize)]
#[serde(untagged)]
enum AnyOr<T> {
    Any(&'static str),
    Only(T),
}

const ANY: &str = "any";

#[derive(Serialize)]
struct RuleJson<'a> {
    peers: AnyOr<Vec<PeerJson<'a>>>,
    ports: AnyOr<Vec<PortJson<'a>>>,
}

impl<'a> RuleJson<'a> {
    fn of(rule: &'a Rule) -> Self {
        let Rule { peers, ports } = rule;
        Self {
            peers: match peers {
                Peers::Any => AnyOr::Any(ANY),
                Peers::Only(list) => AnyOr::Only(list.iter().map(PeerJson::of).collect()),
            },
            ports: match ports {
                Ports::Any => AnyOr::Any(ANY),
                Ports::Only(list) => AnyOr::Only(list.iter().map(PortJson::of).collect()),
            },
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum PeerJson<'a> {
    Named { namespace: &'a str, pod_selector: Vec<RequirementJson<'a>> },
    Matching { namespace_selector: Vec<RequirementJson<'a>>, pod_selector: Vec<RequirementJson<'a>> },
    Block { cidr: String, except: Vec<String> },
}

impl<'a> PeerJson<'a> {
    fn of(peer: &'a Peer) -> Self {
        match peer {
            Peer::Pods { namespaces: NamespaceScope::Named(namespace), pods } => {
                Self::Named { namespace, pod_selector: requirements(pods) }
            }
            Peer::Pods { namespaces: NamespaceScope::Matching(selector), pods } => Self::Matching {
                namespace_selector: requirements(selector),
                pod_selector: requirements(pods),
            },
            Peer::Block(Block { cidr, except }) => Self::Block {
                cidr: cidr.to_string(),
                except: except.iter().map(ToString::to_string).collect(),
            },
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum PortJson<'a> {
    Range { protocol: String, first: u16, last: u16 },
    Named { protocol: String, name: &'a str },
}

impl<'a> PortJson<'a> {
    fn of(port: &'a Port) -> Self {
        match port {
            Port::Range { protocol, first, last } => {
                Self::Range { protocol: protocol.to_string(), first: *first, last: *last }
            }
            Port::Named { protocol, name } => Self::Named { protocol: protocol.to_string(), name },
        }
    }
}

#[derive(Serialize)]
struct RequirementJson<'a> {
    key: &'a str,
    operator: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<Vec<&'a str>>,
}

fn requirements(selector: &Selector) -> Vec<RequirementJson<'_>> {
    selector.requirements().map(RequirementJson::of).collect()
}

impl<'a> RequirementJson<'a> {
    fn of(Requirement { key, operator }: &'a Requirement) -> Self {
        let (operator, values) = match operator {
            Operator::In(values) => ("In", Some(values)),
            Operator::NotIn(values) => ("NotIn", Some(values)),
            Operator::Exists => ("Exists", None),
            Operator::DoesNotExist => ("DoesNotExist", None),
        };
        let values = values.map(|values| values.iter().map(Arc::as_ref).collect());
        Self { key, operator, values }
    }
}

fn goal(view: &View) -> impl Serialize {
    #[derive(Serialize)]
    struct GoalJson<'a, P, S> {
        node: &'a str,
        generation: u64,
        policies: P,
        subjects: S,
    }
    GoalJson {
        node: &view.node,
        generation: view.generation,
        policies: Map(|| {
            view.goal.programs.iter().map(|(key, program)| {
                let clauses = |clauses: &'_ Option<Vec<Clause>>| {
                    Some(clauses.as_ref()?.iter().map(|it| clause(view, it)).collect())
                };
                let program = ProgramJson {
                    subjects: view.name(&program.subjects),
                    ingress: clauses(&program.ingress),
                    egress: clauses(&program.egress),
                };
                (key.to_string(), program)
            })
        }),
        subjects: Map(|| view.goal.subjects.iter().map(|(pod, held)| (pod.to_string(), held))),
    }
}

#[derive(Serialize)]
struct ProgramJson<'a> {
    subjects: &'a str,
    ingress: Option<Vec<ClauseJson<'a>>>,
    egress: Option<Vec<ClauseJson<'a>>>,
}

/// Sets by their names.
#[derive(Serialize)]
struct ClauseJson<'a> {
    peers: AnyOr<Vec<&'a str>>,
    ports: AnyOr<Vec<PortMatchJson<'a>>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum PortMatchJson<'a> {
    Range { protocol: String, first: u16, last: u16 },
    Named { protocol: String, set: &'a str },
}

fn clause<'a>(view: &'a View, Clause { peers, ports }: &Clause) -> ClauseJson<'a> {
    let range = |PortRange { protocol, first, last }: &PortRange| PortMatchJson::Range {
        protocol: protocol.to_string(),
        first: *first,
        last: *last,
    };
    let named = |NamedMatch { protocol, set }: &NamedMatch| PortMatchJson::Named {
        protocol: protocol.to_string(),
        set: view.name(set),
    };
    ClauseJson {
        peers: match peers {
            PeerMatch::Any => AnyOr::Any(ANY),
            PeerMatch::Sets(sets) => AnyOr::Only(sets.iter().map(|set| view.name(set)).collect()),
        },
        ports: match ports {
            PortMatch::Any => AnyOr::Any(ANY),
            PortMatch::Only { ranges, named: sets } => {
                AnyOr::Only(ranges.iter().map(range).chain(sets.iter().map(named)).collect())
            }
        },
    }
}

fn sets(view: &View) -> impl Serialize {
    #[derive(Serialize)]
    struct SetsJson<'a, S> {
        node: &'a str,
        generation: u64,
        sets: S,
    }
    #[derive(Serialize)]
    struct SetJson<'a, M> {
        kernel: BTreeMap<&'static str, &'a str>,
        members: BTreeMap<&'static str, M>,
    }
    SetsJson {
        node: &view.node,
        generation: view.generation,
        sets: Map(|| {
            view.goal.sets.iter().filter_map(|(key, set)| {
                let names = view.names.get(key)?;
                let kernel = view.kernel_names(key, names).map(|(family, name)| (family_name(family), name));
                let members = Family::BOTH
                    .map(|family| (family_name(family), List(move || set.family(family).iter().map(member))));
                Some((&*names.name, SetJson { kernel: kernel.collect(), members: members.into() }))
            })
        }),
    }
}

pub(super) fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

/// A member as ipset lists it.
pub(super) fn member(member: &Member) -> String {
    match member {
        Member::Address(address) => address.to_string(),
        Member::Port(address, protocol, port) => {
            format!("{address},{}:{port}", protocol.to_string().to_ascii_lowercase())
        }
        Member::Include(net) => net.to_string(),
        Member::Except(net) => format!("{net} nomatch"),
    }
}

#[cfg(test)]
mod tests;
