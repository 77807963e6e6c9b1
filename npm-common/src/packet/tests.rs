//! Headers as they are on the wire, whole, cut at every byte, and wrong.

extern crate std;

use std::vec;
use std::vec::Vec;

use super::*;

const ETHERNET_V4: [u8; 14] = [0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00];
const ETHERNET_V6: [u8; 14] = [0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x86, 0xdd];

/// 10.1.0.5 to 10.96.0.10, 20 bytes and a TCP SYN's 20.
const V4: [u8; 20] = [0x45, 0, 0, 40, 0x1c, 0x46, 0x40, 0, 64, 6, 0xb1, 0xe6, 10, 1, 0, 5, 10, 96, 0, 10];
/// 40000 to 443.
const TCP: [u8; 20] = [0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xfa, 0xf0, 0, 0, 0, 0];
const TCP_PORTS: Option<Ports> = Some(Ports { source: 40000, destination: 443 });

fn ip(bytes: &[u8]) -> Result<Packet, ParseError> {
    let is_v6 = bytes.first().is_some_and(|first| first >> 4 == 6);
    let ethertype = if is_v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 };
    parse_network(&bytes, Network { ethertype, offset: 0 }).map(|headers| headers.packet())
}

fn ethernet(bytes: &[u8]) -> Result<Packet, ParseError> {
    parse_ethernet(&bytes).map(|headers| headers.packet())
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// An IPv4 packet; `options` is a multiple of 4.
fn v4(protocol: Protocol, flags_and_offset: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut header = V4.to_vec();
    header[0] = 0x45 + (options.len() / 4) as u8;
    let total = (20 + options.len() + payload.len()) as u16;
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
    header[9] = protocol.0;
    join(&[&header, options, payload])
}

/// An IPv6 packet from fd00::1 to fd00::2.
fn v6(next: Protocol, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next.0, 64]);
    for last in [1, 2] {
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    packet.extend(payload);
    packet
}

/// An options or routing header of 8 bytes, filled with a PadN option.
fn extension(next: Protocol) -> [u8; 8] {
    [next.0, 0, 1, 4, 0, 0, 0, 0]
}

fn fragment_header(next: Protocol, offset_and_more: u16) -> [u8; 8] {
    let [high, low] = offset_and_more.to_be_bytes();
    [next.0, 0, high, low, 0, 0, 0, 9]
}

#[test]
fn tcp_over_ipv4() {
    let packet = ethernet(&join(&[&ETHERNET_V4, &V4, &TCP])).unwrap();
    let addresses =
        Addresses::V4 { source: Ipv4Addr::new(10, 1, 0, 5), destination: Ipv4Addr::new(10, 96, 0, 10) };
    let expected = Packet {
        addresses,
        protocol: Protocol::TCP,
        ports: TCP_PORTS,
        icmpv6_type: None,
        fragment: Fragment::None,
    };
    assert_eq!(packet, expected);
    assert_eq!(packet.addresses.family(), Family::V4);
}

#[test]
fn udp_over_ipv6() {
    let packet =
        ethernet(&join(&[&ETHERNET_V6, &v6(Protocol::UDP, &[0, 53, 0x30, 0x39, 0, 8, 0, 0])])).unwrap();
    let source = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    let destination = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
    let expected = Packet {
        addresses: Addresses::V6 { source, destination },
        protocol: Protocol::UDP,
        ports: Some(Ports { source: 53, destination: 12345 }),
        icmpv6_type: None,
        fragment: Fragment::None,
    };
    assert_eq!(packet, expected);
    assert_eq!(packet.addresses.family(), Family::V6);
}

#[test]
fn two_vlan_tags_are_looked_behind_and_no_more() {
    let addresses = &ETHERNET_V4[..12];
    let tag: &[u8] = &[0x81, 0, 0, 7];
    let service: &[u8] = &[0x88, 0xa8, 0, 9];
    let rest: &[u8] = &join(&[&[0x08, 0x00], &V4, &TCP]);
    for tags in [vec![tag], vec![service, tag], vec![tag, tag]] {
        let frame = join(&[addresses, &tags.concat(), rest]);
        assert_eq!(ethernet(&frame).unwrap().ports, TCP_PORTS, "{tags:x?}");
    }
    assert_eq!(ethernet(&join(&[addresses, service, tag, tag, rest])), Err(ParseError::TooManyTags));
}

