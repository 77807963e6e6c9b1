//! Netlink messages to the ctnetlink subsystem as bytes: attributes are big-endian, headers the machine's order.

use std::net::IpAddr;

use netlink_packet_core::{NLA_F_NESTED, NLM_F_REQUEST, NlasIterator};

/// The length of a netfilter header (`struct nfgenmsg`), which stands before the attributes.
const NETFILTER_HEADER: usize = 4;

/// The length of an attribute's header (`NLA_HDRLEN`).
const ATTRIBUTE_HEADER: usize = 4;

/// `NFNL_SUBSYS_CTNETLINK` (Linux, include/uapi/linux/netfilter/nfnetlink.h), where a message type has its subsystem.
const SUBSYSTEM: u16 = 1 << 8;

/// What ctnetlink is asked (`IPCTNL_MSG_CT_*`, include/uapi/linux/netfilter/nfnetlink_conntrack.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Change an entry.
    Change = 0,
    /// Show one entry, or all.
    Show = 1,
    /// Delete an entry.
    Delete = 2,
    /// Show the table's counters.
    Count = 5,
}

/// The kernel's type of an answer that shows an entry.
pub(super) const ENTRY: u16 = SUBSYSTEM;
/// The kernel's type of an answer that shows the table's counters.
pub(super) const COUNTERS: u16 = SUBSYSTEM | Ask::Count as u16;

/// What stands before a message's attributes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// What is asked.
    pub(super) ask: Ask,
    /// Flags beside `NLM_F_REQUEST`.
    pub(super) flags: u16,
    /// What the answer will carry.
    pub(super) sequence: u32,
    /// The family of the tuple that the message names; `None` for all.
    pub(super) family: Option<IpAddr>,
}

/// The message is not of the form that the kernel's interface promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Appends a message with the attributes that `body` writes.
pub(super) fn message(out: &mut Vec<u8>, header: Header, body: impl FnOnce(&mut Vec<u8>)) {
    let Header { ask, flags, sequence, family } = header;
    let start = out.len();
    out.extend([0; 4]);
    out.extend((SUBSYSTEM | ask as u16).to_ne_bytes());
    out.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    // NFPROTO_UNSPEC, NFPROTO_IPV4, NFPROTO_IPV6; then version and resource, both 0.
    out.push(family.map_or(0, |address| if address.is_ipv4() { 2 } else { 10 }));
    out.extend([0; 3]);
    body(out);
    set_length(&mut out[start..]);
}

fn set_length(message: &mut [u8]) {
    let length = u32::try_from(message.len()).expect("a message of ours is short");
    message[..4].copy_from_slice(&length.to_ne_bytes());
}

/// What stands behind the netfilter header of an answer.
pub(super) fn attributes_of(payload: &[u8]) -> Result<&[u8], Malformed> {
    payload.get(NETFILTER_HEADER..).ok_or(Malformed)
}

/// Appends an attribute, padded.
pub(super) fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).expect("an attribute of ours is short");
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Appends an attribute that holds those that `body` writes.
pub(super) fn nest(out: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    attribute(out, kind | NLA_F_NESTED, &[]);
    body(out);
    let length = u16::try_from(out.len() - start).expect("an attribute of ours is short");
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
}

/// The attributes in some bytes, in order: number and value.
pub(super) struct Attributes<'a>(NlasIterator<&'a [u8]>);

impl<'a> Attributes<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self(NlasIterator::new(bytes))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let part = self.0.next()?;
        Some(part.map_or(Err(Malformed), |part| {
            let range = ATTRIBUTE_HEADER..usize::from(part.length());
            part.into_inner().get(range).map(|value| (part.kind(), value)).ok_or(Malformed)
        }))
    }
}

/// A value of exactly `N` bytes.
pub(super) fn bytes<const N: usize>(value: &[u8]) -> Result<[u8; N], Malformed> {
    value.try_into().or(Err(Malformed))
}

pub(super) fn number_8(value: &[u8]) -> Result<u8, Malformed> {
    bytes(value).map(u8::from_be_bytes)
}

pub(super) fn number_16(value: &[u8]) -> Result<u16, Malformed> {
    bytes(value).map(u16::from_be_bytes)
}

pub(super) fn number_32(value: &[u8]) -> Result<u32, Malformed> {
    bytes(value).map(u32::from_be_bytes)
}
