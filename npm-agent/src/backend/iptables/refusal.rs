//! Rules that the kernel does not take (a match whose module is missing, more sets than it holds): the policy is enforced
//! without them, which allows less than it says, and all other policies are enforced whole. Without the target or the match of
//! connection marks all policies are enforced, and only the proof is missing, or the cut.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use npm_policy::goal::Family;
use npm_policy::model::PolicyKey;

use super::super::Degraded;
use super::state::{Line, Name, Rule, State, Target};
use super::text;

/// What was left out, and of which policies.
#[derive(Clone, Debug)]
pub(super) struct Refusals {
    owners: BTreeMap<Name, BTreeSet<PolicyKey>>,
    degraded: BTreeMap<PolicyKey, BTreeSet<String>>,
    /// The kinds of rules that the kernel refused.
    refused: BTreeSet<(Family, Rule)>,
}

impl Refusals {
    pub(super) fn new(owners: BTreeMap<Name, BTreeSet<PolicyKey>>) -> Self {
        Self { owners, degraded: BTreeMap::new(), refused: BTreeSet::new() }
    }

    /// Whether `probe` finds the kernel to take a kind of rule that it has refused.
    pub(super) fn any_lifted(&self, probe: impl Fn(Family, &Line) -> bool) -> bool {
        self.refused.iter().any(|(family, rule)| probe(*family, &Line::Rule(rule.clone())))
    }

    /// Starts anew: nothing is refused.
    pub(super) fn forget(&mut self) {
        self.degraded.clear();
        self.refused.clear();
    }

    /// The policies that allow less than they say.
    pub(super) fn degraded(&self) -> Vec<Degraded> {
        let line = |(policy, reasons): (&PolicyKey, &BTreeSet<String>)| Degraded {
            policy: policy.clone(),
            reason: reasons.iter().map(String::as_str).collect::<Vec<_>>().join("; "),
        };
        self.degraded.iter().map(line).collect()
    }

    /// After a refusal, takes out of `desired` every allow rule of a kind that `probe` finds refused: the tools name the
    /// failing line in some cases only, and a rule may be refused for a passing reason (a set that someone has just
    /// destroyed). Gives whether anything was taken out.
    pub(super) fn learn(
        &mut self,
        family: Family,
        desired: &mut State,
        probe: impl Fn(&Line) -> bool,
    ) -> bool {
        let mut kinds: BTreeMap<Rule, Vec<(Name, Line)>> = BTreeMap::new();
        for (name, chain) in &desired.chains {
            for line in chain.iter().filter(|line| self.is_allow(name, line)) {
                if let Line::Rule(rule @ Rule { protocol: Some(_), .. }) = line {
                    let ports = rule.ports.map(|_| (1, 2));
                    let like = Rule { protocol: rule.protocol, ports, ..Rule::new(Target::Return) };
                    kinds.entry(like).or_default().push((Arc::clone(name), line.clone()));
                }
            }
        }
        let mut learnt = self.learn_marks(family, desired, &probe);
        for (like, lines) in kinds {
            if probe(&Line::Rule(like.clone())) {
                continue;
            }
            let reason = format!("the kernel does not take {}", text::rule_text(&like));
            self.refused.insert((family, like));
            for (chain, line) in lines {
                self.leave_out(family, desired, &chain, &line, &reason);
                learnt = true;
            }
        }
        learnt
    }

    /// As long as the states name more than `limit` sets, takes all rules that name sets out of the policy that has the
    /// most of them.
    pub(super) fn fit(&mut self, states: &mut BTreeMap<Family, State>, limit: usize) {
        let count =
            |states: &BTreeMap<Family, State>| -> usize { states.values().map(|s| s.sets.len()).sum() };
        let mut total = count(states);
        while total > limit {
            let mut wanted: BTreeMap<PolicyKey, BTreeSet<(Family, Name)>> = BTreeMap::new();
            for (family, state) in &*states {
                for (name, chain) in &state.chains {
                    let owners = self.owners.get(name).into_iter().flatten();
                    let sets = || chain.iter().filter(|line| self.is_allow(name, line)).flat_map(Line::sets);
                    owners.for_each(|owner| {
                        wanted.entry(owner.clone()).or_default().extend(sets().map(|set| (*family, set)));
                    });
                }
            }
            let widest = wanted.into_iter().max_by_key(|(_, sets)| sets.len());
            let Some((policy, sets)) = widest.filter(|(_, sets)| !sets.is_empty()) else { return };
            for state in states.values_mut() {
                for (name, chain) in &mut state.chains {
                    if self.owners.get(name).is_some_and(|owners| owners.contains(&policy)) {
                        let is_kept = |line: &Line| line.sets().is_empty() || !self.is_allow(name, line);
                        Arc::make_mut(chain).retain(is_kept);
                    }
                }
                let referenced = state.referenced_sets();
                state.sets.retain(|name, _| referenced.contains(name));
            }
            let reason = format!(
                "its {} peer sets are left out: with them {total} sets are needed and {limit} is the most",
                sets.len()
            );
            self.degraded.entry(policy).or_default().insert(reason);
            total = count(states);
        }
    }

