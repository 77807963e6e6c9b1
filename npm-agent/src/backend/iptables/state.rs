//! The kernel's state of one family, as data: our sets, our chains, and the rules of `FORWARD`.
//!
//! Rules are compared by what they say, after parsing, whoever wrote them. So an edit that keeps a rule's comment is
//! noticed too, which a content hash in the comment would miss.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdSet;
use ipnet::IpNet;
use npm_policy::goal::{Family, Member};

use super::layout::Established;
use super::{layout, text};

/// The name of a set or of a chain.
pub type Name = Arc<str>;

/// One family's state, as far as it concerns us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Which family.
    pub family: Family,
    /// Our sets.
    pub sets: BTreeMap<Name, Set>,
    /// Our chains of the filter table.
    pub chains: BTreeMap<Name, Chain>,
    /// All rules of `FORWARD`, ours and others', in order.
    pub forward: Vec<Line>,
    /// Chains of ours that somebody else's rules lead to: they can be emptied and not deleted.
    pub claimed: BTreeSet<Name>,
}

/// A chain's rules, in order.
pub type Chain = Arc<Vec<Line>>;

/// One rule as found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Line {
    /// One of the forms that we write or inherit.
    Rule(Rule),
    /// Anything else: the text after `-A CHAIN `, as `iptables-save` prints it.
    Unreadable(Arc<str>),
}

/// A rule. Matches that are `None` (or no sets) hold for every packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// `-s`.
    pub source: Option<IpNet>,
    /// `-d`.
    pub destination: Option<IpNet>,
    /// `-p`: the IANA protocol number.
    pub protocol: Option<u8>,
    /// `--dport`: first and last port, inclusive.
    pub ports: Option<(u16, u16)>,
    /// `--icmpv6-type`.
    pub icmpv6_type: Option<u8>,
    /// `-m conntrack --ctstate`.
    pub states: Option<CtStates>,
    /// `-m mark --mark`.
    pub mark: Option<Mark>,
    /// `-m connmark --mark`.
    pub connmark: Option<Mark>,
    /// `-m set --match-set`: all must hold.
    pub sets: Vec<SetMatch>,
    /// `-m comment`.
    pub comment: Option<Arc<str>>,
    /// What happens to a packet that matches.
    pub target: Target,
}

impl Rule {
    /// A rule that matches every packet.
    pub fn new(target: Target) -> Self {
        Self {
            source: None,
            destination: None,
            protocol: None,
            ports: None,
            icmpv6_type: None,
            states: None,
            mark: None,
            connmark: None,
            sets: Vec::new(),
            comment: None,
            target,
        }
    }

    /// The chain that the rule hands the packet to.
    pub fn callee(&self) -> Option<&Name> {
        match &self.target {
            Target::Jump(chain) | Target::Goto(chain) => Some(chain),
            Target::Accept | Target::Drop | Target::Return | Target::SetMark(_) | Target::SetConnmark(_) => {
                None
            }
        }
    }
}

/// A packet mark's bits: for a match the bits of `mask` equal `value`; for a target they are replaced by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// The value; for a target (`--set-xmark`) it is XORed in after the mask is cleared.
    pub value: u32,
    /// The bits concerned.
    pub mask: u32,
}

/// Whether a match or its negation is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sense {
    /// The match holds.
    Is,
    /// `!`: the match does not hold.
    IsNot,
}

impl Sense {
    /// Whether it is the match itself that must hold.
    pub fn is_positive(self) -> bool {
        self == Self::Is
    }
}

/// A match on conntrack's state of the packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CtStates {
    /// Whether it must be one of them or none.
    pub sense: Sense,
    /// The states.
    pub states: BTreeSet<CtState>,
}

/// Conntrack's state of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CtState {
    /// Belongs to no connection and can open none.
    Invalid,
    /// Opens a connection.
    New,
    /// Opens a connection that another one announced, or an error about one.
    Related,
    /// Belongs to a connection that has seen packets both ways.
    Established,
    /// Exempted from tracking.
    Untracked,
    /// Its connection's destination was translated. A packet has this beside one of the others.
    Translated,
}

