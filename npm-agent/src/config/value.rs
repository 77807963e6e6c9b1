//! The values that settings take: each is read from text, the same on the command line, in the environment and in
//! the config file.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tracing::Level;

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
    }
    refused {
        "ebpf" => "the eBPF backend is not in this version of npm-agent; use iptables",
    }
}

choice! {
    /// Where the cluster's objects come from.
    SourceKind {
        /// A directory of manifests.
        Manifests = "manifests",
    }
    refused {
        "kube" => "the Kubernetes API source is not in this version of npm-agent; use manifests",
    }
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
    /// No pattern of interface names.
    #[error(transparent)]
    Pattern(PatternError),
    /// An empty path.
    #[error("an empty path")]
    EmptyPath,
}
