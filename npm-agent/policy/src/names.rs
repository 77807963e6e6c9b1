//! Names of sets and chains: Azure NPM's vocabulary, for people, and the hashed names that the kernel knows them by.
//!
//! A set's name says what it means: one term has exactly Azure NPM's name (`ns-<ns>`, `nslabel-<k>[:<v>]`,
//! `podlabel-<k>[:<v>]`, `namedport:<name>`), several are joined by `-AND-`, excluded ones begin with `!`. Two
//! different keys never have one name: what is outside `[A-Za-z0-9._/-]` in a key or value is written `=XX` (its
//! UTF-8 bytes in hexadecimal), and so is the `A` of an `-AND` that a term itself contains.
//!
//! Hashes are Azure NPM's (`npm/util/util.go` at commit cbd7560cf: `GetHashedName`, `GetHashedChainName`): base 36
//! digits of SHA-256.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::goal::{Expression, Family, Holders, SetKey};
use crate::model::{Block, NamespaceScope, Operator, PolicyKey, Requirement, Selector};

/// How every kernel set of ours (and of Azure NPM) begins.
pub const SET_PREFIX: &str = "azure-npm-";

/// Azure NPM's name for "all namespaces": what `namespaceSelector: {}` matches.
const ALL_NAMESPACES: &str = "nslabel-all-namespaces";

/// Base 36 digits of a kernel set name after the prefix.
const SET_DIGITS: usize = 20;

/// Base 36 digits of a chain suffix.
const CHAIN_DIGITS: usize = 10;

/// Base 36 digits of the greatest 256-bit number.
const ALL_DIGITS: usize = 50;

/// The name of a set, for people: the same for both families, different for different keys.
pub fn set_name(key: &SetKey) -> String {
    match key {
        SetKey::Pods(expression) => expression_name(expression),
        SetKey::Local(expression) => local_name(expression),
        SetKey::Ports { name, of } => {
            let port = term("namedport:", name);
            match of {
                Holders::Pods(expression) if is_every_pod(expression) => port,
                Holders::Pods(expression) => format!("{port}-AND-{}", expression_name(expression)),
                Holders::Local(expression) => format!("{port}-AND-{}", local_name(expression)),
                Holders::Block(block) => format!("{port}-AND-{}", block_name(block)),
            }
        }
        SetKey::Block(block) => block_name(block),
    }
}

/// The kernel's name of the set with this name: at most 31 characters, ipset's limit. The IPv6 twin ends in `6`.
pub fn kernel_set_name(name: &str, family: Family) -> String {
    let digits = base36(&sha256(name));
    let significant = digits.trim_start_matches('0');
    let twin = match family {
        Family::V4 => "",
        Family::V6 => "6",
    };
    format!("{SET_PREFIX}{}{twin}", &significant[..significant.len().min(SET_DIGITS)])
}

/// The ten characters that end the names of chains made for `text` (a policy's `namespace/name`).
pub fn chain_suffix(text: &str) -> String {
    // The last ten digits of the number are the number modulo 36^10.
    base36(&sha256(text)).split_off(ALL_DIGITS - CHAIN_DIGITS)
}

/// A set's two names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetNames {
    /// For people: [`set_name`].
    pub name: Arc<str>,
    /// For the IPv4 kernel set.
    pub v4: Arc<str>,
    /// For the IPv6 kernel set.
    pub v6: Arc<str>,
}

impl SetNames {
    /// The kernel name of one family.
    pub fn kernel(&self, family: Family) -> &Arc<str> {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

/// Names sets, no two alike: should two hashes meet, the later key (in the keys' order) is hashed again with a
/// counter. The result depends on the keys only.
pub fn name_sets<'a>(keys: impl IntoIterator<Item = &'a SetKey>) -> BTreeMap<SetKey, SetNames> {
    let sorted: BTreeSet<&SetKey> = keys.into_iter().collect();
    let named = sorted.into_iter().map(|key| (key, set_name(key)));
    let assigned = assign(named, |text| kernel_set_name(text, Family::V4));
    let names = assigned.into_iter().map(|(key, (name, v4))| {
        let v6 = format!("{v4}6").into();
        (key.clone(), SetNames { name: name.into(), v4: v4.into(), v6 })
    });
    names.collect()
}

/// Gives each policy its chain suffix, no two alike. 52 bits can be made to collide on purpose, so the later of two
/// policies (in the keys' order) is hashed again with a counter. The result depends on the keys only.
pub fn name_chains<'a>(policies: impl IntoIterator<Item = &'a PolicyKey>) -> BTreeMap<PolicyKey, String> {
    let sorted: BTreeSet<&PolicyKey> = policies.into_iter().collect();
    let named = sorted.into_iter().map(|key| (key, key.to_string()));
    assign(named, chain_suffix).into_iter().map(|(key, (_, suffix))| (key.clone(), suffix)).collect()
}