impl CtState {
    /// All of them, with iptables' names.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Invalid, "INVALID"),
        (Self::New, "NEW"),
        (Self::Related, "RELATED"),
        (Self::Established, "ESTABLISHED"),
        (Self::Untracked, "UNTRACKED"),
        (Self::Translated, "DNAT"),
    ];
}

/// A match on a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SetMatch {
    /// The set.
    pub set: Name,
    /// Whether the packet must be in it or not.
    pub sense: Sense,
    /// What of the packet is looked up.
    pub side: Side,
}

/// What of a packet is looked up in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// `src`: the source address.
    Source,
    /// `dst`: the destination address.
    Destination,
    /// `dst,dst`: the destination address, the protocol and the destination port.
    DestinationPort,
}

/// What happens to a packet that matches a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// `-j DROP`.
    Drop,
    /// `-j ACCEPT`: nothing else of the hook sees the packet. We never write it; Azure NPM does.
    Accept,
    /// `-j RETURN`.
    Return,
    /// `-j MARK --set-xmark`.
    SetMark(Mark),
    /// `-j CONNMARK --set-xmark`: the same with the mark of the packet's connection, if it has one.
    SetConnmark(Mark),
    /// `-j CHAIN`: its end comes back here.
    Jump(Name),
    /// `-g CHAIN`: its end goes where the end of this chain would have gone.
    Goto(Name),
}

/// A set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// What it can hold.
    pub kind: SetKind,
    /// What it holds; empty for [`SetKind::Other`]. An address is [`Member::Address`], never a full-length
    /// [`Member::Include`].
    pub members: OrdSet<Member>,
}

/// The kinds of sets. The family is the state's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SetKind {
    /// `hash:net`: addresses and blocks, with excepts.
    Net,
    /// `hash:ip,port`.
    IpPort,
    /// None that we make: what follows the name in `ipset save`'s `create` line, and perhaps members that we can't
    /// read. It is replaced.
    Other(Arc<str>),
}

impl SetKind {
    /// Whether members of the set are sets themselves, so that it has to go before them.
    pub fn is_list(&self) -> bool {
        match self {
            Self::Net | Self::IpPort => false,
            Self::Other(text) => text.starts_with("list:set"),
        }
    }
}

impl Set {
    /// Whether the set, as `hash:net`, matches an address: of the entries that contain it the one with the longest
    /// prefix decides (Linux, net/netfilter/ipset/ip_set_hash_gen.h, `mtype_test_cidrs`).
    pub fn has_address(&self, address: IpAddr) -> bool {
        if self.members.contains(&Member::Address(address)) {
            return true;
        }
        // Members are ordered by kind: when the greatest is an address there are no blocks.
        match self.members.get_max() {
            None | Some(Member::Address(_) | Member::Port(..)) => return false,
            Some(Member::Include(_) | Member::Except(_)) => {}
        }
        let longest = IpNet::from(address).prefix_len();
        for length in (0..=longest).rev() {
            let Ok(net) = IpNet::new(address, length) else { continue };
            let net = net.trunc();
            if self.members.contains(&Member::Except(net)) {
                return false;
            }
            if self.members.contains(&Member::Include(net)) {
                return true;
            }
        }
        false
    }
}

impl State {
    /// No sets, no chains, an empty `FORWARD`.
    pub fn empty(family: Family) -> Self {
        Self {
            family,
            sets: BTreeMap::new(),
            chains: BTreeMap::new(),
            forward: Vec::new(),
            claimed: BTreeSet::new(),
        }
    }

    /// The jump to us that stands in `FORWARD`; the usual one where none does.
    pub fn jump(&self) -> Rule {
        let ours = self.forward.iter().filter(|line| layout::is_our_jump(line)).find_map(|line| match line {
            Line::Rule(rule) => Some(rule.clone()),
            Line::Unreadable(_) => None,
        });
        ours.unwrap_or_else(|| layout::jump(Established::Keep))
    }

