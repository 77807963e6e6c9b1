//! What becomes of a packet that leaves the node through an interface: it passes if its connection was judged and
//! allowed, and is judged otherwise.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::TcContext;
use npm_common::conntrack::{State, Tuples, entry_of};
use npm_common::decide::{Flow, Own, Verdict, decide_with};
use npm_common::event::{Mode, OUTCOMES, Outcome};
use npm_common::packet::{ETHERTYPE_IPV6, Family, Headers, ParseError, Protocol};

use crate::conntrack::{Read, Which};
use crate::maps::{Ipv4, Ipv6};
use crate::proof;
use crate::skb::{Start, next_header, read_into};

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
        (false, Mode::Enforce) => TC_ACT_SHOT,
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
    if came_by == 0 && !may_be_a_piece(context) {
        return Outcome::Local;
    }
    let Some(nfct) = R::nfct(context) else { return Outcome::NoConnection };
    match State::of(nfct) {
        State::Nothing => Outcome::at(judge_headers(context.skb.skb)),
        state @ (State::New | State::Original | State::Reply | State::Related) => {
            judge_connection::<R>(context, entry_of(nfct), state)
        }
    }
}

/// Whether a packet that has come in by no interface may be a piece of one that has: where the kernel splits what it had put
/// together for its connection tracking, it does not say of IPv6's new pieces where they came in (ip6_copy_metadata,
/// net/ipv6/ip6_output.c; of IPv4's it does). Pieces of the node's own packets belong to a socket.
#[inline(always)]
fn may_be_a_piece(context: &TcContext) -> bool {
    let skb = context.skb.skb;
    // SAFETY: the kernel gave the pointer, and keeps what it is to until the program has ended.
    let protocol = u16::from_be(unsafe { (*skb).protocol } as u16);
    if protocol != ETHERTYPE_IPV6 {
        return false;
    }
    // SAFETY: as above; the pointer is looked at only.
    if !unsafe { (*skb).__bindgen_anon_2.sk }.is_null() {
        return false;
    }
    // The header of a fragment, or one that can stand before it.
    next_header(skb).is_none_or(|next| Protocol(next).is_extension())
}

/// Judges a packet by its connection.
#[inline(always)]
fn judge_connection<R: Read>(context: &TcContext, entry: u64, state: State) -> Outcome {
    let mut tuples = Tuples::default();
    if R::tuple(entry, Which::Original, &mut tuples.original).is_none() {
        return Outcome::NoConnection;
    }
    // A packet that may be the first is always judged: the proof may be of an earlier connection.
    if state != State::New && proof::is_proven(&tuples.original, entry) {
        return Outcome::Proven;
    }
    if R::tuple(entry, Which::Reply, &mut tuples.reply).is_none() {
        return Outcome::NoConnection;
    }
    let mut outcome = match state {
        State::Reply => judge_tuples(&tuples, Way::Returning),
        State::New | State::Original | State::Related | State::Nothing => judge_tuples(&tuples, Way::Opening),
    };
    if !outcome.passes() && state == State::Reply && judge_tuples(&tuples, Way::Opening).passes() {
        // Its own direction is not allowed; but it answers what is.
        outcome = Outcome::Allowed;
    }
    if outcome.passes() {
        proof::prove(&tuples.original, entry);
        return outcome;
    }
    if state == State::Related {
        // An error about a connection that nobody allowed is a packet like any other; its passing proves nothing.
        let by_itself = Outcome::at(judge_headers(context.skb.skb));
        if by_itself.passes() {
            return by_itself;
        }
    }
    if mode() == Mode::Enforce {
        proof::refute(&tuples.original, entry);
    }
    outcome
}

/// Which of a connection's directions is judged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Opening,
    Returning,
}

/// What the maps say of one direction of a connection.
#[inline(always)]
fn judge_tuples(tuples: &Tuples, way: Way) -> Outcome {
    Outcome::at(judge_direction(tuples, (way == Way::Returning).into()))
}

/// The slot of [`judge_tuples`]. A function of its own, as are all below: the verifier checks each once and apart, and
/// the stack of one is free when it returns.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_direction(tuples: *const Tuples, returning: u32) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(tuples) = (unsafe { tuples.as_ref() }) else { return Outcome::NoConnection.slot() };
    // The kernel tracks no other family.
    let Some(family) = tuples.family() else { return Outcome::NoConnection.slot() };
    let flow = if returning == 1 { tuples.returning(family) } else { tuples.opening(family) };
    judge_flow(&flow, tuples.own()).slot()
}

/// Judges a packet without a connection, by what its headers say; gives the outcome's slot.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_headers(skb: *mut __sk_buff) -> u32 {
    let context = TcContext::new(skb);
    let mut headers = Headers::default();
    let read = read_into(&context, Start::Network, &mut headers);
    let outcome = match read {
        Ok(()) if headers.is_neighbour_discovery() => Outcome::Neighbour,
        Err(ParseError::NotIp) => Outcome::NotIp,
        // Nobody can say whose it is.
        Err(error) if !headers.has_addresses() => Outcome::unread(error),
        read => {
            match (read, judge_flow(&headers, Own::Forged)) {
                (Ok(()), outcome) => outcome,
                // It passes if neither end is isolated, whatever an isolated one is allowed.
                (Err(_), Outcome::NotIsolated) => Outcome::NotIsolated,
                (Err(error), _) => Outcome::unread(error),
            }
        }
    };
    outcome.slot()
}

/// What the maps say of a flow. The verifier checks the two functions once and apart.
#[inline(always)]
fn judge_flow(flow: &Headers, own: Own) -> Outcome {
    let code = match flow.family() {
        Family::V4 => judge_v4(flow, own.number()),
        Family::V6 => judge_v6(flow, own.number()),
    };
    Verdict::of(code).map_or(Outcome::Both, Outcome::of)
}

/// The code of the verdict on a flow of IPv4; `own` is an [`Own`]'s number.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn judge_v4(flow: *const Headers, own: u32) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    let (source, destination) = flow.v4();
    decide_with(&Ipv4, &Flow { source, destination, port: flow.port() }, Own::of(own)).code()
}

/// The code of the verdict on a flow of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn judge_v6(flow: *const Headers, own: u32) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    let (source, destination) = flow.v6();
    decide_with(&Ipv6, &Flow { source, destination, port: flow.port() }, Own::of(own)).code()
}
