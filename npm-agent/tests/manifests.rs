//! The manifests source, watched: what it tells when files change.
#![expect(clippy::unwrap_used, reason = "in tests, also outside of the test functions")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use npm_agent::source::manifests::{ManifestsError, run};
use npm_agent::source::{Completeness, Event, Problem};
use npm_policy::world::{Change, World};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// How long to wait for what must come.
const DEADLINE: Duration = Duration::from_secs(20);

fn policy(name: &str, port: u16) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\n\
         spec: {{ingress: [{{ports: [{{port: {port}}}]}}]}}\n"
    )
}

/// A running source, and what it has told.
struct Told {
    world: World,
    problems: std::collections::BTreeMap<String, Vec<Problem>>,
    bursts: usize,
    completeness: Option<Completeness>,
    events: mpsc::Receiver<Event>,
    refresh: mpsc::Sender<u64>,
    number: u64,
    source: JoinHandle<Result<(), ManifestsError>>,
}

impl Told {
    /// Starts the source and waits until it is in sync.
    async fn start(directory: &Path) -> Self {
        let (sender, events) = mpsc::channel(1);
        let (refresh, refreshes) = mpsc::channel(1);
        let source = tokio::spawn(run(directory.to_owned(), sender, refreshes));
        let (world, problems) = Default::default();
        let mut told =
            Self { world, problems, bursts: 0, completeness: None, events, refresh, number: 0, source };
        told.until(|told| told.completeness.is_some()).await;
        told
    }

    /// Takes the next event; gives it back if it is no change and no problem.
    async fn next(&mut self) -> Option<Event> {
        let event = tokio::time::timeout(DEADLINE, self.events.recv()).await;
        match event.expect("an event comes in time").expect("the source lives") {
            Event::Changes(changes) => {
                self.bursts += 1;
                changes.into_iter().for_each(|change| self.world.apply(change));
                None
            }
            Event::Problems { origin, problems } => {
                self.problems.insert(origin, problems);
                None
            }
            Event::InSync(completeness) => {
                self.completeness = Some(completeness);
                None
            }
            event @ (Event::Refreshed(_) | Event::Watch { .. }) => Some(event),
        }
    }

    /// Waits until `condition` holds, without asking for a refresh.
    async fn until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            assert!(self.next().await.is_none());
        }
    }

    async fn refresh(&mut self) {
        self.number += 1;
        self.refresh.send(self.number).await.unwrap();
        loop {
            match self.next().await {
                Some(Event::Refreshed(number)) if number == self.number => return,
                Some(
                    Event::Changes(_)
                    | Event::Problems { .. }
                    | Event::InSync(_)
                    | Event::Watch { .. }
                    | Event::Refreshed(_),
                )
                | None => {}
            }
        }
    }

    fn policies(&self) -> Vec<String> {
        self.world
            .policies()
            .map(|policy| {
                format!("{} {:?}", policy.key.name, policy.ingress)
                    .chars()
                    .filter(char::is_ascii_alphanumeric)
                    .collect()
            })
            .collect()
    }

    fn names(&self) -> Vec<&str> {
        self.world.policies().map(|policy| &*policy.key.name).collect()
    }

    fn messages(&self) -> Vec<String> {
        let told = self.problems.values().flatten();
        told.map(|problem| {
            let object = problem.object.rsplit_once(".d/").map_or(problem.object.as_str(), |(_, name)| name);
            format!("{object}: {}", problem.message)
        })
        .collect()
    }
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().suffix(".d").tempdir().unwrap()
}

#[tokio::test]
async fn files_come_change_and_go() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("a.yaml"), policy("a", 1)).unwrap();
    fs::write(path("ignored.txt"), policy("ignored", 1)).unwrap();
    fs::write(path(".hidden.yaml"), policy("hidden", 1)).unwrap();
    let mut told = Told::start(directory.path()).await;
    assert_eq!((told.names(), told.bursts), (vec!["a"], 1));
    fs::create_dir(path("deep")).unwrap();
    fs::write(path("deep/b.yml"), policy("b", 1) + "---\n" + &policy("c", 1)).unwrap();
    told.until(|told| told.names() == ["a", "b", "c"]).await;
    let before = told.policies();
    fs::write(path("a.yaml"), policy("a", 2)).unwrap();
    told.until(|told| told.policies() != before).await;
    assert_eq!(told.names(), ["a", "b", "c"]);
    fs::rename(path("deep/b.yml"), path("d.json")).unwrap();
    fs::remove_file(path("a.yaml")).unwrap();
    told.until(|told| told.names() == ["b", "c"]).await;
    let bursts = told.bursts;
    told.refresh().await;
    told.refresh().await;
    assert_eq!(told.bursts, bursts, "nothing has changed");
    assert_eq!(told.messages(), Vec::<String>::new());
}

