//! Tools that refuse, hang, are missing, and agents that are killed while one works.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use npm_policy::flow::{Flow, Transport};
use npm_policy::model::Protocol;

use super::*;

/// A directory with the tools, some of which a script stands in for.
struct Stubs {
    directory: tempfile::TempDir,
    variant: Variant,
}

impl Stubs {
    fn new(variant: Variant) -> Self {
        let stubs = Self { directory: tempfile::tempdir().unwrap(), variant };
        let mut programs = vec!["ipset".to_owned()];
        for variant in Variant::BOTH {
            programs.extend(Family::BOTH.map(|family| variant.save(family)));
            programs.extend(Family::BOTH.map(|family| variant.restore(family)));
        }
        for program in programs {
            stubs.script(&program, "exec $real \"$@\"");
        }
        stubs
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    /// Lets this bash script (which may run `$real`) be the program. Every run is counted.
    fn script(&self, program: &str, body: &str) {
        let real = run("bash", &["-c", &format!("command -v {program}")]);
        let log = self.path("runs");
        let script =
            format!("#!/bin/bash\nreal={}\necho {program} >> {}\n{body}\n", real.trim(), log.display());
        // Not written in place: a child of another test may hold the file open, and it could not be run.
        std::fs::write(self.path("new"), script).unwrap();
        std::fs::set_permissions(self.path("new"), PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(self.path("new"), self.path(program)).unwrap();
    }

    /// Lets both families' `iptables-restore` do this first, as long as a file of that name is there.
    fn restore_while(&self, flag: &str, families: &[Family], body: &str) {
        for family in families {
            let flag = self.path(flag);
            self.script(
                &self.variant.restore(*family),
                &format!("if [ -e {} ]; then {body}; fi; exec $real \"$@\"", flag.display()),
            );
        }
        self.raise(flag);
    }

    fn raise(&self, flag: &str) {
        std::fs::write(self.path(flag), "").unwrap();
    }

    fn lower(&self, flag: &str) {
        std::fs::remove_file(self.path(flag)).unwrap();
    }

    fn tools(&self) -> Tools {
        Tools { directory: Some(self.directory.path().to_owned()), ..Tools::default() }
    }

    fn backend(&self, tools: Tools) -> Iptables {
        Iptables::new(Options { tools, ..options(self.variant) }).unwrap()
    }

    /// The number of programs that ran since this was last asked.
    fn runs(&self) -> usize {
        let runs = std::fs::read_to_string(self.path("runs")).unwrap().lines().count();
        std::fs::remove_file(self.path("runs")).unwrap();
        runs
    }
}

/// `iptables-*-restore` refuses what the kernel of another node would, while there is a file `no-sctp`.
fn without_sctp(variant: Variant) -> Stubs {
    let stubs = Stubs::new(variant);
    for family in Family::BOTH {
        // nft says which line; legacy says COMMIT's.
        let line = match variant {
            Variant::Nft => {
                "echo \"line $(grep -n -m1 -- '-m sctp' <<< \"$input\" | cut -d: -f1): RULE_APPEND failed\" >&2"
            }
            Variant::Legacy => "echo \"iptables-restore: line $(wc -l <<< \"$input\") failed\" >&2",
        };
        let body = format!(
            "input=$(cat)\nif [ -e {} ] && grep -q -- '-m sctp' <<< \"$input\"; then {line}; exit 4; fi\n\
             exec $real \"$@\" <<< \"$input\"",
            stubs.path("no-sctp").display()
        );
        stubs.script(&variant.restore(family), &body);
    }
    stubs.raise("no-sctp");
    stubs
}

fn sctp_goal() -> Goal {
    (0..)
        .map(random_goal)
        .find(|goal| Rendered::of(goal).filter_text(Family::V4).contains("-m sctp"))
        .unwrap()
}

#[test]
fn a_rule_that_the_kernel_refuses_costs_that_rule_only() {
    in_namespace(|variant| {
        let stubs = without_sctp(variant);
        let goal = sctp_goal();
        let mut backend = stubs.backend(stubs.tools());
        let applied = backend.apply(&goal).unwrap();
        assert!(!applied.degraded.is_empty());
        let kept: usize = expected(&goal)
            .values()
            .flat_map(|state| state.chains.values())
            .flat_map(|chain| chain.iter())
            .filter(|line| !format!("{line:?}").contains("protocol: Some(132), ports: Some("))
            .count();
        let read: usize = backend
            .read()
            .unwrap()
            .values()
            .flat_map(|state| state.chains.values())
            .map(|chain| chain.len())
            .sum();
        assert_eq!(read, kept);
        // Stricter, never more open.
        let sctp = Transport::Port(Protocol::Sctp, 80);
        let probes = flows(&world_of(random(&world(), 3)), 60, 1);
        for flow in probes.into_iter().map(|flow| Flow { transport: sctp, ..flow }) {
            let decided = backend.decide(&flow).unwrap();
            let said = goal.verdict(&flow).decision();
            assert!(decided <= said, "{flow}: {decided:?} where the policies say {said:?}");
        }
        // As long as the kernel refuses, verifying changes nothing; then the policy is whole without a new goal.
        let still = backend.verify().unwrap();
        assert_eq!((writes(&still), &still.degraded), ((0, 0), &applied.degraded));
        stubs.lower("no-sctp");
        let whole = backend.verify().unwrap();
        assert_eq!((whole.degraded, whole.drift), (vec![], vec![]));
        assert_holds(&backend, &goal);
        assert_eq!(backend.verify().unwrap(), Applied::default());
    });
}

#[test]
fn a_family_that_fails_does_not_starve_the_other() {
    in_namespace(|variant| {
        let goal = rich_goal();
        for (broken, other) in [(Family::V4, Family::V6), (Family::V6, Family::V4)] {
            let stubs = Stubs::new(variant);
            stubs.restore_while("broken", &[broken], "echo broken >&2; exit 1");
            let mut backend = stubs.backend(stubs.tools());
            let error = backend.apply(&goal).unwrap_err();
            assert!(matches!(&error, BackendError::Refused { stderr, .. } if stderr == "broken"), "{error}");
            let mut read = backend.read().unwrap();
            assert_eq!(read.remove(&other).unwrap(), expected(&goal)[&other]);
            assert!(read[&broken].chains.is_empty());
            // The failing family's lack is no drift; what someone takes from the other one is.
            shell(&format!("{} -F AZURE-NPM-DENIED", variant.command(other)));
            backend.verify().unwrap_err();
            stubs.lower("broken");
            let applied = backend.verify().unwrap();
            let lost = expected(&goal)[&other].chains["AZURE-NPM-DENIED"].len();
            assert_eq!(applied.drift.len(), lost, "{:?}", applied.drift);
            assert_holds(&backend, &goal);
            backend.remove().unwrap();
        }
    });
}

#[test]
fn what_a_failing_apply_learns_is_told_by_the_next_success() {
    in_namespace(|variant| {
        let stubs = without_sctp(variant);
        let goal = sctp_goal();
        let mut backend = stubs.backend(stubs.tools());
        let degraded = backend.apply(&goal).unwrap().degraded;
        for family in Family::BOTH {
            shell(&format!("{} -I AZURE-NPM-DENIED -j ACCEPT", variant.command(family)));
        }
        let restore = stubs.path(&variant.restore(Family::V4));
        let working = std::fs::read(&restore).unwrap();
        stubs.restore_while("broken", &[Family::V4], "echo broken >&2; exit 1");
        backend.verify().unwrap_err();
        backend.verify().unwrap_err();
        std::fs::write(stubs.path("again"), working).unwrap();
        std::fs::set_permissions(stubs.path("again"), PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(stubs.path("again"), restore).unwrap();
        let applied = backend.verify().unwrap();
        assert_eq!(applied.degraded, degraded);
        assert_eq!(applied.drift.len(), 2, "one rule in each family, told once: {:?}", applied.drift);
        assert_eq!(backend.verify().unwrap().drift, Vec::<String>::new());
    });
}

/// Who cannot even read what is there has not seen what was changed: the next who can tells of it.
#[test]
fn drift_is_told_after_applies_that_could_not_read() {
    in_namespace(|variant| {
        let goal = rich_goal();
        let stubs = Stubs::new(variant);
        let mut backend = stubs.backend(stubs.tools());
        backend.apply(&goal).unwrap();
        shell(&format!("{} -F AZURE-NPM-DENIED", variant.command(Family::V6)));
        let lines = Rendered::of(&goal).v6.chains["AZURE-NPM-DENIED"].len();
        let unreadable = stubs.path("unreadable");
        let refuse = format!("if [ -e {} ]; then exit 4; fi; exec $real \"$@\"", unreadable.display());
        stubs.script(&variant.save(Family::V6), &refuse);
        stubs.raise("unreadable");
        for _ in 0..2 {
            backend.apply(&goal).unwrap_err();
            backend.verify().unwrap_err();
        }
        stubs.lower("unreadable");
        let drift = backend.apply(&goal).unwrap().drift;
        assert_eq!(drift.len(), lines, "{drift:?}");
        assert_holds(&backend, &goal);
        assert_eq!(backend.verify().unwrap(), Applied::default());
    });
}

#[test]
fn a_tool_that_hangs_is_an_error_and_no_more() {
    in_namespace(|variant| {
        let goal = rich_goal();
        let stubs = Stubs::new(variant);
        stubs.restore_while("hang", &[Family::V4], "sleep 1000");
        let mut backend = stubs.backend(Tools { deadline: Duration::from_secs(3), ..stubs.tools() });
        let start = Instant::now();
        let error = backend.apply(&goal).unwrap_err();
        assert!(
            matches!(&error, BackendError::TimedOut { program, after }
            if program.starts_with(&variant.restore(Family::V4)) && after.as_secs() == 3),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
        assert_eq!(backend.read().unwrap()[&Family::V6], expected(&goal)[&Family::V6]);
        stubs.lower("hang");
        backend.apply(&goal).unwrap();
        assert_holds(&backend, &goal);
    });
}

#[test]
fn sets_that_others_hold_cost_little_and_go_when_they_can() {
    in_namespace(|variant| {
        let stubs = Stubs::new(variant);
        let mut backend = stubs.backend(stubs.tools());
        let goal = rich_goal();
        backend.apply(&goal).unwrap();
        stubs.runs();
        backend.apply(&goal).unwrap();
        let quiet = stubs.runs();
        let rendered = Rendered::of(&goal);
        let set = rendered.v4.sets.keys().next().unwrap();
        let command = variant.command(Family::V4);
        shell(&format!("{command} -A INPUT -m set --match-set {set} src -j ACCEPT"));
        backend.apply(&Goal::default()).unwrap();
        stubs.runs();
        for _ in 0..3 {
            assert_eq!(backend.apply(&Goal::default()).unwrap(), Applied::default());
            // It is looked once whether they still hold it.
            assert_eq!(stubs.runs(), quiet + 1);
        }
        assert_eq!(backend.verify().unwrap(), Applied::default());
        assert!(backend.read().unwrap()[&Family::V4].sets.contains_key(set));
        shell(&format!("{command} -F INPUT"));
        let gone = || {
            backend.apply(&Goal::default()).unwrap();
            backend.read().unwrap()[&Family::V4].sets.is_empty()
        };
        // The kernel lets go of a set some time after the rule that named it.
        assert!(std::iter::repeat_with(gone).take(50).any(|gone| gone));
        stubs.runs();
        backend.apply(&Goal::default()).unwrap();
        assert_eq!(stubs.runs(), quiet);
    });
}

#[test]
fn the_variant_is_one_that_is_installed() {
    in_namespace(|variant| {
        let stubs = Stubs::new(variant);
        assert_eq!(Variant::detect(&stubs.tools()), Variant::Nft);
        for family in Family::BOTH {
            std::fs::remove_file(stubs.path(&variant.other().save(family))).unwrap();
        }
        assert_eq!(Variant::detect(&stubs.tools()), variant);
    });
}

/// No address that is cut short is in the goal: the last number has three digits.
fn long_goal(members: usize) -> Goal {
    wide_goal((0..).filter(|number| number & 0xff >= 100).take(members))
}

const BEFORE: usize = 10;
const AFTER: usize = 100_010;

/// In the environment of the process that is killed: the variant.
const VICTIM: &str = "NPMT_VICTIM";

/// What the test below starts this program for, and nothing otherwise.
#[test]
fn victim() {
    let Ok(name) = std::env::var(VICTIM) else { return };
    let variant = Variant::BOTH.into_iter().find(|variant| format!("{variant:?}") == name).unwrap();
    backend(variant).apply(&long_goal(AFTER)).unwrap();
    panic!("it was to be killed before");
}

/// How many members the largest set has. Not through [`Tools`], which wait for the writer.
fn largest_set() -> usize {
    let listed = npm_tests::exec::run("ipset", &["list", "-terse"]).unwrap();
    let counts = listed.lines().filter_map(|line| line.strip_prefix("Number of entries: "));
    counts.map(|count| count.parse().unwrap()).max().unwrap_or(0)
}

/// An agent is killed (SIGKILL) while 100,000 members are added to a set that rules name. The next agent sees no member
/// that nobody asked for, and nothing that the dead one has left running changes anything behind its back.
#[test]
fn an_agent_killed_while_it_writes_leaves_nothing_wrong_and_nobody_writing() {
    in_namespace(|variant| {
        let wanted = &expected(&long_goal(AFTER))[&Family::V4];
        let mut interrupted = 0;
        // Whoever is to kill it may come too late.
        for round in 0..8 {
            if interrupted == 2 {
                break;
            }
            // The second time from wherever the first victim got.
            backend(variant).apply(&long_goal(BEFORE)).unwrap();
            let victim = format!("{VICTIM}={variant:?}");
            let program = std::env::current_exe().unwrap();
            let arguments =
                [Path::new(&victim), &program, Path::new("--exact"), Path::new("failures::victim")];
            let log = tempfile::tempfile().unwrap();
            let mut child = npm_tests::exec::start("env", &arguments, &log).unwrap();
            while largest_set() < BEFORE + 1 + round % 2 * 20_000 && child.try_wait().unwrap().is_none() {}
            child.kill().unwrap();
            child.wait().unwrap();
            interrupted += usize::from(largest_set() < AFTER);
            let read = || backend(variant).read().unwrap().remove(&Family::V4).unwrap();
            let seen = read();
            for (name, set) in &seen.sets {
                let odd = set.members.iter().find(|member| !wanted.sets[name].members.contains(*member));
                assert_eq!(odd, None, "in {name}");
            }
            std::thread::sleep(Duration::from_millis(500));
            assert!(seen == read(), "a write after the next agent has read");
        }
        assert!(interrupted > 0, "no write was interrupted: nothing was tested");
    });
}
