//! From what the maps hold to what a goal wants them to hold: single writes, in order. Pure.
//!
//! ```text
//! wait, if programs may still read what the last plan replaced
//! sweep      what nothing is known of in the half in use leaves the maps
//! fill       rows, segments, policies that no half in use leads to; then the halves that packets do not use
//! switch     one store: packets use the other halves
//! ```
//!
//! Up to the switch nothing that a packet sees has changed, and after it everything has: every packet is judged by the
//! old goal or by the new one, whole, wherever the writes are cut off. What the numbers of bits, rows, policies and pods
//! mean may differ between the two: no packet reads across.
//!
//! A plan needs nothing but the maps. The halves that packets do not use may hold anything, as a plan that was cut off
//! leaves them: each of them that is not as wanted is written before the switch.

pub(in crate::backend::ebpf) mod content;
pub(in crate::backend::ebpf) mod family;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use npm_common::layout::{Known, NO_POD, NOT_ISOLATED, Policy};

use super::held::{FamilyWrite, Held, HeldFamily, Limits, Readers, Write};
use super::lower::{FamilyMaps, Isolated, Lowered, OfFamily};
use content::Content;
use family::{FamilyPlan, Wanted};

use crate::backend::meter::Store;

/// A step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<const W: usize> {
    /// Every program that runs now must end first.
    Grace,
    /// A write.
    Write(Write<W>),
}

impl<const W: usize> Step<W> {
    /// What it writes, if anything.
    pub fn write(&self) -> Option<&Write<W>> {
        match self {
            Self::Grace => None,
            Self::Write(write) => Some(write),
        }
    }
}

/// A map that has a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapName {
    /// The pods' addresses of a family.
    Records,
    /// The prefixes of a family.
    Networks,
    /// The named ports of a family.
    Pairs,
    /// The policies.
    Policies,
    /// The policies' segments.
    Segments,
    /// The rows.
    Rows,
}

impl fmt::Display for MapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Records => "pods' addresses",
            Self::Networks => "networks",
            Self::Pairs => "named ports",
            Self::Policies => "policies",
            Self::Segments => "segments",
            Self::Rows => "rows",
        })
    }
}

/// A map has no room for what is wanted beside what is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the eBPF map of {map} takes {limit} entries: no room for {wanted} beside the {in_use} in use")]
pub struct Full {
    /// The map.
    pub map: MapName,
    /// How many entries the goal wants, those that are there already included.
    pub wanted: usize,
    /// How many are in use.
    pub in_use: usize,
    /// How many there can be.
    pub limit: u32,
}

/// The steps that lead from what is held to what is wanted; none when packets are judged as wanted already and nothing
/// is left to sweep.
///
/// # Errors
/// A map is full.
pub fn plan<const W: usize>(
    held: &Held<W>,
    wanted: &Lowered<W>,
    limits: &Limits,
) -> Result<Vec<Step<W>>, Full> {
    let content = Content::of(held, wanted, limits)?;
    let v4 = FamilyPlan::of(&held.v4, held.half(), &family(&content, &wanted.v4), limits)?;
    let v6 = FamilyPlan::of(&held.v6, held.half(), &family(&content, &wanted.v6), limits)?;

    let is_seen = v4.is_seen || v6.is_seen;
    let mut steps = Vec::new();
    if held.readers == Readers::Behind && (is_seen || !v4.sweep.is_empty() || !v6.sweep.is_empty()) {
        steps.push(Step::Grace);
    }
    steps.extend(wrapped(v4.sweep, Write::V4));
    steps.extend(wrapped(v6.sweep, Write::V6));
    if is_seen {
        steps.extend(content.writes.into_iter().map(Step::Write));
        steps.extend(wrapped(v4.fill, Write::V4));
        steps.extend(wrapped(v6.fill, Write::V6));
        steps.push(Step::Write(Write::Generation(1 - (held.generation & 1))));
        steps.extend(wrapped(v4.after, Write::V4));
        steps.extend(wrapped(v6.after, Write::V6));
    }
    Ok(steps)
}

/// The steps that make both halves what packets are judged by, so that the next plan has only its own changes to write.
/// Packets see nothing of it.
pub fn settle<const W: usize>(held: &Held<W>, limits: &Limits) -> Vec<Step<W>> {
    let half = held.half();
    // What is in use has room.
    let of_v4 = FamilyPlan::of(&held.v4, half, &Wanted::in_use(&held.v4, half), limits);
    let of_v6 = FamilyPlan::of(&held.v6, half, &Wanted::in_use(&held.v6, half), limits);
    let (Ok(v4), Ok(v6)) = (of_v4, of_v6) else { return Vec::new() };
    let mut steps: Vec<Step<W>> = wrapped(v4.sweep, Write::V4).collect();
    steps.extend(wrapped(v6.sweep, Write::V6));
    steps.extend(wrapped(v4.fill, Write::V4));
    steps.extend(wrapped(v6.fill, Write::V6));
    if !steps.is_empty() && held.readers == Readers::Behind {
        steps.insert(0, Step::Grace);
    }
    steps
}

