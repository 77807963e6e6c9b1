//! The decision on maps made by hand.

extern crate std;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::layout::V4;

/// Addresses have places in their order; a reader is sent astray as often as `astray` says.
#[derive(Default)]
struct Maps {
    generation: Generation,
    records: BTreeMap<V4, [Known; 2]>,
    /// Covers every address.
    network: Option<[u32; 2]>,
    pairs: BTreeMap<[u8; 8], [u32; 2]>,
    policies: Vec<Policy>,
    segments: Vec<Segment>,
    rows: Vec<Bits<1>>,
    astray: Cell<u32>,
}

impl Maps {
    /// The place, or the next one while readers go astray.
    fn index<K: Ord>(&self, keys: &BTreeMap<K, impl Sized>, key: &K) -> Option<u32> {
        let place = u32::try_from(keys.keys().position(|it| it == key)?).unwrap();
        if self.astray.get() > 0 {
            self.astray.set(self.astray.get() - 1);
            return Some((place + 1) % keys.len() as u32);
        }
        Some(place)
    }
}

impl<'a> Lookups<V4, 1> for &'a Maps {
    type Row = &'a Bits<1>;

    fn generation(&self) -> Generation {
        self.generation
    }
    fn place(&self, address: &V4) -> Option<u32> {
        self.index(&self.records, address)
    }
    fn record(&self, place: u32) -> Option<Record<V4>> {
        let (address, halves) = self.records.iter().nth(place as usize)?;
        Some(Record { address: *address, halves: *halves })
    }
    fn network(&self, _: &V4) -> Option<[u32; 2]> {
        self.network
    }
    fn pair_place(&self, pair: &[u8; 8]) -> Option<u32> {
        self.index(&self.pairs, pair)
    }
    fn pair_record(&self, place: u32) -> Option<PairRecord<[u8; 8]>> {
        let (pair, rows) = self.pairs.iter().nth(place as usize)?;
        Some(PairRecord { pair: *pair, rows: *rows })
    }
    fn policy(&self, id: u32) -> Option<Policy> {
        self.policies.get(id as usize).copied()
    }
    fn row(&self, index: u32) -> Option<&'a Bits<1>> {
        self.rows.get(index as usize)
    }
    fn row_at(&self, policy: &Policy, position: u32) -> u32 {
        row_at(segments_of(&self.segments), policy, position)
    }
    fn meet(&self, row: &Bits<1>, bits: &Bits<1>) -> bool {
        meet(row, bits)
    }
}

fn segments_of(segments: &[Segment]) -> impl Fn(u32) -> Option<Segment> {
    |index| segments.get(index as usize).copied()
}

const POD: V4 = [10, 0, 0, 1];
const TWIN: V4 = [10, 0, 0, 2];
const PEER: V4 = [10, 0, 0, 3];
const HOST: V4 = [192, 0, 2, 1];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// `POD` and `TWIN` are one pod. In: TCP/80-89 from bit 1, whatever from bit 2. Out: bit 3's named ports.
fn maps() -> Maps {
    let pod = Known { ingress: 1, egress: 2, pod: 7, row: NOBODY };
    let peer = Known { row: 4, ..Known::NOTHING };
    let segment =
        |first, last, row| Segment { first: position(TCP, first), last: position(TCP, last), row, pad: 0 };
    Maps {
        records: [(POD, [pod; 2]), (TWIN, [pod; 2]), (PEER, [peer; 2])].into(),
        network: Some([2; 2]),
        pairs: [(PEER.pair(TCP, 80), [3; 2]), (PEER.pair(TCP, 82), [NOBODY; 2])].into(),
        policies: vec![
            Policy::default(),
            Policy { first: 0, segments: 1, rest: 2, pairs: 0 },
            Policy { first: 1, segments: 1, rest: 0, pairs: 1 },
        ],
        segments: vec![segment(80, 89, 1), segment(0, u16::MAX, 3)],
        rows: vec![[0], [0b110], [0b100], [0b1000], [0b10]],
        ..Maps::default()
    }
}

fn verdict(maps: &Maps, source: V4, destination: V4, port: Option<(u8, u16)>) -> (Judgement, Judgement) {
    let Verdict { ingress, egress } = decide(&maps, &Flow { source, destination, port });
    (ingress, egress)
}

