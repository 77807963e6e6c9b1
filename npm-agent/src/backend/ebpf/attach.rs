//! The program at the egress of interfaces: attached, replaced, found again after a restart, taken away.
//!
//! A TCX link is pinned under its interface's index. A restart replaces the program in the link: no packet meets none. In
//! a clsact queueing discipline the filter has a priority and a handle of its own, by which it is replaced in place.

use std::collections::BTreeMap;
use std::io;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
    qdisc_detach_program,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use rustix::io::Errno;

use super::choice::{Choice, Hook};
use super::pins::Pins;

/// The filter's priority: before all others.
const PRIORITY: u16 = 1;
/// The filter's handle: "np", so that nobody else's is taken for ours.
const HANDLE: TcHandle = TcHandle::new(0x6e70, 1);

/// An interface of the node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name at the moment.
    pub name: String,
}

/// Why an interface has no program.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel refused the program.
    #[error("cannot attach the eBPF program to {name}")]
    Program {
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// The kernel refused the queueing discipline.
    #[error("cannot add the clsact queueing discipline to {name}")]
    Clsact {
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: TcError,
    },
    /// The link is not what it must be, or can't be pinned.
    #[error("cannot keep the link of {name}")]
    Link {
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The program's places.
#[derive(Debug)]
pub struct Attachments {
    pins: Pins,
    hook: Hook,
    /// Where this process has attached its program.
    attached: BTreeMap<u32, String>,
}

impl Attachments {
    /// None yet.
    pub fn new(pins: Pins, choice: Choice) -> Self {
        let has_links = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
        let offered = if has_links { Hook::Tcx } else { Hook::Clsact };
        Self { pins, hook: choice.hook.unwrap_or(offered), attached: BTreeMap::new() }
    }

    /// How the program is attached.
    pub fn hook(&self) -> Hook {
        self.hook
    }

    /// Attaches the program wherever it is not; gives how many places are new to this process. A place that fails does
    /// not keep the others waiting.
    ///
    /// # Errors
    /// The first failure.
    pub fn sync(&mut self, program: &mut SchedClassifier, ports: &[Port]) -> Result<usize, AttachError> {
        let (mut outcome, mut new) = (Ok(()), 0);
        self.attached.retain(|index, _| ports.iter().any(|port| port.index == *index));
        for port in ports {
            if self.attached.contains_key(&port.index) && self.is_there(program, port) {
                continue;
            }
            match self.attach(program, port) {
                Ok(()) => {
                    self.attached.insert(port.index, port.name.clone());
                    new += 1;
                }
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome.map(|()| new)
    }

    /// Whether the kernel says that the program is where we attached it.
    fn is_there(&self, program: &SchedClassifier, port: &Port) -> bool {
        match self.hook {
            Hook::Tcx => {
                let Ok(id) = program.info().map(|info| info.id()) else { return false };
                SchedClassifier::query_tcx(&port.name, TcAttachType::Egress)
                    .is_ok_and(|(_, found)| found.iter().any(|program| program.id() == id))
            }
            // The filter can't be asked for without replacing it: replacing is harmless.
            Hook::Clsact => false,
        }
    }

    fn attach(&self, program: &mut SchedClassifier, port: &Port) -> Result<(), AttachError> {
        match self.hook {
            Hook::Tcx => self.attach_tcx(program, port),
            Hook::Clsact => attach_clsact(program, port),
        }
    }

    fn attach_tcx(&self, program: &mut SchedClassifier, port: &Port) -> Result<(), AttachError> {
        let name = || port.name.clone();
        let failed = |source| AttachError::Program { name: name(), source };
        let broken = |source: LinkError| AttachError::Link { name: name(), source: Box::new(source) };
        let path = self.pins.link(port.index);
        if let Ok(pinned) = PinnedLink::from_pin(&path) {
            let link = SchedClassifierLink::try_from(FdLink::from(pinned)).map_err(broken)?;
            if let Ok(id) = program.attach_to_link(link) {
                // What keeps the link is its pin.
                drop(FdLink::try_from(program.take_link(id).map_err(failed)?).map_err(broken)?);
                return Ok(());
            }
            // The link's interface is gone, and another has its number; or somebody has detached it.
            let removed = std::fs::remove_file(&path);
            removed.map_err(|source| AttachError::Link { name: name(), source: Box::new(source) })?;
        }
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(&port.name, TcAttachType::Egress, first).map_err(failed)?;
        let link = FdLink::try_from(program.take_link(id).map_err(failed)?).map_err(broken)?;
        link.pin(&path).map_err(|source| AttachError::Link { name: name(), source: Box::new(source) })?;
        Ok(())
    }

    /// Takes away links of interfaces that are gone.
    pub fn forget_gone(&self, ports: &[Port]) {
        let Ok(links) = self.pins.links() else { return };
        for index in links.into_iter().filter(|index| ports.iter().all(|port| port.index != *index)) {
            if let Err(error) = std::fs::remove_file(self.pins.link(index)) {
                tracing::debug!(index, %error, "the link of an interface that is gone stays");
            }
        }
    }
}

fn attach_clsact(program: &mut SchedClassifier, port: &Port) -> Result<(), AttachError> {
    let name = || port.name.clone();
    let failed = |source| AttachError::Program { name: name(), source };
    match qdisc_add_clsact(&port.name) {
        Ok(()) => {}
        Err(error) if is(&error, &[Errno::EXIST]) => {}
        Err(source) => return Err(AttachError::Clsact { name: name(), source }),
    }
    let ours = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let attached =
        program.attach_with_options(&port.name, TcAttachType::Egress, TcAttachOptions::Netlink(ours));
    let id = match attached {
        Err(ProgramError::TcError(error)) if is(&error, &[Errno::EXIST]) => {
            let link =
                SchedClassifierLink::attached(&port.name, TcAttachType::Egress, PRIORITY, HANDLE, None);
            let link = link.map_err(|source| AttachError::Link { name: name(), source: Box::new(source) })?;
            program.attach_to_link(link).map_err(failed)?
        }
        attached => attached.map_err(failed)?,
    };
    // Dropping the link would detach the filter, which is to outlive the process.
    std::mem::forget(program.take_link(id).map_err(failed)?);
    Ok(())
}

/// Takes our filters away from an interface, by the names of our programs; whether there was one.
///
/// # Errors
/// One is still there.
pub fn detach_clsact(port: &Port, programs: &[&str]) -> Result<bool, AttachError> {
    let mut found = false;
    for program in programs {
        match qdisc_detach_program(&port.name, TcAttachType::Egress, program) {
            Ok(()) => found = true,
            // No such filter, no such queueing discipline, no such interface any more.
            Err(error) if is(&error, &[Errno::NOENT, Errno::INVAL, Errno::NODEV]) => {}
            Err(source) => return Err(AttachError::Clsact { name: port.name.clone(), source }),
        }
    }
    Ok(found)
}

/// The kernel's answer in an error; `None`: it was none of the kernel's.
fn answer(error: &TcError) -> Option<i32> {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error(),
        TcError::IoError(error) if error.kind() == io::ErrorKind::NotFound => {
            Some(Errno::NOENT.raw_os_error())
        }
        TcError::IoError(error) => error.raw_os_error(),
        TcError::NulError(_)
        | TcError::AlreadyAttached
        | TcError::InvalidTcxAttach(_)
        | TcError::InvalidLinkOperation => None,
    }
}

fn is(error: &TcError, answers: &[Errno]) -> bool {
    answer(error).is_some_and(|found| answers.iter().any(|answer| answer.raw_os_error() == found))
}