#[tokio::test]
async fn a_refresh_tells_what_was_there_when_it_was_asked_for() {
    let directory = directory();
    let mut told = Told::start(directory.path()).await;
    for round in 0..40 {
        // The same size and, with luck, the same time stamp.
        fs::write(directory.path().join("a.yaml"), policy("a", 10 + round)).unwrap();
        told.refresh().await;
        assert!(told.policies()[0].contains(&format!("first{}last", 10 + round)), "{:?}", told.policies());
    }
    fs::write(directory.path().join("a.yaml"), "").unwrap();
    told.refresh().await;
    assert_eq!(told.names(), Vec::<&str>::new());
}

#[tokio::test]
async fn a_broken_file_keeps_its_objects() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("a.yaml"), policy("a", 1) + "---\n" + &policy("b", 1)).unwrap();
    fs::write(path("z.yaml"), policy("z", 1)).unwrap();
    let mut told = Told::start(directory.path()).await;
    // One document is broken, the other has changed, a third is new.
    let before = told.policies();
    fs::write(path("a.yaml"), policy("a", 2) + "---\nkind: [\n---\n" + &policy("c", 1)).unwrap();
    told.refresh().await;
    assert_eq!(told.names(), ["a", "b", "c", "z"]);
    assert_ne!(told.policies()[0], before[0]);
    assert_eq!(told.policies()[1], before[1]);
    let messages = told.messages();
    assert!(messages[0].starts_with("a.yaml: line "), "{messages:?}");
    assert_eq!(messages[1], "a.yaml: stays as it was before the file was broken: NetworkPolicy default/b");
    // No text at all any more.
    fs::write(path("a.yaml"), b"\xff").unwrap();
    told.refresh().await;
    assert_eq!(told.names(), ["a", "b", "c", "z"]);
    let expected = "a.yaml: cannot be read: not UTF-8 at byte 0; its 3 objects stay as they were";
    assert_eq!(told.messages(), [expected]);
    // Mended, and what is not in it any more goes.
    fs::write(path("a.yaml"), policy("b", 2)).unwrap();
    told.refresh().await;
    assert_eq!(told.names(), ["b", "z"]);
    assert_eq!(told.messages(), Vec::<String>::new());
}

#[tokio::test]
async fn what_is_broken_at_the_start_is_named_until_it_was_readable_once() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("a.yaml"), policy("a", 1)).unwrap();
    fs::write(path("b.yaml"), "kind: [").unwrap();
    fs::write(path("c.yaml"), b"\xff").unwrap();
    fs::write(path("d.yaml"), "").unwrap();
    let mut told = Told::start(directory.path()).await;
    assert_eq!(told.names(), ["a"]);
    let unread = |names: &[&str]| {
        let unread = names.iter().map(|name| path(name).display().to_string()).collect();
        Some(Completeness::Incomplete { unread })
    };
    // An empty file may just be written.
    assert_eq!(told.completeness, unread(&["b.yaml", "c.yaml", "d.yaml"]));
    fs::write(path("b.yaml"), policy("b", 1)).unwrap();
    told.until(|told| told.completeness == unread(&["c.yaml"])).await;
    assert_eq!(told.names(), ["a", "b"]);
    fs::remove_file(path("c.yaml")).unwrap();
    told.until(|told| told.completeness == Some(Completeness::Complete)).await;
    fs::write(path("a.yaml"), "kind: [").unwrap();
    told.refresh().await;
    assert_eq!(told.names(), ["a", "b"], "known since it was read");
    assert_eq!(told.completeness, Some(Completeness::Complete));
}

/// `echo ... > file` truncates first and writes then.
#[tokio::test]
async fn a_refresh_waits_for_a_file_that_is_begun() {
    let directory = directory();
    let file = directory.path().join("a.yaml");
    fs::write(&file, policy("a", 1)).unwrap();
    let mut told = Told::start(directory.path()).await;
    fs::write(&file, "").unwrap();
    let written = std::thread::spawn({
        let file = file.clone();
        move || {
            std::thread::sleep(Duration::from_millis(100));
            fs::write(file, policy("b", 1)).unwrap();
        }
    });
    told.refresh().await;
    assert_eq!((told.names(), told.bursts), (vec!["b"], 2), "the policy was never away");
    written.join().unwrap();

    // A file that is truncated for good is empty in the end.
    fs::write(&file, "").unwrap();
    let start = std::time::Instant::now();
    told.refresh().await;
    assert!(start.elapsed() < DEADLINE, "{:?}", start.elapsed());
    told.until(|told| told.names().is_empty()).await;
}

