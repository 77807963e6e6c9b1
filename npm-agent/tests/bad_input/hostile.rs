//! Big and bottomless input.

use std::fmt::Write;
use std::fs;

use npm_agent::source::manifests::read;
use npm_policy::model::{Peer, Peers};

use super::{is_strict, policies, read_among_neighbours, said};

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: x}}\nspec: {spec}\n"
    )
}

#[test]
fn a_million_combinations_are_one_selector() {
    let mut expressions = String::new();
    for i in 0..20 {
        write!(expressions, "{{key: k{i}, operator: In, values: [a, b]}}, ").unwrap();
    }
    let spec =
        format!("{{ingress: [{{from: [{{namespaceSelector: {{matchExpressions: [{expressions}]}}}}]}}]}}");
    let reading = read_among_neighbours("2^20", &policy("many", &spec));
    assert_eq!(said(&reading), "");
    let rule = &policies(&reading)[0].ingress.as_ref().unwrap()[0];
    assert!(matches!(&rule.peers, Peers::Only(peers) if peers.len() == 1));
}

#[test]
fn a_hundred_thousand_blocks_and_excepts() {
    let mut peers = String::new();
    let mut except = String::new();
    for i in 0..100_000 {
        let (a, b, c) = (i >> 16, (i >> 8) & 255, i & 255);
        writeln!(peers, "    - ipBlock: {{cidr: 11.{a}.{b}.{c}/32}}").unwrap();
        writeln!(except, "        - 10.{a}.{b}.{c}/32").unwrap();
    }
    let spec = format!(
        "\n  ingress:\n  - from:\n{peers}    - ipBlock:\n        cidr: 10.0.0.0/8\n        except:\n{except}"
    );
    let reading = read_among_neighbours("100,000 blocks", &policy("many", &spec));
    assert_eq!(said(&reading), "");
    let rule = &policies(&reading)[0].ingress.as_ref().unwrap()[0];
    let Peers::Only(peers) = &rule.peers else { panic!() };
    assert_eq!(peers.len(), 100_001);
    assert!(matches!(&peers[100_000], Peer::Block(block) if block.except.len() == 100_000));

    let bad = spec.replace("cidr: 11.", "cidr: 11.300.");
    let reading = read_among_neighbours("100,000 bad blocks", &policy("many", &bad));
    assert_eq!(reading.problems.len(), 9, "the rest is counted");
    assert!(said(&reading).contains("and 99992 more of this object"));
    assert!(is_strict(policies(&reading)[0]));
}

#[test]
fn names_of_maximal_length_and_beyond() {
    let longest = format!("{}b", "a.".repeat(126));
    let reading = read_among_neighbours("253", &policy(&longest, "{}"));
    assert_eq!(said(&reading), "");
    assert_eq!(policies(&reading)[0].key.name.len(), 253);
    let reading = read_among_neighbours("254", &policy(&"a".repeat(254), "{ingress: [{}]}"));
    assert!(said(&reading).contains("must be no more than 253 characters"));
    assert!(is_strict(policies(&reading)[0]));
    let reading = read_among_neighbours("1 MB", &policy(&"a".repeat(1 << 20), "{ingress: [{}]}"));
    assert!(said(&reading).contains("... (1048576 bytes)\" must be no more than 253 characters"));
    assert!(said(&reading).len() < 1000 && policies(&reading)[0].key.name.len() < 64);
    let value = "a".repeat(64);
    let reading = read_among_neighbours(
        "label",
        &policy("l", &format!("{{podSelector: {{matchLabels: {{a: {value}}}}}}}")),
    );
    assert!(said(&reading).contains("must be no more than 63 characters"));
}

