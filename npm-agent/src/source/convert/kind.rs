//! Which object a document is: kinds, API versions, lists of objects.

use serde_json::Value;

use super::findings::{Findings, brief, quoted};
use super::node::{Duplicates, Node};
use super::shape::{self, described};
use super::spelling::{Verdict, judge};
use super::trim::trimmed;
use super::{Object, namespace_value, pod_value, policy_value};
use crate::source::Problem;

/// What a document (one value of a file) gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// The objects in it, in order, and what is wrong with them.
    pub objects: Vec<Object>,
    /// What may be an object cut short or misspelt, so that nobody knows which one: whatever the file held before may
    /// be meant. Each has an empty [`Problem::object`].
    pub broken: Vec<Problem>,
    /// How many objects are of kinds that decide nothing.
    pub ignored: usize,
}

/// The kinds that decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `v1` Pod.
    Pod,
    /// `v1` Namespace.
    Namespace,
    /// `networking.k8s.io/v1` NetworkPolicy.
    NetworkPolicy,
}

/// The names of the kinds that decide.
pub(super) const KINDS: [&str; 3] = ["Pod", "Namespace", "NetworkPolicy"];

impl Kind {
    fn of(name: &str) -> Option<Self> {
        match name {
            "Pod" => Some(Self::Pod),
            "Namespace" => Some(Self::Namespace),
            "NetworkPolicy" => Some(Self::NetworkPolicy),
            _ => None,
        }
    }

    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }

    fn api_version(self) -> &'static str {
        match self {
            Self::Pod | Self::Namespace => "v1",
            Self::NetworkPolicy => "networking.k8s.io/v1",
        }
    }

    /// Whether an API version is another API's, which may use the kind's name for something else (Calico's
    /// `projectcalico.org/v3` has a NetworkPolicy). `extensions` is where ours once was.
    fn is_foreign(self, api_version: &str) -> bool {
        match api_version.split_once('/') {
            Some((group, _)) => {
                !matches!((self, group), (Self::NetworkPolicy, "networking.k8s.io" | "extensions"))
            }
            None => false,
        }
    }
}

/// An object as an API server sent it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// What it gives.
    pub object: Object,
    /// Its `metadata.resourceVersion`.
    pub version: Option<String>,
}

/// Converts the JSON of an object of this kind; what decides nothing is skipped while it is parsed.
///
/// # Errors
/// It is not JSON.
pub fn received(kind: Kind, json: &str) -> Result<Received, serde_json::Error> {
    let shape = match kind {
        Kind::Pod => &shape::POD,
        Kind::Namespace => &shape::NAMESPACE,
        Kind::NetworkPolicy => &shape::POLICY,
    };
    let node = trimmed(json, shape)?;
    let version = node.field("metadata").and_then(|metadata| metadata.field("resourceVersion"));
    let version = version.and_then(Node::text).map(str::to_owned);
    // Items of lists name neither their kind nor the API's version.
    Ok(Received { object: object(kind, node, Some(kind)).0, version })
}

/// Converts a document: an object, or a list of objects. Lists may be nested.
pub fn document(document: Node) -> Document {
    let mut converted = Document::default();
    // A stack, not recursion: how deep lists are nested is the input's choice.
    let mut left = vec![(document, None)];
    while let Some((mut node, listed_as)) = left.pop() {
        if node.is_null() && listed_as.is_none() {
            continue;
        }
        let kind = match (node.field("kind").and_then(Node::text), listed_as) {
            (Some(kind), _) => kind.to_owned(),
            (None, Some(kind)) if node.field("kind").is_none() => Kind::name(kind).to_owned(),
            (None, _) => {
                converted.broken.push(unrecognised(node));
                continue;
            }
        };
        if let Some(kind) = Kind::of(&kind) {
            add(&mut converted, kind, node, listed_as);
            continue;
        }
        // A list of a kind that decides nothing is passed over whole.
        let items = kind.strip_suffix("List");
        if let Some(items) = items.filter(|items| items.is_empty() || Kind::of(items).is_some()) {
            match node.take_field("items") {
                Some(Node::List(nodes)) => {
                    left.extend(nodes.into_iter().rev().map(|item| (item, Kind::of(items))));
                }
                // An empty list is `[]` in what kubectl and the API server write: this one is cut short.
                None | Some(Node::Leaf(_) | Node::Map(_)) => {
                    converted.broken.push(problem(&format!("{kind}: items must be a list; left out")));
                }
            }
            continue;
        }
        match judge(&kind, node.field("apiVersion").and_then(Node::text)) {
            Verdict::Other => converted.ignored += 1,
            Verdict::Doubtful(reason) => {
                converted.broken.push(problem(&format!("kind {} {reason}; left out", quoted(&kind))));
            }
        }
    }
    converted
}

