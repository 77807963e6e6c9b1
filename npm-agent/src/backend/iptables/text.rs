//! The texts of `iptables-save` and `ipset save`: written for what we program, read for what is there.
//!
//! One parser reads both what we write and what the kernel's tools print (the nft and the legacy variant print alike).
//! Of other people's objects it takes no notice; of ours, what it can't read is kept as such and never guessed at.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::str::SplitWhitespace;
use std::sync::Arc;

use imbl::OrdSet;
use ipnet::IpNet;
use npm_policy::goal::{Family, Member};
use npm_policy::model::Protocol;

use super::layout;
use super::state::{
    Chain, CtState, CtStates, Line, Mark, Name, Rule, Sense, Set, SetKind, SetMatch, Side, Target,
};

/// Every set may hold as many members as the type can (ipset's default of 65,536 is less than a large cluster's
/// pods). It is a limit, not a size: an empty set takes no more memory for it.
pub(super) const MAX_MEMBERS: u32 = u32::MAX;

/// A text that is not what the tool is known to print.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {text}")]
pub struct Unreadable {
    /// The line's number, from 1.
    pub line: usize,
    /// The line.
    pub text: String,
}

/// Our part of a filter table: our chains, and all rules of `FORWARD`.
#[derive(Debug, PartialEq, Eq)]
pub struct Filter {
    /// Our chains.
    pub chains: BTreeMap<Name, Chain>,
    /// Everything in `FORWARD`.
    pub forward: Vec<Line>,
    /// Our chains that other people's rules lead to.
    pub claimed: BTreeSet<Name>,
    /// How many rules of whatever kind the table has.
    pub rules: usize,
    /// How many packets each rule of our chains has met, in the order of the rules; empty where the text does not say.
    pub packets: BTreeMap<Name, Vec<u64>>,
}

/// Reads what `iptables-save -t filter` or `ip6tables-save -t filter` prints, with `-c` or without.
///
/// # Errors
/// A line is of no known form.
pub fn parse_filter(family: Family, text: &str) -> Result<Filter, Unreadable> {
    let mut chains: BTreeMap<Name, Vec<Line>> = BTreeMap::new();
    let mut forward = Vec::new();
    let mut claimed = BTreeSet::new();
    let mut rules = 0;
    let mut packets: BTreeMap<Name, Vec<u64>> = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let unreadable = || Unreadable { line: index + 1, text: line.to_owned() };
        if line.is_empty() || line.starts_with(['#', '*']) || line == "COMMIT" {
            continue;
        }
        if let Some(declaration) = line.strip_prefix(':') {
            let name = declaration.split_whitespace().next().ok_or_else(unreadable)?;
            if layout::is_our_chain(name) {
                chains.entry(name.into()).or_default();
            }
            continue;
        }
        let (met, line) = match line.strip_prefix('[') {
            Some(rest) => rest.split_once("] ").ok_or_else(unreadable)?,
            None => ("", line),
        };
        let (chain, rule) = line
            .strip_prefix("-A ")
            .map(|rest| rest.split_once(' ').unwrap_or((rest, "")))
            .ok_or_else(unreadable)?;
        rules += 1;
        let rule = parse_line(family, rule);
        if layout::is_our_chain(chain) {
            chains.entry(chain.into()).or_default().push(rule);
            // "[packets:bytes]".
            let met: Option<u64> = met.split(':').next().and_then(|packets| packets.parse().ok());
            packets.entry(chain.into()).or_default().extend(met);
            continue;
        }
        if chain != layout::FORWARD || !layout::is_our_jump(&rule) {
            claimed.extend(rule.callees().into_iter().filter(|callee| layout::is_our_chain(callee)));
        }
        if chain == layout::FORWARD {
            forward.push(rule);
        }
    }
    let chains = chains.into_iter().map(|(name, lines)| (name, Arc::new(lines))).collect();
    Ok(Filter { chains, forward, claimed, rules, packets })
}

