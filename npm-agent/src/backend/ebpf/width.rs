//! How wide rows are: two objects, because a program's rows are as wide as it was built for.

use npm_common::layout::{NARROW_WORDS, WIDE_WORDS};
use npm_policy::goal::Goal;

use super::lower::{LowerError, most_bits, needed_bits};

/// The committed objects: `cargo xtask ebpf` makes them.
static NARROW: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../npm-ebpf/npm-ebpf.o"));
static WIDE: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../npm-ebpf/npm-ebpf-wide.o"));

/// Which object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Width {
    /// 1,023 peer sets.
    #[default]
    Narrow,
    /// 10,239 peer sets; a new flow costs more, and so does memory.
    Wide,
}

impl Width {
    /// Both, the lesser first.
    pub const BOTH: [Self; 2] = [Self::Narrow, Self::Wide];

    /// The committed object.
    pub fn object(self) -> &'static [u8] {
        match self {
            Self::Narrow => NARROW,
            Self::Wide => WIDE,
        }
    }

    /// What its directory of pins is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Narrow => "narrow",
            Self::Wide => "wide",
        }
    }

    /// Words of a row.
    pub const fn words(self) -> usize {
        match self {
            Self::Narrow => NARROW_WORDS,
            Self::Wide => WIDE_WORDS,
        }
    }

    /// Whether a goal fits into this width, by counting what its peer sets can be at most: exactness would cost a look at
    /// every name. `false` may be wrong, `true` is not.
    pub fn surely_holds(self, goal: &Goal) -> bool {
        most_bits(goal) <= 64 * self.words()
    }

    /// The least width that a goal fits into.
    ///
    /// # Errors
    /// It names more peer sets than the wide object has bits for.
    pub fn needed(goal: &Goal) -> Result<Self, LowerError> {
        let needed = needed_bits(goal);
        let fits = |width: &Self| needed <= 64 * width.words();
        let available = 64 * WIDE_WORDS;
        Self::BOTH.into_iter().find(fits).ok_or(LowerError::Peers { needed, available })
    }
}
