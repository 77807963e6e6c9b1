//! What the eBPF backend knows of itself that lets traffic escape: it is on the board while it is so, and packets show it
//! where that is possible.

use anyhow::{Context, Result, bail, ensure};
use aya::programs::LinkOrder;
use aya::programs::tc::{NlOptions, TcAttachOptions, TcHandle};
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::enforcer::{Ebpf, Options};
use npm_agent::escape::{Board, Effect, Engine, Escape};
use npm_agent::exec::Tools;
use npm_agent::interfaces::select::Selection;
use npm_common::mark::ProofBit;
use npm_policy::compile::compile;
use npm_policy::flow::Transport;
use npm_policy::goal::{Family, Goal};
use npm_policy::model::Protocol;
use npm_tests::lab::netns::Netns;
use npm_tests::lab::other::Other;
use npm_tests::lab::probe::{Outcome, Probe};
use npm_tests::lab::service::Dialect;
use npm_tests::lab::{Lab, Spec, require_root};
use npm_tests::pair::{CLOSED, world};
use npm_tests::scenario::enforcer::tracking;

const UDP: Transport = Transport::Port(Protocol::Udp, 53);

struct Stage {
    // Dropped in this order: what enforces before where.
    backend: Ebpf,
    board: Board,
    goal: Goal,
    lab: Lab,
}

impl Stage {
    /// The interface of the pod `a` on the node is veth0.
    fn build(choice: &str) -> Result<Self> {
        let pods = [("a", ["10.241.0.2", "fd00:241::2"]), ("b", ["10.241.0.3", "fd00:241::3"])];
        let mut lab = Lab::build(&Spec::one_node(&pods)?)?;
        lab.listen(&[UDP])?;
        let node = lab.netns("node")?;
        let options = Options {
            instance: node.name().to_owned(),
            choice: choice.parse()?,
            iptables: tracking(Dialect::Nft),
            tools: Tools::default(),
            selection: Selection::default(),
            proof: ProofBit::DEFAULT,
        };
        let board = Board::new(Engine::Ebpf, None)?;
        let backend = node.run(|| Ok(Ebpf::new(options)?.with_board(board.clone())))?;
        let goal = compile(&world(CLOSED)?, "node-a").0;
        Ok(Self { backend, board, goal, lab })
    }

    fn node(&self) -> Result<Netns> {
        self.lab.netns("node").cloned()
    }

    fn apply(&mut self) -> Result<()> {
        self.node()?.run(|| Ok(self.backend.apply(&self.goal).map(drop)?))
    }

    fn verify(&mut self) -> Result<Vec<String>> {
        self.node()?.run(|| Ok(self.backend.verify()?.drift))
    }

    /// What becomes of a packet to the pod.
    fn reach_a(&mut self) -> Result<Outcome> {
        let from = self.lab.find("b")?;
        let (source, destination) = ("10.241.0.3".parse()?, "10.241.0.2".parse()?);
        let outcomes =
            self.lab.probe(&[Probe { from, source, destination, transport: UDP, expected: None }])?;
        Ok(outcomes[0])
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let removed = self.node().and_then(|node| node.run(|| Ok(self.backend.remove()?)));
        if let Err(error) = removed {
            eprintln!("pins are left behind: {error:#}");
        }
    }
}