/// The chain suffixes of texts, no two alike, as [`name_chains`].
pub fn chain_suffixes(texts: BTreeSet<String>) -> BTreeMap<String, String> {
    let named = texts.into_iter().map(|text| ((), text));
    assign(named, chain_suffix).into_iter().map(|((), named)| named).collect()
}

/// Hashes each text, again with a counter while the hash is another's already.
fn assign<K>(
    texts: impl Iterator<Item = (K, String)>,
    hash: impl Fn(&str) -> String,
) -> Vec<(K, (String, String))> {
    let mut taken = BTreeSet::new();
    let mut assigned = Vec::new();
    for (key, text) in texts {
        let mut hashed = hash(&text);
        let mut attempt = 0_u32;
        while !taken.insert(hashed.clone()) {
            attempt += 1;
            // No name contains a control character, so a rehash is no other name's hash on purpose.
            hashed = hash(&format!("{text}\0{attempt}"));
        }
        assigned.push((key, (text, hashed)));
    }
    assigned
}

fn local_name(expression: &Expression) -> String {
    format!("local-{}", expression_name(expression))
}

fn is_every_pod(expression: &Expression) -> bool {
    expression.pods == Selector::everything() && is_everywhere(&expression.namespaces)
}

fn is_everywhere(namespaces: &NamespaceScope) -> bool {
    match namespaces {
        NamespaceScope::Named(_) => false,
        NamespaceScope::Matching(selector) => *selector == Selector::everything(),
    }
}

fn expression_name(expression: &Expression) -> String {
    let Expression { namespaces, pods } = expression;
    let mut terms = Vec::new();
    match namespaces {
        NamespaceScope::Named(name) => terms.push(term("ns-", name)),
        NamespaceScope::Matching(selector) => {
            terms
                .extend(selector.requirements().map(|requirement| requirement_term("nslabel-", requirement)));
        }
    }
    let pod_terms = pods.requirements().map(|requirement| requirement_term("podlabel-", requirement));
    // Azure NPM's podlabel sets hold the pods of all namespaces: one of them alone needs no other term.
    let is_one_set = pods.requirements().len() == 1
        && pods.requirements().all(|requirement| match requirement.operator {
            Operator::In(_) | Operator::Exists => true,
            Operator::NotIn(_) | Operator::DoesNotExist => false,
        });
    if is_everywhere(namespaces) && !is_one_set {
        terms.push(ALL_NAMESPACES.to_owned());
    }
    terms.extend(pod_terms);
    terms.join("-AND-")
}

fn requirement_term(prefix: &str, requirement: &Requirement) -> String {
    let mut text = String::new();
    // A label key of this very name must not be taken for "all namespaces".
    if format!("{prefix}{}", requirement.key) == ALL_NAMESPACES {
        text.push('=');
    }
    escape(&mut text, &requirement.key);
    let sign = match &requirement.operator {
        Operator::Exists | Operator::In(_) => "",
        Operator::DoesNotExist | Operator::NotIn(_) => "!",
    };
    match &requirement.operator {
        Operator::Exists | Operator::DoesNotExist => {}
        Operator::In(values) | Operator::NotIn(values) => {
            for value in values {
                text.push(':');
                escape(&mut text, value);
            }
            if values.is_empty() {
                // Apart from the one value "", and no escape of any byte.
                text.push_str(":=none");
            }
        }
    }
    format!("{sign}{}", break_and(format!("{prefix}{text}")))
}

fn block_name(block: &Block) -> String {
    let mut name = format!("cidr-{}", block.cidr);
    for (index, except) in block.except.iter().enumerate() {
        let separator = if index == 0 { "-except-" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(name, "{separator}{except}");
    }
    name
}

fn term(prefix: &str, text: &str) -> String {
    let mut term = prefix.to_owned();
    escape(&mut term, text);
    break_and(term)
}

/// Appends `text`, every byte that is not a letter, a digit or one of `._/-` as `=XX`.
fn escape(to: &mut String, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'/' | b'-' => to.push(char::from(byte)),
            // Writing to a String cannot fail.
            other => drop(write!(to, "={other:02X}")),
        }
    }
}

/// Keeps a term from containing the joint between terms.
fn break_and(term: String) -> String {
    if term.contains("-AND") { term.replace("-AND", "-=41ND") } else { term }
}

