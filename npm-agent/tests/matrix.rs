//! The matrix, from manifests to text.
#![expect(clippy::unwrap_used, reason = "in tests, also outside of the test functions")]

use std::fs;
use std::net::IpAddr;

use clap::Parser;
use npm_agent::cli::matrix::MatrixArgs;
use npm_agent::matrix::{Engine, Expectation, Matrix, Probe, Request, evaluate, named_probes};
use npm_agent::source::manifests::read;
use npm_policy::goal::Family;
use npm_policy::world::World;

/// A web shop: `web` takes port http from pods of its namespace, `db` port 5432 from `web` only, `db` talks to
/// nobody; a pod on its node's network; a pod that has ended; a pod without IPv4.
const SHOP: &str = r#"
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
- apiVersion: v1
  kind: Pod
  metadata: {name: web, namespace: shop, labels: {app: web}}
  spec: {containers: [{ports: [{containerPort: 8080, name: http}]}]}
  status: {phase: Running, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: db, namespace: shop, labels: {app: db}}
  status: {phase: Running, podIPs: [{ip: 10.0.0.2}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: agent, namespace: shop}
  spec: {hostNetwork: true}
  status: {phase: Running, podIP: 192.168.0.1}
- apiVersion: v1
  kind: Pod
  metadata: {name: done, namespace: shop}
  status: {phase: Succeeded, podIP: 10.0.0.3}
- apiVersion: v1
  kind: Pod
  metadata: {name: six, namespace: shop}
  status: {phase: Running, podIP: "fd00::6"}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: web, namespace: shop}
  spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}], ports: [{port: http}]}]}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: db, namespace: shop}
  spec:
    podSelector: {matchLabels: {app: db}}
    policyTypes: [Ingress, Egress]
    ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5432}]}]
"#;

fn world(text: &str) -> World {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("a.yaml"), text).unwrap();
    let reading = read(&[directory.path().to_owned()]);
    assert_eq!(reading.problems, []);
    let mut world = World::default();
    reading.changes.into_iter().for_each(|change| world.apply(change));
    world
}

fn shop(family: Family, probes: &[&str]) -> Matrix {
    let externals = [("net", "1.1.1.1"), ("net6", "2001:db8::1")];
    let externals = externals.map(|(name, ip)| (name.to_owned(), ip.parse::<IpAddr>().unwrap()));
    let probes = probes.iter().map(|probe| probe.parse().unwrap()).collect();
    let engines = Engine::UNPRIVILEGED.into();
    evaluate(&Request { world: world(SHOP), probes, externals: externals.into(), family, engines }).unwrap()
}

fn rows(matrix: &Matrix, probe: &str) -> Vec<String> {
    let probe: Probe = probe.parse().unwrap();
    assert_eq!(matrix.disagreements(), []);
    let rows = &matrix.engines[&Engine::Oracle][&probe];
    rows.iter().map(|row| row.iter().map(|cell| cell.symbol()).collect()).collect()
}

#[test]
fn verdicts() {
    let matrix = shop(Family::V4, &["TCP/8080", "TCP/5432", "UDP/8080", "ICMP"]);
    let names: Vec<_> = matrix.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
    assert_eq!(names, ["shop/agent", "shop/db", "shop/web", "ext/net"]);
    assert_eq!(rows(&matrix, "TCP/8080"), ["#XX.", "X#XX", ".X#.", ".XX#"]);
    assert_eq!(rows(&matrix, "TCP/5432"), ["#XX.", "X#XX", "..#.", ".XX#"]);
    assert_eq!(rows(&matrix, "UDP/8080"), ["#XX.", "X#XX", ".X#.", ".XX#"]);
    assert_eq!(rows(&matrix, "ICMP"), rows(&matrix, "UDP/8080"));
    let matrix = shop(Family::V6, &["TCP/8080"]);
    let names: Vec<_> = matrix.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
    assert_eq!(names, ["shop/six", "shop/web", "ext/net6"]);
    assert_eq!(rows(&matrix, "TCP/8080"), ["#..", ".#.", ".X#"]);
}

#[test]
fn json_has_the_documented_form() {
    let matrix = shop(Family::V6, &["TCP/8080", "tcp/8080"]);
    let table = serde_json::json!({"TCP/8080": ["#..", ".#.", ".X#"]});
    let expected = serde_json::json!({
        "probes": ["TCP/8080"],
        "endpoints": ["shop/six", "shop/web", "ext/net6"],
        "engines": {"oracle": table, "goal": table, "iptables": table},
    });
    assert_eq!(serde_json::from_str::<serde_json::Value>(&matrix.to_json()).unwrap(), expected);
}