#[test]
fn everything_in_all_spellings() {
    for v4 in [
        "0.0.0.0/0",
        "00.000.0.0/00",
        "1.2.3.4/0",
        "255.255.255.255/000",
        "'::ffff:0:0/96'",
        "'::ffff:1.2.3.4/96'",
    ] {
        let spec = format!("{{ingress: [{{from: [{{ipBlock: {{cidr: {v4}}}}}]}}]}}");
        let reading = read_among_neighbours(v4, &policy("all", &spec));
        assert_eq!(said(&reading), "", "{v4}");
        let rule = &policies(&reading)[0].ingress.as_ref().unwrap()[0];
        let Peers::Only(peers) = &rule.peers else { panic!() };
        assert!(matches!(&peers[0], Peer::Block(block) if block.cidr.to_string() == "0.0.0.0/0"), "{v4}");
    }
    for v6 in ["::/0", "0::0/0", "0:0:0:0:0:0:0:0/0", "::1/0", "FFFF::/00", "::ffff:1.2.3.4/0", "00000::/0"] {
        let spec = format!("{{ingress: [{{from: [{{ipBlock: {{cidr: '{v6}'}}}}]}}]}}");
        let reading = read_among_neighbours(v6, &policy("all", &spec));
        assert_eq!(said(&reading), "", "{v6}");
        let rule = &policies(&reading)[0].ingress.as_ref().unwrap()[0];
        let Peers::Only(peers) = &rule.peers else { panic!() };
        assert!(matches!(&peers[0], Peer::Block(block) if block.cidr.to_string() == "::/0"), "{v6}");
    }
}

#[test]
fn bombs_are_refused() {
    let mut laughs = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned();
    for i in 1..12 {
        let inner = vec![format!("*a{}", i - 1); 9].join(", ");
        writeln!(laughs, "a{i}: &a{i} [{inner}]").unwrap();
    }
    let deep_flow = "[".repeat(100_000);
    let deep_maps = "{a: ".repeat(100_000);
    let mut deep_block = String::new();
    for i in 0..2000 {
        writeln!(deep_block, "{}a:", " ".repeat(i)).unwrap();
    }
    let dashes = "- ".repeat(100_000);
    let key = format!("? {}\n: b", "a".repeat(1 << 20));
    let aliases = format!("a: &a {}\nb: [{}]", "x".repeat(10_000), "*a, ".repeat(200_000));
    let cases = [
        ("laughs", &laughs),
        ("deep flow", &deep_flow),
        ("deep maps", &deep_maps),
        ("deep block", &deep_block),
        ("dashes", &dashes),
        ("long key", &key),
        ("aliases", &aliases),
    ];
    for (name, text) in cases {
        let reading = read_among_neighbours(name, text);
        let said = said(&reading);
        assert!(said.contains("left out") && said.len() < 1000, "{name}: {said}");
        assert!(reading.changes.is_empty());
    }
}

#[test]
fn files_that_are_no_text() {
    let directory = tempfile::tempdir().unwrap();
    let good = policy("good", "{}");
    fs::write(directory.path().join("good.yaml"), &good).unwrap();
    fs::write(directory.path().join("latin.yaml"), b"kind: P\xf6d").unwrap();
    fs::write(directory.path().join("utf16.yaml"), b"\xff\xfek\0i\0").unwrap();
    fs::write(directory.path().join("zeros.json"), vec![0; 100_000]).unwrap();
    fs::write(directory.path().join("empty.yaml"), "").unwrap();
    fs::write(directory.path().join("comment.yaml"), "# nothing\n---\n---\n...\n").unwrap();
    fs::write(directory.path().join("bom.yaml"), "\u{feff}".to_owned() + &policy("bom", "{}")).unwrap();
    fs::write(directory.path().join("crlf.yaml"), policy("crlf", "{}").replace('\n', "\r\n")).unwrap();
    let huge = fs::File::create(directory.path().join("huge.yaml")).unwrap();
    huge.set_len((64 << 20) + 1).unwrap();
    std::os::unix::fs::symlink("nowhere", directory.path().join("dangling.yaml")).unwrap();
    std::os::unix::fs::symlink(".", directory.path().join("loop")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", directory.path().join("endless.yaml")).unwrap();
    fs::create_dir(directory.path().join("directory.yaml")).unwrap();
    let reading = read(&[directory.path().to_owned()]);
    let names: Vec<_> = policies(&reading).iter().map(|policy| policy.key.to_string()).collect();
    assert_eq!(names, ["x/bom", "x/crlf", "x/good"]);
    let said = said(&reading).replace(&format!("{}/", directory.path().display()), "");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines[0], "endless.yaml: cannot be read: not a regular file; left out");
    assert_eq!(lines[1], "huge.yaml: cannot be read: bigger than 64 MiB; left out");
    assert_eq!(lines[2], "latin.yaml: cannot be read: not UTF-8 at byte 7; left out");
    assert_eq!(lines[3], "utf16.yaml: cannot be read: not UTF-8 at byte 0; left out");
    assert!(lines[4].starts_with("zeros.json: line 1, column 1: "), "{}", lines[4]);
    assert_eq!(lines.len(), 5);
}
