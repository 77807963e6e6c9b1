//! The loop and its workers against fake backends.

use std::time::{Duration, Instant};

use npm_policy::compile::compile;
use npm_policy::goal::Goal;
use npm_policy::model::{Operator, PodKey, PolicyKey, Requirement, Selector};
use npm_policy::world::{Change, World};
use tokio::sync::oneshot;

use super::backoff::Backoff;
use super::fake::{Agent, Fake, IN_SYNC, NODE, PATIENCE, QUICK, namespace, pod, policy};
use super::worker::{Stopped, Timing};
use super::*;
use crate::backend::Degraded;
use crate::source::{Completeness, Problem};

fn labelled(key: &str, value: &str) -> Selector {
    Selector::new([Requirement { key: key.into(), operator: Operator::In([value.into()].into()) }])
}

/// What a node must enforce after these changes, by the definition.
fn definition<'a>(changes: impl IntoIterator<Item = &'a Change>) -> Goal {
    let mut world = World::default();
    changes.into_iter().for_each(|change| world.apply(change.clone()));
    compile(&world, NODE).0
}

/// Objects of all kinds, each once.
fn objects() -> Vec<Change> {
    vec![
        namespace("x"),
        policy("all", Selector::everything()),
        pod("a", [10, 0, 0, 1], &[("app", "a")]),
        pod("b", [10, 0, 0, 2], &[("app", "b")]),
        policy("only-a", labelled("app", "a")),
        policy("only-b", labelled("app", "b")),
        namespace("y"),
    ]
}

#[test]
fn nothing_is_programmed_before_the_source_is_in_sync() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    for change in objects() {
        agent.change([change]);
    }
    let status = agent.seen();
    assert_eq!((status.generation, status.source.in_sync), (0, false));
    assert_eq!(status.world.pods, 2, "it has been taken in all the same");
    assert!(fake.attempts().is_empty());

    agent.send(IN_SYNC);
    agent.settle(0);
    assert_eq!(fake.attempts(), [definition(&objects())], "once, and all of it");
}

/// The source, at a time when it could not read everything.
fn incomplete(unread: &str) -> Event {
    Event::InSync(Completeness::Incomplete { unread: vec![unread.into()] })
}

#[test]
fn what_an_earlier_process_enforces_stays_until_everything_was_readable() {
    let fake = Fake::inheriting();
    let mut agent = Agent::start(&[&fake], QUICK);
    let (before, after) = (objects()[..5].to_vec(), objects()[5..].to_vec());
    agent.change(before);
    agent.send(incomplete("b.yaml"));
    agent.change([pod("c", [10, 0, 0, 3], &[("app", "a")])]);
    let status = agent.seen();
    assert!(!status.source.in_sync);
    let reason = "not readable since the start: b.yaml; what an earlier process programmed stays in force";
    assert_eq!(status.reasons(0)[0], reason);
    agent.send(incomplete("c.yaml"));
    assert_eq!(agent.seen().source.unread, ["c.yaml"]);
    assert!(status.backends[0].inherited);
    assert_eq!(fake.attempts(), []);

    // The objects come before the word that they are all: what is incomplete is programmed at no time.
    agent.change(after);
    agent.send(IN_SYNC);
    let status = agent.settle(0);
    let mut all = objects();
    all.push(pod("c", [10, 0, 0, 3], &[("app", "a")]));
    assert_eq!(fake.attempts(), [definition(&all)]);
    assert!(!status.inherited);
    assert_eq!(agent.seen().reasons(0), Vec::<String>::new());
}

#[test]
fn a_goal_that_was_held_back_is_programmed_also_if_the_last_file_changes_nothing() {
    let fake = Fake::inheriting();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change(objects());
    agent.send(incomplete("b.yaml"));
    agent.seen();
    agent.send(IN_SYNC);
    agent.settle(0);
    assert_eq!(fake.attempts(), [definition(&objects())]);
}

