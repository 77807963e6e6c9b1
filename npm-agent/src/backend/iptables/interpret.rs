//! What rules and sets do with a packet: iptables' own semantics, evaluated on a [`State`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use npm_policy::flow::{Decision, Flow, Transport};
use npm_policy::goal::{Family, Member};
use npm_policy::model::Protocol;

use super::layout;
use super::state::{CtState, Line, Mark, Name, Rule, Side, State, Target};
use super::text::{self, ICMPV6};

/// Deeper jumps than this the kernel refuses when rules are loaded.
const MAX_DEPTH: usize = 16;

/// The type of an ICMPv6 echo request.
const ECHO_REQUEST: u8 = 128;

/// A packet at the `FORWARD` hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The IANA protocol number.
    pub protocol: u8,
    /// The destination port, where the protocol has ports.
    pub port: Option<u16>,
    /// The ICMPv6 type.
    pub icmpv6_type: Option<u8>,
    /// The packet mark.
    pub mark: u32,
    /// The mark of its connection.
    pub connection_mark: u32,
    /// Conntrack's opinion.
    pub state: CtState,
    /// Whether a Service's address was translated to the destination.
    pub translation: Translation,
}

/// Whether conntrack has translated a packet's destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// It has not.
    None,
    /// It has (`--ctstate DNAT`).
    Destination,
}

impl Packet {
    /// A flow's first packet, without a mark; one of ICMPv6 is an echo request. It comes from a Service: that is the only
    /// way in which a pod's own packet to itself crosses `FORWARD`, and for others no rule of ours asks.
    pub fn opening(flow: &Flow) -> Self {
        let (protocol, port) = match flow.transport {
            Transport::Port(protocol, port) => (protocol.number(), Some(port)),
            Transport::Portless(number) => (number, None),
        };
        Self {
            source: flow.source,
            destination: flow.destination,
            protocol,
            port,
            icmpv6_type: (protocol == ICMPV6).then_some(ECHO_REQUEST),
            mark: 0,
            connection_mark: 0,
            state: CtState::New,
            translation: Translation::Destination,
        }
    }
}

impl Packet {
    /// The mark of the packet's connection, if it has one.
    fn connection(&self) -> Option<u32> {
        match self.state {
            CtState::Invalid | CtState::Untracked => None,
            CtState::New | CtState::Related | CtState::Established | CtState::Translated => {
                Some(self.connection_mark)
            }
        }
    }

    fn has_one_of(&self, states: &BTreeSet<CtState>) -> bool {
        let translated = match self.translation {
            Translation::None => false,
            Translation::Destination => states.contains(&CtState::Translated),
        };
        translated || states.contains(&self.state)
    }
}

/// The rules cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Uninterpretable {
    /// A rule of a chain of ours is of no form that we know.
    #[error("chain {chain}: cannot read rule {rule}")]
    Rule {
        /// The chain.
        chain: String,
        /// The rule.
        rule: String,
    },
    /// A rule leads to a chain that is not there (or is not ours).
    #[error("chain {chain} is not there")]
    Chain {
        /// The missing chain.
        chain: String,
    },
    /// A rule names a set that is not there or not of the kind that the rule needs.
    #[error("set {set} is not there as the rules need it")]
    Set {
        /// The set.
        set: String,
    },
    /// Chains call each other deeper than the kernel allows.
    #[error("chain {chain} is entered too deep")]
    Depth {
        /// The chain.
        chain: String,
    },
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Dropped.
    Dropped,
    /// Accepted: no other rule of the hook sees it.
    Accepted,
    /// It goes on behind our rules.
    GoesOn,
}

/// A rule that matched: chain, text, and the mark before it.
pub type Trace = Vec<String>;

/// What the states of the two families do with a new flow. Rules of others are not followed.
///
/// # Errors
/// Something of ours on the packet's way can't be interpreted.
pub fn decide(v4: &State, v6: &State, flow: &Flow) -> Result<Decision, Uninterpretable> {
    let state = match Family::of(flow.source) {
        Family::V4 => v4,
        Family::V6 => v6,
    };
    match follow(state, &mut Packet::opening(flow), &mut None)? {
        End::Dropped => Ok(Decision::Deny),
        End::Accepted | End::GoesOn => Ok(Decision::Allow),
    }
}

/// As [`decide`], with the rules that matched, for people.
///
/// # Errors
/// As [`decide`].
pub fn explain(state: &State, flow: &Flow) -> Result<(Decision, Trace), Uninterpretable> {
    let mut trace = Some(Trace::new());
    let decision = match follow(state, &mut Packet::opening(flow), &mut trace)? {
        End::Dropped => Decision::Deny,
        End::Accepted | End::GoesOn => Decision::Allow,
    };
    Ok((decision, trace.unwrap_or_default()))
}

