//! Proofs in maps, which are two: one that holds many and forgets what it is not asked for, and a small one before it that
//! is asked first. Neither may keep what the other has lost for a reason, nor lose what is in use.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use npm_policy::flow::Transport;
use npm_policy::goal::Family;
use npm_policy::model::Protocol;
use npm_tests::lab::packet::{Ends, IpSender, udp};
use npm_tests::lab::require_root;
use npm_tests::pair::{CLOSED, Stage, world};
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
        let b = stage.lab.endpoints()[stage.pod(B[0])?].netns.clone();
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
            ensure!(stage.arrived()? == 20, "{choice} {family:?}: allowed flows do not arrive");
            stage.enforcer.enforce(&world(CLOSED)?)?;
            stage.deafen()?;
            let [from_b, from_a] = [&b, &a].map(|pod| pod.run(IpSender::open));
            let (from_b, from_a) = (from_b?, from_a?);
            for flow in flows {
                from_b.send(&udp(flow, b"denied")?)?;
                from_a.send(&udp(back(flow), b"answer")?)?;
            }
            let arrived = stage.arrived()?;
            ensure!(arrived == 0, "{choice} {family:?}: {arrived} packets of denied flows arrive");
        }
    }
    Ok(())
}
