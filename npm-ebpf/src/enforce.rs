//! What becomes of a packet that leaves the node through an interface: it passes if its connection was judged and
//! allowed, and is judged otherwise.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::TcContext;
use npm_common::conntrack::{FAMILY_V4, FAMILY_V6, InTuple, State, Tuples, entry_of};
use npm_common::decide::{Flow, Lookups, Own, decide_with, port_of};
use npm_common::event::{Mode, OUTCOMES, Outcome};
use npm_common::layout::{Address, NOT_ISOLATED, V4, V6, WORDS};
use npm_common::packet::{
    Addresses, Bytes, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Fragment, Packet, ParseError, Protocol, parse_ip,
};

use crate::conntrack::{Read, Which};
use crate::maps::{Ipv4, Ipv6};
use crate::proof;
use crate::skb::NetworkBytes;

/// Packets by [`Outcome`].
#[map]
static OUTCOME: PerCpuArray<u64> = PerCpuArray::with_max_entries(OUTCOMES, 0);

/// The [`Mode`].
#[map]
static MODE: Array<u32> = Array::with_max_entries(1, 0);

/// The whole of a packet's way, as an action.
#[inline(always)]
pub(crate) fn enforce<R: Read>(context: &TcContext) -> i32 {
    let outcome = judge::<R>(context);
    if let Some(count) = OUTCOME.get_ptr_mut(outcome.slot()) {
        // SAFETY: the kernel gave the pointer to this CPU's value, and no other program of this CPU runs meanwhile.
        unsafe { *count += 1 };
    }
    match (outcome.passes(), mode()) {
        (true, _) | (false, Mode::Mark) => TC_ACT_UNSPEC,
        (false, Mode::Enforce) => TC_ACT_SHOT as i32,
    }
}

#[inline(always)]
fn mode() -> Mode {
    MODE.get(0).map_or(Mode::Enforce, |number| Mode::of(*number))
}

#[inline(always)]
fn judge<R: Read>(context: &TcContext) -> Outcome {
    // SAFETY: the kernel gave the pointer, and keeps what it is to until the program has ended.
    let came_by = unsafe { (*context.skb.skb).ingress_ifindex };
    // What the node itself sends has come in by no interface.
    if came_by == 0 {
        return Outcome::Local;
    }
    let Some(nfct) = R::nfct(context) else { return Outcome::NoConnection };
    match State::of(nfct) {
        State::Nothing => judge_headers(context),
        state => judge_connection::<R>(context, entry_of(nfct), state),
    }
}

/// Judges a packet by its connection.
#[inline(always)]
fn judge_connection<R: Read>(context: &TcContext, entry: u64, state: State) -> Outcome {
    let Some(original) = R::tuple(entry, Which::Original) else { return Outcome::NoConnection };
    // A packet that may be the first is always judged: the proof may be of an earlier connection.
    if state != State::New && proof::is_proven(&original, entry) {
        return Outcome::Proven;
    }
    let Some(reply) = R::tuple(entry, Which::Reply) else { return Outcome::NoConnection };
    let tuples = Tuples { original, reply };
    let outcome = match original.family {
        FAMILY_V4 => judge_tuples::<V4>(&tuples, state, judge_v4),
        FAMILY_V6 => judge_tuples::<V6>(&tuples, state, judge_v6),
        // The kernel tracks no other family.
        _ => return Outcome::NoConnection,
    };
    if outcome.passes() {
        proof::prove(&original, entry);
        return outcome;
    }
    if state == State::Related {
        // An error about a connection that nobody allowed is a packet like any other; its passing proves nothing.
        let by_itself = judge_headers(context);
        if by_itself.passes() {
            return by_itself;
        }
    }
    if mode() == Mode::Enforce {
        proof::refute(&original, entry);
    }
    outcome
}

