//! Tells people of packets, as text: what each is, what it is to its connection, and what becomes of it.
//!
//! A program of its own (`npm-agent trace`): it judges as the enforcing program does, but records, drops and counts nothing, and
//! is attached while somebody looks. So what the text takes of time, and of the verifier, is no packet's concern otherwise.

use aya_ebpf::Global;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use npm_common::conntrack::{FAMILY_V4, FAMILY_V6, State, Tuple, entry_of};
use npm_common::event::{NAME_BYTES, Outcome};
use npm_common::packet::{Family, Headers, ParseError, Ports, Protocol};

use crate::conntrack::{ByProbe, Read, Which};
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

/// Packets that were looked for and found, told or not.
#[map]
static TRACED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Tells of a packet, if it is looked for. What is not IP, or does not hold its addresses, is nobody's.
#[inline(always)]
pub(crate) fn trace(context: &TcContext) {
    let mut headers = Headers::default();
    match read_into(context, Start::Network, &mut headers) {
        Err(ParseError::NotIp) => return,
        Ok(()) | Err(_) if !headers.has_addresses() => return,
        Ok(()) | Err(_) => {}
    }
    if !is_looked_for(&headers) {
        let Some(nfct) = ByProbe::nfct(context) else { return };
        if is_connection_looked_for(entry_of(nfct)) == 0 {
            return;
        }
    }
    if let Some(count) = TRACED.get_ptr_mut(0) {
        // SAFETY: the kernel gave the pointer to this CPU's value, and no other program of this CPU runs meanwhile.
        unsafe { *count += 1 };
    }
    let outcome = judge::<ByProbe, Seen>(context);
    tell(context.skb.skb, &headers, outcome.slot());
}

/// Whether the packet's own addresses and ports are.
#[inline(always)]
fn is_looked_for(headers: &Headers) -> bool {
    let is_port = match (TRACE_PORT.load(), headers.ports()) {
        (0, _) => true,
        (port, Some(Ports { source, destination })) => source == port || destination == port,
        (_, None) => false,
    };
    let is_address = match headers.family() {
        Family::V4 => {
            let (source, destination) = headers.v4();
            is_v4(source) || is_v4(destination)
        }
        Family::V6 => {
            let (source, destination) = headers.v6();
            is_v6(source) || is_v6(destination)
        }
    };
    is_port && (is_address || TRACE_VERSION.load() == 0)
}

#[inline(always)]
fn is_v4(address: [u8; 4]) -> bool {
    TRACE_VERSION.load() == 4 && u32::from_ne_bytes(address) == TRACE_ADDRESS_FIRST.load() as u32
}

#[inline(always)]
fn is_v6(address: [u8; 16]) -> bool {
    let [a, b, c, d, e, f, g, h, rest @ ..] = address;
    TRACE_VERSION.load() == 6
        && u64::from_ne_bytes([a, b, c, d, e, f, g, h]) == TRACE_ADDRESS_FIRST.load()
        && u64::from_ne_bytes(rest) == TRACE_ADDRESS_SECOND.load()
}

/// 1: those of the packet's connection are, before or behind a translation.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_connection_looked_for(entry: u64) -> u32 {
    if entry == 0 {
        return 0;
    }
    let mut tuple = Tuple::default();
    for which in [Which::Original, Which::Reply] {
        if ByProbe::tuple(entry, which, &mut tuple).is_some() && is_tuple_looked_for(&tuple) {
            return 1;
        }
    }
    0
}

#[inline(always)]
fn is_tuple_looked_for(tuple: &Tuple) -> bool {
    let is_port = match TRACE_PORT.load() {
        0 => true,
        port => {
            Protocol(tuple.protocol).has_ports()
                && (u16::from_be_bytes(tuple.source_port) == port
                    || u16::from_be_bytes(tuple.destination_port) == port)
        }
    };
    let short = |[a, b, c, d, ..]: [u8; 16]| [a, b, c, d];
    let is_address = match tuple.family {
        FAMILY_V4 => is_v4(short(tuple.source)) || is_v4(short(tuple.destination)),
        FAMILY_V6 => is_v6(tuple.source) || is_v6(tuple.destination),
        _ => false,
    };
    is_port && (is_address || TRACE_VERSION.load() == 0)
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
