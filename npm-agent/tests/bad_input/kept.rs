//! A file that was good and is damaged: the watched source keeps what was in it.

use std::fs;
use std::time::Duration;

use npm_agent::source::Event;
use npm_agent::source::manifests::run;
use npm_policy::world::World;
use tokio::sync::mpsc;

const GOOD: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  namespace: d\n  name: web\n\
                    spec: {podSelector: {}}\n";

/// The world, and all that was said, after a file with [`GOOD`] has become `text`.
async fn after(text: &str) -> (World, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file.yaml");
    fs::write(&file, GOOD).unwrap();
    let (sender, mut events) = mpsc::channel(1);
    let (refresh, refreshes) = mpsc::channel(1);
    let source = tokio::spawn(run(directory.path().to_owned(), sender, refreshes));
    let mut world = World::default();
    let mut said = String::new();
    loop {
        let event = tokio::time::timeout(Duration::from_secs(20), events.recv()).await.unwrap().unwrap();
        match event {
            Event::Changes(changes) => changes.into_iter().for_each(|change| world.apply(change)),
            Event::Problems { problems, .. } => {
                said = problems.iter().map(|problem| format!("{}\n", problem.message)).collect();
            }
            Event::InSync(_) => {
                assert_eq!(world.policies().count(), 1);
                fs::write(&file, text).unwrap();
                refresh.send(1).await.unwrap();
            }
            Event::Watch { .. } => {}
            Event::Refreshed(_) => break,
        }
    }
    drop(events);
    source.abort();
    (world, said)
}

#[tokio::test]
async fn whatever_is_cut_short_or_misspelt_takes_no_policy_along() {
    let misspelt = |kind: &str| GOOD.replace("kind: NetworkPolicy", kind);
    let mut damaged: Vec<String> =
        ["Networkpolicy", "NetworkPolicys", "networkpolicies", "Policy", "NetworkPolicyLst"]
            .map(|kind| misspelt(&format!("kind: {kind}")))
            .into();
    damaged.extend([
        GOOD.replace("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy", "kind: Policy"),
        misspelt("kind: NetworkPolicy").replace("name: web", "name:"),
        misspelt("kind: 7"),
        "apiVersion: v1\nkind: List\n".to_owned(),
        "apiVersion: v1\nkind: List\nitems:\n".to_owned(),
        "apiVersion: v1\nkind: pod\nmetadata: {name: a}\n".to_owned(),
        "apiVersion: v1\nkind: Pod\nmetadata: {namespace: d}\n".to_owned(),
        "apiVersion: v1\nkind: Namespace\n".to_owned(),
    ]);
    // Every place at which the file can be cut before the name is whole.
    let named = GOOD.find("web").unwrap();
    damaged.extend((1..=named).map(|end| GOOD[..end].to_owned()));
    for text in damaged {
        let (world, said) = after(&text).await;
        let names: Vec<String> = world.policies().map(|policy| policy.key.to_string()).collect();
        assert!(names.contains(&"d/web".to_owned()), "{text:?}: {names:?}: {said}");
        assert!(
            said.contains("stays as it was before the file was broken: NetworkPolicy d/web"),
            "{text:?}: {said}"
        );
    }
}

#[tokio::test]
async fn what_is_none_of_ours_replaces_what_was_there() {
    for text in [
        "apiVersion: apps/v1\nkind: Deployment\n",
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: web}\n",
        "apiVersion: v1\nkind: List\nitems: []\n",
        "# nothing\n",
    ] {
        let (world, said) = after(text).await;
        assert_eq!((world.policies().count(), said.as_str()), (0, ""), "{text:?}");
    }
}
