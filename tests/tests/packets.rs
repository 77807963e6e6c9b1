//! The parser against a parser of other people (etherparse), and in the kernel against itself in user space.
#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use npm_common::packet::{
    Addresses, ETHERNET_LEN_BYTES, Fragment, Headers, Network, ParseError, Protocol, behind_ethernet, code,
    parse_ethernet, read,
};
use npm_tests::frames::{Dice, frame, takes};

const SEED: u64 = 0x7061_7273_6572_7331;

/// What etherparse, strict, finds in a frame: addresses, protocol, ports, ICMPv6 type. `None`: nothing, or something that
/// it reads in another way by design (a tag behind two, a fragment).
struct Theirs {
    addresses: (IpAddr, IpAddr),
    protocol: u8,
    ports: Option<(u16, u16)>,
    icmpv6_type: Option<u8>,
}

fn theirs(frame: &[u8]) -> Option<Theirs> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (addresses, payload): ((IpAddr, IpAddr), _) = match packet.net? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            ((header.source_addr().into(), header.destination_addr().into()), ip.payload().clone())
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            ((header.source_addr().into(), header.destination_addr().into()), ip.payload().clone())
        }
        NetSlice::Arp(_) => return None,
    };
    if payload.fragmented {
        return None;
    }
    let (mut ports, mut icmpv6_type) = (None, None);
    match packet.transport {
        Some(TransportSlice::Tcp(tcp)) => ports = Some((tcp.source_port(), tcp.destination_port())),
        Some(TransportSlice::Udp(udp)) => ports = Some((udp.source_port(), udp.destination_port())),
        Some(TransportSlice::Icmpv6(icmp)) => icmpv6_type = Some(icmp.type_u8()),
        Some(TransportSlice::Icmpv4(_) | TransportSlice::Igmp(_)) | None => {}
    }
    Some(Theirs { addresses, protocol: payload.ip_number.0, ports, icmpv6_type })
}

#[test]
fn what_another_parser_reads_is_read_alike() {
    const FRAMES: u32 = 200_000;
    let mut dice = Dice(SEED);
    let (mut compared, mut with_ports, mut with_type) = (0u32, 0u32, 0u32);
    for number in 0..FRAMES {
        let frame = frame(&mut dice);
        let Some(theirs) = theirs(&frame) else { continue };
        let ours = match parse_ethernet(&frame.as_slice()) {
            Ok(headers) => headers.packet(),
            // Limits of ours.
            Err(ParseError::TooManyTags | ParseError::TooManyExtensions) => continue,
            // A tag for it, and not for Linux.
            Err(ParseError::NotIp)
                if frame[12..].starts_with(&[0x91, 0])
                    || frame[16..].starts_with(&[0x91, 0])
                    || frame[20..].starts_with(&[0x91, 0]) =>
            {
                continue;
            }
            // It knows no SCTP, so it misses no ports.
            Err(_) if theirs.protocol == Protocol::SCTP.0 => continue,
            Err(error) => panic!("frame {number} of seed {SEED:#x}: {error}: {frame:02x?}"),
        };
        assert_eq!(ours.fragment, Fragment::None, "frame {number}: {frame:02x?}");
        let addresses: (IpAddr, IpAddr) = match ours.addresses {
            Addresses::V4 { source, destination } => (source.into(), destination.into()),
            Addresses::V6 { source, destination } => (source.into(), destination.into()),
        };
        assert_eq!(addresses, theirs.addresses, "frame {number}: {frame:02x?}");
        assert_eq!(ours.protocol.0, theirs.protocol, "frame {number}: {frame:02x?}");
        compared += 1;
        // It reads ICMPv6 in IPv4 too.
        if let Some(ports) = theirs.ports {
            with_ports += 1;
            assert_eq!(
                ours.ports.map(|it| (it.source, it.destination)),
                Some(ports),
                "frame {number}: {frame:02x?}"
            );
        }
        if let (Some(kind), IpAddr::V6(_)) = (theirs.icmpv6_type, addresses.0) {
            with_type += 1;
            assert_eq!(ours.icmpv6_type, Some(kind), "frame {number}: {frame:02x?}");
        }
    }
    println!("{compared} frames compared, {with_ports} with ports, {with_type} with an ICMPv6 type");
    assert!(compared > FRAMES / 8 && with_ports > FRAMES / 100 && with_type > FRAMES / 100);
}

