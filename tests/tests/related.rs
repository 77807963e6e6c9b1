//! What belongs to connections and is none of their packets: errors of ICMP, about datagrams and segments, from their
//! ends and from routers between them; and packets that the kernel keeps together (GSO), many times longer than the
//! network takes.
//!
//! Pods of two nodes, isolated both ways, that may connect to a few ports: without the errors connections would hang
//! where they ought to be refused, and stall where the path takes less than the ends think.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use npm_agent::backend::ebpf::choice::Choice;
use npm_policy::goal::Family;
use npm_policy::world::World;
use npm_tests::lab::netns::Netns;
use npm_tests::lab::packet::{Ends, IpSender, port_unreachable, udp};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, require_root};
use npm_tests::scenario::Scenario;
use npm_tests::scenario::cluster::{Cluster, spec};
use npm_tests::scenario::enforcer::{Enforcer, Means, Site};

const PATIENCE: Duration = Duration::from_secs(20);
/// How long a packet that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(300);

const A: [&str; 2] = ["10.241.0.2", "fd00:241::2"];
const B: [&str; 2] = ["10.241.0.3", "fd00:241::3"];
/// On another node, over a path that takes less.
const C: [&str; 2] = ["10.241.1.2", "fd00:241:1::2"];
/// What the path to that node takes, in bytes; IPv6 asks for 1280.
const NARROW: &str = "1300";

const BULK: u16 = 80;
const REFUSED: u16 = 81;
const DATAGRAMS: u16 = 53;
const NOBODY: u16 = 54;
/// Not allowed.
const DENIED: u16 = 60;

/// Labs at a time.
const LABS: usize = 3;

const STREAM_LEN_BYTES: usize = 4 << 20;

const PODS: &str = r#"
{apiVersion: v1, kind: Namespace, metadata: {name: x}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x, labels: {app: a}}, spec: {nodeName: node-a}, status: {phase: Running, podIPs: [{ip: 10.241.0.2}, {ip: "fd00:241::2"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: x, labels: {app: b}}, spec: {nodeName: node-a}, status: {phase: Running, podIPs: [{ip: 10.241.0.3}, {ip: "fd00:241::3"}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: c, namespace: x, labels: {app: c}}, spec: {nodeName: node-b}, status: {phase: Running, podIPs: [{ip: 10.241.1.2}, {ip: "fd00:241:1::2"}]}}
---
"#;

/// Nobody may be reached; but a may reach the others.
const POLICIES: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody, namespace: x}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-a, namespace: x}
spec:
  podSelector: {matchLabels: {app: a}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {}}], ports: [{port: 80}, {port: 81}, {protocol: UDP, port: 53}, {protocol: UDP, port: 54}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-others, namespace: x}
spec:
  podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [a]}]}
  ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}, {port: 81}, {protocol: UDP, port: 53}, {protocol: UDP, port: 54}]}]
"#;

struct Stage {
    // Dropped in this order: what enforces before where.
    enforcer: Enforcer,
    lab: Lab,
    world: World,
    patience: Duration,
    _directory: tempfile::TempDir,
}

impl Stage {
    /// The node of `a` and `b` enforces nothing yet.
    fn build(means: Means) -> Result<Self> {
        let scenario = Scenario::of(format!("{PODS}{POLICIES}"));
        let world = Cluster::stages(&scenario)?[0].world()?;
        let lab = Lab::build(&spec(&scenario, std::slice::from_ref(&world))?)?;
        let directory = tempfile::tempdir()?;
        // Nodes come first, by their names.
        let node = &lab.endpoints()[0].netns;
        let site = Site { netns: node, node: "node-a", dialect: Dialect::Nft, directory: directory.path() };
        let enforcer = Enforcer::start(means, &site)?;
        Ok(Self { enforcer, lab, world, patience: PATIENCE, _directory: directory })
    }

    /// Lets the path between the nodes take less than the pods think.
    fn narrow_path(&self) -> Result<()> {
        let fabric = self.lab.fabric();
        // Errors from a link-local address are not forwarded.
        fabric.exec("ip", &["addr", "add", "fd00:ffff::1/128", "dev", "lo"])?;
        // To the second node, and back.
        fabric.exec("ip", &["link", "set", "link1", "mtu", NARROW])?;
        self.lab.endpoints()[1].netns.exec("ip", &["link", "set", "up0", "mtu", NARROW]).map(drop)
    }