#[test]
fn what_is_not_ip_is_not_ip() {
    let arp = join(&[&ETHERNET_V4[..12], &[0x08, 0x06], &[0; 28]]);
    assert_eq!(ethernet(&arp), Err(ParseError::NotIp));
    let cdp = Network { ethertype: 0x2000, offset: 0 };
    assert_eq!(parse_network(&v4(Protocol::TCP, 0, &[], &TCP).as_slice(), cdp), Err(ParseError::NotIp));
}

#[test]
fn ipv4_options_are_skipped() {
    for len in [4, 12, 40] {
        let packet = ip(&v4(Protocol::TCP, 0x4000, &vec![1; len], &TCP)).unwrap();
        assert_eq!((packet.ports, packet.fragment), (TCP_PORTS, Fragment::None), "{len} bytes of options");
    }
}

#[test]
fn only_the_first_ipv4_fragment_has_ports() {
    for (flags_and_offset, fragment, ports) in [
        (0x0000, Fragment::None, TCP_PORTS),
        (0x4000, Fragment::None, TCP_PORTS),
        (0x2000, Fragment::First, TCP_PORTS),
        (0x2001, Fragment::Later, None),
        (0x1fff, Fragment::Later, None),
    ] {
        let packet = ip(&v4(Protocol::TCP, flags_and_offset, &[], &TCP)).unwrap();
        assert_eq!((packet.fragment, packet.ports), (fragment, ports), "{flags_and_offset:#06x}");
        assert_eq!(packet.protocol, Protocol::TCP);
    }
}

#[test]
fn only_tcp_udp_and_sctp_have_ports() {
    for number in 0..=u8::MAX {
        let protocol = Protocol(number);
        let packet = ip(&v4(protocol, 0, &[], &TCP)).unwrap();
        let expected = if [6, 17, 132].contains(&number) { TCP_PORTS } else { None };
        assert_eq!((packet.protocol, packet.ports), (protocol, expected));
    }
}

#[test]
fn ipv6_extension_headers_are_followed() {
    let authentication: &[u8] = &join(&[&[Protocol::TCP.0, 4], &[0; 22]]);
    let long_options: &[u8] = &join(&[&[Protocol::TCP.0, 2], &[0; 22]]);
    let cases: [(Protocol, Vec<u8>); 7] = [
        (Protocol::HOP_BY_HOP, extension(Protocol::TCP).to_vec()),
        (Protocol::ROUTING, extension(Protocol::TCP).to_vec()),
        (Protocol::DESTINATION_OPTIONS, extension(Protocol::TCP).to_vec()),
        (Protocol::DESTINATION_OPTIONS, long_options.to_vec()),
        (Protocol::AUTHENTICATION, authentication.to_vec()),
        (Protocol::FRAGMENT, fragment_header(Protocol::TCP, 0).to_vec()),
        (
            Protocol::HOP_BY_HOP,
            join(&[
                &extension(Protocol::DESTINATION_OPTIONS),
                &extension(Protocol::ROUTING),
                &extension(Protocol::FRAGMENT),
                &fragment_header(Protocol::AUTHENTICATION, 0),
                &join(&[&[Protocol::DESTINATION_OPTIONS.0, 4], &[0; 22]]),
                &extension(Protocol::TCP),
            ]),
        ),
    ];
    for (first, extensions) in cases {
        let packet = ip(&v6(first, &join(&[&extensions, &TCP]))).unwrap();
        assert_eq!(packet.protocol, Protocol::TCP, "{first:?}");
        assert_eq!((packet.ports, packet.fragment), (TCP_PORTS, Fragment::None), "{first:?}");
    }
}