/// Reads one rule, without its `-A CHAIN`.
pub fn parse_line(family: Family, text: &str) -> Line {
    match words(text).and_then(|words| parse_rule(family, &words)) {
        Some(rule) => Line::Rule(rule),
        None => Line::Unreadable(text.into()),
    }
}

/// Splits a rule into words as `iptables-restore` does: double quotes hold a word together, a backslash keeps the
/// next character as it is.
pub fn words(text: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        match char {
            '\\' => word.get_or_insert_default().push(chars.next()?),
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' | '\t' if !quoted => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    (!quoted).then_some(words)
}

fn parse_rule(family: Family, words: &[String]) -> Option<Rule> {
    let mut rule = Rule::new(Target::Return);
    let mut target = None;
    let mut sense = Sense::Is;
    let mut module = "";
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let negated = std::mem::replace(&mut sense, Sense::Is);
        match (word, negated) {
            ("!", Sense::Is) => sense = Sense::IsNot,
            ("-s", Sense::Is) => rule.source = Some(parse_net(family, words.next()?)?),
            ("-d", Sense::Is) => rule.destination = Some(parse_net(family, words.next()?)?),
            ("-p", Sense::Is) => rule.protocol = Some(parse_protocol(words.next()?)?),
            // Which module a match is of goes without saying, but for `--mark`.
            ("-m", Sense::Is) => match words.next()? {
                known @ ("tcp" | "udp" | "sctp" | "icmp6" | "conntrack" | "mark" | "connmark" | "set"
                | "comment") => {
                    module = known;
                }
                _ => return None,
            },
            ("--dport", Sense::Is) => rule.ports = Some(parse_ports(words.next()?)?),
            ("--icmpv6-type", Sense::Is) => rule.icmpv6_type = Some(words.next()?.parse().ok()?),
            ("--ctstate", sense) => rule.states = Some(parse_states(sense, words.next()?)?),
            ("--mark", Sense::Is) if module == "connmark" => rule.connmark = Some(parse_mark(words.next()?)?),
            ("--mark", Sense::Is) => rule.mark = Some(parse_mark(words.next()?)?),
            ("--match-set", sense) => {
                let set = words.next()?.into();
                let side = match words.next()? {
                    "src" => Side::Source,
                    "dst" => Side::Destination,
                    "dst,dst" => Side::DestinationPort,
                    _ => return None,
                };
                rule.sets.push(SetMatch { set, sense, side });
            }
            ("--comment", Sense::Is) => rule.comment = Some(words.next()?.into()),
            ("-j", Sense::Is) => {
                target = Some(match words.next()? {
                    "DROP" => Target::Drop,
                    "ACCEPT" => Target::Accept,
                    "RETURN" => Target::Return,
                    "MARK" => match words.next()? {
                        "--set-xmark" => Target::SetMark(parse_mark(words.next()?)?),
                        _ => return None,
                    },
                    "CONNMARK" => match words.next()? {
                        "--set-xmark" => Target::SetConnmark(parse_mark(words.next()?)?),
                        _ => return None,
                    },
                    // Targets of extensions are in capitals as well, but have options that end in None here.
                    chain => Target::Jump(chain.into()),
                });
            }
            ("-g", Sense::Is) => target = Some(Target::Goto(words.next()?.into())),
            _ => return None,
        }
    }
    rule.target = target?;
    Some(rule)
}

fn parse_net(family: Family, text: &str) -> Option<IpNet> {
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => text.parse::<IpAddr>().ok()?.into(),
    };
    (Family::of(net.addr()) == family).then_some(net)
}

fn parse_protocol(text: &str) -> Option<u8> {
    match text {
        "icmp" => Some(1),
        "tcp" => Some(6),
        "udp" => Some(17),
        "ipv6-icmp" => Some(ICMPV6),
        "sctp" => Some(132),
        number => number.parse().ok(),
    }
}