#[test]
fn a_node_without_anything_enforces_what_could_be_read_at_once() {
    let (fresh, inheriting) = (Fake::default(), Fake::inheriting());
    let mut agent = Agent::start(&[&fresh], QUICK);
    agent.change(objects());
    agent.send(incomplete("b.yaml"));
    agent.settle(0);
    assert_eq!(fresh.attempts(), [definition(&objects())]);
    let reason = "not readable since the start: b.yaml; what could be read is enforced";
    assert_eq!(agent.seen().reasons(0), [reason]);
    agent.send(IN_SYNC);
    assert_eq!(agent.seen().reasons(0), Vec::<String>::new());
    assert_eq!(fresh.attempts().len(), 1);
    agent.send(incomplete("b.yaml"));
    assert_eq!(agent.seen().reasons(0), Vec::<String>::new(), "what was read once is known");

    let fresh = Fake::default();
    let mut agent = Agent::start(&[&fresh, &inheriting], QUICK);
    agent.change(objects());
    agent.send(incomplete("b.yaml"));
    agent.settle(0);
    agent.seen();
    assert_eq!((fresh.attempts().len(), inheriting.attempts().len()), (1, 0), "each for itself");
}

#[test]
fn what_an_earlier_process_left_is_read_back_and_repaired_before_the_first_goal() {
    let fake = Fake::inheriting();
    fake.drift(&["FORWARD: jump was missing"]);
    let timing = Timing { verify_interval: Duration::from_millis(10), ..QUICK };
    let agent = Agent::start(&[&fake], timing);
    let status = agent.wait(0, |status| status.drift_repairs == 1 && status.verifies > 1);
    assert!(status.inherited && status.last_verify.is_some());
    fake.fail(2);
    agent.wait(0, |status| status.failures == 2 && status.consecutive_failures == 0);
    assert_eq!(fake.attempts(), []);
}

#[test]
fn an_empty_cluster_is_programmed_too() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.send(IN_SYNC);
    agent.settle(0);
    assert_eq!(fake.attempts(), [Goal::default()], "what an earlier process left must go");
}

#[test]
fn a_burst_is_merged_while_the_backend_is_busy() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    fake.hold();
    agent.change(objects());
    agent.send(IN_SYNC);
    fake.wait_attempts(1);
    let mut changes = objects();
    for number in 0..=200 {
        changes.push(pod(&format!("p{number}"), [10, 0, 1, number], &[("app", "a")]));
        agent.change(changes.last().cloned());
    }
    let seen = agent.seen();
    assert_eq!(seen.world.pods, 203, "the loop has not waited for the backend");
    assert_eq!(fake.attempts().len(), 1);
    fake.release();
    agent.settle(0);
    assert_eq!(fake.attempts(), [definition(&objects()), definition(&changes)]);
}

#[test]
fn changes_that_mean_nothing_to_the_node_are_not_programmed() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    agent.change(objects());
    agent.send(IN_SYNC);
    agent.settle(0);
    agent.change([namespace("z")]);
    agent.change(objects());
    agent.change([]);
    let seen = agent.seen();
    assert_eq!((seen.generation, seen.world.namespaces), (1, 3));
    agent.settle(0);
    assert_eq!(fake.attempts().len(), 1);
}

#[test]
fn a_failed_apply_is_tried_again_with_the_newest_goal() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    fake.fail(usize::MAX);
    agent.change(objects());
    agent.send(IN_SYNC);
    let status = agent.wait(0, |status| status.consecutive_failures >= 3);
    assert_eq!(status.generation, 0);
    assert_eq!(status.last_error.as_deref(), Some("apply: fake failed with exit status: 4: planted"));

    let mut changes = objects();
    changes.push(Change::Policy(PolicyKey::new("x", "only-a"), None));
    agent.change(changes.last().cloned());
    let reasons = agent.seen().reasons(2);
    assert_eq!(reasons[0], "fake: goal 0 of 2 is programmed");
    assert!(reasons[1].starts_with("fake: failed "), "{reasons:?}");
    fake.fail(0);
    let status = agent.settle(0);
    assert_eq!((status.generation, status.consecutive_failures, status.applies), (2, 0, 1));
    assert!(status.failures >= 3);
    let attempts = fake.attempts();
    let (old, new) = (definition(&objects()), definition(&changes));
    assert_eq!(attempts.last(), Some(&new));
    let turn = attempts.iter().position(|goal| *goal == new).unwrap();
    assert!(attempts[..turn].iter().all(|goal| *goal == old));
    assert!(attempts[turn..].iter().all(|goal| *goal == new), "never back to an older goal");
}

