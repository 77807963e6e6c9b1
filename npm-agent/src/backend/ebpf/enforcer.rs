//! The backend: maps filled from the goal, and the program that reads them at every interface.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use npm_common::event::{Mode, Outcome};
use npm_common::layout::WIDE_WORDS;
use npm_common::mark::ProofBit;
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;

use super::any_maps::AnyMaps;
use super::attach::{Attachments, detach_clsact};
use super::choice::{Choice, Hook, Proofs};
use super::connections::{Reaper, prove_existing, prove_marked, sweep};
use super::datapath::{Datapath, ENTRIES, Settings};
use super::denials::{Denials, Sink, Unlogged};
use super::ended::Ended;
use super::kernel::{KernelError, verdict};
use super::lower::{decision, needed_bits};
use super::maps::{ApplyError, Writes};
use super::meter::{self, Fill};
use super::pins::Pins;
use super::rule::Iptables;
use super::shed::Shed;
use super::watch::{Watch, interfaces};
use super::width::Width;
use crate::backend::meter::{Meter, Store};
use crate::backend::{Applied, Backend, BackendError, Removed, Write};
use crate::denied::Log;
use crate::escape::{Board, Escape, Subject};
use crate::exec::Tools;
use crate::interfaces::select::Selection;

/// How the backend is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent's name: what it pins is kept apart by it.
    pub instance: String,
    /// Which programs, and how they are attached.
    pub choice: Choice,
    /// The iptables of the node, for each family that it has.
    pub iptables: Vec<Iptables>,
    /// Where iptables is.
    pub tools: Tools,
    /// Which interfaces are left out.
    pub selection: Selection,
    /// The bit of connections' marks that is the proof.
    pub proof: ProofBit,
}

/// The backend. It works in the network namespace of the thread that calls it.
pub struct Ebpf {
    iptables: Vec<Iptables>,
    tools: Tools,
    pins: Pins,
    choice: Choice,
    proof: ProofBit,
    datapath: Datapath,
    maps: AnyMaps,
    /// What packets are judged by; `None` before the first apply.
    goal: Option<Goal>,
    attachments: Attachments,
    /// Runs from the first time that the program is attached.
    watch: Option<Watch>,
    /// Runs until everything is removed.
    reaper: Option<Reaper>,
    /// The same.
    ended: Option<Ended>,
    /// Whether an earlier process of ours enforces.
    inherited: bool,
    /// What was wrong with the rules that track connections at the last look.
    untracked: BTreeSet<Escape>,
    /// Where denied flows are told, if they are.
    log: Option<(Log, Sink)>,
    denials: Option<Denials>,
    unlogged: Unlogged,
    /// How full the maps are: as of the first apply and of each read-back.
    fill: Fill,
    /// Whether what earlier processes had attached otherwise is gone.
    is_alone: bool,
    /// Whether what is attached from here on is the program that is pinned.
    is_renewed: bool,
    /// What the maps can't hold of the goal.
    shed: Shed,
    /// What they were filled with last, as far as this process knows.
    in_force: Goal,
    /// When the rules that track connections, and the interfaces, were last looked at.
    looked: Option<Instant>,
}

/// Goals may come every few milliseconds; looking at what they don't change (a program to run for each family, and a list of
/// interfaces) takes longer than that. In between [`Backend::verify`] is asked for whenever rules change, and interfaces are
/// followed.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

