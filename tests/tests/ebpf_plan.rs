//! Every write of every plan for the eBPF maps, on a model of the kernel: up to the switch every packet is judged by the
//! old goal and from it on by the new one, also a packet whose judging lasts while writes go on; and a plan cut short is
//! continued by a process that knows nothing but the maps.
//!
//! `NPM_SEED=<number>` repeats a run; `NPM_CASES=<n>` scales it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use npm_agent::backend::ebpf::held::{FamilyWrite, Held, HeldFamily, Limits, Readers, Write};
use npm_agent::backend::ebpf::lower::{Lowered, OfFamily, isolated, lower_with, most_bits, needed_bits};
use npm_agent::backend::ebpf::lowering::{Lowering, Unfit};
use npm_agent::backend::ebpf::plan::{Full, MapName, Step, filled, isolate, plan, settle};
use npm_common::decide::{self, Judgement, Lookups, Verdict};
use npm_common::layout::{Address, Bits, Generation, PairRecord, Policy, Record, V4, V6};
use npm_policy::compile::Compiler;
use npm_policy::flow::{Flow, Transport};
use npm_policy::goal::Goal;
use npm_policy::model::{Block, Peer, Peers, Port, Ports, Protocol, Rule};
use npm_policy::world::{Change, World};
use npm_tests::bench::{self, cluster::Cluster};
use npm_tests::opinions::plain;
use npm_tests::property::check;
use npm_tests::random::{NODES, SplitMix, cluster, flows, sequence, world};
use npm_tests::regressions;
use proptest::prelude::*;
use proptest::sample::select;

const REGRESSIONS: &str = regressions!("ebpf_plan.txt");

/// Words of a row.
const W: usize = 4;

#[derive(Default)]
struct Seen {
    writes: Cell<u64>,
    checked: Cell<u64>,
    raced: Cell<u64>,
    /// Of these, readers during whose judging something was written.
    passed: Cell<u64>,
    graces: Cell<u64>,
    plans: Cell<u64>,
    /// Of these, those that were found by what differs from the last goal.
    by_difference: Cell<u64>,
    /// Of these, those in which bits came.
    turned_over: Cell<u64>,
    full: Cell<u64>,
}

fn add(cell: &Cell<u64>, more: usize) {
    cell.set(cell.get() + more as u64);
}

/// One step on the model, which refuses what the kernel refuses.
fn step(held: &mut Held<W>, step: &Step<W>, limits: &Limits) -> Result<(), String> {
    let write = match step {
        Step::Grace => {
            held.readers = Readers::Current;
            return Ok(());
        }
        Step::Write(write) => write,
    };
    let inside = |index: &u32, limit: u32| match index < &limit {
        true => Ok(()),
        false => Err(format!("no entry {index} among {limit}: {write:?}")),
    };
    match write {
        Write::Row(index, _) => inside(index, limits.rows)?,
        Write::Segment(index, _) => inside(index, limits.segments)?,
        Write::Policy(id, _) => inside(id, limits.policies)?,
        Write::Meaning(bit, _) => inside(bit, 64 * W as u32)?,
        Write::V4(write) => family_step(&held.v4, write, limits)?,
        Write::V6(write) => family_step(&held.v6, write, limits)?,
        Write::Generation(_) => {}
    }
    held.write(write);
    Ok(())
}

fn family_step<A: Address>(
    held: &HeldFamily<A>,
    write: &FamilyWrite<A>,
    limits: &Limits,
) -> Result<(), String> {
    let (has_room, what) = match write {
        FamilyWrite::Record(place, _) => (*place < limits.records, "record"),
        FamilyWrite::PairRecord(place, _) => (*place < limits.pairs, "pair record"),
        FamilyWrite::Place(address, _) => {
            let room = held.places.len() < limits.records as usize;
            (room || held.places.contains_key(address), "place")
        }
        FamilyWrite::Network(prefix, _) => {
            let room = held.networks.len() < limits.networks as usize;
            (room || held.networks.contains_key(prefix), "network")
        }
        FamilyWrite::PairPlace(pair, _) => {
            (held.pairs.len() < limits.pairs as usize || held.pairs.contains_key(pair), "pair")
        }
        FamilyWrite::Unplace(address) => (held.places.contains_key(address), "place to take"),
        FamilyWrite::DropNetwork(prefix) => (held.networks.contains_key(prefix), "network to drop"),
        FamilyWrite::PairUnplace(pair) => (held.pairs.contains_key(pair), "pair to take"),
    };
    if has_room { Ok(()) } else { Err(format!("no room for a {what}: {write:?}")) }
}