/// ICMPv6's protocol number.
pub const ICMPV6: u8 = 58;

fn protocol_name(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        ICMPV6 => "ipv6-icmp".to_owned(),
        132 => "sctp".to_owned(),
        other => other.to_string(),
    }
}

fn parse_ports(text: &str) -> Option<(u16, u16)> {
    match text.split_once(':') {
        None => text.parse().ok().map(|port| (port, port)),
        Some((first, last)) => Some((first.parse().ok()?, last.parse().ok()?)),
    }
}

fn parse_states(sense: Sense, text: &str) -> Option<CtStates> {
    let state = |word: &str| CtState::ALL.iter().find(|(_, name)| *name == word).map(|(state, _)| *state);
    Some(CtStates { sense, states: text.split(',').map(state).collect::<Option<_>>()? })
}

fn parse_mark(text: &str) -> Option<Mark> {
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    match text.split_once('/') {
        None => Some(Mark { value: number(text)?, mask: u32::MAX }),
        Some((value, mask)) => Some(Mark { value: number(value)?, mask: number(mask)? }),
    }
}

/// The text of a rule after `-A CHAIN `, in the order in which `iptables-save` prints it.
pub fn rule_text(rule: &Rule) -> String {
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
        comment,
        target,
    } = rule;
    let mut words = Vec::new();
    words.extend(source.map(|net| format!("-s {net}")));
    words.extend(destination.map(|net| format!("-d {net}")));
    if let Some(protocol) = protocol {
        let protocol = protocol_name(*protocol);
        words.push(format!("-p {protocol}"));
        words.extend(ports.map(|(first, last)| {
            if first == last {
                format!("-m {protocol} --dport {first}")
            } else {
                format!("-m {protocol} --dport {first}:{last}")
            }
        }));
    }
    words.extend(icmpv6_type.map(|number| format!("-m icmp6 --icmpv6-type {number}")));
    words.extend(states.as_ref().map(|states| {
        let named = CtState::ALL.iter().filter(|(state, _)| states.states.contains(state));
        // `iptables-save` prints RELATED before ESTABLISHED; the set's own order is the same.
        let names: Vec<&str> = named.map(|(_, name)| *name).collect();
        format!("-m conntrack {}--ctstate {}", sense_text(states.sense), names.join(","))
    }));
    words.extend(mark.map(|mark| format!("-m mark --mark {}", mark_text(mark))));
    words.extend(connmark.map(|mark| format!("-m connmark --mark {}", mark_text(mark))));
    words.extend(sets.iter().map(|matched| {
        let side = match matched.side {
            Side::Source => "src",
            Side::Destination => "dst",
            Side::DestinationPort => "dst,dst",
        };
        format!("-m set {}--match-set {} {side}", sense_text(matched.sense), matched.set)
    }));
    words.extend(comment.as_ref().map(|comment| format!("-m comment --comment \"{}\"", escape(comment))));
    words.push(match target {
        Target::Drop => "-j DROP".to_owned(),
        Target::Accept => "-j ACCEPT".to_owned(),
        Target::Return => "-j RETURN".to_owned(),
        Target::SetMark(mark) => format!("-j MARK --set-xmark {}", mark_text(*mark)),
        Target::SetConnmark(mark) => format!("-j CONNMARK --set-xmark {}", mark_text(*mark)),
        Target::Jump(chain) => format!("-j {chain}"),
        Target::Goto(chain) => format!("-g {chain}"),
    });
    words.join(" ")
}

/// The text of a rule as it was found, or as we write it.
pub fn line_text(line: &Line) -> String {
    match line {
        Line::Rule(rule) => rule_text(rule),
        Line::Unreadable(text) => text.to_string(),
    }
}

fn sense_text(sense: Sense) -> &'static str {
    match sense {
        Sense::Is => "",
        Sense::IsNot => "! ",
    }
}

