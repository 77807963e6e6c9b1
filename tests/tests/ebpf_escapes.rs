//! What the eBPF backend knows of itself that lets traffic escape: it is on the board while it is so, and packets show it
//! where that is possible.

use anyhow::{Context, Result};
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
