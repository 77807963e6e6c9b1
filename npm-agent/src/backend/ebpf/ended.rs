//! Proofs of connections that have ended.
//!
//! A proof in a map does not end with its connection, and the kernel likes to give the next connection the memory of the last:
//! one with the same tuple at the same address would have its proof (and a proof listed by user space is of no address at
//! all). Its first packet is judged all the same; but what comes back before that has happened, or after that packet was lost
//! on its way to the program, would pass, whatever policy says by now. So a thread compares the map with the kernel's
//! table: soon after policies have changed, and now and then.
//!
//! A proof that goes too early does harm as well: a connection that policy has come to deny is cut then. So it takes two
//! witnesses, the list of all connections and the question for this one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::connections::{Connections, Words, key, tuple, words};
use super::kernel::KernelError;
use super::pins::Pins;
use crate::conntrack::{Conntrack, ConntrackError, MarkFilter};

/// The pause between two looks, if policies change.
const SOON: Duration = Duration::from_secs(1);
/// The same if they don't.
const IN_ANY_CASE: Duration = Duration::from_secs(10);

/// A pause is at least so many times as long as the look before it: a large table takes no more than this part of one CPU.
const SHARE: u32 = 20;

/// How long it takes to see that policies have changed, or that there is to be an end.
const TICK: Duration = Duration::from_millis(100);

/// With so many more connections than proofs, each is asked for by its name before the kernel has to list all of them.
const MANY_MORE: usize = 4;

/// The thread. Dropping it asks it to end.
#[derive(Debug)]
pub(super) struct Ended {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// Whether policies have changed since the last look.
    changed: AtomicBool,
}

impl Ended {
    /// Starts it, for the calling thread's network namespace. Its first look is at once.
    ///
    /// # Errors
    /// The map is missing, or there can be no thread.
    pub(super) fn start(pins: &Pins) -> Result<Self, KernelError> {
        let mut proofs = Connections::pinned(pins, "PROOFS")?;
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), changed: AtomicBool::new(true) });
        let told = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("ended".into()).spawn(move || {
            let (mut next, mut has_failed) = (Next::default(), false);
            while !told.stop.load(Ordering::Relaxed) {
                if next.is_due(&told.changed) {
                    let started = Instant::now();
                    let outcome = look(&mut proofs, &told.stop);
                    match &outcome {
                        Ok(0) => {}
                        Ok(ended) => tracing::debug!(ended, "proofs of connections that have ended are gone"),
                        Err(error) if !has_failed => {
                            tracing::warn!(%error, "proofs of connections that have ended stay for now");
                        }
                        Err(error) => tracing::debug!(%error, "proofs of connections that have ended stay"),
                    }
                    has_failed = outcome.is_err();
                    next = Next::after(started.elapsed());
                }
                std::thread::sleep(TICK);
            }
        });
        // The thread ends by itself.
        drop(thread.map_err(KernelError::Thread)?);
        Ok(Self { shared })
    }

    /// Has proofs looked at soon: what they were given for may be denied by now.
    pub(super) fn policies_changed(&self) {
        self.shared.changed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// When to look next.
struct Next {
    last: Instant,
    pause: Duration,
}

impl Default for Next {
    fn default() -> Self {
        Self { last: Instant::now(), pause: Duration::ZERO }
    }
}

impl Next {
    /// After a look that took so long.
    fn after(took: Duration) -> Self {
        Self { last: Instant::now(), pause: SOON.max(took.saturating_mul(SHARE)) }
    }

    /// Whether to look now. Changes from here on ask for another look.
    fn is_due(&self, changed: &AtomicBool) -> bool {
        let waited = self.last.elapsed();
        waited >= self.pause && (changed.swap(false, Ordering::Relaxed) || waited >= IN_ANY_CASE)
    }
}

/// Takes the proofs out of which the kernel has no connection any more; gives how many that were.
fn look(proofs: &mut Connections, stop: &AtomicBool) -> Result<usize, KernelError> {
    // Before connections are listed: what is proven from here on is none of this.
    let mut suspects = proofs.elements()?;
    if suspects.is_empty() {
        return Ok(0);
    }
    // A socket of this look alone: answers to one that failed would be taken for those of the next.
    let mut table = Conntrack::open()?;
    let few = suspects.len().saturating_mul(MANY_MORE) < table.count()? as usize;
    if few {
        suspects = unknown(&mut table, suspects, stop)?;
    }
    if !suspects.is_empty() {
        // In whatever zone they are: the map does not tell, and who asks for one has to say it.
        table.entries_where(MarkFilter::ANY, |entry| {
            suspects.remove(&words(&key(&entry.original)));
            false
        })?;
    }
    if !few {
        suspects = unknown(&mut table, suspects, stop)?;
    }
    let mut ended = 0;
    for (connection, value) in suspects {
        // One that began since then, at another address, stays. At the same address it is judged again, as a connection whose
        // proof was displaced.
        if proofs.get(&connection) == Some(value) {
            ended += usize::from(proofs.remove(&connection)?);
        }
    }
    Ok(ended)
}

/// Those of which the kernel, asked for each, knows no connection in the zone of all who name none.
fn unknown<S: FromIterator<(Words, u64)>>(
    table: &mut Conntrack,
    suspects: impl IntoIterator<Item = (Words, u64)>,
    stop: &AtomicBool,
) -> Result<S, ConntrackError> {
    let is_unknown = |(connection, value): (Words, u64)| {
        // What we can't name we can't ask for; its proof stays.
        let named = tuple(&connection).filter(|named| words(&key(named)) == connection)?;
        if stop.load(Ordering::Relaxed) {
            return None;
        }
        match table.has(&named, |found| words(&key(found)) == connection) {
            Ok(true) => None,
            Ok(false) => Some(Ok((connection, value))),
            Err(error) => Some(Err(error)),
        }
    };
    suspects.into_iter().filter_map(is_unknown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_due_after_a_change_or_after_a_while() {
        let ago = |time: Duration| Instant::now().checked_sub(time).unwrap();
        let due = |last, pause, changed| {
            let changed = AtomicBool::new(changed);
            (Next { last, pause }.is_due(&changed), changed.into_inner())
        };
        assert!(Next::default().is_due(&AtomicBool::new(true)), "at once");
        assert_eq!(due(ago(Duration::from_millis(500)), SOON, true), (false, true), "not so soon, but later");
        assert_eq!(due(ago(SOON), SOON, true), (true, false));
        assert_eq!(due(ago(SOON), SOON, false), (false, false), "nothing has changed");
        assert_eq!(due(ago(IN_ANY_CASE), SOON, false), (true, false));
        let long = Next::after(Duration::from_secs(3)).pause;
        assert_eq!(due(ago(IN_ANY_CASE), long, true), (false, true), "a large table");
        assert_eq!(due(ago(Duration::from_secs(60)), long, true), (true, false));
    }
}
