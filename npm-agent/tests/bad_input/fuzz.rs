//! Random damage to good policies.

use npm_policy::model::{Policy, Rule};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

use super::{policies, read_among_neighbours};

fn original() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "x"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "web"}, "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["a", "b"]}, {"key": "old", "operator": "DoesNotExist"},
            ]},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{
                "from": [{"podSelector": {"matchLabels": {"app": "db"}}, "namespaceSelector": {}},
                    {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
                "ports": [{"port": 80, "endPort": 90}, {"port": "http", "protocol": "TCP"}],
            }],
            "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}], "ports": [{"protocol": "UDP", "port": 53}]}],
        },
    })
}

/// The number of values in a value, itself included.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(fields) => fields.values().map(size).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

/// Replaces one value by something of another type: what a policy that was refused may look like.
fn damage(value: &mut Value, place: &mut usize, with: &Value) {
    if *place == 0 {
        *value = with.clone();
    }
    *place = place.wrapping_sub(1);
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| damage(item, place, with)),
        Value::Object(fields) => fields.values_mut().for_each(|item| damage(item, place, with)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Whether the rules of the one are rules of the other, or nothing.
fn no_more_than(rules: &Option<Vec<Rule>>, original: &Option<Vec<Rule>>) -> bool {
    let original = original.as_deref().unwrap_or_default();
    rules.as_ref().is_some_and(|rules| rules.is_empty() || rules == original)
}

fn converted(text: &str) -> Option<Policy> {
    let reading = read_among_neighbours("fuzz", text);
    policies(&reading).into_iter().find(|policy| &*policy.key.namespace == "x").cloned()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// A value of a wrong type, wherever it stands in the spec, never makes the policy select fewer pods, isolate
    /// fewer directions, or allow anything that the whole policy did not.
    #[test]
    fn wrong_types_never_widen(place: Index, with in prop_oneof![
        Just(json!(-7)), Just(json!(true)), Just(json!("?!")), Just(json!([[]])), Just(json!({"?": 1})), Just(json!(1.5)),
    ]) {
        let good = converted(&original().to_string()).unwrap();
        let mut bad = original();
        let mut place = place.index(size(&bad["spec"]));
        damage(&mut bad["spec"], &mut place, &with);
        let bad = converted(&bad.to_string()).unwrap();
        prop_assert!(bad.subjects.requirements().all(|it| good.subjects.requirements().any(|other| other == it)));
        prop_assert!(no_more_than(&bad.ingress, &good.ingress), "{bad:?}");
        prop_assert!(no_more_than(&bad.egress, &good.egress), "{bad:?}");
    }

    /// Cut, repeated and overwritten text is read or refused, and the neighbours stay.
    #[test]
    fn damaged_text_is_survived(cuts in prop::collection::vec((any::<Index>(), any::<Index>(), ".{0,3}"), 1..4)) {
        let mut text = serde_json::to_string_pretty(&original()).unwrap();
        for (from, to, with) in cuts {
            let mut ends: Vec<usize> = text.char_indices().map(|(place, _)| place).collect();
            ends.push(text.len());
            let from = from.index(ends.len());
            let to = (from + to.index(10)).min(ends.len() - 1);
            // Markers of documents would cut the neighbours' file in other pieces, which is no damage.
            let with = with.replace(['-', '.'], "");
            text.replace_range(ends[from]..ends[to], &with);
        }
        converted(&text);
    }

    /// Any text at all.
    #[test]
    fn any_text_is_survived(text in "[a-z:{}\\[\\]&*!|>'\"%@`,?# \\n\\t-]{0,200}") {
        prop_assume!(!text.contains("---") && !text.contains("..."));
        converted(&text);
    }
}
