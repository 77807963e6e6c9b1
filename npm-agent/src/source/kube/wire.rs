//! What an API server says: lists and the lines of a watch, taken apart without more than one object in memory.
//!
//! Pure: text in, objects out. A part that is no JSON is an error of the whole answer, because nobody knows what was in
//! it; an object of a strange shape is an object all the same ([`crate::source::convert`]).

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::known::ObjectName;
use crate::source::convert::{Kind, Received, received};

/// The annotation of the bookmark behind the initial events of a streaming list (Kubernetes API concepts, "Streaming
/// lists").
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMetadata,
    /// Go writes no items as null.
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

/// What a page says of the list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMetadata {
    /// Where a watch has to begin.
    #[serde(default)]
    pub(super) resource_version: Option<String>,
    /// How to ask for the next page; none or empty: this was the last.
    #[serde(default, rename = "continue")]
    pub(super) next: Option<String>,
}

/// One line of a watch.
#[derive(Debug)]
pub(super) enum Line {
    /// An object was made or changed.
    Applied(Item),
    /// An object was deleted.
    Deleted(Item),
    /// Everything up to this version has been sent.
    Bookmark {
        /// The version.
        version: String,
        /// Whether the initial events of a streaming list end here.
        ends_list: bool,
    },
    /// The watch can't go on.
    Error(ApiError),
}

/// An object, or what is left of one.
#[derive(Debug)]
pub(super) enum Item {
    /// It was understood.
    Whole(Received),
    /// Only its name was.
    Broken {
        /// The name.
        name: ObjectName,
        /// Its version as text, to go on from.
        version: Option<String>,
        /// Why.
        reason: String,
    },
}

impl Item {
    /// The object's `metadata.resourceVersion`.
    pub(super) fn version(&self) -> Option<&str> {
        match self {
            Self::Whole(received) => received.version.as_deref(),
            Self::Broken { version, .. } => version.as_deref(),
        }
    }
}

/// A `Status` object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct ApiError {
    #[serde(default)]
    pub(super) code: u16,
    #[serde(default)]
    pub(super) reason: String,
    #[serde(default)]
    pub(super) message: String,
}

impl ApiError {
    /// Whether the version that was asked for is not kept any more.
    pub(super) fn is_expired(&self) -> bool {
        self.code == 410 || matches!(self.reason.as_str(), "Expired" | "Gone")
    }
}