    fn pod(&self, addresses: [&str; 2]) -> Result<&Netns> {
        let address: IpAddr = addresses[0].parse()?;
        let found = self.lab.endpoints().iter().find(|it| it.addresses.contains(&address));
        Ok(&found.context("no such pod")?.netns)
    }
}

fn address(pod: [&str; 2], family: Family) -> Result<IpAddr> {
    let [v4, v6] = pod;
    Ok(match family {
        Family::V4 => v4.parse()?,
        Family::V6 => v6.parse()?,
    })
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => "0.0.0.0".parse().expect("an address"),
        Family::V6 => "::".parse().expect("an address"),
    }
}

/// A UDP socket of a pod, connected, that waits for no longer than is told here.
fn datagrams(pod: &Netns, to: SocketAddr, wait: Duration) -> Result<UdpSocket> {
    pod.run(|| {
        let socket = UdpSocket::bind(SocketAddr::new(any(Family::of(to.ip())), 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(wait))?;
        Ok(socket)
    })
}

/// The other end has nobody at the port: the sender hears of it.
fn datagrams_are_refused(stage: &Stage, family: Family) -> Result<()> {
    let socket =
        datagrams(stage.pod(A)?, SocketAddr::new(address(B, family)?, NOBODY), Duration::from_millis(200))?;
    let deadline = Instant::now() + stage.patience;
    while Instant::now() < deadline {
        // Ends send few errors a second (icmp_ratelimit), so it may take more than one.
        match socket.send(b"anybody?").and_then(|_| socket.recv(&mut [0; 8])) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            other => bail!("nobody answers, but {other:?}"),
        }
    }
    bail!("nobody hears that there is nobody")
}

/// The other end's own filter refuses the connection by an error, not by a reset.
fn segments_are_refused(stage: &Stage, family: Family) -> Result<()> {
    let (program, error) = match family {
        Family::V4 => ("iptables-nft", "icmp-port-unreachable"),
        Family::V6 => ("ip6tables-nft", "icmp6-port-unreachable"),
    };
    let port = REFUSED.to_string();
    let rule = ["-A", "INPUT", "-p", "tcp", "--dport", &port, "-j", "REJECT", "--reject-with", error];
    stage.pod(B)?.exec(program, &rule)?;
    let to = SocketAddr::new(address(B, family)?, REFUSED);
    let patience = stage.patience;
    let outcome = stage.pod(A)?.run(|| Ok(TcpStream::connect_timeout(&to, patience)))?;
    let error = outcome.err().context("somebody accepts")?;
    ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
    Ok(())
}

/// The router between the nodes says what the path takes, and the sender sends its datagrams in pieces from then on. The
/// router is no pod, no node, and nobody's peer.
fn long_datagrams_learn_the_path(stage: &Stage, family: Family) -> Result<()> {
    let to = SocketAddr::new(address(C, family)?, DATAGRAMS);
    let receiver = stage.pod(C)?.run(|| Ok(UdpSocket::bind(to)?))?;
    receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
    let sender = datagrams(stage.pod(A)?, to, SILENCE)?;
    let deadline = Instant::now() + stage.patience;
    for tries in 1.. {
        match sender.send(&[7; 1400]) {
            // A socket that is connected is told as well.
            Err(error) if error.raw_os_error() != Some(Errno::EMSGSIZE as i32) => return Err(error.into()),
            Ok(_) | Err(_) => {}
        }
        match receiver.recv(&mut [0; 2000]) {
            Ok(len) => {
                ensure!(
                    len == 1400 && tries > 1,
                    "{len} bytes arrive at the first try: the path is not narrow"
                );
                return Ok(());
            }
            Err(_) => ensure!(Instant::now() < deadline, "the sender never learns that they are too long"),
        }
    }
    Ok(())
}