#[test]
fn only_the_first_ipv6_fragment_has_ports() {
    for (offset_and_more, fragment, ports) in [
        (0x0001, Fragment::First, TCP_PORTS),
        (0x0008, Fragment::Later, None),
        (0xfff9, Fragment::Later, None),
        // The two reserved bits mean nothing.
        (0x0006, Fragment::None, TCP_PORTS),
    ] {
        let bytes = v6(Protocol::FRAGMENT, &join(&[&fragment_header(Protocol::TCP, offset_and_more), &TCP]));
        let packet = ip(&bytes).unwrap();
        assert_eq!((packet.fragment, packet.ports), (fragment, ports), "{offset_and_more:#06x}");
        assert_eq!(packet.protocol, Protocol::TCP);
    }
}

#[test]
fn a_later_fragments_payload_is_not_taken_for_headers() {
    // The payload would be a fine options header and a TCP header.
    let payload =
        join(&[&fragment_header(Protocol::DESTINATION_OPTIONS, 0x0008), &extension(Protocol::TCP), &TCP]);
    let packet = ip(&v6(Protocol::FRAGMENT, &payload)).unwrap();
    assert_eq!((packet.protocol, packet.ports), (Protocol::DESTINATION_OPTIONS, None));
}

#[test]
fn extension_headers_are_counted() {
    for count in 0..=MAX_EXTENSIONS + 2 {
        let mut extensions = Vec::new();
        for left in (0..count).rev() {
            extensions.extend(extension(if left == 0 {
                Protocol::TCP
            } else {
                Protocol::DESTINATION_OPTIONS
            }));
        }
        let first = if count == 0 { Protocol::TCP } else { Protocol::DESTINATION_OPTIONS };
        let outcome = ip(&v6(first, &join(&[&extensions, &TCP]))).map(|packet| packet.ports);
        let expected =
            if count <= MAX_EXTENSIONS { Ok(TCP_PORTS) } else { Err(ParseError::TooManyExtensions) };
        assert_eq!(outcome, expected, "{count} headers");
    }
}

#[test]
fn headers_that_contradict_themselves_are_bad() {
    let good = v4(Protocol::TCP, 0, &[], &TCP);
    let mut wrong_version = join(&[&ETHERNET_V4, &good]);
    wrong_version[14] = 0x65;
    let mut short_header = good.clone();
    short_header[0] = 0x44;
    let mut short_total = good.clone();
    short_total[2..4].copy_from_slice(&19_u16.to_be_bytes());
    let mut no_room_for_ports = good.clone();
    no_room_for_ports[2..4].copy_from_slice(&23_u16.to_be_bytes());
    assert_eq!(ethernet(&wrong_version), Err(ParseError::BadHeader));
    for bytes in [short_header, short_total, no_room_for_ports] {
        assert_eq!(ip(&bytes), Err(ParseError::BadHeader), "{:x?}", &bytes[..4]);
    }

    let mut wrong_version = join(&[&ETHERNET_V6, &v6(Protocol::TCP, &TCP)]);
    wrong_version[14] = 0x45;
    assert_eq!(ethernet(&wrong_version), Err(ParseError::BadHeader));
    let mut extension_past_the_end =
        v6(Protocol::DESTINATION_OPTIONS, &join(&[&extension(Protocol::TCP), &TCP]));
    extension_past_the_end[4..6].copy_from_slice(&7_u16.to_be_bytes());
    assert_eq!(ip(&extension_past_the_end), Err(ParseError::BadHeader));
    let mut no_room_for_ports = v6(Protocol::TCP, &TCP);
    no_room_for_ports[4..6].copy_from_slice(&3_u16.to_be_bytes());
    assert_eq!(ip(&no_room_for_ports), Err(ParseError::BadHeader));
}

#[test]
fn a_length_of_zero_is_an_aggregate_of_more_than_64_kib() {
    let mut v4 = v4(Protocol::TCP, 0, &[], &TCP);
    v4[2..4].copy_from_slice(&[0, 0]);
    let mut v6 = v6(Protocol::TCP, &TCP);
    v6[4..6].copy_from_slice(&[0, 0]);
    for bytes in [v4, v6] {
        assert_eq!(ip(&bytes).unwrap().ports, TCP_PORTS);
    }
}

