//! The agent's view of conntrack's table, against real entries in a namespace of its own and the kernel's own listing.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use etherparse::{IpNumber, PacketBuilder};
use npm_agent::conntrack::{Conntrack, Deletion, Detail, Entry, MarkFilter, Tuple};
use npm_tests::exec;
use npm_tests::lab::netns::Namespaces;
use npm_tests::lab::packet::{IpSender, Sctp, SctpChunk};
use npm_tests::lab::require_root;

const BIT: u32 = 0x0100_0000;
const FOREIGN: u32 = 0x0040_0002;
const ENDS: [[&str; 2]; 2] = [["10.9.0.1", "10.9.0.2"], ["fd09::1", "fd09::2"]];

/// A namespace that tracks what it sends to itself. Zones: port 777 in both directions, 778 in the original one.
fn tracking() -> Result<Namespaces> {
    let namespaces = Namespaces::create(["table"])?;
    namespaces.members()[0].run(|| {
        exec::run("ip", &["link", "set", "lo", "up"])?;
        for (ends, prefix) in ENDS.into_iter().zip(["/32", "/128"]) {
            for end in ends {
                exec::run("ip", &["addr", "add", &format!("{end}{prefix}"), "dev", "lo"])?;
            }
        }
        let rules = format!(
            "*raw\n-A OUTPUT -p udp --dport 777 -j CT --zone 7\n-A OUTPUT -p udp --dport 778 -j CT --zone-orig 9\nCOMMIT\n\
             *filter\n-A OUTPUT -p tcp --dport 8080 -m conntrack --ctstate NEW -j CONNMARK --set-xmark {FOREIGN:#x}/{FOREIGN:#x}\n\
             -A OUTPUT -m conntrack --ctstate NEW\nCOMMIT\n"
        );
        for program in ["iptables-nft-restore", "ip6tables-nft-restore"] {
            exec::run_with_input(program, &["-w"], &rules)?;
        }
        Ok(())
    })?;
    Ok(namespaces)
}

/// One connection of every kind in each family; the TCP ones live as long as what is returned.
fn connections() -> Result<Vec<(TcpListener, TcpStream)>> {
    let sender = IpSender::open()?;
    let mut alive = Vec::new();
    for [source, destination] in ENDS {
        let (source, destination): (IpAddr, IpAddr) = (source.parse()?, destination.parse()?);
        let listener = TcpListener::bind((destination, 8080))?;
        alive.push((listener, TcpStream::connect((destination, 8080))?));
        let socket = UdpSocket::bind((source, 0))?;
        for port in [53, 777, 778] {
            socket.send_to(b"a question", (destination, port))?;
        }
        let chunk = SctpChunk::Init;
        let sctp = Sctp { source: 4000, destination: 9, verification: 0, tag: 7, chunk }.to_bytes();
        for (protocol, payload) in [(132, sctp.as_slice()), (89, b"some bytes of another protocol")] {
            let mut packet = Vec::new();
            match (source, destination) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => PacketBuilder::ipv4(
                    source.octets(),
                    destination.octets(),
                    64,
                )
                .write(&mut packet, IpNumber(protocol), payload)?,
                (IpAddr::V6(source), IpAddr::V6(destination)) => PacketBuilder::ipv6(
                    source.octets(),
                    destination.octets(),
                    64,
                )
                .write(&mut packet, IpNumber(protocol), payload)?,
                _ => unreachable!("ends are of one family"),
            }
            sender.send(&packet)?;
        }
        let mut packet = Vec::new();
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ipv4(source.octets(), destination.octets(), 64)
                    .icmpv4_echo_request(0xabcd, 1)
                    .write(&mut packet, b"ping")?;
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                PacketBuilder::ipv6(source.octets(), destination.octets(), 64)
                    .icmpv6_echo_request(0xabcd, 1)
                    .write(&mut packet, b"ping")?;
            }
            _ => unreachable!("ends are of one family"),
        }
        sender.send(&packet)?;
    }
    Ok(alive)
}

