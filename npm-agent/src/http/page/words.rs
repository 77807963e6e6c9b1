//! How things are put into words: numbers, times, selectors, rules.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use npm_policy::model::{
    Block, NamespaceScope, Operator, Peer, Peers, Port, Ports, Requirement, Rule, Selector,
};

/// How many bytes of a text from the cluster a page shows.
const SHORT_BYTES: usize = 300;

/// How many values, peers or ports are named one by one.
const MOST_NAMED: usize = 12;

/// The beginning of a text, of at most so many bytes.
pub(super) fn cut(text: &str, most_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(most_bytes)]
}

/// A text as long as a page shows it.
pub(super) fn short(text: &str) -> String {
    match cut(text, SHORT_BYTES) {
        whole if whole.len() == text.len() => text.to_owned(),
        beginning => format!("{beginning}…"),
    }
}

/// A number with its thousands apart.
pub(super) fn count(value: impl TryInto<u64>) -> String {
    let digits = value.try_into().unwrap_or(u64::MAX).to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// How long ago something was.
pub(super) fn ago(at: SystemTime, now: SystemTime) -> String {
    // A clock that was set back meanwhile.
    let since = now.duration_since(at).unwrap_or_default();
    format!("{} ago", span(since))
}

/// A length of time, in its largest unit.
pub(super) fn span(of: Duration) -> String {
    match of.as_secs() {
        0 => "less than a second".to_owned(),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// Texts with commas between them, the first few.
pub(super) fn listed<T: AsRef<str>>(items: impl IntoIterator<Item = T>) -> String {
    let mut text = String::new();
    let mut left = 0;
    for (place, item) in items.into_iter().enumerate() {
        if place >= MOST_NAMED {
            left += 1;
            continue;
        }
        if place > 0 {
            text.push_str(", ");
        }
        text.push_str(item.as_ref());
    }
    if left > 0 {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {} more", count(left));
    }
    text
}

/// A selector as `kubectl -l` takes it; empty: everything.
pub(super) fn selector(selector: &Selector) -> String {
    listed(selector.requirements().map(requirement))
}

fn requirement(Requirement { key, operator }: &Requirement) -> String {
    let among = |values: &BTreeSet<Arc<str>>| listed(values.iter());
    match operator {
        Operator::In(values) if values.len() == 1 => format!("{key}={}", among(values)),
        Operator::In(values) => format!("{key} in ({})", among(values)),
        Operator::NotIn(values) if values.len() == 1 => format!("{key}!={}", among(values)),
        Operator::NotIn(values) => format!("{key} notin ({})", among(values)),
        Operator::Exists => key.to_string(),
        Operator::DoesNotExist => format!("!{key}"),
    }
}

/// The pods that a selector means: `pods app=web`.
pub(super) fn pods(pods: &Selector) -> String {
    match selector(pods) {
        all if all.is_empty() => "all pods".to_owned(),
        some => format!("pods {some}"),
    }
}

/// Who and to which ports: `pods app=web of namespace x, TCP/80`.
pub(super) fn rule(Rule { peers, ports }: &Rule) -> (String, String) {
    let peers = match peers {
        Peers::Any => "anybody".to_owned(),
        Peers::Only(list) if list.is_empty() => "nobody".to_owned(),
        Peers::Only(list) => listed(list.iter().map(peer)),
    };
    let ports = match ports {
        Ports::Any => "every port and protocol".to_owned(),
        Ports::Only(list) if list.is_empty() => "no port".to_owned(),
        Ports::Only(list) => listed(list.iter().map(port)),
    };
    (peers, ports)
}

fn peer(peer: &Peer) -> String {
    match peer {
        Peer::Pods { namespaces: NamespaceScope::Named(name), pods: of } => {
            format!("{} of namespace {name}", pods(of))
        }
        Peer::Pods { namespaces: NamespaceScope::Matching(namespaces), pods: of } => {
            match selector(namespaces) {
                all if all.is_empty() => format!("{} of all namespaces", pods(of)),
                some => format!("{} of namespaces {some}", pods(of)),
            }
        }
        Peer::Block(Block { cidr, except }) if except.is_empty() => cidr.to_string(),
        Peer::Block(Block { cidr, except }) => {
            format!("{cidr} without {}", listed(except.iter().map(ToString::to_string)))
        }
    }
}

fn port(port: &Port) -> String {
    match port {
        Port::Range { protocol, first: 0, last: u16::MAX } => format!("every {protocol} port"),
        Port::Range { protocol, first, last } if first == last => format!("{protocol}/{first}"),
        Port::Range { protocol, first, last } => format!("{protocol}/{first}-{last}"),
        Port::Named { protocol, name } => format!("{protocol}/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times_are_readable() {
        for (value, text) in [(0_u64, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(count(value), text);
        }
        for (seconds, text) in
            [(0, "less than a second"), (119, "119 s"), (120, "2 min"), (7_200, "2 h"), (200_000, "2 days")]
        {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
        let now = SystemTime::now();
        assert_eq!(ago(now + Duration::from_secs(9), now), "less than a second ago");
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(short("short"), "short");
        let long = short(&"é".repeat(5000));
        assert!(long.ends_with("é…") && long.len() <= SHORT_BYTES + '…'.len_utf8(), "{long}");
        assert_eq!(listed((0..15).map(|n| n.to_string())), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 3 more");
    }

    #[test]
    fn selectors_and_rules_are_said_as_kubectl_says_them() {
        let set = |values: &[&str]| values.iter().map(|value| Arc::from(*value)).collect();
        let all = Selector::new([
            Requirement { key: "a".into(), operator: Operator::In(set(&["1"])) },
            Requirement { key: "b".into(), operator: Operator::NotIn(set(&["1", "2"])) },
            Requirement { key: "c".into(), operator: Operator::Exists },
            Requirement { key: "d".into(), operator: Operator::DoesNotExist },
        ]);
        assert_eq!(selector(&all), "a=1, b notin (1, 2), c, !d");
        assert_eq!(pods(&Selector::everything()), "all pods");
        let web = Rule {
            peers: Peers::Only(vec![
                Peer::Pods { namespaces: NamespaceScope::Named("x".into()), pods: Selector::everything() },
                Peer::Block(Block {
                    cidr: "10.0.0.0/8".parse().unwrap(),
                    except: ["10.1.0.0/16".parse().unwrap()].into(),
                }),
            ]),
            ports: Ports::Only(vec![
                Port::Range { protocol: npm_policy::model::Protocol::Tcp, first: 80, last: 80 },
                Port::Range { protocol: npm_policy::model::Protocol::Udp, first: 0, last: u16::MAX },
            ]),
        };
        let said = (
            "all pods of namespace x, 10.0.0.0/8 without 10.1.0.0/16".to_owned(),
            "TCP/80, every UDP port".to_owned(),
        );
        assert_eq!(rule(&web), said);
        let nothing = Rule { peers: Peers::Only(vec![]), ports: Ports::Any };
        assert_eq!(rule(&nothing).0, "nobody", "not anybody");
    }
}