#[test]
fn probes_are_found_in_what_policies_and_pods_name() {
    let names = |world: &World| named_probes(world).iter().map(Probe::to_string).collect::<Vec<_>>();
    assert_eq!(names(&world(SHOP)), ["TCP/5432", "TCP/8080"]);
    assert_eq!(names(&World::default()), ["TCP/80"]);
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a}\nspec: {egress: [{ports: \
                  [{protocol: UDP}, {protocol: SCTP, port: 7, endPort: 9}, {port: nobody}]}]}";
    assert_eq!(names(&world(policy)), ["UDP/53", "SCTP/7", "SCTP/9"]);
    for bad in ["", "TCP", "TCP/", "TCP/0", "TCP/65536", "ICMP/1", "/80", "80"] {
        assert!(bad.parse::<Probe>().is_err(), "{bad:?}");
    }
}

#[test]
fn tables_are_legible() {
    let expected = "\
TCP/8080, UDP/8080 (oracle, goal, iptables agree), from row to column
            shop/  shop/  shop/  ext/
            agent   db     web   net
 shop/agent   #      X      X     .
 shop/db      X      #      X     X
 shop/web     .      X      #     .
 ext/net      .      X      X     #

. allowed   X denied   # itself
";
    let text = shop(Family::V4, &["TCP/8080", "UDP/8080"]).to_table();
    let squeezed = |text: &str| {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(squeezed(&text), squeezed(expected), "{text}");
    let pod = |i| {
        format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}}}\nstatus: {{podIP: 10.0.0.{i}}}\n")
    };
    let world = world(&(10..23).map(pod).collect::<String>());
    let request = Request {
        world,
        probes: vec![],
        externals: vec![],
        family: Family::V4,
        engines: [Engine::Goal].into(),
    };
    let text = evaluate(&request).unwrap().to_table();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "TCP/80 (goal), from row to column");
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>().join(" "), "1 2 3 4 5 6 7 8 9 10 11 12 13");
    assert!(lines[14].trim_start().starts_with("13 default/p22 "), "{text}");
    assert!(lines.iter().all(|line| line.len() < 80), "{text}");
}

#[test]
fn expectations_show_what_differs_and_why() {
    let matrix = shop(Family::V4, &["TCP/8080", "TCP/5432"]);
    let same = Expectation::parse(&matrix.to_json()).unwrap();
    assert_eq!(same.compare(&matrix, &world(SHOP)), []);
    // Another order; an endpoint that is not there, and two that are not in the file.
    let text = r##"{"probes": ["TCP/5432"], "endpoints": ["shop/web", "shop/gone", "shop/db"],
                   "engines": {"goal": {"TCP/5432": ["#..", ".#.", "..#"]}}}"##;
    let other = Expectation::parse(text).unwrap();
    let differences = other.compare(&matrix, &world(SHOP));
    let lines: Vec<_> = differences.iter().map(ToString::to_string).collect();
    assert_eq!(lines.len(), 6, "{lines:?}");
    assert_eq!(lines[0], "shop/gone: expected, and not there");
    assert_eq!(lines[1], "shop/agent: there, and not expected: the file does not name it");
    assert_eq!(lines[2], "ext/net: there, and not expected: the file does not name it");
    let reason = "denied: egress of shop/db: selected by shop/db, which does not allow TCP/5432 to shop/web";
    let start = "shop/db -> shop/web TCP/5432: expected ., oracle says X (";
    assert!(lines[3].starts_with(&format!("{start}{reason}")), "{}", lines[3]);
    for bad in [
        "",
        "{}",
        r##"{"probes": [], "endpoints": [], "engines": {}}"##,
        r##"{"probes": [], "endpoints": ["a"], "engines": {"oracle": {"TCP/80": []}}}"##,
        r##"{"probes": [], "endpoints": ["a"], "engines": {"oracle": {"TCP/80": ["?"]}}}"##,
        r##"{"probes": [], "endpoints": ["a"], "engines": {"oracle": {"TCP/80": ["X."]}}}"##,
        r##"{"probes": [], "endpoints": ["a"], "engines": {"pope": {"TCP/80": ["#"]}}}"##,
        r##"{"probes": [], "endpoints": ["a"], "engines": {"oracle": {"TCP": ["#"]}}}"##,
    ] {
        assert!(Expectation::parse(bad).is_err(), "{bad}");
    }
}

