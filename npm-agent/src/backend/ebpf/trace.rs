//! Packets as the programs see them, told as text while somebody looks: the program `trace`, beside the one that enforces.
//!
//! ```text
//! packet ─► trace (judges by the pinned maps, drops nothing) ─► the program that enforces ─► ...
//!             └─ aya-log's ring buffer ─► Trace::lines
//! ```
//!
//! It is loaded with the maps of an agent that runs, or has run, and attached by links that end with the process, at interfaces
//! where the agent's program is: elsewhere nobody does what it tells.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{MapData, MapError, PerCpuArray};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use npm_common::mark::ProofBit;

use super::attach::{TRACE, has_program};
use super::btf::Offsets;
use super::choice::{Proofs, Reading};
use super::datapath::{PROOFS, RECENT, entry};
use super::denials::EVENTS;
use super::kernel::{KernelError, permitted};
use super::maps::{MapsError, NAMES};
use super::pins::Pins;
use super::syscall::tcx_egress;
use crate::interfaces::{Index, Interface};

/// Bytes of a ring buffer that nothing is written to: as few as the kernel takes.
const LEAST_RING: u32 = 4096;

/// Lines that wait to be taken, at most. What comes beside them is left out.
const MOST_WAITING: usize = 4096;

/// Between two looks at what was told: the buffer holds some 500 packets.
const PAUSE: Duration = Duration::from_millis(20);

/// Packets that were looked for.
const TRACED: &str = "TRACED";

