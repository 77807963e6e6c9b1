//! Tells people of packets, as text: what each is, what it is to its connection, and what becomes of it.
//!
//! A program of its own (`npm-agent trace`): it judges as the enforcing program does, but records, drops and counts nothing, and
//! is attached while somebody looks. So what the text takes of time, and of the verifier, is no packet's concern otherwise.

use aya_ebpf::Global;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use npm_common::conntrack::State;
use npm_common::event::{NAME_BYTES, Outcome};
use npm_common::packet::{Family, Headers, ParseError, Ports, Protocol};

use crate::conntrack::{ByProbe, Read};
use crate::enforce::judge;
use crate::entry;
use crate::proof::{Proofs, Subject, is_listed};
use crate::skb::{Start, read_into};

/// The port that is looked for, at either end; 0: all packets, those without ports included.
#[unsafe(no_mangle)]
static TRACE_PORT: Global<u16> = Global::new(0);
/// The address that is looked for, at either end, by words as it lies in memory; of IPv4 the first four bytes.
#[unsafe(no_mangle)]
static TRACE_ADDRESS_FIRST: Global<u64> = Global::new(0);
/// The second half of it.
#[unsafe(no_mangle)]
static TRACE_ADDRESS_SECOND: Global<u64> = Global::new(0);
/// The address's IP version; 0: all addresses.
#[unsafe(no_mangle)]
static TRACE_VERSION: Global<u32> = Global::new(0);
/// Whether proofs are in the connections' marks: 0 no.
#[unsafe(no_mangle)]
static TRACE_MARKS: Global<u32> = Global::new(0);

/// Proofs as the enforcing program finds them; nothing is recorded.
struct Seen;

impl Proofs for Seen {
    #[inline(always)]
    fn is_known<R: Read>(entry: u64) -> bool {
        TRACE_MARKS.load() != 0 && R::mark(entry).is_some_and(entry::is_proof)
    }

    #[inline(always)]
    fn is_listed(subject: Subject<'_>) -> bool {
        is_listed(subject)
    }

    #[inline(always)]
    fn prove(_: Subject<'_>) {}

    #[inline(always)]
    fn refute(_: Subject<'_>, _: State) {}
}

/// Tells of a packet, if it is looked for. What is not IP, or does not hold its addresses, is nobody's.
#[inline(always)]
pub(crate) fn trace(context: &TcContext) {
    let mut headers = Headers::default();
    match read_into(context, Start::Network, &mut headers) {
        Err(ParseError::NotIp) => return,
        Ok(()) | Err(_) if !headers.has_addresses() => return,
        Ok(()) | Err(_) => {}
    }
    if is_looked_for(&headers) {
        let outcome = judge::<ByProbe, Seen>(context);
        tell(context.skb.skb, &headers, outcome.slot());
    }
}

#[inline(always)]
fn is_looked_for(headers: &Headers) -> bool {
    let port = TRACE_PORT.load();
    let is_port = |Ports { source, destination }: Ports| source == port || destination == port;
    if port != 0 && !headers.ports().is_some_and(is_port) {
        return false;
    }
    let (first, second) = (TRACE_ADDRESS_FIRST.load(), TRACE_ADDRESS_SECOND.load());
    match (TRACE_VERSION.load(), headers.family()) {
        (0, _) => true,
        (4, Family::V4) => {
            let (source, destination) = headers.v4();
            let is = |address: [u8; 4]| u32::from_ne_bytes(address) == first as u32;
            is(source) || is(destination)
        }
        (6, Family::V6) => {
            let (source, destination) = headers.v6();
            let is = |address: [u8; 16]| {
                let [a, b, c, d, e, f, g, h, rest @ ..] = address;
                u64::from_ne_bytes([a, b, c, d, e, f, g, h]) == first && u64::from_ne_bytes(rest) == second
            };
            is(source) || is(destination)
        }
        _ => false,
    }
}

/// A function of its own for its stack, as those of `enforce` are.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell(skb: *mut __sk_buff, headers: *const Headers, outcome: u32) -> u32 {
    // SAFETY: the caller's is to a value of its own, or there is none.
    let Some(headers) = (unsafe { headers.as_ref() }) else { return 0 };
    let context = TcContext::new(skb);
    let state: [u8; 8] = match ByProbe::nfct(&context).map(State::of) {
        None | Some(State::Nothing) => *b"none    ",
        Some(State::New) => *b"new     ",
        Some(State::Original) => *b"original",
        Some(State::Reply) => *b"reply   ",
        Some(State::Related) => *b"related ",
    };
    let protocol: [u8; 6] = match headers.protocol() {
        Protocol::TCP => *b"tcp   ",
        Protocol::UDP => *b"udp   ",
        Protocol::SCTP => *b"sctp  ",
        Protocol::ICMP => *b"icmp  ",
        Protocol::ICMPV6 => *b"icmpv6",
        _ => *b"other ",
    };
    let outcome = padded(Outcome::at(outcome));
    // SAFETY: all of these are ASCII.
    let (state, protocol, outcome) = unsafe {
        (
            core::str::from_utf8_unchecked(&state),
            core::str::from_utf8_unchecked(&protocol),
            core::str::from_utf8_unchecked(&outcome),
        )
    };
    // SAFETY: the kernel gave the pointer, and keeps what it is to until the program has ended.
    let interface = unsafe { (*skb).ifindex };
    let Ports { source: from, destination: to } =
        headers.ports().unwrap_or(Ports { source: 0, destination: 0 });
    // The number of the interface stands first and is followed by a space: user space puts its name there.
    match headers.family() {
        Family::V4 => {
            let (source, destination) = headers.v4();
            let (source, destination) = (u32::from_be_bytes(source), u32::from_be_bytes(destination));
            info!(
                &context,
                "{} {:i}:{} > {:i}:{} {}, conntrack {}, {}",
                interface,
                source,
                from,
                destination,
                to,
                protocol,
                state,
                outcome
            );
        }
        Family::V6 => {
            let (source, destination) = headers.v6();
            info!(
                &context,
                "{} [{:i}]:{} > [{:i}]:{} {}, conntrack {}, {}",
                interface,
                source,
                from,
                destination,
                to,
                protocol,
                state,
                outcome
            );
        }
    }
    1
}

/// An outcome's name, always as long: the kernel would not let a program copy as many bytes as it has found somewhere.
#[inline(always)]
fn padded(outcome: Outcome) -> [u8; NAME_BYTES] {
    macro_rules! names {
        ($($outcome:ident)+) => {
            match outcome { $(Outcome::$outcome => const { Outcome::$outcome.padded() },)+ }
        };
    }
    names! {
        NotIp Local Neighbour Proven NotIsolated IngressAllowed EgressAllowed BothAllowed Ingress Egress Both Truncated
        BadHeader TooManyExtensions TooManyTags NoConnection
    }
}