#[test]
fn every_map_has_its_say() {
    use Judgement::{Allowed, Denied, NotIsolated};
    let maps = maps();
    for (source, destination, port, expected) in [
        (PEER, POD, Some((TCP, 80)), (Allowed, NotIsolated)),
        (PEER, POD, Some((TCP, 89)), (Allowed, NotIsolated)),
        (PEER, POD, Some((TCP, 79)), (Denied, NotIsolated)),
        (PEER, POD, Some((TCP, 90)), (Denied, NotIsolated)),
        (PEER, POD, Some((UDP, 80)), (Denied, NotIsolated)),
        (PEER, POD, None, (Denied, NotIsolated)),
        // A pod's row holds its blocks' bits: the networks are not asked.
        (HOST, POD, Some((UDP, 80)), (Allowed, NotIsolated)),
        (HOST, POD, None, (Allowed, NotIsolated)),
        (POD, PEER, Some((TCP, 80)), (NotIsolated, Allowed)),
        (POD, PEER, Some((UDP, 80)), (NotIsolated, Denied)),
        (POD, PEER, Some((TCP, 81)), (NotIsolated, Denied)),
        (POD, HOST, None, (NotIsolated, Denied)),
        (POD, POD, Some((TCP, 1)), (NotIsolated, NotIsolated)),
        (POD, TWIN, Some((TCP, 1)), (NotIsolated, NotIsolated)),
        (PEER, HOST, None, (NotIsolated, NotIsolated)),
    ] {
        assert_eq!(
            verdict(&maps, source, destination, port),
            expected,
            "{source:?} {destination:?} {port:?}"
        );
    }
}

#[test]
fn any_peer_needs_no_membership() {
    let mut maps = maps();
    maps.network = None;
    assert_eq!(verdict(&maps, HOST, POD, None).0, Judgement::Denied);
    maps.rows[2] = [1];
    assert_eq!(verdict(&maps, HOST, POD, None).0, Judgement::Allowed);
}

#[test]
fn what_leads_nowhere_denies() {
    let mut maps = maps();
    maps.rows = vec![[0]];
    assert_eq!(verdict(&maps, HOST, POD, None).0, Judgement::Denied);
    maps.policies.clear();
    assert_eq!(verdict(&maps, HOST, POD, None).0, Judgement::Denied);
    let mut maps = self::maps();
    // Without its segments a policy allows what it allows on every port.
    maps.segments.clear();
    assert_eq!(verdict(&maps, PEER, POD, Some((TCP, 80))).0, Judgement::Denied);
    assert_eq!(verdict(&maps, HOST, POD, Some((TCP, 80))).0, Judgement::Allowed);
}

/// Whatever says something of an address says it by generation.
#[test]
fn a_generation_is_one_state() {
    use Judgement::{Allowed, Denied, NotIsolated};
    let mut maps = maps();
    for halves in maps.records.values_mut() {
        halves[1] = Known::NOTHING;
    }
    maps.network = Some([2, NOBODY]);
    maps.pairs.insert(PEER.pair(TCP, 80), [3, NOBODY]);
    let flows = [(PEER, POD, 80), (POD, PEER, 80), (HOST, POD, 1), (POD, TWIN, 1)];
    let judged = |maps: &Maps| flows.map(|(from, to, port)| verdict(maps, from, to, Some((TCP, port))));
    let free = (NotIsolated, NotIsolated);
    assert_eq!(judged(&maps), [(Allowed, NotIsolated), (NotIsolated, Allowed), (Allowed, NotIsolated), free]);
    maps.generation = 1;
    assert_eq!(judged(&maps), [free; 4]);
    maps.records.get_mut(&POD).unwrap()[1] = Known { ingress: 1, egress: 2, pod: 0, row: NOBODY };
    // The networks' and the pair's halves are of this generation too.
    assert_eq!(
        judged(&maps),
        [(Denied, NotIsolated), (NotIsolated, Denied), (Denied, NotIsolated), (NotIsolated, Denied)]
    );
}

