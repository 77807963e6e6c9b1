//! A value that many hold: a copy is a pointer, and to change a copy is to get one of one's own.
//!
//! A cluster repeats few sets of labels, ports and selectors many times. Whoever makes objects may let equal ones share one
//! ([`Pool`]); nobody can tell the difference but by memory and time.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// A value that many hold. It prints, compares and hashes as the value does.
#[derive(PartialEq, Eq, Hash, Default)]
pub struct Shared<T>(Arc<T>);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: Ord> Ord for Shared<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        if Arc::ptr_eq(&self.0, &other.0) { Ordering::Equal } else { self.0.cmp(&other.0) }
    }
}

impl<T: Ord> PartialOrd for Shared<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Clone> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut T {
        Arc::make_mut(&mut self.0)
    }
}

impl<T: Default> Shared<T> {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<T: Ord> From<BTreeSet<T>> for Shared<BTreeSet<T>> {
    fn from(set: BTreeSet<T>) -> Self {
        Self(Arc::new(set))
    }
}

impl<T: Ord, const N: usize> From<[T; N]> for Shared<BTreeSet<T>> {
    fn from(items: [T; N]) -> Self {
        items.into_iter().collect()
    }
}

impl<K: Ord, V, const N: usize> From<[(K, V); N]> for Shared<BTreeMap<K, V>> {
    fn from(items: [(K, V); N]) -> Self {
        items.into_iter().collect()
    }
}

impl<I, T: FromIterator<I>> FromIterator<I> for Shared<T> {
    fn from_iter<It: IntoIterator<Item = I>>(items: It) -> Self {
        Self(Arc::new(items.into_iter().collect()))
    }
}

impl<'a, T> IntoIterator for &'a Shared<T>
where
    &'a T: IntoIterator,
{
    type Item = <&'a T as IntoIterator>::Item;
    type IntoIter = <&'a T as IntoIterator>::IntoIter;

    fn into_iter(self) -> Self::IntoIter {
        (&*self.0).into_iter()
    }
}

/// What a [`Pool`] can hold: something of which it can be told whether anybody else has it.
pub trait Held: Clone + Ord {
    /// Whether nobody has it but who asks.
    fn is_alone(&self) -> bool;
}

impl<T: Ord> Held for Shared<T> {
    fn is_alone(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl Held for Arc<str> {
    fn is_alone(&self) -> bool {
        Arc::strong_count(self) == 1
    }
}

/// Fewer than this are not looked through for what nobody has any more.
const LEAST_SWEPT: usize = 256;

/// Values of which equal ones are to be one.
#[derive(Clone, Debug)]
pub struct Pool<T> {
    values: BTreeSet<T>,
    /// How many there may be before those that nobody has any more are dropped.
    room: usize,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { values: BTreeSet::new(), room: LEAST_SWEPT }
    }
}

impl<T: Held> Pool<T> {
    /// The value that is equal to this one, from now on.
    pub fn shared(&mut self, value: T) -> T {
        match self.values.get(&value) {
            Some(same) => same.clone(),
            None => self.added(value),
        }
    }

    /// The value that is equal to this one, if there is one.
    pub fn get(&self, value: &T) -> Option<&T> {
        self.values.get(value)
    }

    fn added(&mut self, value: T) -> T {
        if self.values.len() >= self.room {
            self.values.retain(|value| !value.is_alone());
            // So that looking through them stays a small part of adding them.
            self.room = (2 * self.values.len()).max(LEAST_SWEPT);
        }
        self.values.insert(value.clone());
        value
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Labels = Shared<BTreeMap<&'static str, u32>>;

    #[test]
    fn a_change_is_nobody_elses() {
        let one = Labels::from([("a", 1)]);
        let mut other = one.clone();
        other.insert("b", 2);
        assert_eq!((one.len(), other.len()), (1, 2));
        assert!(one < other && one != other);
    }

    #[test]
    fn equal_values_are_one_for_as_long_as_somebody_has_them() {
        let mut pool = Pool::default();
        let one = pool.shared(Labels::from([("a", 1)]));
        let same = pool.shared(Labels::from([("a", 1)]));
        assert!(std::ptr::eq(&*one, &*same));
        for number in 0..10 * LEAST_SWEPT as u32 {
            pool.shared(Labels::from([("a", number + 2)]));
        }
        assert!(pool.len() <= LEAST_SWEPT, "{} are kept", pool.len());
        assert!(std::ptr::eq(&*one, &*pool.shared(Labels::from([("a", 1)]))), "somebody has it");
        let mut texts = Pool::<Arc<str>>::default();
        assert!(Arc::ptr_eq(&texts.shared("x".into()), &texts.shared("x".into())));
    }
}
