//! Policies of IPsec (ip-xfrm(8)): what they encrypt leaves the node as packets that nobody can read the pods' from.
//!
//! Only what goes out matters: what comes in is decrypted before it is forwarded. Policies of an interface (xfrm) or with a
//! mark (VTI) are left out: such packets leave by that interface first, in plain.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::NLM_F_DUMP;
use rustix::io::Errno;
use rustix::net::netlink::XFRM;

use super::Escape;
use crate::netlink::{Socket, array, attributes, malformed};

// linux/xfrm.h
const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRMA_TMPL: u16 = 5;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;
const XFRM_POLICY_OUT: u8 = 1;
const XFRM_POLICY_ALLOW: u8 = 0;
/// `struct xfrm_userpolicy_info`, and where it has the selector's source, family and prefix, the direction and the action.
const INFO_LEN: usize = 168;
const SOURCE: usize = 16;
const FAMILY: usize = 40;
const SOURCE_PREFIX: usize = 43;
const DIRECTION: usize = 160;
const ACTION: usize = 161;
// linux/socket.h
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
/// `struct xfrm_userpolicy_id`: what a list is asked for with.
const ID_LEN: usize = 64;

/// Whether packets of pods are encrypted on their way out.
///
/// # Errors
/// The kernel does not let itself be asked.
pub(super) fn escapes(protected: &BTreeSet<IpAddr>) -> io::Result<BTreeSet<Escape>> {
    let mut sources = Vec::new();
    let mut socket = match Socket::open(Some(XFRM), 0) {
        Ok(socket) => socket,
        // A kernel without IPsec encrypts nothing.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::PROTONOSUPPORT) => {
            return Ok(BTreeSet::new());
        }
        Err(error) => return Err(error),
    };
    socket.ask(XFRM_MSG_GETPOLICY, NLM_F_DUMP, &[0; ID_LEN], |kind, payload| {
        if kind == XFRM_MSG_NEWPOLICY {
            sources.extend(encrypted(payload)?);
        }
        Ok(())
    })?;
    if sources.is_empty() {
        return Ok(BTreeSet::new());
    }
    let is_encrypted = |address: &&IpAddr| sources.iter().any(|source| source.covers(**address));
    let pods = protected.iter().filter(is_encrypted).count();
    Ok([Escape::Ipsec { policies: sources.len(), pods }].into())
}

/// Whose packets a policy is about: those from these addresses.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    /// The first bytes count.
    address: [u8; 16],
    /// `None`: of both families.
    family: Option<u16>,
    prefix: u8,
}

impl Source {
    fn covers(&self, address: IpAddr) -> bool {
        let (family, bytes) = match address {
            IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
            IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
        };
        let whole = usize::from(self.prefix / 8);
        let rest = self.prefix % 8;
        let same = |bits: u8, a: u8, b: u8| bits == 0 || (a ^ b) >> (8 - bits) == 0;
        self.family.is_none_or(|of| of == family)
            && bytes.get(..whole) == self.address.get(..whole)
            && (rest == 0
                || match (bytes.get(whole), self.address.get(whole)) {
                    (Some(a), Some(b)) => same(rest, *a, *b),
                    (_, _) => false,
                })
    }
}

/// The source of a policy that encrypts what is forwarded or sent; `None`: it does not.
fn encrypted(payload: &[u8]) -> io::Result<Option<Source>> {
    let cut = || malformed("a policy of IPsec");
    let byte = |at: usize| payload.get(at).copied().ok_or_else(cut);
    if byte(DIRECTION)? != XFRM_POLICY_OUT || byte(ACTION)? != XFRM_POLICY_ALLOW {
        return Ok(None);
    }
    let mut has_templates = false;
    for attribute in attributes(payload.get(INFO_LEN..).ok_or_else(cut)?) {
        match attribute? {
            (XFRMA_TMPL, held) => has_templates = !held.is_empty(),
            (XFRMA_MARK | XFRMA_IF_ID, _) => return Ok(None),
            _ => {}
        }
    }
    let family = u16::from_ne_bytes(array(payload, FAMILY).ok_or_else(cut)?);
    let source = Source {
        address: array(payload, SOURCE).ok_or_else(cut)?,
        family: (family != 0).then_some(family),
        prefix: byte(SOURCE_PREFIX)?,
    };
    Ok(has_templates.then_some(source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attribute;

    /// A policy for what comes from 10.241.0.0/17.
    fn policy(direction: u8, action: u8, more: &[u8]) -> Vec<u8> {
        let mut payload = vec![0; INFO_LEN];
        payload[SOURCE..SOURCE + 4].copy_from_slice(&[10, 241, 0, 0]);
        payload[FAMILY..FAMILY + 2].copy_from_slice(&AF_INET.to_ne_bytes());
        (payload[SOURCE_PREFIX], payload[DIRECTION], payload[ACTION]) = (17, direction, action);
        payload.extend(more);
        payload
    }

    #[test]
    fn only_what_encrypts_on_the_way_out_counts() {
        let template = attribute(XFRMA_TMPL, &[0; 64]);
        let found = encrypted(&policy(XFRM_POLICY_OUT, XFRM_POLICY_ALLOW, &template)).unwrap().unwrap();
        for (address, covered) in
            [("10.241.0.1", true), ("10.241.127.255", true), ("10.241.128.0", false), ("fd00::1", false)]
        {
            assert_eq!(found.covers(address.parse().unwrap()), covered, "{address}");
        }
        let marked = [template.clone(), attribute(XFRMA_MARK, &[1; 8])].concat();
        for (direction, action, more) in [
            (0, XFRM_POLICY_ALLOW, template.as_slice()),
            (2, XFRM_POLICY_ALLOW, &template),
            (XFRM_POLICY_OUT, 1, &template),
            (XFRM_POLICY_OUT, XFRM_POLICY_ALLOW, &[]),
            (XFRM_POLICY_OUT, XFRM_POLICY_ALLOW, &marked),
        ] {
            assert_eq!(encrypted(&policy(direction, action, more)).unwrap(), None, "{direction} {action}");
        }
        assert!(encrypted(&[0; 20]).is_err());
    }

    #[test]
    fn a_selector_for_everything_covers_everything() {
        let everything = Source { address: [0; 16], family: None, prefix: 0 };
        assert!(everything.covers("10.0.0.1".parse().unwrap()) && everything.covers("::1".parse().unwrap()));
    }
}