/// A table that nothing was compared with proves nothing.
#[test]
fn every_table_of_an_expectation_is_compared() {
    let all = shop(Family::V4, &["TCP/80", "TCP/81"]);
    let lines = |expected: &Matrix, engines: &[Engine], probes: &[&str]| {
        let mut matrix = shop(Family::V4, probes);
        matrix.engines.retain(|engine, _| engines.contains(engine));
        let expected = Expectation::parse(&expected.to_json()).unwrap();
        expected.compare(&matrix, &world(SHOP)).iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let not = |table: &str| {
        format!("table {table}: expected, and not evaluated: --engine or --probe leaves it out")
    };
    assert_eq!(lines(&all, &Engine::ALL, &["TCP/80", "TCP/81", "TCP/82"]), Vec::<String>::new());
    let expected = ["oracle TCP/81", "goal TCP/81", "iptables TCP/81"].map(not);
    assert_eq!(lines(&all, &Engine::ALL, &["TCP/80"]), expected);
    let expected = ["oracle TCP/80", "oracle TCP/81", "iptables TCP/80", "iptables TCP/81"].map(not);
    assert_eq!(lines(&all, &[Engine::Goal], &["TCP/80", "TCP/81"]), expected);
    // Another engine than the file's is compared with the file's.
    let mut oracle = all.clone();
    oracle.engines.retain(|engine, _| *engine == Engine::Oracle);
    assert_eq!(lines(&oracle, &[Engine::Goal], &["TCP/80", "TCP/81"]), Vec::<String>::new());
    assert_eq!(lines(&oracle, &[Engine::Goal], &["TCP/81"]), [not("oracle TCP/80")]);
}

#[test]
fn no_more_than_32_probes_are_picked() {
    let ports = (1..=40).map(|port| format!("{{port: {port}}}")).collect::<Vec<_>>().join(", ");
    let world = world(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: a}}\n\
         spec: {{ingress: [{{ports: [{ports}]}}]}}"
    ));
    assert_eq!(named_probes(&world).len(), 40);
    let request = |probes| Request {
        world: world.clone(),
        probes,
        externals: vec![],
        family: Family::V4,
        engines: [Engine::Oracle].into(),
    };
    assert_eq!(evaluate(&request(vec![])).unwrap().probes, named_probes(&world)[..32]);
    assert_eq!(evaluate(&request(named_probes(&world))).unwrap().probes.len(), 40);
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    matrix: MatrixArgs,
}

#[test]
fn exit_codes() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    fs::write(path("shop.yaml"), SHOP).unwrap();
    let shop = path("shop.yaml");
    let text = r##"{"probes": ["TCP/80"], "endpoints": ["shop/db", "shop/web", "shop/agent"],
        "engines": {"iptables": {"TCP/80": ["#XX", "X#.", "XX#"]}}}"##;
    fs::write(path("good.json"), text).unwrap();
    fs::write(path("bad.json"), text.replace("\"#XX\"", "\"#.X\"")).unwrap();
    fs::write(path("no.json"), "no").unwrap();
    let run = |arguments: &[&str]| {
        let cli = Cli::try_parse_from(std::iter::once("matrix").chain(arguments.iter().copied())).ok()?;
        Some(
            npm_agent::cli::matrix::run(&cli.matrix)
                .map(|code| format!("{code:?}"))
                .map_err(|error| format!("{error:#}")),
        )
    };
    let code = |code: u8| Some(Ok(format!("{:?}", std::process::ExitCode::from(code))));
    assert_eq!(run(&["-f", &shop]), code(0));
    assert_eq!(
        run(&["-f", &shop, "-o", "json", "--engine", "goal", "--engine", "oracle", "--probe", "TCP/1,ICMP"]),
        code(0)
    );
    assert_eq!(run(&["-f", &shop, "--expect", &path("good.json")]), code(0));
    assert_eq!(run(&["-f", &shop, "--expect", &path("bad.json")]), code(1));
    assert_eq!(run(&["-f", &shop, "--expect", &path("good.json"), "--probe", "TCP/81"]), code(1));
    assert_eq!(run(&["-f", &shop, "--expect", &path("good.json"), "--external", "net=1.1.1.1"]), code(1));
    for arguments in [
        &["-f", &path("none.yaml")] as &[&str],
        &["-f", &shop, "-f", &path("none")],
        &["-f", &shop, "--expect", &path("no.json")],
        &["-f", &shop, "--expect", &path("none.json")],
        &["-f", &shop, "--external", "a=1.1.1.1", "--external", "a=1.1.1.2"],
    ] {
        assert!(matches!(run(arguments), Some(Err(_))), "{arguments:?}");
    }
    for arguments in [
        &[] as &[&str],
        &["-f", &shop, "--probe", "TCP"],
        &["-f", &shop, "--engine", "pope"],
        &["-f", &shop, "--family", "5"],
        &["-f", &shop, "--external", "a"],
        &["-f", &shop, "--external", "a=b"],
        &["-f", &shop, "--external", "a/b=1.1.1.1"],
    ] {
        assert_eq!(run(arguments), None, "{arguments:?}");
    }
}

/// The words that YAML 1.1 takes for booleans: names and labels are the text they look like, a boolean is one.
#[test]
fn words_for_yes_and_no_are_what_they_look_like() {
    let world = world(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: y, namespace: n, labels: {on: yes}}\n\
         spec: {nodeName: off, hostNetwork: yes}\nstatus: {phase: Running, podIP: 10.0.0.1}\n",
    );
    let pod = world.pods().next().unwrap();
    assert_eq!(pod.key.to_string(), "n/y");
    assert_eq!(pod.labels.get("on").map(|value| &**value), Some("yes"));
    assert_eq!(pod.node.as_deref(), Some("off"));
    assert_eq!(pod.network, npm_policy::model::PodNetwork::Host);
}
