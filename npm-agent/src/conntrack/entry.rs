//! What conntrack knows of a connection: tuples and entries, and how ctnetlink spells them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::wire::{self, Attributes, Malformed};

// Attribute numbers: Linux, include/uapi/linux/netfilter/nfnetlink_conntrack.h.
pub(super) const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
pub(super) const CTA_MARK: u16 = 8;
pub(super) const CTA_ID: u16 = 12;
pub(super) const CTA_ZONE: u16 = 18;
pub(super) const CTA_MARK_MASK: u16 = 21;

const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;

const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;

const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMP_TYPE: u16 = 5;
const CTA_PROTO_ICMP_CODE: u16 = 6;
const CTA_PROTO_ICMPV6_ID: u16 = 7;
const CTA_PROTO_ICMPV6_TYPE: u16 = 8;
const CTA_PROTO_ICMPV6_CODE: u16 = 9;

/// Another connection announced this one (`IPS_EXPECTED`): the data connection of FTP and its likes.
pub const EXPECTED: u32 = 1;
/// A reply was seen (`IPS_SEEN_REPLY`, include/uapi/linux/netfilter/nf_conntrack_common.h).
pub const SEEN_REPLY: u32 = 1 << 1;
/// The source was translated (`IPS_SRC_NAT`).
pub const SOURCE_TRANSLATED: u32 = 1 << 4;
/// The destination was translated (`IPS_DST_NAT`).
pub const DESTINATION_TRANSLATED: u32 = 1 << 5;

/// One direction of a connection, as its packets show it before translation. With its zone it names at most one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// The source address.
    pub source: IpAddr,
    /// The destination address, of the same family.
    pub destination: IpAddr,
    /// The IANA protocol number.
    pub protocol: u8,
    /// What tells connections of one protocol between the same addresses apart.
    pub detail: Detail,
    /// The conntrack zone in this direction; 0 where nobody set one.
    pub zone: u16,
}

/// What tells connections of one protocol between the same addresses apart. Numbers are in the machine's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Detail {
    /// TCP, UDP, SCTP, DCCP, UDP-Lite: ports. GRE: its keys.
    Ports {
        /// The source port.
        source: u16,
        /// The destination port.
        destination: u16,
    },
    /// ICMP and ICMPv6.
    Icmp {
        /// The message's type.
        kind: u8,
        /// Its code.
        code: u8,
        /// The identifier of an echo.
        id: u16,
    },
    /// Nothing: all of this protocol between two addresses is one connection.
    Nothing,
}

/// A connection in conntrack's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The direction of the packet that opened it, as that packet was sent.
    pub original: Tuple,
    /// The direction of its replies, as they are sent: the source is the destination after translation.
    pub reply: Tuple,
    /// The connection mark.
    pub mark: u32,
    /// `IPS_*` bits.
    pub status: u32,
    /// The kernel's name of this entry: another one with the same tuples has another, unless it was given the same memory later
    /// (`nf_ct_get_id`, net/netfilter/nf_conntrack_core.c).
    pub id: u32,
}

