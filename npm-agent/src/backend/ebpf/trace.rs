//! Packets as the programs see them, told as text while somebody looks: the program `trace`, beside the one that enforces.
//!
//! ```text
//! packet ─► trace (judges by the pinned maps, drops nothing) ─► the program that enforces ─► ...
//!             └─ aya-log's ring buffer ─► Trace::lines
//! ```
//!
//! It is loaded with the maps of an agent that runs, or has run, and attached by links that end with the process.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use npm_common::mark::ProofBit;

use super::attach::TRACE;
use super::btf::Offsets;
use super::choice::{Proofs, Reading};
use super::datapath::{PROOFS, RECENT, entry};
use super::denials::EVENTS;
use super::kernel::{KernelError, permitted};
use super::maps::NAMES;
use super::pins::Pins;
use crate::interfaces::Interface;

/// Elements of maps that the program does not use here: as few as the kernel takes of any kind.
const LEAST: u32 = 4096;

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
    /// The program can't be attached.
    #[error("cannot trace {interface} (it takes Linux 6.6 or later)")]
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
    // Its links are its own.
    _ebpf: Ebpf,
    logger: EbpfLogger<Lines>,
    lines: Receiver<String>,
}

impl Trace {
    /// Attaches the program before all others at these interfaces.
    ///
    /// # Errors
    /// No agent has left its maps there, or the kernel refuses the program. Nothing is left behind.
    pub fn begin(
        pins: &Pins,
        proof: ProofBit,
        filter: Filter,
        interfaces: &[&Interface],
    ) -> Result<Self, TraceError> {
        let width = pins.width();
        let mut paths: Vec<_> = NAMES.iter().map(|name| (*name, pins.rows(width).join(name))).collect();
        paths.push((PROOFS, pins.map(PROOFS)));
        // The loader would make what is not there, and pin it.
        let all = paths.iter().map(|(_, path)| path.clone()).chain([pins.program()]);
        if let Some(path) = all.into_iter().find(|path| !path.exists()) {
            return Err(TraceError::Nothing { path });
        }
        let enforcing = SchedClassifier::from_pin(pins.program()).and_then(|program| program.info());
        let enforcing = enforcing.map_err(KernelError::Program)?;
        let marks = [Reading::Cast, Reading::Probe].map(|reading| entry(reading, Proofs::Kfuncs));
        let is_marking = u32::from(enforcing.name_as_str().is_some_and(|name| marks.contains(&name)));

        let offsets = Offsets::of_this_kernel().map_err(KernelError::Types)?;
        let mut object = width.object().to_vec();
        offsets.link(&mut object);
        let (port, bit) = (filter.port.unwrap_or(0), proof.mask());
        let (version, [first, second]) = filter.words();
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
            .map_max_entries(EVENTS, LEAST);
        for (name, path) in &paths {
            loader.map_pin_path(name, path.as_path());
        }
        let mut ebpf = loader.load(&object).map_err(|error| permitted(error, KernelError::Object))?;
        let (sender, lines) = channel();
        let names = interfaces.iter().map(|it| (it.index.0, it.name.clone())).collect();
        let logger = EbpfLogger::init_with_logger(&mut ebpf, Lines { names, sender })?;
        let program = ebpf.program_mut(TRACE).ok_or(KernelError::Missing { name: TRACE })?;
        let program: &mut SchedClassifier = program.try_into().map_err(KernelError::Program)?;
        program.load().map_err(|error| permitted(error, KernelError::Program))?;
        for interface in interfaces {
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            let attached = program.attach_with_options(&interface.name, TcAttachType::Egress, first);
            let interface = || interface.name.clone();
            attached.map_err(|source| TraceError::Attach { interface: interface(), source })?;
        }
        Ok(Self { _ebpf: ebpf, logger, lines })
    }

    /// What was told since the last call, a line for each packet. What found no room in the buffer is in none.
    pub fn lines(&mut self) -> Vec<String> {
        self.logger.flush();
        self.lines.try_iter().collect()
    }
}

/// Puts names of interfaces for numbers.
struct Lines {
    names: BTreeMap<u32, String>,
    sender: Sender<String>,
}

impl Lines {
    fn line(&self, text: &str) -> String {
        let (number, rest) = text.split_once(' ').unwrap_or((text, ""));
        let name = number.parse().ok().and_then(|number: u32| self.names.get(&number));
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
        // Nobody listens any more: nothing is lost.
        let _ = self.sender.send(self.line(&record.args().to_string()));
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_its_interface_and_is_not_padded() {
        let lines = Lines { names: BTreeMap::from([(7, "eth0".to_owned())]), sender: channel().0 };
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