/// A packet that is judged while writes go on, up to the next wait for packets like it.
struct Packet<'a> {
    held: RefCell<Held<W>>,
    coming: RefCell<std::slice::Iter<'a, Step<W>>>,
    dice: RefCell<SplitMix>,
    limits: &'a Limits,
    passed: Cell<u64>,
}

impl Packet<'_> {
    /// Lets some writes happen.
    fn pass(&self) {
        let mut dice = self.dice.borrow_mut();
        let some = match dice.next() % 4 {
            0 | 1 => 0,
            2 => 1,
            _ => dice.next() % 40,
        };
        let mut coming = self.coming.borrow_mut();
        for _ in 0..some {
            match coming.as_slice().first() {
                Some(Step::Grace) | None => return,
                Some(write) => {
                    step(&mut self.held.borrow_mut(), write, self.limits).expect("it was done before");
                    self.passed.set(self.passed.get() + 1);
                    coming.next();
                }
            }
        }
    }

    /// The value of a hash map's element that was found. If the element was given away meanwhile, it is another's.
    fn element<K: Ord>(&self, map: impl Fn(&Held<W>) -> &BTreeMap<K, u32>, key: &K) -> Option<u32> {
        self.pass();
        let found = *map(&self.held.borrow()).get(key)?;
        self.pass();
        let held = self.held.borrow();
        match map(&held).get(key) {
            Some(still) if *still == found => Some(found),
            Some(_) | None => {
                let others: Vec<u32> = map(&held).values().copied().chain([found]).collect();
                Some(self.dice.borrow_mut().pick(&others))
            }
        }
    }
}

/// The maps of a family, as a packet sees them.
struct Of<'a, 'b, A: Address> {
    packet: &'a Packet<'b>,
    family: fn(&Held<W>) -> &HeldFamily<A>,
}

impl<A: OfFamily> Lookups<A, W> for Of<'_, '_, A> {
    type Row = Box<Bits<W>>;

    fn generation(&self) -> Generation {
        self.packet.held.borrow().generation
    }
    fn place(&self, address: &A) -> Option<u32> {
        self.packet.element(|held| &(self.family)(held).places, address)
    }
    fn record(&self, place: u32) -> Option<Record<A>> {
        self.packet.pass();
        (self.family)(&self.packet.held.borrow()).records.get(&place).copied()
    }
    fn network(&self, address: &A) -> Option<[u32; 2]> {
        self.packet.pass();
        let held = self.packet.held.borrow();
        let networks = &(self.family)(&held).networks;
        npm_agent::backend::ebpf::lower::longest(networks, *address, A::BITS).map(|(_, rows)| *rows)
    }
    fn pair_place(&self, pair: &A::Pair) -> Option<u32> {
        self.packet.element(|held| &(self.family)(held).pairs, pair)
    }
    fn pair_record(&self, place: u32) -> Option<PairRecord<A::Pair>> {
        self.packet.pass();
        (self.family)(&self.packet.held.borrow()).pair_records.get(&place).copied()
    }
    fn policy(&self, id: u32) -> Option<Policy> {
        self.packet.pass();
        Some(self.packet.held.borrow().policies.get(&id).copied().unwrap_or_default())
    }
    fn row(&self, index: u32) -> Option<Box<Bits<W>>> {
        self.packet.pass();
        Some(Box::new(self.packet.held.borrow().rows.get(&index).copied().unwrap_or([0; W])))
    }
    fn row_at(&self, policy: &Policy, position: u32) -> u32 {
        let segment = |index: u32| {
            self.packet.pass();
            Some(self.packet.held.borrow().segments.get(&index).copied().unwrap_or_default())
        };
        decide::row_at(segment, policy, position)
    }
    fn meet(&self, row: &Bits<W>, bits: &Bits<W>) -> bool {
        decide::meet(row, bits)
    }
}