impl Tuple {
    /// The tuple as attributes, with its zone. It names the entry in which it is the original direction.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        wire::nest(out, CTA_TUPLE_ORIG, |out| {
            wire::nest(out, CTA_TUPLE_IP, |out| match (self.source, self.destination) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    wire::attribute(out, CTA_IP_V4_SRC, &source.octets());
                    wire::attribute(out, CTA_IP_V4_DST, &destination.octets());
                }
                (source, destination) => {
                    wire::attribute(out, CTA_IP_V6_SRC, &six(source).octets());
                    wire::attribute(out, CTA_IP_V6_DST, &six(destination).octets());
                }
            });
            wire::nest(out, CTA_TUPLE_PROTO, |out| self.write_protocol(out));
        });
        if self.zone != 0 {
            wire::attribute(out, CTA_ZONE, &self.zone.to_be_bytes());
        }
    }

    fn write_protocol(&self, out: &mut Vec<u8>) {
        wire::attribute(out, CTA_PROTO_NUM, &[self.protocol]);
        match self.detail {
            Detail::Ports { source, destination } => {
                wire::attribute(out, CTA_PROTO_SRC_PORT, &source.to_be_bytes());
                wire::attribute(out, CTA_PROTO_DST_PORT, &destination.to_be_bytes());
            }
            Detail::Icmp { kind, code, id } => {
                let [id_number, kind_number, code_number] = match self.source {
                    IpAddr::V4(_) => [CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMP_CODE],
                    IpAddr::V6(_) => [CTA_PROTO_ICMPV6_ID, CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_ICMPV6_CODE],
                };
                wire::attribute(out, id_number, &id.to_be_bytes());
                wire::attribute(out, kind_number, &[kind]);
                wire::attribute(out, code_number, &[code]);
            }
            Detail::Nothing => {}
        }
    }

    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let (mut source, mut destination) = (None, None);
        let mut protocol = None;
        let (mut ports, mut icmp) = ((None, None), (None, None, None));
        let mut zone = 0;
        for part in Attributes::of(bytes) {
            let (kind, value) = part?;
            match kind {
                CTA_TUPLE_IP => {
                    for part in Attributes::of(value) {
                        let (kind, value) = part?;
                        match kind {
                            CTA_IP_V4_SRC => source = Some(Ipv4Addr::from(wire::bytes(value)?).into()),
                            CTA_IP_V4_DST => destination = Some(Ipv4Addr::from(wire::bytes(value)?).into()),
                            CTA_IP_V6_SRC => source = Some(Ipv6Addr::from(wire::bytes(value)?).into()),
                            CTA_IP_V6_DST => destination = Some(Ipv6Addr::from(wire::bytes(value)?).into()),
                            _ => {}
                        }
                    }
                }
                CTA_TUPLE_PROTO => {
                    for part in Attributes::of(value) {
                        let (kind, value) = part?;
                        match kind {
                            CTA_PROTO_NUM => protocol = Some(wire::number_8(value)?),
                            CTA_PROTO_SRC_PORT => ports.0 = Some(wire::number_16(value)?),
                            CTA_PROTO_DST_PORT => ports.1 = Some(wire::number_16(value)?),
                            CTA_PROTO_ICMP_ID | CTA_PROTO_ICMPV6_ID => {
                                icmp.0 = Some(wire::number_16(value)?);
                            }
                            CTA_PROTO_ICMP_TYPE | CTA_PROTO_ICMPV6_TYPE => {
                                icmp.1 = Some(wire::number_8(value)?);
                            }
                            CTA_PROTO_ICMP_CODE | CTA_PROTO_ICMPV6_CODE => {
                                icmp.2 = Some(wire::number_8(value)?);
                            }
                            _ => {}
                        }
                    }
                }
                CTA_TUPLE_ZONE => zone = wire::number_16(value)?,
                _ => {}
            }
        }
        let detail = match (ports, icmp) {
            ((Some(source), Some(destination)), _) => Detail::Ports { source, destination },
            (_, (Some(id), Some(kind), Some(code))) => Detail::Icmp { kind, code, id },
            _ => Detail::Nothing,
        };
        match (source, destination, protocol) {
            (Some(source), Some(destination), Some(protocol)) => {
                Ok(Self { source, destination, protocol, detail, zone })
            }
            _ => Err(Malformed),
        }
    }
}

impl Entry {
    /// Reads the attributes of a message about an entry.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let (mut original, mut reply, mut id) = (None, None, None);
        let (mut mark, mut status, mut zone) = (0, 0, None);
        for part in Attributes::of(bytes) {
            let (kind, value) = part?;
            match kind {
                CTA_TUPLE_ORIG => original = Some(Tuple::read(value)?),
                CTA_TUPLE_REPLY => reply = Some(Tuple::read(value)?),
                CTA_MARK => mark = wire::number_32(value)?,
                CTA_STATUS => status = wire::number_32(value)?,
                CTA_ID => id = Some(wire::number_32(value)?),
                CTA_ZONE => zone = Some(wire::number_16(value)?),
                _ => {}
            }
        }
        let (Some(mut original), Some(mut reply), Some(id)) = (original, reply, id) else {
            return Err(Malformed);
        };
        // A zone of both directions stands beside the tuples, one of a single direction in its tuple.
        if let Some(zone) = zone {
            original.zone = zone;
            reply.zone = zone;
        }
        Ok(Self { original, reply, mark, status, id })
    }
}

fn six(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tuple is read as it was written, whatever its protocol.
    #[test]
    fn what_is_written_is_read() {
        let pairs = [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")];
        let details = [
            (6, Detail::Ports { source: 40_000, destination: 80 }),
            (132, Detail::Ports { source: 1, destination: 65_535 }),
            (1, Detail::Icmp { kind: 8, code: 0, id: 0xabcd }),
            (89, Detail::Nothing),
        ];
        for (source, destination) in pairs {
            for (protocol, detail) in details {
                for zone in [0, 7] {
                    let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
                    let tuple = Tuple { source, destination, protocol, detail, zone };
                    let mut out = Vec::new();
                    tuple.write(&mut out);
                    // The reply is the same bytes under another number.
                    let mut reply = out.clone();
                    reply[2] = CTA_TUPLE_REPLY.to_ne_bytes()[0];
                    out.extend(reply);
                    wire::attribute(&mut out, CTA_ID, &5_u32.to_be_bytes());
                    wire::attribute(&mut out, CTA_MARK, &0x0100_0001_u32.to_be_bytes());
                    let entry = Entry::read(&out).unwrap();
                    assert_eq!(
                        entry,
                        Entry { original: tuple, reply: tuple, mark: 0x0100_0001, status: 0, id: 5 }
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let tuple = Tuple {
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2".parse().unwrap(),
            protocol: 17,
            detail: Detail::Ports { source: 1, destination: 2 },
            zone: 0,
        };
        let mut whole = Vec::new();
        tuple.write(&mut whole);
        for length in 0..whole.len() {
            assert_eq!(Entry::read(&whole[..length]), Err(Malformed), "{length}");
        }
        // No reply, no id.
        assert_eq!(Entry::read(&whole), Err(Malformed));
    }
}
