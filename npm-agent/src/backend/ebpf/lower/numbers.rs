//! Numbers that stay: a peer set keeps its bit and a pod its number from one goal to the next.
//!
//! They are found in the maps and nowhere else, so a process that has just started has them like one that has written
//! the maps. Nothing is wrong without them: packets see one whole state or another, each with its own numbers. They save
//! writes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::peers::Bit;

/// What has a number already.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// By [`Bit::fingerprint`].
    pub bits: BTreeMap<u128, usize>,
    /// The numbers of pods, by their addresses.
    pub pods: BTreeMap<IpAddr, u32>,
}

impl Numbers {
    /// A number from 1 and below `end` for each bit. There must be as many.
    pub(super) fn number_bits(&self, bits: BTreeSet<Bit>, end: usize) -> BTreeMap<Bit, usize> {
        let kept = |bit: &Bit| {
            // Without numbers to keep, no name is made.
            let number = (!self.bits.is_empty()).then(|| self.bits.get(&bit.fingerprint()))?;
            number.copied().filter(|number| (1..end).contains(number))
        };
        distinct(bits, kept, 1)
    }

    /// A number from 1 for each pod, which is known by its addresses.
    pub(super) fn number_pods<'a>(
        &self,
        pods: impl IntoIterator<Item = &'a BTreeSet<IpAddr>>,
    ) -> BTreeMap<&'a BTreeSet<IpAddr>, u32> {
        let kept = |pod: &&BTreeSet<IpAddr>| pod.iter().find_map(|address| self.pods.get(address)).copied();
        distinct(pods, kept, 1)
    }
}

/// A number for each, from the first on: its own while nobody before has it, else the lowest that is nobody's.
fn distinct<T: Ord, N: Copy + Ord + std::ops::Add<Output = N> + From<u8>>(
    of: impl IntoIterator<Item = T>,
    kept: impl Fn(&T) -> Option<N>,
    first: N,
) -> BTreeMap<T, N> {
    let mut taken = BTreeSet::new();
    let mut numbers = BTreeMap::new();
    let mut without = Vec::new();
    for it in of {
        match kept(&it).filter(|number| taken.insert(*number)) {
            Some(number) => drop(numbers.insert(it, number)),
            None => without.push(it),
        }
    }
    let mut next = first;
    for it in without {
        while !taken.insert(next) {
            next = next + N::from(1);
        }
        numbers.insert(it, next);
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_kept_and_gaps_filled() {
        let kept = BTreeMap::from([("a", 3_u32), ("b", 3), ("c", 1)]);
        let numbers = distinct(["a", "b", "c", "d"], |name| kept.get(name).copied(), 1);
        assert_eq!(numbers, [("a", 3), ("b", 2), ("c", 1), ("d", 4)].into());
        assert_eq!(distinct(["a", "b"], |_| None::<u32>, 1), [("a", 1), ("b", 2)].into());
    }
}
