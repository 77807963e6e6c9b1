//! Goal -> sets and chains of each family, as data and as text.
//!
//! ```text
//! FORWARD ─► AZURE-NPM ─► -INGRESS ─► one jump a policy ─► -INGRESS-<h>: allow rules go to -INGRESS-ALLOW-MARK,
//!                │            │                                          the end marks "isolated"
//!                │            └─► isolated and not allowed: AZURE-NPM-DENIED, which drops
//!                └─► -EGRESS, the same
//! ```
//!
//! What is left at the end of `AZURE-NPM` was judged and allowed: its connection gets the proof, one bit of the
//! connection mark. What is dropped loses it. Both backends set and clear the bit alike, and here no rule asks for it.
//!
//! We only take away: no rule accepts. An allow rule sets a mark bit and the packet goes on through the other policies
//! and the other direction; what is left of our bits is cleared when it leaves. Whatever the bits were before, they
//! are cleared on entry, so nobody can bring an allow along.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use imbl::OrdSet;
use ipnet::IpNet;
use npm_common::mark::{self, ProofBit};
use npm_common::packet::NEIGHBOUR_TYPES;
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::{
    Clause, Family, Goal, Member, NamedMatch, PeerMatch, PortMatch, Program, Set as GoalSet, SetKey,
};
use npm_policy::model::PolicyKey;
use npm_policy::names::{self, SetNames};

use super::interpret::{self, Uninterpretable};
use super::layout::{self, Established};
use super::state::{
    Chain, CtState, CtStates, Line, Mark, Name, Rule, Sense, Set, SetKind, SetMatch, Side, State, Target,
};
use super::text::{self, ICMPV6, Unreadable};

/// The longest comment that we write, in bytes; the kernel takes 255.
const MAX_COMMENT_BYTES: usize = 200;

/// With more rules than this for one clause, its ports get a chain of their own.
const MAX_PRODUCT: usize = 16;

/// What the kernel must hold for a goal.
#[derive(Debug)]
pub struct Rendered {
    /// IPv4.
    pub v4: State,
    /// IPv6.
    pub v6: State,
    /// The names of the goal's sets.
    pub names: BTreeMap<SetKey, SetNames>,
    /// The policies that a policy's or a port list's chain serves.
    pub owners: BTreeMap<Name, BTreeSet<PolicyKey>>,
    read: OnceLock<Result<[State; 2], Unreadable>>,
}

/// Why a rendered state could not be interpreted: a defect of ours.
#[derive(Debug, thiserror::Error)]
pub enum RenderedError {
    /// What we wrote is not what we read.
    #[error("cannot read our own rendering")]
    Unreadable(#[from] Unreadable),
    /// The rules lead nowhere.
    #[error("cannot interpret our own rendering")]
    Uninterpretable(#[from] Uninterpretable),
}

impl Rendered {
    /// Renders a goal in the usual form.
    pub fn of(goal: &Goal) -> Self {
        Self::in_form(goal, Form::default())
    }

    /// Renders a goal.
    pub fn in_form(goal: &Goal, form: Form) -> Self {
        let names = names::name_sets(goal.sets.keys());
        let suffixes = names::name_chains(goal.programs.keys());
        let mut owners = BTreeMap::new();
        let mut render =
            |family| Renderer { goal, family, form, names: &names, suffixes: &suffixes }.state(&mut owners);
        let (v4, v6) = (render(Family::V4), render(Family::V6));
        Self { v4, v6, names, owners, read: OnceLock::new() }
    }

    /// One family's state.
    pub fn family(&self, family: Family) -> &State {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// The sets of both families, as an `ipset restore` file.
    pub fn sets_text(&self) -> String {
        Family::BOTH.map(|family| text::sets_text(family, &self.family(family).sets)).concat()
    }

    /// The chains of one family and the jump to them, as a file for `iptables-restore` or `ip6tables-restore`.
    pub fn filter_text(&self, family: Family) -> String {
        let state = self.family(family);
        text::filter_text(&state.chains, &state.forward)
    }

    /// What the rendered rules and sets do with a flow. They are written as text and read back first, so that what is
    /// judged is what the tools would be given.
    ///
    /// # Errors
    /// A defect of ours: what was written can't be read or leads nowhere.
    pub fn decide(&self, flow: &Flow) -> Result<Decision, RenderedError> {
        let read = self.read.get_or_init(|| self.read_back());
        match read {
            Ok([v4, v6]) => Ok(interpret::decide(v4, v6, flow)?),
            Err(Unreadable { line, text }) => Err(Unreadable { line: *line, text: text.clone() }.into()),
        }
    }

    fn read_back(&self) -> Result<[State; 2], Unreadable> {
        let mut sets = text::parse_sets(&self.sets_text())?;
        let mut read = |family| {
            let filter = text::parse_filter(family, &self.filter_text(family))?;
            let sets = sets.remove(&family).unwrap_or_default();
            Ok(State { sets, chains: filter.chains, forward: filter.forward, ..State::empty(family) })
        };
        Ok([read(Family::V4)?, read(Family::V6)?])
    }
}

/// What of the rendering is not the goal's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Form {
    /// The bit of the connection mark that allowed connections get.
    pub proof: ProofBit,
    /// What becomes of established connections.
    pub established: Established,
}

/// The two directions, which differ in names, sides and bits only.
#[derive(Clone, Copy)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    fn word(self) -> &'static str {
        match self {
            Self::Ingress => "INGRESS",
            Self::Egress => "EGRESS",
        }
    }

