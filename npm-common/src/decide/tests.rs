//! The decision on maps made by hand.

extern crate std;

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::layout::V4;

#[derive(Default)]
struct Maps {
    endpoints: BTreeMap<V4, Endpoint>,
    members: BTreeMap<V4, Bits<1>>,
    /// Covers every address.
    network: Option<Bits<1>>,
    pairs: BTreeMap<[u8; 8], Bits<1>>,
    policies: Vec<Policy>,
    segments: Vec<Segment>,
    rows: Vec<Bits<1>>,
}

impl Lookups<V4, 1> for Maps {
    fn endpoint(&self, address: &V4) -> Option<Endpoint> {
        self.endpoints.get(address).copied()
    }
    fn members(&self, address: &V4) -> Option<&Bits<1>> {
        self.members.get(address)
    }
    fn networks(&self, _: &V4) -> Option<&Bits<1>> {
        self.network.as_ref()
    }
    fn pairs(&self, pair: &[u8; 8]) -> Option<&Bits<1>> {
        self.pairs.get(pair)
    }
    fn policy(&self, id: u32) -> Option<Policy> {
        self.policies.get(id as usize).copied()
    }
    fn segment(&self, index: u32) -> Option<Segment> {
        self.segments.get(index as usize).copied()
    }
    fn row(&self, index: u32) -> Option<&Bits<1>> {
        self.rows.get(index as usize)
    }
}

const POD: V4 = [10, 0, 0, 1];
const TWIN: V4 = [10, 0, 0, 2];
const PEER: V4 = [10, 0, 0, 3];
const HOST: V4 = [192, 0, 2, 1];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// `POD` and `TWIN` are one pod. In: TCP/80-89 from bit 1, whatever from bit 2. Out: bit 3's named ports.
fn maps() -> Maps {
    let endpoint = Endpoint { ingress: 1, egress: 2, pod: 7, pad: 0 };
    let segment =
        |first, last, row| Segment { first: position(TCP, first), last: position(TCP, last), row, pad: 0 };
    Maps {
        endpoints: [(POD, endpoint), (TWIN, endpoint)].into(),
        members: [(PEER, [0b10])].into(),
        network: Some([0b100]),
        pairs: [(PEER.pair(TCP, 80), [0b1000])].into(),
        policies: vec![
            Policy::default(),
            Policy { first: 0, segments: 1, rest: 2, pairs: 0 },
            Policy { first: 1, segments: 1, rest: 0, pairs: 1 },
        ],
        segments: vec![segment(80, 89, 1), segment(0, u16::MAX, 3)],
        rows: vec![[0], [0b110], [0b100], [0b1000]],
    }
}

fn verdict(maps: &Maps, source: V4, destination: V4, port: Option<(u8, u16)>) -> (Judgement, Judgement) {
    let Verdict { ingress, egress } = decide(maps, &Flow { source, destination, port });
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
        let maps = Maps { segments: around, ..Maps::default() };
        for port in 0..count * 10 + 30 {
            let expected =
                (port >= 10 && port % 10 < 5 && port / 10 <= count).then(|| u32::from(port / 10) - 1);
            let found = find(&maps, &policy, position(TCP, port)).map(|segment| segment.row);
            assert_eq!(found, expected, "port {port} among {count}");
        }
        assert_eq!(find(&maps, &policy, position(UDP, 10)), None);
    }
}

#[test]
fn the_longest_run_is_searched_to_its_ends() {
    let segments: Vec<Segment> =
        (0..MAX_SEGMENTS).map(|i| Segment { first: i, last: i, row: i, pad: 0 }).collect();
    let maps = Maps { segments, ..Maps::default() };
    let policy = Policy { first: 0, segments: MAX_SEGMENTS, rest: 0, pairs: 0 };
    for wanted in [0, 1, MAX_SEGMENTS / 2, MAX_SEGMENTS - 2, MAX_SEGMENTS - 1] {
        assert_eq!(find(&maps, &policy, wanted).map(|segment| segment.row), Some(wanted));
    }
    assert_eq!(find(&maps, &policy, MAX_SEGMENTS), None);
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
