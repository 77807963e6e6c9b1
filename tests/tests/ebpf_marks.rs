//! Proofs in the marks of the kernel's connections: set by the program and by nobody else, taken over by one that keeps
//! them elsewhere; and what was denied is gone without anybody's help.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::enforcer::{Ebpf, Options};
use npm_agent::conntrack::{Conntrack, Entry, MarkFilter};
use npm_agent::exec::Tools;
use npm_agent::interfaces::select::Selection;
use npm_common::mark::ProofBit;
use npm_policy::compile::compile;
use npm_policy::flow::Transport;
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::lab::netns::Netns;
use npm_tests::lab::packet::{self, Echo, Ends, IpSender, Segment, tcp, udp};
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::require_root;
use npm_tests::lab::service::Dialect;
use npm_tests::pair::{CLOSED, Stage, world};
use npm_tests::scenario::enforcer::{Means, tracking};

/// Bits of somebody else, in every connection.
const FOREIGN: u32 = 0x8040_0002;

/// Only b may open connections to a.
const ONE_WAY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, namespace: x}
spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}
"#;

/// The protocols of whose entries programs can write marks.
const WRITTEN: [u8; 2] = [6, 17];

const A: [&str; 2] = ["10.241.0.2", "fd00:241::2"];
const B: [&str; 2] = ["10.241.0.3", "fd00:241::3"];

fn start(node: &Netns, choice: &str, proof: ProofBit) -> Result<Ebpf> {
    let options = Options {
        instance: node.name().to_owned(),
        choice: choice.parse()?,
        iptables: tracking(Dialect::Nft),
        tools: Tools::default(),
        selection: Selection::default(),
        proof,
    };
    node.run(|| Ok(Ebpf::new(options)?))
}

fn enforce(node: &Netns, backend: &mut Ebpf, policies: &str) -> Result<()> {
    let goal = compile(&world(policies)?, "node-a").0;
    node.run(|| Ok(backend.apply(&goal)?)).map(drop)
}

fn connect(from: &Netns, to: &str) -> Result<TcpStream> {
    let to: IpAddr = to.parse()?;
    let stream = from.run(|| Ok(TcpStream::connect((to, 80))?))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

fn echo(stream: &mut TcpStream) -> Result<()> {
    let mut answer = [0; 4];
    stream.write_all(b"here")?;
    stream.read_exact(&mut answer).context("a connection that was allowed is cut")
}

fn address(of: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(of.parse()?, port))
}

fn entries_from(node: &Netns, source: &str) -> Result<Vec<Entry>> {
    let source: IpAddr = source.parse()?;
    node.run(|| {
        Ok(Conntrack::open()?.entries()?.into_iter().filter(|it| it.original.source == source).collect())
    })
}

#[test]
fn an_allowed_connection_has_the_bit_and_keeps_those_of_others() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let another = ProofBit::new(0x40).context("one bit")?;
    for (choice, bit) in
        [("cast,kfuncs", ProofBit::DEFAULT), ("probe,kfuncs", another), ("cast,maps", ProofBit::DEFAULT)]
    {
        let expected = if choice.contains("maps") { FOREIGN } else { FOREIGN | bit.mask() };
        let mut stage = Stage::build(Means::Nothing)?;
        stage.lab.listen(&[Protocol::Tcp, Protocol::Udp].map(|protocol| Transport::Port(protocol, 80)))?;
        let node = stage.node().clone();
        let set = format!("{FOREIGN:#x}/{FOREIGN:#x}");
        for family in Family::BOTH {
            let program = Dialect::Nft.program(family, "");
            let rule = ["-t", "mangle", "-A", "PREROUTING", "-j", "CONNMARK", "--set-xmark", &set];
            node.exec(&program, &rule)?;
        }
        let mut backend = start(&node, choice, bit)?;
        enforce(&node, &mut backend, ONE_WAY)?;
        let b = stage.lab.endpoints()[stage.pod(B[0])?].netns.clone();
        for (source, destination) in B.into_iter().zip(A) {
            echo(&mut connect(&b, destination)?)?;
            let (from, to): (IpAddr, IpAddr) = (source.parse()?, destination.parse()?);
            b.run(|| {
                let socket = UdpSocket::bind((from, 0))?;
                socket.set_read_timeout(Some(Duration::from_secs(20)))?;
                socket.send_to(b"here", (to, 80))?;
                Ok(socket.recv(&mut [0; 16])?)
            })?;
            // Delivered by a veth within the call.
            let ends = Ends { source: SocketAddr::new(from, 0), destination: SocketAddr::new(to, 0) };
            b.run(|| IpSender::open()?.send(&packet::echo(ends, Echo::Request, 77)?))?;
            let entries = entries_from(&node, source)?;
            let protocols: Vec<u8> = entries.iter().map(|entry| entry.original.protocol).collect();
            let (marked, others) = (WRITTEN, if from.is_ipv4() { 1 } else { 58 });
            ensure!(
                marked.iter().chain([&others]).all(|it| protocols.contains(it)),
                "{choice}: only {entries:?}"
            );
            for entry in entries {
                let is_marked = marked.contains(&entry.original.protocol);
                // The kernel's functions do not find entries of other protocols: what is allowed is listed.
                assert_eq!(entry.mark, if is_marked { expected } else { FOREIGN }, "{choice}: {entry:?}");
            }
        }
        node.run(|| Ok(backend.remove()?))?;
    }
    Ok(())
}

