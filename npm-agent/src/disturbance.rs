//! Hears when somebody changes the rules that ours hang on, so that they are repaired at once and not at the next read-back.
//!
//! nftables tells every change to whoever listens (iptables-nft's rules are nftables' too); iptables-legacy and ipset tell
//! nothing. What concerns FORWARD, our own chains, or a whole table is told on; kube-proxy's chains change many times a
//! minute on some nodes, and are its own affair.

use std::io;
use std::time::{Duration, Instant};

use rustix::net::netlink::NETFILTER;
use tracing::warn;

use crate::netlink::{Frame, Received, Socket, attributes, frames, readable, text};

/// The multicast group of nftables (NFNLGRP_NFTABLES, linux/netfilter/nfnetlink.h).
const NFTABLES: u32 = 1 << 6;
const SUBSYSTEM: u16 = 10 << 8;
// linux/netfilter/nf_tables.h
const NEWTABLE: u16 = SUBSYSTEM;
const DELTABLE: u16 = SUBSYSTEM | 2;
const NEWCHAIN: u16 = SUBSYSTEM | 3;
const DELCHAIN: u16 = SUBSYSTEM | 5;
const NEWRULE: u16 = SUBSYSTEM | 6;
const DELRULE: u16 = SUBSYSTEM | 8;
const CHAIN_NAME: u16 = 3;
const RULE_CHAIN: u16 = 2;
/// `struct nfgenmsg`.
const HEADER_LEN: usize = 4;

/// How our chains begin, the one of the rule that tracks connections included; and the one that they hang on.
const OURS: [&str; 2] = ["AZURE-NPM", "NPM-AGENT"];
const FORWARD: &str = "FORWARD";

/// How long a thread may sleep that nobody wakes.
const LONG: Duration = Duration::from_secs(3600);

/// Starts a thread that calls `tell` after each change in the calling thread's network namespace, for as long as the
/// process lives. Our own changes are among them.
///
/// # Errors
/// The system refuses a socket or a thread.
pub fn watch(tell: impl Fn() + Send + 'static) -> io::Result<()> {
    let mut socket = Socket::open(Some(NETFILTER), NFTABLES)?;
    std::thread::Builder::new().name("disturbance".to_owned()).spawn(move || {
        loop {
            match hear(&mut socket) {
                Ok(Heard::Disturbance) => tell(),
                Ok(Heard::Nothing) => {}
                Err(error) => {
                    warn!(%error, "cannot hear of changes of rules, they are repaired at intervals");
                    return;
                }
            }
        }
    })?;
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Disturbance,
    Nothing,
}

/// Waits for a datagram, and says whether it matters.
fn hear(socket: &mut Socket) -> io::Result<Heard> {
    readable(&*socket, Instant::now() + LONG)?;
    match socket.receive()? {
        Received::Nothing => Ok(Heard::Nothing),
        // Something that matters may be among what is lost.
        Received::Overrun => Ok(Heard::Disturbance),
        Received::Datagram(bytes) => {
            // What can't be read may concern us.
            let concerns = |frame: io::Result<Frame<'_>>| {
                frame.map_or(true, |frame| concerns_us(frame.kind, frame.payload))
            };
            Ok(if frames(bytes).any(concerns) { Heard::Disturbance } else { Heard::Nothing })
        }
    }
}

fn concerns_us(kind: u16, payload: &[u8]) -> bool {
    let chain = match kind {
        NEWTABLE | DELTABLE => return true,
        NEWCHAIN | DELCHAIN => CHAIN_NAME,
        NEWRULE | DELRULE => RULE_CHAIN,
        _ => return false,
    };
    // What can't be read may concern us.
    let names: io::Result<Vec<String>> = attributes(payload.get(HEADER_LEN..).unwrap_or_default())
        .filter_map(|attribute| match attribute {
            Ok((kind, held)) => (kind == chain).then(|| Ok(text(held))),
            Err(error) => Some(Err(error)),
        })
        .collect();
    let is_ours = |name: &String| name == FORWARD || OURS.iter().any(|ours| name.starts_with(ours));
    names.map_or(true, |names| names.iter().any(is_ours))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attribute;

    #[test]
    fn only_what_ours_hang_on_concerns_us() {
        let object = |kind, chain: &str| {
            let mut bytes = vec![2, 0, 0, 0];
            bytes.extend(attribute(1, b"filter\0"));
            bytes.extend(attribute(kind, format!("{chain}\0").as_bytes()));
            bytes
        };
        for (kind, chain, expected) in [
            (DELRULE, "FORWARD", true),
            (NEWRULE, "AZURE-NPM-INGRESS", true),
            (DELRULE, "NPM-AGENT-CONNTRACK", true),
            (NEWRULE, "KUBE-FORWARD", false),
            (DELRULE, "cali-FORWARD", false),
        ] {
            assert_eq!(concerns_us(kind, &object(RULE_CHAIN, chain)), expected, "{chain}");
        }
        assert!(concerns_us(DELCHAIN, &object(CHAIN_NAME, "AZURE-NPM")));
        assert!(!concerns_us(DELCHAIN, &object(CHAIN_NAME, "KUBE-SVC-X")));
        assert!(concerns_us(DELTABLE, &object(2, "filter")));
        // The end of a transaction; a set.
        assert!(!concerns_us(SUBSYSTEM | 15, &object(2, "FORWARD")));
        assert!(!concerns_us(SUBSYSTEM | 9, &object(2, "FORWARD")));
        assert!(concerns_us(DELRULE, &[2, 0, 0, 0, 200, 0, 2, 0]), "it is cut");
    }
}