fn judged(packet: &Packet<'_>, flow: &Flow) -> Verdict {
    fn of<A: OfFamily>(of: Of<'_, '_, A>, source: A, destination: A, transport: Transport) -> Verdict {
        let port = match transport {
            Transport::Port(protocol, port) => Some((protocol.number(), port)),
            Transport::Portless(_) => None,
        };
        decide::decide(&of, &decide::Flow { source, destination, port })
    }
    match (flow.source, flow.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let maps: Of<'_, '_, V4> = Of { packet, family: |held| &held.v4 };
            of(maps, source.octets(), destination.octets(), flow.transport)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let maps: Of<'_, '_, V6> = Of { packet, family: |held| &held.v6 };
            of(maps, source.octets(), destination.octets(), flow.transport)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Verdict::default(),
    }
}

fn lowered(held: &Held<W>, goal: &Goal) -> Result<Lowered<W>, TestCaseError> {
    lower_with(goal, &held.numbers()).map_err(|error| TestCaseError::fail(error.to_string()))
}

/// Maps with room for a goal and a little more, so that everything is reused that may be.
fn little_room(goal: &Goal, room: u32) -> Result<Limits, TestCaseError> {
    let held = Held::default();
    let wanted = lowered(&held, goal)?;
    let filled = filled(&wanted, &Limits::OBJECT).map_err(|full| TestCaseError::fail(full.to_string()))?;
    let most = |v4: usize, v6: usize| u32::try_from(v4.max(v6)).expect("small worlds") + room;
    let (v4, v6) = (&filled.v4, &filled.v6);
    Ok(Limits {
        records: most(v4.places.len(), v6.places.len()),
        networks: most(v4.networks.len(), v6.networks.len()),
        pairs: most(v4.pairs.len(), v6.pairs.len()),
        policies: most(filled.policies.len() + 1, 0) + 1,
        segments: most(filled.segments.len(), 0) + 4 * room,
        rows: most(filled.rows.len() + 1, 0) + room,
    })
}