#[test]
fn a_newer_goal_does_not_wait_out_a_long_backoff() {
    let fake = Fake::default();
    let hour = Duration::from_secs(3600);
    let first = Duration::from_millis(20);
    // The first failure waits at most a quarter more than `first`; the second would wait for an hour.
    let backoff = Backoff { first, most: hour };
    let mut agent = Agent::start(&[&fake], Timing { backoff, verify_interval: hour });
    fake.fail(12);
    agent.change(objects());
    agent.send(IN_SYNC);
    let start = Instant::now();
    for number in 0..12 {
        agent.wait(0, |status| status.consecutive_failures > number);
        agent.change([pod("a", [10, 0, 2, u8::try_from(number).unwrap()], &[("app", "a")])]);
    }
    agent.settle(0);
    // Doubling from 20 ms, twelve waits would be more than a minute.
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    assert!(start.elapsed() >= first * 12, "but a stream of goals does not hammer: {:?}", start.elapsed());
}

#[test]
fn a_slow_backend_delays_neither_the_other_nor_the_loop() {
    let (slow, quick) = (Fake::default(), Fake::default());
    let mut agent = Agent::start(&[&slow, &quick], QUICK);
    slow.hold();
    agent.send(IN_SYNC);
    slow.wait_attempts(1);
    for (number, change) in objects().into_iter().enumerate() {
        agent.change([change]);
        let status = agent.settle(1);
        let expected = definition(&objects()[..=number]);
        assert_eq!(quick.attempts().last(), Some(&expected));
        assert!(status.last_error.is_none());
    }
    assert_eq!(slow.attempts().len(), 1);
    slow.release();
    agent.settle(0);
    assert_eq!(slow.attempts(), [Goal::default(), definition(&objects())], "and then only the newest");
}

#[test]
fn the_order_of_changes_does_not_matter() {
    let expected = definition(&objects());
    let forward: Vec<Vec<Change>> = objects().into_iter().map(|change| vec![change]).collect();
    let reversed = forward.iter().rev().cloned().collect();
    let squashed = vec![objects()];
    let with_empties = forward.iter().flat_map(|changes| [vec![], changes.clone(), vec![]]).collect();
    let repeated = forward.iter().flat_map(|changes| [changes.clone(), changes.clone()]).collect();
    let passing = [
        vec![pod("b", [10, 0, 0, 1], &[("app", "a")]), policy("gone", Selector::everything())],
        vec![Change::Pod(PodKey::new("x", "a"), None), policy("only-b", labelled("app", "a"))],
        vec![Change::Policy(PolicyKey::new("x", "gone"), None)],
    ];
    let with_a_past = passing.iter().cloned().chain(forward.clone()).collect();
    let sequences: [(&str, Vec<Vec<Change>>); 6] = [
        ("forward", forward),
        ("reversed", reversed),
        ("squashed", squashed),
        ("with empties", with_empties),
        ("repeated", repeated),
        ("with a past", with_a_past),
    ];
    for (name, sequence) in sequences {
        for in_sync_at in [0, sequence.len() / 2, sequence.len()] {
            let fake = Fake::default();
            let mut agent = Agent::start(&[&fake], QUICK);
            for (number, changes) in sequence.iter().enumerate() {
                if number == in_sync_at {
                    agent.send(IN_SYNC);
                }
                agent.change(changes.clone());
            }
            if in_sync_at == sequence.len() {
                agent.send(IN_SYNC);
            }
            agent.settle(0);
            assert_eq!(fake.attempts().last(), Some(&expected), "{name}, in sync at {in_sync_at}");
        }
    }
}

