//! The values that settings take: each is read from text, the same on the command line, in the environment and in
//! the config file.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use npm_common::mark::ProofBit;
use tracing::Level;

use crate::interfaces::pods::{PodInterfaceError, PodInterfaces};
use crate::interfaces::select::{PatternError, Selection};

/// Makes an enum of named values; the first is the default. Names are read without regard to case, as Azure NPM's
/// configuration library does.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ }
     refused { $($refused:literal => $why:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$value_doc])* $value,)+ }

        impl $name {
            /// All values, the default first.
            pub const ALL: &'static [Self] = &[$(Self::$value),+];
        }

        impl Default for $name {
            fn default() -> Self { Self::ALL[0] }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$value => $text),+ })
            }
        }

        impl FromStr for $name {
            type Err = ValueError;

            fn from_str(text: &str) -> Result<Self, ValueError> {
                match text.to_ascii_lowercase().as_str() {
                    $($text => Ok(Self::$value),)+
                    $($refused => Err(ValueError::NotYet { why: $why }),)*
                    _ => Err(ValueError::Unknown { text: text.to_owned(), known: &[$($text),+] }),
                }
            }
        }
    };
}

choice! {
    /// What programs the kernel.
    BackendKind {
        /// iptables and ipset.
        Iptables = "iptables",
        /// eBPF programs at the egress of every interface.
        Ebpf = "ebpf",
    }
    refused {}
}

choice! {
    /// Where the cluster's objects come from.
    SourceKind {
        /// A directory of manifests.
        Manifests = "manifests",
        /// A cluster's API server.
        Kube = "kube",
    }
    refused {}
}

choice! {
    /// Which iptables is programmed.
    IptablesVariant {
        /// The one that kubelet and kube-proxy use.
        Auto = "auto",
        /// iptables over nf_tables.
        Nft = "nft",
        /// iptables over ip_tables.
        Legacy = "legacy",
    }
    refused {}
}

choice! {
    /// Where the jump to our chains stands in FORWARD.
    ChainPlacement {
        /// Before everything else.
        First = "first",
        /// Behind the jump to KUBE-SERVICES, as Azure NPM's `PlaceAzureChainFirst: false`.
        AfterKubeServices = "after-kube-services",
    }
    refused {}
}

choice! {
    /// Whether the HTTP server tells Prometheus what was counted and measured.
    Scraping {
        /// It does.
        Served = "served",
        /// It does not: its paths are unknown.
        Refused = "refused",
    }
    refused {}
}

choice! {
    /// Who may see what the cluster's policies say: the status page, the verdicts, the debug API.
    DebugAccess {
        /// Clients on the node's loopback.
        Loopback = "loopback",
        /// Whoever reaches the port.
        Anyone = "anyone",
        /// No one.
        Nobody = "nobody",
    }
    refused {}
}

choice! {
    /// What becomes of established connections that policies deny by now.
    DeniedConnections {
        /// They live on.
        Keep = "keep",
        /// They are cut.
        Cut = "cut",
    }
    refused {}
}

choice! {
    /// What of denied flows is logged.
    LogDenied {
        /// Nothing: they are counted.
        Never = "never",
        /// Each flow, at most so many a second.
        Flows = "flows",
    }
    refused {}
}

choice! {
    /// What becomes of a pod's traffic before its policies are programmed.
    PodStartup {
        /// It passes, as with Azure NPM.
        Allow = "allow",
        /// It is held back.
        Hold = "hold",
    }
    refused {}
}

choice! {
    /// How logs look.
    LogFormat {
        /// For people on a terminal, for machines otherwise.
        Auto = "auto",
        /// For people.
        Human = "human",
        /// One JSON object a line.
        Json = "json",
    }
    refused {}
}

choice! {
    /// The least severe log records to write.
    LogLevel {
        /// What changed.
        Info = "info",
        /// Not enforcing; a person must act.
        Error = "error",
        /// Enforcing, but look.
        Warn = "warn",
        /// One record for each decision.
        Debug = "debug",
        /// One record for each object.
        Trace = "trace",
    }
    refused {}
}