/// Takes the maps to a goal, and looks at every instant. Ends early after `cut` steps. Whichever way the steps were found, at
/// the end lowering everything finds nothing that is left to do.
fn walk(
    (held, lowering): (&mut Held<W>, &mut Lowering<W>),
    goal: &Goal,
    probes: &[Flow],
    cut: Option<usize>,
    (limits, dice, seen): (&Limits, &mut SplitMix, &Seen),
) -> Result<(), TestCaseError> {
    let before: Vec<Verdict> = probes.iter().map(|flow| held.decide(flow)).collect();
    let after: Vec<Verdict> = probes.iter().map(|flow| plain(&goal.verdict(flow))).collect();
    prop_assert!(needed_bits(goal) <= most_bits(goal));
    let steps = match lowering.steps(held, goal, limits) {
        Ok(steps) => steps,
        Err(Unfit::Lower(error)) => return Err(TestCaseError::fail(error.to_string())),
        Err(Unfit::Full(_)) => {
            add(&seen.full, 1);
            return strict(held, goal, probes, limits);
        }
    };
    add(&seen.plans, 1);
    let by_difference = lowering.is_kept() && !steps.is_empty();
    add(&seen.by_difference, usize::from(by_difference));
    let gives_bits = steps.iter().any(|step| matches!(step, Step::Write(Write::Meaning(..))));
    add(&seen.turned_over, usize::from(by_difference && gives_bits));
    let steps = &steps[..cut.unwrap_or(usize::MAX).min(steps.len())];
    // Packets that began before the last switch are not played here: nothing may be written before they have ended.
    let waits = held.readers == Readers::Current || steps.first().is_none_or(|first| *first == Step::Grace);
    prop_assert!(waits, "programs of before may still read what is written: {:#?}", steps);
    let began = held.generation;
    let start = held.clone();
    let mut states = Vec::new();
    for (index, now) in steps.iter().enumerate() {
        // A packet that begins to be judged here, for some writes.
        if dice.next().is_multiple_of(3) {
            states.push((index, held.clone()));
        }
        step(held, now, limits).map_err(TestCaseError::fail)?;
        add(&seen.writes, 1);
        add(&seen.graces, usize::from(*now == Step::Grace));
        // What is not led to by the half in use is not seen: look where something might be.
        let expected = if held.generation == began { &before } else { &after };
        for (flow, expected) in probes.iter().zip(expected) {
            add(&seen.checked, 1);
            prop_assert_eq!(held.decide(flow), *expected, "{} after step {} of {:#?}", flow, index, steps);
        }
    }
    for (index, state) in states {
        for _ in 0..6 {
            let probe = usize::try_from(dice.next() % probes.len() as u64).expect("below a length");
            let packet = Packet {
                held: RefCell::new(state.clone()),
                coming: RefCell::new(steps[index..].iter()),
                dice: RefCell::new(SplitMix(dice.next())),
                limits,
                passed: Cell::new(0),
            };
            let verdict = judged(&packet, &probes[probe]);
            add(&seen.raced, 1);
            add(&seen.passed, usize::from(packet.passed.get() > 0));
            prop_assert!(
                verdict == before[probe] || verdict == after[probe],
                "{} from step {}: {:?}, neither {:?} nor {:?}\n{:#?}\n{:?}",
                &probes[probe],
                index,
                verdict,
                &before[probe],
                &after[probe],
                steps,
                start
            );
        }
    }
    if cut.is_some() {
        lowering.forget();
    } else {
        lowering.done(held, goal, limits);
        for (flow, after) in probes.iter().zip(&after) {
            prop_assert_eq!(held.decide(flow), *after, "{} at the end", flow);
        }
        // The other half is made the same, or left as it is; packets see neither.
        if dice.next().is_multiple_of(2) {
            for now in lowering.settle(held, limits) {
                step(held, &now, limits).map_err(TestCaseError::fail)?;
                for (flow, after) in probes.iter().zip(&after) {
                    prop_assert_eq!(held.decide(flow), *after, "{} after {:?}", flow, now);
                }
            }
            for left in settle(held, limits) {
                // A prefix that says what the next shorter one says goes when everything is looked at.
                let is_idle = matches!(
                    left,
                    Step::Grace
                        | Step::Write(
                            Write::V4(FamilyWrite::DropNetwork(_)) | Write::V6(FamilyWrite::DropNetwork(_))
                        )
                );
                prop_assert!(is_idle, "not settled: {:?}", left);
            }
        }
        // Only sweeping is left, and then nothing.
        for step_now in
            plan(held, &lowered(held, goal)?, limits).map_err(|full| TestCaseError::fail(full.to_string()))?
        {
            let sweeps = match &step_now {
                Step::Grace => true,
                Step::Write(Write::V4(write)) => is_sweep(write),
                Step::Write(Write::V6(write)) => is_sweep(write),
                Step::Write(_) => false,
            };
            prop_assert!(sweeps, "not settled: {:?}", step_now);
        }
    }
    Ok(())
}