    /// The sets that rules name, each once.
    pub fn referenced_sets(&self) -> BTreeSet<Name> {
        let lines = self.chains.values().flat_map(|chain| chain.iter()).chain(&self.forward);
        lines.flat_map(Line::sets).collect()
    }

    /// Whether all of ours is in the forms that we write.
    pub fn is_readable(&self) -> bool {
        let line = |line: &Line| match line {
            Line::Rule(_) => true,
            Line::Unreadable(_) => false,
        };
        let set = |set: &Set| match set.kind {
            SetKind::Net | SetKind::IpPort => true,
            SetKind::Other(_) => false,
        };
        self.chains.values().all(|chain| chain.iter().all(line)) && self.sets.values().all(set)
    }

    /// Whether nothing of ours is there.
    pub fn is_clear(&self) -> bool {
        self.sets.is_empty() && self.chains.is_empty() && !self.forward.iter().any(layout::is_our_jump)
    }
}

impl Line {
    /// The rule, if it is of a form that we know.
    pub fn rule(&self) -> Option<&Rule> {
        match self {
            Self::Rule(rule) => Some(rule),
            Self::Unreadable(_) => None,
        }
    }

    /// The sets that the rule names.
    pub fn sets(&self) -> Vec<Name> {
        match self {
            Self::Rule(rule) => rule.sets.iter().map(|matched| Arc::clone(&matched.set)).collect(),
            Self::Unreadable(text) => after(text, &["--match-set", "--add-set", "--del-set"]),
        }
    }

    /// The chains that the rule hands packets to. Of a rule that we can't read it may be a target's name as well.
    pub fn callees(&self) -> Vec<Name> {
        match self {
            Self::Rule(rule) => rule.callee().map(Arc::clone).into_iter().collect(),
            Self::Unreadable(text) => after(text, &["-j", "-g"]),
        }
    }

    /// Whether the rule hands packets to a chain of ours.
    pub fn leads_to_us(&self) -> bool {
        self.callees().iter().any(|chain| layout::is_our_chain(chain))
    }
}

/// The words that follow one of these options, outside comments.
fn after(text: &str, options: &[&str]) -> Vec<Name> {
    // A line that cannot be split into words names nothing that we could act on.
    let words = text::words(text).unwrap_or_default();
    let mut found = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if options.contains(&word.as_str()) {
            found.extend(words.next().map(|name| Name::from(name.as_str())));
        } else if word == "--comment" {
            words.next();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_decides() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let set = Set {
            kind: SetKind::Net,
            members: [
                Member::Include(net("10.0.0.0/8")),
                Member::Except(net("10.1.0.0/16")),
                Member::Include(net("10.1.2.0/24")),
                Member::Except(net("10.1.2.3/32")),
                Member::Address("192.0.2.1".parse().unwrap()),
            ]
            .into_iter()
            .collect(),
        };
        for (address, expected) in [
            ("10.2.0.1", true),
            ("10.1.0.1", false),
            ("10.1.2.4", true),
            ("10.1.2.3", false),
            ("192.0.2.1", true),
            ("192.0.2.2", false),
            ("fd00::1", false),
        ] {
            assert_eq!(set.has_address(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn unreadable_rules_still_show_what_they_name() {
        let line = Line::Unreadable(
            "-m set --match-set azure-npm-1 src -m limit --limit 3/sec -j AZURE-NPM-X".into(),
        );
        assert_eq!(line.sets(), vec![Name::from("azure-npm-1")]);
        assert!(line.leads_to_us());
        for foreign in
            ["-m comment --comment AZURE-NPM -j KUBE-FORWARD", r#"-m comment --comment "-j AZURE-NPM" -j X"#]
        {
            assert!(!Line::Unreadable(foreign.into()).leads_to_us(), "{foreign}");
        }
    }
}