/// Takes a packet through the rules of `FORWARD` that lead to our chains. Its mark is changed as the rules say.
///
/// # Errors
/// Something of ours on the packet's way can't be interpreted.
pub fn follow(state: &State, packet: &mut Packet, trace: &mut Option<Trace>) -> Result<End, Uninterpretable> {
    let walk = Walk { state };
    for line in state.forward.iter().filter(|line| layout::is_our_jump(line)) {
        match walk.line(layout::FORWARD, line, packet, trace, 0)? {
            Step::Next => {}
            // A goto from the hook ends in the hook's policy, a RETURN as well.
            Step::Leave => return Ok(End::GoesOn),
            Step::End(end) => return Ok(end),
        }
    }
    Ok(End::GoesOn)
}

enum Step {
    /// The chain's next rule.
    Next,
    /// Back to where the chain was called.
    Leave,
    /// The packet's fate is settled.
    End(End),
}

struct Walk<'a> {
    state: &'a State,
}

impl Walk<'_> {
    fn chain(
        &self,
        name: &Name,
        packet: &mut Packet,
        trace: &mut Option<Trace>,
        depth: usize,
    ) -> Result<Step, Uninterpretable> {
        let missing = || Uninterpretable::Chain { chain: name.to_string() };
        let chain = self.state.chains.get(name).ok_or_else(missing)?;
        if depth > MAX_DEPTH {
            return Err(Uninterpretable::Depth { chain: name.to_string() });
        }
        for line in chain.iter() {
            match self.line(name, line, packet, trace, depth)? {
                Step::Next => {}
                Step::Leave => return Ok(Step::Next),
                Step::End(end) => return Ok(Step::End(end)),
            }
        }
        Ok(Step::Next)
    }

    fn line(
        &self,
        chain: &str,
        line: &Line,
        packet: &mut Packet,
        trace: &mut Option<Trace>,
        depth: usize,
    ) -> Result<Step, Uninterpretable> {
        let rule = match line {
            Line::Rule(rule) => rule,
            Line::Unreadable(text) => {
                return Err(Uninterpretable::Rule { chain: chain.to_owned(), rule: text.to_string() });
            }
        };
        if !self.matches(rule, packet)? {
            return Ok(Step::Next);
        }
        if let Some(trace) = trace {
            trace.push(format!("{chain}: {} (mark {:#x})", text::rule_text(rule), packet.mark));
        }
        match &rule.target {
            Target::Drop => Ok(Step::End(End::Dropped)),
            Target::Accept => Ok(Step::End(End::Accepted)),
            Target::Return => Ok(Step::Leave),
            Target::SetMark(Mark { value, mask }) => {
                packet.mark = (packet.mark & !mask) ^ value;
                Ok(Step::Next)
            }
            Target::SetConnmark(Mark { value, mask }) => {
                if let Some(mark) = packet.connection() {
                    packet.connection_mark = (mark & !mask) ^ value;
                }
                Ok(Step::Next)
            }
            Target::Jump(callee) => self.chain(callee, packet, trace, depth + 1),
            // The end of the chain gone to is the end of this one.
            Target::Goto(callee) => match self.chain(callee, packet, trace, depth + 1)? {
                Step::Next | Step::Leave => Ok(Step::Leave),
                Step::End(end) => Ok(Step::End(end)),
            },
        }
    }

    fn matches(&self, rule: &Rule, packet: &Packet) -> Result<bool, Uninterpretable> {
        let Rule {
            source,
            destination,
            protocol,
            ports,
            icmpv6_type,
            states,
            mark,
            connmark,
            sets,
            comment: _,
            target: _,
        } = rule;
        let plain = source.is_none_or(|net| net.contains(&packet.source))
            && destination.is_none_or(|net| net.contains(&packet.destination))
            && protocol.is_none_or(|number| number == packet.protocol)
            && ports
                .is_none_or(|(first, last)| packet.port.is_some_and(|port| (first..=last).contains(&port)))
            && icmpv6_type.is_none_or(|number| packet.icmpv6_type == Some(number))
            && states
                .as_ref()
                .is_none_or(|states| packet.has_one_of(&states.states) == states.sense.is_positive())
            && mark.is_none_or(|mark| packet.mark & mark.mask == mark.value)
            && connmark.is_none_or(|mark| packet.connection().is_some_and(|of| of & mark.mask == mark.value));
        if !plain {
            return Ok(false);
        }
        for matched in sets {
            let missing = || Uninterpretable::Set { set: matched.set.to_string() };
            let set = self.state.sets.get(&matched.set).ok_or_else(missing)?;
            let positive = match (matched.side, &set.kind) {
                (Side::Source, super::state::SetKind::Net) => set.has_address(packet.source),
                (Side::Destination, super::state::SetKind::Net) => set.has_address(packet.destination),
                (Side::DestinationPort, super::state::SetKind::IpPort) => {
                    match (protocol_of(packet.protocol), packet.port) {
                        (Some(protocol), Some(port)) => {
                            set.members.contains(&Member::Port(packet.destination, protocol, port))
                        }
                        _ => false,
                    }
                }
                (Side::Source | Side::Destination | Side::DestinationPort, _) => return Err(missing()),
            };
            if positive != matched.sense.is_positive() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn protocol_of(number: u8) -> Option<Protocol> {
    Protocol::ALL.into_iter().find(|protocol| protocol.number() == number)
}
