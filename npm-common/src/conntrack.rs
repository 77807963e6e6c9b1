//! What the kernel's connection tracking says of a packet, and what of it is judged.
//!
//! A packet carries one number, `_nfct`: the address of its connection's entry, and in the three low bits what the packet
//! is to that connection (`enum ip_conntrack_info`). The entry holds two tuples: the packets of the original direction as
//! they came, before any address was translated, and those of the reply direction as they will come. So the original's
//! source is who really opened the connection, and the reply's source is whom it really reaches.
//!
//! That a packet belongs to an established connection is no proof that anybody allowed that connection: the kernel enters
//! it before the TC hook sees its first packet, and two denied pods that send to each other on the same tuple make it
//! established between them. A **proof** is a record of ours that the connection was judged and allowed.

use crate::decide::Own;
use crate::packet::{Ends, Family, Protocol};

/// The bits of `_nfct` that are no address (`NFCT_INFOMASK`, include/linux/skbuff.h).
const INFO: u64 = 7;

/// What a packet is to its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has no connection: not tracked on purpose, or not understood (INVALID).
    Nothing,
    /// Of the original direction, and nobody has answered yet.
    New,
    /// Of the original direction of a connection that was answered.
    Original,
    /// Of the reply direction.
    Reply,
    /// An ICMP error about the connection, or the first packet of another that this one announced.
    Related,
}

impl State {
    /// What `_nfct` says.
    #[inline(always)]
    pub const fn of(nfct: u64) -> Self {
        if entry_of(nfct) == 0 {
            return Self::Nothing;
        }
        // include/uapi/linux/netfilter/nf_conntrack_common.h
        match nfct & INFO {
            0 => Self::Original,
            1 | 4 => Self::Related,
            2 => Self::New,
            3 => Self::Reply,
            _ => Self::Nothing,
        }
    }
}

/// The address of the entry in `_nfct`; 0: there is none.
#[inline(always)]
pub const fn entry_of(nfct: u64) -> u64 {
    nfct & !INFO
}

/// `struct nf_conntrack_tuple` (include/net/netfilter/nf_conntrack_tuple.h): 40 bytes in every kernel since 2.6, without
/// padding, what is not used being 0. The loader checks that it is laid out like this.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tuple {
    /// The source address in network order: an IPv4 address is in the first four bytes.
    pub source: [u8; 16],
    /// The source port in network order; of ICMP the id.
    pub source_port: [u8; 2],
    /// The family's number (`AF_INET`, `AF_INET6`), in the machine's order.
    pub family: u16,
    /// The destination address, as the source.
    pub destination: [u8; 16],
    /// The destination port in network order; of ICMP the type and the code.
    pub destination_port: [u8; 2],
    /// The IANA number of the protocol.
    pub protocol: u8,
    /// 0 in the original's tuple, 1 in the reply's.
    pub direction: u8,
}

const _: () = assert!(size_of::<Tuple>() == 40 && align_of::<Tuple>() == 8);

/// [`Tuple::family`] of IPv4 (`AF_INET`, include/linux/socket.h).
pub const FAMILY_V4: u16 = 2;
/// [`Tuple::family`] of IPv6 (`AF_INET6`).
pub const FAMILY_V6: u16 = 10;

/// Both tuples of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tuples {
    /// Of the original direction.
    pub original: Tuple,
    /// Of the reply direction.
    pub reply: Tuple,
}

impl Tuples {
    /// Which IP the connection is of; `None`: of no IP.
    #[inline(always)]
    pub const fn family(&self) -> Option<Family> {
        match self.original.family {
            FAMILY_V4 => Some(Family::V4),
            FAMILY_V6 => Some(Family::V6),
            _ => None,
        }
    }

    /// The flow that opened the connection: from who really sent it to whom it really reaches.
    #[inline(always)]
    pub fn opening(&self) -> Ends<'_> {
        let Self { original, reply } = self;
        let port = port(original.protocol, reply.source_port);
        Ends { source: &original.source, destination: &reply.source, port }
    }

    /// The flow that a packet of the reply direction would open if the connection did not exist.
    #[inline(always)]
    pub fn returning(&self) -> Ends<'_> {
        let Self { original, reply } = self;
        let port = port(original.protocol, original.source_port);
        Ends { source: &reply.source, destination: &original.source, port }
    }

    /// What it is if both ends are the same pod: a packet that a pod sent to itself comes here only if it went to a
    /// Service's address.
    #[inline(always)]
    pub fn own(&self) -> Own {
        if self.original.destination == self.reply.source { Own::Forged } else { Own::Free }
    }
}