#[test]
fn drift_is_repaired_again_and_again_and_counted() {
    let fake = Fake::default();
    let timing = Timing { verify_interval: Duration::from_millis(10), ..QUICK };
    let mut agent = Agent::start(&[&fake], timing);
    agent.send(IN_SYNC);
    agent.settle(0);
    fake.drift(&["set azure-npm-x: member 10.0.0.1 was missing", "FORWARD: jump was missing"]);
    agent.wait(0, |status| status.drift_repairs == 2);
    fake.drift(&["again"]);
    let status = agent.wait(0, |status| status.drift_repairs == 3);
    assert!(status.verifies >= 2 && status.last_verify.is_some());

    fake.fail(2);
    let status = agent.wait(0, |status| status.failures == 2 && status.consecutive_failures == 0);
    assert_eq!(status.applies, 1, "a failed read-back is tried again as one");
}

/// Somebody has changed something: it is looked at at once, though nothing is due for an hour, and once only.
#[test]
fn a_disturbance_is_looked_at_at_once() {
    let fake = Fake::default();
    let timing = Timing { verify_interval: Duration::from_secs(3600), backoff: Backoff::default() };
    let worker = Worker::start(Box::new(fake.clone()), timing, &Metrics::new()).unwrap();
    // Just after an attempt (here: the start) it is taken for the attempt's own doing, so it is said until it is heard.
    let deadline = std::time::Instant::now() + PATIENCE;
    while fake.verifies() == 0 && std::time::Instant::now() < deadline {
        worker.verify_soon();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(fake.verifies(), 1);
    fake.drift(&["a jump is gone"]);
    assert!(worker.wait(PATIENCE, |status| status.verifies == 1).is_some());
    std::thread::sleep(Duration::from_millis(200));
    worker.verify_soon();
    let status = worker.wait(PATIENCE, |status| status.verifies == 2).unwrap();
    assert_eq!(status.drift_repairs, 1);
    assert_eq!(worker.stop(PATIENCE), Stopped::Idle);
}

#[test]
fn a_stream_of_goals_does_not_put_off_the_read_back_for_ever() {
    let fake = Fake::default();
    let timing = Timing { verify_interval: Duration::from_millis(20), ..QUICK };
    let agent = Agent::start(&[&fake], timing);
    agent.change(objects());
    agent.send(IN_SYNC);
    let start = Instant::now();
    let mut number = 0;
    while fake.verifies() < 3 {
        // A backend that always finds a newer goal when it is done.
        fake.hold();
        number = (number + 1) % 200;
        agent.change([pod("a", [10, 0, 3, number], &[("app", "a")])]);
        fake.release();
        assert!(start.elapsed() < PATIENCE);
    }
}

#[test]
fn degraded_policies_show_until_they_are_whole() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    let degraded = Degraded { policy: PolicyKey::new("x", "all"), reason: "too long".into() };
    fake.degrade(vec![degraded.clone()]);
    agent.change(objects());
    agent.send(IN_SYNC);
    assert_eq!(agent.settle(0).degraded, [degraded.into()]);
    fake.degrade(vec![]);
    agent.change([pod("c", [10, 0, 0, 3], &[])]);
    assert_eq!(agent.settle(0).degraded, []);
}

#[test]
fn problems_are_kept_by_origin_until_they_are_gone() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    let problem = |object: &str| Problem { object: object.into(), message: "is wrong".into() };
    let say = |agent: &Agent, origin: &str, objects: &[&str]| {
        let problems = objects.iter().map(|object| problem(object)).collect();
        agent.send(Event::Problems { origin: origin.into(), problems });
    };
    let objects = |status: Status| -> Vec<String> {
        status
            .source
            .problems
            .into_iter()
            .map(|problem| format!("{}: {}", problem.origin, problem.object))
            .collect()
    };
    say(&agent, "b.yaml", &["one", "two"]);
    say(&agent, "a.yaml", &["three"]);
    assert_eq!(objects(agent.seen()), ["a.yaml: three", "b.yaml: one", "b.yaml: two"]);
    say(&agent, "b.yaml", &["two"]);
    say(&agent, "a.yaml", &[]);
    assert_eq!(objects(agent.seen()), ["b.yaml: two"]);
}