impl Ebpf {
    /// Loads the programs, and takes over what an earlier process has left. Enforces nothing that is not enforced yet.
    ///
    /// # Errors
    /// The process may not, or the kernel lacks what is needed.
    pub fn new(options: Options) -> Result<Self, BackendError> {
        let Options { instance, choice, iptables, tools, selection, proof } = options;
        let pins = Pins::of(&instance).map_err(KernelError::from)?;
        pins.make().map_err(KernelError::from)?;
        let width = pins.width();
        let settings = Settings { choice, pins: &pins, proof };
        let mut datapath = Datapath::load(&settings, width, &pins.rows(width))?;
        let inherited = datapath.mode()? == Mode::Enforce;
        if inherited && datapath.proofs() == Proofs::Maps {
            // They may be in marks: an earlier process may have chosen otherwise.
            prove_marked(&pins, proof)?;
        }
        datapath.publish(&pins)?;
        let maps = datapath.take_maps()?;
        let attachments = Attachments::new(pins.clone(), choice, selection).map_err(KernelError::from)?;
        let reaper = Some(Reaper::start(&pins, datapath.proofs(), proof)?);
        let ended = Some(Ended::start(&pins)?);
        tracing::info!(
            reading = %datapath.reading(), proofs = %datapath.proofs(), hook = %attachments.hook(), inherited, "the eBPF program is loaded"
        );
        let mut ebpf = Self {
            iptables,
            tools,
            pins,
            choice,
            proof,
            datapath,
            maps,
            goal: None,
            attachments,
            watch: None,
            reaper,
            ended,
            inherited,
            log: None,
            denials: None,
            unlogged: Unlogged::default(),
            untracked: BTreeSet::new(),
            fill: Fill::default(),
            is_alone: false,
            is_renewed: true,
            shed: Shed::default(),
            in_force: Goal::default(),
            looked: None,
        };
        if inherited {
            // Whatever has the program of before keeps it; the next read-back tries again and reports.
            if let Err(error) = ebpf.attach() {
                tracing::error!(%error, "an interface keeps an earlier program, or none");
            }
            ebpf.pins.keep_only(width).map_err(KernelError::from)?;
        }
        Ok(ebpf)
    }

    /// The same, telling this board of what lets traffic escape.
    pub fn with_board(self, board: Board) -> Self {
        self.attachments.report_to(board);
        self
    }

    /// The same, giving this sink a line for each flow that is denied. It takes programs that tell of dropped packets:
    /// [`super::choice::Drops::Told`].
    ///
    /// # Errors
    /// There can be no thread.
    pub fn with_log(mut self, log: Log, sink: Sink) -> Result<Self, BackendError> {
        self.log = Some((log, sink));
        self.read_denials()?;
        Ok(self)
    }

    /// Reads from the programs that are loaded now, and no longer from others.
    fn read_denials(&mut self) -> Result<(), KernelError> {
        if let Some((log, sink)) = &self.log {
            let (log, sink) = (log.clone(), Arc::clone(sink));
            self.denials = Some(Denials::start(self.datapath.ebpf_mut(), log, sink, self.unlogged.clone())?);
        }
        Ok(())
    }

    /// Packets by what became of them, since the maps were made.
    ///
    /// # Errors
    /// The kernel does not give them.
    pub fn outcomes(&self) -> Result<BTreeMap<Outcome, u64>, BackendError> {
        Ok(self.datapath.outcomes()?)
    }

    /// Has the program that is pinned by now attached from here on, unless that was done.
    fn renew(&mut self) -> Result<(), KernelError> {
        if !self.is_renewed {
            self.attachments.renew()?;
            self.is_renewed = true;
        }
        Ok(())
    }

    /// Attaches the program wherever it is not; gives how many places are new.
    fn attach(&mut self) -> Result<usize, BackendError> {
        self.renew()?;
        let known = interfaces()?;
        self.attachments.forget_all_but(&known);
        let new = self.attachments.sync(known.values());
        self.attachments.tell(self.untracked.clone());
        let new = new.map_err(KernelError::from)?;
        if self.watch.is_none() {
            self.watch = Some(Watch::start(self.attachments.clone())?);
        }
        Ok(new)
    }

    /// What was proven may be denied by now.
    fn policies_changed(&self) {
        if let Some(ended) = &self.ended {
            ended.policies_changed();
        }
    }

    /// Gives connections that are there their proof; then what has none is dropped. Gives no drift: it is the first time.
    fn begin_to_enforce(&mut self) -> Result<Vec<String>, BackendError> {
        let proven = prove_existing(&self.pins, self.datapath.proofs(), self.proof)?;
        self.datapath.set_mode(Mode::Enforce)?;
        tracing::info!(connections = proven, "policies are enforced; connections that existed live on");
        Ok(Vec::new())
    }

