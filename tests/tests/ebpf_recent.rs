//! Proofs in maps, which are two: one that holds many and forgets what it is not asked for, and a small one before it that
//! is asked first. Neither may keep what the other has lost for a reason, nor lose what is in use.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_agent::conntrack::{Conntrack, Detail, Entry, MarkFilter};
use npm_policy::flow::Transport;
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::lab::netns::Netns;
use npm_tests::lab::packet::{Ends, IpSender, udp};
use npm_tests::lab::require_root;
use npm_tests::pair::{CLOSED, Kind, Stage, world};
use npm_tests::scenario::enforcer::Means;

const CHOICES: [&str; 2] = ["cast,maps", "probe,maps"];

/// Only b may open connections, and only to a.
const ONE_WAY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: x}
spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]}
"#;

/// The same, of UDP.
const DATAGRAMS: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: x}
spec: {podSelector: {matchLabels: {app: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: b}}}], ports: [{protocol: UDP}]}]}
"#;

const A: [&str; 2] = ["10.241.0.2", "fd00:241::2"];
const B: [&str; 2] = ["10.241.0.3", "fd00:241::3"];
/// Connections that are used. One alone may be lucky: it keeps its place in the small map while the large one forgets it.
const KEPT: usize = 60;
/// Nobody listens, and nothing comes back.
const DEAF: u16 = 4000;

fn ends(pods: [&str; 2], number: u16, family: Family) -> Result<Ends> {
    let [from, to]: [IpAddr; 2] = [pods[0].parse()?, pods[1].parse()?];
    ensure!(Family::of(from) == family && Family::of(to) == family);
    Ok(Ends { source: SocketAddr::new(from, number), destination: SocketAddr::new(to, DEAF) })
}

fn back(Ends { source, destination }: Ends) -> Ends {
    Ends { source: destination, destination: source }
}

/// Packets that a pod has received.
fn received(pod: &Netns) -> Result<u32> {
    let text = pod.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:")).context("no eth0")?;
    Ok(line.split_whitespace().nth(1).context("no packets")?.parse()?)
}

