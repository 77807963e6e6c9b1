//! What rules have counted and sets hold, as last read: reading rules costs a process, so scrapes do not.
//!
//! The kernel counts what a rule drops, and starts again from 0 where the rule's chain is written anew. Every apply reads
//! before it writes, so what was counted is added up here; what a chain counts between that reading and its writing is lost.
//! The kernel does not count what policies allow: a packet meets an allow rule of each policy that has one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use npm_policy::goal::Family;

use super::layout;
use super::state::{Name, Rule, SetKind, State, Target};
use super::text::Filter;
use crate::backend::meter::{Direction, Judged, Meter, Reading, Store};

/// The kernel's number of a set is of 16 bits, and the highest is no set's (IPSET_INVALID_ID,
/// include/uapi/linux/netfilter/ipset/ip_set.h).
const MAX_SETS: u64 = 65_535;

/// Packets that met rules of one family.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Counts {
    /// Found denied by the direction's policies; a pod's packets to itself through a Service too, which pass.
    denied: BTreeMap<Direction, u64>,
    /// Dropped, of established connections that were cut.
    cut: u64,
}

impl Counts {
    /// What a table with its counters says.
    pub fn of(filter: &Filter) -> Self {
        let sum = |chain: &str, is_meant: &dyn Fn(&Rule) -> bool| -> u64 {
            let name = Name::from(chain);
            let lines = filter.chains.get(&name).into_iter().flat_map(|lines| lines.iter());
            let packets = filter.packets.get(&name).into_iter().flatten();
            let meant = lines.zip(packets).filter(|(line, _)| line.rule().is_some_and(is_meant));
            meant.map(|(_, packets)| packets).sum()
        };
        let to_denied = |rule: &Rule| rule.callee().is_some_and(|callee| **callee == *layout::DENIED);
        Self {
            denied: [(Direction::Ingress, layout::INGRESS), (Direction::Egress, layout::EGRESS)]
                .map(|(direction, chain)| (direction, sum(chain, &to_denied)))
                .into(),
            cut: sum(layout::ENTRY, &|rule| rule.target == Target::Drop),
        }
    }
}

impl Counts {
    /// Adds what was counted from one reading to the next. Less than before: somebody has written the chain anew.
    fn add_up(&mut self, before: &Self, now: &Self) {
        let grown = |before: u64, now: u64| now.checked_sub(before).unwrap_or(now);
        for (direction, now) in &now.denied {
            let before = before.denied.get(direction).copied().unwrap_or_default();
            *self.denied.entry(*direction).or_default() += grown(before, *now);
        }
        self.cut += grown(before.cut, now.cut);
    }

    /// A chain counts from 0.
    fn restart(&mut self, chain: &Name) {
        match &**chain {
            layout::INGRESS => self.denied.remove(&Direction::Ingress),
            layout::EGRESS => self.denied.remove(&Direction::Egress),
            layout::ENTRY => Some(std::mem::take(&mut self.cut)),
            _ => None,
        };
    }
}

/// What is known of one family.
#[derive(Clone, Debug, Default)]
struct OfFamily {
    /// Since the first reading.
    counts: Counts,
    /// What the kernel said last.
    read: Counts,
    sets: u64,
    /// Members of the fullest set of each kind.
    nets: u64,
    ports: u64,
}

/// What was last read.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted(Arc<Mutex<BTreeMap<Family, OfFamily>>>);

impl Counted {
    pub(super) fn note(&self, family: Family, read: Counts, state: &State) {
        let fullest = |kind: &SetKind| {
            let those = state.sets.values().filter(|set| set.kind == *kind);
            those.map(|set| set.members.len() as u64).max().unwrap_or_default()
        };
        let (nets, ports) = (fullest(&SetKind::Net), fullest(&SetKind::IpPort));
        let sets = state.sets.len() as u64;
        let mut families = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // What rules had counted before the first reading, an earlier agent has told.
        let known =
            families.entry(family).or_insert_with(|| OfFamily { read: read.clone(), ..OfFamily::default() });
        known.counts.add_up(&known.read, &read);
        *known = OfFamily { counts: std::mem::take(&mut known.counts), read, sets, nets, ports };
    }

