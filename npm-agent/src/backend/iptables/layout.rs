//! What is ours in the kernel, by name: chains, sets, and the jump that leads to them.

use std::sync::Arc;

use npm_policy::goal::Family;
use npm_policy::names::{SET_PREFIX, kernel_set_name};

use super::state::{CtState, CtStates, Line, Rule, Sense, Target};

/// The kernel chain that every forwarded packet passes.
pub const FORWARD: &str = "FORWARD";
/// Our entry chain. Every chain of ours (and of every version of Azure NPM) has this prefix.
pub const ENTRY: &str = "AZURE-NPM";
/// Judges the destination pod's ingress.
pub const INGRESS: &str = "AZURE-NPM-INGRESS";
/// Judges the source pod's egress.
pub const EGRESS: &str = "AZURE-NPM-EGRESS";
/// Where an ingress policy's allow rules go.
pub const INGRESS_ALLOW: &str = "AZURE-NPM-INGRESS-ALLOW-MARK";
/// Where an egress policy's allow rules go.
pub const EGRESS_ALLOW: &str = "AZURE-NPM-EGRESS-ALLOW-MARK";
/// Drops, except what a pod sends to itself.
pub const DENIED: &str = "AZURE-NPM-DENIED";
/// How the chains begin that hold one list of ports for several peers.
pub const PORTS: &str = "AZURE-NPM-PORTS-";
/// An unhooked chain that exists only while the kernel is asked what it takes.
pub const PROBE: &str = "AZURE-NPM-PROBE";
/// kube-proxy's chain behind whose jump ours stands with [`Placement::AfterServices`].
pub const KUBE_SERVICES: &str = "KUBE-SERVICES";

/// How the sets begin that stand in for a set of ours while it is changed. More than one, so that one is free when
/// a crash has left rules that name another.
const TEMPORARY_PREFIXES: [&str; 3] = ["azure-tmp-", "azure-tm2-", "azure-tm3-"];

/// Where in `FORWARD` our jump stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Placement {
    /// The first rule, so that no other rule accepts before we judge.
    #[default]
    First,
    /// Behind the jump to `KUBE-SERVICES`, as Azure NPM's `PlaceAzureChainFirst=false`; the first rule where there
    /// is none. What `KUBE-FORWARD` or others accept before is not judged.
    AfterServices,
}

/// Whether a chain of the filter table is ours.
pub fn is_our_chain(name: &str) -> bool {
    match name.strip_prefix(ENTRY) {
        Some(rest) => rest.is_empty() || rest.starts_with('-'),
        None => false,
    }
}

/// Whether a set is ours.
pub fn is_our_set(name: &str) -> bool {
    name.starts_with(SET_PREFIX) || is_temporary(name)
}

/// Whether a set only stands in for another.
pub fn is_temporary(name: &str) -> bool {
    TEMPORARY_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The names that may stand in for a set of ours, best first, none longer than its own.
pub fn temporary_names(name: &str) -> impl Iterator<Item = Arc<str>> {
    let digits = name.strip_prefix(SET_PREFIX).unwrap_or(name).to_owned();
    TEMPORARY_PREFIXES.iter().map(move |prefix| format!("{prefix}{digits}").into())
}

/// Another name for a set of ours whose own is taken.
pub fn other_name(name: &str, family: Family) -> Arc<str> {
    kernel_set_name(&format!("instead-of:{name}"), family).into()
}

/// The rule of `FORWARD` that leads to us: whatever no allowed connection vouches for is judged.
pub fn jump() -> Rule {
    let states = [CtState::Related, CtState::Established].into();
    Rule { states: Some(CtStates { sense: Sense::IsNot, states }), ..Rule::new(Target::Jump(ENTRY.into())) }
}

/// Whether a rule of `FORWARD` is a jump that we, or Azure NPM, put there: to our chains, for packets of certain
/// conntrack states or for all. One with any other match is somebody else's.
pub fn is_our_jump(line: &Line) -> bool {
    match line {
        Line::Unreadable(_) => false,
        Line::Rule(rule) => {
            let bare = Rule {
                states: rule.states.clone(),
                comment: rule.comment.clone(),
                ..Rule::new(rule.target.clone())
            };
            line.leads_to_us() && bare == *rule
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ours_is_ours() {
        for chain in ["AZURE-NPM", "AZURE-NPM-INGRESS-PORT", "AZURE-NPM-TARGET-SETS"] {
            assert!(is_our_chain(chain), "{chain}");
        }
        for chain in ["AZURE-NPMX", "AZURE", "MY-AZURE-NPM", "azure-npm", "FORWARD", "AZURE-IPALLOC"] {
            assert!(!is_our_chain(chain), "{chain}");
        }
        for set in ["azure-npm-123", "azure-tmp-123", "azure-tm3-1"] {
            assert!(is_our_set(set), "{set}");
        }
        for set in ["azure-npm", "azure-tm9-1", "azure-other", "my-azure-npm-1"] {
            assert!(!is_our_set(set), "{set}");
        }
    }

    #[test]
    fn temporary_names_are_no_longer_than_the_name() {
        let name = "azure-npm-1hpckhpgh8c87xhe12686";
        assert_eq!(name.len(), 31);
        let names: Vec<_> = temporary_names(name).collect();
        assert_eq!(names.len(), 3);
        assert!(names.iter().all(|name| name.len() == 31 && is_temporary(name) && is_our_set(name)));
    }
}
