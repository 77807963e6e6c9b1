//! The iptables backend on the kernel itself, each test in a network namespace of its own that ends with its thread:
//! nft and legacy, IPv4 and IPv6.
#![expect(clippy::unwrap_used, reason = "a step that fails is the end of a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use imbl::{OrdMap, OrdSet};
use npm_agent::backend::iptables::layout::{Established, Placement};
use npm_agent::backend::iptables::render::{Form, Rendered};
use npm_agent::backend::iptables::state::State;
use npm_agent::backend::iptables::variant::Variant;
use npm_agent::backend::iptables::{Iptables, Options};
use npm_agent::backend::{Applied, Backend, BackendError};
use npm_agent::exec::Tools;
use npm_common::mark::ProofBit;
use npm_policy::compile::compile;
use npm_policy::goal::{
    Clause, Expression, Family, Goal, Member, PeerMatch, PortMatch, Program, Set, SetKey,
};
use npm_policy::model::{NamespaceScope, PodKey, PolicyKey, Selector};
use npm_tests::random::{NODES, flows, world, world_of};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

#[path = "iptables_kernel/failures.rs"]
mod failures;
#[path = "iptables_kernel/neighbours.rs"]
mod neighbours;
#[path = "iptables_kernel/sequences.rs"]
mod sequences;
#[path = "iptables_kernel/writes.rs"]
mod writes;

/// Runs `test` for both variants, each in a fresh network namespace.
fn in_namespace(test: fn(Variant)) {
    if !npm_tests::lab::require_root() {
        return;
    }
    for variant in Variant::BOTH {
        let body = move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
            test(variant);
        };
        std::thread::Builder::new()
            .name(format!("npmt-ipt-{variant:?}"))
            .spawn(body)
            .expect("a thread")
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}

fn options(variant: Variant) -> Options {
    Options { variant: Some(variant), ..Options::default() }
}

fn backend(variant: Variant) -> Iptables {
    Iptables::new(options(variant)).unwrap()
}

fn run(program: &str, arguments: &[&str]) -> String {
    Tools::default().run(program, arguments, "").unwrap()
}

fn shell(script: &str) -> String {
    Tools::default().run("bash", &["-euc", script], "").unwrap()
}

fn random<S: Strategy>(strategy: &S, seed: u8) -> S::Value {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    strategy.new_tree(&mut runner).unwrap().current()
}

fn random_goal(seed: u8) -> Goal {
    compile(&world_of(random(&world(), seed)), NODES[0]).0
}

/// A seed whose goal has programs, sets of all kinds and members in both families.
fn rich_goal() -> Goal {
    (0..)
        .map(random_goal)
        .find(|goal| {
            let kind = |wanted: fn(&SetKey) -> bool| goal.sets.keys().any(wanted);
            goal.programs.len() >= 3
                && kind(|key| matches!(key, SetKey::Ports { .. }))
                && kind(|key| matches!(key, SetKey::Block(_)))
                && goal.sets.iter().any(|(key, set)| {
                    matches!(key, SetKey::Local(_)) && !set.v4.is_empty() && !set.v6.is_empty()
                })
        })
        .unwrap()
}

fn expected(goal: &Goal) -> BTreeMap<Family, State> {
    let rendered = Rendered::of(goal);
    [(Family::V4, rendered.v4), (Family::V6, rendered.v6)].into()
}

fn assert_holds(backend: &Iptables, goal: &Goal) {
    let mut read = backend.read().unwrap();
    for state in read.values_mut() {
        // Other people's rules are none of this comparison.
        state.forward.retain(npm_agent::backend::iptables::layout::is_our_jump);
    }
    assert_eq!(read, expected(goal));
}

fn writes(applied: &Applied) -> (usize, usize) {
    (applied.set_writes, applied.rule_writes)
}

#[test]
fn what_is_applied_is_what_is_read_and_stays() {
    in_namespace(|variant| {
        let goal = rich_goal();
        let mut first = backend(variant);
        let applied = first.apply(&goal).unwrap();
        assert!(applied.set_writes > 0 && applied.rule_writes > 0);
        assert_eq!((applied.drift, applied.degraded), (vec![], vec![]));
        assert_holds(&first, &goal);
        assert_eq!(first.apply(&goal).unwrap(), Applied::default(), "a second apply writes");
        assert_eq!(first.verify().unwrap(), Applied::default(), "verify finds something");
        let mut restarted = backend(variant);
        assert_eq!(restarted.apply(&goal).unwrap(), Applied::default(), "a restart writes");
        let world = world_of(random(&world(), 3));
        for flow in flows(&world, 40, 1) {
            assert_eq!(restarted.decide(&flow).unwrap(), goal.verdict(&flow).decision(), "{flow}");
        }
    });
}

