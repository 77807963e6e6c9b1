//! Packets that no ordinary socket sends: SCTP without the kernel's SCTP, echo requests with an identity, whole IP
//! packets (fragments, options, TCP without a handshake).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use npm_policy::flow::Transport;
use npm_policy::goal::Family;

/// An SCTP chunk that opens an association (RFC 9260, 3.3.2 and 3.3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SctpChunk {
    /// Asks for an association.
    Init,
    /// Answers.
    InitAck,
}

/// An SCTP packet with one INIT or INIT ACK chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sctp {
    /// The source port.
    pub source: u16,
    /// The destination port.
    pub destination: u16,
    /// The verification tag: 0 in an INIT, the INIT's tag in its answer.
    pub verification: u32,
    /// The sender's own tag, never 0.
    pub tag: u32,
    /// Which of the two.
    pub chunk: SctpChunk,
}

impl Sctp {
    /// The packet above IP, with its checksum.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut packet = Vec::with_capacity(40);
        packet.extend(self.source.to_be_bytes());
        packet.extend(self.destination.to_be_bytes());
        packet.extend(self.verification.to_be_bytes());
        packet.extend([0; 4]);
        match self.chunk {
            SctpChunk::Init => packet.extend([1, 0, 0, 20]),
            // The state cookie (parameter 7) is mandatory: 4 bytes here.
            SctpChunk::InitAck => packet.extend([2, 0, 0, 28]),
        }
        packet.extend(self.tag.to_be_bytes());
        // Receiver window, streams out, streams in, first transmission sequence number.
        packet.extend([0, 1, 0, 0, 0, 1, 0, 1]);
        packet.extend(self.tag.to_be_bytes());
        if self.chunk == SctpChunk::InitAck {
            packet.extend([0, 7, 0, 8, 0, 0, 0, 1]);
        }
        let checksum = crc32c(&packet);
        packet[8..12].copy_from_slice(&checksum.to_le_bytes());
        packet
    }

    /// Reads a packet above IP; `None` if it begins with another chunk or is too short.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?));
        let ports = word(0)?;
        let chunk = match packet.get(12)? {
            1 => SctpChunk::Init,
            2 => SctpChunk::InitAck,
            _ => return None,
        };
        Some(Self {
            source: (ports >> 16) as u16,
            destination: ports as u16,
            verification: word(4)?,
            tag: word(16)?,
            chunk,
        })
    }
}

/// CRC-32C (Castagnoli), reflected, as SCTP uses it (RFC 9260, appendix A).
pub fn crc32c(bytes: &[u8]) -> u32 {
    let fold = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    };
    !bytes.iter().fold(u32::MAX, fold)
}

/// An echo request above IP. The kernel fills in the checksum of ICMPv6.
pub fn echo_request(family: Family, id: u16, sequence: u16) -> Vec<u8> {
    let kind = match family {
        Family::V4 => 8,
        Family::V6 => 128,
    };
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend(sequence.to_be_bytes());
    packet.extend(*b"npm lab.");
    if family == Family::V4 {
        let checksum = internet_checksum(&packet);
        packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

/// The Internet checksum (RFC 1071) of bytes whose checksum field is zero.
pub fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// From where to where a whole packet goes: addresses of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
}

/// A whole IP packet with UDP in it.
///
/// # Errors
/// The ends are of different families, or the payload is too long.
pub fn udp(ends: Ends, payload: &[u8]) -> Result<Vec<u8>> {
    let step = ip(ends)?.udp(ends.source.port(), ends.destination.port());
    let mut packet = Vec::new();
    step.write_to_vec(&mut packet, payload).context("building a UDP packet")?;
    Ok(packet)
}

/// What a crafted TCP segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Opens a connection.
    Syn,
    /// Belongs to a connection that nobody opened: conntrack takes it up in the middle or calls it INVALID, by
    /// `nf_conntrack_tcp_loose`.
    Ack,
    /// Answers what opens a connection.
    SynAck,
    /// SYN and FIN at once: INVALID to conntrack whatever its settings.
    SynFin,
}

