//! JSON to what of it can decide: an object of the API is mostly what nobody here asks for.
//!
//! A pod as a cluster sends it is 4 to 20 KiB (managed fields, environments, volumes, conditions), of which a few
//! hundred bytes decide. [`trimmed`] keeps those and skips the rest while parsing, so that the rest is never in memory;
//! [`super::shape`] says which those are, for this and for [`super::shape::fit`], which judges what is kept.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::node::Node;
use super::shape::Shape;

/// Parses what `shape` knows of a JSON text. A value of another type than the shape has is kept as an empty one of its
/// own type, and an unknown field that the shape refuses as null: enough to be told of.
///
/// # Errors
/// The text is not JSON, or a string in it that is kept is no text (half of a surrogate pair).
pub(super) fn trimmed(text: &str, shape: &'static Shape) -> Result<Node, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let node = Trim(shape).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(node)
}

#[derive(Clone, Copy)]
struct Trim(&'static Shape);

impl<'de> DeserializeSeed<'de> for Trim {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        match self.0 {
            Shape::Whole(inner) => Trim(inner).deserialize(deserializer),
            Shape::Text
            | Shape::Bool
            | Shape::Int
            | Shape::IntOrText
            | Shape::Time
            | Shape::Any
            | Shape::List(_)
            | Shape::Map(_)
            | Shape::Closed(_)
            | Shape::Open(_) => deserializer.deserialize_any(self),
        }
    }
}

fn leaf<E>(value: impl Into<Value>) -> Result<Node, E> {
    Ok(Node::Leaf(value.into()))
}

impl<'de> Visitor<'de> for Trim {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        leaf(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        leaf(value)
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        leaf(value)
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        leaf(value)
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        leaf(value)
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        leaf(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        if let Shape::List(inner) = self.0 {
            while let Some(item) = access.next_element_seed(Trim(inner))? {
                items.push(item);
            }
        } else {
            while access.next_element::<IgnoredAny>()?.is_some() {}
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        // What is left of a field, by its name.
        let part = |name: &str| match self.0 {
            Shape::Map(inner) => Some(Part::Kept(inner)),
            Shape::Open(fields) => known(fields, name),
            Shape::Closed(fields) => Some(known(fields, name).unwrap_or(Part::Named)),
            Shape::Text
            | Shape::Bool
            | Shape::Int
            | Shape::IntOrText
            | Shape::Time
            | Shape::Any
            | Shape::Whole(_)
            | Shape::List(_) => None,
        };
        while let Some(name) = access.next_key::<String>()? {
            match part(&name) {
                Some(Part::Kept(shape)) => entries.push((name, access.next_value_seed(Trim(shape))?)),
                Some(Part::Named) => {
                    access.next_value::<IgnoredAny>()?;
                    entries.push((name, Node::Leaf(Value::Null)));
                }
                None => drop(access.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Node::Map(entries))
    }
}

/// What is kept of a field.
enum Part {
    /// What of its value fits this.
    Kept(&'static Shape),
    /// Its name.
    Named,
}

fn known(fields: &'static [(&'static str, Shape)], name: &str) -> Option<Part> {
    fields.iter().find(|(known, _)| *known == name).map(|(_, shape)| Part::Kept(shape))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::shape::{POD, POLICY};
    use super::*;

    #[test]
    fn what_decides_is_kept_and_the_rest_is_skipped() {
        let pod = json!({
            "apiVersion": "v1",
            "metadata": {
                "name": "a", "resourceVersion": "7", "labels": {"app": "web", "odd": {"x": [1]}},
                "managedFields": [{"fieldsV1": {"f:metadata": {}}}],
            },
            "spec": {
                "nodeName": "n", "volumes": [{"name": "v"}],
                "containers": [{"image": "i", "env": [{"name": "E"}], "ports": [{"name": "http", "hostPort": 1}]}],
            },
            "status": {"podIP": ["10.0.0.1"], "conditions": [{}]},
        });
        let kept = json!({
            "metadata": {"name": "a", "resourceVersion": "7", "labels": {"app": "web", "odd": {}}, "managedFields": []},
            "spec": {"nodeName": "n", "containers": [{"ports": [{"name": "http"}]}]},
            "status": {"podIP": []},
        });
        assert_eq!(trimmed(&pod.to_string(), &POD).unwrap(), Node::from(kept));
    }

    #[test]
    fn a_field_that_may_narrow_a_policy_is_still_told_of() {
        let policy = json!({"spec": {"podSelector": {}, "egressDeny": [{"to": []}]}});
        let kept = json!({"spec": {"podSelector": {}, "egressDeny": null}});
        assert_eq!(trimmed(&policy.to_string(), &POLICY).unwrap(), Node::from(kept));
    }

    #[test]
    fn depth_is_no_matter() {
        let deep =
            format!(r#"{{"spec":{{"x":{}{},"nodeName":"n"}}}}"#, "[".repeat(50_000), "]".repeat(50_000));
        assert_eq!(trimmed(&deep, &POD).unwrap(), Node::from(json!({"spec": {"nodeName": "n"}})));
        for bad in ["", "{", r#"{"metadata":{"name":"\ud800"}}"#, "{} {}"] {
            trimmed(bad, &POD).unwrap_err();
        }
    }
}