    fn chain(self) -> &'static str {
        match self {
            Self::Ingress => layout::INGRESS,
            Self::Egress => layout::EGRESS,
        }
    }

    fn allow_chain(self) -> &'static str {
        match self {
            Self::Ingress => layout::INGRESS_ALLOW,
            Self::Egress => layout::EGRESS_ALLOW,
        }
    }

    /// The end that is a subject.
    fn local(self) -> Side {
        match self {
            Self::Ingress => Side::Destination,
            Self::Egress => Side::Source,
        }
    }

    /// The end that is a peer.
    fn peer(self) -> Side {
        match self {
            Self::Ingress => Side::Source,
            Self::Egress => Side::Destination,
        }
    }

    fn isolated(self) -> u32 {
        match self {
            Self::Ingress => mark::INGRESS_ISOLATED,
            Self::Egress => mark::EGRESS_ISOLATED,
        }
    }

    fn clauses(self, program: &Program) -> Option<&Vec<Clause>> {
        match self {
            Self::Ingress => program.ingress.as_ref(),
            Self::Egress => program.egress.as_ref(),
        }
    }
}

struct Renderer<'a> {
    goal: &'a Goal,
    family: Family,
    form: Form,
    names: &'a BTreeMap<SetKey, SetNames>,
    suffixes: &'a BTreeMap<PolicyKey, String>,
}

/// One alternative of a clause's peers or ports: what it adds to a rule and to its comment.
#[derive(Clone)]
struct Part {
    rule: Rule,
    comment: String,
}

/// A chain under construction: rules, or a list of ports still without a chain name.
enum Entry {
    Rule(Rule),
    Ports { peer: Part, ports: Vec<Line> },
}

