//! The query of a request, and the selectors in it.

use std::collections::BTreeMap;

use serde_json::Value;

/// A query's parameters; of several with one name the last.
#[derive(Debug, Default)]
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    pub(super) fn parse(text: Option<&str>) -> Self {
        let pairs = text.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(name), decoded(value))
        };
        Self(pairs.map(pair).collect())
    }

    /// A parameter's value; missing and empty are the same to the API.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }

    pub(super) fn is_true(&self, name: &str) -> bool {
        matches!(self.get(name), Some("true" | "1"))
    }

    /// Whether an object is among what `labelSelector` and `fieldSelector` ask for.
    pub(super) fn selects(&self, object: &Value) -> bool {
        let label = |term: &str| {
            let of = |key: &str| object["metadata"]["labels"][key].as_str().map(str::to_owned);
            holds(term, of)
        };
        let field = |term: &str| {
            holds(term, |path| {
                let value = object.pointer(&format!("/{}", path.replace('.', "/")));
                Some(value.and_then(Value::as_str).unwrap_or_default().to_owned())
            })
        };
        let terms = |name| self.get(name).unwrap_or_default().split(',').filter(|term| !term.is_empty());
        terms("labelSelector").all(label) && terms("fieldSelector").all(field)
    }
}

/// Whether a term (`a=b`, `a==b`, `a!=b`, `a`, `!a`) holds.
fn holds(term: &str, value: impl Fn(&str) -> Option<String>) -> bool {
    if let Some((key, wanted)) = term.split_once("!=") {
        return value(key).as_deref() != Some(wanted);
    }
    if let Some((key, wanted)) = term.split_once('=') {
        return value(key).as_deref() == Some(wanted.trim_start_matches('='));
    }
    match term.strip_prefix('!') {
        Some(key) => value(key).is_none(),
        None => value(term).is_some(),
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut left = text.as_bytes();
    while let [first, rest @ ..] = left {
        left = rest;
        match (first, rest) {
            (b'%', [high, low, after @ ..]) => {
                let hex =
                    |digit: &u8| char::from(*digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                match (hex(high), hex(low)) {
                    (Some(high), Some(low)) => {
                        bytes.push(high * 16 + low);
                        left = after;
                    }
                    _ => bytes.push(b'%'),
                }
            }
            (b'+', _) => bytes.push(b' '),
            (byte, _) => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_query_selects_by_labels_and_fields() {
        let pod = json!({"metadata": {"name": "a", "labels": {"app": "web"}}, "spec": {"nodeName": "n"}});
        for (query, expected) in [
            ("", true),
            ("labelSelector=app%3Dweb", true),
            ("labelSelector=app!=web", false),
            ("labelSelector=app,!tier", true),
            ("labelSelector=tier", false),
            ("fieldSelector=spec.nodeName%3Dn,metadata.name%3Da", true),
            ("fieldSelector=spec.nodeName!=n", false),
        ] {
            assert_eq!(Query::parse(Some(query)).selects(&pod), expected, "{query}");
        }
        assert_eq!(Query::parse(Some("a=x%2By+z%")).get("a"), Some("x+y z%"));
    }
}
