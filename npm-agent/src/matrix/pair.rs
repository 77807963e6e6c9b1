//! One cell of the matrix: may this one open that to the other, and who decided it?

use std::net::IpAddr;

use npm_policy::flow::{Flow, Transport, Verdict};
use npm_policy::goal::Family;
use npm_policy::model::{Pod, PodKey, PodNetwork, PodPhase, Protocol};
use npm_policy::verdict::oracle;
use npm_policy::world::World;

use super::{Endpoint, Probe};

/// How many pods of the same name are proposed in place of one that is not there.
const MOST_PROPOSED: usize = 5;

/// What the engine [`super::Engine::Oracle`] says of a probe from one address to another: every verdict of the matrix
/// and every single one comes from here.
pub fn verdict(world: &World, probe: Probe, source: IpAddr, destination: IpAddr) -> (Flow, Verdict) {
    let flow = probe.flow(source, destination);
    (flow, oracle(world, &flow))
}

/// A probe from one endpoint to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Who opens.
    pub source: Endpoint,
    /// Who is reached.
    pub destination: Endpoint,
    /// What is tried.
    pub probe: Probe,
}

impl Pair {
    /// Finds two endpoints, each named as `namespace/name` of a pod or as an address. Two pods talk over IPv4 where both
    /// can.
    ///
    /// # Errors
    /// One of them can't be found, or they have no family in common.
    pub fn find(world: &World, source: &str, destination: &str, probe: Probe) -> Result<Self, PairError> {
        let (source, destination) = (End::find(world, source)?, End::find(world, destination)?);
        let both = Family::BOTH
            .into_iter()
            .find_map(|family| Some((source.address_of(family)?, destination.address_of(family)?)));
        let (from, to) = both.ok_or_else(|| PairError::Families {
            one: source.name.clone(),
            other: destination.name.clone(),
        })?;
        Ok(Self {
            source: Endpoint { name: source.name, address: from },
            destination: Endpoint { name: destination.name, address: to },
            probe,
        })
    }

    /// What policies say, and of which flow.
    pub fn verdict(&self, world: &World) -> (Flow, Verdict) {
        verdict(world, self.probe, self.source.address, self.destination.address)
    }

    /// [`Verdict::explain_as`] with the names that were asked for.
    pub fn explain(&self, verdict: &Verdict, transport: Transport) -> String {
        verdict.explain_as(&self.source.name, &self.destination.name, transport)
    }
}

/// An end before it is known which of its addresses is meant.
struct End {
    name: String,
    addresses: Vec<IpAddr>,
}

impl End {
    fn find(world: &World, text: &str) -> Result<Self, PairError> {
        let name = text.trim().to_owned();
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(Self { name, addresses: vec![address.to_canonical()] });
        }
        let Some((namespace, pod)) = name.split_once('/') else {
            return Err(PairError::Unreadable { alike: alike(world, &name), text: name });
        };
        let Some(pod) = world.pod(&PodKey::new(namespace, pod)) else {
            return Err(PairError::Unknown { alike: alike(world, pod), text: name });
        };
        let addresses: Vec<IpAddr> = world.addresses_held(pod).into_iter().collect();
        match addresses.is_empty() {
            true => Err(PairError::NoAddress { pod: pod.key.clone(), why: why_no_address(pod) }),
            false => Ok(Self { name, addresses }),
        }
    }

    /// The lowest of the family, as in the matrix.
    fn address_of(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| Family::of(*address) == family)
    }
}

fn why_no_address(pod: &Pod) -> &'static str {
    match (pod.network, pod.phase) {
        (PodNetwork::Host, _) => {
            "is on its node's network, which policies are not about; ask for the node's address"
        }
        (PodNetwork::Own, PodPhase::Ended) => "has ended",
        (PodNetwork::Own, PodPhase::Pending | PodPhase::Active) if pod.addresses.is_empty() => {
            "has no address yet"
        }
        (PodNetwork::Own, PodPhase::Pending | PodPhase::Active) => "has given its address to another pod",
    }
}

/// Pods of this very name, in whatever namespace.
fn alike(world: &World, name: &str) -> Vec<PodKey> {
    let same = world.pods().filter(|pod| *pod.key.name == *name);
    same.take(MOST_PROPOSED).map(|pod| pod.key.clone()).collect()
}

/// Finds the number of a port that is given as a number from 1 to 65535, or by the name that it has on the pod at this
/// end.
pub fn port_of(world: &World, end: &str, protocol: Protocol, port: &str) -> Option<u16> {
    let port = port.trim();
    if let Ok(number) = port.parse::<u16>() {
        return (number != 0).then_some(number);
    }
    let end = End::find(world, end).ok()?;
    let holder = world.holder(*end.addresses.first()?)?;
    let named = holder.ports.iter().find(|named| *named.name == *port && named.protocol == protocol);
    named.map(|named| named.port)
}

/// Why a pair can't be asked about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PairError {
    /// Neither a pod's name nor an address.
    #[error("{text:?} is neither namespace/name of a pod nor an IP address{}", proposed(alike))]
    Unreadable {
        /// What is there.
        text: String,
        /// What may be meant.
        alike: Vec<PodKey>,
    },
    /// No such pod.
    #[error("there is no pod {text}{}", proposed(alike))]
    Unknown {
        /// What is there.
        text: String,
        /// What may be meant.
        alike: Vec<PodKey>,
    },
    /// A pod that holds no address.
    #[error("pod {pod} {why}")]
    NoAddress {
        /// The pod.
        pod: PodKey,
        /// Why.
        why: &'static str,
    },
    /// No family in common.
    #[error("{one} and {other} have no address family in common")]
    Families {
        /// One end.
        one: String,
        /// The other.
        other: String,
    },
}

fn proposed(alike: &[PodKey]) -> String {
    match alike.iter().map(ToString::to_string).collect::<Vec<_>>().as_slice() {
        [] => String::new(),
        names => format!("; is it {}?", names.join(" or ")),
    }
}