impl Renderer<'_> {
    fn state(&self, owners: &mut BTreeMap<Name, BTreeSet<PolicyKey>>) -> State {
        let mut state = State {
            forward: vec![Line::Rule(layout::jump(self.form.established))],
            ..State::empty(self.family)
        };
        let mut chains: BTreeMap<Name, Vec<Rule>> = BTreeMap::from([(layout::ENTRY.into(), Vec::new())]);
        if !self.goal.programs.is_empty() {
            chains.insert(layout::ENTRY.into(), self.entry());
            chains.insert(layout::DENIED.into(), self.denied());
            for direction in [Direction::Ingress, Direction::Egress] {
                chains.insert(direction.chain().into(), self.base(direction));
                let allow = set_mark(mark::ALLOWED, mark::ALLOWED);
                chains.insert(direction.allow_chain().into(), vec![allow]);
            }
        }
        state.chains = chains.into_iter().map(|(name, rules)| (name, chain(rules))).collect();
        self.add_policies(&mut state.chains, owners);
        state.sets = self.sets(&state);
        state
    }

    fn entry(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        match self.form.established {
            Established::Keep => {}
            Established::Cut => {
                let cut = self.form.proof.cut_mask();
                let connmark = Some(Mark { value: cut, mask: cut });
                rules.push(Rule { connmark, ..Rule::new(Target::Drop) });
                let states = Some(layout::vouched_for(Sense::Is));
                rules.push(Rule { states, ..Rule::new(Target::Return) });
            }
        }
        match self.family {
            Family::V4 => {}
            Family::V6 => rules.extend(NEIGHBOUR_TYPES.map(|number| Rule {
                protocol: Some(ICMPV6),
                icmpv6_type: Some(number),
                ..Rule::new(Target::Return)
            })),
        }
        rules.push(set_mark(0, mark::MASK));
        rules.push(Rule::new(Target::Jump(layout::INGRESS.into())));
        rules.push(Rule::new(Target::Jump(layout::EGRESS.into())));
        rules.push(set_mark(0, mark::MASK));
        rules.push(self.set_proof(self.form.proof.mask()));
        rules
    }

    /// Sets or clears the proof. A packet that is INVALID or UNTRACKED has no connection, and the target passes it over.
    fn set_proof(&self, value: u32) -> Rule {
        Rule::new(Target::SetConnmark(Mark { value, mask: self.form.proof.mask() }))
    }

    /// A pod reaches itself through a Service: only packets about to be dropped pay for finding out. Such a packet crosses
    /// `FORWARD` with its destination translated. One that claims a pod's own address as its source and is not
    /// translated comes from somebody else: Linux delivers it (over IPv6 always, over IPv4 without `rp_filter`).
    fn denied(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        for addresses in self.goal.subjects.values() {
            let own: Vec<IpAddr> =
                addresses.iter().copied().filter(|address| Family::of(*address) == self.family).collect();
            for source in &own {
                rules.extend(own.iter().map(|destination| Rule {
                    source: Some(IpNet::from(*source)),
                    destination: Some(IpNet::from(*destination)),
                    states: Some(CtStates { sense: Sense::Is, states: [CtState::Translated].into() }),
                    ..Rule::new(Target::Return)
                }));
            }
        }
        rules.sort();
        rules.push(self.set_proof(0));
        rules.push(Rule::new(Target::Drop));
        rules
    }

    /// The jumps to the policies of a direction, and the judgement over what they left in the mark.
    fn base(&self, direction: Direction) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (key, program) in &self.goal.programs {
            if direction.clauses(program).is_none() {
                continue;
            }
            let subjects = self.kernel_name(&program.subjects);
            let preposition = match direction {
                Direction::Ingress => "TO",
                Direction::Egress => "FROM",
            };
            let comment = format!(
                "{}-POLICY-{key}-{preposition}-{}-IN-ns-{}",
                direction.word(),
                self.subject_words(key, program),
                key.namespace
            );
            rules.push(Rule {
                sets: vec![SetMatch { set: subjects, sense: Sense::Is, side: direction.local() }],
                comment: Some(comment_text(&comment)),
                ..Rule::new(Target::Jump(self.policy_chain(direction, key)))
            });
        }
        let both = direction.isolated() | mark::ALLOWED;
        rules.push(Rule {
            mark: Some(Mark { value: direction.isolated(), mask: both }),
            ..Rule::new(Target::Jump(layout::DENIED.into()))
        });
        rules.push(set_mark(0, both));
        rules
    }

    /// The subjects as Azure NPM's comments have them: the pod selector, the namespace aside.
    fn subject_words(&self, key: &PolicyKey, program: &Program) -> String {
        let name = self.names.get(&program.subjects).map_or("", |names| &names.name);
        let scope = format!("local-ns-{}", key.namespace);
        match name.strip_prefix(&scope).map(|rest| rest.strip_prefix("-AND-").unwrap_or(rest)) {
            Some("") => "all".to_owned(),
            Some(selector) => selector.to_owned(),
            None => name.to_owned(),
        }
    }

    fn policy_chain(&self, direction: Direction, key: &PolicyKey) -> Name {
        format!("{}-{}", direction.chain(), self.suffixes[key]).into()
    }

    fn add_policies(
        &self,
        chains: &mut BTreeMap<Name, Chain>,
        owners: &mut BTreeMap<Name, BTreeSet<PolicyKey>>,
    ) {
        let mut drafts: Vec<(&PolicyKey, Name, Vec<Entry>)> = Vec::new();
        for (key, program) in &self.goal.programs {
            for direction in [Direction::Ingress, Direction::Egress] {
                let Some(clauses) = direction.clauses(program) else { continue };
                let mut entries = Vec::new();
                for clause in clauses {
                    self.clause(direction, clause, &mut entries);
                }
                entries.push(Entry::Rule(Rule {
                    comment: Some("DROP-ALL".into()),
                    ..set_mark(direction.isolated(), direction.isolated())
                }));
                drafts.push((key, self.policy_chain(direction, key), entries));
            }
        }
        let lists = drafts.iter().flat_map(|(_, _, entries)| {
            entries.iter().filter_map(|entry| match entry {
                Entry::Rule(_) => None,
                Entry::Ports { ports, .. } => Some(list_text(ports)),
            })
        });
        let suffixes = names::chain_suffixes(lists.collect());
        for (key, name, entries) in drafts {
            owners.entry(Arc::clone(&name)).or_default().insert(key.clone());
            let mut lines = Vec::new();
            for entry in entries {
                match entry {
                    Entry::Rule(rule) => lines.push(Line::Rule(rule)),
                    Entry::Ports { peer, ports } => {
                        let list: Name = format!("{}{}", layout::PORTS, suffixes[&list_text(&ports)]).into();
                        owners.entry(Arc::clone(&list)).or_default().insert(key.clone());
                        chains.entry(Arc::clone(&list)).or_insert_with(|| Arc::new(ports));
                        lines.push(Line::Rule(Rule {
                            comment: Some(comment_text(&format!("ALLOW{}", peer.comment))),
                            target: Target::Jump(list),
                            ..peer.rule
                        }));
                    }
                }
            }
            chains.insert(name, Arc::new(lines));
        }
    }

    fn clause(&self, direction: Direction, clause: &Clause, entries: &mut Vec<Entry>) {
        let peers = self.peers(direction, &clause.peers);
        let ports = self.ports(&clause.ports);
        let allow = Target::Goto(direction.allow_chain().into());
        if peers.len() > 1 && ports.len() > 1 && peers.len() * ports.len() > MAX_PRODUCT {
            let list: Vec<Line> = ports
                .iter()
                .map(|port| {
                    let comment = Some(comment_text(&format!("ALLOW{}", port.comment)));
                    Line::Rule(Rule { comment, target: allow.clone(), ..port.rule.clone() })
                })
                .collect();
            entries.extend(peers.into_iter().map(|peer| Entry::Ports { peer, ports: list.clone() }));
            return;
        }
        for peer in &peers {
            for port in &ports {
                let sets = port.rule.sets.iter().chain(&peer.rule.sets).cloned().collect();
                let comment = Some(comment_text(&format!("ALLOW{}{}", peer.comment, port.comment)));
                entries.push(Entry::Rule(Rule { sets, comment, target: allow.clone(), ..port.rule.clone() }));
            }
        }
    }

    fn peers(&self, direction: Direction, peers: &PeerMatch) -> Vec<Part> {
        // The target is set by the caller.
        let anybody = Rule::new(Target::Return);
        match peers {
            PeerMatch::Any => vec![Part { rule: anybody, comment: "-ALL".to_owned() }],
            PeerMatch::Sets(keys) => {
                let preposition = match direction {
                    Direction::Ingress => "FROM",
                    Direction::Egress => "TO",
                };
                let part = |key: &SetKey| Part {
                    rule: Rule { sets: vec![self.set_match(key, direction.peer())], ..anybody.clone() },
                    comment: format!("-{preposition}-{}", self.names[key].name),
                };
                keys.iter().filter(|key| key.can_hold(self.family)).map(part).collect()
            }
        }
    }

    fn ports(&self, ports: &PortMatch) -> Vec<Part> {
        let any = Rule::new(Target::Return);
        match ports {
            PortMatch::Any => vec![Part { rule: any, comment: String::new() }],
            PortMatch::Only { ranges, named } => {
                let ranges = ranges.iter().map(|range| {
                    let (ports, words) = match (range.first, range.last) {
                        (0, u16::MAX) => (None, String::new()),
                        (first, last) if first == last => (Some((first, last)), format!("-TO-PORT-{first}")),
                        (first, last) => (Some((first, last)), format!("-TO-PORT-{first}:{last}")),
                    };
                    Part {
                        rule: Rule { protocol: Some(range.protocol.number()), ports, ..any.clone() },
                        comment: format!("-ON-{}{words}", range.protocol),
                    }
                });
                let named = named.iter().filter(|named| named.set.can_hold(self.family)).map(
                    |NamedMatch { protocol, set }| Part {
                        rule: Rule {
                            protocol: Some(protocol.number()),
                            sets: vec![self.set_match(set, Side::DestinationPort)],
                            ..any.clone()
                        },
                        comment: format!("-ON-{protocol}-TO-{}", self.names[set].name),
                    },
                );
                ranges.chain(named).collect()
            }
        }
    }

    fn set_match(&self, key: &SetKey, side: Side) -> SetMatch {
        SetMatch { set: self.kernel_name(key), sense: Sense::Is, side }
    }

    fn kernel_name(&self, key: &SetKey) -> Name {
        // A goal whose programs name a set that it does not hold breaks the goal's own promise; a set that nobody
        // fills matches nothing, and the restore that names it is refused.
        match self.names.get(key) {
            Some(names) => Arc::clone(names.kernel(self.family)),
            None => names::kernel_set_name(&names::set_name(key), self.family).into(),
        }
    }

    /// The goal's sets that a rule of this family names.
    fn sets(&self, state: &State) -> BTreeMap<Name, Set> {
        let referenced = state.referenced_sets();
        let mut sets = BTreeMap::new();
        for (key, set) in &self.goal.sets {
            let name = self.kernel_name(key);
            if referenced.contains(&name) {
                sets.insert(name, self.set(key, set));
            }
        }
        sets
    }

    fn set(&self, key: &SetKey, set: &GoalSet) -> Set {
        let members = set.family(self.family);
        match key {
            SetKey::Pods(_) | SetKey::Local(_) => Set { kind: SetKind::Net, members: members.clone() },
            SetKey::Ports { .. } => Set { kind: SetKind::IpPort, members: members.clone() },
            SetKey::Block(_) => Set { kind: SetKind::Net, members: block_members(members) },
        }
    }
}