/// The steps for a goal that does not fit: all stays as it is, but whoever the goal isolates in a direction, and is not
/// isolated there now, is denied everything there.
///
/// # Errors
/// There is not even room for that.
pub fn isolate<const W: usize>(
    held: &Held<W>,
    isolated: &Isolated,
    limits: &Limits,
) -> Result<Vec<Step<W>>, Full> {
    let half = held.half();
    let used = content::policies_in_use(held);
    let allows_nobody = |id: &u32| held.policies.get(id).is_none_or(|policy| *policy == Policy::default());
    let free = || (1..limits.policies).find(|id| !used.contains(id));
    let there = used.iter().copied().find(|id| *id != NOT_ISOLATED && allows_nobody(id));
    let in_use = used.len() - 1;
    let full = Full { map: MapName::Policies, wanted: in_use + 1, in_use, limit: limits.policies };
    let nothing = there.or_else(free).ok_or(full)?;

    let v4 = FamilyPlan::of(&held.v4, half, &denied(&held.v4, half, isolated, nothing), limits)?;
    let v6 = FamilyPlan::of(&held.v6, half, &denied(&held.v6, half, isolated, nothing), limits)?;
    if !v4.is_seen && !v6.is_seen {
        return Ok(Vec::new());
    }
    let mut steps = Vec::new();
    if held.readers == Readers::Behind {
        steps.push(Step::Grace);
    }
    if !allows_nobody(&nothing) {
        steps.push(Step::Write(Write::Policy(nothing, Policy::default())));
    }
    steps.extend(wrapped(v4.sweep, Write::V4));
    steps.extend(wrapped(v4.fill, Write::V4));
    steps.extend(wrapped(v6.sweep, Write::V6));
    steps.extend(wrapped(v6.fill, Write::V6));
    steps.push(Step::Write(Write::Generation(1 - (held.generation & 1))));
    Ok(steps)
}

/// What is in use, and whoever is to be isolated denied.
fn denied<A: OfFamily>(held: &HeldFamily<A>, half: usize, isolated: &Isolated, nothing: u32) -> Wanted<A> {
    let mut wanted = Wanted::in_use(held, half);
    for (address, directions) in isolated {
        let Some(address) = A::of(*address) else { continue };
        let known = wanted.known.get(&address).copied().unwrap_or(Known::NOTHING);
        let denied = |is_isolated, id| if is_isolated && id == NOT_ISOLATED { nothing } else { id };
        let ingress = denied(directions.ingress, known.ingress);
        let egress = denied(directions.egress, known.egress);
        wanted.known.insert(address, Known { ingress, egress, ..known });
    }
    // Addresses that were one pod's and are not any more are no way around the policies of either.
    let whose = |address: &A| isolated.get(&address.ip()).map(|directions| directions.pod);
    let mut owners: BTreeMap<u32, BTreeSet<Option<u32>>> = BTreeMap::new();
    for (address, known) in wanted.known.iter().filter(|(_, known)| known.pod != NO_POD) {
        owners.entry(known.pod).or_default().insert(whose(address));
    }
    let mut fresh = owners.last_key_value().map_or(NO_POD, |(pod, _)| *pod);
    let mut numbers: BTreeMap<(u32, Option<u32>), u32> = BTreeMap::new();
    for (address, known) in &mut wanted.known {
        if owners.get(&known.pod).is_some_and(|owners| owners.len() > 1) {
            known.pod = *numbers.entry((known.pod, whose(address))).or_insert_with(|| {
                fresh = fresh.saturating_add(1);
                fresh
            });
        }
    }
    wanted.known.retain(|_, known| *known != Known::NOTHING);
    wanted
}

pub(super) fn wrapped<A: OfFamily, const W: usize>(
    writes: Vec<FamilyWrite<A>>,
    wrap: impl Fn(FamilyWrite<A>) -> Write<W>,
) -> impl Iterator<Item = Step<W>> {
    writes.into_iter().map(move |write| Step::Write(wrap(write)))
}

/// What is wanted of one family, in the numbers of the maps.
fn family<A: OfFamily, const W: usize>(content: &Content<W>, maps: &FamilyMaps<A, W>) -> Wanted<A> {
    let mut known: BTreeMap<A, Known> = BTreeMap::new();
    for (address, bits) in &maps.members {
        known.insert(*address, Known { row: content.row(bits), ..Known::NOTHING });
    }
    for (address, endpoint) in &maps.endpoints {
        let it = known.entry(*address).or_insert(Known::NOTHING);
        it.ingress = content.policy(endpoint.ingress);
        it.egress = content.policy(endpoint.egress);
        it.pod = endpoint.pod;
    }
    Wanted {
        known,
        networks: maps.networks.iter().map(|(prefix, bits)| (*prefix, content.row(bits))).collect(),
        pairs: maps.pairs.iter().map(|(pair, bits)| (*pair, content.row(bits))).collect(),
    }
}

/// How much of each map the half in use leads to.
pub fn usage<const W: usize>(held: &Held<W>, limits: &Limits) -> Vec<Store> {
    let content::Usage { policies, segments, rows } = content::usage(held);
    let store = |name, used, limit: usize| Store { name, used: used as u64, limit: limit as u64 };
    let limit = |limit: u32| limit as usize;
    // Of policies and rows the first is nobody's.
    vec![
        store("pods_ipv4", held.v4.places.len(), limit(limits.records)),
        store("pods_ipv6", held.v6.places.len(), limit(limits.records)),
        store("networks_ipv4", held.v4.networks.len(), limit(limits.networks)),
        store("networks_ipv6", held.v6.networks.len(), limit(limits.networks)),
        store("named_ports_ipv4", held.v4.pairs.len(), limit(limits.pairs)),
        store("named_ports_ipv6", held.v6.pairs.len(), limit(limits.pairs)),
        store("policies", policies, limit(limits.policies) - 1),
        store("segments", segments, limit(limits.segments)),
        store("rows", rows, limit(limits.rows) - 1),
    ]
}

/// What maps that were empty hold after a plan: how the tests and the words see a goal's maps.
///
/// # Errors
/// A map is full.
pub fn filled<const W: usize>(wanted: &Lowered<W>, limits: &Limits) -> Result<Held<W>, Full> {
    let mut held = Held::default();
    for step in plan(&held, wanted, limits)? {
        match step {
            Step::Grace => held.readers = Readers::Current,
            Step::Write(write) => held.write(&write),
        }
    }
    Ok(held)
}