#[tokio::test]
async fn a_refresh_does_not_wait_for_ever_for_a_file_that_is_never_written() {
    let directory = directory();
    let file = directory.path().join("a.yaml");
    fs::write(&file, policy("a", 1)).unwrap();
    let mut told = Told::start(directory.path()).await;
    fs::write(&file, "").unwrap();
    let answered = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let answered = Arc::clone(&answered);
        move || {
            while !answered.load(Ordering::Relaxed) {
                fs::write(&file, "").unwrap();
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    });
    // The answer comes while the file is still being begun.
    tokio::time::timeout(DEADLINE, told.refresh()).await.unwrap();
    assert_eq!(told.names(), ["a"], "what it held before counts meanwhile");
    answered.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[tokio::test]
async fn of_two_files_the_last_counts() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("b.yaml"), policy("p", 2)).unwrap();
    let mut told = Told::start(directory.path()).await;
    fs::write(path("a.yaml"), policy("p", 1)).unwrap();
    told.refresh().await;
    assert!(told.policies()[0].contains("first2"));
    let expected = format!("NetworkPolicy default/p: also in {}; this one counts", path("a.yaml").display());
    assert_eq!(told.messages(), [expected]);
    fs::remove_file(path("b.yaml")).unwrap();
    told.refresh().await;
    assert!(told.policies()[0].contains("first1"));
    assert_eq!(told.messages(), Vec::<String>::new());
}

/// As the kubelet updates a mounted ConfigMap: a new directory, and one rename of the link to it.
#[tokio::test]
async fn a_config_map_is_swapped() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    let version = |number: &str, text: &str| {
        fs::create_dir(path(number)).unwrap();
        fs::write(path(number).join("p.yaml"), text).unwrap();
        std::os::unix::fs::symlink(number, path("..data_tmp")).unwrap();
        fs::rename(path("..data_tmp"), path("..data")).unwrap();
    };
    version("..1", &policy("a", 1));
    std::os::unix::fs::symlink("..data/p.yaml", path("p.yaml")).unwrap();
    let mut told = Told::start(directory.path()).await;
    assert_eq!(told.names(), ["a"]);
    version("..2", &policy("b", 1));
    told.until(|told| told.names() == ["b"]).await;
    assert_eq!(told.messages(), Vec::<String>::new());
}

#[tokio::test]
async fn the_directory_may_vanish_and_come_back() {
    let outer = directory();
    let inner = outer.path().join("manifests");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("a.yaml"), policy("a", 1)).unwrap();
    let mut told = Told::start(&inner).await;
    fs::rename(&inner, outer.path().join("away")).unwrap();
    told.refresh().await;
    assert_eq!(told.names(), ["a"], "an unmounted directory opens nothing");
    assert!(told.messages()[0].contains("cannot be read: "), "{:?}", told.messages());
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("b.yaml"), policy("b", 1)).unwrap();
    told.refresh().await;
    assert_eq!((told.names(), told.messages()), (vec!["b"], vec![]));
}

#[tokio::test]
async fn it_ends_when_nobody_listens_and_refuses_to_start_without_a_directory() {
    let directory = directory();
    let told = Told::start(directory.path()).await;
    drop((told.events, told.refresh));
    tokio::time::timeout(DEADLINE, told.source).await.unwrap().unwrap().unwrap();
    let (sender, _events) = mpsc::channel(1);
    let (_refresh, refreshes) = mpsc::channel(1);
    let error = run(directory.path().join("none"), sender, refreshes).await.unwrap_err();
    assert!(error.to_string().starts_with("cannot read the manifests in "), "{error}");
}

#[test]
fn changes_are_whole_objects() {
    let directory = directory();
    fs::write(directory.path().join("a.yaml"), policy("a", 1)).unwrap();
    let reading = npm_agent::source::manifests::read(&[directory.path().to_owned()]);
    assert!(matches!(&reading.changes[..], [Change::Policy(key, Some(policy))] if policy.key == *key));
}