/// A whole IP packet with TCP in it.
///
/// # Errors
/// The ends are of different families.
pub fn tcp(ends: Ends, segment: Segment, sequence: u32) -> Result<Vec<u8>> {
    let step = ip(ends)?.tcp(ends.source.port(), ends.destination.port(), sequence, 1024);
    let step = match segment {
        Segment::Syn => step.syn(),
        Segment::Ack => step.ack(1),
        Segment::SynAck => step.syn().ack(1),
        Segment::SynFin => step.syn().fin(),
    };
    let mut packet = Vec::new();
    step.write_to_vec(&mut packet, &[]).context("building a TCP packet")?;
    Ok(packet)
}

/// A whole IP packet with one SCTP chunk in it; the ports of `ends` are not looked at.
///
/// # Errors
/// The ends are of different families.
pub fn sctp(ends: Ends, chunk: Sctp) -> Result<Vec<u8>> {
    let payload = chunk.to_bytes();
    let mut packet = Vec::new();
    ip(ends)?.write(&mut packet, etherparse::IpNumber::SCTP, &payload).context("building an SCTP packet")?;
    Ok(packet)
}

/// Which echo message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Echo {
    /// The question.
    Request,
    /// The answer.
    Reply,
}

/// A whole IP packet with an echo message in it; the ports of `ends` are not looked at.
///
/// # Errors
/// The ends are of different families.
pub fn echo(ends: Ends, echo: Echo, id: u16) -> Result<Vec<u8>> {
    let mut packet = Vec::new();
    let step = ip(ends)?;
    let written = match (ends.source.is_ipv4(), echo) {
        (true, Echo::Request) => step.icmpv4_echo_request(id, 1).write(&mut packet, &[]),
        (true, Echo::Reply) => step.icmpv4_echo_reply(id, 1).write(&mut packet, &[]),
        (false, Echo::Request) => step.icmpv6_echo_request(id, 1).write(&mut packet, &[]),
        (false, Echo::Reply) => step.icmpv6_echo_reply(id, 1).write(&mut packet, &[]),
    };
    written.context("building an echo message")?;
    Ok(packet)
}

/// A whole IP packet with the error "port unreachable" about a packet, of which it quotes this much; the ports of `ends` are
/// not looked at.
///
/// # Errors
/// The ends are of different families.
pub fn port_unreachable(ends: Ends, quoted: &[u8]) -> Result<Vec<u8>> {
    let mut packet = Vec::new();
    let step = ip(ends)?;
    let written = if ends.source.is_ipv4() {
        let error = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
        step.icmpv4(error).write(&mut packet, quoted)
    } else {
        let error = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
        step.icmpv6(error).write(&mut packet, quoted)
    };
    written.context("building an error")?;
    Ok(packet)
}

fn ip(ends: Ends) -> Result<etherparse::PacketBuilderStep<etherparse::IpHeaders>> {
    match (ends.source.ip(), ends.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let header = etherparse::Ipv4Header::new(0, 64, 17.into(), source.octets(), destination.octets())
                .context("an IPv4 header without payload")?;
            Ok(PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default())))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = etherparse::Ipv6Header {
                hop_limit: 64,
                source: source.octets(),
                destination: destination.octets(),
                ..etherparse::Ipv6Header::default()
            };
            Ok(PacketBuilder::ip(etherparse::IpHeaders::Ipv6(header, etherparse::Ipv6Extensions::default())))
        }
        (source, destination) => bail!("{source} and {destination} are of different families"),
    }
}

/// Puts a record-route option with `addresses` free slots into an IPv4 packet that has no options.
///
/// # Errors
/// The packet is no such packet, or there is no room (9 addresses fit).
pub fn with_ipv4_options(packet: &[u8], addresses: u8) -> Result<Vec<u8>> {
    if packet.first() != Some(&0x45) || packet.len() < 20 || addresses > 9 {
        bail!("not an IPv4 packet without options, or too many addresses");
    }
    // Type 7 (RFC 791), its length, the first free slot; end of options pads to four bytes.
    let mut options = vec![7, 3 + 4 * addresses, 4];
    options.resize(3 + 4 * usize::from(addresses), 0);
    options.resize(options.len().next_multiple_of(4), 0);
    let mut changed = packet[..20].to_vec();
    changed.extend(&options);
    changed.extend(&packet[20..]);
    changed[0] = 0x45 + (options.len() / 4) as u8;
    let total = u16::try_from(changed.len()).context("the packet is too long")?;
    changed[2..4].copy_from_slice(&total.to_be_bytes());
    let header = 20 + options.len();
    changed[10..12].copy_from_slice(&[0, 0]);
    let checksum = internet_checksum(&changed[..header]);
    changed[10..12].copy_from_slice(&checksum.to_be_bytes());
    Ok(changed)
}

