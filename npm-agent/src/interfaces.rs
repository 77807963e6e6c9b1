//! The network interfaces of the namespace: which there are, at any time, and which of them need the eBPF program.
//!
//! [`follow::Follower`] gives the list and then each change, none lost; [`select::Selection`] says of each interface whether a
//! forwarded packet may leave through it unjudged if nothing is attached there. Neither attaches anything.
//!
//! What leaves through several interfaces on its way (a bridge and its port, a VLAN and the device below, a bond and
//! its port) is judged at each. The verdict is the same at each, since it depends on the packet and its conntrack
//! entry alone; what is judged twice costs twice, what is judged nowhere is a breach.

pub mod follow;
mod message;
pub mod pods;
pub mod select;

use std::collections::BTreeSet;
use std::fmt;

use npm_policy::goal::Family;

/// An interface's number in its namespace. The kernel gives a number that is free again only after all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Index(pub u32);

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An interface as the kernel told of it last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number: it stays when the name changes.
    pub index: Index,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Whether it is up. One that is down sends nothing.
    pub state: AdminState,
    /// The device that it is a port of.
    pub master: Option<Master>,
    /// What its frames begin with.
    pub framing: Framing,
    /// Of a bridge: the families whose bridged packets it shows to iptables by itself, whatever the node's setting.
    pub asks_filter: BTreeSet<Family>,
}

/// What an interface is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// What the node says to itself.
    Loopback,
    /// A device that has no software kind: hardware, paravirtual or not.
    Device,
    /// One end of a pair; the other is mostly in a pod.
    Veth,
    /// A bridge.
    Bridge,
    /// Anything else, by the kernel's name: `vlan`, `bond`, `vxlan`, `ipip`, `wireguard`, `dummy`...
    Other(String),
}

impl Kind {
    /// The kernel's name for it; the kernel has none for hardware and loopback.
    pub fn name(&self) -> &str {
        match self {
            Self::Loopback => "loopback",
            Self::Device => "device",
            Self::Veth => "veth",
            Self::Bridge => "bridge",
            Self::Other(name) => name,
        }
    }
}

/// Whether somebody has set an interface up (IFF_UP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminState {
    /// No.
    Down,
    /// Yes.
    Up,
}

/// The device that an interface is a port of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master {
    /// Its number.
    pub index: Index,
    /// What kind of port it makes: `bridge`, `bond`, `vrf`... `None`: the kernel does not say (a virtual function that
    /// is paired with a paravirtual device).
    pub port: Option<String>,
}

/// What the frames of an interface begin with (ARPHRD_*): where a program finds the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// An Ethernet header.
    Ethernet,
    /// Nothing: the IP header itself (tun, WireGuard, ipip, sit, GRE of IP).
    Ip,
    /// Something else, by its number in the kernel's `if_arp.h`.
    Other(u16),
}