impl LogLevel {
    /// The level as tracing has it.
    pub fn level(self) -> Level {
        match self {
            Self::Error => Level::ERROR,
            Self::Warn => Level::WARN,
            Self::Info => Level::INFO,
            Self::Debug => Level::DEBUG,
            Self::Trace => Level::TRACE,
        }
    }
}

/// Reads a node's name. It is compared with `spec.nodeName` byte by byte, so it is taken as it is.
///
/// # Errors
/// It is empty or has white space in it.
pub fn parse_node(text: &str) -> Result<String, ValueError> {
    if text.is_empty() || text.contains(char::is_whitespace) {
        return Err(ValueError::Name { text: text.to_owned() });
    }
    Ok(text.to_owned())
}

/// Reads an instance's name: it becomes part of file names.
///
/// # Errors
/// It is empty, longer than 63 bytes, begins with a dot, or has other characters than `a-z0-9.-`.
pub fn parse_instance(text: &str) -> Result<String, ValueError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    if text.is_empty() || text.len() > 63 || text.starts_with('.') || !text.bytes().all(plain) {
        return Err(ValueError::Instance { text: text.to_owned() });
    }
    Ok(text.to_owned())
}

/// Reads patterns of interface names.
///
/// # Errors
/// One of them is no pattern.
pub fn parse_interfaces(text: &str) -> Result<Selection, ValueError> {
    text.parse().map_err(ValueError::Pattern)
}

/// Reads which interfaces lead to pods.
///
/// # Errors
/// One of them is no name, or could be any.
pub fn parse_pod_interfaces(text: &str) -> Result<PodInterfaces, ValueError> {
    text.parse().map_err(ValueError::PodInterface)
}

/// Reads a bit of the connection mark: `0x1000000`, or `16777216`.
///
/// # Errors
/// It is no number, not exactly one bit, or one that means something in packet marks.
pub fn parse_proof_bit(text: &str) -> Result<ProofBit, ValueError> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let bit = parsed.ok().and_then(ProofBit::new);
    bit.ok_or_else(|| ValueError::ProofBit { text: text.to_owned() })
}

/// Reads an address to listen on.
///
/// # Errors
/// It is no IP address.
pub fn parse_address(text: &str) -> Result<IpAddr, ValueError> {
    text.parse().map_err(|_error| ValueError::Address { text: text.to_owned() })
}

/// Why a text is no value of a setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// None of the names.
    #[error("{text:?} is none of {}", known.join(", "))]
    Unknown {
        /// What is there.
        text: String,
        /// What could be.
        known: &'static [&'static str],
    },
    /// A name that will mean something in another version.
    #[error("{why}")]
    NotYet {
        /// What to do instead.
        why: &'static str,
    },
    /// No duration.
    #[error("{text:?} is no duration: a whole number with ms, s, m or h is, as 30s")]
    Duration {
        /// What is there.
        text: String,
    },
    /// A duration below the minimum.
    #[error("at least {minimum:?} is needed")]
    TooShort {
        /// The minimum.
        minimum: Duration,
    },
    /// No name of a node.
    #[error("{text:?} is no node name")]
    Name {
        /// What is there.
        text: String,
    },
    /// No name of an instance.
    #[error("{text:?} is no instance name: up to 63 lower-case letters, digits, '-' and '.'")]
    Instance {
        /// What is there.
        text: String,
    },
    /// No address.
    #[error("{text:?} is no IP address")]
    Address {
        /// As given.
        text: String,
    },
    /// No pattern of interface names.
    #[error(transparent)]
    Pattern(PatternError),
    /// No names of interfaces that lead to pods.
    #[error(transparent)]
    PodInterface(PodInterfaceError),
    /// No bit that could be the proof.
    #[error(
        "{text:?} is not one bit of a connection mark, as 0x1000000; 0xe00 (ours) and 0xc000 (kube-proxy's) are taken \
         by packet marks"
    )]
    ProofBit {
        /// What is there.
        text: String,
    },
    /// An empty path.
    #[error("an empty path")]
    EmptyPath,
}
