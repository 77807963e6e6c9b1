//! What the server says of itself: versions, groups, resources, and as much of a schema as kubectl asks for.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::resource::RESOURCES;

/// The document at a path; `None`: it is not one of these.
pub(super) fn document(path: &str) -> Option<Value> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts.as_slice() {
        ["version"] => {
            Some(json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"}))
        }
        ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"]})),
        ["apis"] => {
            let groups = groups().into_iter().filter(|group| !group.is_empty()).map(group);
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups.collect::<Vec<_>>()}))
        }
        ["api", "v1"] => Some(resources("")),
        ["apis", name] => groups().contains(name).then(|| group(name)),
        ["apis", name, "v1"] => groups().contains(name).then(|| resources(name)),
        ["openapi", "v2"] => Some(json!({
            "swagger": "2.0", "info": {"title": "test", "version": "v1"}, "paths": {}, "definitions": {},
        })),
        ["openapi", "v3"] => {
            let places = groups().into_iter().map(|group| {
                let place = if group.is_empty() { "api/v1".to_owned() } else { format!("apis/{group}/v1") };
                let link = json!({"serverRelativeURL": format!("/openapi/v3/{place}")});
                (place, link)
            });
            Some(json!({"paths": places.collect::<serde_json::Map<_, _>>()}))
        }
        ["openapi", "v3", "api", "v1"] => Some(openapi("")),
        ["openapi", "v3", "apis", name, "v1"] => groups().contains(name).then(|| openapi(name)),
        _ => None,
    }
}

fn groups() -> BTreeSet<&'static str> {
    RESOURCES.iter().map(|resource| resource.group).collect()
}

fn group(name: &str) -> Value {
    let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
    json!({
        "kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": [version], "preferredVersion": version,
    })
}

fn resources(group: &str) -> Value {
    let verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
    let resources = RESOURCES.iter().filter(|resource| resource.group == group).map(|resource| {
        json!({
            "name": resource.plural, "singularName": resource.kind.to_lowercase(), "kind": resource.kind,
            "namespaced": resource.namespaced, "shortNames": resource.short, "verbs": verbs,
        })
    });
    let version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
    json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version,
        "resources": resources.collect::<Vec<_>>(),
    })
}

/// One patch operation for each kind: from its `fieldValidation` kubectl learns that the server validates, and asks for
/// no schema.
fn openapi(group: &str) -> Value {
    let paths = RESOURCES.iter().filter(|resource| resource.group == group).map(|resource| {
        let prefix = if group.is_empty() { "/api/v1".to_owned() } else { format!("/apis/{group}/v1") };
        let within = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
        let operation = json!({
            "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind": {"group": group, "version": "v1", "kind": resource.kind},
        });
        (format!("{prefix}{within}/{}/{{name}}", resource.plural), json!({"patch": operation}))
    });
    json!({
        "openapi": "3.0.0", "info": {"title": "test", "version": "v1"},
        "paths": paths.collect::<serde_json::Map<_, _>>(),
    })
}