#[test]
fn the_loop_ends_when_the_source_has_gone_and_leaves_what_is_programmed() {
    let fake = Fake::default();
    let agent = Agent::start(&[&fake], QUICK);
    agent.change(objects());
    agent.send(IN_SYNC);
    let Agent { events, ended, .. } = agent;
    drop(events);
    assert_eq!(ended.blocking_recv().unwrap(), Ended::SourceGone);
    fake.wait_attempts(1);
    assert_eq!(fake.attempts(), [definition(&objects())]);
}

#[test]
fn requests_to_refresh_that_come_together_are_one() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    let ask = || {
        let (reply, answer) = oneshot::channel();
        agent.asks.blocking_send(Ask::Status { freshness: Freshness::Refreshed, reply }).unwrap();
        answer
    };
    let answers: Vec<_> = (0..10).map(|_| ask()).collect();
    let mut told = Vec::new();
    while told.last() != Some(&10) {
        told.push(agent.refresh.blocking_recv().unwrap());
    }
    assert!(told.is_sorted() && told.len() <= 10, "{told:?}");
    agent.send(Event::Refreshed(10));
    for answer in answers {
        assert_eq!(answer.blocking_recv().unwrap().instance, "test");
    }
}

#[test]
fn a_sight_has_the_objects_unless_they_are_known() {
    let mut reconcile = Reconcile::new(Identity::default(), Vec::new(), Arc::new(Metrics::new()));
    let sight = |reconcile: &mut Reconcile, known| {
        let (reply, answer) = oneshot::channel();
        reconcile.answer(Ask::Sight { known, reply });
        answer.blocking_recv().unwrap()
    };
    let empty = sight(&mut reconcile, None);
    assert_eq!(empty.objects.as_ref().map(|objects| objects.pods.len()), Some(0));
    assert!(sight(&mut reconcile, Some(empty.revision)).objects.is_none());

    reconcile.take([Event::Changes(vec![pod("a", [10, 0, 0, 1], &[])])].into_iter());
    let unsynced = sight(&mut reconcile, Some(empty.revision));
    assert_eq!(unsynced.objects.as_ref().map(|objects| objects.pods.len()), Some(1));
    assert_eq!(unsynced.goal, Goal::default());

    reconcile.take([Event::Changes(vec![policy("p", Selector::everything())]), IN_SYNC].into_iter());
    let synced = sight(&mut reconcile, Some(unsynced.revision));
    assert_eq!(synced.goal, *reconcile.published.as_ref().map(|target| &target.goal).unwrap());
    assert_eq!((synced.status.generation, synced.objects.unwrap().policies.len()), (1, 1));
    assert!(sight(&mut reconcile, Some(synced.revision)).objects.is_none(), "nothing has changed since");
}

#[test]
fn who_has_gone_is_not_kept_while_the_source_does_not_answer() {
    let mut reconcile = Reconcile::new(Identity::default(), Vec::new(), Arc::new(Metrics::new()));
    let mut ask = || {
        let (reply, answer) = oneshot::channel();
        reconcile.answer(Ask::Status { freshness: Freshness::Refreshed, reply });
        (reconcile.waiting.len(), answer)
    };
    let (_, patient) = ask();
    for _ in 0..100 {
        let (waiting, _gone) = ask();
        assert_eq!(waiting, 2, "the patient one and this one");
    }
    reconcile.take(std::iter::once(Event::Refreshed(101)));
    assert_eq!(patient.blocking_recv().unwrap().generation, 0);
}

#[test]
fn stopping_waits_for_the_attempt_at_hand_and_begins_no_other() {
    let fake = Fake::default();
    let mut agent = Agent::start(&[&fake], QUICK);
    fake.hold();
    agent.send(IN_SYNC);
    fake.wait_attempts(1);
    agent.change(objects());
    agent.seen();
    let worker = &agent.workers()[0];
    assert_eq!(worker.stop(Duration::from_millis(1)), Stopped::Busy);
    fake.release();
    assert_eq!(worker.stop(PATIENCE), Stopped::Idle);
    assert_eq!(fake.attempts().len(), 1);
}
