//! The kernel's connections and the programs' maps of them: what existed before enforcement is proven, what was denied is
//! deleted.
//!
//! The kernel enters a connection before the programs see its first packet. A program that cannot take the entry out again
//! notes the tuple in `DENIED`, and a thread here deletes the entry over ctnetlink. Until then the entry is harmless:
//! a packet of a connection without proof is judged, whatever the kernel says that it is.

use std::collections::HashMap as Table;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData, MapError};
use npm_common::conntrack::{FAMILY_V4, FAMILY_V6, Tuple as Key, listed};
use npm_common::mark::ProofBit;

use super::choice::Proofs;
use super::kernel::KernelError;
use super::maps::MapsError;
use super::pins::Pins;
use super::syscall::HashElements;
use crate::conntrack::{Conntrack, ConntrackError, Detail, Entry, MarkFilter, Tuple};

/// A [`Key`] as aya writes it.
pub(super) type Words = [u64; 5];

/// A connection's protocols whose tuples hold ports, or what stands in their place (include/net/netfilter/
/// nf_conntrack_tuple.h): TCP, UDP, DCCP, GRE, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 6] = [6, 17, 33, 47, 132, 136];
/// Those of which the kernel's functions find the entries (net/netfilter/nf_conntrack_bpf.c): TCP, UDP.
const FOUND: [u8; 2] = [6, 17];
/// ICMP and ICMPv6.
const ICMP: [u8; 2] = [1, 58];

/// The pause between two looks at what was denied: while something is, and when nothing has been for a while.
const BUSY: Duration = Duration::from_millis(10);
const IDLE: Duration = Duration::from_millis(100);

/// How many tuples are taken at once: between two batches the thread can be told to stop.
const BATCH: usize = 4096;

/// How many batches a full map has, and as many again.
const MOST_SWINGS: usize = 32;

/// The words of a tuple's memory.
pub(super) fn words(key: &Key) -> Words {
    let Key { source, source_port, family, destination, destination_port, protocol, direction } = key;
    let mut bytes = [0; 40];
    bytes[..16].copy_from_slice(source);
    bytes[16..18].copy_from_slice(source_port);
    bytes[18..20].copy_from_slice(&family.to_ne_bytes());
    bytes[20..36].copy_from_slice(destination);
    bytes[36..38].copy_from_slice(destination_port);
    bytes[38..].copy_from_slice(&[*protocol, *direction]);
    let mut words = [0; 5];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    words
}

/// The tuple that these words are the memory of. `None`: of no family that we know.
pub(super) fn tuple(words: &Words) -> Option<Tuple> {
    let mut bytes = [0; 40];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    let address = |at: usize| -> Option<IpAddr> {
        match u16::from_ne_bytes([bytes[18], bytes[19]]) {
            FAMILY_V4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?)),
            FAMILY_V6 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?)),
            _ => None,
        }
    };
    let (source, destination, protocol) = (address(0)?, address(20)?, bytes[38]);
    let source_port = u16::from_be_bytes([bytes[16], bytes[17]]);
    let detail = match protocol {
        protocol if WITH_PORTS.contains(&protocol) => {
            Detail::Ports { source: source_port, destination: u16::from_be_bytes([bytes[36], bytes[37]]) }
        }
        protocol if ICMP.contains(&protocol) => {
            Detail::Icmp { kind: bytes[36], code: bytes[37], id: source_port }
        }
        _ => Detail::Nothing,
    };
    Some(Tuple { source, destination, protocol, detail, zone: 0 })
}

/// The key of a connection in the programs' maps.
pub(super) fn key(tuple: &Tuple) -> Key {
    let (source_port, destination_port) = match tuple.detail {
        Detail::Ports { source, destination } => (source.to_be_bytes(), destination.to_be_bytes()),
        Detail::Icmp { kind, code, id } => (id.to_be_bytes(), [kind, code]),
        Detail::Nothing => ([0; 2], [0; 2]),
    };
    let wide = |address: IpAddr| match address {
        IpAddr::V4(address) => {
            let mut wide = [0; 16];
            wide[..4].copy_from_slice(&address.octets());
            wide
        }
        IpAddr::V6(address) => address.octets(),
    };
    Key {
        source: wide(tuple.source),
        source_port,
        family: if tuple.source.is_ipv4() { FAMILY_V4 } else { FAMILY_V6 },
        destination: wide(tuple.destination),
        destination_port,
        protocol: tuple.protocol,
        direction: 0,
    }
}

