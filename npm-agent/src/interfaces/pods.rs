//! Which interfaces lead to pods: by their names, because only a name is known before an interface is there.

use std::fmt;
use std::str::FromStr;

/// The kernel's IFNAMSIZ, less the zero byte.
const MAX_NAME: usize = 15;

/// How the container networks of docs/configuration.md, "Interfaces", name what leads to pods.
const DEFAULT: [&str; 5] = ["azv*", "cali*", "veth*", "cbr0", "cni0"];

/// A name, or how names begin.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodInterface {
    /// This one.
    Named(String),
    /// All that begin so.
    Beginning(String),
}

impl PodInterface {
    /// Whether an interface of this name is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Named(own) => own == name,
            Self::Beginning(start) => name.starts_with(start),
        }
    }

    /// As iptables' options `-i` and `-o` take it.
    pub fn for_iptables(&self) -> String {
        match self {
            Self::Named(name) => name.clone(),
            Self::Beginning(start) => format!("{start}+"),
        }
    }
}

impl fmt::Display for PodInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Beginning(start) => write!(f, "{start}*"),
        }
    }
}

/// The interfaces that lead to pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInterfaces(Vec<PodInterface>);

impl PodInterfaces {
    /// Each of them, in the order in which they were named.
    pub fn iter(&self) -> impl Iterator<Item = &PodInterface> {
        self.0.iter()
    }

    /// Whether an interface of this name leads to pods.
    pub fn matches(&self, name: &str) -> bool {
        self.iter().any(|interface| interface.matches(name))
    }
}

impl Default for PodInterfaces {
    fn default() -> Self {
        DEFAULT.join(",").parse().expect("a unit test reads the defaults")
    }
}

impl fmt::Display for PodInterfaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, interface) in self.iter().enumerate() {
            write!(f, "{}{interface}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// Why a text names no interfaces of pods.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} does not say which interfaces lead to pods: {reason}")]
pub struct PodInterfaceError {
    /// What is there.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// Names with commas between them; a `*` at the end of one stands for whatever follows. At least one; `*` alone would be
/// the node's uplinks as well, and is refused.
impl FromStr for PodInterfaces {
    type Err = PodInterfaceError;

    fn from_str(text: &str) -> Result<Self, PodInterfaceError> {
        let interfaces = text.split(',').map(|part| {
            let part = part.trim();
            let bad = |reason| PodInterfaceError { text: part.to_owned(), reason };
            let (name, interface): (_, fn(String) -> PodInterface) = match part.strip_suffix('*') {
                Some(start) => (start, PodInterface::Beginning),
                None => (part, PodInterface::Named),
            };
            if name.is_empty() {
                return Err(bad("a name, or the beginning of one, is needed"));
            }
            if name.len() > MAX_NAME {
                return Err(bad("interfaces' names have 15 characters at most"));
            }
            // A `+` means something to iptables, quotes and blanks to those who read its rules.
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
            if !name.bytes().all(plain) {
                return Err(bad(
                    "letters, digits, '-', '_', '.', '@', and one '*' at the end are understood",
                ));
            }
            Ok(interface(name.to_owned()))
        });
        Ok(Self(interfaces.collect::<Result<_, _>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_networks_of_the_documentation() {
        let interfaces = PodInterfaces::default();
        assert_eq!(interfaces.to_string(), "azv*,cali*,veth*,cbr0,cni0");
        for name in ["azv1b2c3d4e5f6", "cali0123456789a", "veth12ab34cd", "cbr0", "cni0"] {
            assert!(interfaces.matches(name), "{name}");
        }
        for name in
            ["eth0", "enP5s1", "docker0", "cni01", "flannel.1", "tunl0", "vxlan.calico", "lo", "bond0"]
        {
            assert!(!interfaces.matches(name), "{name}");
        }
    }

    #[test]
    fn what_iptables_is_given() {
        let interfaces: PodInterfaces = "gke*, br-pods".parse().unwrap();
        let words: Vec<String> = interfaces.iter().map(PodInterface::for_iptables).collect();
        assert_eq!(words, ["gke+", "br-pods"]);
    }

    #[test]
    fn what_would_be_more_or_other_than_meant_is_refused() {
        for bad in ["", "*", "azv*,", "azv*x", "az?v*", "a b", "azv+", "x/y", "\"", "sixteen-letters0"] {
            assert!(bad.parse::<PodInterfaces>().is_err(), "{bad}");
        }
    }
}
