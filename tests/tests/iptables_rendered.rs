//! The rendered iptables state, written as text, read back and interpreted, decides as the Goal does; whatever mark a
//! packet comes with, and leaves no mark behind. The connection of what it allows carries the proof, of what it denies not.

use npm_agent::backend::iptables::interpret::{End, Packet, follow};
use npm_agent::backend::iptables::layout::Established;
use npm_agent::backend::iptables::render::{Form, Rendered};
use npm_agent::backend::iptables::state::CtState;
use npm_common::mark::ProofBit;
use npm_policy::compile::compile;
use npm_policy::flow::Decision;
use npm_policy::goal::Family;
use npm_tests::random::{NODES, flows, world, world_of};
use proptest::prelude::*;

fn proof_bits() -> impl Strategy<Value = ProofBit> {
    (0..32_u32).prop_filter_map("means something in packet marks", |bit| ProofBit::new(1 << bit))
}

fn established() -> impl Strategy<Value = Established> {
    prop_oneof![Just(Established::Keep), Just(Established::Cut)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 700, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rendered_rules_decide_as_the_goal(changes in world(), seed in any::<u64>(), mark in any::<u32>(), bit in proof_bits(), established in established()) {
        let world = world_of(changes);
        for node in NODES {
            let (goal, _) = compile(&world, node);
            let rendered = Rendered::in_form(&goal, Form { proof: bit, established });
            for flow in flows(&world, 80, seed) {
                let expected = goal.verdict(&flow).decision();
                prop_assert_eq!(rendered.decide(&flow).unwrap(), expected, "{}", flow);
                // What somebody cut is another matter, below.
                let connection_mark = mark & !bit.cut_mask();
                // Whoever marked the packet before us: it decides nothing, and other people's bits stay.
                let state = rendered.family(Family::of(flow.source));
                let mut packet = Packet { mark, connection_mark, ..Packet::opening(&flow) };
                let end = follow(state, &mut packet, &mut None).unwrap();
                let entered = state.chains.values().any(|chain| chain.len() > 1);
                let proof = match (entered, end) {
                    (false, _) => connection_mark,
                    (true, End::GoesOn) => connection_mark | bit.mask(),
                    (true, End::Dropped | End::Accepted) => connection_mark & !bit.mask(),
                };
                prop_assert_eq!(packet.connection_mark, proof, "{} in a connection with mark {:#x}", flow, mark);
                let decision = if end == End::Dropped { Decision::Deny } else { Decision::Allow };
                prop_assert_eq!(decision, expected, "{} with mark {:#x}", flow, mark);
                if end == End::GoesOn {
                    let left = if entered { mark & !0xe00 } else { mark };
                    prop_assert_eq!(packet.mark, left);
                }
                // An allowed connection's packets are not judged again; a packet of none is.
                for (ct, judged) in [
                    (CtState::Established, false),
                    (CtState::Related, false),
                    (CtState::Invalid, true),
                    (CtState::Untracked, true),
                ] {
                    let mut packet = Packet { state: ct, connection_mark, ..Packet::opening(&flow) };
                    let end = follow(state, &mut packet, &mut None).unwrap();
                    prop_assert_eq!(packet.connection_mark, connection_mark, "{} {:?}", flow, ct);
                    let dropped = judged && expected == Decision::Deny;
                    prop_assert_eq!(end == End::Dropped, dropped, "{} {:?}", flow, ct);
                    // The cut bit drops what belongs to a connection, where connections are cut.
                    let connection_mark = connection_mark | bit.cut_mask();
                    let mut packet = Packet { state: ct, connection_mark, ..Packet::opening(&flow) };
                    let end = follow(state, &mut packet, &mut None).unwrap();
                    let cut = established == Established::Cut && entered && !judged;
                    prop_assert_eq!(end == End::Dropped, dropped || cut, "{} {:?}, cut", flow, ct);
                }
            }
        }
    }
}