/// Cuts an IP packet into fragments of at most `size` bytes of payload, `size` a multiple of eight. They are sent in
/// the order given here, the first one first.
///
/// # Errors
/// The packet has IPv4 options or IPv6 extension headers, or is too short; `size` is no multiple of eight.
pub fn fragments(packet: &[u8], size: usize, id: u32) -> Result<Vec<Vec<u8>>> {
    if size == 0 || !size.is_multiple_of(8) {
        bail!("{size} is no size of a fragment");
    }
    let header_len = match packet.first() {
        Some(0x45) => 20,
        Some(first) if first >> 4 == 6 => 40,
        Some(_) | None => bail!("not an IP packet without options"),
    };
    let (Some(header), Some(payload)) = (packet.get(..header_len), packet.get(header_len..)) else {
        bail!("the packet is too short");
    };
    let count = payload.chunks(size).len();
    let cut = payload.chunks(size).enumerate().map(|(index, piece)| {
        let more = u16::from(index + 1 < count);
        let offset = u16::try_from(index * size).context("the packet is too long")?;
        let mut fragment = header.to_vec();
        if header_len == 20 {
            let total = (20 + piece.len()) as u16;
            fragment[2..4].copy_from_slice(&total.to_be_bytes());
            fragment[4..6].copy_from_slice(&(id as u16).to_be_bytes());
            fragment[6..8].copy_from_slice(&((more << 13) | (offset / 8)).to_be_bytes());
            fragment[10..12].copy_from_slice(&[0, 0]);
            let checksum = internet_checksum(&fragment);
            fragment[10..12].copy_from_slice(&checksum.to_be_bytes());
        } else {
            let length = (8 + piece.len()) as u16;
            let next = std::mem::replace(&mut fragment[6], 44);
            fragment[4..6].copy_from_slice(&length.to_be_bytes());
            fragment.extend([next, 0]);
            fragment.extend((offset | more).to_be_bytes());
            fragment.extend(id.to_be_bytes());
        }
        fragment.extend(piece);
        Ok(fragment)
    });
    cut.collect()
}

/// A raw socket for one protocol above IP, without waiting, in the calling thread's namespace.
///
/// # Errors
/// The caller is not root.
pub(super) fn raw_socket(family: Family, protocol: SockProtocol) -> Result<OwnedFd> {
    let family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    socket(family, SockType::Raw, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, protocol)
        .context("opening a raw socket")
}

/// Sends whole IP packets as they stand, from the namespace that it was opened in.
#[derive(Debug)]
pub struct IpSender {
    v4: OwnedFd,
    v6: OwnedFd,
}

impl IpSender {
    /// Opens it in the calling thread's namespace.
    ///
    /// # Errors
    /// The caller is not root.
    pub fn open() -> Result<Self> {
        Ok(Self {
            v4: raw_socket(Family::V4, SockProtocol::Raw)?,
            v6: raw_socket(Family::V6, SockProtocol::Raw)?,
        })
    }

    /// Sends one packet. `IPPROTO_RAW` implies that the IP header is the caller's (raw(7)); the kernel fills in
    /// IPv4's checksum.
    ///
    /// # Errors
    /// It is no IP packet, or there is no route.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        let (socket, destination) = match packet.first().map(|first| first >> 4) {
            Some(4) => {
                let octets: [u8; 4] = packet.get(16..20).context("a short IPv4 header")?.try_into()?;
                (&self.v4, IpAddr::V4(Ipv4Addr::from(octets)))
            }
            Some(6) => {
                let octets: [u8; 16] = packet.get(24..40).context("a short IPv6 header")?.try_into()?;
                (&self.v6, IpAddr::V6(Ipv6Addr::from(octets)))
            }
            Some(_) | None => bail!("not an IP packet"),
        };
        send_raw(socket, packet, destination).with_context(|| format!("sending a packet to {destination}"))
    }
}