/// A queueing discipline without egress stands in the place of the one that our filter needs.
#[test]
fn an_interface_without_the_program() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build("clsact")?;
    let node = stage.node()?;
    node.exec("tc", &["qdisc", "add", "dev", "veth0", "ingress"])?;
    assert!(stage.apply().is_err(), "an interface that refuses is a failure as well");
    match &stage.board.current()[..] {
        [(Effect::Unjudged, Escape::WithoutProgram { interface, reason })] => {
            assert_eq!(interface, "veth0");
            assert!(reason.contains("an ingress queueing discipline"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert_ne!(stage.reach_a()?, Outcome::Blocked, "the reason is real");
    node.exec("tc", &["qdisc", "del", "dev", "veth0", "ingress"])?;
    stage.verify()?;
    assert_eq!(stage.board.current(), []);
    assert_eq!(stage.reach_a()?, Outcome::Blocked);
    Ok(())
}

/// A refusal does not last longer than its reason: the next goal, which may come long before the next read-back, tries again.
#[test]
fn a_refused_interface_is_tried_again_with_each_goal() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build("tcx")?;
    let node = stage.node()?;
    // As many as the kernel takes at one place.
    let last = || TcAttachOptions::TcxOrder(LinkOrder::last());
    let mut others = Vec::new();
    while let Ok(other) = Other::attach(&node, "veth0", last()) {
        others.push(other);
        ensure!(others.len() <= 100, "the kernel takes any number of programs");
    }
    ensure!(others.len() > 10, "{} programs fill an interface", others.len());
    for _ in 0..2 {
        ensure!(stage.apply().is_err(), "an interface that refuses is a failure as well");
        let [(Effect::Unjudged, Escape::WithoutProgram { interface, .. })] = &stage.board.current()[..]
        else {
            bail!("{:?}", stage.board.current());
        };
        ensure!(interface == "veth0", "{interface}");
    }
    ensure!(stage.reach_a()? != Outcome::Blocked, "the reason is real");
    others.pop().context("a program")?.detach(&node)?;
    stage.apply()?;
    ensure!(stage.board.current().is_empty(), "{:?}", stage.board.current());
    ensure!(stage.reach_a()? == Outcome::Blocked, "the interface is judged again");
    others.into_iter().try_for_each(|other| other.detach(&node))
}

/// Programs with wider rows are loaded for a goal while one interface refuses any: all others go over to them at once, and that one
/// when it takes one.
#[test]
fn a_refusal_does_not_keep_others_from_wider_rows() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build("clsact")?;
    let node = stage.node()?;
    node.exec("tc", &["qdisc", "add", "dev", "veth1", "ingress"])?;
    ensure!(stage.apply().is_err(), "veth1 takes a program");
    ensure!(stage.reach_a()? == Outcome::Blocked, "the other interface has its program");

    // More peers than narrow rows have bits; the last allows what is tried.
    let peers = |number: u32| format!("{{podSelector: {{matchLabels: {{app: p{number}}}}}}}");
    let peers: Vec<String> =
        (0..1100).map(peers).chain(["{podSelector: {matchLabels: {app: b}}}".into()]).collect();
    let policy = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: many, namespace: x}}\n\
         spec: {{podSelector: {{matchLabels: {{app: a}}}}, policyTypes: [Ingress], ingress: [{{from: [{}]}}]}}\n",
        peers.join(", ")
    );
    stage.goal = compile(&world(&policy)?, "node-a").0;
    ensure!(stage.apply().is_err(), "veth1 takes a program");
    ensure!(stage.reach_a()? == Outcome::Answered, "veth0 is judged by the wide rows");
    stage.goal = compile(&world(CLOSED)?, "node-a").0;
    ensure!(stage.apply().is_err(), "veth1 takes a program");
    ensure!(stage.reach_a()? == Outcome::Blocked, "veth0 is judged by the maps that are written");

    node.exec("tc", &["qdisc", "del", "dev", "veth1", "ingress"])?;
    stage.apply()?;
    ensure!(stage.board.current().is_empty(), "{:?}", stage.board.current());
    for _ in 0..2 {
        stage.verify()?;
        ensure!(stage.reach_a()? == Outcome::Blocked, "still");
    }
    Ok(())
}

#[test]
fn programs_of_others_before_ours() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let first = || TcAttachOptions::TcxOrder(LinkOrder::first());
    // The filter that comes last is asked first.
    let filter = || {
        TcAttachOptions::Netlink(NlOptions {
            priority: 1,
            handle: TcHandle::new(0, 7),
            ..NlOptions::default()
        })
    };
    for (hook, others) in [("tcx", vec![first()]), ("clsact", vec![first(), filter()])] {
        let mut stage = Stage::build(hook)?;
        let node = stage.node()?;
        stage.apply()?;
        assert_eq!(stage.board.current(), [], "{hook}");
        for other in others {
            let other = Other::attach(&node, "veth0", other).context(hook)?;
            stage.verify()?;
            let expected = Escape::ProgramBefore { interface: "veth0".into(), program: "nothing".into() };
            assert_eq!(stage.board.current(), [(Effect::Unknown, expected)], "{hook}");
            other.detach(&node)?;
            stage.verify()?;
            assert_eq!(stage.board.current(), [], "{hook}");
        }
        // Behind ours it is nobody's business.
        let last = Other::attach(&node, "veth0", TcAttachOptions::TcxOrder(LinkOrder::last()))?;
        stage.verify()?;
        assert_eq!(stage.board.current().len(), usize::from(hook == "clsact"), "links come before filters");
        last.detach(&node)?;
    }
    Ok(())
}

#[test]
fn the_rule_that_tracks_connections_is_put_back_and_told() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    let mut stage = Stage::build("")?;
    let node = stage.node()?;
    stage.apply()?;
    assert_eq!(stage.board.current(), [], "at first there is none, which is no reason");
    node.exec("iptables-nft", &["-F", "NPM-AGENT-CONNTRACK"])?;
    let drift = stage.verify()?;
    assert!(drift.iter().any(|line| line.contains("the rule that tracks connections was gone")), "{drift:?}");
    let expected = Escape::ConntrackRuleGone { family: Family::V4 };
    assert_eq!(stage.board.current(), [(Effect::Stricter, expected)]);
    let rules = node.exec("iptables-nft", &["-S", "NPM-AGENT-CONNTRACK"])?;
    assert!(rules.contains("--ctstate NEW"), "{rules}");
    assert_eq!(stage.verify()?, Vec::<String>::new());
    assert_eq!(stage.board.current(), [], "it is there");
    Ok(())
}
