//! The interfaces that get the program.

use std::io;

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

use super::attach::Port;

/// All interfaces of the calling thread's network namespace but loopback: what is sent there stays on the node.
///
/// # Errors
/// The kernel does not list them.
pub fn ports() -> io::Result<Vec<Port>> {
    // Not /sys/class/net: that shows the namespace in which /sys was mounted.
    let listed = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let names = listed.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim()));
    let mut ports = Vec::new();
    for name in names.filter(|name| *name != "lo") {
        match netdevice::name_to_index(&socket, name) {
            Ok(index) => ports.push(Port { index, name: name.to_owned() }),
            // It has gone meanwhile.
            Err(rustix::io::Errno::NODEV) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ports)
}