/// What a goal does that does not fit: whoever it isolates is, and all else is as it was.
fn strict(held: &mut Held<W>, goal: &Goal, probes: &[Flow], limits: &Limits) -> Result<(), TestCaseError> {
    let before: Vec<Verdict> = probes.iter().map(|flow| held.decide(flow)).collect();
    let were_one: Vec<bool> = probes.iter().map(|flow| is_of_one_pod(held, flow)).collect();
    let Ok(steps) = isolate(held, &isolated(goal), limits) else { return Ok(()) };
    for now in &steps {
        step(held, now, limits).map_err(TestCaseError::fail)?;
    }
    for ((flow, before), were_one) in probes.iter().zip(before).zip(were_one) {
        let (now, wanted) = (held.decide(flow), plain(&goal.verdict(flow)));
        for (now, before, wanted) in
            [(now.ingress, before.ingress, wanted.ingress), (now.egress, before.egress, wanted.egress)]
        {
            let newly = before == Judgement::NotIsolated && wanted != Judgement::NotIsolated;
            if were_one && (newly || now != before) {
                // They were one pod's addresses, and are not any more: the policies of before are asked.
                prop_assert!(now != Judgement::NotIsolated, "{}: still one pod's", flow);
                continue;
            }
            // A pod to itself is not isolated, before and after; the pod that it will be is not known yet.
            let expected = if newly { Judgement::Denied } else { before };
            prop_assert!(
                now == expected || now == Judgement::Denied,
                "{}: {:?}, not {:?}",
                flow,
                now,
                expected
            );
            prop_assert!(
                now == expected || wanted == Judgement::NotIsolated,
                "{}: {:?}, not {:?}",
                flow,
                now,
                expected
            );
        }
    }
    prop_assert_eq!(isolate(held, &isolated(goal), limits), Ok(vec![]));
    Ok(())
}

/// Whether the maps say that both ends are one pod.
fn is_of_one_pod(held: &Held<W>, flow: &Flow) -> bool {
    let half = held.half();
    let pod = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => held.v4.record(&ip.octets()).map(|(_, record)| record.halves[half].pod),
        IpAddr::V6(ip) => held.v6.record(&ip.octets()).map(|(_, record)| record.halves[half].pod),
    };
    matches!((pod(flow.source), pod(flow.destination)), (Some(one), Some(other)) if one == other && one != 0)
}

fn is_sweep<A: Address>(write: &FamilyWrite<A>) -> bool {
    matches!(write, FamilyWrite::Unplace(_) | FamilyWrite::DropNetwork(_) | FamilyWrite::PairUnplace(_))
}

/// The flows that decide: those of the worlds before and after.
fn probes(worlds: [&World; 2], seed: u64) -> Vec<Flow> {
    let all: BTreeSet<Flow> = worlds.into_iter().flat_map(|world| flows(world, 150, seed)).collect();
    all.into_iter().collect()
}

fn compiler(changes: Vec<Change>) -> Compiler {
    let mut compiler = Compiler::new(NODES[0]);
    compiler.apply(changes);
    compiler
}

/// What a process that has just started knows of the maps.
#[derive(Clone, Copy, Debug)]
enum Adopter {
    /// All that the maps hold.
    Reads,
    /// Not what bits mean: all numbers are others.
    Renumbers,
}

