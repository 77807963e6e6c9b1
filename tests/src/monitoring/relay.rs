//! A way for Prometheus, which runs where the tests do, to what listens on loopback in a namespace of the lab.

use std::io::copy;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result};

use crate::lab::netns::Netns;

/// Passes on every connection to a port of loopback, until the process ends: it leads to `port` of the namespace's
/// loopback. Connections come from a Prometheus that we started, so threads are not counted.
///
/// # Errors
/// There is no port.
pub fn into_namespace(netns: &Netns, port: u16) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback")?;
    let address = listener.local_addr().context("asking for the port")?;
    let netns = netns.clone();
    std::thread::spawn(move || {
        for outside in listener.incoming().flatten() {
            let netns = netns.clone();
            // An agent that is not there yet is a scrape that fails.
            std::thread::spawn(move || pass(&netns, port, outside));
        }
    });
    Ok(address)
}

fn pass(netns: &Netns, port: u16, outside: TcpStream) -> Result<()> {
    let inside =
        netns.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("reaching the agent"))?;
    let (mut from, mut to) = (outside.try_clone()?, inside.try_clone()?);
    let requests = std::thread::spawn(move || {
        let _ = copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (inside, outside);
    let _ = copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
    // It ends with the connection.
    let _ = requests.join();
    Ok(())
}
