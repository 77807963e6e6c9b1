//! A value as a file spells it: a map keeps every entry, also those whose key it has twice.
//!
//! YAML and JSON parsers refuse a key that is given twice or silently keep one of the two. Neither is good here: the
//! object must still be recognised to be treated strictly, and what its policy means is open.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::findings::Findings;
use super::path::Path;

/// A value with duplicate keys.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// Null, a boolean, a number or a string.
    Leaf(Value),
    /// A list.
    List(Vec<Node>),
    /// A map, in the order of the file.
    Map(Vec<(String, Node)>),
}

/// What becomes of entries that have one key and different values.
#[derive(Clone, Copy)]
pub(super) enum Duplicates {
    /// They are taken out, and an item of a list with them: nobody knows what was meant.
    TakenOut,
    /// The last one counts, as with most parsers.
    LastCounts,
}

impl Node {
    /// An entry of a map; of several the last.
    pub(super) fn field(&self, name: &str) -> Option<&Node> {
        match self {
            Self::Map(entries) => entries.iter().rev().find(|(key, _)| key == name).map(|(_, node)| node),
            Self::Leaf(_) | Self::List(_) => None,
        }
    }

    /// Takes an entry out of a map; of several the last.
    pub(super) fn take_field(&mut self, name: &str) -> Option<Node> {
        match self {
            Self::Map(entries) => {
                let place = entries.iter().rposition(|(key, _)| key == name)?;
                Some(entries.swap_remove(place).1)
            }
            Self::Leaf(_) | Self::List(_) => None,
        }
    }

    /// The string, if it is one.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Leaf(value) => value.as_str(),
            Self::List(_) | Self::Map(_) => None,
        }
    }

    /// Whether it is null.
    pub(super) fn is_null(&self) -> bool {
        match self {
            Self::Leaf(value) => value.is_null(),
            Self::List(_) | Self::Map(_) => false,
        }
    }

    /// The plain value. Notes each key that has several entries.
    pub(super) fn into_value(self, duplicates: Duplicates, findings: &mut Findings) -> Value {
        self.at(&Path::Top, duplicates, findings).unwrap_or(Value::Null)
    }

    fn at(self, path: &Path<'_>, duplicates: Duplicates, findings: &mut Findings) -> Option<Value> {
        match self {
            Self::Leaf(value) => Some(value),
            Self::List(items) => {
                let items = items.into_iter().enumerate();
                let items = items.filter_map(|(i, item)| item.at(&Path::Item(path, i), duplicates, findings));
                Some(Value::Array(items.collect()))
            }
            Self::Map(entries) => {
                let mut map = Map::new();
                let mut open = Vec::new();
                for (key, node) in entries {
                    let path = Path::Field(path, &key);
                    let Some(value) = node.at(&path, duplicates, findings) else { continue };
                    if let Some(other) = map.get(&key) {
                        findings.note(&path.to_string(), "given twice");
                        if *other != value {
                            open.push(key.clone());
                        }
                    }
                    map.insert(key, value);
                }
                match duplicates {
                    Duplicates::TakenOut if !open.is_empty() && matches!(path, Path::Item(..)) => {
                        return None;
                    }
                    Duplicates::TakenOut => open.iter().for_each(|key| drop(map.remove(key))),
                    Duplicates::LastCounts => {}
                }
                Some(Value::Object(map))
            }
        }
    }
}

impl From<Value> for Node {
    fn from(value: Value) -> Self {
        match value {
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Self::Leaf(value),
            Value::Array(items) => Self::List(items.into_iter().map(Self::from).collect()),
            Value::Object(map) => {
                Self::Map(map.into_iter().map(|(key, value)| (key, value.into())).collect())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON could hold")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Leaf(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Leaf(Value::Number(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Leaf(Value::Number(value.into())))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Leaf(Value::String(value.to_string())))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        Ok(Node::Leaf(Value::String(value.to_string())))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Leaf(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Leaf(Value::String(value.to_owned())))
    }

    fn visit_string<E>(self, value: String) -> Result<Node, E> {
        Ok(Node::Leaf(Value::String(value)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn duplicates_are_seen() {
        let text = r#"{"a": {"b": 1, "b": 2, "c": 3, "c": 3}, "d": [{"e": null, "e": true}]}"#;
        let node: Node = serde_json::from_str(text).unwrap();
        let check = |duplicates, expected| {
            let mut findings = Findings::default();
            assert_eq!(node.clone().into_value(duplicates, &mut findings), expected);
            let told = findings.into_problems("", "x").into_iter().map(|problem| problem.message);
            let expected = ["a.b: given twice; x", "a.c: given twice; x", "d[0].e: given twice; x"];
            assert_eq!(told.collect::<Vec<_>>(), expected);
        };
        check(Duplicates::TakenOut, json!({"a": {"c": 3}, "d": []}));
        check(Duplicates::LastCounts, json!({"a": {"b": 2, "c": 3}, "d": [{"e": true}]}));
    }
}
