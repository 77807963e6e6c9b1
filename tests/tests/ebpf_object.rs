//! The committed eBPF object in this kernel: it loads, it reads headers exactly as user space does, it counts real
//! traffic under both ways of attaching, and it stops nothing.
//!
//! Live traffic runs over the loopback interface of a network namespace that only this test's thread is in; it is
//! gone with the thread, however the test ends.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::maps::PerCpuArray;
use aya::programs::tc::{NlOptions, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, TestRun, TestRunOptions};
use aya::util::KernelVersion;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use npm_common::packet::{
    ETHERNET_LEN_BYTES, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, Family, IPV4_LEN_BYTES, IPV6_LEN_BYTES,
    MAX_EXTENSIONS, parse_ethernet,
};
use npm_common::tally::{Class, Count, Kind, Part, SLOTS};

/// What a TC program returns to let the next one decide (include/uapi/linux/pkt_cls.h).
const TC_ACT_UNSPEC: u32 = u32::MAX;

/// The object in the kernel.
struct Observer {
    ebpf: Ebpf,
}

impl Observer {
    fn load() -> Result<Self> {
        let object = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../npm-ebpf/npm-ebpf.o");
        let mut ebpf = Ebpf::load_file(&object).with_context(|| format!("loading {}", object.display()))?;
        program(&mut ebpf)?.load().context("passing the verifier")?;
        Ok(Self { ebpf })
    }

    fn program(&mut self) -> Result<&mut SchedClassifier> {
        program(&mut self.ebpf)
    }

    /// Every slot's count, summed over the CPUs.
    fn tally(&self) -> Result<Vec<Count>> {
        let map = self.ebpf.map("TALLY").context("finding the counters")?;
        let map = PerCpuArray::<_, [u64; 2]>::try_from(map).context("reading the counters")?;
        (0..SLOTS)
            .map(|slot| {
                let mut sum = Count::default();
                for [packets, bytes] in map.get(&slot, 0).context("reading a counter")?.iter() {
                    sum.packets += packets;
                    sum.bytes += bytes;
                }
                Ok(sum)
            })
            .collect()
    }

    fn count(&self, class: Class) -> Result<Count> {
        Ok(self.tally()?[class.slot() as usize])
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier> {
    let program = ebpf.program_mut("observe").context("finding the program")?;
    program.try_into().context("taking it as a TC program")
}

/// Whether this test can run; under CI it must.
fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: eBPF programs are loaded by root only");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "a skipped test is a failure in CI");
    }
    root
}

/// Runs `work` on a thread that is alone in a network namespace, its loopback interface up.
fn in_own_network<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("making a namespace")?;
            // Sysfs shows the network namespace of whoever mounted it; in our own mount namespace nobody sees this.
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
                .context("making / private")?;
            mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("mounting /sys")?;
            // IFF_UP, IFF_LOOPBACK (include/uapi/linux/if.h).
            std::fs::write("/sys/class/net/lo/flags", "0x9").context("setting the loopback up")?;
            work()
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

const PATIENCE: Duration = Duration::from_secs(10);
const DATAGRAMS: u64 = 20;
const DATAGRAM_LEN_BYTES: usize = 100;
const STREAM_LEN_BYTES: usize = 1 << 20;

/// Sends datagrams and a stream through the loopback and checks that everything arrives.
fn traffic(address: IpAddr) -> Result<()> {
    let receiver = UdpSocket::bind(SocketAddr::new(address, 0)).context("binding UDP")?;
    receiver.set_read_timeout(Some(PATIENCE))?;
    let sender = UdpSocket::bind(SocketAddr::new(address, 0)).context("binding UDP")?;
    for _ in 0..DATAGRAMS {
        sender.send_to(&[7; DATAGRAM_LEN_BYTES], receiver.local_addr()?).context("sending UDP")?;
        let len = receiver.recv(&mut [0; 2000]).context("receiving UDP")?;
        ensure!(len == DATAGRAM_LEN_BYTES);
    }

    let listener = TcpListener::bind(SocketAddr::new(address, 0)).context("listening")?;
    let to = listener.local_addr()?;
    let writer = std::thread::spawn(move || -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connecting")?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&vec![1; STREAM_LEN_BYTES]).context("writing")
    });
    let (mut stream, _) = listener.accept().context("accepting")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received).context("reading")?;
    ensure!(received.len() == STREAM_LEN_BYTES);
    writer.join().expect("the writer does not panic")
}

