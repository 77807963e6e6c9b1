//! What the kernel says of interfaces (rtnetlink(7)), read: only the parts that are needed, so that an attribute that a
//! later kernel adds or lengthens changes nothing.

use std::collections::BTreeSet;

use npm_policy::goal::Family;

use super::{AdminState, Framing, Index, Interface, Kind, Master};
use crate::netlink::{array, attribute, attributes, text};

// linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
/// Asks for interfaces.
pub(super) const RTM_GETLINK: u16 = 18;
// linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_BR_NF_CALL_IPTABLES: u16 = 36;
const IFLA_BR_NF_CALL_IP6TABLES: u16 = 37;
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
// net/if.h
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
// linux/socket.h
const AF_UNSPEC: u8 = 0;
// linux/if_arp.h
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_TUNNEL: u16 = 768;
const ARPHRD_TUNNEL6: u16 = 769;
const ARPHRD_LOOPBACK: u16 = 772;
const ARPHRD_SIT: u16 = 776;
const ARPHRD_IPGRE: u16 = 778;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_NONE: u16 = 0xfffe;

/// The length of `struct ifinfomsg`.
const LINK_HEADER_LEN: usize = 16;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// An interface as it is.
    Present(Interface),
    /// An interface that is there no more, or in another namespace.
    Gone(Index),
    /// Not about an interface as such.
    Other,
}

impl Message {
    /// The interface that it says is there.
    pub(super) fn present(&self) -> Option<Index> {
        match self {
            Self::Present(interface) => Some(interface.index),
            Self::Gone(_) | Self::Other => None,
        }
    }
}

/// What the request for the list of all interfaces holds.
pub(super) fn list_body() -> Vec<u8> {
    let mut body = vec![0; LINK_HEADER_LEN];
    body.extend(attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes()));
    body
}

/// Reads a message.
///
/// # Errors
/// The part that is malformed.
pub(super) fn read(kind: u16, payload: &[u8]) -> Result<Message, &'static str> {
    if ![RTM_NEWLINK, RTM_DELLINK].contains(&kind) {
        return Ok(Message::Other);
    }
    let header: [u8; LINK_HEADER_LEN] = array(payload, 0).ok_or("an interface's header")?;
    // A bridge says in messages of its own family that a port joins or leaves: leaving is no end of the interface.
    if header[0] != AF_UNSPEC {
        return Ok(Message::Other);
    }
    let index = Index(u32::from_ne_bytes(array(&header, 4).ok_or("an interface's number")?));
    if kind == RTM_DELLINK {
        return Ok(Message::Gone(index));
    }
    let framing = u16::from_ne_bytes(array(&header, 2).ok_or("an interface's type")?);
    let flags = u32::from_ne_bytes(array(&header, 8).ok_or("an interface's flags")?);
    let (mut name, mut master, mut info) = (None, None, Info::default());
    for attribute in attributes(&payload[LINK_HEADER_LEN..]) {
        let (kind, held) = attribute.map_err(|_cut| "an interface's attribute")?;
        match kind {
            IFLA_IFNAME => name = Some(text(held)),
            IFLA_MASTER => {
                let number = array(held, 0).ok_or("the number of an interface's master")?;
                master = Some(u32::from_ne_bytes(number));
            }
            IFLA_LINKINFO => info = Info::read(held)?,
            _ => {}
        }
    }
    let Info { kind, port, asks_filter } = info;
    Ok(Message::Present(Interface {
        index,
        name: name.ok_or("an interface's name")?,
        kind: match kind.as_deref() {
            _ if flags & IFF_LOOPBACK != 0 => Kind::Loopback,
            None => Kind::Device,
            Some("veth") => Kind::Veth,
            Some("bridge") => Kind::Bridge,
            Some(other) => Kind::Other(other.to_owned()),
        },
        state: if flags & IFF_UP != 0 { AdminState::Up } else { AdminState::Down },
        master: master.filter(|index| *index != 0).map(|index| Master { index: Index(index), port }),
        framing: match framing {
            ARPHRD_ETHER | ARPHRD_LOOPBACK => Framing::Ethernet,
            ARPHRD_TUNNEL | ARPHRD_TUNNEL6 | ARPHRD_SIT | ARPHRD_IPGRE | ARPHRD_IP6GRE | ARPHRD_RAWIP
            | ARPHRD_NONE => Framing::Ip,
            other => Framing::Other(other),
        },
        asks_filter,
    }))
}

/// What an interface is, in the kernel's words.
#[derive(Default)]
struct Info {
    kind: Option<String>,
    port: Option<String>,
    asks_filter: BTreeSet<Family>,
}

impl Info {
    fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut info = Self::default();
        let mut of_kind: &[u8] = &[];
        for part in attributes(bytes) {
            let (kind, held) = part.map_err(|_cut| "a part of an interface's kind")?;
            match kind {
                IFLA_INFO_KIND => info.kind = Some(text(held)),
                IFLA_INFO_SLAVE_KIND => info.port = Some(text(held)),
                IFLA_INFO_DATA => of_kind = held,
                _ => {}
            }
        }
        // The numbers of these attributes mean something else for other kinds.
        if info.kind.as_deref() == Some("bridge") {
            for setting in attributes(of_kind) {
                let (kind, held) = setting.map_err(|_cut| "a bridge's setting")?;
                let family = match kind {
                    IFLA_BR_NF_CALL_IPTABLES => Family::V4,
                    IFLA_BR_NF_CALL_IP6TABLES => Family::V6,
                    _ => continue,
                };
                if held.first().is_some_and(|value| *value != 0) {
                    info.asks_filter.insert(family);
                }
            }
        }
        Ok(info)
    }
}
