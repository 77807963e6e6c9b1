//! A flow's first packet, as bytes for the kernel to read.

use std::net::IpAddr;

use npm_common::packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Protocol};
use npm_policy::flow::{Flow, Transport};

/// Bytes of what is above IP: the start of any header that has ports, and an ICMP header.
const UPPER_LEN_BYTES: u16 = 8;
/// Where a fragment that is not the first may begin: behind the headers, in units of 8 bytes.
const OFFSET: u16 = 1;
/// An IPv6 fragment header's length (RFC 8200 §4.5).
const FRAGMENT_LEN_BYTES: u16 = 8;

/// An Ethernet frame that opens the flow. A transport without ports whose protocol would have some is what it can only
/// be: a later fragment. `None`: the ends are of different families.
pub(super) fn opening(flow: &Flow) -> Option<Vec<u8>> {
    let (number, upper) = match flow.transport {
        Transport::Port(protocol, port) => {
            let [high, low] = port.to_be_bytes();
            // An unprivileged source port: no policy looks at it.
            (protocol.number(), [0xc0, 0, high, low, 0, 0, 0, 0])
        }
        // An echo request of either ICMP; the parser reads nothing of it.
        Transport::Portless(number) => {
            let request = if number == Protocol::ICMP.0 { 8 } else { 128 };
            (number, [request, 0, 0, 0, 0, 0, 0, 0])
        }
    };
    let has_ports = Protocol(number).has_ports();
    let mut frame = vec![0; 12];
    match (flow.source, flow.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let fragment = match flow.transport {
                Transport::Portless(_) if has_ports => OFFSET,
                Transport::Portless(_) | Transport::Port(..) => 0,
            };
            frame.extend(ETHERTYPE_IPV4.to_be_bytes());
            frame.extend([0x45, 0]);
            frame.extend((20 + UPPER_LEN_BYTES).to_be_bytes());
            frame.extend([0, 0]);
            frame.extend(fragment.to_be_bytes());
            frame.extend([64, number, 0, 0]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let fragment = match flow.transport {
                Transport::Portless(_) => has_ports || is_extension(number),
                Transport::Port(..) => false,
            };
            let extension_len = if fragment { FRAGMENT_LEN_BYTES } else { 0 };
            frame.extend(ETHERTYPE_IPV6.to_be_bytes());
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((extension_len + UPPER_LEN_BYTES).to_be_bytes());
            frame.extend([if fragment { Protocol::FRAGMENT.0 } else { number }, 64]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
            if fragment {
                frame.extend([number, 0]);
                frame.extend((OFFSET << 3).to_be_bytes());
                frame.extend([0; 4]);
            }
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    }
    frame.extend(upper);
    Some(frame)
}

/// Whether an IPv6 next header of this number is an extension and not the upper protocol.
fn is_extension(number: u8) -> bool {
    [
        Protocol::HOP_BY_HOP,
        Protocol::ROUTING,
        Protocol::FRAGMENT,
        Protocol::AUTHENTICATION,
        Protocol::DESTINATION_OPTIONS,
    ]
    .contains(&Protocol(number))
}

#[cfg(test)]
mod tests {
    use npm_common::decide::port_of;
    use npm_common::packet::{Addresses, parse_ethernet};
    use npm_policy::model::Protocol as Named;

    use super::*;

    #[test]
    fn every_flow_is_read_back_from_its_packet() {
        let ends = [("10.0.0.1", "192.0.2.9"), ("fd00::1", "2001:db8::9")];
        let ported = Named::ALL
            .into_iter()
            .flat_map(|protocol| [0, 1, 80, 65535].map(move |port| Transport::Port(protocol, port)));
        let transports: Vec<Transport> = ported.chain((0..=u8::MAX).map(Transport::Portless)).collect();
        for (source, destination) in ends {
            for transport in &transports {
                let flow = Flow {
                    source: source.parse().unwrap(),
                    destination: destination.parse().unwrap(),
                    transport: *transport,
                };
                let frame = opening(&flow).unwrap();
                let packet = parse_ethernet(&frame.as_slice())
                    .unwrap_or_else(|error| panic!("{flow}: {error}"))
                    .packet();
                let (read_source, read_destination): (IpAddr, IpAddr) = match packet.addresses {
                    Addresses::V4 { source, destination } => (source.into(), destination.into()),
                    Addresses::V6 { source, destination } => (source.into(), destination.into()),
                };
                assert_eq!((read_source, read_destination), (flow.source, flow.destination));
                let (number, port) = match flow.transport {
                    Transport::Port(protocol, port) => (protocol.number(), Some((protocol.number(), port))),
                    Transport::Portless(number) => (number, None),
                };
                assert_eq!((packet.protocol.0, port_of(&packet)), (number, port), "{flow}");
            }
        }
        let mixed = Flow {
            source: "10.0.0.1".parse().unwrap(),
            destination: "::1".parse().unwrap(),
            transport: Transport::Portless(1),
        };
        assert_eq!(opening(&mixed), None);
    }
}