/// An entry's parts as numbers in a line, in the order and the spelling of the kernel's listing.
fn words(entry: &Entry) -> String {
    let Entry { original, reply, mark, .. } = entry;
    // A zone of both directions stands at the end, one of a single direction behind its tuple.
    let both = original.zone == reply.zone;
    let side = |tuple: &Tuple, zone: &str| {
        let ends = format!("src={} dst={}", tuple.source, tuple.destination);
        let detail = match tuple.detail {
            Detail::Ports { source, destination } => format!(" sport={source} dport={destination}"),
            Detail::Icmp { kind, code, id } => format!(" type={kind} code={code} id={id}"),
            Detail::Nothing => String::new(),
        };
        let zone = if both || tuple.zone == 0 { String::new() } else { format!(" {zone}={}", tuple.zone) };
        format!("{ends}{detail}{zone}")
    };
    let zone = if both && original.zone != 0 { format!(" zone={}", original.zone) } else { String::new() };
    let (there, back) = (side(original, "zone-orig"), side(reply, "zone-reply"));
    format!("{} {there} {back} mark={mark}{zone}", original.protocol)
}

/// The kernel's own listing in the words of [`words`].
fn listed() -> Result<BTreeSet<String>> {
    let text =
        std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").context("the kernel's listing")?;
    let line = |line: &str| {
        let keep = ["src", "dst", "sport", "dport", "type", "code", "id", "mark", "zone-orig", "zone-reply"];
        let protocol = line.split_whitespace().nth(3).unwrap_or_default();
        let parts = line.split_whitespace().filter_map(|word| {
            let (key, value) = word.split_once('=')?;
            if key == "zone" {
                return (value != "0").then(|| word.to_owned());
            }
            let value = match key {
                // The listing writes IPv6 addresses in full.
                "src" | "dst" => value.parse::<IpAddr>().ok()?.to_string(),
                _ => value.to_owned(),
            };
            keep.contains(&key).then(|| format!("{key}={value}"))
        });
        format!("{protocol} {}", parts.collect::<Vec<_>>().join(" "))
    };
    Ok(text.lines().map(line).collect())
}

#[test]
fn the_table_is_read_as_the_kernel_lists_it() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let namespaces = tracking()?;
    namespaces.members()[0].run(|| {
        let _alive = connections()?;
        let mut table = Conntrack::open()?;
        let entries = table.entries()?;
        let ours: BTreeSet<String> = entries.iter().map(words).collect();
        assert_eq!(ours, listed()?);
        // TCP, three of UDP, SCTP, another protocol, ICMP; twice.
        assert_eq!(entries.len(), 14, "{ours:#?}");
        assert_eq!(table.count()?, 14);
        for kind in [
            "type=8 code=0",
            "type=128 code=0",
            " zone=7",
            " zone-orig=9",
            "132 src",
            "89 src",
            "mark=4194306",
        ] {
            assert!(ours.iter().any(|line| line.contains(kind)), "{kind}: {ours:#?}");
        }
        for entry in &entries {
            assert_eq!(table.entry(&entry.original)?, Some(*entry));
            // By the reply's tuple the kernel finds it too; it is not that connection's original direction.
            assert_eq!(table.entry(&entry.reply)?, None);
        }
        Ok(())
    })
}

#[test]
fn one_bit_is_set_and_no_other_changes() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let namespaces = tracking()?;
    namespaces.members()[0].run(|| {
        let _alive = connections()?;
        let mut table = Conntrack::open()?;
        let before = table.entries()?;
        assert_eq!(table.mark_existing(BIT)?, 14);
        let after = table.entries()?;
        assert_eq!(table.mark_existing(BIT)?, 0);
        for entry in &before {
            let expected = Entry { mark: entry.mark | BIT, ..*entry };
            assert!(after.contains(&expected), "{expected:?} is not in {after:#?}");
        }
        assert_eq!(after.iter().filter(|entry| entry.mark == FOREIGN | BIT).count(), 2);
        assert_eq!(table.entries_where(MarkFilter::without(BIT), |_| true)?, []);
        let filter = MarkFilter { value: BIT | FOREIGN, mask: BIT | FOREIGN };
        assert_eq!(table.entries_where(filter, |_| true)?.len(), 2);
        Ok(())
    })
}

