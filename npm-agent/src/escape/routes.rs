//! Through which interface the node reaches an address (rtnetlink(7), RTM_GETROUTE).

use std::io;
use std::net::IpAddr;

use netlink_packet_core::NLM_F_ACK;
use rustix::io::Errno;

use crate::interfaces::Index;
use crate::netlink::{Socket, array, attribute, attributes, malformed};

// linux/rtnetlink.h
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
/// The length of `struct rtmsg`.
const ROUTE_LEN: usize = 12;
// linux/socket.h
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The interface that packets to `address` leave through; `None`: there is no route.
pub(super) fn interface_towards(socket: &mut Socket, address: IpAddr) -> io::Result<Option<Index>> {
    let (family, bytes) = match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    };
    let mut body = vec![0; ROUTE_LEN];
    body[0] = family;
    body[1] = if address.is_ipv4() { 32 } else { 128 };
    body.extend(attribute(RTA_DST, &bytes));
    let mut through = None;
    let asked = socket.ask(RTM_GETROUTE, NLM_F_ACK, &body, |kind, payload| {
        if kind == RTM_NEWROUTE {
            for attribute in attributes(payload.get(ROUTE_LEN..).unwrap_or_default()) {
                let (kind, held) = attribute?;
                if kind == RTA_OIF {
                    let index = array(held, 0).ok_or_else(|| malformed("a route's interface"))?;
                    through = Some(Index(u32::from_ne_bytes(index)));
                }
            }
        }
        Ok(())
    });
    match asked {
        Ok(_listed) => Ok(through),
        Err(error) => match Errno::from_io_error(&error) {
            // No route, one that says "no", and one for nobody.
            Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ACCESS | Errno::INVAL) => Ok(None),
            Some(_) | None => Err(error),
        },
    }
}
