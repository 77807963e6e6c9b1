//! What becomes of a packet that leaves the node through an interface: it passes if its connection was judged and
//! allowed, and is judged otherwise.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::TcContext;
use npm_common::conntrack::{FAMILY_V4, FAMILY_V6, Question, State, Tuples, entry_of};
use npm_common::decide::{Verdict, decide_with};
use npm_common::event::{Mode, OUTCOMES, Outcome};
use npm_common::packet::{Family, Headers, ParseError};

use crate::conntrack::{Read, Which};
use crate::maps::{Ipv4, Ipv6};
use crate::proof;
use crate::skb::{Start, read_into};

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
    let family = match original.family {
        FAMILY_V4 => Family::V4,
        FAMILY_V6 => Family::V6,
        // The kernel tracks no other family.
        _ => return Outcome::NoConnection,
    };
    let (first, second) = match state {
        // Its own direction may be allowed; or it answers what is allowed.
        State::Reply => (tuples.returning(), Some(tuples.opening())),
        State::New | State::Original | State::Related | State::Nothing => (tuples.opening(), None),
    };
    let outcome = judge_question(family, &first);
    if outcome.passes() {
        proof::prove(&original, entry);
        return outcome;
    }
    if let Some(second) = second
        && judge_question(family, &second).passes()
    {
        proof::prove(&original, entry);
        return Outcome::Allowed;
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

/// Judges a packet without a connection, by what its headers say.
#[inline(always)]
fn judge_headers(context: &TcContext) -> Outcome {
    let mut headers = Headers::default();
    match read_into(context, Start::Network, &mut headers) {
        Ok(()) if headers.is_neighbour_discovery() => Outcome::Neighbour,
        Ok(()) => judge_question(headers.family(), &Question::of(&headers)),
        Err(ParseError::NotIp) => Outcome::NotIp,
        // Nobody can say whose it is.
        Err(error) if !headers.has_addresses() => Outcome::unread(error),
        // It passes if neither end is isolated: what nobody at all is allowed is denied to it.
        Err(error) => match judge_question(headers.family(), &Question::of(&headers).without_port()) {
            Outcome::NotIsolated => Outcome::NotIsolated,
            _ => Outcome::unread(error),
        },
    }
}

/// What the maps say. The verifier checks the two functions once and apart.
#[inline(always)]
fn judge_question(family: Family, question: &Question) -> Outcome {
    let code = match family {
        Family::V4 => judge_v4(question),
        Family::V6 => judge_v6(question),
    };
    Verdict::of(code).map_or(Outcome::Both, Outcome::of)
}

/// The code of the verdict on a flow of IPv4.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_v4(question: *const Question) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(question) = (unsafe { question.as_ref() }) else { return 0 };
    decide_with(&Ipv4, &question.flow(), question.own()).code()
}

/// The code of the verdict on a flow of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_v6(question: *const Question) -> u32 {
    // SAFETY: each caller's is to a value of its own, or there is none.
    let Some(question) = (unsafe { question.as_ref() }) else { return 0 };
    decide_with(&Ipv6, &question.flow(), question.own()).code()
}