/// With nobody there who could delete them. Where proofs are in maps they stay: so the test sees them.
#[test]
fn entries_of_denied_flows_end_at_once() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for choice in ["cast,kfuncs", "probe,kfuncs", "cast,maps"] {
        let stage = Stage::build(Means::Nothing)?;
        let node = stage.node().clone();
        let mut backend = start(&node, choice, ProofBit::DEFAULT)?;
        enforce(&node, &mut backend, CLOSED)?;
        // Packets that wait for a neighbour's address, and may be given up there, come to no program.
        let a = &stage.lab.endpoints()[stage.pod(A[0])?].netns;
        for (source, destination) in A.into_iter().zip(B) {
            let ends = Ends { source: address(source, 999)?, destination: address(destination, 80)? };
            let deadline = Instant::now() + Duration::from_secs(20);
            while !node.exec("ip", &["neigh", "show", "to", destination])?.contains("lladdr") {
                ensure!(Instant::now() < deadline, "{choice}: nobody has {destination}");
                a.run(|| IpSender::open()?.send(&udp(ends, b"not you")?))?;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        drop(backend);
        node.run(|| Ok(Conntrack::open()?.delete_where(MarkFilter::ANY, |_| true)?))?;
        stage.lab.endpoints()[stage.pod(A[0])?].netns.run(|| {
            let sender = IpSender::open()?;
            for (source, destination) in A.into_iter().zip(B) {
                for port in 1000..1100 {
                    let ends =
                        Ends { source: address(source, port)?, destination: address(destination, 80)? };
                    sender.send(&udp(ends, b"not you")?)?;
                    sender.send(&tcp(ends, Segment::Syn, 1)?)?;
                }
            }
            Ok(())
        })?;
        let left = stage.connections()?;
        assert_eq!(left > 0, choice.contains("maps"), "{choice}: {left} of 400");
        let mut backend = start(&node, choice, ProofBit::DEFAULT)?;
        node.run(|| Ok(backend.remove()?))?;
    }
    Ok(())
}

#[test]
fn proofs_outlive_a_change_of_where_they_are() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for (first, then) in [("kfuncs", "maps"), ("maps", "kfuncs"), ("kfuncs,tcx", "kfuncs,tcx,probe")] {
        let mut stage = Stage::build(Means::Nothing)?;
        let port = Transport::Port(Protocol::Tcp, 80);
        stage.lab.listen(&[port])?;
        let node = stage.node().clone();
        let mut backend = start(&node, first, ProofBit::DEFAULT)?;
        enforce(&node, &mut backend, ONE_WAY)?;
        let from = stage.pod(B[0])?;
        let b = stage.lab.endpoints()[from].netns.clone();
        let mut streams = A.into_iter().map(|to| connect(&b, to)).collect::<Result<Vec<_>>>()?;
        streams.iter_mut().try_for_each(echo).with_context(|| format!("{first}, before {then}"))?;
        drop(backend);
        let mut backend = start(&node, then, ProofBit::DEFAULT)?;
        enforce(&node, &mut backend, CLOSED)?;
        streams.iter_mut().try_for_each(echo).with_context(|| format!("{then} behind {first}"))?;
        let probe = Probe {
            from,
            source: B[0].parse()?,
            destination: A[0].parse()?,
            transport: port,
            expected: None,
        };
        assert_eq!(stage.lab.probe(&[probe])?, [Outcome::Blocked], "{then} behind {first}");
        node.run(|| Ok(backend.remove()?))?;
    }
    Ok(())
}