#[test]
fn drift_is_repaired_and_told() {
    in_namespace(|variant| {
        let goal = rich_goal();
        let mut backend = backend(variant);
        backend.apply(&goal).unwrap();
        let rendered = Rendered::of(&goal);
        let (v4, v6) = (variant.command(Family::V4), variant.command(Family::V6));
        let (set, members) = rendered
            .v4
            .sets
            .iter()
            .find(|(_, set)| set.members.iter().any(|member| matches!(member, Member::Address(_))))
            .unwrap();
        let member = members.members.iter().find_map(|member| match member {
            Member::Address(address) => Some(*address),
            Member::Port(..) | Member::Include(_) | Member::Except(_) => None,
        });
        let member = member.unwrap();
        let jump = "-m conntrack ! --ctstate RELATED,ESTABLISHED -j AZURE-NPM";
        let policy = rendered.owners.keys().find(|name| name.starts_with("AZURE-NPM-INGRESS-")).unwrap();
        for (damage, words) in [
            (format!("ipset del {set} {member}"), "was missing"),
            (format!("ipset add {set} 192.0.2.99"), "192.0.2.99 was added"),
            (format!("ipset flush {set}"), "was missing"),
            (format!("{v4} -D AZURE-NPM-DENIED -j DROP"), "chain AZURE-NPM-DENIED: missing -j DROP"),
            (format!("{v6} -D AZURE-NPM-DENIED -j DROP"), "IPv6: chain AZURE-NPM-DENIED"),
            (format!("{v4} -I AZURE-NPM-DENIED -j ACCEPT"), "added -j ACCEPT"),
            (format!("{v4} -A AZURE-NPM-DENIED -j DROP"), "another order or number"),
            (format!("{v4} -F AZURE-NPM-INGRESS"), "chain AZURE-NPM-INGRESS: missing"),
            (format!("{v4} -F"), "the jump in FORWARD was gone"),
            (format!("{v4} -F {policy}"), "missing"),
            (format!("{v4} -I AZURE-NPM -m limit --limit 3/sec -j ACCEPT"), "limit"),
            (format!("{v4} -D FORWARD {jump}"), "the jump in FORWARD was gone"),
            (
                format!("{v4} -D FORWARD {jump}; {v4} -A FORWARD -j AZURE-NPM"),
                "the jump in FORWARD was -j AZURE-NPM",
            ),
            (format!("{v4} -I FORWARD -j ACCEPT"), "something stood before it"),
            (format!("{v6} -A FORWARD {jump}"), "2 jumps"),
            (format!("{v4} -F; {v4} -X; {v4} -N KEEP"), "was gone"),
            (
                format!("{v4} -N AZURE-NPM-OLD; {v4} -A AZURE-NPM-OLD -j DROP"),
                "chain AZURE-NPM-OLD was added",
            ),
            ("ipset create azure-npm-stray hash:ip".to_owned(), "azure-npm-stray was added"),
            (
                format!("{v4} -F; {v4} -X; ipset list -n | grep -v 6$ | xargs -n1 ipset destroy || true"),
                "was gone",
            ),
            (
                format!(
                    "{v4} -F; {v4} -X; {v6} -F; {v6} -X; sleep 0.1; ipset destroy; ipset create {set} list:set"
                ),
                "was list:set",
            ),
        ] {
            shell(&damage);
            let applied = backend.verify().unwrap();
            assert!(applied.drift.iter().any(|line| line.contains(words)), "{damage}: {:?}", applied.drift);
            let mut read = backend.read().unwrap();
            for state in read.values_mut() {
                state.forward.retain(npm_agent::backend::iptables::layout::is_our_jump);
            }
            assert_eq!(read, expected(&goal), "{damage}");
            assert_eq!(backend.verify().unwrap(), Applied::default(), "after {damage}");
        }
    });
}

