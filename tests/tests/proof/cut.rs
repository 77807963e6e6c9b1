//! Established connections that policies deny by now: they live on, or are cut in both directions.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use npm_agent::backend::cut::Cutting;
use npm_common::mark::ProofBit;
use npm_tests::lab::netns::Netns;

use super::*;

/// What must arrive is waited for so long (TCP tries again at growing distances), what must not for this.
const PATIENCE: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_millis(500);

/// Both ends of connections from one pod to another that have seen packets both ways.
struct Connected {
    tcp: [TcpStream; 2],
    udp: [UdpSocket; 2],
}

impl Connected {
    fn between(client: (&Netns, IpAddr), server: (&Netns, IpAddr)) -> Result<Self> {
        let listener = server.0.run(|| Ok(TcpListener::bind((server.1, 5000))?))?;
        let there = client.0.run(|| Ok(TcpStream::connect((server.1, 5000))?))?;
        let (back, _) = listener.accept()?;
        let answering = server.0.run(|| Ok(UdpSocket::bind((server.1, 5000))?))?;
        let asking = client.0.run(|| Ok(UdpSocket::bind((client.1, 0))?))?;
        asking.connect((server.1, 5000))?;
        answering.connect(asking.local_addr()?)?;
        // The client's packet opens the connection.
        asking.send(b"x")?;
        answering.set_read_timeout(Some(PATIENCE))?;
        answering.recv(&mut [0; 64])?;
        for stream in [&there, &back] {
            stream.set_nodelay(true)?;
        }
        Ok(Self { tcp: [there, back], udp: [asking, answering] })
    }

    /// Sends from each end, the server's first, and tells which of TCP to the client, TCP to the server, UDP to the client,
    /// UDP to the server arrived. What is lost of TCP is sent again by the kernel, so it may arrive at the next call.
    fn exchange(&mut self, patience: Duration) -> Result<[bool; 4]> {
        let [there, back] = &mut self.tcp;
        let mut arrived = [false; 4];
        back.write_all(b"x")?;
        there.write_all(b"x")?;
        for (slot, stream) in arrived.iter_mut().zip([there, back]) {
            stream.set_read_timeout(Some(patience))?;
            *slot = got(|| stream.read(&mut [0; 64]))?;
        }
        let [asking, answering] = &self.udp;
        answering.send(b"x")?;
        asking.send(b"x")?;
        for (slot, socket) in arrived[2..].iter_mut().zip([asking, answering]) {
            socket.set_read_timeout(Some(patience))?;
            *slot = got(|| socket.recv(&mut [0; 64]))?;
        }
        Ok(arrived)
    }
}

fn got(mut receive: impl FnMut() -> std::io::Result<usize>) -> Result<bool> {
    loop {
        match receive() {
            Ok(length) => return Ok(length > 0),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                return Ok(false);
            }
            // With a timeout the kernel does not take a call up again after a signal or a machine's pause (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn connected(lab: &Lab, from: &str, to: &str, family: Family) -> Result<Connected> {
    let client = (lab.netns(from)?, address(lab, from, family)?);
    Connected::between(client, (lab.netns(to)?, address(lab, to, family)?))
}

#[test]
fn denied_connections_live_on_or_are_cut() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let [open, closed] = [POLICIES, CLOSED].map(|policies| goal(&format!("{PODS}{policies}")));
    let (open, closed) = (open?, closed?);
    for (dialect, family) in [(Dialect::Nft, Family::V4), (Dialect::Legacy, Family::V6)] {
        for established in [Established::Keep, Established::Cut] {
            let lab = lab()?;
            let inner = Box::new(backend(&lab, dialect, established)?);
            let node = lab.netns("node-a")?;
            let mut backend: Box<dyn Backend> = match established {
                Established::Keep => inner,
                Established::Cut => node.run(|| Ok(Box::new(Cutting::new(inner, ProofBit::DEFAULT)?)))?,
            };
            let mut apply = |goal: &Goal| {
                node.run(|| {
                    backend.apply(goal)?;
                    let left = backend.verify()?;
                    ensure!(left.drift.is_empty(), "{left:?}");
                    Ok(())
                })
            };
            apply(&open)?;
            let mut web = connected(&lab, "client", "web", family)?;
            // The policy's second version says nothing of this one, and nothing of connections that web opened.
            let mut other = connected(&lab, "client", "far", family)?;
            let mut own = connected(&lab, "web", "client", family)?;
            let all = [true; 4];
            for connection in [&mut web, &mut other, &mut own] {
                assert_eq!(connection.exchange(PATIENCE)?, all, "{dialect:?} {established:?}");
            }
            apply(&closed)?;
            for round in 0..3 {
                let (expected, patience) = match established {
                    Established::Keep => (all, PATIENCE),
                    Established::Cut => ([false; 4], SILENCE),
                };
                assert_eq!(web.exchange(patience)?, expected, "{dialect:?} {established:?}, round {round}");
                for connection in [&mut other, &mut own] {
                    assert_eq!(connection.exchange(PATIENCE)?, all, "{dialect:?} {established:?}");
                }
            }
            apply(&open)?;
            for connection in [&mut web, &mut other, &mut own] {
                assert_eq!(connection.exchange(PATIENCE)?, all, "{dialect:?} {established:?}: open again");
            }
        }
    }
    Ok(())
}