/// One of the programs' maps of connections.
pub(super) struct Connections {
    name: &'static str,
    map: HashMap<MapData, Words, u64>,
    elements: HashElements<Words, u64>,
}

impl Connections {
    pub(super) fn pinned(pins: &Pins, name: &'static str) -> Result<Self, KernelError> {
        let failed = |source| MapsError::Map { name, source };
        let data = MapData::from_pin(pins.map(name)).map_err(failed)?;
        let elements = HashElements::of(&data).map_err(failed)?;
        let map = Map::from_map_data(data).and_then(HashMap::try_from).map_err(failed)?;
        Ok(Self { name, map, elements })
    }

    /// What it holds for a connection.
    pub(super) fn get(&self, key: &Words) -> Option<u64> {
        self.map.get(key, 0).ok()
    }

    /// Takes the element out; whether there was one.
    pub(super) fn remove(&mut self, key: &Words) -> Result<bool, KernelError> {
        match self.map.remove(key) {
            Ok(()) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => {
                Ok(false)
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    /// All that it holds. What is written meanwhile may be among it or not.
    pub(super) fn elements(&self) -> Result<Table<Words, u64>, KernelError> {
        let mut elements = Table::new();
        let read = self.elements.each(BATCH, |connection, value| {
            elements.insert(connection, value);
        });
        read.map_err(|error| self.failed(MapError::IoError(error)))?;
        Ok(elements)
    }

    fn failed(&self, source: MapError) -> KernelError {
        MapsError::Map { name: self.name, source }.into()
    }
}

/// Proves every connection that the kernel knows; gives how many. It is for a node on which nothing was enforced until
/// now: whatever was open stays open.
///
/// # Errors
/// The kernel did not list its connections, or the map could not be written.
pub(super) fn prove_existing(pins: &Pins, proofs: Proofs, bit: ProofBit) -> Result<usize, KernelError> {
    let mut table = Conntrack::open()?;
    match proofs {
        Proofs::Kfuncs => Ok(table.mark_existing(bit.mask())?),
        Proofs::Maps => list(pins, &table.entries()?),
    }
}

/// Lists in the map what has its proof in the mark; gives how many that were.
///
/// # Errors
/// As [`prove_existing`].
pub(super) fn prove_marked(pins: &Pins, bit: ProofBit) -> Result<usize, KernelError> {
    let marked = MarkFilter { value: bit.mask(), mask: bit.mask() };
    list(pins, &Conntrack::open()?.entries_where(marked, |_| true)?)
}

fn list(pins: &Pins, entries: &[Entry]) -> Result<usize, KernelError> {
    let mut proofs = Connections::pinned(pins, "PROOFS")?;
    for entry in entries {
        let key = key(&entry.original);
        // Not over what a program knows better.
        match proofs.map.insert(words(&key), listed(&key), BPF_NOEXIST) {
            Ok(()) => {}
            Err(MapError::SyscallError(error))
                if error.io_error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(proofs.failed(error)),
        }
    }
    Ok(entries.len())
}

/// Only where there is no value yet (include/uapi/linux/bpf.h).
const BPF_NOEXIST: u64 = 1;

/// The thread that deletes the entries of denied connections. Dropping it asks it to end.
#[derive(Debug)]
pub(super) struct Reaper {
    stop: Arc<AtomicBool>,
}

impl Reaper {
    /// Starts it, for the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no ctnetlink, a map is missing, or there can be no thread.
    pub(super) fn start(pins: &Pins, proofs: Proofs, bit: ProofBit) -> Result<Self, KernelError> {
        let marked = match proofs {
            Proofs::Kfuncs => Some(bit),
            Proofs::Maps => None,
        };
        let mut scythe = Scythe::pinned(pins, marked)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("denied".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let pause = match scythe.swing() {
                    Ok(0) => IDLE,
                    Ok(_) => BUSY,
                    Err(error) => {
                        tracing::warn!(%error, "entries of denied connections stay for now");
                        IDLE
                    }
                };
                std::thread::sleep(pause);
            }
        });
        // The thread ends by itself.
        drop(thread.map_err(KernelError::Thread)?);
        Ok(Self { stop })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Scythe {
    /// The proof of connections whose entries programs find.
    marked: Option<ProofBit>,
    denied: Connections,
    proofs: Connections,
    table: Conntrack,
}

/// Deletes the entries of all connections that are noted as denied, where nobody denies new ones.
///
/// # Errors
/// A map is missing, or the kernel refused.
pub(super) fn sweep(pins: &Pins) -> Result<(), KernelError> {
    let mut scythe = Scythe::pinned(pins, None)?;
    for _ in 0..MOST_SWINGS {
        if scythe.swing()? == 0 {
            return Ok(());
        }
    }
    Ok(())
}

impl Scythe {
    fn pinned(pins: &Pins, marked: Option<ProofBit>) -> Result<Self, KernelError> {
        Ok(Self {
            marked,
            denied: Connections::pinned(pins, "DENIED")?,
            proofs: Connections::pinned(pins, "PROOFS")?,
            table: Conntrack::open()?,
        })
    }

    /// Deletes what is noted; gives how many tuples were.
    fn swing(&mut self) -> Result<usize, KernelError> {
        let keys: Result<Vec<Words>, MapError> = self.denied.map.keys().take(BATCH).collect();
        let keys = match keys {
            // A key that was deleted meanwhile ends the walk; what is behind it comes next time.
            Err(MapError::KeyNotFound) => return Ok(1),
            keys => keys.map_err(|source| self.denied.failed(source))?,
        };
        let mut tuples = Vec::with_capacity(keys.len());
        for key in &keys {
            // First, so that a packet that comes from here on notes it again.
            self.denied.remove(key)?;
            // It may have been allowed since.
            if self.proofs.get(key).is_none() {
                tuples.extend(tuple(key));
            }
        }
        // Where programs mark, a mark is newer than the note. Elsewhere it is nobody's word.
        let (found, others): (Vec<_>, Vec<_>) =
            tuples.into_iter().partition(|tuple| FOUND.contains(&tuple.protocol));
        self.table.delete_unmarked(&found, self.marked.map_or(0, ProofBit::mask))?;
        self.table.delete_unmarked(&others, 0)?;
        Ok(keys.len())
    }
}

impl From<ConntrackError> for KernelError {
    fn from(error: ConntrackError) -> Self {
        Self::Connections(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_tuples_and_back() {
        let cases = [
            ("10.0.0.1", "10.0.0.2", 6, Detail::Ports { source: 4000, destination: 80 }),
            ("fd00::1", "fd00::2", 17, Detail::Ports { source: 1, destination: 65_535 }),
            ("10.0.0.1", "10.0.0.2", 1, Detail::Icmp { kind: 8, code: 0, id: 77 }),
            ("fd00::1", "fd00::2", 58, Detail::Icmp { kind: 128, code: 0, id: 77 }),
            ("10.0.0.1", "10.0.0.2", 89, Detail::Nothing),
        ];
        for (source, destination, protocol, detail) in cases {
            let it = Tuple {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                protocol,
                detail,
                zone: 0,
            };
            assert_eq!(tuple(&words(&key(&it))), Some(it));
        }
        assert_eq!(tuple(&[0; 5]), None, "no family");
    }

    /// As the program copies them from the kernel's memory.
    #[test]
    fn words_are_the_memory_of_a_tuple() {
        let key = Key {
            source: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
            source_port: [17, 18],
            family: u16::from_ne_bytes([19, 20]),
            destination: [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36],
            destination_port: [37, 38],
            protocol: 39,
            direction: 40,
        };
        let bytes: Vec<u8> = words(&key).iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, (1..=40).collect::<Vec<u8>>());
    }
}