fn mark_text(mark: Mark) -> String {
    format!("{:#x}/{:#x}", mark.value, mark.mask)
}

fn escape(text: &str) -> String {
    text.chars()
        .flat_map(|char| matches!(char, '"' | '\\' | '\'').then_some('\\').into_iter().chain([char]))
        .collect()
}

/// Reads what `ipset save` prints: our sets of each family. Sets without a family count as IPv4's.
///
/// # Errors
/// A line is of no known form.
pub fn parse_sets(text: &str) -> Result<BTreeMap<Family, BTreeMap<Name, Set>>, Unreadable> {
    let mut found: BTreeMap<Name, (Family, SetKind, Vec<Member>)> = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let unreadable = || Unreadable { line: index + 1, text: line.to_owned() };
        let mut words = line.split_whitespace();
        let Some(command) = words.next() else { continue };
        let name = words.next().ok_or_else(unreadable)?;
        if !layout::is_our_set(name) {
            continue;
        }
        match command {
            "create" => {
                let (family, kind) = parse_kind(words);
                found.insert(name.into(), (family, kind, Vec::new()));
            }
            "add" => {
                let (family, kind, members) = found.get_mut(name).ok_or_else(unreadable)?;
                match parse_member(*family, kind, words) {
                    Some(member) => members.push(member),
                    None if matches!(kind, SetKind::Other(_)) => {}
                    None => *kind = SetKind::Other(format!("with the member: {line}").into()),
                }
            }
            _ => return Err(unreadable()),
        }
    }
    let mut sets: BTreeMap<Family, BTreeMap<Name, Set>> =
        Family::BOTH.into_iter().map(|family| (family, BTreeMap::new())).collect();
    for (name, (family, kind, members)) in found {
        let members = match kind {
            SetKind::Net | SetKind::IpPort => members.into_iter().collect(),
            SetKind::Other(_) => OrdSet::new(),
        };
        sets.entry(family).or_default().insert(name, Set { kind, members });
    }
    Ok(sets)
}

fn parse_kind(words: SplitWhitespace<'_>) -> (Family, SetKind) {
    let words: Vec<&str> = words.collect();
    let option = |name: &str| words.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
    let family = if option("family") == Some("inet6") { Family::V6 } else { Family::V4 };
    let known = |pair: &[&str]| match pair {
        ["family" | "hashsize" | "bucketsize" | "initval", _] => true,
        ["maxelem", limit] => *limit == MAX_MEMBERS.to_string(),
        _ => false,
    };
    let ours = !words.is_empty() && words[1..].chunks(2).all(known) && option("maxelem").is_some();
    let kind = match words.first() {
        Some(&"hash:net") if ours => SetKind::Net,
        Some(&"hash:ip,port") if ours => SetKind::IpPort,
        Some(_) | None => SetKind::Other(words.join(" ").into()),
    };
    (family, kind)
}

fn parse_member(family: Family, kind: &SetKind, mut words: SplitWhitespace<'_>) -> Option<Member> {
    let element = words.next()?;
    let flag = words.next();
    if words.next().is_some() {
        return None;
    }
    match (kind, flag) {
        (SetKind::Net, None) => match element.parse::<IpAddr>() {
            Ok(address) => (Family::of(address) == family).then_some(Member::Address(address)),
            Err(_) => parse_net(family, element).map(include),
        },
        (SetKind::Net, Some("nomatch")) => parse_net(family, element).map(Member::Except),
        (SetKind::IpPort, None) => {
            let (address, port) = element.split_once(',')?;
            let (protocol, port) = port.split_once(':')?;
            let number = parse_protocol(protocol)?;
            let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == number)?;
            let address: IpAddr = address.parse().ok()?;
            (Family::of(address) == family).then_some(Member::Port(address, protocol, port.parse().ok()?))
        }
        (SetKind::Net | SetKind::IpPort, Some(_)) | (SetKind::Other(_), _) => None,
    }
}