#[test]
fn ports_that_only_padding_holds_are_none() {
    // An Ethernet frame is padded to 60 bytes: what lies behind the IP packet is nobody's port.
    let mut frame = join(&[&ETHERNET_V4, &v4(Protocol::UDP, 0, &[], &[])]);
    frame.resize(60, 0x11);
    assert_eq!(ethernet(&frame), Err(ParseError::BadHeader));
    let mut frame = join(&[&ETHERNET_V4, &v4(Protocol::ICMP, 0, &[], &[8, 0])]);
    frame.resize(60, 0x11);
    assert_eq!(ethernet(&frame).unwrap().ports, None);
}

/// What the iptables engine passes by type, behind whatever extension headers, the parser knows by the same types.
#[test]
fn neighbour_discovery_is_known_by_its_type() {
    let message = |kind: u8| [kind, 0, 0, 0, 0, 0, 0, 0];
    for kind in 0..=u8::MAX {
        let is = NEIGHBOUR_TYPES.contains(&kind);
        let listener_report = join(&[&extension(Protocol::ICMPV6), &message(kind)]);
        let first = join(&[&fragment_header(Protocol::ICMPV6, 1), &message(kind)]);
        for packet in [
            v6(Protocol::ICMPV6, &message(kind)),
            v6(Protocol::HOP_BY_HOP, &listener_report),
            v6(Protocol::FRAGMENT, &first),
        ] {
            let packet = ip(&packet).unwrap();
            assert_eq!((packet.icmpv6_type, packet.ports), (Some(kind), None));
            assert_eq!(packet.is_neighbour_discovery(), is, "type {kind}");
        }
        let later = join(&[&fragment_header(Protocol::ICMPV6, 8), &message(kind)]);
        for packet in [
            v6(Protocol::FRAGMENT, &later),
            v6(Protocol::ICMP, &message(kind)),
            v4(Protocol::ICMPV6, 0, &[], &message(kind)),
        ] {
            let packet = ip(&packet).unwrap();
            assert_eq!(packet.icmpv6_type, None);
            assert!(!packet.is_neighbour_discovery(), "type {kind}: {packet:?}");
        }
    }
}

#[test]
fn a_cut_icmpv6_message_is_no_message() {
    let mut padded = join(&[&ETHERNET_V6, &v6(Protocol::ICMPV6, &[135, 0, 0, 0, 0, 0, 0])]);
    assert_eq!(ethernet(&padded), Err(ParseError::BadHeader));
    padded.push(0);
    assert_eq!(ethernet(&padded), Err(ParseError::BadHeader));
    padded[14 + 5] = 8;
    assert_eq!(ethernet(&padded).unwrap().icmpv6_type, Some(135));
    padded.pop();
    assert_eq!(ethernet(&padded), Err(ParseError::Truncated));
}

/// Of a packet that can't be read to its end the addresses are known once its fixed header is there, so that it can be
/// told whose it is.
#[test]
fn addresses_of_broken_packets_are_kept() {
    let mut wrong_version = V4;
    wrong_version[0] = 0x65;
    let mut truncated_chain = v6(Protocol::ROUTING, &[Protocol::TCP.0, 5]);
    truncated_chain[5] = 200;
    let mut too_many = Vec::new();
    for _ in 0..=MAX_EXTENSIONS {
        too_many.extend(extension(Protocol::ROUTING));
    }
    for (ethertype, packet, error) in [
        (ETHERTYPE_IPV4, wrong_version.to_vec(), ParseError::BadHeader),
        (ETHERTYPE_IPV4, V4.to_vec(), ParseError::Truncated),
        (ETHERTYPE_IPV6, truncated_chain, ParseError::Truncated),
        (ETHERTYPE_IPV6, v6(Protocol::ROUTING, &too_many), ParseError::TooManyExtensions),
    ] {
        let mut headers = Headers::default();
        let network = Network { ethertype, offset: 0 };
        assert_eq!(read(&packet.as_slice(), network, &mut headers), Err(error));
        assert!(headers.has_addresses());
        match headers.family() {
            Family::V4 => assert_eq!(headers.v4(), ([10, 1, 0, 5], [10, 96, 0, 10])),
            Family::V6 => assert_eq!((headers.v6().0[15], headers.v6().1[15]), (1, 2)),
        }
        for len in [0, 19] {
            assert_eq!(read(&&packet[..len], network, &mut headers), Err(ParseError::Truncated));
            assert!(!headers.has_addresses(), "{len} bytes");
        }
    }
}