/// Where connections are cut, every packet comes to us; the setting changes in place, both ways.
#[test]
fn the_jump_follows_the_setting_that_cuts() {
    in_namespace(|variant| {
        let goal = rich_goal();
        let proof = ProofBit::new(0x10).unwrap();
        let cut = Form { proof, established: Established::Cut };
        for form in [Form::default(), cut, Form::default()] {
            let mut backend = Iptables::new(Options { form, ..options(variant) }).unwrap();
            assert!(backend.apply(&goal).unwrap() != Applied::default(), "{form:?}");
            let rendered = Rendered::in_form(&goal, form);
            let mut read = backend.read().unwrap();
            for state in read.values_mut() {
                state.forward.retain(npm_agent::backend::iptables::layout::is_our_jump);
            }
            assert_eq!(read, [(Family::V4, rendered.v4), (Family::V6, rendered.v6)].into());
            assert_eq!(backend.verify().unwrap(), Applied::default(), "{form:?}");
            // The other setting's jump is not ours to leave there.
            let other = match form.established {
                Established::Keep => "-j AZURE-NPM",
                Established::Cut => "-m conntrack ! --ctstate RELATED,ESTABLISHED -j AZURE-NPM",
            };
            let command = variant.command(Family::V4);
            shell(&format!("{command} -F FORWARD; {command} -A FORWARD {other}"));
            assert_eq!(backend.verify().unwrap().drift.len(), 1, "{form:?}");
            assert_eq!(backend.verify().unwrap(), Applied::default(), "{form:?}");
        }
    });
}

/// Before anything is applied, what an earlier process left is kept as it was.
#[test]
fn inherited_state_is_kept_and_repaired() {
    in_namespace(|variant| {
        let goal = rich_goal();
        assert_eq!(backend(variant).verify().unwrap(), Applied::default(), "nothing is inherited");
        backend(variant).apply(&goal).unwrap();
        let mut heir = backend(variant);
        assert_eq!(heir.verify().unwrap(), Applied::default());
        shell(&format!("{} -F AZURE-NPM-DENIED", variant.command(Family::V4)));
        assert_eq!(
            heir.verify().unwrap().drift.len(),
            Rendered::of(&goal).v4.chains["AZURE-NPM-DENIED"].len()
        );
        assert_holds(&heir, &goal);
        assert_eq!(heir.apply(&goal).unwrap(), Applied::default());
        // Without its jump the inherited state enforces nothing: it gets it back.
        shell(&format!("{} -F FORWARD", variant.command(Family::V6)));
        backend(variant).verify().unwrap();
        assert_holds(&heir, &goal);
    });
}

/// A set that rules name can't be taken away, but it can be replaced behind their back by one of another kind.
#[test]
fn sets_of_the_wrong_kind_are_rebuilt() {
    in_namespace(|variant| {
        let goal = rich_goal();
        let rendered = Rendered::of(&goal);
        let set = rendered.v4.sets.keys().next().unwrap();
        shell(&format!("ipset create {set} hash:net; ipset add {set} 192.0.2.1"));
        // It is in use, as after an older version.
        let command = variant.command(Family::V4);
        shell(&format!(
            "{command} -N AZURE-NPM; {command} -A AZURE-NPM -m set --match-set {set} src -j DROP"
        ));
        let mut backend = backend(variant);
        backend.apply(&goal).unwrap();
        assert_holds(&backend, &goal);
    });
}

/// Azure NPM's chains, jump and sets, as its version 1.6 leaves them, and names of older versions.
const AZURE: &str = "
ipset create azure-npm-784554818 hash:net
ipset create azure-npm-4rdsa7069uaa0csdhoe2 hash:net
ipset add azure-npm-4rdsa7069uaa0csdhoe2 10.9.9.9
ipset create azure-npm-gcmk2hdba149zrugxkm4 list:set
ipset add azure-npm-gcmk2hdba149zrugxkm4 azure-npm-4rdsa7069uaa0csdhoe2
ipset create azure-npm-60hkxcajimtjwvmstcdb hash:ip,port
ipset add azure-npm-60hkxcajimtjwvmstcdb 10.9.9.9,tcp:80
for c in AZURE-NPM AZURE-NPM-INGRESS AZURE-NPM-EGRESS AZURE-NPM-ACCEPT AZURE-NPM-INGRESS-ALLOW-MARK \
    AZURE-NPM-INGRESS-3486147191 AZURE-NPM-INGRESS-PORT AZURE-NPM-TARGET-SETS; do $ipt -N $c; done