/// A block's members as `hash:net` can hold them: not `/0`, which becomes its two halves; an except that is a half
/// takes the half's place, since one network can't be in the set both ways.
fn block_members(members: &OrdSet<Member>) -> OrdSet<Member> {
    let mut held: BTreeSet<Member> = BTreeSet::new();
    for member in members {
        match member {
            Member::Include(net) => {
                let halves = net.subnets(1).ok().filter(|_| net.prefix_len() == 0);
                let nets: Vec<IpNet> = halves.map_or_else(|| vec![*net], Iterator::collect);
                let excepted = |net: &IpNet| members.contains(&Member::Except(*net));
                held.extend(nets.into_iter().filter(|net| !excepted(net)).map(text::include));
            }
            Member::Except(_) | Member::Address(_) | Member::Port(..) => {
                held.insert(*member);
            }
        }
    }
    held.into_iter().collect()
}

fn chain(rules: Vec<Rule>) -> Chain {
    Arc::new(rules.into_iter().map(Line::Rule).collect())
}

fn list_text(lines: &[Line]) -> String {
    lines.iter().map(text::line_text).collect::<Vec<_>>().join("\n")
}

fn set_mark(value: u32, mask: u32) -> Rule {
    Rule::new(Target::SetMark(Mark { value, mask }))
}

/// A comment that the tools take as it is: at most [`MAX_COMMENT_BYTES`], no quotes, nothing outside printable ASCII.
fn comment_text(text: &str) -> Arc<str> {
    let plain = text.chars().map(|char| match char {
        '"' | '\'' | '\\' | '`' | ' ' => '_',
        char if char.is_ascii_graphic() => char,
        _ => '_',
    });
    plain.take(MAX_COMMENT_BYTES).collect::<String>().into()
}

#[cfg(test)]
mod tests;