    /// These chains of a family were written anew, and count from 0.
    pub(super) fn rewritten<'a>(&self, family: Family, chains: impl Iterator<Item = &'a Name>) {
        let mut families = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = families.get_mut(&family) {
            chains.for_each(|chain| known.read.restart(chain));
        }
    }

    pub(super) fn meter(&self) -> Meter {
        let counted = self.clone();
        Box::new(move || counted.reading())
    }

    fn reading(&self) -> Reading {
        let families = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |of: &dyn Fn(&OfFamily) -> u64| -> u64 { families.values().map(of).sum() };
        let most = |of: fn(&OfFamily) -> u64| families.values().map(of).max().unwrap_or_default();
        let denied =
            |direction| sum(&|family| family.counts.denied.get(&direction).copied().unwrap_or_default());
        let (ingress, egress) = (denied(Direction::Ingress), denied(Direction::Egress));
        let members = u64::from(super::text::MAX_MEMBERS);
        Reading {
            passes: Vec::new(),
            drops: vec![
                ("ingress_denied", ingress),
                ("egress_denied", egress),
                ("cut", sum(&|family| family.counts.cut)),
            ],
            verdicts: vec![
                (Direction::Ingress, Judged::Denied, ingress),
                (Direction::Egress, Judged::Denied, egress),
            ],
            unlogged: Vec::new(),
            // The kernel does not time rules.
            timed: Vec::new(),
            timekeeping: None,
            stores: vec![
                Store { name: "sets", used: sum(&|family| family.sets), limit: MAX_SETS },
                Store { name: "hash_net", used: most(|family| family.nets), limit: members },
                Store { name: "hash_ip_port", used: most(|family| family.ports), limit: members },
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::text::parse_filter;
    use super::*;

    /// As `iptables-save -c` prints.
    const SAVED: &str = "*filter
:FORWARD ACCEPT [1:2]
:AZURE-NPM - [0:0]
:AZURE-NPM-DENIED - [0:0]
:AZURE-NPM-EGRESS - [0:0]
:AZURE-NPM-INGRESS - [0:0]
:OTHER - [0:0]
[9:99] -A FORWARD -m conntrack ! --ctstate RELATED,ESTABLISHED -j AZURE-NPM
[3:30] -A AZURE-NPM -m connmark --mark 0x40000/0x40000 -j DROP
[8:80] -A AZURE-NPM -j AZURE-NPM-INGRESS
[6:60] -A AZURE-NPM-DENIED -j DROP
[2:20] -A AZURE-NPM-EGRESS -m mark --mark 0x800/0xa00 -j AZURE-NPM-DENIED
[5:50] -A AZURE-NPM-EGRESS -j MARK --set-xmark 0x0/0xa00
[4:40] -A AZURE-NPM-INGRESS -m mark --mark 0x400/0x600 -j AZURE-NPM-DENIED
[7:70] -A OTHER -j AZURE-NPM-DENIED
COMMIT
";

    #[test]
    fn counters_of_the_verdict_rules_are_read() {
        let filter = parse_filter(Family::V4, SAVED).unwrap();
        let expected = Counts { denied: [(Direction::Ingress, 4), (Direction::Egress, 2)].into(), cut: 3 };
        assert_eq!(Counts::of(&filter), expected);
        let plain: String = SAVED
            .lines()
            .map(|line| {
                format!("{}\n", line.split_once("] -A").map_or(line.to_owned(), |it| format!("-A{}", it.1)))
            })
            .collect();
        let uncounted = parse_filter(Family::V4, &plain).unwrap();
        assert_eq!(uncounted.chains, filter.chains, "counters are no part of rules");
        assert_eq!(Counts::of(&uncounted).cut, 0);
    }

    #[test]
    fn both_families_add_up() {
        let counted = Counted::default();
        let counts = |denied| Counts { denied: [(Direction::Ingress, denied)].into(), cut: 0 };
        for family in Family::BOTH {
            counted.note(family, counts(3), &State::empty(family));
            counted.note(family, counts(7), &State::empty(family));
        }
        let reading = counted.reading();
        assert!(reading.drops.contains(&("ingress_denied", 8)));
        assert!(reading.stores.contains(&Store { name: "sets", used: 0, limit: MAX_SETS }));
    }

    #[test]
    fn what_a_chain_counted_before_it_was_written_anew_is_not_lost() {
        let counted = Counted::default();
        let note = |denied, cut| {
            let counts = Counts { denied: [(Direction::Ingress, denied)].into(), cut };
            counted.note(Family::V4, counts, &State::empty(Family::V4));
            let Reading { drops, .. } = counted.reading();
            drops.into_iter().filter(|(_, count)| *count > 0).collect::<Vec<_>>()
        };
        assert_eq!(note(5, 1), [], "an earlier agent told of these");
        assert_eq!(note(7, 1), [("ingress_denied", 2)]);
        counted.rewritten(Family::V4, [Name::from(layout::INGRESS), "AZURE-NPM-X".into()].iter());
        assert_eq!(note(9, 4), [("ingress_denied", 11), ("cut", 3)], "nine since, though more than seven");
        assert_eq!(note(1, 4), [("ingress_denied", 12), ("cut", 3)], "somebody else has written it");
        counted.rewritten(Family::V4, [Name::from(layout::ENTRY)].iter());
        assert_eq!(note(1, 2), [("ingress_denied", 12), ("cut", 5)]);
    }
}