$ipt -A AZURE-NPM -j AZURE-NPM-INGRESS
$ipt -A AZURE-NPM -j AZURE-NPM-EGRESS
$ipt -A AZURE-NPM -j AZURE-NPM-ACCEPT
$ipt -A AZURE-NPM-INGRESS -j AZURE-NPM-INGRESS-3486147191 -m set --match-set azure-npm-4rdsa7069uaa0csdhoe2 dst
$ipt -A AZURE-NPM-INGRESS -j DROP -m mark --mark 0x400/0x400 -m comment --comment DROP-ON-INGRESS-DROP-MARK-0x400/0x400
$ipt -A AZURE-NPM-INGRESS-ALLOW-MARK -j MARK --set-mark 0x200/0x200
$ipt -A AZURE-NPM-INGRESS-ALLOW-MARK -j AZURE-NPM-EGRESS
$ipt -A AZURE-NPM-INGRESS-3486147191 -j AZURE-NPM-INGRESS-ALLOW-MARK -m set --match-set azure-npm-gcmk2hdba149zrugxkm4 src
$ipt -A AZURE-NPM-INGRESS-3486147191 -j MARK --set-mark 0x400/0x400
$ipt -A AZURE-NPM-ACCEPT -j ACCEPT
$ipt -A FORWARD -j AZURE-NPM -m conntrack --ctstate NEW
$ipt -A FORWARD -j AZURE-NPM
";

/// What others have, with names that look like ours.
const FOREIGN: &str = "
ipset create azure-npm hash:ip
ipset create my-azure-npm-1 hash:ip
ipset add my-azure-npm-1 192.0.2.1
ipset create azure-npmx-1 hash:ip
for f in iptables ip6tables; do for v in nft legacy; do
    $f-$v -N AZURE-NPMX; $f-$v -N KUBE-SERVICES; $f-$v -N MY-AZURE-NPM
    $f-$v -A AZURE-NPMX -m comment --comment AZURE-NPM -j ACCEPT
    $f-$v -A FORWARD -j KUBE-SERVICES
    $f-$v -A FORWARD -j AZURE-NPMX
    $f-$v -P FORWARD DROP
done; done
iptables-nft -A MY-AZURE-NPM -m set --match-set my-azure-npm-1 src -j DROP
";