/// Judges a packet of a connection that was not proven.
#[inline(always)]
fn judge_tuples<A: InTuple>(
    tuples: &Tuples,
    state: State,
    judge: impl Fn(&Flow<A>, Own) -> Outcome,
) -> Outcome {
    let own = if tuples.is_translated() { Own::Free } else { Own::Forged };
    match state {
        State::Reply => {
            // Its own direction may be allowed; or it answers what is allowed.
            let outcome = judge(&tuples.returning(), own);
            if outcome.passes() || judge(&tuples.opening(), own).passes() {
                return if outcome.passes() { outcome } else { Outcome::Allowed };
            }
            outcome
        }
        State::New | State::Original | State::Related | State::Nothing => judge(&tuples.opening(), own),
    }
}

/// Judges a packet without a connection, by what its headers say.
#[inline(always)]
fn judge_headers(context: &TcContext) -> Outcome {
    let ethertype = u16::from_be(context.skb.protocol() as u16);
    if ethertype != ETHERTYPE_IPV4 && ethertype != ETHERTYPE_IPV6 {
        return Outcome::NotIp;
    }
    let bytes = NetworkBytes { context };
    match parse_ip(&bytes, 0) {
        Ok(packet) if is_neighbour(&bytes, &packet) => Outcome::Neighbour,
        Ok(packet) => {
            let port = port_of(&packet);
            match packet.addresses {
                Addresses::V4 { source, destination } => {
                    let flow = Flow { source: source.octets(), destination: destination.octets(), port };
                    judge_v4(&flow, Own::Forged)
                }
                Addresses::V6 { source, destination } => {
                    let flow = Flow { source: source.octets(), destination: destination.octets(), port };
                    judge_v6(&flow, Own::Forged)
                }
            }
        }
        Err(error) => judge_unread(&bytes, ethertype, error),
    }
}

/// Judges a packet that can't be read: it passes if neither end is isolated. Who sends it and to whom is at a fixed place;
/// a packet without even that is nobody's.
#[inline(always)]
fn judge_unread(bytes: &NetworkBytes<'_>, ethertype: u16, error: ParseError) -> Outcome {
    let outcome = match error {
        // The link layer says that it is IP.
        ParseError::NotIp => Outcome::BadHeader,
        error => Outcome::unread(error),
    };
    let isolated = if ethertype == ETHERTYPE_IPV4 {
        match (bytes.array(12), bytes.array(16)) {
            (Some(source), Some(destination)) => is_isolated::<V4>(&Ipv4, &source, &destination),
            (None, _) | (_, None) => true,
        }
    } else {
        match (bytes.array(8), bytes.array(24)) {
            (Some(source), Some(destination)) => is_isolated::<V6>(&Ipv6, &source, &destination),
            (None, _) | (_, None) => true,
        }
    };
    if isolated { outcome } else { Outcome::NotIsolated }
}

#[inline(always)]
fn is_isolated<A: Address>(lookups: &impl Lookups<A, WORDS>, source: &A, destination: &A) -> bool {
    lookups.endpoint(source).is_some_and(|it| it.egress != NOT_ISOLATED)
        || lookups.endpoint(destination).is_some_and(|it| it.ingress != NOT_ISOLATED)
}

/// Neighbour discovery and multicast listeners' reports (RFC 4861, 2710, 3810).
#[inline(always)]
fn is_neighbour(bytes: &NetworkBytes<'_>, packet: &Packet) -> bool {
    if packet.protocol != Protocol::ICMPV6 || packet.fragment != Fragment::None {
        return false;
    }
    // Reports carry a hop-by-hop header of 8 bytes, the others none.
    let offset = match bytes.array(6) {
        Some([next]) if Protocol(next) == Protocol::ICMPV6 => 40,
        Some([next]) if Protocol(next) == Protocol::HOP_BY_HOP => 48,
        Some(_) | None => return false,
    };
    matches!(bytes.array(offset), Some([130..=137 | 143]))
}

/// Judges a flow of IPv4. A function of its own: the verifier walks it once a call, and not once a way to each.
#[inline(never)]
fn judge_v4(flow: &Flow<V4>, own: Own) -> Outcome {
    Outcome::of(decide_with(&Ipv4, flow, own))
}

/// Judges a flow of IPv6.
#[inline(never)]
fn judge_v6(flow: &Flow<V6>, own: Own) -> Outcome {
    Outcome::of(decide_with(&Ipv6, flow, own))
}