fn counts_live_traffic(attach: impl FnOnce(&mut SchedClassifier) -> Result<()> + Send) -> Result<()> {
    in_own_network(|| {
        let mut observer = Observer::load()?;
        attach(observer.program()?)?;
        for (family, address) in
            [(Family::V4, IpAddr::V4(Ipv4Addr::LOCALHOST)), (Family::V6, IpAddr::V6(Ipv6Addr::LOCALHOST))]
        {
            let class = |kind| Class::Read { family, kind, part: Part::WithHeader };
            ensure!(observer.count(class(Kind::Udp))? == Count::default(), "nothing was sent yet");
            traffic(address)?;

            let headers = 14 + 8 + if family == Family::V4 { 20 } else { 40 };
            let udp = observer.count(class(Kind::Udp))?;
            let bytes = DATAGRAMS * (headers + DATAGRAM_LEN_BYTES as u64);
            ensure!(udp == Count { packets: DATAGRAMS, bytes }, "{family:?} UDP: {udp:?}");
            // Aggregates (GSO) are not in one piece in memory: fewer packets than segments, all bytes.
            let tcp = observer.count(class(Kind::Tcp))?;
            ensure!(tcp.bytes > STREAM_LEN_BYTES as u64, "{family:?} TCP: {tcp:?}");
            ensure!(tcp.packets > 5 && tcp.packets < 2000, "{family:?} TCP: {tcp:?}");
        }
        Ok(())
    })
}

/// What the verifier went through, most of it in the parser; a tenth more than at the last look is room enough.
#[test]
fn the_verifiers_work_does_not_grow() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    for (object, name, most) in [
        ("npm-ebpf.o", "observe", 52_500),
        ("npm-ebpf.o", "verdict", 69_000),
        ("npm-ebpf-wide.o", "verdict", 94_000),
    ] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../npm-ebpf").join(object);
        let mut ebpf = Ebpf::load_file(&path).with_context(|| format!("loading {}", path.display()))?;
        let program: &mut SchedClassifier =
            ebpf.program_mut(name).context("finding the program")?.try_into()?;
        program.load().with_context(|| format!("passing the verifier: {name}"))?;
        let verified =
            program.info()?.verified_instruction_count().context("the kernel counts since 5.16")?;
        println!("{object}, {name}: {verified} instructions verified");
        ensure!(verified <= most, "{name}: the verifier followed {verified} instructions, more than {most}");
    }
    Ok(())
}

#[test]
fn counts_live_traffic_attached_by_tcx() -> Result<()> {
    if !is_root() || KernelVersion::current()? < KernelVersion::new(6, 6, 0) {
        return Ok(());
    }
    counts_live_traffic(|program| {
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        program.attach_with_options("lo", TcAttachType::Egress, options).context("attaching by TCX")?;
        Ok(())
    })
}

#[test]
fn counts_live_traffic_attached_by_clsact() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    counts_live_traffic(|program| {
        qdisc_add_clsact("lo").context("adding clsact")?;
        let options = TcAttachOptions::Netlink(NlOptions::default());
        program.attach_with_options("lo", TcAttachType::Egress, options).context("attaching to clsact")?;
        Ok(())
    })
}

/// A small generator, so that a failure can be repeated from its number (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }

    fn one_in(&mut self, sides: usize) -> bool {
        self.roll(sides) == 0
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.roll(choices.len())]
    }
}

