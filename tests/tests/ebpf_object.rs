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
use npm_common::packet::{Family, parse_ethernet};
use npm_common::tally::{Class, Count, Kind, Part, SLOTS};
use npm_tests::frames::{Dice, frame, takes};

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
        let class = Class::of(parse_ethernet(&frame.as_slice()).as_ref());
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
