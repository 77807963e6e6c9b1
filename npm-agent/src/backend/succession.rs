//! One backend in the place of another on the same node: what the other left enforces until this one does, and goes then.
//!
//! Both judge by the kernel's own connections, so nothing that is open is cut. While both enforce, a packet passes if both
//! let it: the other's state is of the past, so what it denies and the goal allows has to wait for that moment.

use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;

use super::meter::Meter;
use super::{Applied, Backend, BackendError, Removed, Write};

/// Removes what another backend left, and nothing of the one that follows it; gives how many objects those were.
pub type Release = Box<dyn FnMut() -> Result<usize, BackendError> + Send>;

/// A backend that lets go of another's state once its own is in force.
pub struct Succession {
    backend: Box<dyn Backend>,
    /// `None` when it is done.
    release: Option<Release>,
}

impl Succession {
    /// `backend`, after what `release` removes.
    pub fn new(backend: Box<dyn Backend>, release: Release) -> Self {
        Self { backend, release: Some(release) }
    }

    fn release(&mut self) -> Result<(), BackendError> {
        if let Some(release) = &mut self.release {
            let removed = release()?;
            if removed > 0 {
                tracing::info!(removed, backend = self.backend.name(), "another backend's state is released");
            }
            self.release = None;
        }
        Ok(())
    }
}

impl Backend for Succession {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn inherits(&self) -> bool {
        self.backend.inherits()
    }

    /// As the backend's. The other's state goes after the first success: an error of that leaves both in force, and the
    /// next apply tries again.
    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError> {
        let applied = self.backend.apply(goal)?;
        self.release()?;
        Ok(applied)
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        self.backend.verify()
    }

    fn writes(&mut self) -> Vec<Write> {
        self.backend.writes()
    }

    fn meter(&self) -> Option<Meter> {
        self.backend.meter()
    }

    fn decide(&mut self, flow: &Flow) -> Result<Decision, BackendError> {
        self.backend.decide(flow)
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        self.backend.remove()
    }
}
