//! A watch: objects and changes as lines, for as long as it lasts.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until};

use super::Cluster;
use super::body::Writer;
use super::faults::Disturbance;
use super::query::Query;
use super::resource::Resource;
use super::store::{Happened, Logged};

/// How long a watch waits for the second of two events that are to change places.
const SWAP_PATIENCE: Duration = Duration::from_millis(200);

/// How long a watch lasts where the client does not say.
const DEFAULT_LIFE: Duration = Duration::from_secs(1800);

/// What a watch is of.
pub(super) struct Subject {
    pub(super) resource: &'static Resource,
    pub(super) namespace: Option<String>,
    pub(super) query: Query,
}

/// Where a watch begins.
pub(super) enum Start {
    /// With all objects; whether a bookmark tells where they end.
    Everything { marked: bool },
    /// With what happened after this version.
    After(u64),
}

/// Writes a watch until it ends.
pub(super) async fn run(cluster: Arc<Cluster>, subject: Subject, start: Start, writer: Writer) {
    let mut disturbances = cluster.faults.disturbances();
    let mut newest = cluster.store.newest();
    let life = subject.query.number("timeoutSeconds").map_or(DEFAULT_LIFE, Duration::from_secs);
    let end = Instant::now() + life;
    let Subject { resource, namespace, query } = &subject;
    let mut at = match start {
        Start::After(version) => version,
        Start::Everything { marked } => {
            let (objects, version) = cluster.store.list(resource, namespace.as_deref());
            let mut text = String::new();
            for object in objects.iter().filter(|object| query.selects(&object.value)) {
                line(&mut text, "ADDED", object.text());
                if text.len() > 256 << 10 && !writer.write(std::mem::take(&mut text)).await {
                    return;
                }
            }
            if marked {
                line(
                    &mut text,
                    "BOOKMARK",
                    &bookmark(resource, version, Some("k8s.io/initial-events-end")).to_string(),
                );
            }
            if !text.is_empty() && !writer.write(text).await {
                return;
            }
            version
        }
    };
    let mut next_bookmark = Instant::now() + cluster.bookmark_interval;
    let mut sent: Vec<Logged> = Vec::new();
    let mut swap = false;
    loop {
        let Some((mut news, version)) = cluster.store.since(at) else {
            writer.write(error_line(410)).await;
            return;
        };
        news.retain(|logged| {
            logged.key.0 == *resource && namespace.as_ref().is_none_or(|within| *within == logged.key.1)
        });
        if swap && news.len() == 1 {
            // The other one may be on its way.
            let _ = tokio::time::timeout(SWAP_PATIENCE, newest.changed()).await;
            swap = false;
            let Some((more, _)) = cluster.store.since(news[0].version) else { continue };
            news.extend(more.into_iter().find(|logged| logged.key.0 == *resource));
            news.reverse();
            at = news.iter().map(|logged| logged.version).max().unwrap_or(version);
        } else {
            if swap && news.len() > 1 {
                news.swap(0, 1);
                swap = false;
            }
            at = version;
        }
        let text: String = news.iter().filter(|logged| is_for(logged, query)).map(logged_line).collect();
        cluster.sent.note(&news, text.len());
        if !text.is_empty() && !writer.write(text).await {
            return;
        }
        sent.extend(news);
        sent.drain(..sent.len().saturating_sub(16));
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = sleep_until(next_bookmark), if query.is_true("allowWatchBookmarks") => {
                next_bookmark = Instant::now() + cluster.bookmark_interval;
                let mut text = String::new();
                line(&mut text, "BOOKMARK", &bookmark(resource, at, None).to_string());
                if !writer.write(text).await {
                    return;
                }
            }
            () = sleep_until(end) => return,
            () = writer.closed() => return,
            disturbance = disturbances.recv() => match disturbance {
                Ok((plural, disturbance)) if plural.is_none_or(|plural| plural == resource.plural) => {
                    match disturbance {
                        Disturbance::Swap => swap = true,
                        Disturbance::Repeat(count) => {
                            let again = sent.iter().rev().skip(1).take(count).rev().map(logged_line);
                            if !writer.write(again.collect::<String>()).await {
                                return;
                            }
                        }
                        last @ (Disturbance::Cut
                        | Disturbance::End
                        | Disturbance::CutLine
                        | Disturbance::Error(_)
                        | Disturbance::Garbage
                        | Disturbance::Mute) => return disturb(&writer, &last, end).await,
                    }
                }
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
        }
    }
}

/// The disturbances that a watch does not survive.
async fn disturb(writer: &Writer, disturbance: &Disturbance, end: Instant) {
    // Who has gone needs no disturbing.
    match disturbance {
        Disturbance::Cut => writer.break_off().await,
        Disturbance::End | Disturbance::Swap | Disturbance::Repeat(_) => {}
        Disturbance::CutLine => {
            writer.write(r#"{"type":"MODIFIED","object":{"metadata":{"na"#).await;
        }
        Disturbance::Error(code) => {
            writer.write(error_line(*code)).await;
        }
        Disturbance::Garbage => {
            writer.write("<html>502 Bad Gateway</html>\n").await;
        }
        Disturbance::Mute => {
            tokio::select! {
                () = writer.closed() => {}
                () = sleep_until(end + Duration::from_secs(3600)) => {}
            }
        }
    }
}

/// Whether a client that selects sees the event. (A real server sends DELETED for an object that leaves the selection;
/// nobody here watches with one.)
fn is_for(logged: &Logged, query: &Query) -> bool {
    query.selects(&logged.object.value)
}

fn logged_line(logged: &Logged) -> String {
    let Logged { happened, object, version: _, key: _ } = logged;
    let event = match happened {
        Happened::Added => "ADDED",
        Happened::Modified => "MODIFIED",
        Happened::Deleted => "DELETED",
    };
    let mut text = String::new();
    line(&mut text, event, object.text());
    text
}

fn line(text: &mut String, event: &str, object: &str) {
    // The parts of the line are JSON already.
    text.extend([r#"{"type":""#, event, r#"","object":"#, object, "}\n"]);
}

fn error_line(code: u16) -> String {
    let mut text = String::new();
    line(&mut text, "ERROR", &super::status(code, "planted or too old").to_string());
    text
}

fn bookmark(resource: &Resource, version: u64, annotation: Option<&str>) -> Value {
    let mut metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
    if let Some(annotation) = annotation {
        metadata["annotations"] = json!({annotation: "true"});
    }
    json!({"kind": resource.kind, "apiVersion": resource.api_version(), "metadata": metadata})
}
