//! A set that mostly has one element or a handful: it takes what they take.

use std::collections::BTreeSet;

/// The most elements that are kept in a row.
const MOST_IN_A_ROW: usize = 8;

/// A sorted set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Few<T> {
    /// At most [`MOST_IN_A_ROW`], sorted.
    Row(Vec<T>),
    /// More, or as many as had been.
    Tree(BTreeSet<T>),
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self::Row(Vec::new())
    }
}

impl<T: Ord> Few<T> {
    /// One element.
    pub(crate) fn of(value: T) -> Self {
        Self::Row(vec![value])
    }

    pub(crate) fn insert(&mut self, value: T) {
        match self {
            Self::Row(row) => match row.binary_search(&value) {
                Ok(_) => {}
                Err(_) if row.len() == MOST_IN_A_ROW => {
                    let mut tree: BTreeSet<T> = row.drain(..).collect();
                    tree.insert(value);
                    *self = Self::Tree(tree);
                }
                Err(place) => {
                    row.reserve_exact(1);
                    row.insert(place, value);
                }
            },
            Self::Tree(tree) => drop(tree.insert(value)),
        }
    }

    pub(crate) fn remove(&mut self, value: &T) {
        match self {
            Self::Row(row) => {
                if let Ok(place) = row.binary_search(value) {
                    row.remove(place);
                }
            }
            Self::Tree(tree) => drop(tree.remove(value)),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Row(row) => row.len(),
            Self::Tree(tree) => tree.len(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn last(&self) -> Option<&T> {
        match self {
            Self::Row(row) => row.last(),
            Self::Tree(tree) => tree.last(),
        }
    }

    /// The elements in order.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        let (row, tree) = match self {
            Self::Row(row) => (Some(row), None),
            Self::Tree(tree) => (None, Some(tree)),
        };
        row.into_iter().flatten().chain(tree.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_set_at_every_size() {
        let (mut few, mut model) = (Few::default(), BTreeSet::new());
        for step in 0..400_u32 {
            let value = step * 7 % 23;
            if step % 40 < 25 {
                few.insert(value);
                model.insert(value);
            } else {
                few.remove(&value);
                model.remove(&value);
            }
            assert!(few.iter().eq(&model) && few.iter().rev().eq(model.iter().rev()), "step {step}");
            assert_eq!((few.len(), few.last()), (model.len(), model.last()));
        }
    }
}
