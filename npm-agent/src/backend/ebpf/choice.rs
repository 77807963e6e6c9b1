//! Which of the object's programs serves on this kernel, and how it is attached: independent choices, made at start.

use std::fmt;
use std::str::FromStr;

/// How a program reads the kernel's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reading {
    /// By the helper bpf_probe_read_kernel.
    Probe,
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// By a link of the kernel's (6.6 and later).
    Tcx,
    /// As a filter of the clsact queueing discipline.
    Clsact,
}

/// What is chosen; `None`: what the kernel offers, the better first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    /// How connections are read.
    pub reading: Option<Reading>,
    /// How the program is attached.
    pub hook: Option<Hook>,
}

/// A word that names no choice.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is no way to load the eBPF program; known are: probe, tcx, clsact")]
pub struct UnknownChoice {
    /// The word.
    pub word: String,
}

impl FromStr for Choice {
    type Err = UnknownChoice;

    /// Reads words with commas between them: `probe,clsact`.
    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        let mut choice = Self::default();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "probe" => choice.reading = Some(Reading::Probe),
                "tcx" => choice.hook = Some(Hook::Tcx),
                "clsact" => choice.hook = Some(Hook::Clsact),
                _ => return Err(UnknownChoice { word: word.to_owned() }),
            }
        }
        Ok(choice)
    }
}

impl fmt::Display for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Probe => "probe",
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
        let both = Choice { reading: Some(Reading::Probe), hook: Some(Hook::Clsact) };
        assert_eq!("probe, clsact".parse(), Ok(both));
        assert_eq!("xdp".parse::<Choice>(), Err(UnknownChoice { word: "xdp".into() }));
    }
}