/// Sends on a raw socket. Raw IPv6 sockets want no port in the address.
pub(super) fn send_raw(socket: &OwnedFd, packet: &[u8], destination: IpAddr) -> nix::Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(destination, 0));
    sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty()).map(drop)
}

/// What tells one crafted or real packet from all others on its way: it survives translation of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// Who sent it.
    pub source: IpAddr,
    /// The protocol above IP.
    pub protocol: u8,
    /// The source port; for an echo request, its id.
    pub port: u16,
}

impl Identity {
    /// The identity of the probe of `transport` that was sent from `source` and `port`.
    pub fn new(source: IpAddr, transport: Transport, port: u16) -> Self {
        let protocol = match transport {
            Transport::Port(protocol, _) => protocol.number(),
            Transport::Portless(number) => number,
        };
        Self { source, protocol, port }
    }

    /// Reads it from a whole IP packet: first fragments and whole packets of TCP, UDP and SCTP, and echo requests.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let (source, protocol, payload) = match packet.first()? >> 4 {
            4 => {
                let start = usize::from(packet[0] & 15) * 4;
                if u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x1fff != 0 {
                    return None;
                }
                let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                (IpAddr::from(source), packet[9], packet.get(start..)?)
            }
            6 => {
                let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                match packet[6] {
                    44 if u16::from_be_bytes(packet.get(42..44)?.try_into().ok()?) & !7 != 0 => return None,
                    44 => (IpAddr::from(source), packet[40], packet.get(48..)?),
                    next => (IpAddr::from(source), next, packet.get(40..)?),
                }
            }
            _ => return None,
        };
        let at = match (protocol, payload.first()?) {
            (6 | 17 | 132, _) => 0,
            (1, 8) | (58, 128) => 4,
            _ => return None,
        };
        let port = u16::from_be_bytes(payload.get(at..at + 2)?.try_into().ok()?);
        Some(Self { source, protocol, port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_the_check_string() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the catalogue's check value of CRC-32/ISCSI");
    }

    #[test]
    fn sctp_reads_what_it_writes() {
        for chunk in [SctpChunk::Init, SctpChunk::InitAck] {
            let packet = Sctp { source: 1, destination: 65535, verification: 7, tag: 0xdead_beef, chunk };
            assert_eq!(Sctp::parse(&packet.to_bytes()), Some(packet));
        }
        assert_eq!(Sctp::parse(&[0; 12]), None);
    }

    #[test]
    fn fragments_carry_everything_once() {
        let ends = |source: &str, destination: &str| Ends {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        for (ends, header) in
            [(ends("10.0.0.1:7", "10.0.0.2:9"), 20), (ends("[fd00::1]:7", "[fd00::2]:9"), 48)]
        {
            let whole = udp(ends, &[3; 100]).unwrap();
            let pieces = fragments(&whole, 16, 1).unwrap();
            let joined: Vec<u8> = pieces.iter().flat_map(|piece| piece[header..].to_vec()).collect();
            assert_eq!(joined, whole[if header == 20 { 20 } else { 40 }..]);
            assert_eq!(Identity::parse(&pieces[0]), Identity::parse(&whole));
            assert_eq!(Identity::parse(&pieces[1]), None);
        }
    }

    #[test]
    fn options_keep_the_packet_valid() {
        let ends = Ends { source: "10.0.0.1:7".parse().unwrap(), destination: "10.0.0.2:9".parse().unwrap() };
        let packet = with_ipv4_options(&udp(ends, b"x").unwrap(), 9).unwrap();
        assert_eq!(packet[0], 0x4f);
        assert_eq!(internet_checksum(&packet[..60]), 0);
        assert_eq!(Identity::parse(&packet).map(|identity| identity.port), Some(7));
    }
}