    /// Takes away, once, what an earlier process has attached in another way, or with maps of another schema: it would go on
    /// judging by what nobody keeps up to date.
    fn supersede(&mut self) {
        if self.is_alone {
            return;
        }
        let pins = &self.pins;
        let taken = match self.attachments.hook() {
            Hook::Tcx => detach_all(),
            Hook::Clsact => pins.remove_links().map_err(|error| KernelError::from(error).into()),
        };
        let taken = taken.and_then(|some| Ok(some + pins.remove_others().map_err(KernelError::from)?));
        match taken {
            Ok(taken) => {
                self.is_alone = true;
                if taken > 0 {
                    tracing::info!(taken, "what another version or another choice had attached is gone");
                }
            }
            Err(error) => tracing::warn!(%error, "an earlier program may still judge beside ours"),
        }
    }

    fn settings(&self) -> Settings<'_> {
        let choice = Choice { proofs: Some(self.datapath.proofs()), ..self.choice };
        Settings { choice, pins: &self.pins, proof: self.proof }
    }

    fn look_how_full(&self) {
        let mut stores = self.maps.stores();
        // Narrow rows are widened when they are full.
        let limit = 64 * WIDE_WORDS as u64;
        let used = self.goal.as_ref().map(|goal| needed_bits(goal) as u64);
        stores.extend(used.map(|used| Store { name: "peer_sets", used, limit }));
        self.fill.replace(stores);
    }

    /// Fills the maps with a goal, or with as much of it as they hold.
    ///
    /// # Errors
    /// The maps could not be written; or they can't hold it whatever is left out, and then it is as with [`Ebpf::fill`].
    fn fit(&mut self, goal: &Goal) -> Result<Writes, KernelError> {
        let before = self.shed.reduce(goal);
        let has_same_policies = || self.goal.as_ref().is_some_and(|known| known.programs == goal.programs);
        // While nothing has to be left out nobody looks for what would have to be. Wider programs are loaded for what fits only.
        if (self.shed.is_empty() || has_same_policies()) && self.wider(&before).is_none() {
            match self.fill(&before) {
                Err(KernelError::Apply(ApplyError::Lower(_) | ApplyError::Full(_))) => {}
                outcome => return outcome,
            }
        }
        let shed = match Shed::of(goal) {
            Ok(shed) => shed,
            // It isolates.
            Err(_) => return self.fill(goal),
        };
        self.leave_out(goal, shed)
    }

    /// Fills the maps with a goal but for what is left out of it.
    ///
    /// # Errors
    /// The maps could not be written.
    fn leave_out(&mut self, goal: &Goal, shed: Shed) -> Result<Writes, KernelError> {
        match self.fill(&shed.reduce(goal)) {
            Err(KernelError::Apply(ApplyError::Lower(_) | ApplyError::Full(_))) => {}
            outcome => {
                let writes = outcome?;
                self.shed = shed;
                return Ok(writes);
            }
        }
        // It fits, but not beside what it replaces: first that goes, then the rest comes.
        let less = shed.and_what_differs(goal, &self.in_force);
        let mut writes = self.fill(&less.reduce(goal))?;
        self.shed = less;
        match self.fill(&shed.reduce(goal)) {
            Ok(more) => {
                self.shed = shed;
                writes.entries += more.entries;
                writes.waits += more.waits;
                Ok(writes)
            }
            // The next read-back tries again.
            Err(KernelError::Apply(ApplyError::Lower(_) | ApplyError::Full(_))) => Ok(writes),
            Err(error) => Err(error),
        }
    }

    /// Fills the maps with a goal, wider ones if need be.
    ///
    /// # Errors
    /// It does not fit: then whoever it isolates, and was not isolated, is denied everything, unless there is not even room for
    /// that. Or maps could not be written.
    fn fill(&mut self, goal: &Goal) -> Result<Writes, KernelError> {
        let widened = self.wider(goal).and_then(|needed| match self.widen(goal, needed) {
            Ok(writes) => Some(writes),
            Err(error) => {
                tracing::warn!(%error, "no program with wider rows");
                self.looked = None;
                // What is in force can't hold the goal either: it denies whoever is to be isolated and is not yet.
                None
            }
        });
        let writes = match widened {
            Some(writes) => writes,
            None => self.maps.apply(goal)?,
        };
        self.in_force = goal.clone();
        Ok(writes)
    }

    /// The width that a goal needs, if that is a greater one; what fits nowhere is refused by the maps.
    fn wider(&self, goal: &Goal) -> Option<Width> {
        if self.maps.width().surely_holds(goal) {
            return None;
        }
        Width::needed(goal).ok().filter(|needed| *needed > self.maps.width())
    }

    /// Leaves out what has to be by now: there may be room for more, or for less.
    ///
    /// # Errors
    /// The maps could not be written.
    fn fit_anew(&mut self, goal: &Goal) -> Result<usize, KernelError> {
        if self.shed.is_empty() {
            return Ok(0);
        }
        match Shed::of(goal) {
            Ok(shed) if shed != self.shed => Ok(self.leave_out(goal, shed)?.entries),
            Ok(_) | Err(_) => Ok(0),
        }
    }

    /// Goes on with programs of another width, which judge by `goal` from the first packet on.
    fn widen(&mut self, goal: &Goal, width: Width) -> Result<Writes, KernelError> {
        let directory = self.pins.begin(width)?;
        let mut datapath = Datapath::load(&self.settings(), width, &directory)?;
        let mut maps = datapath.take_maps()?;
        let writes = maps.apply(goal)?;
        self.pins.finish(width)?;
        datapath.publish(&self.pins)?;
        (self.datapath, self.maps, self.is_renewed) = (datapath, maps, false);
        if let Err(error) = self.read_denials() {
            tracing::warn!(%error, "denied flows are not logged any more");
        }
        self.renew()?;
        self.attachments.sync(interfaces()?.values())?;
        // Nothing leads to the others any more.
        self.pins.keep_only(width)?;
        tracing::info!(width = width.name(), "the eBPF program has rows of another width");
        Ok(writes)
    }

    /// Puts back the rules that make the kernel track connections; gives what was not there.
    fn track(&mut self) -> Result<Vec<String>, BackendError> {
        let (mut missing, mut untracked, mut outcome) = (Vec::new(), BTreeSet::new(), Ok(()));
        for iptables in &self.iptables {
            match iptables.ensure(&self.tools) {
                Ok(false) => {}
                Ok(true) => {
                    missing.push(format!("{}: the rule that tracks connections was gone", iptables.program));
                    untracked.insert(Escape::ConntrackRuleGone { family: iptables.family });
                }
                Err(error) => {
                    let reason = format!("{}: {error}", iptables.program);
                    untracked.insert(Escape::Unknown { subject: Subject::Tracking, reason });
                    outcome = outcome.and(Err(error));
                }
            }
        }
        // Before the first apply there is none.
        self.untracked = if self.goal.is_some() { untracked } else { BTreeSet::new() };
        if outcome.is_err() {
            self.attachments.tell(self.untracked.clone());
        }
        outcome.map(|()| missing)
    }
}

