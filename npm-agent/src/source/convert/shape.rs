//! What an object must look like to be read at all: names and JSON types of its fields.
//!
//! [`fit`] takes out of a value what does not fit and says where it was, so that what is left always deserialises.
//! serde's own errors stop at the first fault and know no field paths, and k8s-openapi passes over unknown fields,
//! any of which may narrow what a policy allows.

use serde_json::{Map, Value};

use super::findings::Findings;
use super::path::Path;

/// The JSON type of a value.
pub(super) enum Shape {
    /// A string.
    Text,
    /// `true` or `false`.
    Bool,
    /// An integer of 32 bits.
    Int,
    /// An integer of 32 bits or a string (apimachinery `IntOrString`).
    IntOrText,
    /// An RFC 3339 time.
    Time,
    /// Anything, because it decides nothing.
    Any,
    /// Of this shape in every part, or nothing of it: what is left of it could mean more or less.
    Whole(&'static Shape),
    /// A list.
    List(&'static Shape),
    /// A map from strings.
    Map(&'static Shape),
    /// These fields and no others.
    Closed(&'static [(&'static str, Shape)]),
    /// These fields, and others that decide nothing.
    Open(&'static [(&'static str, Shape)]),
}

const LABELS: Shape = Shape::Map(&Shape::Text);

/// The metadata of any object: all fields that the API knows.
const METADATA: Shape = Shape::Closed(&[
    ("annotations", Shape::Any),
    ("clusterName", Shape::Any),
    ("creationTimestamp", Shape::Time),
    ("deletionGracePeriodSeconds", Shape::Any),
    ("deletionTimestamp", Shape::Any),
    ("finalizers", Shape::Any),
    ("generateName", Shape::Any),
    ("generation", Shape::Any),
    ("labels", LABELS),
    ("managedFields", Shape::Any),
    ("name", Shape::Text),
    ("namespace", Shape::Text),
    ("ownerReferences", Shape::Any),
    ("resourceVersion", Shape::Any),
    ("selfLink", Shape::Any),
    ("uid", Shape::Any),
]);

/// A Namespace, as far as it decides.
pub(super) const NAMESPACE: Shape = Shape::Open(&[("metadata", METADATA)]);

const CONTAINERS: Shape = Shape::List(&Shape::Open(&[(
    "ports",
    Shape::List(&Shape::Open(&[
        ("name", Shape::Text),
        ("protocol", Shape::Text),
        ("containerPort", Shape::Int),
    ])),
)]));

/// A Pod, as far as it decides.
pub(super) const POD: Shape = Shape::Open(&[
    ("metadata", METADATA),
    (
        "spec",
        Shape::Open(&[
            ("nodeName", Shape::Text),
            ("hostNetwork", Shape::Bool),
            ("containers", CONTAINERS),
            ("initContainers", CONTAINERS),
        ]),
    ),
    (
        "status",
        Shape::Open(&[
            ("phase", Shape::Text),
            ("podIP", Shape::Text),
            ("podIPs", Shape::List(&Shape::Open(&[("ip", Shape::Text)]))),
        ]),
    ),
]);

const SELECTOR: Shape = Shape::Closed(&[
    ("matchLabels", LABELS),
    (
        "matchExpressions",
        Shape::List(&Shape::Whole(&Shape::Closed(&[
            ("key", Shape::Text),
            ("operator", Shape::Text),
            ("values", Shape::List(&Shape::Text)),
        ]))),
    ),
]);

const PEERS: Shape = Shape::List(&Shape::Closed(&[
    ("podSelector", SELECTOR),
    ("namespaceSelector", SELECTOR),
    ("ipBlock", Shape::Closed(&[("cidr", Shape::Text), ("except", Shape::List(&Shape::Text))])),
]));

const PORTS: Shape = Shape::List(&Shape::Closed(&[
    ("protocol", Shape::Text),
    ("port", Shape::IntOrText),
    ("endPort", Shape::Int),
]));