/// A frame that is mostly right: tags, options, fragments, chains of extension headers, sometimes cut or damaged.
fn frame(dice: &mut Dice) -> Vec<u8> {
    let mut frame = vec![2; 12];
    for _ in 0..dice.pick(&[0, 0, 0, 1, 2, 3]) {
        let tag = dice.pick(&[ETHERTYPE_VLAN, ETHERTYPE_SERVICE_VLAN]);
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 7]);
    }
    let protocol: u8 = dice.pick(&[6, 17, 132, 1, 58, 47]);
    let payload = dice.roll(60);
    match dice.pick(&[4, 6, 4, 6, 4, 6, 0]) {
        4 => {
            frame.extend([0x08, 0x00]);
            let options = dice.pick(&[0, 0, 4, 40]);
            let total = dice.pick(&[20 + options + payload, 20 + options + payload, 0]) as u16;
            let fragment: u16 = dice.pick(&[0, 0, 0x4000, 0x2000, 0x2005, 0x0005]);
            frame.push(0x45 + (options / 4) as u8);
            frame.push(0);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 1]);
            frame.extend(fragment.to_be_bytes());
            frame.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            frame.extend(vec![1; options]);
        }
        6 => {
            frame.extend([0x86, 0xdd]);
            let mut chain: Vec<u8> = Vec::new();
            let count = dice.pick(&[0, 0, 1, 2, 3, MAX_EXTENSIONS, MAX_EXTENSIONS + 1]);
            let kinds: Vec<u8> = (0..count).map(|_| dice.pick(&[0, 43, 44, 51, 60])).collect();
            for (index, kind) in kinds.iter().enumerate() {
                let next = kinds.get(index + 1).copied().unwrap_or(protocol);
                let length = dice.pick(&[0_u8, 1, 2]);
                let size = match kind {
                    44 => 8,
                    51 => (usize::from(length) + 2) * 4,
                    _ => (usize::from(length) + 1) * 8,
                };
                let mut header = vec![0; size];
                header[0] = next;
                header[1] = length;
                if *kind == 44 {
                    let word: u16 = dice.pick(&[0, 1, 0x0048, 0x0049]);
                    header[2..4].copy_from_slice(&word.to_be_bytes());
                }
                chain.extend(header);
            }
            frame.extend([0x60, 0, 0, 0]);
            frame
                .extend((dice.pick(&[chain.len() + payload, chain.len() + payload, 0]) as u16).to_be_bytes());
            frame.extend([kinds.first().copied().unwrap_or(protocol), 64]);
            frame.extend([0xfd; 32]);
            frame.extend(chain);
        }
        _ => frame.extend([0x08, 0x06]),
    }
    frame.extend((0..payload).map(|byte| byte as u8));
    if dice.one_in(4) {
        frame.truncate(14 + dice.roll(frame.len()));
    }
    if dice.one_in(6) {
        let place = dice.roll(frame.len());
        frame[place] ^= 1 << dice.roll(8);
    }
    frame
}

/// Whether the kernel's test run takes the frame: it refuses one that ends with or in its Ethernet header, and from
/// Linux 6.18 on one that ends in an IP header right behind that (EINVAL; net/bpf/test_run.c).
fn takes(frame: &[u8]) -> bool {
    let least = match frame.get(12..14) {
        Some([0x08, 0x00]) => ETHERNET_LEN_BYTES + IPV4_LEN_BYTES,
        Some([0x86, 0xdd]) => ETHERNET_LEN_BYTES + IPV6_LEN_BYTES,
        Some(_) | None => ETHERNET_LEN_BYTES + 1,
    };
    frame.len() >= least
}

#[test]
fn reads_headers_as_user_space_does() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    const FRAMES: usize = 20_000;
    const SEED: u64 = 0x6e70_6d61_6765_6e74;
    let mut dice = Dice(SEED);
    let mut observer = Observer::load()?;
    let mut expected = observer.tally()?;
    let mut ran = 0;
    while ran < FRAMES {
        let frame = frame(&mut dice);
        if !takes(&frame) {
            continue;
        }
        ran += 1;
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame);
        let result =
            observer.program()?.test_run(options).with_context(|| format!("running {frame:02x?}"))?;
        ensure!(result.return_value == TC_ACT_UNSPEC, "{frame:02x?}: returned {}", result.return_value);
        let class = Class::of(&parse_ethernet(&frame.as_slice()));
        let slot = &mut expected[class.slot() as usize];
        slot.packets += 1;
        slot.bytes += frame.len() as u64;
        let counted = observer.tally()?;
        ensure!(
            counted == expected,
            "frame {ran} of seed {SEED:#x} is {class:?} in user space only: {frame:02x?}"
        );
    }
    for class in Class::all() {
        ensure!(
            expected[class.slot() as usize].packets > 0,
            "no frame was {class:?}: the generator lacks it"
        );
    }
    Ok(())
}
