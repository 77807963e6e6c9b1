//! Which resources the server has, and how a path names them.

use std::fmt;

/// A resource of the API.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resource {
    /// The API group; empty: the core.
    pub group: &'static str,
    /// The name in paths.
    pub plural: &'static str,
    /// The kind of its objects.
    pub kind: &'static str,
    /// Whether objects are in namespaces.
    pub namespaced: bool,
    /// What kubectl takes for it too.
    pub short: &'static [&'static str],
}

type Short = &'static [&'static str];

const fn namespaced(group: &'static str, plural: &'static str, kind: &'static str, short: Short) -> Resource {
    Resource { group, plural, kind, namespaced: true, short }
}

const fn of_cluster(group: &'static str, plural: &'static str, kind: &'static str, short: Short) -> Resource {
    Resource { group, plural, kind, namespaced: false, short }
}

/// All of them; each group has version v1.
pub const RESOURCES: &[Resource] = &[
    of_cluster("", "namespaces", "Namespace", &["ns"]),
    namespaced("", "pods", "Pod", &["po"]),
    of_cluster("", "nodes", "Node", &["no"]),
    namespaced("", "services", "Service", &["svc"]),
    namespaced("", "configmaps", "ConfigMap", &["cm"]),
    namespaced("", "serviceaccounts", "ServiceAccount", &["sa"]),
    namespaced("apps", "daemonsets", "DaemonSet", &["ds"]),
    namespaced("networking.k8s.io", "networkpolicies", "NetworkPolicy", &["netpol"]),
    of_cluster("rbac.authorization.k8s.io", "clusterroles", "ClusterRole", &[]),
    of_cluster("rbac.authorization.k8s.io", "clusterrolebindings", "ClusterRoleBinding", &[]),
];

impl Resource {
    /// The resource with this group and plural.
    pub fn find(group: &str, plural: &str) -> Option<&'static Self> {
        RESOURCES.iter().find(|resource| resource.group == group && resource.plural == plural)
    }

    /// The resource whose objects have this kind.
    pub fn of_kind(kind: &str) -> Option<&'static Self> {
        RESOURCES.iter().find(|resource| resource.kind == kind)
    }

    /// The `apiVersion` of its objects.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { "v1".to_owned() } else { format!("{}/v1", self.group) }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.plural)
    }
}

/// What a path means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Objects of all namespaces (`None`), or of one.
    Collection(&'static Resource, Option<String>),
    /// One object; its namespace is empty where the resource has none. `status` is the same object here.
    Object(&'static Resource, String, String),
}

/// Reads the path of objects.
pub(super) fn target(path: &str) -> Option<Target> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, rest) = match parts.as_slice() {
        ["api", "v1", rest @ ..] => ("", rest),
        ["apis", group, "v1", rest @ ..] => (*group, rest),
        _ => return None,
    };
    let rest = rest.strip_suffix(&["status"]).filter(|rest| rest.len() > 1).unwrap_or(rest);
    let found = |plural: &str| Resource::find(group, plural);
    match *rest {
        ["namespaces", namespace, plural] => {
            Some(Target::Collection(found(plural)?, Some(namespace.to_owned())))
        }
        ["namespaces", namespace, plural, name] => {
            Some(Target::Object(found(plural)?, namespace.to_owned(), name.to_owned()))
        }
        [plural] => Some(Target::Collection(found(plural)?, None)),
        [plural, name] => Some(Target::Object(found(plural)?, String::new(), name.to_owned())),
        _ => None,
    }
}
