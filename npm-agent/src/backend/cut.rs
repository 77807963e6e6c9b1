//! Cuts established connections that policies deny by now: a backend around a backend.
//!
//! After each apply and each read-back the table of connections is compared with the goal. An entry between a pod of this
//! node and whomever, whose opening the goal denies, gets the cut bit; one that has the bit and is allowed by now loses
//! it. The backend inside drops what belongs to an entry with that bit, in both directions.
//!
//! Why not delete the entry: the next packet would open it anew, and if that packet is the server's, it is judged as a
//! connection *from* the server. Most policies allow that, and what was to be cut would live on the other way round.

use std::collections::BTreeSet;
use std::net::IpAddr;

use npm_common::mark::ProofBit;
use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::Goal;
use npm_policy::model::Protocol;

use super::meter::Meter;
use super::{Applied, Backend, BackendError, Removed, Write};
use crate::conntrack::{Conntrack, ConntrackError, Detail, EXPECTED, Entry, MarkFilter};

/// A backend that cuts. It works in the network namespace of the thread that calls it.
pub struct Cutting {
    inner: Box<dyn Backend>,
    proof: ProofBit,
    /// The goal that the kernel has.
    goal: Option<Goal>,
}

impl Cutting {
    /// Lets `inner`, which has to drop what carries `proof`'s cut bit, cut connections.
    ///
    /// # Errors
    /// The kernel's table of connections can't be had.
    pub fn new(inner: Box<dyn Backend>, proof: ProofBit) -> Result<Self, BackendError> {
        Conntrack::open()?;
        Ok(Self { inner, proof, goal: None })
    }

    fn cut(&self) -> Result<(), BackendError> {
        let Some(goal) = &self.goal else { return Ok(()) };
        let (cut, freed) = cut(goal, self.proof)?;
        if cut + freed > 0 {
            tracing::info!(cut, freed, "established connections");
        }
        Ok(())
    }
}

/// Brings the cut bits of the calling thread's namespace to what `goal` says. Gives how many entries got it and lost it.
///
/// # Errors
/// The kernel's table could not be read or written; the next call goes on from there.
pub fn cut(goal: &Goal, proof: ProofBit) -> Result<(usize, usize), ConntrackError> {
    let bit = proof.cut_mask();
    let subjects: BTreeSet<IpAddr> = goal.subjects.values().flatten().copied().collect();
    let mut table = Conntrack::open()?;
    let wrong = table.entries_where(MarkFilter::ANY, |entry| {
        is_denied(goal, &subjects, entry) != (entry.mark & bit != 0)
    })?;
    let (free, keep): (Vec<Entry>, Vec<Entry>) = wrong.into_iter().partition(|entry| entry.mark & bit != 0);
    Ok((table.set_marks(&keep, bit, bit)?, table.set_marks(&free, 0, bit)?))
}

fn is_denied(goal: &Goal, subjects: &BTreeSet<IpAddr>, entry: &Entry) -> bool {
    // What another connection announced was let through without asking policies: they say nothing of it.
    if entry.status & EXPECTED != 0 {
        return false;
    }
    let flow = opening(entry);
    let concerned = subjects.contains(&flow.source) || subjects.contains(&flow.destination);
    concerned && goal.verdict(&flow).decision() == Decision::Deny
}

/// The flow that the entry's first packet was, as FORWARD saw it: the source before translation, the destination after.
fn opening(entry: &Entry) -> Flow {
    let number = entry.original.protocol;
    let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == number);
    let transport = match (protocol, entry.reply.detail) {
        (Some(protocol), Detail::Ports { source, .. }) => Transport::Port(protocol, source),
        (Some(_) | None, Detail::Ports { .. } | Detail::Icmp { .. } | Detail::Nothing) => {
            Transport::Portless(number)
        }
    };
    Flow { source: entry.original.source, destination: entry.reply.source, transport }
}

impl Backend for Cutting {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn inherits(&self) -> bool {
        self.inner.inherits()
    }

    /// First the rules, so that nothing is opened anew that the cut has passed already.
    fn apply(&mut self, goal: &Goal) -> Result<Applied, BackendError> {
        let applied = self.inner.apply(goal)?;
        self.goal = Some(goal.clone());
        self.cut()?;
        Ok(applied)
    }

    /// Finds as well what was being opened while the last apply changed the rules.
    fn verify(&mut self) -> Result<Applied, BackendError> {
        let applied = self.inner.verify()?;
        self.cut()?;
        Ok(applied)
    }

    fn writes(&mut self) -> Vec<Write> {
        self.inner.writes()
    }

    fn meter(&self) -> Option<Meter> {
        self.inner.meter()
    }

    fn decide(&mut self, flow: &Flow) -> Result<Decision, BackendError> {
        self.inner.decide(flow)
    }

    fn remove(&mut self) -> Result<Removed, BackendError> {
        self.goal = None;
        self.inner.remove()
    }
}