fn add(converted: &mut Document, kind: Kind, node: Node, listed_as: Option<Kind>) {
    let is_foreign =
        node.field("apiVersion").and_then(Node::text).is_some_and(|version| kind.is_foreign(version));
    let (object, is_named) = object(kind, node, listed_as);
    let is_whole = is_named && object.change.is_some();
    if !is_foreign && !is_whole {
        let kind = kind.name();
        converted.broken.push(problem(&format!("a {kind} that can't be told from others may be cut short")));
    }
    converted.objects.push(object);
}

/// The object, and whether it has a name.
fn object(kind: Kind, node: Node, listed_as: Option<Kind>) -> (Object, bool) {
    let mut findings = Findings::default();
    let duplicates = match kind {
        // A pod or namespace without the labels that it may have would not be selected.
        Kind::Pod | Kind::Namespace => Duplicates::LastCounts,
        Kind::NetworkPolicy => Duplicates::TakenOut,
    };
    let value = node.into_value(duplicates, &mut findings);
    let is_named = match value.pointer("/metadata/name") {
        Some(Value::String(name)) => !name.is_empty(),
        Some(Value::Number(_) | Value::Bool(_)) => true,
        None | Some(Value::Null | Value::Array(_) | Value::Object(_)) => false,
    };
    match value.get("apiVersion") {
        Some(Value::String(version)) if version == kind.api_version() => {}
        Some(Value::String(version)) if kind.is_foreign(version) => {
            let (version, ours) = (quoted(version), kind.api_version());
            let message = format!("apiVersion {version} is another API's, not {ours}; left out");
            let problems = vec![Problem { object: named(kind, &value), message }];
            return (Object { change: None, problems }, is_named);
        }
        Some(Value::String(version)) => {
            findings.note("apiVersion", &format!("{} is not {}", quoted(version), kind.api_version()));
        }
        // `kubectl get --raw` leaves it out of the items of a list that names their kind.
        None if listed_as.is_some() => {}
        None | Some(_) => findings.note("apiVersion", &format!("must be {}", kind.api_version())),
    }
    let object = match kind {
        Kind::Pod => pod_value(value, findings),
        Kind::Namespace => namespace_value(value, findings),
        Kind::NetworkPolicy => policy_value(value, findings),
    };
    (object, is_named)
}

/// The kind and name of an object that is not converted, for people.
fn named(kind: Kind, value: &Value) -> String {
    let text = |field: &str| value.pointer(&format!("/metadata/{field}")).and_then(Value::as_str);
    let Some(name) = text("name") else { return kind.name().to_owned() };
    let namespace = text("namespace").map(|namespace| format!("{namespace}/")).unwrap_or_default();
    format!("{} {}", kind.name(), brief(&format!("{namespace}{name}")))
}

fn unrecognised(node: Node) -> Problem {
    let what = match node {
        Node::Map(_) => return problem("not a Kubernetes object: kind must be a string; left out"),
        Node::List(_) => "a list".to_owned(),
        Node::Leaf(value) => described(&value),
    };
    problem(&format!("not a Kubernetes object but {what}; left out"))
}

fn problem(message: &str) -> Problem {
    Problem { object: String::new(), message: message.to_owned() }
}