/// All tables and sets of both variants, without what changes from one look to the next.
fn everything() -> String {
    let mut text = String::new();
    for family in Family::BOTH {
        for variant in Variant::BOTH {
            text.push_str(&run(&variant.save(family), &["-t", "filter"]));
        }
    }
    text.push_str(&run("ipset", &["save"]));
    let line = |line: &&str| !line.starts_with('#');
    text.lines()
        .filter(line)
        .map(|line| line.split(" initval").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn azure_npm_is_taken_over_in_either_variant() {
    in_namespace(|variant| {
        let goal = rich_goal();
        for old in Variant::BOTH {
            shell(&format!("ipt={}{AZURE}", old.command(Family::V4)));
            let mut backend = backend(variant);
            backend.apply(&goal).unwrap();
            assert_holds(&backend, &goal);
            let other = run(&variant.other().save(Family::V4), &["-t", "filter"]);
            assert!(!other.contains("AZURE-NPM"), "{other}");
            assert!(!run("ipset", &["save"]).contains("10.9.9.9"));
            backend.remove().unwrap();
        }
    });
}

/// What Azure NPM enforces, in either variant, is not touched before the first apply: the source may not be whole yet.
#[test]
fn azure_npm_stays_until_it_is_taken_over() {
    in_namespace(|variant| {
        for old in Variant::BOTH {
            shell(&format!("ipt={}{AZURE}", old.command(Family::V4)));
            let before = everything();
            let mut heir = backend(variant);
            assert!(heir.inherits(), "{old:?}");
            assert_eq!(heir.verify().unwrap(), Applied::default(), "{old:?}");
            assert_eq!(everything(), before, "{old:?}");
            heir.apply(&rich_goal()).unwrap();
            assert_holds(&heir, &rich_goal());
            heir.remove().unwrap();
            assert!(!backend(variant).inherits(), "{old:?}");
        }
    });
}

#[test]
fn removal_leaves_what_is_not_ours() {
    in_namespace(|variant| {
        shell(FOREIGN);
        let before = everything();
        let mut backend = backend(variant);
        backend.apply(&rich_goal()).unwrap();
        assert_ne!(everything(), before);
        let removed = Iptables::new(options(variant.other())).unwrap().remove().unwrap();
        assert!(removed.sets > 0 && removed.chains > 0, "{removed:?}");
        assert_eq!(removed.rules, 2, "a jump in each family");
        assert_eq!(everything(), before);
        assert_eq!(backend.remove().unwrap(), npm_agent::backend::Removed::default());
        // Azure NPM's too, in the other variant.
        shell(&format!("ipt={}{AZURE}", variant.other().command(Family::V4)));
        backend.remove().unwrap();
        assert_eq!(everything(), before);
    });
}

#[test]
fn rules_that_lead_to_us_are_reported_and_kept() {
    in_namespace(|variant| {
        let mut backend = backend(variant);
        let goal = rich_goal();
        backend.apply(&goal).unwrap();
        let command = variant.command(Family::V4);
        shell(&format!(
            "{command} -N MINE; {command} -A MINE -j AZURE-NPM-DENIED; {command} -A FORWARD -s 192.0.2.1 -j AZURE-NPM"
        ));
        backend.apply(&Goal::default()).unwrap();
        backend.apply(&goal).unwrap();
        let error = backend.remove().unwrap_err();
        assert!(
            matches!(&error, BackendError::Refused { stderr, .. } if stderr.contains("AZURE-NPM-DENIED")),
            "{error}"
        );
        assert!(run(&variant.save(Family::V4), &[]).contains("-A MINE -j AZURE-NPM-DENIED"));
        shell(&format!("{command} -F MINE; {command} -D FORWARD -s 192.0.2.1 -j AZURE-NPM"));
        backend.remove().unwrap();
        assert!(!run(&variant.save(Family::V4), &[]).contains("AZURE-NPM"));
    });
}

#[test]
fn sets_that_others_hold_are_left() {
    in_namespace(|variant| {
        let mut backend = backend(variant);
        let goal = rich_goal();
        backend.apply(&goal).unwrap();
        let rendered = Rendered::of(&goal);
        let set = rendered.v4.sets.keys().next().unwrap();
        let command = variant.command(Family::V4);
        shell(&format!("{command} -A INPUT -m set --match-set {set} src -j ACCEPT"));
        backend.apply(&Goal::default()).unwrap();
        assert_eq!(backend.verify().unwrap(), Applied::default());
        backend.apply(&goal).unwrap();
        assert_holds(&backend, &goal);
    });
}

/// Such a set can be neither used nor replaced: its policies are enforced through another.
#[test]
fn a_set_that_others_hold_under_the_wrong_kind_blocks_nothing() {
    in_namespace(|variant| {
        let goal = rich_goal();
        let rendered = Rendered::of(&goal);
        let set = rendered.v4.sets.keys().next().unwrap();
        let command = variant.command(Family::V4);
        let world = world_of(random(&world(), 3));
        let agrees = |backend: &mut Iptables| {
            for flow in flows(&world, 40, 1) {
                assert_eq!(backend.decide(&flow).unwrap(), goal.verdict(&flow).decision(), "{flow}");
            }
        };
        for chain in ["INPUT", "FORWARD"] {
            shell(&format!(
                "ipset create {set} bitmap:port range 1-9; {command} -A {chain} -m set --match-set {set} dst -j ACCEPT"
            ));
            let mut backend = backend(variant);
            let applied = backend.apply(&goal).unwrap();
            assert_eq!((applied.drift, applied.degraded), (vec![], vec![]), "{chain}");
            agrees(&mut backend);
            assert_eq!(backend.verify().unwrap(), Applied::default(), "{chain}: what is there stays");
            assert_eq!(backend.apply(&goal).unwrap(), Applied::default(), "{chain}");
            backend.apply(&Goal::default()).unwrap();
            backend.apply(&goal).unwrap();
            agrees(&mut backend);
            // When they let go the set gets its name back.
            shell(&format!("{command} -F {chain}"));
            let is_as_rendered = || {
                backend.apply(&Goal::default()).unwrap();
                backend.apply(&goal).unwrap();
                backend.read().unwrap()[&Family::V4].sets == rendered.v4.sets
            };
            // The kernel lets go of a set some time after the rule that named it.
            assert!(std::iter::repeat_with(is_as_rendered).take(50).any(|good| good), "{chain}");
            assert_holds(&backend, &goal);
            backend.remove().unwrap();
        }
    });
}

#[test]
fn the_jump_stands_where_it_is_configured() {
    in_namespace(|variant| {
        shell(FOREIGN);
        let forward = || {
            let saved = run(&variant.save(Family::V4), &["-t", "filter"]);
            saved.lines().filter(|line| line.starts_with("-A FORWARD")).map(str::to_owned).collect::<Vec<_>>()
        };
        backend(variant).apply(&Goal::default()).unwrap();
        assert!(forward()[0].ends_with("-j AZURE-NPM"), "{:?}", forward());
        let mut behind =
            Iptables::new(Options { placement: Placement::AfterServices, ..options(variant) }).unwrap();
        behind.apply(&Goal::default()).unwrap();
        assert!(forward()[0].ends_with("-j KUBE-SERVICES") && forward()[1].ends_with("-j AZURE-NPM"));
        assert_eq!(behind.verify().unwrap(), Applied::default());
        assert_eq!(forward().len(), 3);
    });
}

/// A goal with one policy whose peers are these addresses.
fn wide_goal(addresses: impl Iterator<Item = u32>) -> Goal {
    let everywhere = NamespaceScope::Matching(Selector::everything());
    let peers = SetKey::Pods(Expression { namespaces: everywhere, pods: Selector::everything() });
    let in_x = NamespaceScope::Named("x".into());
    let subjects = SetKey::Local(Expression { namespaces: in_x, pods: Selector::everything() });
    let local: IpAddr = Ipv4Addr::new(10, 0, 0, 1).into();
    let members = |members: OrdSet<Member>| Set { v4: members, v6: OrdSet::new() };
    let addresses = addresses.map(|number| Member::Address(Ipv4Addr::from(0x0b00_0000 + number).into()));
    let clause = Clause { peers: PeerMatch::Sets(BTreeSet::from([peers.clone()])), ports: PortMatch::Any };
    let program = Program { subjects: subjects.clone(), ingress: Some(vec![clause]), egress: None };
    Goal {
        sets: OrdMap::from_iter([
            (peers, members(addresses.collect())),
            (subjects, members(OrdSet::from_iter([Member::Address(local)]))),
        ]),
        programs: OrdMap::from_iter([(PolicyKey::new("x", "p"), std::sync::Arc::new(program))]),
        subjects: OrdMap::from_iter([(PodKey::new("x", "a"), BTreeSet::from([local]))]),
        locals: None,
    }
}

#[test]
fn more_members_than_a_set_holds_by_default() {
    in_namespace(|variant| {
        let mut backend = backend(variant);
        let goal = wide_goal(0..70_000);
        let start = std::time::Instant::now();
        // Two sets in each family, and the one subject.
        assert_eq!(backend.apply(&goal).unwrap().set_writes, 70_000 + 5);
        let filled = start.elapsed();
        assert_holds(&backend, &goal);
        let start = std::time::Instant::now();
        let more = wide_goal(0..70_001);
        assert_eq!(writes(&backend.apply(&more).unwrap()), (1, 0));
        println!("{variant:?}: 70,000 members {filled:?}, one more {:?}", start.elapsed());
        assert_holds(&backend, &more);
        assert_eq!(writes(&backend.apply(&goal).unwrap()), (1, 0));
        // A set that both directions could see is exchanged whole.
        assert_eq!(writes(&backend.apply(&wide_goal(35_000..105_000)).unwrap()).1, 0);
        backend.remove().unwrap();
    });
}

#[test]
fn the_kubelet_shows_the_variant() {
    in_namespace(|variant| {
        assert_eq!(Variant::detect(&Tools::default()), Variant::Nft, "nothing there");
        let command = variant.command(Family::V4);
        shell(&format!("{command} -A INPUT -s 192.0.2.1; {command} -A INPUT -s 192.0.2.2"));
        assert_eq!(Variant::detect(&Tools::default()), variant, "by the number of rules");
        let other = variant.other();
        shell(&format!("{} -t mangle -N KUBE-KUBELET-CANARY", other.command(Family::V4)));
        assert_eq!(Variant::detect(&Tools::default()), other, "by the kubelet's chain");
    });
}