/// Whether this test can run; under CI it must.
fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: eBPF programs are loaded by root only");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "a skipped test is a failure in CI");
    }
    root
}

/// A frame as the kernel is to read it.
#[derive(Clone, Copy)]
enum Memory {
    /// In one piece.
    Linear,
    /// The first bytes of it in one piece, the rest in pages.
    Paged(u32),
}

/// `struct __sk_buff` (include/uapi/linux/bpf.h).
const SKB_LEN_BYTES: usize = 192;
/// Where its `data_end` is: in a test run, where the first piece ends.
const DATA_END: usize = 80;

fn run(program: &SchedClassifier, frame: &[u8], memory: Memory) -> Result<u32> {
    let mut context = [0; SKB_LEN_BYTES];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    match memory {
        Memory::Linear => {}
        Memory::Paged(end) => {
            context[DATA_END..DATA_END + 4].copy_from_slice(&end.to_ne_bytes());
            options.ctx_in = Some(&context);
        }
    }
    Ok(program.test_run(options).context("running the program")?.return_value)
}

/// The number that a program returns for what user space reads.
fn digest(headers: &Headers, outcome: Result<(), ParseError>) -> u32 {
    headers.digest().wrapping_add(code(outcome))
}

#[test]
fn the_kernel_reads_every_header_as_user_space_does() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    const FRAMES: usize = 20_000;
    let object = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../npm-ebpf/npm-ebpf.o");
    let mut ebpf = Ebpf::load_file(&object).with_context(|| format!("loading {}", object.display()))?;
    for name in ["read_ethernet", "read_network"] {
        let program: &mut SchedClassifier =
            ebpf.program_mut(name).context("finding the program")?.try_into()?;
        program.load().context("passing the verifier")?;
    }
    let program = |name: &str| -> Result<&SchedClassifier> {
        Ok(ebpf.program(name).context("finding the program")?.try_into()?)
    };
    let (ethernet, network) = (program("read_ethernet")?, program("read_network")?);

    let mut dice = Dice(SEED);
    let can_page = run(ethernet, &[0; 100], Memory::Paged(50)).is_ok();
    let (mut ran, mut paged) = (0, 0);
    while ran < FRAMES {
        let frame = frame(&mut dice);
        if !takes(&frame) {
            continue;
        }
        ran += 1;
        let bytes = frame.as_slice();
        let mut headers = Headers::default();
        let outcome = behind_ethernet(&bytes).and_then(|network| read(&bytes, network, &mut headers));
        let expected = digest(&headers, outcome);
        let what = |start: &str| format!("frame {ran} of seed {SEED:#x} from its {start}: {frame:02x?}");
        ensure!(run(ethernet, &frame, Memory::Linear)? == expected, what("first byte"));
        ensure!(run(network, &frame, Memory::Linear)? == expected, what("network header"));
        if can_page {
            let end = ETHERNET_LEN_BYTES + dice.roll(frame.len() - ETHERNET_LEN_BYTES);
            // A first piece that ends in an IP header right behind Ethernet's is refused, as such a frame is.
            if takes(&frame[..end]) {
                paged += 1;
                let memory = Memory::Paged(u32::try_from(end)?);
                ensure!(run(ethernet, &frame, memory)? == expected, "{end} bytes: {}", what("first byte"));
            }
        }
    }
    println!("{ran} frames, {paged} of them also in pages");
    ensure!(!can_page || paged > FRAMES / 4, "{paged} frames in pages");
    Ok(())
}

/// A device without Ethernet headers: the packet begins with the IP header.
#[test]
fn an_ip_header_may_come_first() {
    let mut dice = Dice(SEED);
    for _ in 0..20_000 {
        let frame = frame(&mut dice);
        let bytes = frame.as_slice();
        let Ok(network) = behind_ethernet(&bytes) else { continue };
        let (mut with, mut without) = (Headers::default(), Headers::default());
        let outcome = read(&bytes, network, &mut with);
        let rest = &bytes[network.offset..];
        assert_eq!(outcome, read(&rest, Network { offset: 0, ..network }, &mut without), "{frame:02x?}");
        assert_eq!(with, without, "{frame:02x?}");
    }
}
