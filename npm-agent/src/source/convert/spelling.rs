//! Kinds that are none of ours, and those that may only be misspelt or cut short: `Networkpolicy`, `NetworkPol`, `pod`.
//!
//! An API server refuses what it does not know. Passing it over in silence would open the pods that it was to isolate.

use super::kind::KINDS;

/// The kinds of networking.k8s.io, in all versions up to Kubernetes 1.35, besides NetworkPolicy
/// (kubernetes/kubernetes, `staging/src/k8s.io/api/networking`).
const NETWORKING: [&str; 5] = ["Ingress", "IngressClass", "IPAddress", "ServiceCIDR", "ClusterCIDR"];

/// Kinds longer than this resemble none of ours, and are not compared with them.
const LONGEST: usize = 24;

/// What a kind is that is none of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Another one, which decides nothing.
    Other,
    /// Perhaps one of ours; why.
    Doubtful(String),
}

/// Judges a kind that is not exactly one of ours, nor a list of one.
pub(super) fn judge(kind: &str, api_version: Option<&str>) -> Verdict {
    let group = match api_version {
        None => Group::Missing,
        Some(version) => match version.split_once('/') {
            None => Group::Core,
            Some(("networking.k8s.io", _)) => Group::Networking,
            Some(_) => Group::Other,
        },
    };
    if let Some(meant) = resembled(kind, group) {
        return Verdict::Doubtful(format!("is not known; {meant} is"));
    }
    let item = kind.strip_suffix("List").unwrap_or(kind);
    match group {
        Group::Networking if !NETWORKING.contains(&item) => {
            Verdict::Doubtful("is none of networking.k8s.io".to_owned())
        }
        Group::Missing => Verdict::Doubtful("has no apiVersion, so it may be cut short".to_owned()),
        Group::Core | Group::Networking | Group::Other => Verdict::Other,
    }
}

/// Whose kind it may be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    /// It says nothing, or something that is no string.
    Missing,
    /// `v1`.
    Core,
    /// `networking.k8s.io`.
    Networking,
    /// Somebody else's, which may have kinds that resemble ours.
    Other,
}

/// The kind of ours that was perhaps meant.
fn resembled(kind: &str, group: Group) -> Option<String> {
    if kind.len() > LONGEST || (group == Group::Networking && NETWORKING.contains(&kind)) {
        return None;
    }
    let spelt = kind.to_ascii_lowercase();
    let ours = KINDS.iter().flat_map(|kind| {
        let plural = kind.strip_suffix('y').map_or_else(|| format!("{kind}s"), |stem| format!("{stem}ies"));
        let list = format!("{kind}List");
        [((*kind).to_owned(), (*kind).to_owned()), (plural, (*kind).to_owned()), (list.clone(), list)]
    });
    let all = ours.chain([("List".to_owned(), "List".to_owned())]);
    let mut found = all.filter(|(form, _)| {
        let form = form.to_ascii_lowercase();
        if form == spelt {
            return true;
        }
        let is_short = form.len() < 8;
        let is_others = group == Group::Other;
        // Somebody else's kinds may well resemble our short names, or begin as ours do.
        let typos = match (is_short, is_others) {
            (true, true) => 0,
            (true, false) => 1,
            (false, _) => 2,
        };
        let is_cut = !is_others && !spelt.is_empty() && form.starts_with(&spelt);
        is_cut || distance(&form, &spelt) <= typos
    });
    found.next().map(|(_, meant)| meant)
}

/// How many letters must be put in, taken out, changed, or swapped with the next to make one text of the other (optimal
/// string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let changed = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = changed.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_resembles_ours_is_doubtful() {
        for (version, kinds) in [
            (
                Some("networking.k8s.io/v1"),
                "Networkpolicy NetworkPolicys NetworkPolicies NetworkPol N Foo pod FooList Ingres",
            ),
            (
                Some("v1"),
                "pod pods PodLists Podd Pdo Po namespace Namespaces NameSpace Namspace list Lists LIST",
            ),
            (None, "Networkpolicy Deployment ServiceList namespaceList"),
            (Some("projectcalico.org/v3"), "networkpolicy NetworkPolcy NetworkPolicylist pod Namespaces"),
        ] {
            for kind in kinds.split(' ') {
                assert_ne!(judge(kind, version), Verdict::Other, "{kind} of {version:?}");
            }
        }
        let doubtful = |reason: &str| Verdict::Doubtful(reason.to_owned());
        assert_eq!(judge("pods", Some("v1")), doubtful("is not known; Pod is"));
        assert_eq!(
            judge("networkpolicylist", Some("apps/v1")),
            doubtful("is not known; NetworkPolicyList is")
        );
        assert_eq!(
            judge("NetworkAttachment", Some("networking.k8s.io/v1")),
            doubtful("is none of networking.k8s.io")
        );
    }

    #[test]
    fn the_kinds_of_others_are_passed_over() {
        for (version, kinds) in [
            (
                "v1",
                "Binding ComponentStatus ConfigMap Endpoints Event LimitRange Node PersistentVolume Secret Service \
                 PersistentVolumeClaim PodTemplate PodTemplateList ReplicationController ResourceQuota ServiceAccount \
                 NodeList ServiceList Status",
            ),
            (
                "networking.k8s.io/v1",
                "Ingress IngressClass IngressClassList IPAddress IPAddressList ServiceCIDR ServiceCIDRList",
            ),
            ("apps/v1", "Deployment DaemonSet ReplicaSet StatefulSet"),
            ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy BaselineAdminNetworkPolicy"),
            ("projectcalico.org/v3", "GlobalNetworkPolicy StagedNetworkPolicy IPPool NetworkSet"),
            ("cilium.io/v2", "CiliumNetworkPolicy CiliumClusterwideNetworkPolicy"),
            ("config.openshift.io/v1", "Network NetworkList Pool PoolList"),
            ("metrics.k8s.io/v1", "PodMetrics PodMetricsList"),
        ] {
            for kind in kinds.split_whitespace() {
                assert_eq!(judge(kind, Some(version)), Verdict::Other, "{kind} of {version}");
            }
        }
        assert_eq!(judge(&"NetworkPolicy".repeat(100_000), Some("v1")), Verdict::Other);
    }
}