#[test]
fn exactly_what_is_named_is_deleted() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let namespaces = tracking()?;
    namespaces.members()[0].run(|| {
        let _alive = connections()?;
        let mut table = Conntrack::open()?;
        let entries = table.entries()?;
        for (gone, entry) in entries.iter().enumerate() {
            assert_eq!(table.delete(&entry.reply)?, Deletion::Absent, "{entry:?}: that is its reply");
            assert_eq!(table.entries()?.len(), entries.len() - gone);
            assert_eq!(table.delete(&entry.original)?, Deletion::Deleted, "{entry:?}");
            assert_eq!(table.delete(&entry.original)?, Deletion::Absent, "{entry:?}");
            assert_eq!(table.entries()?.len(), entries.len() - gone - 1);
        }
        // The next generation: an id of the last one deletes nothing of it, though the tuples of some are the same.
        drop(_alive);
        let _alive = connections()?;
        let again = table.entries()?;
        let same = |entry: &Entry| entries.iter().any(|old| old.original == entry.original);
        ensure!(again.iter().any(same), "no tuple came back");
        // The kernel makes an id of the tuple and the entry's address (nf_ct_get_id): one that lies where the last one of its
        // tuple lay is the same to everybody.
        let reborn =
            |entry: &Entry| entries.iter().any(|old| (old.original, old.id) == (entry.original, entry.id));
        let (twins, again): (Vec<Entry>, Vec<Entry>) = again.into_iter().partition(reborn);
        ensure!(again.iter().any(same), "all entries lie where they lay");
        assert_eq!(table.delete_entries(&entries)?, twins.len());
        let survivors: Vec<Entry> = table.entries()?;
        for entry in &again {
            assert!(survivors.iter().any(|survivor| survivor.id == entry.id), "{entry:?}");
        }
        // What was marked since it was named stays.
        let udp = table.entries_where(MarkFilter::ANY, |entry| entry.original.protocol == 17)?;
        table.mark_existing(BIT)?;
        let tuples: Vec<Tuple> = again.iter().map(|entry| entry.original).collect();
        assert_eq!(table.delete_unmarked(&tuples, BIT)?, 0);
        assert_eq!(table.delete_unmarked(&tuples, BIT << 1)?, tuples.len());
        assert_eq!(udp.len(), again.iter().filter(|entry| entry.original.protocol == 17).count());
        assert_eq!(table.delete_entries(&udp)?, 0, "they went with the rest");
        Ok(())
    })
}

/// Many more entries than fit into one read or one batch, while more arrive.
#[test]
fn a_large_table_is_read_marked_and_emptied() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let wanted: usize = std::env::var("NPM_CONNTRACK_ENTRIES").map_or(Ok(20_000), |text| text.parse())?;
    let namespaces = tracking()?;
    namespaces.members()[0].run(|| {
        let mut table = Conntrack::open()?;
        fill(wanted)?;
        assert_eq!(table.count()? as usize, wanted);
        let clock = |what: &str, start: Instant| eprintln!("{what} {wanted} entries: {:?}", start.elapsed());
        let start = Instant::now();
        assert_eq!(table.entries()?.len(), wanted);
        clock("reading", start);
        let start = Instant::now();
        assert_eq!(table.mark_existing(BIT)?, wanted);
        clock("marking", start);
        let start = Instant::now();
        assert_eq!(table.entries_where(MarkFilter::without(BIT), |_| true)?, []);
        clock("finding nothing unmarked in", start);
        let odd = |entry: &Entry| match entry.original.detail {
            Detail::Ports { destination, .. } => destination % 2 == 1,
            Detail::Icmp { .. } | Detail::Nothing => false,
        };
        let start = Instant::now();
        assert_eq!(table.delete_where(MarkFilter::ANY, odd)?, wanted / 2);
        clock("deleting half of", start);
        let tuples: Vec<Tuple> = table.entries()?.iter().map(|entry| entry.original).collect();
        let start = Instant::now();
        assert_eq!(table.delete_unmarked(&tuples, BIT << 1)?, wanted / 2);
        clock("deleting by tuple the other half of", start);
        assert_eq!(table.entries()?, []);
        Ok(())
    })
}

/// Makes an entry for each of so many destination ports, from as many sockets as it takes.
fn fill(wanted: usize) -> Result<()> {
    const PORTS: u16 = 50_000;
    let mut left = wanted;
    while left > 0 {
        let socket = UdpSocket::bind((ENDS[0][0].parse::<IpAddr>()?, 0))?;
        for port in (1000..).take(left.min(usize::from(PORTS))) {
            let to = SocketAddr::new(ENDS[0][1].parse()?, port);
            // The port's refusal of an earlier packet is reported on a later one, which is then not sent.
            while socket.send_to(b"x", to).is_err() {}
        }
        left -= left.min(usize::from(PORTS));
    }
    Ok(())
}
