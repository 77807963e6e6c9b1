//! What several clauses allow together, as disjoint runs of ports.

use std::collections::{BTreeMap, BTreeSet};

use npm_common::layout::Bits;

/// Whom ports allow. Equal unions allow the same, once they are [`Union::disjoint`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::backend::ebpf) struct Union<const W: usize> {
    /// On every port, and without ports.
    pub(in crate::backend::ebpf) rest: Bits<W>,
    /// On the ports between two positions, inclusive, of one protocol.
    pub(in crate::backend::ebpf) spans: BTreeMap<(u32, u32), Bits<W>>,
}

impl<const W: usize> Default for Union<W> {
    fn default() -> Self {
        Self { rest: [0; W], spans: BTreeMap::new() }
    }
}

/// Adds the bits of one row to another.
pub(in crate::backend::ebpf) fn join<const W: usize>(to: &mut Bits<W>, bits: &Bits<W>) {
    for (word, more) in to.iter_mut().zip(bits) {
        *word |= more;
    }
}

impl<const W: usize> Union<W> {
    pub(super) fn allow_everything(&mut self, who: &Bits<W>) {
        join(&mut self.rest, who);
    }

    pub(super) fn allow(&mut self, first: u32, last: u32, who: &Bits<W>) {
        join(self.spans.entry((first, last)).or_insert([0; W]), who);
    }

    /// The same with disjoint spans, each holding what the rest holds too; neighbours that allow the same are one, and
    /// those that allow no more than the rest are none.
    pub(in crate::backend::ebpf) fn disjoint(&self) -> Self {
        let mut edges = BTreeSet::new();
        for (first, last) in self.spans.keys() {
            edges.extend([*first, *last + 1]);
        }
        let ends = edges.iter().skip(1);
        let mut coming = self.spans.iter().peekable();
        let mut open: Vec<(u32, &Bits<W>)> = Vec::new();
        let mut disjoint = Self { rest: self.rest, spans: BTreeMap::new() };
        // The span that may go on: first, last, bits.
        let mut current: Option<(u32, u32, Bits<W>)> = None;
        for (begin, end) in edges.iter().zip(ends) {
            open.retain(|(last, _)| last >= begin);
            while let Some(((_, last), bits)) = coming.next_if(|((first, _), _)| first == begin) {
                open.push((*last, bits));
            }
            let mut bits = self.rest;
            open.iter().for_each(|(_, more)| join(&mut bits, more));
            match &mut current {
                // A span stays within its protocol.
                Some((_, last, same)) if *same == bits && *last + 1 == *begin && begin & 0xffff != 0 => {
                    *last = end - 1;
                }
                Some(_) | None => {
                    disjoint.keep(current.take());
                    current = Some((*begin, end - 1, bits));
                }
            }
        }
        disjoint.keep(current);
        disjoint
    }

    fn keep(&mut self, span: Option<(u32, u32, Bits<W>)>) {
        if let Some((first, last, bits)) = span
            && bits != self.rest
        {
            self.spans.insert((first, last), bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(spans: &[(u32, u32, u64)], rest: u64, expected: &[(u32, u32, u64)]) {
        let mut union = Union::<1> { rest: [rest], ..Union::default() };
        spans.iter().for_each(|(first, last, bits)| union.allow(*first, *last, &[*bits]));
        let disjoint = union.disjoint();
        let found: Vec<_> =
            disjoint.spans.iter().map(|((first, last), [bits])| (*first, *last, *bits)).collect();
        assert_eq!(found, expected, "{spans:?} and {rest:#b}");
        assert_eq!(disjoint.disjoint(), disjoint);
        // Port by port: what the spans say.
        for port in 0..=70_000 {
            let among = |spans: &[(u32, u32, u64)]| {
                let hit =
                    spans.iter().filter(|(first, last, _)| (*first..=*last).contains(&port)).map(|it| it.2);
                hit.fold(rest, |all, bits| all | bits)
            };
            assert_eq!(among(spans), among(&found), "port {port} of {spans:?}");
        }
    }

    #[test]
    fn spans_become_disjoint() {
        check(&[], 1, &[]);
        check(&[(5, 9, 1)], 0, &[(5, 9, 1)]);
        check(&[(5, 9, 1), (5, 9, 2)], 0, &[(5, 9, 3)]);
        check(&[(0, 9, 1), (5, 20, 2)], 0, &[(0, 4, 1), (5, 9, 3), (10, 20, 2)]);
        check(
            &[(0, 20, 1), (5, 6, 2), (8, 8, 4)],
            0,
            &[(0, 4, 1), (5, 6, 3), (7, 7, 1), (8, 8, 5), (9, 20, 1)],
        );
        check(&[(1, 2, 1), (3, 4, 1), (6, 7, 1)], 0, &[(1, 4, 1), (6, 7, 1)]);
        check(&[(1, 9, 1), (4, 6, 2)], 1, &[(4, 6, 3)]);
        check(&[(1, 9, 1), (2, 2, 1)], 0, &[(1, 9, 1)]);
        check(&[(65_530, 65_535, 1), (65_536, 65_540, 1)], 0, &[(65_530, 65_535, 1), (65_536, 65_540, 1)]);
    }
}