#[test]
fn packets_see_the_old_goal_or_the_new() {
    let seen = Seen::default();
    let adopters = select(vec![Adopter::Reads, Adopter::Reads, Adopter::Renumbers]);
    let strategy = (world(), sequence(2..8), any::<u64>(), 1usize..4, adopters);
    check(REGRESSIONS, "plans", 120, strategy, |(start, changes, seed, at_once, adopter)| {
        let mut dice = SplitMix(seed);
        let mut compiler = compiler(start);
        let (mut held, mut lowering) = (Held::<W>::default(), Lowering::default());
        let empty = World::default();
        let all = probes([compiler.world(), &empty], seed);
        let limits = match dice.next() % 4 {
            0 => Limits::OBJECT,
            some => little_room(&compiler.goal(), [0, 3, 8, 20][usize::try_from(some).expect("below 4")])?,
        };
        walk((&mut held, &mut lowering), &compiler.goal(), &all, None, (&limits, &mut dice, &seen))?;
        for changes in changes.chunks(at_once) {
            let before = compiler.clone();
            compiler.apply(changes.to_vec());
            let (old, new) = (before.goal(), compiler.goal());
            let probes = probes([before.world(), compiler.world()], seed);
            let third =
                [&new, &old, &Goal::default()][usize::try_from(dice.next() % 3).expect("below 3")].clone();
            // Cut short, twice, then on: to the new state, back to the old one, or to nothing.
            let (mut other, mut found) = (held.clone(), Lowering::default());
            for goal in [&new, &old] {
                let cut = usize::try_from(dice.next() % 40).expect("small");
                walk((&mut other, &mut found), goal, &probes, Some(cut), (&limits, &mut dice, &seen))?;
                other.readers = Readers::Behind;
                match adopter {
                    Adopter::Reads => {}
                    Adopter::Renumbers => other.meanings.clear(),
                }
            }
            walk((&mut other, &mut found), &third, &probes, None, (&limits, &mut dice, &seen))?;
            walk((&mut other, &mut found), &new, &probes, None, (&limits, &mut dice, &seen))?;
            // Whole, and on from there.
            walk((&mut held, &mut lowering), &new, &probes, None, (&limits, &mut dice, &seen))?;
        }
        Ok(())
    });
    let Seen { writes, checked, raced, passed, graces, plans, by_difference, turned_over, full } = &seen;
    println!(
        "{} plans ({} by difference, in {} of them other bits) and {} that did not fit; {} steps, {} of them waits, {} verdicts between; {} packets, {} of them saw writes",
        plans.get(),
        by_difference.get(),
        turned_over.get(),
        full.get(),
        writes.get(),
        graces.get(),
        checked.get(),
        raced.get(),
        passed.get()
    );
    assert!(passed.get() > 5_000 && graces.get() > 300 && full.get() > 10 && turned_over.get() > 40);
}

/// Pods and policies come, go and change, namespaces are relabelled: nearly all of it is found by what differs, and each time
/// it is what lowering everything would have found.
#[test]
fn what_differs_leads_where_everything_does() {
    let seen = Seen::default();
    let strategy = (world(), sequence(30..60), any::<u64>());
    check(REGRESSIONS, "differences", 40, strategy, |(start, changes, seed)| {
        let mut dice = SplitMix(seed);
        let has_blocks = dice.next().is_multiple_of(4);
        let some = |changes: Vec<Change>| match has_blocks {
            true => changes,
            // Where a block comes or goes, everything is looked at.
            false => changes.into_iter().map(without_blocks).collect(),
        };
        let (mut compiler, changes) = (compiler(some(start)), some(changes));
        let (mut held, mut lowering) = (Held::<W>::default(), Lowering::default());
        for change in changes {
            let before = compiler.world().clone();
            compiler.apply([change]);
            let probes = probes([&before, compiler.world()], dice.next());
            let known = (&Limits::OBJECT, &mut dice, &seen);
            walk((&mut held, &mut lowering), &compiler.goal(), &probes, None, known)?;
        }
        Ok(())
    });
    let Seen { plans, by_difference, turned_over, passed, .. } = &seen;
    println!(
        "{} plans, {} by difference, in {} of them other bits; {} packets saw writes",
        plans.get(),
        by_difference.get(),
        turned_over.get(),
        passed.get()
    );
    assert!(by_difference.get() > 80 && turned_over.get() > 40 && passed.get() > 1_000);
}

fn without_blocks(change: Change) -> Change {
    let Change::Policy(key, Some(mut policy)) = change else { return change };
    for rule in policy.ingress.iter_mut().chain(&mut policy.egress).flatten() {
        match &mut rule.peers {
            Peers::Any => {}
            Peers::Only(peers) => peers.retain(|peer| !matches!(peer, Peer::Block(_))),
        }
    }
    Change::Policy(key, Some(policy))
}