impl fmt::Debug for Ebpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ebpf").field("pins", &self.pins).finish_non_exhaustive()
    }
}

impl Backend for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn inherits(&self) -> bool {
        self.inherited
    }

    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError> {
        // Connections have to be tracked before anything is judged by them; later on busy iptables must not keep policies
        // from the maps.
        let is_first = self.goal.is_none();
        let mut tracked = if is_first { self.track() } else { Ok(Vec::new()) };
        let outcome = self.fit(goal);
        self.policies_changed();
        // A goal that does not fit has isolated all the same; after another failure nobody knows what is in the maps.
        let (writes, unfit) = match outcome {
            Ok(writes) => (writes, None),
            Err(error @ KernelError::Apply(ApplyError::Lower(_) | ApplyError::Full(_))) => {
                (Writes::default(), Some(error))
            }
            Err(error) => return Err(error.into()),
        };
        let enforced = self.datapath.mode()? == Mode::Enforce;
        // Whatever is not as it should be is looked at with each goal until it is.
        let looks = self.looked.is_none_or(|looked| looked.elapsed() > LOOK_AGAIN)
            || !enforced
            || !self.is_alone
            || self.attachments.has_refusals();
        if looks && !is_first {
            tracked = self.track();
        }
        // A program of another schema enforces still, maybe in the very place that ours is to have: no packet is to find ours
        // there before it enforces.
        let succeeds = !enforced && self.pins.has_others().map_err(KernelError::from)?;
        if succeeds {
            tracked?;
            tracked = Ok(self.begin_to_enforce()?);
        }
        // An interface that refuses the program must not keep the others from enforcing.
        let attached = if looks { self.attach() } else { Ok(0) };
        self.looked = match (&tracked, &attached) {
            // What has failed is tried from the beginning.
            (Err(_), _) | (_, Err(_)) => None,
            (Ok(_), Ok(_)) if unfit.is_some() => None,
            (Ok(_), Ok(_)) if looks => Some(Instant::now()),
            (Ok(_), Ok(_)) => self.looked,
        };
        let drift = if enforced || succeeds {
            tracked
        } else {
            // From the line before on every new connection is judged, and its proof is recorded.
            tracked?;
            self.begin_to_enforce()
        };
        if looks && attached.is_ok() {
            self.supersede();
        }
        self.inherited = false;
        if let Some((log, _)) = &self.log {
            log.enforced(&self.shed.reduce(goal));
        }
        if self.goal.replace(goal.clone()).is_none() {
            self.look_how_full();
        }
        if let Some(error) = unfit {
            return Err(error.into());
        }
        Ok(Applied {
            set_writes: writes.entries,
            rule_writes: attached?,
            drift: drift?,
            degraded: self.shed.degraded(),
        })
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        let (tracked, attached) = (self.track(), self.attach());
        let (mut drift, mut set_writes, mut anew) = (Vec::new(), 0, Ok(0));
        if let Some(goal) = self.goal.clone() {
            let (writes, changed) = self.maps.verify(&self.shed.reduce(&goal)).map_err(KernelError::from)?;
            set_writes = writes.entries;
            drift.extend(changed);
            anew = self.fit_anew(&goal);
            if set_writes > 0 || !matches!(anew, Ok(0)) {
                self.policies_changed();
            }
            if self.datapath.mode()? != Mode::Enforce {
                self.datapath.set_mode(Mode::Enforce)?;
                drift.push("the eBPF program was set not to drop".to_owned());
            }
        }
        self.look_how_full();
        for line in &drift {
            // Said here as well: what fails below keeps it from the status.
            tracing::warn!(line, "somebody changed what is enforced");
        }
        let rule_writes = attached?;
        set_writes += anew?;
        self.supersede();
        drift.extend(tracked?);
        Ok(Applied { set_writes, rule_writes, drift, degraded: self.shed.degraded() })
    }

    /// None: writes to maps take microseconds, and the attempt as a whole is measured.
    fn writes(&mut self) -> Vec<Write> {
        Vec::new()
    }

    fn meter(&self) -> Option<Meter> {
        let meter = meter::meter(&self.pins, self.fill.clone(), self.unlogged.clone());
        meter.inspect_err(|error| tracing::warn!(%error, "packets are not counted")).ok()
    }

    fn decide(&mut self, flow: &Flow) -> Result<Decision, BackendError> {
        Ok(decision(verdict(self.datapath.ebpf(), flow)?))
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        self.attachments.close();
        (self.watch, self.reaper, self.ended, self.denials) = (None, None, None, None);
        let mut removed = Removed { rules: take_away(&self.pins)?, ..Removed::default() };
        for iptables in &self.iptables {
            removed.chains += usize::from(iptables.remove(&self.tools)?);
        }
        Ok(removed)
    }
}

