//! Patches: what a client sends to change a part of an object.

use serde_json::{Map, Value};

/// By which field the items of a list are told apart in a strategic merge patch (the `patchMergeKey` tags of
/// `k8s.io/api`, as far as kubectl meets them here). Other lists are replaced.
const MERGE_KEYS: &[(&str, &str)] = &[
    ("conditions", "type"),
    ("containers", "name"),
    ("env", "name"),
    ("imagePullSecrets", "name"),
    ("initContainers", "name"),
    ("ownerReferences", "uid"),
    ("podIPs", "ip"),
    ("tolerations", "key"),
    ("volumeMounts", "mountPath"),
    ("volumes", "name"),
];

/// A patch, by its content type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patch {
    /// RFC 7386; server-side apply is taken for one too, without owners of fields.
    Merge,
    /// A merge that knows which lists are maps.
    Strategic,
    /// RFC 6902: add, replace, remove and test.
    Json,
}

impl Patch {
    pub(super) fn of(content_type: &str) -> Option<Self> {
        match content_type.split(';').next().unwrap_or_default().trim() {
            "application/merge-patch+json" | "application/apply-patch+yaml" => Some(Self::Merge),
            "application/strategic-merge-patch+json" => Some(Self::Strategic),
            "application/json-patch+json" => Some(Self::Json),
            _ => None,
        }
    }

    /// What the patch makes of an object; `None`: it can't be applied.
    pub(super) fn apply(self, object: &Value, patch: &Value) -> Option<Value> {
        match self {
            Self::Merge => Some(merged(object.clone(), patch, None)),
            Self::Strategic => Some(merged(object.clone(), patch, Some(MERGE_KEYS))),
            Self::Json => {
                let mut patched = object.clone();
                for operation in patch.as_array()? {
                    edit(&mut patched, operation)?;
                }
                Some(patched)
            }
        }
    }
}

fn merged(old: Value, patch: &Value, merge_keys: Option<&[(&str, &str)]>) -> Value {
    let Value::Object(changes) = patch else { return patch.clone() };
    let mut fields = match old {
        Value::Object(fields) => fields,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => Map::new(),
    };
    if merge_keys.is_some() && changes.get("$patch").and_then(Value::as_str) == Some("replace") {
        fields.clear();
    }
    for (name, change) in changes {
        if merge_keys.is_some() && name.starts_with('$') {
            continue;
        }
        if change.is_null() {
            fields.remove(name);
            continue;
        }
        let before = fields.remove(name).unwrap_or_default();
        let key = merge_keys.and_then(|keys| keys.iter().find(|(list, _)| list == name)).map(|(_, key)| *key);
        let after = match (before, change, key) {
            (Value::Array(before), Value::Array(change), Some(key)) => {
                Value::Array(merged_list(before, change, key, merge_keys))
            }
            (before, change, _) => merged(before, change, merge_keys),
        };
        fields.insert(name.clone(), after);
    }
    Value::Object(fields)
}

fn merged_list(
    mut list: Vec<Value>,
    changes: &[Value],
    key: &str,
    merge_keys: Option<&[(&str, &str)]>,
) -> Vec<Value> {
    for change in changes {
        let place = list.iter().position(|item| item.get(key) == change.get(key));
        let is_deletion = change.get("$patch").and_then(Value::as_str) == Some("delete");
        match (place, is_deletion) {
            (Some(place), true) => drop(list.remove(place)),
            (None, true) => {}
            (Some(place), false) => list[place] = merged(list[place].take(), change, merge_keys),
            (None, false) => list.push(merged(Value::Null, change, merge_keys)),
        }
    }
    list
}

fn edit(object: &mut Value, operation: &Value) -> Option<()> {
    let path = operation["path"].as_str()?;
    let (parent, last) = path.rsplit_once('/')?;
    let last = last.replace("~1", "/").replace("~0", "~");
    match operation["op"].as_str()? {
        "test" => (object.pointer(path)? == &operation["value"]).then_some(()),
        "replace" => {
            *object.pointer_mut(path)? = operation["value"].clone();
            Some(())
        }
        "remove" => match object.pointer_mut(parent)? {
            Value::Object(fields) => fields.remove(&last).map(drop),
            Value::Array(items) => {
                let place = last.parse::<usize>().ok().filter(|place| *place < items.len())?;
                items.remove(place);
                Some(())
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
        },
        "add" => match object.pointer_mut(parent)? {
            Value::Object(fields) => {
                fields.insert(last, operation["value"].clone());
                Some(())
            }
            Value::Array(items) => {
                let place = if last == "-" { items.len() } else { last.parse().ok()? };
                (place <= items.len()).then(|| items.insert(place, operation["value"].clone()))
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_kind_of_patch_does_what_its_specification_says() {
        let object = json!({
            "metadata": {"labels": {"a": "1", "b": "2"}},
            "spec": {"containers": [{"name": "x", "image": "1"}, {"name": "y"}], "args": ["1"]},
        });
        let patch = json!({
            "metadata": {"labels": {"a": null, "c": "3"}},
            "spec": {"containers": [{"name": "x", "image": "2"}, {"name": "y", "$patch": "delete"}], "args": ["2"]},
        });
        let labels = json!({"b": "2", "c": "3"});
        let merged = Patch::Merge.apply(&object, &patch).unwrap();
        assert_eq!(merged["metadata"]["labels"], labels);
        assert_eq!(merged["spec"], patch["spec"], "lists are replaced");
        let strategic = Patch::Strategic.apply(&object, &patch).unwrap();
        assert_eq!(strategic["metadata"]["labels"], labels);
        assert_eq!(strategic["spec"], json!({"containers": [{"name": "x", "image": "2"}], "args": ["2"]}));

        let operations = json!([
            {"op": "test", "path": "/metadata/labels/a", "value": "1"},
            {"op": "remove", "path": "/metadata/labels/a"},
            {"op": "add", "path": "/metadata/labels/x~1y", "value": "4"},
            {"op": "replace", "path": "/spec/args", "value": []},
            {"op": "add", "path": "/spec/args/-", "value": "5"},
        ]);
        let edited = Patch::Json.apply(&object, &operations).unwrap();
        assert_eq!(edited["metadata"]["labels"], json!({"b": "2", "x/y": "4"}));
        assert_eq!(edited["spec"]["args"], json!(["5"]));
        let refused = json!([{"op": "test", "path": "/metadata/labels/a", "value": "2"}]);
        assert_eq!(Patch::Json.apply(&object, &refused), None);
    }
}