    /// Takes the rules that write or match connection marks out of `desired`, as far as `probe` finds them refused: they
    /// decide nothing about new connections.
    fn learn_marks(&mut self, family: Family, desired: &mut State, probe: impl Fn(&Line) -> bool) -> bool {
        let lines = desired.chains.values().flat_map(|chain| chain.iter());
        let kinds: BTreeMap<MarkUse, Rule> =
            lines.filter_map(|line| Some((MarkUse::of(line)?, line.rule()?.clone()))).collect();
        let mut learnt = false;
        for (kind, rule) in kinds {
            if probe(&Line::Rule(rule.clone())) {
                continue;
            }
            let rule_text = text::rule_text(&rule);
            match kind {
                MarkUse::Write => tracing::warn!(?family, rule_text, "refused: connections carry no proof"),
                MarkUse::Match => tracing::warn!(?family, rule_text, "refused: no connection is cut"),
            }
            self.refused.insert((family, rule));
            for chain in desired.chains.values_mut() {
                if chain.iter().any(|line| MarkUse::of(line) == Some(kind)) {
                    Arc::make_mut(chain).retain(|line| MarkUse::of(line) != Some(kind));
                }
            }
            learnt = true;
        }
        learnt
    }

    /// Whether leaving the rule out allows less: it allows, in a chain of a policy or of a list of ports.
    fn is_allow(&self, chain: &Name, line: &Line) -> bool {
        let target = match line {
            Line::Rule(rule) => &rule.target,
            Line::Unreadable(_) => return false,
        };
        self.owners.contains_key(chain)
            && match target {
                Target::Goto(_) | Target::Jump(_) => true,
                Target::Accept
                | Target::Drop
                | Target::Return
                | Target::SetMark(_)
                | Target::SetConnmark(_) => false,
            }
    }

    fn leave_out(&mut self, family: Family, desired: &mut State, chain: &Name, line: &Line, reason: &str) {
        let Some(rules) = desired.chains.get_mut(chain) else { return };
        Arc::make_mut(rules).retain(|rule| rule != line);
        for policy in self.owners.get(chain).into_iter().flatten() {
            let reason = format!("{family:?}: {}: {reason}", text::line_text(line));
            self.degraded.entry(policy.clone()).or_default().insert(reason);
        }
        // Sets that only this rule named are no longer to be there.
        let referenced = desired.referenced_sets();
        desired.sets.retain(|name, _| referenced.contains(name));
    }
}

/// What a rule does with connection marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum MarkUse {
    /// It writes them.
    Write,
    /// It asks for them.
    Match,
}

impl MarkUse {
    fn of(line: &Line) -> Option<Self> {
        let rule = line.rule()?;
        match &rule.target {
            Target::SetConnmark(_) => Some(Self::Write),
            Target::Accept
            | Target::Drop
            | Target::Return
            | Target::SetMark(_)
            | Target::Jump(_)
            | Target::Goto(_) => rule.connmark.map(|_| Self::Match),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use npm_policy::compile::compile;
    use npm_policy::flow::{Decision, Flow, Transport};
    use npm_policy::model::{
        Block, Labels, Peer, Peers, Pod, PodKey, PodNetwork, PodPhase, Policy, Ports, Protocol, Rule,
        Selector,
    };
    use npm_policy::world::{Change, World};

    use super::super::interpret;
    use super::super::render::Rendered;
    use super::*;

    /// A pod that may be reached from so many blocks, by one policy, and from one more, by another.
    fn world(blocks: u32) -> World {
        let block = |address: u32| {
            Peer::Block(Block {
                cidr: ipnet::Ipv4Net::new_assert(address.into(), 32).into(),
                except: BTreeSet::new(),
            })
        };
        let policy = |name: &str, peers: Vec<Peer>| Policy {
            key: PolicyKey::new("x", name),
            subjects: Selector::everything(),
            ingress: Some(vec![Rule { peers: Peers::Only(peers), ports: Ports::Any }]),
            egress: None,
        };
        let pod = Pod {
            key: PodKey::new("x", "a"),
            node: Some("node".into()),
            labels: Labels::new(),
            addresses: BTreeSet::from([[10, 0, 0, 1].into()]),
            network: PodNetwork::Own,
            phase: PodPhase::Active,
            ports: BTreeSet::new().into(),
            created: 0,
        };
        let wide = policy("wide", (0..blocks).map(|number| block(0x0b00_0000 + number)).collect());
        let narrow = policy("narrow", vec![block(0x0c00_0000)]);
        let mut world = World::default();
        world.apply(Change::Pod(pod.key.clone(), Some(pod)));
        for policy in [wide, narrow] {
            world.apply(Change::Policy(policy.key.clone(), Some(policy)));
        }
        world
    }

    #[test]
    fn who_needs_more_sets_than_there_can_be_allows_less_and_is_told_of() {
        let rendered = Rendered::of(&compile(&world(100), "node").0);
        let mut states =
            BTreeMap::from([(Family::V4, rendered.v4.clone()), (Family::V6, rendered.v6.clone())]);
        let all: usize = states.values().map(|state| state.sets.len()).sum();
        let mut refusals = Refusals::new(rendered.owners.clone());
        refusals.fit(&mut states, all);
        assert_eq!((refusals.degraded(), &states[&Family::V4]), (vec![], &rendered.v4), "it fits");
        refusals.fit(&mut states, all - 1);
        let said = refusals.degraded();
        let said: Vec<_> = said.iter().map(|one| (one.policy.to_string(), one.reason.as_str())).collect();
        let reason = format!(
            "its 100 peer sets are left out: with them {all} sets are needed and {} is the most",
            all - 1
        );
        assert_eq!(said, [("x/wide".to_owned(), reason.as_str())]);
        assert_eq!(states[&Family::V4].sets.len(), rendered.v4.sets.len() - 100);
        for (source, expected) in [([12, 0, 0, 0], Decision::Allow), ([11, 0, 0, 5], Decision::Deny)] {
            let transport = Transport::Port(Protocol::Tcp, 80);
            let flow = Flow { source: source.into(), destination: [10, 0, 0, 1].into(), transport };
            let state = &states[&Family::V4];
            assert_eq!(interpret::decide(state, state, &flow).unwrap(), expected, "{flow}");
        }
    }
}