/// Packets that have arrived: as soon as there are so many, or after a while.
fn arrived(stage: &Stage, due: u64) -> Result<u64> {
    let deadline =
        Instant::now() + if due > 0 { Duration::from_secs(10) } else { Duration::from_millis(200) };
    loop {
        let arrived = stage.arrived()?;
        if (due > 0 && arrived >= due) || Instant::now() > deadline {
            return Ok(arrived);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// More new connections than the large map holds pass by some that are used ten times a second. Nobody may open those any
/// more, so they live by their proofs.
#[test]
fn what_is_used_is_not_forgotten() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for choice in CHOICES {
        let mut stage = Stage::build(Means::Ebpf(choice.parse()?))?;
        stage.lab.listen(&[Transport::Port(Protocol::Tcp, 80)])?;
        stage.enforcer.enforce(&world(ONE_WAY)?)?;
        let [a, b] = [stage.pod(A[0])?, stage.pod(B[0])?].map(|pod| stage.lab.endpoints()[pod].netns.clone());
        let to: IpAddr = A[0].parse()?;
        let connect = || -> Result<TcpStream> {
            let stream = b.run(|| Ok(TcpStream::connect((to, 80))?))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            Ok(stream)
        };
        let mut streams = (0..KEPT).map(|_| connect()).collect::<Result<Vec<_>>>()?;
        let mut echo = || -> Result<()> {
            streams.iter_mut().try_for_each(|stream| stream.write_all(b"here"))?;
            let mut heard = streams.iter_mut().map(|stream| stream.read_exact(&mut [0; 4]));
            heard.try_for_each(|heard| heard.context("a connection is cut"))
        };
        echo()?;
        stage.enforcer.enforce(&world(DATAGRAMS)?)?;
        let passed = b.run(|| {
            let (sender, mut passed) = (IpSender::open()?, 0);
            let mut next = Instant::now();
            // Of both families: twice as many as there are ports.
            for (from, to) in B.into_iter().zip(A) {
                for number in 1024..u16::MAX {
                    sender.send(&udp(ends([from, to], number, Family::of(from.parse()?))?, b"new")?)?;
                    passed += 1;
                    if Instant::now() > next {
                        echo().with_context(|| format!("{choice}: after {passed} connections"))?;
                        next = Instant::now() + Duration::from_millis(100);
                    }
                    if passed % 200 == 0 {
                        std::thread::sleep(Duration::from_millis(4));
                    }
                }
            }
            Ok(passed)
        })?;
        let arrived = received(&a)?;
        ensure!(arrived > passed, "only {arrived} of {passed} connections were allowed");
        ensure!(passed > 4 * npm_common::layout::MAX_PROOFS, "{passed} connections are not many");
        echo().with_context(|| format!("{choice}: at the end"))?;
    }
    Ok(())
}

/// A flow that nobody has answered is judged by each packet. Denied by now, it has lost its proof in both maps: an answer
/// does not pass.
#[test]
fn what_is_denied_is_known_nowhere() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for choice in CHOICES {
        let mut stage = Stage::build(Means::Ebpf(choice.parse()?))?;
        for (index, (from, to)) in B.into_iter().zip(A).enumerate() {
            let family = Family::BOTH[index];
            let (a, b) = (stage.pod(A[0])?, stage.pod(B[0])?);
            let [a, b] = [a, b].map(|pod| stage.lab.endpoints()[pod].netns.clone());
            let flows: Vec<Ends> =
                (20_000..20_020).map(|number| ends([from, to], number, family)).collect::<Result<_>>()?;
            stage.enforcer.enforce(&world(ONE_WAY)?)?;
            stage.deafen()?;
            b.run(|| {
                let sender = IpSender::open()?;
                flows.iter().try_for_each(|flow| sender.send(&udp(*flow, b"allowed")?))
            })?;
            ensure!(arrived(&stage, 20)? == 20, "{choice} {family:?}: allowed flows do not arrive");
            stage.enforcer.enforce(&world(CLOSED)?)?;
            stage.deafen()?;
            let [from_b, from_a] = [&b, &a].map(|pod| pod.run(IpSender::open));
            let (from_b, from_a) = (from_b?, from_a?);
            flows.iter().try_for_each(|flow| from_b.send(&udp(*flow, b"denied")?))?;
            // Late enough for the denied ones to be judged, and early enough to belong to their entries.
            std::thread::sleep(Duration::from_millis(2));
            flows.iter().try_for_each(|flow| from_a.send(&udp(back(*flow), b"answer")?))?;
            let arrived = arrived(&stage, 0)?;
            ensure!(arrived == 0, "{choice} {family:?}: {arrived} packets of denied flows arrive");
        }
    }
    Ok(())
}

/// The kernel gives an ended connection's memory to the next: a proof that outlived its connection would be that one's. The
/// proof of one that has not ended stays, and is worth what it was.
#[test]
fn a_proof_ends_with_its_connection() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    // Soon after policies have changed, and in any case.
    const SOON: Duration = Duration::from_secs(5);
    const IN_ANY_CASE: Duration = Duration::from_secs(20);
    const FEW: Range<u16> = 20_000..20_040;
    // With those the map is more than is read at once.
    const MANY: Range<u16> = 20_000..22_400;
    // From before anything is enforced: they are listed, by no address.
    const BEFORE: Range<u16> = 30_000..30_040;
    // What has its proof in a mark is not in the map.
    type Flows = [(Kind, Family, Range<u16>)];
    let cases: [(&str, &Flows); 2] = [
        (
            "cast,maps",
            &[
                (Kind::Udp, Family::V4, BEFORE),
                (Kind::Icmp, Family::V6, BEFORE),
                (Kind::Tcp, Family::V4, FEW),
                (Kind::Tcp, Family::V6, FEW),
                (Kind::Udp, Family::V4, MANY),
                (Kind::Udp, Family::V6, MANY),
                (Kind::Icmp, Family::V4, FEW),
                (Kind::Icmp, Family::V6, FEW),
            ],
        ),
        ("cast,kfuncs", &[(Kind::Icmp, Family::V4, FEW), (Kind::Icmp, Family::V6, FEW)]),
    ];
    let mut stages = Vec::new();
    for (choice, flows) in cases {
        let mut stage = Stage::build(Means::Ebpf(choice.parse()?))?;
        stage.deafen()?;
        for program in ["iptables-nft", "ip6tables-nft"] {
            // Somebody else's rule makes the node track connections.
            stage.node().exec(program, &["-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID"])?;
        }
        let (before, after): (Vec<_>, Vec<_>) = flows.iter().partition(|(_, _, ports)| *ports == BEFORE);
        before.iter().try_for_each(|(kind, family, ports)| stage.open(*kind, *family, ports.clone()))?;
        stage.enforcer.enforce(&world("")?)?;
        after.iter().try_for_each(|(kind, family, ports)| stage.open(*kind, *family, ports.clone()))?;
        let count = flows.iter().map(|(_, _, ports)| ports.len()).sum();
        stage.proven(count, SOON).with_context(|| format!("{choice}: all are open"))?;
        // Half of them end, by no packet.
        end(&stage, |number| number % 2 == 1)?;
        stage.enforcer.enforce(&world(CLOSED)?)?;
        stage.proven(count / 2, SOON).with_context(|| format!("{choice}: half are open"))?;
        // The others live on, whatever policy says by now, and however often anybody looks.
        for _ in 0..3 {
            stage.enforcer.enforce(&world(CLOSED)?)?;
            std::thread::sleep(Duration::from_millis(1200));
        }
        stage.deafen()?;
        flows.iter().try_for_each(|(kind, family, ports)| stage.answer(*kind, *family, ports.clone()))?;
        let arrived = arrived(&stage, count as u64 / 2)?;
        ensure!(arrived == count as u64 / 2, "{choice}: {arrived} answers of {count} connections arrive");
        stage.proven(count / 2, SOON).with_context(|| format!("{choice}: half are open"))?;
        end(&stage, |_| true)?;
        stages.push((choice, stage));
    }
    for (choice, stage) in &stages {
        stage.proven(0, IN_ANY_CASE).with_context(|| format!("{choice}: none is open"))?;
    }
    Ok(())
}

/// Ends connections by their ports or ids.
fn end(stage: &Stage, wanted: impl Fn(u16) -> bool + Sync) -> Result<()> {
    let number = |entry: &Entry| match entry.original.detail {
        Detail::Ports { source, .. } => source,
        Detail::Icmp { id, .. } => id,
        Detail::Nothing => 0,
    };
    let delete = || Ok(Conntrack::open()?.delete_where(MarkFilter::ANY, |entry| wanted(number(entry)))?);
    let ended = stage.node().run(delete)?;
    ensure!(ended > 0, "nothing was open");
    Ok(())
}