/// Why an answer can't be understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// No JSON, or not of the form.
    #[error("the answer can't be understood: {0}")]
    Form(#[from] serde_json::Error),
    /// An event of a type that the API does not have.
    #[error("the answer has an event of the unknown type {0:?}")]
    Event(String),
    /// An object without a name, or a bookmark without a version.
    #[error("the answer has an object that nobody can tell from others: {0}")]
    Nameless(#[source] serde_json::Error),
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(rename = "type", borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// Takes a page of a list apart.
///
/// # Errors
/// It is no list, or an object in it has no name.
pub(super) fn page(kind: Kind, text: &[u8]) -> Result<(PageMetadata, Vec<Item>), WireError> {
    let Page { metadata, items } = serde_json::from_slice(text)?;
    let items = items.unwrap_or_default().into_iter().map(|object| item(kind, object));
    Ok((metadata, items.collect::<Result<_, _>>()?))
}

/// Takes a line of a watch apart.
///
/// # Errors
/// Nobody knows what it said.
pub(super) fn line(kind: Kind, text: &[u8]) -> Result<Line, WireError> {
    let Envelope { event, object } = serde_json::from_slice(text)?;
    match &*event {
        "ADDED" | "MODIFIED" => Ok(Line::Applied(item(kind, object)?)),
        "DELETED" => Ok(Line::Deleted(item(kind, object)?)),
        "BOOKMARK" => bookmark(object),
        "ERROR" => Ok(Line::Error(serde_json::from_str(object.get())?)),
        other => Err(WireError::Event(other.chars().take(32).collect())),
    }
}

/// Takes an object of a list or a watch.
///
/// # Errors
/// Not even its name can be read.
fn item(kind: Kind, object: &RawValue) -> Result<Item, WireError> {
    let reason = match received(kind, object.get()) {
        Ok(received) if received.object.change.is_some() => return Ok(Item::Whole(received)),
        Ok(received) => {
            let problems = received.object.problems.into_iter();
            problems.map(|problem| problem.message).collect::<Vec<_>>().join("; ")
        }
        Err(error) => format!("it can't be decoded: {error}"),
    };
    let (name, version) = named(object, kind)?;
    Ok(Item::Broken { name, version, reason })
}

/// The name and version of an object of which nothing else may be readable.
fn named(object: &RawValue, kind: Kind) -> Result<(ObjectName, Option<String>), WireError> {
    #[derive(Deserialize)]
    struct Named {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        name: String,
        #[serde(default)]
        namespace: Option<String>,
        #[serde(default)]
        resource_version: Option<String>,
    }
    let Named { metadata } = serde_json::from_str(object.get()).map_err(WireError::Nameless)?;
    let Metadata { name, namespace, resource_version } = metadata;
    let namespace = match kind {
        Kind::Namespace => String::new(),
        Kind::Pod | Kind::NetworkPolicy => namespace.unwrap_or_default(),
    };
    Ok((ObjectName { namespace, name }, resource_version))
}

fn bookmark(object: &RawValue) -> Result<Line, WireError> {
    #[derive(Deserialize)]
    struct Bookmark {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        resource_version: String,
        #[serde(default)]
        annotations: Option<BTreeMap<String, IgnoredAny>>,
    }
    let Bookmark { metadata } = serde_json::from_str(object.get()).map_err(WireError::Nameless)?;
    let Metadata { resource_version: version, annotations } = metadata;
    let ends_list = annotations.is_some_and(|annotations| annotations.contains_key(INITIAL_EVENTS_END));
    Ok(Line::Bookmark { version, ends_list })
}

#[cfg(test)]
mod tests {
    use npm_policy::world::Change;
    use serde_json::{Value, json};

    use super::*;

    fn parse(value: &Value) -> Result<Line, WireError> {
        line(Kind::Pod, value.to_string().as_bytes())
    }

    #[test]
    fn every_type_of_event_is_told_apart() {
        let pod = json!({"metadata": {"namespace": "x", "name": "a", "resourceVersion": "5"}});
        for (event, deleted) in [("ADDED", false), ("MODIFIED", false), ("DELETED", true)] {
            let (item, was_deleted) = match parse(&json!({"type": event, "object": pod})).unwrap() {
                Line::Applied(item) => (item, false),
                Line::Deleted(item) => (item, true),
                Line::Bookmark { .. } | Line::Error(_) => panic!("{event}"),
            };
            assert_eq!((item.version(), was_deleted), (Some("5"), deleted));
            let Item::Whole(received) = item else { panic!("{item:?}") };
            assert!(
                matches!(received.object.change, Some(Change::Pod(key, Some(_))) if key.to_string() == "x/a")
            );
        }
        let bookmark = |annotations| {
            let object = json!({"metadata": {"resourceVersion": "9", "annotations": annotations}});
            let line = parse(&json!({"type": "BOOKMARK", "object": object})).unwrap();
            let Line::Bookmark { version, ends_list } = line else { panic!("{line:?}") };
            (version, ends_list)
        };
        assert_eq!(bookmark(json!(null)), ("9".to_owned(), false));
        assert_eq!(bookmark(json!({"k8s.io/initial-events-end": "true"})), ("9".to_owned(), true));
        let gone = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}});
        assert!(matches!(parse(&gone).unwrap(), Line::Error(error) if error.is_expired()));
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for text in
            ["", "{", "garbage", r#"{"type":"ADDED"}"#, r#"{"type":"ADDED","object":{"metadata":{}}}"#]
        {
            line(Kind::Pod, text.as_bytes()).unwrap_err();
        }
        let strange = json!({"type": "RENAMED", "object": {}});
        assert!(matches!(parse(&strange), Err(WireError::Event(event)) if event == "RENAMED"));
        let nowhere = json!({"type": "BOOKMARK", "object": {"metadata": {}}});
        assert!(matches!(parse(&nowhere), Err(WireError::Nameless(_))));
    }

    #[test]
    fn an_object_that_is_no_text_keeps_its_name() {
        let text = r#"{"type":"ADDED","object":{"metadata":{"namespace":"x","name":"a","labels":{"b":"\ud800"},
            "resourceVersion":"5"}}}"#;
        let Line::Applied(item) = line(Kind::NetworkPolicy, text.as_bytes()).unwrap() else { panic!() };
        let name = ObjectName { namespace: "x".into(), name: "a".into() };
        assert_eq!(item.version(), Some("5"));
        assert!(matches!(item, Item::Broken { name: found, .. } if found == name));
    }
}