/// Why packets can't be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// There is nothing to judge by.
    #[error("no agent enforces by eBPF here: there is no {}", path.display())]
    Nothing {
        /// What is missing.
        path: PathBuf,
    },
    /// The program can't be loaded, or what is pinned can't be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// There are no links.
    #[error("tracing takes Linux 6.6 or later")]
    TooOld,
    /// It is not known where the agent's program is.
    #[error("cannot ask which programs are at {interface}")]
    Ask {
        /// Where.
        interface: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program can't be attached.
    #[error("cannot attach a program to {interface}")]
    Attach {
        /// Where.
        interface: String,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// The program's text can't be read.
    #[error("cannot read what the program tells")]
    Log(#[from] aya_log::Error),
}

/// Which packets are told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// At either end. `None`: all packets, those without ports included.
    pub port: Option<u16>,
    /// At either end.
    pub address: Option<IpAddr>,
}

impl Filter {
    /// The address's version and words, as the program compares them.
    fn words(&self) -> (u32, [u64; 2]) {
        match self.address {
            None => (0, [0; 2]),
            Some(IpAddr::V4(address)) => (4, [u32::from_ne_bytes(address.octets()).into(), 0]),
            Some(IpAddr::V6(address)) => {
                let [a, b, c, d, e, f, g, h, rest @ ..] = address.octets();
                (6, [[a, b, c, d, e, f, g, h], rest].map(u64::from_ne_bytes))
            }
        }
    }
}

/// Packets told of from here on. Dropped, nothing of it is left in the kernel.
pub struct Trace {
    // Its links are its own, and end with it.
    ebpf: Option<Ebpf>,
    traced: PerCpuArray<MapData, u64>,
    /// The number of the program that enforces.
    enforcing: u32,
    names: Names,
    lines: Receiver<String>,
    is_over: Arc<AtomicBool>,
    /// Lines that were taken.
    told: u64,
}

/// Interfaces that are traced, by their numbers.
type Names = Arc<Mutex<BTreeMap<u32, String>>>;

impl Trace {
    /// Loads the program. It is attached nowhere yet.
    ///
    /// # Errors
    /// No agent has left its maps there, or the kernel refuses the program. Nothing is left behind.
    pub fn load(pins: &Pins, proof: ProofBit, filter: Filter) -> Result<Self, TraceError> {
        let offsets = Offsets::of_this_kernel().map_err(KernelError::Types)?;
        let enforcing = enforcing(pins)?;
        let marks = [Reading::Cast, Reading::Probe].map(|reading| entry(reading, Proofs::Kfuncs));
        let is_marking = u32::from(enforcing.name.is_some_and(|name| marks.contains(&name.as_str())));
        let width = pins.width();
        let mut object = width.object().to_vec();
        offsets.link(&mut object);
        let (port, bit) = (filter.port.unwrap_or(0), proof.mask());
        let (version, [first, second]) = filter.words();
        let mut paths: Vec<_> = NAMES.iter().map(|name| (*name, pins.rows(width).join(name))).collect();
        paths.push((PROOFS, pins.map(PROOFS)));
        let mut loader = EbpfLoader::new();
        offsets.tell(&mut loader);
        loader
            .override_global("PROOF_BIT", &bit, true)
            .override_global("TRACE_PORT", &port, true)
            .override_global("TRACE_VERSION", &version, true)
            .override_global("TRACE_ADDRESS_FIRST", &first, true)
            .override_global("TRACE_ADDRESS_SECOND", &second, true)
            .override_global("TRACE_MARKS", &is_marking, true)
            .map_max_entries(RECENT, 1)
            .map_max_entries(EVENTS, LEAST_RING);
        for (name, path) in &paths {
            // The loader would make what is not there, and pin it.
            if !path.exists() {
                return Err(TraceError::Nothing { path: path.clone() });
            }
            loader.map_pin_path(name, path.as_path());
        }
        let mut ebpf = loader.load(&object).map_err(|error| permitted(error, KernelError::Object))?;
        let program: &mut SchedClassifier = program(&mut ebpf)?;
        program.load().map_err(|error| permitted(error, KernelError::Program))?;
        let failed = |source: MapError| KernelError::Maps(MapsError::Map { name: TRACED, source });
        let traced = ebpf.take_map(TRACED).ok_or(KernelError::Missing { name: TRACED })?;
        let traced = PerCpuArray::try_from(traced).map_err(failed)?;
        let (sender, lines) = sync_channel(MOST_WAITING);
        let names = Names::default();
        let logger = EbpfLogger::init_with_logger(&mut ebpf, Lines { names: names.clone(), sender })?;
        let is_over = Arc::new(AtomicBool::new(false));
        read(logger, Arc::clone(&is_over)).map_err(KernelError::Thread)?;
        Ok(Self { ebpf: Some(ebpf), traced, enforcing: enforcing.id, names, lines, is_over, told: 0 })
    }

    /// Attaches the program before all others at those of these interfaces where the agent's is; gives how many those are. Where
    /// it is already, and where an interface has just gone, nothing happens.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn follow<'a>(
        &mut self,
        interfaces: impl Iterator<Item = &'a Interface>,
    ) -> Result<usize, TraceError> {
        for interface in interfaces {
            let Interface { index: Index(index), name, .. } = interface;
            if self.names().contains_key(index) || !self.is_enforced(interface)? {
                continue;
            }
            self.names().insert(*index, name.clone());
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            let Some(ebpf) = &mut self.ebpf else { break };
            match program(ebpf)?.attach_with_options(name, TcAttachType::Egress, first) {
                Ok(_) => {}
                Err(_) if !self.is_enforced(interface)? => drop(self.names().remove(index)),
                Err(source) => return Err(TraceError::Attach { interface: name.clone(), source }),
            }
        }
        let count = self.names().len();
        Ok(count)
    }

    /// Takes the program away; what it has told until now is to be had still.
    pub fn detach(&mut self) {
        self.ebpf = None;
    }

    /// Whether the agent's program is there.
    fn is_enforced(&self, interface: &Interface) -> Result<bool, TraceError> {
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::EINVAL) => TraceError::TooOld,
            _ => TraceError::Ask { interface: interface.name.clone(), source },
        };
        let is_gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENODEV);
        let linked = match tcx_egress(interface.index) {
            Ok(linked) => linked,
            Err(error) if is_gone(&error) => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        if linked.contains(&self.enforcing) {
            return Ok(true);
        }
        match has_program(interface.index) {
            Err(error) if is_gone(&error) => Ok(false),
            answer => answer.map_err(failed),
        }
    }

    /// Whether the agent enforces by the program and the maps still that were there when this began.
    ///
    /// # Errors
    /// It enforces by none any more.
    pub fn is_current(&self, pins: &Pins) -> Result<bool, TraceError> {
        Ok(enforcing(pins)?.id == self.enforcing)
    }

    /// The next line, a packet's. `None`: there is none within this time.
    pub fn line(&mut self, patience: Duration) -> Option<String> {
        match self.lines.recv_timeout(patience) {
            Ok(line) => {
                self.told += 1;
                Some(line)
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
        }
    }

    /// Packets that were looked for and are in no line until now: they came faster than lines were taken, or are about to be.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn untold(&self) -> Result<u64, TraceError> {
        let failed = |source| KernelError::Maps(MapsError::Map { name: TRACED, source });
        let traced: u64 = self.traced.get(&0, 0).map_err(failed)?.iter().sum();
        Ok(traced.saturating_sub(self.told))
    }

    fn names(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, KernelError> {
    let program = ebpf.program_mut(TRACE).ok_or(KernelError::Missing { name: TRACE })?;
    program.try_into().map_err(KernelError::Program)
}

/// The program that enforces.
struct Enforcing {
    id: u32,
    name: Option<String>,
}

fn enforcing(pins: &Pins) -> Result<Enforcing, TraceError> {
    let path = pins.program();
    if !path.exists() {
        return Err(TraceError::Nothing { path });
    }
    let program = SchedClassifier::from_pin(path).and_then(|program| program.info());
    let program = program.map_err(KernelError::Program)?;
    Ok(Enforcing { id: program.id(), name: program.name_as_str().map(str::to_owned) })
}

/// A thread that takes what was told. While packets come faster than it reads it does not return from a look; so nobody waits
/// for it.
fn read(mut logger: EbpfLogger<Lines>, is_over: Arc<AtomicBool>) -> io::Result<()> {
    let work = move || {
        while !is_over.load(Ordering::Relaxed) {
            logger.flush();
            std::thread::sleep(PAUSE);
        }
    };
    std::thread::Builder::new().name("trace".into()).spawn(work).map(drop)
}

/// Puts names of interfaces for numbers.
struct Lines {
    names: Names,
    sender: SyncSender<String>,
}

impl Lines {
    fn line(&self, text: &str) -> String {
        let (number, rest) = text.split_once(' ').unwrap_or((text, ""));
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let name = number.parse().ok().and_then(|number: u32| names.get(&number));
        // The kernel's words are padded, and what has no port has the number 0.
        let words = rest.split_whitespace().map(|word| word.strip_suffix(":0").unwrap_or(word));
        let words = words.collect::<Vec<_>>().join(" ").replace(" ,", ",");
        format!("{}: {words}", name.map_or(number, String::as_str))
    }
}

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // Without room, or a listener, it is one of those that are counted and not told.
        let _ = self.sender.try_send(self.line(&record.args().to_string()));
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_its_interface_and_is_not_padded() {
        let names = Arc::new(Mutex::new(BTreeMap::from([(7, "eth0".to_owned())])));
        let lines = Lines { names, sender: sync_channel(1).0 };
        let text = "7 10.0.0.1:80 > 10.0.0.2:443 tcp   , conntrack new     , ingress_denied     ";
        assert_eq!(lines.line(text), "eth0: 10.0.0.1:80 > 10.0.0.2:443 tcp, conntrack new, ingress_denied");
        let text = "7 [fe80::1]:0 > [ff02::16]:0 icmpv6, conntrack none    , local              ";
        assert_eq!(lines.line(text), "eth0: [fe80::1] > [ff02::16] icmpv6, conntrack none, local");
        assert_eq!(lines.line("8 what"), "8: what");
    }

    #[test]
    fn an_address_is_its_words_in_memory() {
        let words = |text: &str| Filter { address: Some(text.parse().unwrap()), port: None }.words();
        assert_eq!(Filter::default().words(), (0, [0, 0]));
        assert_eq!(words("1.2.3.4"), (4, [u64::from(u32::from_ne_bytes([1, 2, 3, 4])), 0]));
        let halves = [[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 9]];
        assert_eq!(words("2001:db8::9"), (6, halves.map(u64::from_ne_bytes)));
    }
}