/// Sends a stream from one pod to another and checks that all of it arrives; gives how many packets and bytes the other's
/// interface saw.
fn stream(stage: &Stage, to: [&str; 2], family: Family) -> Result<(u64, u64)> {
    let before = received(stage.pod(to)?)?;
    let at = SocketAddr::new(address(to, family)?, BULK);
    let listener = stage.pod(to)?.run(|| Ok(TcpListener::bind(at)?))?;
    let (say, hear) = mpsc::channel();
    std::thread::spawn(move || {
        let read = || -> Result<usize> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            // Data goes the other way as well.
            stream.write_all(&all)?;
            Ok(all.len())
        };
        // Nobody listens any more where the sender has failed.
        let _ = say.send(read());
    });
    let mut stream = stage.pod(A)?.run(|| Ok(TcpStream::connect_timeout(&at, PATIENCE)?))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&vec![1; STREAM_LEN_BYTES]).context("the stream stalls")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back).context("the stream back stalls")?;
    let there = hear.recv_timeout(PATIENCE)??;
    ensure!(there == STREAM_LEN_BYTES && back.len() == STREAM_LEN_BYTES, "{there}, {} arrive", back.len());
    let after = received(stage.pod(to)?)?;
    Ok((after.0 - before.0, after.1 - before.1))
}

/// Packets and bytes that a pod's interface has received.
fn received(pod: &Netns) -> Result<(u64, u64)> {
    let text = pod.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:")).context("no eth0")?;
    let mut numbers = line.split_whitespace().map(str::parse::<u64>);
    let bytes = numbers.next().context("no bytes")??;
    Ok((numbers.next().context("no packets")??, bytes))
}