/// A block as a set's member: one address is [`Member::Address`], as `ipset save` prints it.
pub fn include(net: IpNet) -> Member {
    if net.prefix_len() == net.max_prefix_len() { Member::Address(net.addr()) } else { Member::Include(net) }
}

/// A member as `ipset` writes it.
pub fn member_text(member: &Member) -> String {
    match member {
        Member::Address(address) => address.to_string(),
        Member::Include(net) => net.to_string(),
        Member::Except(net) => format!("{net} nomatch"),
        Member::Port(address, protocol, port) => {
            format!("{address},{}:{port}", protocol_name(protocol.number()))
        }
    }
}

/// What names a member when it is deleted: `nomatch` is no part of it.
pub fn element_text(member: &Member) -> String {
    match member {
        Member::Except(net) => net.to_string(),
        Member::Address(_) | Member::Include(_) | Member::Port(..) => member_text(member),
    }
}

/// What follows the name in the line that creates a set.
pub fn kind_text(family: Family, kind: &SetKind) -> String {
    let family = match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    };
    match kind {
        SetKind::Net => format!("hash:net family {family} maxelem {MAX_MEMBERS}"),
        SetKind::IpPort => format!("hash:ip,port family {family} maxelem {MAX_MEMBERS}"),
        SetKind::Other(text) => text.to_string(),
    }
}

/// Sets as an `ipset restore` file that makes them, which is also what `ipset save` prints of them.
pub fn sets_text(family: Family, sets: &BTreeMap<Name, Set>) -> String {
    let mut text = String::new();
    for (name, set) in sets {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "create {name} {}", kind_text(family, &set.kind));
        for member in &set.members {
            let _ = writeln!(text, "add {name} {}", member_text(member));
        }
    }
    text
}