/// A NetworkPolicy: everything, because what is not known might narrow it. (`status` was a field for a while.)
pub(super) const POLICY: Shape = Shape::Closed(&[
    ("apiVersion", Shape::Any),
    ("kind", Shape::Any),
    ("metadata", METADATA),
    (
        "spec",
        Shape::Closed(&[
            ("podSelector", SELECTOR),
            ("policyTypes", Shape::List(&Shape::Text)),
            ("ingress", Shape::List(&Shape::Closed(&[("from", PEERS), ("ports", PORTS)]))),
            ("egress", Shape::List(&Shape::Closed(&[("to", PEERS), ("ports", PORTS)]))),
        ]),
    ),
    ("status", Shape::Any),
]);

/// Takes out of `value` what does not fit `shape` and notes each. A field that is null is a field that is missing; a
/// null among the items of a list or the values of a map is refused, as kubectl does ("unknown object type nil").
pub(super) fn fit(value: Value, shape: &Shape, findings: &mut Findings) -> Value {
    fit_at(value, shape, &Path::Top, findings).unwrap_or(Value::Object(Map::new()))
}

/// The words that YAML 1.1 has for booleans beside `true` and `false` (yaml.org/type/bool.html).
fn yaml_1_1_bool(word: &str) -> Option<bool> {
    match word {
        "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Some(true),
        "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Some(false),
        _ => None,
    }
}

fn fit_at(value: Value, shape: &Shape, path: &Path<'_>, findings: &mut Findings) -> Option<Value> {
    let expected = match (shape, value) {
        // What decides nothing is not even read: a wrong type in it must not make the object unreadable.
        (Shape::Any, _) => return None,
        (Shape::Whole(inner), value) => {
            let before = findings.count();
            let fitted = fit_at(value, inner, path, findings);
            return fitted.filter(|_| findings.count() == before);
        }
        (Shape::Text | Shape::IntOrText, value @ Value::String(_))
        | (Shape::Bool, value @ Value::Bool(_)) => {
            return Some(value);
        }
        // `hostNetwork: yes`: a word of YAML 1.1, which kubectl reads. As a name or a label it is the text it looks like.
        (Shape::Bool, Value::String(word)) if yaml_1_1_bool(&word).is_some() => {
            return yaml_1_1_bool(&word).map(Value::Bool);
        }
        (Shape::Int | Shape::IntOrText, Value::Number(number))
            if number.as_i64().is_some_and(|number| i32::try_from(number).is_ok()) =>
        {
            return Some(Value::Number(number));
        }
        (Shape::Time, Value::String(text)) if text.parse::<k8s_openapi::jiff::Timestamp>().is_ok() => {
            return Some(Value::String(text));
        }
        (Shape::List(inner), Value::Array(items)) => {
            let fitted = items.into_iter().enumerate();
            let fitted = fitted.filter_map(|(i, item)| fit_at(item, inner, &Path::Item(path, i), findings));
            return Some(Value::Array(fitted.collect()));
        }
        (Shape::Map(inner), Value::Object(entries)) => {
            let fitted = entries.into_iter().filter_map(|(key, item)| {
                let fitted = fit_at(item, inner, &Path::Entry(path, &key), findings)?;
                Some((key, fitted))
            });
            return Some(Value::Object(fitted.collect()));
        }
        (Shape::Closed(known), Value::Object(fields)) => {
            return Some(fit_fields(fields, known, Unknown::Refused, path, findings));
        }
        (Shape::Open(known), Value::Object(fields)) => {
            return Some(fit_fields(fields, known, Unknown::Passed, path, findings));
        }
        (shape, value) => format!("must be {}, not {}", expectation(shape), described(&value)),
    };
    findings.note(&path.to_string(), &expected);
    None
}