/// In a large cluster one pod's change costs a few writes, by difference, and no more of them however many pods there are.
#[test]
fn one_pod_costs_what_it_changes() {
    let cluster = Cluster { namespaces: 200 };
    let mut compiler = Compiler::new(bench::cluster::NODE);
    compiler.apply(cluster.changes());
    let (mut held, mut lowering) = (Held::<16>::default(), Lowering::default());
    let goal = compiler.goal();
    let steps = lowering.steps(&held, &goal, &Limits::OBJECT).expect("it fits");
    assert!(steps.len() > 4000, "{} steps for the first goal", steps.len());
    carry_out(&mut held, &steps);
    lowering.done(&held, &goal, &Limits::OBJECT);
    let steps = lowering.settle(&held, &Limits::OBJECT);
    carry_out(&mut held, &steps);
    for number in 0..30 {
        let probe = cluster.probe(number);
        compiler.apply([Change::Pod(probe.key, probe.pod)]);
        let goal = compiler.goal();
        let steps = lowering.steps(&held, &goal, &Limits::OBJECT).expect("it fits");
        assert!(lowering.is_kept(), "event {number}: everything was lowered");
        // Its record and place, those of the event before, a new row, perhaps a policy with its segments; the switch.
        assert!((1..=14).contains(&steps.len()), "event {number}: {steps:?}");
        carry_out(&mut held, &steps);
        lowering.done(&held, &goal, &Limits::OBJECT);
    }
}

fn carry_out(held: &mut Held<16>, steps: &[Step<16>]) {
    for step in steps {
        match step {
            Step::Grace => held.readers = Readers::Current,
            Step::Write(write) => held.write(write),
        }
    }
}

/// Every map's limit is met, named, and changes nothing; what fits is taken in afterwards.
#[test]
fn what_does_not_fit_is_refused() {
    let mut changes = cluster(2, 12, 10, NODES[0]);
    for change in &mut changes {
        match change {
            Change::Pod(_, Some(pod)) => pod.node = Some(NODES[0].into()),
            Change::Policy(_, Some(policy)) => {
                let blocks = ["10.0.0.0/8", "10.0.0.0/24"].map(|cidr| {
                    Peer::Block(Block { cidr: cidr.parse().expect("a block"), except: BTreeSet::new() })
                });
                let peers = Peers::Only(blocks.into());
                let port = Port::Range { protocol: Protocol::Udp, first: 53, last: 53 };
                let rule = Rule { peers, ports: Ports::Only(vec![port]) };
                policy.egress.get_or_insert_default().push(rule);
            }
            Change::Namespace(..) | Change::Pod(_, None) | Change::Policy(_, None) => {}
        }
    }
    let compiler = compiler(changes);
    let wanted = lowered(&Held::default(), &compiler.goal()).expect("few bits");
    let held = filled(&wanted, &Limits::OBJECT).expect("there is room");
    let count = |number: usize| u32::try_from(number).expect("few");
    let exact = Limits {
        records: count(held.v4.places.len()),
        networks: count(held.v4.networks.len()),
        pairs: count(held.v4.pairs.len()),
        policies: count(held.policies.len()) + 1,
        segments: count(held.segments.len()),
        rows: count(held.rows.len()) + 1,
    };
    assert_eq!(filled(&wanted, &exact).expect("it fits exactly"), held);
    for (map, limits) in [
        (MapName::Records, Limits { records: exact.records - 1, ..exact }),
        (MapName::Networks, Limits { networks: exact.networks - 1, ..exact }),
        (MapName::Pairs, Limits { pairs: exact.pairs - 1, ..exact }),
        (MapName::Policies, Limits { policies: exact.policies - 1, ..exact }),
        (MapName::Segments, Limits { segments: exact.segments - 1, ..exact }),
        (MapName::Rows, Limits { rows: exact.rows - 1, ..exact }),
    ] {
        let full: Full = filled(&wanted, &limits).expect_err("one too many");
        assert_eq!(full.map, map, "{full}");
        println!("{full}");
        filled(&lowered(&Held::default(), &Goal::default()).expect("no bits"), &limits)
            .expect("nothing fits");
    }
}