/// Sends twenty datagrams as two packets to the kernel (UDP_SEGMENT, udp(7)); gives how many arrive.
fn segmented_datagrams(stage: &Stage, family: Family, port: u16, due: usize) -> Result<usize> {
    const LEN_BYTES: usize = 1000;
    let to = SocketAddr::new(address(B, family)?, port);
    let receiver = stage.pod(B)?.run(|| {
        let receiver = UdpSocket::bind(to)?;
        Ok(receiver)
    })?;
    receiver.set_read_timeout(Some(if due > 0 { stage.patience } else { SILENCE }))?;
    let sender = datagrams(stage.pod(A)?, to, PATIENCE)?;
    setsockopt(&sender, sockopt::UdpGsoSegment, &i32::try_from(LEN_BYTES)?)?;
    for _ in 0..2 {
        sender.send(&[7; 10 * LEN_BYTES])?;
    }
    let mut arrived = 0;
    while due == 0 || arrived < due {
        match receiver.recv(&mut [0; 2 * LEN_BYTES]) {
            Ok(len) => {
                ensure!(len == LEN_BYTES, "a datagram of {len} bytes");
                arrived += 1;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(arrived)
}

/// Errors that `b` sends to `a` about a packet that never was, or was denied; gives how many arrive.
fn errors_about_nothing(stage: &Stage, family: Family, due: u64) -> Result<u64> {
    let pod = stage.pod(A)?;
    let program = Dialect::Nft.program(family, "");
    let (own, other) = (address(A, family)?, address(B, family)?);
    let protocol = match family {
        Family::V4 => ["-p", "icmp", "--icmp-type", "3"],
        Family::V6 => ["-p", "icmpv6", "--icmpv6-type", "1"],
    };
    let source = other.to_string();
    let rule = ["-t", "raw", "-A", "PREROUTING", "-s", &source, "-j", "DROP"];
    pod.exec(&program, &["-t", "raw", "-F", "PREROUTING"])?;
    pod.exec(&program, &[&rule[..], &protocol[..]].concat())?;
    let sent = stage.pod(B)?.run(|| {
        let sender = IpSender::open()?;
        for port in 5000..5010 {
            let denied =
                Ends { source: SocketAddr::new(own, port), destination: SocketAddr::new(other, DENIED) };
            let back = Ends { source: SocketAddr::new(other, 0), destination: SocketAddr::new(own, 0) };
            sender.send(&port_unreachable(back, &udp(denied, b"12345678")?)?)?;
        }
        Ok(10)
    })?;
    ensure!(due <= sent);
    let deadline = Instant::now() + if due > 0 { stage.patience } else { SILENCE };
    let arrived = loop {
        let saved = pod.exec(&Dialect::Nft.program(family, "-save"), &["-c", "-t", "raw"])?;
        let line = saved.lines().find(|line| line.ends_with("-j DROP")).context("no such rule")?;
        let count: u64 = line.trim_start_matches('[').split(':').next().context("no counter")?.parse()?;
        if (due > 0 && count >= due) || Instant::now() > deadline {
            break count;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    pod.exec(&program, &["-t", "raw", "-F", "PREROUTING"])?;
    Ok(arrived)
}

fn plays(means: Means) -> Result<()> {
    let mut stage = Stage::build(means)?;
    stage.narrow_path()?;
    for family in Family::BOTH {
        let open = errors_about_nothing(&stage, family, 10)?;
        ensure!(open == 10, "{family:?}: without policies {open} of 10 errors arrive");
    }
    stage.enforcer.enforce(&stage.world)?;
    for family in Family::BOTH {
        let told = |what: &str| format!("{family:?}: {what}");
        datagrams_are_refused(&stage, family).with_context(|| told("datagrams to nobody"))?;
        segments_are_refused(&stage, family).with_context(|| told("a connection that is refused"))?;
        // A path is learnt once for all connections, so each family's first has to be told.
        let out = match family {
            Family::V4 => long_datagrams_learn_the_path(&stage, family).map(drop),
            Family::V6 => stream(&stage, C, family).map(drop),
        };
        out.with_context(|| told("the path's first user"))?;
        let known = stage.pod(A)?.exec("ip", &["route", "get", &address(C, family)?.to_string()])?;
        ensure!(known.contains(&format!("mtu {NARROW}")), "{family:?}: {known}");
        stage.pod(A)?.exec("ip", &["route", "flush", "cache"])?;
        let again = match family {
            Family::V4 => stream(&stage, C, family).map(drop),
            Family::V6 => {
                stage.pod(A)?.exec("ip", &["-6", "route", "flush", "cache"])?;
                long_datagrams_learn_the_path(&stage, family).map(drop)
            }
        };
        again.with_context(|| told("the path's second user"))?;

        let (packets, bytes) = stream(&stage, B, family).with_context(|| told("a stream"))?;
        ensure!(bytes / packets > 3000, "{family:?}: {packets} packets of {bytes} bytes: nothing is long");
        let arrived = segmented_datagrams(&stage, family, DATAGRAMS, 20)?;
        ensure!(arrived == 20, "{family:?}: {arrived} of 20 datagrams arrive");
        let arrived = segmented_datagrams(&stage, family, DENIED, 0)?;
        ensure!(arrived == 0, "{family:?}: {arrived} of 20 denied datagrams arrive");
        let arrived = errors_about_nothing(&stage, family, 0)?;
        ensure!(arrived == 0, "{family:?}: {arrived} of 10 errors about what was denied arrive");
    }
    Ok(())
}

#[test]
fn errors_and_long_packets_fare_as_their_connections() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut all = vec![("iptables".to_owned(), Means::Backend)];
    all.extend(Choice::every().map(|choice| (choice.to_string(), Means::Ebpf(choice))));
    let left = Mutex::new(all);
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).pop();
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            while let Some((name, means)) = next() {
                plays(means).context(name)?;
            }
            Ok(())
        };
        // Most of it is waiting.
        let threads = [0; LABS].map(|_| scope.spawn(work));
        threads.into_iter().try_for_each(|thread| thread.join().expect("no player panics"))
    })
}

/// Where errors are lost, whoever waits for one waits in vain: so the other test can fail.
#[test]
fn without_errors_connections_hang() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build(Means::Backend)?;
    stage.patience = Duration::from_secs(2);
    stage.narrow_path()?;
    stage.enforcer.enforce(&stage.world)?;
    for family in Family::BOTH {
        let rule = ["-t", "mangle", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "RELATED", "-j", "DROP"];
        stage.lab.endpoints()[0].netns.exec(&Dialect::Nft.program(family, ""), &rule)?;
        ensure!(datagrams_are_refused(&stage, family).is_err(), "{family:?}: datagrams");
        ensure!(segments_are_refused(&stage, family).is_err(), "{family:?}: segments");
        ensure!(long_datagrams_learn_the_path(&stage, family).is_err(), "{family:?}: the path");
    }
    Ok(())
}
