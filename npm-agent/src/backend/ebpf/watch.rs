//! A thread that gives every interface the program as soon as the kernel tells of it: mostly while the interface is still
//! down, before any packet can pass.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::attach::Attachments;
use super::kernel::KernelError;
use crate::interfaces::follow::{Change, FollowError, Follower};
use crate::interfaces::{Index, Interface};

/// How long the thread waits for news before it looks whether it is to end.
const PATIENCE: Duration = Duration::from_millis(500);

/// The pause before the kernel is asked anew after it gave no answer.
const PAUSE: Duration = Duration::from_secs(1);

/// The thread. Dropping it asks it to end.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
}

impl Watch {
    /// Starts it, for the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel does not tell of interfaces, or there can be no thread.
    pub(super) fn start(attachments: Attachments) -> Result<Self, KernelError> {
        let mut follower = Follower::open()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("interfaces".into()).spawn(move || {
            // Those that have come since the last look.
            take(&attachments, follower.known().values());
            while !stopped.load(Ordering::Relaxed) {
                if let Err(error) = follow(&mut follower, &attachments) {
                    tracing::error!(%error, "new interfaces are not seen");
                    std::thread::sleep(PAUSE);
                    match Follower::open() {
                        Ok(fresh) => {
                            follower = fresh;
                            take(&attachments, follower.known().values());
                        }
                        Err(error) => tracing::debug!(%error, "the kernel does not tell of interfaces"),
                    }
                }
            }
        });
        // The thread ends by itself.
        drop(thread.map_err(KernelError::Thread)?);
        Ok(Self { stop })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// All interfaces of the calling thread's network namespace.
///
/// # Errors
/// The kernel does not list them.
pub(super) fn interfaces() -> Result<BTreeMap<Index, Interface>, KernelError> {
    Ok(Follower::open()?.known().clone())
}

fn follow(follower: &mut Follower, attachments: &Attachments) -> Result<(), FollowError> {
    for change in follower.wait(PATIENCE)? {
        match change {
            Change::Appeared(interface) | Change::Altered { now: interface, .. } => {
                take(attachments, [&interface]);
            }
            Change::Gone(interface) => attachments.forget(interface.index),
        }
    }
    Ok(())
}

fn take<'a>(attachments: &Attachments, interfaces: impl IntoIterator<Item = &'a Interface>) {
    for interface in interfaces {
        match attachments.sync([interface]) {
            Ok(0) => {}
            Ok(_) => tracing::info!(interface = interface.name, "packets that leave by it are judged"),
            // Ends of pairs come and go at once. Whatever stays without the program is found at the next read-back.
            Err(error) => tracing::warn!(interface = interface.name, %error, "it has no program yet"),
        }
    }
}
