//! The backend: maps filled from the goal, and the program that reads them at every interface.

use std::collections::BTreeMap;
use std::fmt;

use npm_common::event::{Mode, Outcome};
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;

use super::attach::{Attachments, detach_clsact};
use super::choice::{Choice, Reading};
use super::datapath::{Datapath, entry};
use super::kernel::{KernelError, verdict};
use super::lower::{decision, lower};
use super::maps::Maps;
use super::pins::Pins;
use super::ports::ports;
use super::rule::Iptables;
use crate::backend::{Applied, Backend, BackendError, Removed};
use crate::exec::Tools;

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
}

/// The backend. It works in the network namespace of the thread that calls it.
pub struct Ebpf {
    iptables: Vec<Iptables>,
    tools: Tools,
    pins: Pins,
    datapath: Datapath,
    maps: Maps,
    attachments: Attachments,
    /// Whether an earlier process of ours enforces.
    inherited: bool,
}

impl Ebpf {
    /// Loads the programs, and takes over what an earlier process has left. Enforces nothing that is not enforced yet.
    ///
    /// # Errors
    /// The process may not, or the kernel lacks what is needed.
    pub fn new(options: Options) -> Result<Self, BackendError> {
        let Options { instance, choice, iptables, tools } = options;
        let pins = Pins::of(&instance).map_err(KernelError::from)?;
        let mut datapath = Datapath::load(choice, &pins)?;
        let inherited = datapath.mode()? == Mode::Enforce;
        let maps = datapath.take_maps()?;
        let attachments = Attachments::new(pins.clone(), choice);
        tracing::info!(
            reading = %datapath.reading(), hook = %attachments.hook(), inherited, "the eBPF program is loaded"
        );
        let mut ebpf = Self { iptables, tools, pins, datapath, maps, attachments, inherited };
        if inherited {
            ebpf.attach()?;
        }
        Ok(ebpf)
    }

    /// Packets by what became of them, since the maps were made.
    ///
    /// # Errors
    /// The kernel does not give them.
    pub fn outcomes(&self) -> Result<BTreeMap<Outcome, u64>, BackendError> {
        Ok(self.datapath.outcomes()?)
    }

    /// Attaches the program wherever it is not; gives how many places are new.
    fn attach(&mut self) -> Result<usize, BackendError> {
        let ports = ports().map_err(KernelError::Ports)?;
        self.attachments.forget_gone(&ports);
        Ok(self.attachments.sync(self.datapath.program()?, &ports).map_err(KernelError::from)?)
    }

    /// Puts back the rules that make the kernel track connections; gives what was not there.
    fn track(&self) -> Result<Vec<String>, BackendError> {
        let mut missing = Vec::new();
        for iptables in &self.iptables {
            if iptables.ensure(&self.tools)? {
                missing.push(format!("{}: the rule that tracks connections was gone", iptables.program));
            }
        }
        Ok(missing)
    }
}

impl fmt::Debug for Ebpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ebpf").field("attachments", &self.attachments).finish_non_exhaustive()
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
        let lowered = lower(goal).map_err(KernelError::from)?;
        let missing = self.track()?;
        let set_writes = self.maps.converge(&lowered)?;
        let rule_writes = self.attach()?;
        let mut drift = Vec::new();
        if self.datapath.mode()? == Mode::Enforce {
            drift = missing;
        } else {
            self.datapath.set_mode(Mode::Enforce)?;
        }
        self.inherited = false;
        Ok(Applied { set_writes, rule_writes, drift, degraded: Vec::new() })
    }

    fn verify(&mut self) -> Result<Applied, BackendError> {
        let drift = self.track()?;
        let rule_writes = self.attach()?;
        Ok(Applied { set_writes: 0, rule_writes, drift, degraded: Vec::new() })
    }

    fn decide(&mut self, flow: &Flow) -> Result<Decision, BackendError> {
        Ok(decision(verdict(self.datapath.ebpf(), flow)?))
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        let mut removed =
            Removed { rules: self.pins.remove().map_err(KernelError::from)?, ..Removed::default() };
        for port in ports().map_err(KernelError::Ports)? {
            let programs = [entry(Reading::Probe)];
            removed.rules += usize::from(detach_clsact(&port, &programs).map_err(KernelError::from)?);
        }
        for iptables in &self.iptables {
            removed.chains += usize::from(iptables.remove(&self.tools)?);
        }
        Ok(removed)
    }
}
