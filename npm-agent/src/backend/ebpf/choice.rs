//! Which of the object's programs serves on this kernel, and how it is attached: independent choices, made at start.

use std::fmt;
use std::str::FromStr;

/// How a program reads the kernel's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reading {
    /// By the kernel's functions that cast: faster, and for kernels from 6.2 on that have connection tracking built in.
    Cast,
    /// By the helper bpf_probe_read_kernel.
    Probe,
}

/// Where proofs are, and how the entries of denied connections go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proofs {
    /// In the connections' marks, by the kernel's functions for connections, which end entries too: from 6.1 on, with
    /// connection tracking built in.
    Kfuncs,
    /// In a map; user space deletes entries over ctnetlink.
    Maps,
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// By a link of the kernel's (6.6 and later).
    Tcx,
    /// As a filter of the clsact queueing discipline.
    Clsact,
}

/// What becomes known of dropped packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drops {
    /// How many there are.
    #[default]
    Counted,
    /// Which they are, as well.
    Told,
}

/// What is chosen; `None`: what the kernel offers, the better first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    /// How connections are read.
    pub reading: Option<Reading>,
    /// Where proofs are.
    pub proofs: Option<Proofs>,
    /// How the program is attached.
    pub hook: Option<Hook>,
    /// What becomes known of dropped packets.
    pub drops: Drops,
}

/// A word that names no choice.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{word:?} is no way to load the eBPF program; known are: cast, probe, kfuncs, maps, tcx, clsact, tell"
)]
pub struct UnknownChoice {
    /// The word.
    pub word: String,
}

impl Choice {
    /// All that there are, with nothing left to the kernel.
    pub fn every() -> impl Iterator<Item = Self> {
        let readings = [Reading::Cast, Reading::Probe];
        let pairs = readings
            .into_iter()
            .flat_map(|reading| [Proofs::Kfuncs, Proofs::Maps].map(|proofs| (reading, proofs)));
        pairs.flat_map(|(reading, proofs)| {
            [Hook::Tcx, Hook::Clsact].map(|hook| Self {
                reading: Some(reading),
                proofs: Some(proofs),
                hook: Some(hook),
                drops: Drops::Counted,
            })
        })
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reading, proofs, hook, drops } = self;
        let drops = match drops {
            Drops::Counted => None,
            Drops::Told => Some("tell".to_owned()),
        };
        let words = [
            reading.map(|reading| reading.to_string()),
            proofs.map(|proofs| proofs.to_string()),
            hook.map(|hook| hook.to_string()),
            drops,
        ];
        f.write_str(&words.into_iter().flatten().collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Choice {
    type Err = UnknownChoice;

    /// Reads words with commas between them: `probe,maps,clsact`.
    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        let mut choice = Self::default();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "cast" => choice.reading = Some(Reading::Cast),
                "probe" => choice.reading = Some(Reading::Probe),
                "kfuncs" => choice.proofs = Some(Proofs::Kfuncs),
                "maps" => choice.proofs = Some(Proofs::Maps),
                "tcx" => choice.hook = Some(Hook::Tcx),
                "clsact" => choice.hook = Some(Hook::Clsact),
                "tell" => choice.drops = Drops::Told,
                _ => return Err(UnknownChoice { word: word.to_owned() }),
            }
        }
        Ok(choice)
    }
}

impl fmt::Display for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cast => "cast",
            Self::Probe => "probe",
        })
    }
}

impl fmt::Display for Proofs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kfuncs => "kfuncs",
            Self::Maps => "maps",
        })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_choose() {
        assert_eq!("".parse(), Ok(Choice::default()));
        let all = Choice {
            reading: Some(Reading::Probe),
            proofs: Some(Proofs::Maps),
            hook: Some(Hook::Clsact),
            drops: Drops::Told,
        };
        assert_eq!("probe, maps,clsact,tell".parse(), Ok(all));
        assert_eq!("kfuncs".parse(), Ok(Choice { proofs: Some(Proofs::Kfuncs), ..Choice::default() }));
        for choice in Choice::every() {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert_eq!(Choice::every().collect::<std::collections::BTreeSet<_>>().len(), 8);
        assert_eq!("xdp".parse::<Choice>(), Err(UnknownChoice { word: "xdp".into() }));
    }
}