#[test]
fn codes_tell_outcomes_apart() {
    let outcomes = [
        Ok(()),
        Err(ParseError::Truncated),
        Err(ParseError::NotIp),
        Err(ParseError::TooManyTags),
        Err(ParseError::BadHeader),
        Err(ParseError::TooManyExtensions),
    ];
    for it in outcomes {
        assert_eq!(outcome(code(it)), it);
    }
    assert_eq!(outcome(u32::MAX), Err(ParseError::BadHeader));
}

/// Every prefix of a packet is truncated, until the bytes that are looked at are there; from then on the result is
/// that of the whole.
#[test]
fn every_prefix_is_truncated_or_whole() {
    let chain = join(&[
        &extension(Protocol::ROUTING),
        &extension(Protocol::FRAGMENT),
        &fragment_header(Protocol::AUTHENTICATION, 1),
        &join(&[&[Protocol::SCTP.0, 4], &[0; 22]]),
        &TCP,
    ]);
    let tag = [0x81, 0, 0, 7, 0x08, 0x00];
    // The length of the headers that are looked at, and the frame.
    let frames: [(usize, Vec<u8>); 8] = [
        (14 + 20 + 4, join(&[&ETHERNET_V4, &V4, &TCP])),
        (18 + 20 + 4, join(&[&ETHERNET_V4[..12], &tag, &V4, &TCP])),
        (14 + 60 + 4, join(&[&ETHERNET_V4, &v4(Protocol::UDP, 0, &[1; 40], &TCP)])),
        // Without ports the fixed header is enough: options are never read.
        (14 + 20, join(&[&ETHERNET_V4, &v4(Protocol::ICMP, 0, &[1; 40], &TCP)])),
        (14 + 40 + 4, join(&[&ETHERNET_V6, &v6(Protocol::UDP, &TCP)])),
        (14 + 40 + 8, join(&[&ETHERNET_V6, &v6(Protocol::ICMPV6, &TCP)])),
        // ICMP in IPv6 is not ICMPv6.
        (14 + 40, join(&[&ETHERNET_V6, &v6(Protocol::ICMP, &TCP)])),
        (14 + 40 + 8 + 8 + 8 + 24 + 4, join(&[&ETHERNET_V6, &v6(Protocol::HOP_BY_HOP, &chain)])),
    ];
    for (needed, frame) in frames {
        let whole = ethernet(&frame);
        assert!(whole.is_ok(), "{frame:x?}");
        for len in 0..=frame.len() {
            let expected = if len < needed { Err(ParseError::Truncated) } else { whole };
            assert_eq!(ethernet(&frame[..len]), expected, "{len} of {} bytes: {frame:x?}", frame.len());
        }
    }
}

/// Whatever any byte is, parsing ends and gives a result.
#[test]
fn every_changed_byte_is_survived() {
    let chain = join(&[&extension(Protocol::FRAGMENT), &fragment_header(Protocol::TCP, 1), &TCP]);
    let mut outcomes = Vec::new();
    for frame in [join(&[&ETHERNET_V4, &V4, &TCP]), join(&[&ETHERNET_V6, &v6(Protocol::HOP_BY_HOP, &chain)])]
    {
        for place in 0..frame.len() {
            for value in 0..=u8::MAX {
                let mut changed = frame.clone();
                changed[place] = value;
                outcomes.push(ethernet(&changed).err());
            }
        }
    }
    for error in [None, Some(ParseError::NotIp), Some(ParseError::BadHeader), Some(ParseError::Truncated)] {
        assert!(outcomes.contains(&error), "no change leads to {error:?}");
    }
}