#[inline(always)]
fn port(protocol: u8, port: [u8; 2]) -> Option<(u8, u16)> {
    Protocol(protocol).has_ports().then_some((protocol, u16::from_be_bytes(port)))
}

/// The value of a proof for a connection whose entry's address is not known: it was listed by user space. It belongs to
/// its key and to no other, and no entry is at an odd address. So a program that reads a value whose place in the map the
/// kernel has given to another key meanwhile does not take it for its own.
#[inline(always)]
pub const fn listed(tuple: &Tuple) -> u64 {
    let mut mixed: u64 = 0x6e70_6d5f_7072_6f66;
    let Tuple { source, source_port, family, destination, destination_port, protocol, direction } = tuple;
    let ports = [source_port[0], source_port[1], destination_port[0], destination_port[1]];
    mixed = mix(mixed, half(source, 0));
    mixed = mix(mixed, half(source, 8));
    mixed = mix(mixed, half(destination, 0));
    mixed = mix(mixed, half(destination, 8));
    let rest = u32::from_ne_bytes(ports) as u64 | (*family as u64) << 32;
    mixed = mix(mixed, rest | (*protocol as u64) << 48 | (*direction as u64) << 56);
    mixed | 1
}

#[inline(always)]
const fn half(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from_ne_bytes([
        bytes[at],
        bytes[at + 1],
        bytes[at + 2],
        bytes[at + 3],
        bytes[at + 4],
        bytes[at + 5],
        bytes[at + 6],
        bytes[at + 7],
    ])
}