/// A place that leads to another's record is looked up again, and denies if it goes on.
#[test]
fn anothers_record_is_never_read() {
    use Judgement::{Allowed, Denied, NotIsolated};
    let maps = maps();
    for astray in 0..LOOKS {
        for (source, destination, expected) in
            [(PEER, POD, (Allowed, NotIsolated)), (POD, PEER, (NotIsolated, Allowed))]
        {
            maps.astray.set(astray);
            assert_eq!(verdict(&maps, source, destination, Some((TCP, 80))), expected, "{astray} times");
        }
    }
    for astray in [LOOKS, 100] {
        maps.astray.set(astray);
        assert_eq!(verdict(&maps, PEER, POD, Some((TCP, 80))), (Denied, Denied));
    }
    // The pair's alone.
    for (astray, expected) in [(0, Allowed), (LOOKS - 1, Allowed), (LOOKS, Denied)] {
        let pair = PEER.pair(TCP, 80);
        maps.astray.set(astray);
        assert_eq!(pair_row(&&maps, 0, &pair).ok(), (expected == Allowed).then_some(3));
    }
}

#[test]
fn segments_are_found_whatever_their_number() {
    for count in [0u16, 1, 2, 3, 4, 5, 31, 32, 33, 1000] {
        let segments: Vec<Segment> = (0..count)
            .map(|i| Segment {
                first: position(TCP, 10 + i * 10),
                last: position(TCP, 14 + i * 10),
                row: u32::from(i),
                pad: 0,
            })
            .collect();
        let policy = Policy { first: 3, segments: u32::from(count), rest: 0, pairs: 0 };
        let foreign = Segment { first: 0, last: u32::MAX, row: 99_999, pad: 0 };
        let around = [vec![foreign; 3], segments, vec![foreign]].concat();
        for port in 0..count * 10 + 30 {
            let expected =
                (port >= 10 && port % 10 < 5 && port / 10 <= count).then(|| u32::from(port / 10) - 1);
            let found = find(segments_of(&around), &policy, position(TCP, port)).map(|segment| segment.row);
            assert_eq!(found, expected, "port {port} among {count}");
        }
        assert_eq!(find(segments_of(&around), &policy, position(UDP, 10)), None);
    }
}

#[test]
fn the_longest_run_is_searched_to_its_ends() {
    let segments: Vec<Segment> =
        (0..MAX_SEGMENTS).map(|i| Segment { first: i, last: i, row: i, pad: 0 }).collect();
    let policy = Policy { first: 0, segments: MAX_SEGMENTS, rest: 0, pairs: 0 };
    for wanted in [0, 1, MAX_SEGMENTS / 2, MAX_SEGMENTS - 2, MAX_SEGMENTS - 1] {
        assert_eq!(find(segments_of(&segments), &policy, wanted).map(|segment| segment.row), Some(wanted));
    }
    assert_eq!(find(segments_of(&segments), &policy, MAX_SEGMENTS), None);
}

#[test]
fn codes_are_read_back_and_nothing_else_is_a_code() {
    let all = [Judgement::Denied, Judgement::Allowed, Judgement::NotIsolated];
    for ingress in all {
        for egress in all {
            let verdict = Verdict { ingress, egress };
            assert_eq!(Verdict::of(verdict.code()), Some(verdict));
            assert_eq!(verdict.allows(), ingress != Judgement::Denied && egress != Judgement::Denied);
        }
    }
    for code in [0, 1, 2, 3, u32::MAX, UNREAD | 1, VERDICT, VERDICT | 0x44, VERDICT | 0x10, VERDICT | 1] {
        assert_eq!(Verdict::of(code), None, "{code:#x}");
    }
}

#[test]
fn only_what_carries_ports_has_one() {
    use crate::packet::{Addresses, Ports, Protocol};
    let addresses = Addresses::V4 { source: POD.into(), destination: PEER.into() };
    let ports = Some(Ports { source: 1, destination: 80 });
    for (fragment, ports, expected) in [
        (Fragment::None, ports, Some((TCP, 80))),
        (Fragment::First, ports, Some((TCP, 80))),
        (Fragment::Later, None, None),
        (Fragment::None, None, None),
    ] {
        let packet = Packet { addresses, protocol: Protocol::TCP, ports, icmpv6_type: None, fragment };
        assert_eq!(port_of(&packet), expected);
    }
}