/// Chains, and what is appended to `FORWARD`, as an `iptables-restore` file.
pub fn filter_text(chains: &BTreeMap<Name, Chain>, forward: &[Line]) -> String {
    let mut text = String::from("*filter\n");
    for name in chains.keys() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, ":{name} - [0:0]");
    }
    for line in forward {
        let _ = writeln!(text, "-A {} {}", layout::FORWARD, line_text(line));
    }
    for (name, lines) in chains {
        for line in lines.iter() {
            let _ = writeln!(text, "-A {name} {}", line_text(line));
        }
    }
    text.push_str("COMMIT\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as iptables 1.8.9 printed them, nft and legacy alike.
    #[test]
    fn rules_as_printed_are_read_and_written_alike() {
        for (family, text) in [
            (Family::V4, "-m conntrack ! --ctstate RELATED,ESTABLISHED -j AZURE-NPM"),
            (Family::V4, "-j MARK --set-xmark 0x0/0xe00"),
            (Family::V4, "-j CONNMARK --set-xmark 0x1000000/0x1000000"),
            (Family::V6, "-j CONNMARK --set-xmark 0x0/0x1000000"),
            (Family::V4, "-m connmark --mark 0x2000000/0x2000000 -j DROP"),
            (Family::V4, "-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN"),
            (Family::V4, "-m mark --mark 0x400/0x600 -j AZURE-NPM-DENIED"),
            (Family::V4, "-s 10.0.0.1/32 -d 10.0.0.2/32 -j RETURN"),
            (Family::V4, "-p tcp -m tcp --dport 80 -g Y"),
            (Family::V4, "-p udp -m udp --dport 0:90 -g Y"),
            (Family::V4, "-p sctp -g Y"),
            (Family::V4, "-p tcp -m set --match-set p4 dst,dst -m set --match-set s4 src -g Y"),
            (Family::V4, r#"-m set ! --match-set s4 dst -m comment --comment "a b" -j X"#),
            (Family::V6, "-p ipv6-icmp -m icmp6 --icmpv6-type 135 -j RETURN"),
            (Family::V6, "-s fd00::1/128 -d fd00::2/128 -j RETURN"),
            (Family::V4, "-j ACCEPT"),
        ] {
            match parse_line(family, text) {
                Line::Rule(rule) => assert_eq!(rule_text(&rule), text),
                Line::Unreadable(text) => panic!("not read: {text}"),
            }
        }
    }

    #[test]
    fn what_is_not_known_is_kept_and_not_guessed() {
        for text in [
            "-m limit --limit 3/sec -j AZURE-NPM",
            "! -s 10.0.0.0/8 -j DROP",
            "-i eth0 -j DROP",
            "-j REJECT --reject-with icmp-port-unreachable",
            "-j MARK --or-mark 0x1",
            "-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
            "-m set --match-set a src,src -j DROP",
            "-m set --match-set a src",
            r#"-m comment --comment "open -j DROP"#,
            "-s fd00::1/128 -j DROP",
        ] {
            assert_eq!(parse_line(Family::V4, text), Line::Unreadable(text.into()));
        }
    }

    #[test]
    fn words_are_split_as_the_tools_do() {
        assert_eq!(words(r#"-m comment --comment "a \"b\" c" -j X"#).unwrap()[3], r#"a "b" c"#);
        assert_eq!(words(r#"a "" b"#).unwrap(), ["a", "", "b"]);
        assert_eq!(words(r#"a "b"#), None);
        let rule = Rule { comment: Some(r#"it's "x" \"#.into()), ..Rule::new(Target::Drop) };
        assert_eq!(parse_line(Family::V4, &rule_text(&rule)), Line::Rule(rule));
    }

    #[test]
    fn sets_as_saved() {
        let text = "create azure-npm-a hash:net family inet hashsize 1024 maxelem 4294967295 bucketsize 12 initval 0x1\n\
                    add azure-npm-a 0.0.0.0/1\nadd azure-npm-a 10.0.0.1\nadd azure-npm-a 10.0.0.0/8 nomatch\n\
                    create azure-npm-b6 hash:ip,port family inet6 hashsize 1024 maxelem 4294967295\n\
                    add azure-npm-b6 fd00::1,udp:53\n\
                    create foreign bitmap:port range 0-1\nadd foreign 1\n\
                    create azure-npm-c hash:net family inet hashsize 1024 maxelem 65536\nadd azure-npm-c 10.0.0.1\n\
                    create azure-npm-d list:set size 8\nadd azure-npm-d azure-npm-c\n\
                    create azure-npm-e hash:ip,port family inet maxelem 4294967295\nadd azure-npm-e 10.0.0.1,icmp:8/0\n";
        let sets = parse_sets(text).unwrap();
        let v4 = &sets[&Family::V4];
        assert_eq!(
            v4.keys().map(|name| &**name).collect::<Vec<_>>(),
            ["azure-npm-a", "azure-npm-c", "azure-npm-d", "azure-npm-e"]
        );
        let members = [
            Member::Address("10.0.0.1".parse().unwrap()),
            Member::Include("0.0.0.0/1".parse().unwrap()),
            Member::Except("10.0.0.0/8".parse().unwrap()),
        ];
        assert_eq!(v4["azure-npm-a"], Set { kind: SetKind::Net, members: members.into_iter().collect() });
        for other in ["azure-npm-c", "azure-npm-d", "azure-npm-e"] {
            assert!(matches!(v4[other].kind, SetKind::Other(_)), "{other}");
        }
        assert!(v4["azure-npm-d"].kind.is_list());
        let members = [Member::Port("fd00::1".parse().unwrap(), Protocol::Udp, 53)].into_iter().collect();
        assert_eq!(sets[&Family::V6]["azure-npm-b6"], Set { kind: SetKind::IpPort, members });
        assert_eq!(parse_sets("add azure-npm-x 1.2.3.4").unwrap_err().line, 1);
    }
}
