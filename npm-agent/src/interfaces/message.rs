//! What the kernel says of interfaces (rtnetlink), read: only the parts that are needed, so that an attribute that a later
//! kernel adds or lengthens changes nothing.

use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NlasIterator};

use super::{AdminState, Framing, Index, Interface, Kind, Master};

// linux/netlink.h
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
// linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
// linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
// net/if.h
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
// linux/socket.h
const AF_UNSPEC: u8 = 0;
// linux/if_arp.h
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_TUNNEL: u16 = 768;
const ARPHRD_TUNNEL6: u16 = 769;
const ARPHRD_LOOPBACK: u16 = 772;
const ARPHRD_SIT: u16 = 776;
const ARPHRD_IPGRE: u16 = 778;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_NONE: u16 = 0xfffe;

/// The length of `struct nlmsghdr`, of `struct ifinfomsg`.
const HEADER_LEN: usize = 16;
const LINK_HEADER_LEN: usize = 16;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// An interface as it is.
    Present(Interface),
    /// An interface that is there no more, or in another namespace.
    Gone(Index),
    /// The end of a list.
    Done,
    /// The kernel refuses, with this error number. 0: it agrees.
    Refused(i32),
    /// The kernel has lost messages for this socket.
    Overrun,
    /// Not about an interface as such.
    Other,
}

/// A message, and whether the list that it belongs to changed while it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) message: Message,
    pub(super) sequence: u32,
    pub(super) interrupted: bool,
}

/// Why bytes could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of {bytes} bytes about interfaces is malformed at {what}")]
pub struct Malformed {
    /// How long what is left of it is.
    pub bytes: usize,
    /// The part.
    pub what: &'static str,
}

/// The request for the list of all interfaces.
pub(super) fn list_request(sequence: u32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN + LINK_HEADER_LEN];
    bytes.extend_from_slice(&8_u16.to_ne_bytes());
    bytes.extend_from_slice(&IFLA_EXT_MASK.to_ne_bytes());
    bytes.extend_from_slice(&RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    let length = u32::try_from(bytes.len()).expect("a few bytes");
    let mut packet = NetlinkBuffer::new(&mut bytes);
    packet.set_length(length);
    packet.set_message_type(RTM_GETLINK);
    packet.set_flags(NLM_F_REQUEST | NLM_F_DUMP);
    packet.set_sequence_number(sequence);
    bytes
}

/// Reads a datagram: messages, one behind the other.
pub(super) fn read(mut bytes: &[u8]) -> Result<Vec<Told>, Malformed> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let malformed = |what| Malformed { bytes: bytes.len(), what };
        let packet = NetlinkBuffer::new_checked(bytes).map_err(|_too_short| malformed("its header"))?;
        let length = usize::try_from(packet.length()).unwrap_or(usize::MAX);
        let payload = bytes.get(HEADER_LEN..length).ok_or_else(|| malformed("its length"))?;
        messages.push(Told {
            message: read_one(packet.message_type(), payload).map_err(malformed)?,
            sequence: packet.sequence_number(),
            interrupted: packet.flags() & NLM_F_DUMP_INTR != 0,
        });
        // Messages begin at multiples of four.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}

fn read_one(kind: u16, payload: &[u8]) -> Result<Message, &'static str> {
    match kind {
        NLMSG_NOOP => Ok(Message::Other),
        NLMSG_ERROR => {
            Ok(Message::Refused(-i32::from_ne_bytes(array(payload, 0).ok_or("its error number")?)))
        }
        NLMSG_DONE => Ok(Message::Done),
        NLMSG_OVERRUN => Ok(Message::Overrun),
        RTM_NEWLINK | RTM_DELLINK => read_link(kind, payload),
        _ => Ok(Message::Other),
    }
}

/// `struct ifinfomsg` and its attributes (rtnetlink(7)).
fn read_link(kind: u16, payload: &[u8]) -> Result<Message, &'static str> {
    let header: [u8; LINK_HEADER_LEN] = array(payload, 0).ok_or("the interface's header")?;
    // A bridge says in messages of its own family that a port joins or leaves: leaving is no end of the interface.
    if header[0] != AF_UNSPEC {
        return Ok(Message::Other);
    }
    let index = Index(u32::from_ne_bytes(array(&header, 4).ok_or("the interface's number")?));
    if kind == RTM_DELLINK {
        return Ok(Message::Gone(index));
    }
    let framing = u16::from_ne_bytes(array(&header, 2).ok_or("the interface's type")?);
    let flags = u32::from_ne_bytes(array(&header, 8).ok_or("the interface's flags")?);
    let (mut name, mut master, mut info_kind, mut port) = (None, None, None, None);
    for attribute in NlasIterator::new(&payload[LINK_HEADER_LEN..]) {
        let attribute = attribute.map_err(|_cut| "an attribute")?;
        match attribute.kind() {
            IFLA_IFNAME => name = Some(text(attribute.value())),
            IFLA_MASTER => {
                master = Some(u32::from_ne_bytes(array(attribute.value(), 0).ok_or("the master's number")?));
            }
            IFLA_LINKINFO => {
                for part in NlasIterator::new(attribute.value()) {
                    let part = part.map_err(|_cut| "a part of the kind")?;
                    match part.kind() {
                        IFLA_INFO_KIND => info_kind = Some(text(part.value())),
                        IFLA_INFO_SLAVE_KIND => port = Some(text(part.value())),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(Message::Present(Interface {
        index,
        name: name.ok_or("the interface's name")?,
        kind: match info_kind.as_deref() {
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
    }))
}

/// Text that ends with a zero byte, or at its end.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// `N` bytes from `start`.
fn array<const N: usize>(bytes: &[u8], start: usize) -> Option<[u8; N]> {
    bytes.get(start..)?.first_chunk().copied()
}