/// A number that tells a text from all others, the same in every process: the first half of its SHA-256.
pub fn fingerprint(text: &str) -> u128 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ..] = sha256(text);
    u128::from_be_bytes([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
}

fn sha256(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

/// A big-endian 256-bit number in base 36, padded with zeros on the left to 50 digits.
fn base36(number: &[u8; 32]) -> String {
    let mut rest = *number;
    let mut digits = [b'0'; ALL_DIGITS];
    for digit in digits.iter_mut().rev() {
        let mut remainder = 0_u32;
        for byte in &mut rest {
            let value = remainder * 256 + u32::from(*byte);
            // Below 256, because the remainder is below 36.
            *byte = (value / 36) as u8;
            remainder = value % 36;
        }
        *digit = b"0123456789abcdefghijklmnopqrstuvwxyz"[remainder as usize];
    }
    digits.iter().copied().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::btree_set;
    use proptest::prelude::*;

    use super::*;

    fn arc(text: &str) -> Arc<str> {
        text.into()
    }

    fn requirement(key: &str, operator: Operator) -> Requirement {
        Requirement { key: arc(key), operator }
    }

    fn values(values: &[&str]) -> BTreeSet<Arc<str>> {
        values.iter().map(|value| arc(value)).collect()
    }

    fn everywhere() -> NamespaceScope {
        NamespaceScope::Matching(Selector::everything())
    }

    fn pods(namespaces: NamespaceScope, requirements: &[Requirement]) -> Expression {
        Expression { namespaces, pods: Selector::new(requirements.iter().cloned()) }
    }

    fn matching(requirements: &[Requirement]) -> NamespaceScope {
        NamespaceScope::Matching(Selector::new(requirements.iter().cloned()))
    }

    #[test]
    fn golden_kernel_names() {
        for (name, kernel) in [
            ("ns-default", "azure-npm-4rdsa7069uaa0csdhoe2"),
            ("ns-kube-system", "azure-npm-6a3p993d8bfnt2uskj8v"),
            ("nslabel-all-namespaces", "azure-npm-gcmk2hdba149zrugxkm4"),
            ("podlabel-role:database", "azure-npm-1hpckhpgh8c87xhe1268"),
            ("podlabel-app", "azure-npm-26imkjirbx3x5k9h8jli"),
            ("namedport:serve-80", "azure-npm-60hkxcajimtjwvmstcdb"),
            ("nslabel-kubernetes.io/metadata.name:kube-system", "azure-npm-5ptkg6chzg1dp71x82if"),
        ] {
            assert_eq!(kernel_set_name(name, Family::V4), kernel);
            assert_eq!(kernel_set_name(name, Family::V6), format!("{kernel}6"));
            assert!(kernel_set_name(name, Family::V6).len() <= 31);
        }
    }

    #[test]
    fn golden_chain_suffixes() {
        for (policy, suffix) in [
            ("x/test1", "jo5gdwc4t2"),
            ("y/base", "7oj1cz9mmz"),
            ("kube-system/default-deny-ingress", "6jlte0ar22"),
            ("kube-system/konnectivity-agent", "zlssrcj2mo"),
            ("default/default-deny-ingress", "9lnhs4ayom"),
        ] {
            assert_eq!(chain_suffix(policy), suffix);
        }
    }

    #[test]
    fn names_of_sets() {
        let app_web = requirement("app", Operator::In(values(&["web"])));
        let no_tier = requirement("tier", Operator::DoesNotExist);
        let in_x = NamespaceScope::Named(arc("x"));
        let block = Block {
            cidr: "10.0.0.0/8".parse().unwrap(),
            except: ["10.1.0.0/16", "10.2.0.0/16"].iter().map(|net| net.parse().unwrap()).collect(),
        };
        let every_pod = pods(everywhere(), &[]);
        for (key, name) in [
            (SetKey::Pods(pods(in_x.clone(), &[])), "ns-x"),
            (SetKey::Pods(every_pod.clone()), "nslabel-all-namespaces"),
            (
                SetKey::Pods(pods(matching(&[requirement("all-namespaces", Operator::Exists)]), &[])),
                "nslabel-=all-namespaces",
            ),
            (SetKey::Pods(pods(matching(&[requirement("team", Operator::Exists)]), &[])), "nslabel-team"),
            (
                SetKey::Pods(pods(
                    matching(&[requirement("team", Operator::In(values(&["a", "b"])))]),
                    std::slice::from_ref(&app_web),
                )),
                "nslabel-team:a:b-AND-podlabel-app:web",
            ),
            (SetKey::Pods(pods(everywhere(), std::slice::from_ref(&app_web))), "podlabel-app:web"),
            (
                SetKey::Pods(pods(everywhere(), std::slice::from_ref(&no_tier))),
                "nslabel-all-namespaces-AND-!podlabel-tier",
            ),
            (
                SetKey::Local(pods(in_x.clone(), &[app_web, no_tier])),
                "local-ns-x-AND-podlabel-app:web-AND-!podlabel-tier",
            ),
            (SetKey::Ports { name: arc("http"), of: Holders::Pods(every_pod.clone()) }, "namedport:http"),
            (
                SetKey::Ports { name: arc("http"), of: Holders::Local(pods(in_x, &[])) },
                "namedport:http-AND-local-ns-x",
            ),
            (
                SetKey::Ports { name: arc("http"), of: Holders::Block(block.clone()) },
                "namedport:http-AND-cidr-10.0.0.0/8-except-10.1.0.0/16,10.2.0.0/16",
            ),
            (SetKey::Block(block), "cidr-10.0.0.0/8-except-10.1.0.0/16,10.2.0.0/16"),
        ] {
            assert_eq!(set_name(&key), name);
        }
    }

    #[test]
    fn collisions_are_resolved_by_order_alone() {
        let first = |text: &str| text[..1].to_owned() + if text.contains('\0') { "'" } else { "" };
        let assigned = |texts: &[&'static str]| {
            let sorted: BTreeSet<&str> = texts.iter().copied().collect();
            assign(sorted.into_iter().map(|text| (text, text.to_owned())), first)
        };
        let names = assigned(&["ab", "ac", "b"]);
        let hashes: BTreeSet<&String> = names.iter().map(|(_, (_, hash))| hash).collect();
        assert_eq!(hashes.len(), 3);
        assert_eq!(names, assigned(&["b", "ac", "ab"]));
    }

    /// Texts that are made to run into each other.
    fn text() -> impl Strategy<Value = Arc<str>> {
        let piece = proptest::sample::select(vec![
            "",
            "a",
            "b",
            "-AND-",
            "AND",
            "-",
            ":",
            "!",
            "=",
            "=41",
            "none",
            "all-namespaces",
            "ns-",
            "podlabel-",
            "local-",
            "/",
            ",",
            "é",
            "-AN",
            "D-",
        ]);
        proptest::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat().into())
    }

    fn selector() -> impl Strategy<Value = Selector> {
        let values = || btree_set(text(), 0..3);
        let operator = prop_oneof![
            values().prop_map(Operator::In),
            values().prop_map(Operator::NotIn),
            Just(Operator::Exists),
            Just(Operator::DoesNotExist),
        ];
        let requirement = (text(), operator).prop_map(|(key, operator)| Requirement { key, operator });
        proptest::collection::vec(requirement, 0..3).prop_map(Selector::new)
    }

    fn expression() -> impl Strategy<Value = Expression> {
        let namespaces = prop_oneof![
            text().prop_map(NamespaceScope::Named),
            selector().prop_map(NamespaceScope::Matching)
        ];
        (namespaces, selector()).prop_map(|(namespaces, pods)| Expression { namespaces, pods })
    }

    fn block() -> impl Strategy<Value = Block> {
        let net = proptest::sample::select(vec!["10.0.0.0/8", "10.0.0.0/9", "::/0", "::/1", "::ffff:0:0/97"]);
        let net = || net.clone().prop_map(|net| net.parse().unwrap());
        (net(), btree_set(net(), 0..3)).prop_map(|(cidr, except)| Block { cidr, except })
    }

    fn set_key() -> impl Strategy<Value = SetKey> {
        let of = prop_oneof![
            expression().prop_map(Holders::Pods),
            expression().prop_map(Holders::Local),
            block().prop_map(Holders::Block)
        ];
        prop_oneof![
            expression().prop_map(SetKey::Pods),
            expression().prop_map(SetKey::Local),
            (text(), of).prop_map(|(name, of)| SetKey::Ports { name, of }),
            block().prop_map(SetKey::Block),
        ]
    }

    proptest! {
        #[test]
        fn different_keys_have_different_names(keys in btree_set(set_key(), 0..60)) {
            let names: BTreeSet<String> = keys.iter().map(set_name).collect();
            prop_assert_eq!(names.len(), keys.len());
            let kernel: BTreeSet<Arc<str>> = name_sets(&keys).values().map(|names| Arc::clone(&names.v4)).collect();
            prop_assert_eq!(kernel.len(), keys.len());
        }
    }
}
