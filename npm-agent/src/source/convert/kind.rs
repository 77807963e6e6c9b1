//! Which object a document is: kinds, API versions, lists of objects.

use serde_json::Value;

use super::findings::{Findings, quoted};
use super::{Object, namespace_value, pod_value, policy_value};
use crate::source::Problem;

/// What a document (one JSON value) gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// The objects in it, in order, and what is wrong with them. The problems of something that could not be
    /// recognised as an object have an empty [`Problem::object`].
    pub objects: Vec<Object>,
    /// How many objects are of kinds that decide nothing.
    pub ignored: usize,
}

/// Whether a document can be taken for what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt<'a> {
    /// Its text had this fault: policies in it are strict.
    Fault(&'a str),
    /// It can.
    None,
}

/// The kinds that decide.
#[derive(Clone, Copy)]
enum Kind {
    Pod,
    Namespace,
    NetworkPolicy,
}

impl Kind {
    fn of(name: &str) -> Option<Self> {
        match name {
            "Pod" => Some(Self::Pod),
            "Namespace" => Some(Self::Namespace),
            "NetworkPolicy" => Some(Self::NetworkPolicy),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
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

/// Converts a document: an object, or a list of objects. Lists may be nested.
pub fn document(value: Value, doubt: Doubt<'_>) -> Document {
    let mut document = Document::default();
    // A stack, not recursion: how deep lists are nested is the input's choice.
    let mut left = vec![(value, None)];
    while let Some((mut value, listed_as)) = left.pop() {
        if value.is_null() && listed_as.is_none() {
            continue;
        }
        let kind = match (value.get("kind"), listed_as) {
            (Some(Value::String(kind)), _) => kind.clone(),
            (None | Some(Value::Null), Some(Kind::Pod)) => "Pod".to_owned(),
            (None | Some(Value::Null), Some(Kind::Namespace)) => "Namespace".to_owned(),
            (None | Some(Value::Null), Some(Kind::NetworkPolicy)) => "NetworkPolicy".to_owned(),
            (_, _) => {
                document.objects.push(unrecognised(&value));
                continue;
            }
        };
        if let Some(kind) = Kind::of(&kind) {
            if listed_as.is_some() && value.get("apiVersion").is_none() {
                value["apiVersion"] = kind.api_version().into();
            }
            document.objects.push(object(kind, value, doubt));
        } else if let Some(items) = kind.strip_suffix("List") {
            // A list of a kind that decides nothing is passed over whole.
            let listed_as = Kind::of(items);
            if listed_as.is_none() && !items.is_empty() {
                document.ignored += 1;
                continue;
            }
            match value.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => {
                    left.extend(items.into_iter().rev().map(|item| (item, listed_as)));
                }
                None | Some(Value::Null) => {}
                Some(Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_)) => {
                    document.objects.push(problem(&format!("{kind}: items must be a list; left out")));
                }
            }
        } else {
            document.ignored += 1;
        }
    }
    document
}

fn object(kind: Kind, value: Value, doubt: Doubt<'_>) -> Object {
    let mut findings = Findings::default();
    if let Doubt::Fault(fault) = doubt {
        findings.note("", fault);
    }
    match value.get("apiVersion") {
        Some(Value::String(version)) if version == kind.api_version() => {}
        Some(Value::String(version)) if kind.is_foreign(version) => {
            let message = format!(
                "apiVersion {} is another API's, not {}; left out",
                quoted(version),
                kind.api_version()
            );
            return named_problem(kind, &value, message);
        }
        Some(Value::String(version)) => {
            findings.note("apiVersion", &format!("{} is not {}", quoted(version), kind.api_version()));
        }
        None | Some(_) => findings.note("apiVersion", &format!("must be {}", kind.api_version())),
    }
    match kind {
        Kind::Pod => pod_value(value, findings),
        Kind::Namespace => namespace_value(value, findings),
        Kind::NetworkPolicy => policy_value(value, findings),
    }
}

fn named_problem(kind: Kind, value: &Value, message: String) -> Object {
    let text = |field: &str| value.pointer(&format!("/metadata/{field}")).and_then(Value::as_str);
    let mut object = kind.name().to_owned();
    if let Some(name) = text("name") {
        let namespace = text("namespace").map(|namespace| format!("{namespace}/")).unwrap_or_default();
        object = format!("{object} {}", super::findings::brief(&format!("{namespace}{name}")));
    }
    Object { change: None, problems: vec![Problem { object, message }] }
}

fn unrecognised(value: &Value) -> Object {
    if value.is_object() {
        return problem("not a Kubernetes object: kind must be a string; left out");
    }
    problem(&format!("not a Kubernetes object but {}; left out", super::shape::described(value)))
}

fn problem(message: &str) -> Object {
    Object { change: None, problems: vec![Problem { object: String::new(), message: message.to_owned() }] }
}