/// What to do with a field that is not known.
#[derive(Clone, Copy)]
enum Unknown {
    Refused,
    Passed,
}

fn fit_fields(
    fields: Map<String, Value>,
    known: &[(&str, Shape)],
    unknown: Unknown,
    path: &Path<'_>,
    findings: &mut Findings,
) -> Value {
    let mut fitted = Map::new();
    for (name, value) in fields {
        match (known.iter().find(|(known, _)| *known == name), unknown) {
            (Some(_), _) if value.is_null() => {}
            (Some((_, shape)), _) => {
                if let Some(value) = fit_at(value, shape, &Path::Field(path, &name), findings) {
                    fitted.insert(name, value);
                }
            }
            (None, Unknown::Refused) => {
                findings.note(&Path::Field(path, &name).to_string(), "unknown field");
            }
            (None, Unknown::Passed) => {}
        }
    }
    Value::Object(fitted)
}

fn expectation(shape: &Shape) -> &'static str {
    match shape {
        Shape::Text => "a string",
        Shape::Bool => "true or false",
        Shape::Int => "an integer of 32 bits",
        Shape::IntOrText => "an integer of 32 bits or a string",
        Shape::Time => "a time as 2006-01-02T15:04:05Z",
        Shape::Any => "anything",
        Shape::Whole(inner) => expectation(inner),
        Shape::List(_) => "a list",
        Shape::Map(_) | Shape::Closed(_) | Shape::Open(_) => "a map",
    }
}

/// A value, for people.
pub(super) fn described(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("the boolean {value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(value) => format!("the string {}", super::findings::quoted(value)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a map".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(shape: &Shape, value: Value, expected: Value, told: &[&str]) {
        let mut findings = Findings::default();
        assert_eq!(fit(value, shape, &mut findings), expected);
        let messages: Vec<_> =
            findings.into_problems("", "x").into_iter().map(|problem| problem.message).collect();
        assert_eq!(messages, told.iter().map(|told| format!("{told}; x")).collect::<Vec<_>>());
    }

    #[test]
    fn what_does_not_fit_is_taken_out_and_named() {
        let value = json!({
            "metadata": {"name": "a", "labels": {"b": 1, "c": "d"}, "nam": 1},
            "spec": {
                "podSelector": null,
                "policyTypes": ["Ingress", 3, null],
                "ingress": [{"from": "x"}, null, {"ports": [{"port": 80.5}, {"port": 80, "endPort": "90"}]}],
            },
        });
        let expected = json!({
            "metadata": {"name": "a", "labels": {"c": "d"}},
            "spec": {"policyTypes": ["Ingress"], "ingress": [{}, {"ports": [{}, {"port": 80}]}]},
        });
        check(
            &POLICY,
            value,
            expected,
            &[
                "metadata.labels[b]: must be a string, not the number 1",
                "metadata.nam: unknown field",
                "spec.ingress[0].from: must be a list, not the string \"x\"",
                "spec.ingress[1]: must be a map, not null",
                "spec.ingress[2].ports[0].port: must be an integer of 32 bits or a string, not the number 80.5",
                "spec.ingress[2].ports[1].endPort: must be an integer of 32 bits, not the string \"90\"",
                "spec.policyTypes[1]: must be a string, not the number 3",
                "spec.policyTypes[2]: must be a string, not null",
            ],
        );
    }

    #[test]
    fn pods_may_hold_more_than_decides() {
        let value = json!({
            "spec": {"containers": [{"image": 1, "ports": [{"containerPort": "x", "name": "y"}]}], "volumes": 7},
        });
        let expected = json!({"spec": {"containers": [{"ports": [{"name": "y"}]}]}});
        let told = [
            "spec.containers[0].ports[0].containerPort: must be an integer of 32 bits, not the string \"x\"",
        ];
        check(&POD, value, expected, &told);
        check(&POD, json!([1]), json!({}), &["must be a map, not a list"]);
    }
}
