//! Addresses and CIDRs as the Kubernetes API reads them.
//!
//! Stored objects may hold what Go accepted before 1.17 and Kubernetes still accepts (`ParseIPSloppy`,
//! `ParseCIDRSloppy` in k8s.io/utils/net): leading zeros, which count as decimal. Rust's parser refuses those.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Reads an address. IPv4-mapped IPv6 addresses are the IPv4 addresses that they map.
pub(super) fn address(text: &str) -> Option<IpAddr> {
    if let Some(address) = v4(text) {
        return Some(IpAddr::V4(address));
    }
    Some(IpAddr::V6(v6(text)?).to_canonical())
}

/// Reads a CIDR and masks its host bits. A block of IPv4-mapped addresses is the IPv4 block (Go's `IPNet.Contains`
/// compares mapped addresses as IPv4).
pub(super) fn network(text: &str) -> Option<IpNet> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = decimal(prefix, 128)?;
    if let Some(address) = v4(address) {
        return Some(IpNet::V4(Ipv4Net::new(address, prefix).ok()?.trunc()));
    }
    let net = Ipv6Net::new(v6(address)?, prefix).ok()?.trunc();
    match (net.addr().to_ipv4_mapped(), prefix.checked_sub(96)) {
        (Some(mapped), Some(prefix)) => Some(IpNet::V4(Ipv4Net::new(mapped, prefix).ok()?)),
        (Some(_) | None, _) => Some(IpNet::V6(net)),
    }
}

/// Whether `except` leaves some of `cidr`: it is inside and smaller.
pub(super) fn is_strict_subset(except: &IpNet, cidr: &IpNet) -> bool {
    cidr.contains(except) && except.prefix_len() > cidr.prefix_len()
}

/// Decimal digits with any number of leading zeros, up to `max`.
fn decimal(text: &str, max: u8) -> Option<u8> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = text.trim_start_matches('0');
    if digits.is_empty() {
        return Some(0);
    }
    digits.parse().ok().filter(|number| *number <= max)
}

fn v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = decimal(parts.next()?, u8::MAX)?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

fn v6(text: &str) -> Option<Ipv6Addr> {
    let mut groups: Vec<String> = text.split(':').map(group).collect();
    if groups.len() < 3 {
        return None;
    }
    if let Some(last) = groups.last_mut().filter(|last| last.contains('.')) {
        let [a, b, c, d] = v4(last)?.octets();
        *last = format!("{:x}:{:x}", u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    }
    groups.join(":").parse().ok()
}

/// A group of an IPv6 address without the leading zeros that Rust's parser would refuse.
fn group(text: &str) -> String {
    if text.len() <= 4 || text.contains('.') {
        return text.to_owned();
    }
    let digits = text.trim_start_matches('0');
    if digits.is_empty() { "0".to_owned() } else { digits.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let check = |text: &str, expected: Option<&str>| {
            assert_eq!(address(text), expected.map(|text| text.parse().unwrap()), "{text:?}");
        };
        check("10.0.0.1", Some("10.0.0.1"));
        check("010.000.08.0000001", Some("10.0.8.1"));
        check("fd00::0001", Some("fd00::1"));
        check("fd00::00000001", Some("fd00::1"));
        check("::ffff:10.0.0.1", Some("10.0.0.1"));
        check("::ffff:a00:1", Some("10.0.0.1"));
        check("::ffff:010.0.0.01", Some("10.0.0.1"));
        check("64:ff9b::10.0.0.1", Some("64:ff9b::a00:1"));
        for bad in [
            "",
            "10.0.0",
            "10.0.0.256",
            "10.0.0.1.2",
            "10.0.0.-1",
            "+1.0.0.0",
            "0x0a.0.0.1",
            "10.0.0.1 ",
            "1",
        ] {
            check(bad, None);
        }
        for bad in
            ["fe80::1%eth0", ":", ":::", "fd00::1::2", "fd00::12345", "::10.0.0.256", "10.0.0.1::", "a.b::"]
        {
            check(bad, None);
        }
    }

    #[test]
    fn networks() {
        let check = |text: &str, expected: Option<&str>| {
            assert_eq!(network(text), expected.map(|text| text.parse().unwrap()), "{text:?}");
        };
        check("10.1.2.3/8", Some("10.0.0.0/8"));
        check("192.168.242.213/24", Some("192.168.242.0/24"));
        check("010.020.0.0/016", Some("10.20.0.0/16"));
        check("255.255.255.255/0", Some("0.0.0.0/0"));
        check("0.0.0.0/00", Some("0.0.0.0/0"));
        check("fd00::ff/64", Some("fd00::/64"));
        check("::1/0", Some("::/0"));
        check("0:0:0:0:0:0:0:0/0", Some("::/0"));
        check("::ffff:10.1.2.3/104", Some("10.0.0.0/8"));
        check("::ffff:0:0/96", Some("0.0.0.0/0"));
        check("::ffff:0:0/95", Some("::fffe:0:0/95"));
        for bad in
            ["10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/8/8", "10.0.0.0/+8", "/8"]
        {
            check(bad, None);
        }
        for bad in
            ["fd00::/129", "fd00::/256", "10.0.0.0/8 ", " 10.0.0.0/8", "10.0.0.0/255.0.0.0", "10/8", "::/"]
        {
            check(bad, None);
        }
    }

    #[test]
    fn subsets() {
        let check = |except: &str, cidr: &str, expected: bool| {
            assert_eq!(is_strict_subset(&network(except).unwrap(), &network(cidr).unwrap()), expected);
        };
        check("10.1.0.0/16", "10.0.0.0/8", true);
        check("10.0.0.0/8", "10.0.0.0/8", false);
        check("10.0.0.0/7", "10.0.0.0/8", false);
        check("11.0.0.0/16", "10.0.0.0/8", false);
        check("fd00::/16", "10.0.0.0/8", false);
        check("10.0.0.0/8", "::/0", false);
        check("::ffff:10.1.0.0/112", "10.0.0.0/8", true);
    }
}
