//! The two implementations of iptables, and which of them this node uses.

use std::path::Path;

use npm_policy::goal::Family;

use super::BackendError;
use crate::exec::Tools;

/// Chains that the kubelet makes in the mangle table of the iptables that the node uses (Kubernetes KEP-3178).
const KUBELET_CHAINS: [&str; 2] = ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"];

/// An implementation of iptables. Both may hold rules at the same time; a packet passes both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Over nf_tables.
    Nft,
    /// Over ip_tables.
    Legacy,
}

impl Variant {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Nft, Self::Legacy];

    /// The one that it is not.
    pub fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }

    /// Finds the variant that kubelet and kube-proxy use: where the kubelet's chains are; else the one with more rules;
    /// else nft; of those that are installed.
    pub fn detect(tools: &Tools) -> Self {
        for variant in Self::BOTH {
            if KUBELET_CHAINS.into_iter().any(|chain| variant.has_chain("mangle", chain)) {
                return variant;
            }
        }
        match Self::BOTH.map(|variant| variant.rule_count(tools)) {
            [Some(nft), Some(legacy)] if legacy > nft => Self::Legacy,
            [None, Some(_)] => Self::Legacy,
            [Some(_), Some(_) | None] | [None, None] => Self::Nft,
        }
    }

    /// `iptables-nft`, `ip6tables-legacy`, ...
    pub fn command(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::Nft, Family::V4) => "iptables-nft",
            (Self::Nft, Family::V6) => "ip6tables-nft",
            (Self::Legacy, Family::V4) => "iptables-legacy",
            (Self::Legacy, Family::V6) => "ip6tables-legacy",
        }
    }

    /// The program that prints its tables.
    pub fn save(self, family: Family) -> String {
        format!("{}-save", self.command(family))
    }

    /// The program that changes its tables.
    pub fn restore(self, family: Family) -> String {
        format!("{}-restore", self.command(family))
    }

    /// Whether a table exists in the calling thread's network namespace. Legacy's tables come into being when they
    /// are first asked for, which is no question to put to a node that does not use them.
    pub fn has_table(self, family: Family, table: &str) -> bool {
        match self {
            Self::Nft => true,
            Self::Legacy => {
                let names = match family {
                    Family::V4 => "/proc/thread-self/net/ip_tables_names",
                    Family::V6 => "/proc/thread-self/net/ip6_tables_names",
                };
                // Without the kernel module there is no such file and no such table.
                std::fs::read_to_string(names).is_ok_and(|names| names.lines().any(|name| name == table))
            }
        }
    }

    /// Whether an IPv4 table has a chain. A program that can't be run has none.
    fn has_chain(self, table: &str, chain: &str) -> bool {
        if !self.has_table(Family::V4, table) {
            return false;
        }
        let Ok(mut iptables) = iptables::new(false).inspect_err(|error| {
            tracing::warn!(%error, "cannot ask iptables for the kubelet's chains");
        }) else {
            return false;
        };
        iptables.cmd = self.command(Family::V4);
        iptables.set_numeric(true);
        iptables.chain_exists(table, chain).unwrap_or(false)
    }

    /// How many rules all tables have. `None`: it is not installed.
    fn rule_count(self, tools: &Tools) -> Option<usize> {
        let program = self.save(Family::V4);
        let has_tables =
            ["filter", "nat", "mangle", "raw"].into_iter().any(|table| self.has_table(Family::V4, table));
        // Asked for its version it makes no tables.
        let arguments: &[&str] = if has_tables { &[] } else { &["--version"] };
        match tools.run(&program, arguments, "") {
            Ok(saved) => Some(saved.lines().filter(|line| line.starts_with("-A ")).count()),
            Err(BackendError::Spawn { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(%error, "cannot count the rules of {program}");
                Some(0)
            }
        }
    }
}

/// Whether the kernel has IPv6 in the calling thread's network namespace.
///
/// # Errors
/// /proc could not be asked.
pub fn has_ipv6() -> Result<bool, BackendError> {
    if !Path::new("/proc/thread-self/net").exists() {
        return Err(BackendError::Unsupported { what: "/proc/thread-self/net".to_owned() });
    }
    Ok(Path::new("/proc/thread-self/net/if_inet6").exists())
}
