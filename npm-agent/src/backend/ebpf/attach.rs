//! The program at the egress of interfaces: attached, replaced, found again after a restart, taken away.
//!
//! A TCX link is pinned under its interface's index. A restart replaces the program in the link: no packet meets none. In
//! a clsact queueing discipline the filter has a priority and a handle of its own, by which it is replaced in place.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
    qdisc_detach_program,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use rustix::io::Errno;

use super::choice::{Choice, Hook};
use super::datapath::ENTRIES;
use super::outlook::Outlook;
use super::pins::Pins;
use super::syscall::tcx_egress;
use crate::escape::{Board, Escape, egress_filters, has_egress_hook};
use crate::interfaces::select::{Need, Selection};
use crate::interfaces::{Index, Interface};

/// The program that tells of packets and judges nothing.
pub(super) const TRACE: &str = "npm_trace";

/// The filter's priority: before all others.
const PRIORITY: u16 = 1;
/// The filter's handle: "np", so that nobody else's is taken for ours.
const HANDLE: TcHandle = TcHandle::new(0x6e70, 1);
/// The same as the kernel tells it.
const HANDLE_NUMBER: u32 = 0x6e70_0001;

/// Why an interface has no program.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The program is not where it was pinned.
    #[error("cannot find the pinned eBPF program")]
    Pinned(#[source] ProgramError),
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
    /// Another queueing discipline is where clsact belongs: filters for what goes out would be asked of what comes in.
    #[error("{name} has an ingress queueing discipline, which has no egress, in the place of clsact")]
    NoEgress {
        /// The interface.
        name: String,
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

/// The program's places. Several threads share it: what changes policies, and what follows the interfaces.
#[derive(Clone)]
pub(super) struct Attachments(Arc<Mutex<Places>>);

struct Places {
    pins: Pins,
    hook: Hook,
    selection: Selection,
    /// The program; `None` when it is to be nowhere any more.
    program: Option<SchedClassifier>,
    /// Where this process has attached it.
    attached: BTreeSet<Index>,
    outlook: Outlook,
}

impl Attachments {
    /// None yet, of the program that is pinned.
    ///
    /// # Errors
    /// It is not pinned.
    pub(super) fn new(pins: Pins, choice: Choice, selection: Selection) -> Result<Self, AttachError> {
        let has_links = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
        let offered = if has_links { Hook::Tcx } else { Hook::Clsact };
        let program = SchedClassifier::from_pin(pins.program()).map_err(AttachError::Pinned)?;
        let hook = choice.hook.unwrap_or(offered);
        let outlook = Outlook::default();
        let places =
            Places { pins, hook, selection, program: Some(program), attached: BTreeSet::new(), outlook };
        Ok(Self(Arc::new(Mutex::new(places))))
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        // No code panics while it holds the lock, and a panic elsewhere ends the process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts on this board what lets traffic escape.
    pub(super) fn report_to(&self, board: Board) {
        self.lock().outlook.report_to(board);
    }

    /// Tells of what lets traffic escape, after a look at all interfaces and at what tracks connections.
    pub(super) fn tell(&self, tracking: BTreeSet<Escape>) {
        let mut places = self.lock();
        places.outlook.tracking(tracking);
        places.outlook.tell();
    }

    /// Whether an interface has refused the program.
    pub(super) fn has_refusals(&self) -> bool {
        self.lock().outlook.has_refusals()
    }

    /// How the program is attached.
    pub(super) fn hook(&self) -> Hook {
        self.lock().hook
    }

    /// Attaches the program to each of these interfaces that needs it and does not have it; gives how many places are new
    /// to this process. A place that fails does not keep the others waiting.
    ///
    /// # Errors
    /// The first failure.
    pub(super) fn sync<'a>(
        &self,
        interfaces: impl IntoIterator<Item = &'a Interface>,
    ) -> Result<usize, AttachError> {
        self.lock().sync(interfaces)
    }

    /// Forgets an interface that is gone, with its link.
    pub(super) fn forget(&self, index: Index) {
        let mut places = self.lock();
        places.attached.remove(&index);
        places.outlook.forget(index);
        // There is none in a clsact queueing discipline, or if it never was attached.
        let _ = std::fs::remove_file(places.pins.link(index.0));
    }

    /// Takes away links of interfaces that are not among these.
    pub(super) fn forget_all_but(&self, known: &BTreeMap<Index, Interface>) {
        let links = self.lock().pins.links().unwrap_or_else(|error| {
            tracing::warn!(%error, "links of interfaces that are gone are kept");
            Vec::new()
        });
        for index in links.into_iter().map(Index).filter(|index| !known.contains_key(index)) {
            self.forget(index);
        }
    }

    /// Goes on with the program that is pinned by now: the next [`Attachments::sync`] puts it in the place of the one before.
    ///
    /// # Errors
    /// It is not pinned.
    pub(super) fn renew(&self) -> Result<(), AttachError> {
        let mut places = self.lock();
        places.program = Some(SchedClassifier::from_pin(places.pins.program()).map_err(AttachError::Pinned)?);
        places.attached.clear();
        Ok(())
    }

    /// Lets go of the program: nothing is attached from here on.
    pub(super) fn close(&self) {
        let mut places = self.lock();
        places.program = None;
        places.outlook.close();
    }
}

impl Places {
    fn sync<'a>(
        &mut self,
        interfaces: impl IntoIterator<Item = &'a Interface>,
    ) -> Result<usize, AttachError> {
        let Some(mut program) = self.program.take() else { return Ok(0) };
        let (mut outcome, mut new) = (Ok(()), 0);
        for interface in interfaces {
            match self.selection.need(interface) {
                Need::Program(_) => {}
                Need::Nothing(_) => {
                    self.outlook.forget(interface.index);
                    continue;
                }
            }
            if !self.attached.contains(&interface.index) || !self.is_there(&program, interface) {
                match self.attach(&mut program, interface) {
                    Ok(()) => new += usize::from(self.attached.insert(interface.index)),
                    Err(error) => {
                        let reason = chain(&error);
                        self.outlook.refused(interface.index, &interface.name, reason);
                        outcome = outcome.and(Err(error));
                        continue;
                    }
                }
            }
            let before = self.before(&program, interface);
            self.outlook.attached(interface.index, &interface.name, before);
        }
        self.program = Some(program);
        outcome.map(|()| new)
    }

    /// Whether the kernel says that the program is where we attached it.
    fn is_there(&self, program: &SchedClassifier, interface: &Interface) -> bool {
        match self.hook {
            Hook::Tcx => {
                let Ok(id) = program.info().map(|info| info.id()) else { return false };
                tcx_egress(interface.index).is_ok_and(|found| found.contains(&id))
            }
            // The filter can't be asked for without replacing it: replacing is harmless.
            Hook::Clsact => false,
        }
    }

    /// The programs of others that a packet meets first.
    ///
    /// # Errors
    /// The kernel does not let itself be asked.
    fn before(&self, program: &SchedClassifier, interface: &Interface) -> io::Result<Vec<String>> {
        let ours = match self.hook {
            Hook::Tcx => Some(program.info().map_err(io::Error::other)?.id()),
            // Every link comes before every filter.
            Hook::Clsact => None,
        };
        let linked = match tcx_egress(interface.index) {
            Ok(linked) => linked,
            // Before 6.6 there are no links. An interface may have gone meanwhile.
            Err(error) if answers(&error, &[Errno::INVAL, Errno::NODEV]) => Vec::new(),
            Err(error) => return Err(error),
        };
        let first: Vec<u32> = linked.into_iter().take_while(|found| Some(*found) != ours).collect();
        let mut before = Vec::new();
        if !first.is_empty() {
            // Names are for CAP_SYS_ADMIN only, which an agent in a container has not.
            let named = SchedClassifier::query_tcx(&interface.name, TcAttachType::Egress);
            let named = named.map(|(_, programs)| programs).unwrap_or_default();
            let name = |id: &u32| {
                let found = named.iter().find(|found| found.id() == *id);
                let name = found.and_then(|found| found.name_as_str()).map(str::to_owned);
                name.unwrap_or_else(|| format!("number {id}"))
            };
            before.extend(first.iter().map(name));
        }
        match self.hook {
            Hook::Tcx => {}
            Hook::Clsact => {
                let filters = egress_filters(interface.index)?;
                if filters.iter().any(|(handle, _)| *handle == HANDLE_NUMBER) {
                    let first = filters.into_iter().take_while(|(handle, _)| *handle != HANDLE_NUMBER);
                    before.extend(first.map(|(_, name)| name));
                }
            }
        }
        // What an earlier process of ours has attached in another way judges as well; what traces lets everything go on.
        before.retain(|name| !ENTRIES.contains(&name.as_str()) && name != TRACE);
        Ok(before)
    }

    fn attach(&self, program: &mut SchedClassifier, interface: &Interface) -> Result<(), AttachError> {
        match self.hook {
            Hook::Tcx => self.attach_tcx(program, interface),
            Hook::Clsact => attach_clsact(program, interface),
        }
    }

    fn attach_tcx(&self, program: &mut SchedClassifier, interface: &Interface) -> Result<(), AttachError> {
        let name = || interface.name.clone();
        let failed = |source| AttachError::Program { name: name(), source };
        let broken = |source: LinkError| AttachError::Link { name: name(), source: Box::new(source) };
        let path = self.pins.link(interface.index.0);
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
        let id = program.attach_with_options(&interface.name, TcAttachType::Egress, first).map_err(failed)?;
        let link = FdLink::try_from(program.take_link(id).map_err(failed)?).map_err(broken)?;
        link.pin(&path).map_err(|source| AttachError::Link { name: name(), source: Box::new(source) })?;
        Ok(())
    }
}

/// Whether the program is there as a filter, as it is before 6.6 or where that is forced.
///
/// # Errors
/// The kernel does not let itself be asked.
pub(super) fn has_program(index: Index) -> io::Result<bool> {
    Ok(egress_filters(index)?.iter().any(|(handle, _)| *handle == HANDLE_NUMBER))
}

/// An error with its causes.
fn chain(error: &AttachError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(this) = cause {
        text.push_str(&format!(": {this}"));
        cause = this.source();
    }
    text
}

fn attach_clsact(program: &mut SchedClassifier, interface: &Interface) -> Result<(), AttachError> {
    let name = || interface.name.clone();
    let failed = |source| AttachError::Program { name: name(), source };
    match qdisc_add_clsact(&interface.name) {
        Ok(()) => {}
        Err(error) if is(&error, &[Errno::EXIST]) => {
            match has_egress_hook(interface.index) {
                Ok(true) => {}
                Ok(false) => return Err(AttachError::NoEgress { name: name() }),
                // Mostly it is ours of before: without the program the interface would not be judged at all.
                Err(error) => {
                    tracing::warn!(%error, interface = interface.name, "cannot see which queueing discipline it has");
                }
            }
        }
        Err(source) => return Err(AttachError::Clsact { name: name(), source }),
    }
    let ours = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let attached =
        program.attach_with_options(&interface.name, TcAttachType::Egress, TcAttachOptions::Netlink(ours));
    let id = match attached {
        Err(ProgramError::TcError(error)) if is(&error, &[Errno::EXIST]) => {
            let link =
                SchedClassifierLink::attached(&interface.name, TcAttachType::Egress, PRIORITY, HANDLE, None);
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
pub fn detach_clsact(interface: &Interface, programs: &[&str]) -> Result<bool, AttachError> {
    let mut found = false;
    for program in programs {
        match qdisc_detach_program(&interface.name, TcAttachType::Egress, program) {
            Ok(()) => found = true,
            // No such filter, no such queueing discipline, no such interface any more.
            Err(error) if is(&error, &[Errno::NOENT, Errno::INVAL, Errno::NODEV]) => {}
            Err(source) => return Err(AttachError::Clsact { name: interface.name.clone(), source }),
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

fn answers(error: &io::Error, answers: &[Errno]) -> bool {
    error.raw_os_error().is_some_and(|found| answers.iter().any(|answer| answer.raw_os_error() == found))
}
