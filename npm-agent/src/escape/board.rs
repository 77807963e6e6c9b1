//! Where reasons are put and read: each origin replaces its own, and what changes is logged.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imbl::OrdSet;
use rustix::event::{EventfdFlags, eventfd};
use tracing::{error, info, warn};

use super::{Effect, Engine, Escape};
use crate::interfaces::pods::PodInterfaces;

/// Who has found reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The look at the node that every backend needs.
    Node,
    /// The backend, of itself: interfaces and programs.
    Backend,
}

/// The reasons of the node. Clones are the same board.
#[derive(Clone, Debug)]
pub struct Board {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    engine: Engine,
    /// Behind which interfaces pods are held until they are programmed; `None`: nowhere.
    held: Option<PodInterfaces>,
    state: Mutex<State>,
    /// Written to when there is something new to look at.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    found: BTreeMap<Origin, BTreeSet<Escape>>,
    protected: BTreeSet<IpAddr>,
    locals: OrdSet<IpAddr>,
}

impl Board {
    /// An empty board; `held` says behind which interfaces pods are held until they are programmed, if they are.
    ///
    /// # Errors
    /// The system has no file descriptors left.
    pub fn new(engine: Engine, held: Option<PodInterfaces>) -> std::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { inner: Arc::new(Inner { engine, held, state: Mutex::default(), wake }) })
    }

    /// What judges on this node.
    pub fn engine(&self) -> Engine {
        self.inner.engine
    }

    /// Puts what `origin` has found in place of what it had found before, and logs what is new and what is gone.
    pub fn replace(&self, origin: Origin, found: BTreeSet<Escape>) {
        let before = self.lock().found.insert(origin, found.clone()).unwrap_or_default();
        for escape in found.difference(&before) {
            let (name, what, remedy) = (escape.name(), escape.to_string(), escape.remedy());
            match escape.effect(self.inner.engine) {
                Effect::Unjudged => error!(name, what, remedy, "traffic escapes judgement"),
                Effect::Unknown => warn!(name, what, remedy, "traffic may escape judgement"),
                Effect::Stricter => warn!(name, what, remedy, "what policies allow may be dropped"),
                Effect::None => info!(name, what, "concerns no traffic that policies are about"),
            }
        }
        for escape in before.difference(&found) {
            info!(name = escape.name(), what = %escape, "is not so any more");
        }
    }

    /// Everything that is known, the worst first.
    pub fn current(&self) -> Vec<(Effect, Escape)> {
        let state = self.lock();
        let all: BTreeSet<&Escape> = state.found.values().flatten().collect();
        let mut all: Vec<(Effect, Escape)> =
            all.into_iter().map(|escape| (escape.effect(self.inner.engine), escape.clone())).collect();
        all.sort_by_key(|(effect, _)| std::cmp::Reverse(*effect));
        all
    }

    /// Says which addresses of this node policies select: where they are makes some reasons what they are.
    pub fn protect(&self, addresses: BTreeSet<IpAddr>) {
        let mut state = self.lock();
        if state.protected == addresses {
            return;
        }
        state.protected = addresses;
        drop(state);
        if let Err(error) = rustix::io::write(&self.inner.wake, &1_u64.to_ne_bytes()) {
            // The look that is due anyway sees them.
            warn!(%error, "cannot wake who looks at the node");
        }
    }

    /// Says which addresses pods of this node hold: whether any of them is behind an interface that is held is looked at
    /// when that is due.
    pub fn locals(&self, addresses: OrdSet<IpAddr>) {
        self.lock().locals = addresses;
    }

    /// Where pods are held, and which addresses [`Board::locals`] named last.
    pub(super) fn held(&self) -> Option<(&PodInterfaces, OrdSet<IpAddr>)> {
        Some((self.inner.held.as_ref()?, self.lock().locals.clone()))
    }

    /// What [`Board::protect`] said last.
    pub(super) fn protected(&self) -> BTreeSet<IpAddr> {
        self.lock().protected.clone()
    }

    /// Readable when there is something new to look at, until [`Board::woken`].
    pub(super) fn wake(&self) -> std::os::fd::BorrowedFd<'_> {
        self.inner.wake.as_fd()
    }

    pub(super) fn woken(&self) {
        // Nothing to read is as good.
        let _ = rustix::io::read(&self.inner.wake, &mut [0_u8; 8]);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock, and a panic elsewhere ends the process.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
