//! The follower of interfaces against the kernel: what is there, what changes, and that nothing is lost.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use npm_agent::interfaces::follow::{Change, Follower};
use npm_agent::interfaces::{AdminState, Framing, Interface, Kind};
use npm_tests::exec;
use npm_tests::lab::netns::Namespaces;
use npm_tests::lab::require_root;

/// How long an event may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing comes where nothing should.
const SILENCE: Duration = Duration::from_millis(200);

/// Waits for changes until `wanted` is among them, and gives all.
fn until(follower: &mut Follower, wanted: impl Fn(&Change) -> bool) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    while !changes.iter().any(&wanted) {
        let more = follower.wait(PATIENCE)?;
        ensure!(!more.is_empty(), "it did not come; what came: {changes:?}");
        changes.extend(more);
    }
    Ok(changes)
}

fn find<'a>(follower: &'a Follower, name: &str) -> Result<&'a Interface> {
    let found = follower.known().values().find(|interface| interface.name == name);
    found.with_context(|| format!("no {name}"))
}

#[test]
fn every_change_is_told() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let namespaces = Namespaces::create(["node", "pod"])?;
    let pod = namespaces.members()[1].name().to_owned();
    namespaces.members()[0].run(|| {
        let ip = |line: &str| exec::run("ip", &line.split(' ').collect::<Vec<_>>());
        ip("link add before type bridge")?;
        let mut follower = Follower::open()?;
        assert_eq!(find(&follower, "lo")?.kind, Kind::Loopback);
        assert_eq!(find(&follower, "before")?.kind, Kind::Bridge);
        // Some devices come with the namespace; nothing is told of what was listed.
        assert_eq!(follower.wait(Duration::ZERO)?, []);

        ip(&format!("link add host type veth peer name eth0 netns {pod}"))?;
        let named = |wanted: &'static str| {
            move |change: &Change| matches!(change, Change::Appeared(now) if now.name == wanted)
        };
        until(&mut follower, named("host"))?;
        let host = find(&follower, "host")?.clone();
        assert_eq!((&host.kind, host.state, host.framing), (&Kind::Veth, AdminState::Down, Framing::Ethernet));
        assert_eq!(host.master, None);

        ip("link set host up")?;
        until(&mut follower, |change| matches!(change, Change::Altered { now, .. } if now.state == AdminState::Up))?;
        ip("link add br0 type bridge")?;
        ip("link set host master br0")?;
        until(&mut follower, |change| matches!(change, Change::Altered { now, .. } if now.master.is_some()))?;
        assert_eq!(find(&follower, "br0")?.kind, Kind::Bridge);
        let master = find(&follower, "host")?.master.clone().context("no master")?;
        assert_eq!((master.index, master.port.as_deref()), (find(&follower, "br0")?.index, Some("bridge")));

        // The kernel says RTM_DELLINK, of the bridge's family, when a port leaves; the interface stays.
        ip("link set host nomaster")?;
        let changes = until(
            &mut follower,
            |change| matches!(change, Change::Altered { now, .. } if now.index == host.index && now.master.is_none()),
        )?;
        let rest = follower.wait(SILENCE)?;
        let ends = changes.iter().chain(&rest).filter(|change| matches!(change, Change::Gone(_))).count();
        assert_eq!(ends, 0, "{changes:?} {rest:?}");

        ip("link set host down")?;
        ip("link set host name other")?;
        until(
            &mut follower,
            |change| matches!(change, Change::Altered { before, now } if before.name == "host" && now.name == "other"),
        )?;
        assert_eq!(find(&follower, "other")?.index, host.index);
        // Into another namespace: gone from this one.
        ip(&format!("link set other netns {pod}"))?;
        until(&mut follower, |change| matches!(change, Change::Gone(gone) if gone.index == host.index))?;
        ip("link del br0")?;
        until(&mut follower, |change| matches!(change, Change::Gone(gone) if gone.name == "br0"))?;

        ip("tuntap add tun0 mode tun")?;
        until(&mut follower, named("tun0"))?;
        assert_eq!(find(&follower, "tun0")?.framing, Framing::Ip);
        assert_eq!(follower.overruns(), 0);
        Ok(())
    })
}

#[test]
fn what_the_kernel_had_no_room_for_is_listed() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    const COUNT: usize = 200;
    let namespaces = Namespaces::create(["node"])?;
    namespaces.members()[0].run(|| {
        exec::run("ip", &["link", "add", "doomed", "type", "bridge"])?;
        // The kernel makes it 2,304 bytes: hardly one event.
        let mut follower = Follower::with_receive_buffer(1)?;
        let batch: String = (0..COUNT).map(|index| format!("link add d{index} type bridge\n")).collect();
        exec::run_with_input("ip", &["-batch", "-"], &format!("link del doomed\n{batch}"))?;
        let changes = follower.wait(PATIENCE)?;
        assert!(follower.overruns() > 0, "the test has not filled the buffer");
        let appeared =
            |change: &&Change| matches!(change, Change::Appeared(now) if now.name.starts_with('d'));
        assert_eq!(changes.iter().filter(appeared).count(), COUNT);
        let gone = |change: &&Change| matches!(change, Change::Gone(gone) if gone.name == "doomed");
        assert_eq!(changes.iter().filter(gone).count(), 1);
        assert_eq!(follower.wait(SILENCE)?, []);
        Ok(())
    })
}

/// As a CNI does it: the pair, its end moved into the pod, then up. Whoever attaches has until then.
#[test]
fn an_interface_is_known_before_it_is_up() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    const COUNT: usize = 60;
    let namespaces = Namespaces::create(["node", "pod"])?;
    let node = &namespaces.members()[0];
    let pod = namespaces.members()[1].name();
    let (told, hears) = mpsc::channel();
    let (stop, stopped) = mpsc::channel::<()>();
    let follower = std::thread::scope(|scope| -> Result<(usize, BTreeSet<String>)> {
        let (ready, is_ready) = mpsc::channel();
        let thread = scope.spawn(move || {
            node.run(move || {
                let mut follower = Follower::open()?;
                ready.send(())?;
                while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                    for change in follower.wait(Duration::from_millis(50))? {
                        if let Change::Appeared(interface) = change {
                            told.send((interface.name, interface.state))?;
                        }
                    }
                }
                Ok(())
            })
        });
        is_ready.recv_timeout(PATIENCE).context("the follower has not started")?;
        let (mut early, mut seen) = (0, BTreeSet::new());
        for index in 0..COUNT {
            let name = format!("host{index}");
            node.exec("ip", &["link", "add", &name, "type", "veth", "peer", "name", "eth0", "netns", pod])?;
            // The step between: addresses in the pod.
            node.exec("ip", &["-n", pod, "addr", "add", "10.0.0.1/32", "dev", "eth0"])?;
            for (known, state) in hears.try_iter() {
                early += usize::from(known == name && state == AdminState::Down);
                seen.insert(known);
            }
            node.exec("ip", &["link", "set", &name, "up"])?;
            node.exec("ip", &["-n", pod, "link", "set", "eth0", "name", &format!("e{index}")])?;
        }
        while seen.len() < COUNT {
            seen.insert(hears.recv_timeout(PATIENCE).context("an interface was never told of")?.0);
        }
        drop(stop);
        thread.join().expect("the follower's thread does not panic")?;
        Ok((early, seen))
    });
    let (early, seen) = follower?;
    eprintln!("{early} of {COUNT} interfaces were known while they were down; {} in the end", seen.len());
    assert!(early * 2 >= COUNT, "{early} of {COUNT}");
    Ok(())
}