/// Takes away what instances of any name and version have pinned and attached in the calling thread's network namespace;
/// gives how many files and filters that were. The rules that track connections are not among them.
///
/// # Errors
/// Something is still there.
pub fn remove_all() -> Result<usize, BackendError> {
    let mut removed = 0;
    for pins in Pins::all().map_err(KernelError::from)? {
        removed += pins.remove().map_err(KernelError::from)?;
    }
    Ok(removed + detach_all()?)
}

/// Removes what [`remove_all`] does, where another backend enforces by now: first the kernel's entries of connections that
/// were denied, which that backend would take for established.
///
/// # Errors
/// Something is still there.
pub fn release() -> Result<usize, BackendError> {
    for pins in Pins::all().map_err(KernelError::from)? {
        if let Err(error) = sweep(&pins) {
            tracing::warn!(%error, "entries of connections that were denied stay until they time out");
        }
    }
    remove_all()
}

fn take_away(pins: &Pins) -> Result<usize, BackendError> {
    Ok(pins.remove().map_err(KernelError::from)? + detach_all()?)
}

fn detach_all() -> Result<usize, BackendError> {
    let mut removed = 0;
    for interface in interfaces()?.values() {
        removed += usize::from(detach_clsact(interface, &ENTRIES).map_err(KernelError::from)?);
    }
    Ok(removed)
}
