//! Packets in pieces: what the kernel puts together for its connection tracking it splits again behind FORWARD, and what
//! leaves is judged still.
#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use npm_agent::backend::ebpf::choice::Choice;
use npm_tests::lab::packet::{Ends, IpSender, fragments, udp};
use npm_tests::lab::require_root;
use npm_tests::pair::{CLOSED, Stage, world};
use npm_tests::scenario::enforcer::Means;

const IPV6_LEN_BYTES: usize = 40;
/// A hop-by-hop header of this length with one option that nobody knows and everybody passes over (RFC 8200 §4.2).
const OPTIONS_LEN_BYTES: usize = 256;

/// How a datagram is split.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// Of IPv4, in two halves.
    Ipv4,
    /// In two halves.
    Plain,
    /// The first piece has options, and less data than the second: no piece fits into the second's place when the
    /// options are put in front of each, so the kernel makes new pieces (ip6_fragment, its slow path).
    Uneven,
}

/// A datagram in two pieces.
fn pieces(ends: Ends, shape: Shape, id: u32) -> Result<Vec<Vec<u8>>> {
    let whole = udp(ends, &[7; 1200])?;
    if let Shape::Ipv4 = shape {
        return fragments(&whole, 608, id);
    }
    let (header, datagram) = whole.split_at(IPV6_LEN_BYTES);
    let cut = match shape {
        Shape::Uneven => 304,
        Shape::Ipv4 | Shape::Plain => 608,
    };
    let piece = |options: &[u8], data: &[u8], offset: usize, more: bool| -> Result<Vec<u8>> {
        let mut packet = header.to_vec();
        let length = u16::try_from(options.len() + 8 + data.len())?;
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        packet[6] = if options.is_empty() { 44 } else { 0 };
        packet.extend(options);
        packet.extend([17, 0]);
        packet.extend((u16::try_from(offset)? | u16::from(more)).to_be_bytes());
        packet.extend(id.to_be_bytes());
        packet.extend(data);
        Ok(packet)
    };
    let mut options = Vec::new();
    if let Shape::Uneven = shape {
        options = vec![0; OPTIONS_LEN_BYTES];
        // Then a fragment header; 31 times 8 bytes follow; the option's type and length.
        options[..4].copy_from_slice(&[44, 31, 0x1e, 252]);
    }
    Ok(vec![piece(&options, &datagram[..cut], 0, true)?, piece(&[], &datagram[cut..], cut, false)?])
}

/// Sends datagrams in pieces from one pod to the other.
fn send(stage: &Stage, shape: Shape, port: u16) -> Result<()> {
    let (source, destination): (IpAddr, IpAddr) = match shape {
        Shape::Ipv4 => ("10.241.0.2".parse()?, "10.241.0.3".parse()?),
        Shape::Plain | Shape::Uneven => ("fd00:241::2".parse()?, "fd00:241::3".parse()?),
    };
    let netns = stage.lab.endpoints()[stage.pod("10.241.0.2")?].netns.clone();
    netns.run(|| {
        let sender = IpSender::open()?;
        for number in 0..20 {
            let ends = Ends {
                source: SocketAddr::new(source, port + number),
                destination: SocketAddr::new(destination, 80),
            };
            for piece in pieces(ends, shape, u32::from(port + number))? {
                sender.send(&piece)?;
            }
        }
        Ok(())
    })
}

/// Pieces that arrived, when more are due or none for a while.
fn arrived(stage: &Stage, due: u64) -> Result<u64> {
    let deadline = Instant::now() + Duration::from_secs(if due > 0 { 10 } else { 1 });
    loop {
        let seen = stage.arrived()?;
        if (due > 0 && seen >= due) || Instant::now() > deadline {
            return Ok(seen);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn pieces_of_denied_datagrams_do_not_arrive() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let all = [Means::Backend].into_iter().chain(Choice::every().map(Means::Ebpf));
    for means in all {
        let mut stage = Stage::build(means)?;
        for (index, shape) in [Shape::Ipv4, Shape::Plain, Shape::Uneven].into_iter().enumerate() {
            let port = 20_000 + 1000 * u16::try_from(index)?;
            stage.enforcer.enforce(&world("")?)?;
            stage.deafen()?;
            send(&stage, shape, port)?;
            let open = arrived(&stage, 20)?;
            ensure!(open >= 20, "{means:?}, {shape:?}: {open} pieces of 20 allowed datagrams arrived");
            stage.enforcer.enforce(&world(CLOSED)?)?;
            stage.deafen()?;
            send(&stage, shape, port + 500)?;
            let shut = arrived(&stage, 0)?;
            ensure!(shut == 0, "{means:?}, {shape:?}: {shut} pieces of denied datagrams arrived");
        }
    }
    Ok(())
}
