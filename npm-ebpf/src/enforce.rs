//! What becomes of a packet that leaves the node through an interface: it passes if its connection was judged and
//! allowed, and is judged otherwise.

use core::ptr::from_ref;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::TcContext;
use npm_common::conntrack::{State, Tuples, entry_of};
use npm_common::decide::{Flow, Own, Verdict, decide_with};
use npm_common::event::{Mode, OUTCOMES, Outcome};
use npm_common::layout::position;
use npm_common::packet::{ETHERTYPE_IPV6, Ends, Family, Headers, ParseError, Protocol};

use crate::conntrack::{Read, Which};
use crate::maps::{Ipv4, Ipv6};
use crate::proof::{Proofs, Subject};
use crate::skb::{Start, next_header, read_into};
use crate::tell;

/// Packets by [`Outcome`].
#[map]
static OUTCOME: PerCpuArray<u64> = PerCpuArray::with_max_entries(OUTCOMES, 0);

/// The [`Mode`].
#[map]
static MODE: Array<u32> = Array::with_max_entries(1, 0);

/// The whole of a packet's way, as an action.
#[inline(always)]
pub(crate) fn enforce<R: Read, P: Proofs>(context: &TcContext) -> i32 {
    let outcome = judge::<R, P>(context);
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

/// What becomes of a packet.
#[inline(always)]
pub(crate) fn judge<R: Read, P: Proofs>(context: &TcContext) -> Outcome {
    // SAFETY: the kernel gave the pointer, and keeps what it is to until the program has ended.
    let came_by = unsafe { (*context.skb.skb).ingress_ifindex };
    // What the node itself sends has come in by no interface.
    if came_by == 0 && !may_be_a_piece(context) {
        return Outcome::Local;
    }
    let Some(nfct) = R::nfct(context) else { return Outcome::NoConnection };
    let (entry, state) = (entry_of(nfct), State::of(nfct));
    // A packet that may be the first is always judged: the proof may be of an earlier connection.
    match state {
        State::Nothing => return Outcome::at(judge_headers(context.skb.skb)),
        State::New => {}
        State::Original | State::Reply | State::Related if P::is_known::<R>(entry) => {
            return Outcome::Proven;
        }
        State::Original | State::Reply | State::Related => {}
    }
    let outcome = judge_connection::<R, P>(context, entry, state);
    if state == State::Related && !outcome.passes() {
        // An error about a connection that nobody allowed is a packet like any other; its passing proves nothing.
        let by_itself = Outcome::at(judge_headers(context.skb.skb));
        if by_itself.passes() {
            return by_itself;
        }
    }
    outcome
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

/// Judges a packet by its connection. Not inlined for its stack: a chain of callers has 512 bytes together
/// (kernel/bpf/verifier.c, check_max_stack_depth).
#[inline(never)]
fn judge_connection<R: Read, P: Proofs>(context: &TcContext, entry: u64, state: State) -> Outcome {
    let mut tuples = Tuples::default();
    if R::tuple(entry, Which::Original, &mut tuples.original).is_none() {
        return Outcome::NoConnection;
    }
    let subject = |tuples| Subject { skb: context.skb.skb, original: tuples, entry };
    if state != State::New && P::is_listed(subject(&tuples.original)) {
        return Outcome::Proven;
    }
    if R::tuple(entry, Which::Reply, &mut tuples.reply).is_none() {
        return Outcome::NoConnection;
    }
    let mut outcome = match state {
        State::Reply => judge_tuples(&tuples, Way::Returning),
        State::New | State::Original | State::Related | State::Nothing => judge_tuples(&tuples, Way::Opening),
    };
    if !outcome.passes() && state == State::Reply {
        // Its own direction is not allowed; but it may answer what is.
        let opening = judge_tuples(&tuples, Way::Opening);
        if opening.passes() {
            outcome = opening;
        }
    }
    if outcome.passes() {
        P::prove(subject(&tuples.original));
    } else if mode() == Mode::Enforce {
        match state {
            // It is told of when its headers are judged.
            State::Related | State::Nothing => {}
            State::New | State::Original => tell::connection(context.skb.skb, &tuples, Way::Opening, outcome),
            State::Reply => tell::connection(context.skb.skb, &tuples, Way::Returning, outcome),
        }
        P::refute(subject(&tuples.original), state);
    }
    outcome
}

/// Which of a connection's directions is judged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
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
    let ends = if returning == 1 { tuples.returning() } else { tuples.opening() };
    judge_flow(family, ends, tuples.own()).slot()
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
            match (read, judge_flow(headers.family(), headers.ends(), Own::Forged)) {
                (Ok(()), outcome) => outcome,
                // It passes if neither end is isolated, whatever an isolated one is allowed.
                (Err(_), Outcome::NotIsolated) => Outcome::NotIsolated,
                (Err(error), _) => Outcome::unread(error),
            }
        }
    };
    if !outcome.passes() && mode() == Mode::Enforce {
        tell::headers(skb, &headers, outcome);
    }
    outcome.slot()
}

#[inline(always)]
fn judge_flow(family: Family, ends: Ends<'_>, own: Own) -> Outcome {
    Verdict::of(judge_ends(family, ends, own)).map_or(Outcome::Both, Outcome::of)
}

/// The code of what the maps say of a flow.
#[inline(always)]
pub(crate) fn judge_ends(family: Family, Ends { source, destination, port }: Ends<'_>, own: Own) -> u32 {
    let (source, destination) = (from_ref(source).cast(), from_ref(destination).cast());
    let port = port.map_or(NO_PORT, |(protocol, port)| position(protocol, port));
    match family {
        Family::V4 => judge_v4(source, destination, port, own.number()),
        Family::V6 => judge_v6(source, destination, port, own.number()),
    }
}

/// What one function leaves another instead of a protocol and port: it is no port's position.
const NO_PORT: u32 = u32::MAX;

#[inline(always)]
fn port_at(position: u32) -> Option<(u8, u16)> {
    if position == NO_PORT { None } else { Some(((position >> 16) as u8, position as u16)) }
}

/// An address as [`Ends`] has it. It says where addresses lie, or the compiler would read them byte by byte.
#[repr(C, align(4))]
pub(crate) struct Wide([u8; 16]);

/// The code of the verdict on a flow of IPv4; `own` is an [`Own`]'s number. The verifier checks it once and apart.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_v4(source: *const Wide, destination: *const Wide, port: u32, own: u32) -> u32 {
    // SAFETY: each caller's are to values of its own, or there are none.
    let (Some(source), Some(destination)) = (unsafe { (source.as_ref(), destination.as_ref()) }) else {
        return 0;
    };
    let short = |Wide([a, b, c, d, ..]): &Wide| [*a, *b, *c, *d];
    let flow = Flow { source: short(source), destination: short(destination), port: port_at(port) };
    decide_with(&Ipv4, &flow, Own::of(own)).code()
}

/// The code of the verdict on a flow of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_v6(source: *const Wide, destination: *const Wide, port: u32, own: u32) -> u32 {
    // SAFETY: each caller's are to values of its own, or there are none.
    let (Some(source), Some(destination)) = (unsafe { (source.as_ref(), destination.as_ref()) }) else {
        return 0;
    };
    let flow = Flow { source: source.0, destination: destination.0, port: port_at(port) };
    decide_with(&Ipv6, &flow, Own::of(own)).code()
}