/// One step of a multiply-and-rotate hash. Nobody gains by a collision: it takes a race as well, between two connections
/// of which one was allowed.
#[inline(always)]
const fn mix(mixed: u64, word: u64) -> u64 {
    (mixed ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

/// What a packet's proof is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// The connection was judged and allowed.
    Holds,
    /// It was allowed, and its entry is to be noted.
    Listed,
    /// There is none, or one of another connection that had the same tuple.
    None,
}

impl Proof {
    /// What the value found under the packet's original tuple proves for the packet's entry.
    #[inline(always)]
    pub const fn of(value: u64, tuple: &Tuple, entry: u64) -> Self {
        if value == entry {
            Self::Holds
        } else if value == listed(tuple) {
            Self::Listed
        } else {
            Self::None
        }
    }
}

/// A connection that was proven lately: its original tuple, word by word, each made unlike the same word of every other
/// entry. A value of which several CPUs write words at once is nobody's: two writers have two entries, and what holds a
/// packet holds its entry, so none gets a new tuple while somebody writes of its old one.
pub type Recent = [u64; 5];

/// What is told of a proven connection, and the place where it is told among `1 << places` (at most 32).
#[inline(always)]
pub const fn recent(words: &[u64; 5], entry: u64, places: u32) -> (u32, Recent) {
    // A multiplicative hash (Knuth): the product's upper bits depend on all bits of an address.
    let key = entry.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let [a, b, c, d, e] = *words;
    ((key >> (64 - places)) as u32, [a ^ key, b ^ key, c ^ key, d ^ key, e ^ key])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide([a, b, c, d]: [u8; 4]) -> [u8; 16] {
        [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    fn tuple(source: [u8; 4], source_port: u16, destination: [u8; 4], destination_port: u16) -> Tuple {
        Tuple {
            source: wide(source),
            source_port: source_port.to_be_bytes(),
            family: FAMILY_V4,
            destination: wide(destination),
            destination_port: destination_port.to_be_bytes(),
            protocol: 6,
            direction: 0,
        }
    }

    #[test]
    fn the_low_bits_say_what_a_packet_is() {
        let entry = 0xffff_8880_0000_1000;
        let cases = [
            (0, State::Original),
            (1, State::Related),
            (2, State::New),
            (3, State::Reply),
            (4, State::Related),
            (5, State::Nothing),
            (6, State::Nothing),
            (7, State::Nothing),
        ];
        for (info, state) in cases {
            assert_eq!(State::of(entry | info), state, "{info}");
            assert_eq!(State::of(info), State::Nothing, "{info}: no entry");
            assert_eq!(entry_of(entry | info), entry);
        }
    }

    /// A pod at .1 calls a Service at 10.0.0.9:80, whose backend is .2:8080; the node masquerades the pod as .254.
    #[test]
    fn flows_are_as_before_source_and_after_destination_translation() {
        let tuples = Tuples {
            original: tuple([10, 1, 0, 1], 4000, [10, 0, 0, 9], 80),
            reply: tuple([10, 1, 0, 2], 8080, [10, 1, 0, 254], 5000),
        };
        assert_eq!(tuples.family(), Some(Family::V4));
        assert_eq!(
            tuples.opening(),
            Ends { source: &wide([10, 1, 0, 1]), destination: &wide([10, 1, 0, 2]), port: Some((6, 8080)) }
        );
        assert_eq!(
            tuples.returning(),
            Ends { source: &wide([10, 1, 0, 2]), destination: &wide([10, 1, 0, 1]), port: Some((6, 4000)) }
        );
        assert_eq!(tuples.own(), Own::Free);
    }

    #[test]
    fn what_goes_where_it_was_sent_is_not_translated() {
        let tuples = Tuples {
            original: tuple([10, 1, 0, 1], 4000, [10, 1, 0, 2], 80),
            reply: tuple([10, 1, 0, 2], 80, [10, 1, 0, 254], 5000),
        };
        assert_eq!(tuples.own(), Own::Forged);
    }

    #[test]
    fn whole_addresses_of_ipv6_are_taken() {
        let mut original = tuple([0; 4], 4000, [0; 4], 80);
        original.family = FAMILY_V6;
        original.source = [0xfd; 16];
        let mut reply = original;
        reply.source = [0xfe; 16];
        let tuples = Tuples { original, reply };
        assert_eq!(tuples.family(), Some(Family::V6));
        assert_eq!((tuples.opening().source, tuples.opening().destination), (&[0xfd; 16], &[0xfe; 16]));
        assert_eq!((tuples.returning().source, tuples.returning().destination), (&[0xfe; 16], &[0xfd; 16]));
    }

    #[test]
    fn an_echo_has_no_port() {
        let mut original = tuple([10, 1, 0, 1], 77, [10, 1, 0, 2], 0x0800);
        original.protocol = 1;
        let tuples = Tuples { original, reply: original };
        assert_eq!(tuples.opening().port, None);
        assert_eq!(tuples.returning().port, None);
    }

    #[test]
    fn what_was_proven_lately_is_one_connection_of_one_entry() {
        let entry = 0xffff_8880_0000_1000;
        let words = [1, 2, 3, 4, 5];
        let (place, told) = recent(&words, entry, 13);
        assert_eq!(recent(&words, entry, 13), (place, told));
        assert_ne!(told, [0; 5], "an empty place is nobody's");
        let mut taken = [false; 1 << 13];
        for number in 1..10_000 {
            // Entries lie next to each other (the kernel's are 256 bytes long, or a few more).
            let (at, other) = recent(&words, entry + number * 256, 13);
            taken[at as usize] = true;
            assert!(told.iter().zip(&other).all(|(one, other)| one != other), "no word is of both");
        }
        let count = taken.iter().filter(|taken| **taken).count();
        assert!(count > 5_000, "{count} places of 8,192 for 10,000 entries");
        for index in 0..5 {
            let mut others = words;
            others[index] += 1;
            assert_ne!(recent(&others, entry, 13).1, told);
        }
    }

    #[test]
    fn a_proof_is_of_one_connection() {
        let ours = tuple([10, 1, 0, 1], 4000, [10, 1, 0, 2], 80);
        let entry = 0xffff_8880_0000_1000;
        assert_eq!(Proof::of(entry, &ours, entry), Proof::Holds);
        assert_eq!(Proof::of(entry + 0x100, &ours, entry), Proof::None);
        assert_eq!(Proof::of(0, &ours, entry), Proof::None);
        assert_eq!(Proof::of(listed(&ours), &ours, entry), Proof::Listed);
        let others = [
            tuple([10, 1, 0, 2], 80, [10, 1, 0, 1], 4000),
            tuple([10, 1, 0, 1], 80, [10, 1, 0, 2], 4000),
            tuple([10, 1, 0, 1], 4001, [10, 1, 0, 2], 80),
            Tuple { protocol: 17, ..ours },
            Tuple { family: FAMILY_V6, ..ours },
        ];
        for other in others {
            assert_eq!(Proof::of(listed(&other), &ours, entry), Proof::None, "{other:?}");
        }
        assert_eq!(listed(&ours) & 1, 1, "no entry is at an odd address");
    }
}
