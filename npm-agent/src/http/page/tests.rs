//! The pages: that nothing of the cluster's is taken for markup, that they stay small, that verdicts are the matrix's.

use std::collections::BTreeSet;
use std::fmt::Write;

use npm_policy::goal::Family;
use npm_policy::model::{
    Labels, NamedPort, Namespace, NamespaceScope, Operator, Peer, Peers, Pod, PodKey, PodNetwork, PodPhase,
    Policy, PolicyKey, Port, Ports, Protocol, Requirement, Rule, Selector,
};
use npm_policy::world::Change;

use super::*;
use crate::escape::Effect;
use crate::http::view::fixture::{status, view};
use crate::matrix::{Cell, Engine, Evaluator, Probe, Request};
use crate::reconcile::fake::NODE;
use crate::status::report::{DegradedStatus, EscapeStatus, ObjectProblem, WatchStatus};

fn pod(namespace: &str, name: &str, address: [u8; 4], labels: &[(&str, &str)]) -> Change {
    let labels: Labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let key = PodKey::new(namespace, name);
    let pod = Pod {
        key: key.clone(),
        node: Some(NODE.into()),
        labels,
        addresses: [address.into()].into(),
        network: PodNetwork::Own,
        phase: PodPhase::Active,
        ports: [NamedPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
        created: 0,
    };
    Change::Pod(key, Some(pod))
}

fn label(key: &str, value: &str) -> Selector {
    Selector::new([Requirement { key: key.into(), operator: Operator::In([value.into()].into()) }])
}

/// Lets pods with this label in, to this port.
fn policy(namespace: &str, name: &str, subjects: Selector, from: Selector, port: Port) -> Change {
    let key = PolicyKey::new(namespace, name);
    let peer = Peer::Pods { namespaces: NamespaceScope::Named(namespace.into()), pods: from };
    let rule = Rule { peers: Peers::Only(vec![peer]), ports: Ports::Only(vec![port]) };
    let policy = Policy { key: key.clone(), subjects, ingress: Some(vec![rule]), egress: None };
    Change::Policy(key, Some(policy))
}

fn tcp(port: u16) -> Port {
    Port::Range { protocol: Protocol::Tcp, first: port, last: port }
}

fn seen(view: View, query: &str) -> Seen {
    Seen { report: status().into(), view: Arc::new(view), query: Query::parse(query) }
}

/// The elements that pages are made of.
const ELEMENTS: &[&str] = &[
    "a", "body", "br", "button", "code", "datalist", "dd", "details", "div", "dl", "dt", "footer", "form",
    "h1", "h2", "h3", "head", "header", "html", "input", "label", "li", "link", "main", "meta", "nav",
    "option", "p", "section", "select", "span", "strong", "summary", "table", "tbody", "td", "th", "thead",
    "title", "tr", "ul",
];

/// The attributes that they have. None of them runs anything; `href`, `action` are looked at.
const ATTRIBUTES: &[&str] = &[
    "action",
    "aria-current",
    "autocomplete",
    "charset",
    "class",
    "content",
    "data-label",
    "href",
    "id",
    "lang",
    "list",
    "method",
    "name",
    "placeholder",
    "rel",
    "required",
    "scope",
    "selected",
    "spellcheck",
    "type",
    "value",
];

/// Reads a page as a browser's tokenizer does, and complains about whatever is not ours.
fn foreign(page: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    while let Some((_, tag)) = rest.split_once('<') {
        let tag = tag.strip_prefix('/').unwrap_or(tag);
        let end = tag.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(tag.len());
        if !ELEMENTS.contains(&&tag[..end]) {
            complaints.push(format!("element {:?}", words::cut(tag, 40)));
        }
        rest = &tag[end..];
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix('>') {
                rest = after;
                break;
            }
            let end = rest.find(|c: char| !(c.is_ascii_lowercase() || c == '-')).unwrap_or(rest.len());
            let name = &rest[..end];
            rest = &rest[end..];
            let value = match rest.strip_prefix("=\"") {
                Some(quoted) => {
                    let (value, after) = quoted.split_once('"').unwrap_or((quoted, ""));
                    rest = after;
                    value
                }
                None => "",
            };
            let leads_away =
                ["href", "action"].contains(&name) && !value.starts_with('/') || value.starts_with("//");
            if !ATTRIBUTES.contains(&name) || leads_away {
                complaints.push(format!("attribute {name:?} of {value:?}"));
                if name.is_empty() {
                    return complaints;
                }
            }
        }
    }
    complaints
}

#[test]
fn what_is_foreign_is_seen() {
    let page = |body: &str| foreign(&format!("<!DOCTYPE html><html>{body}</html>"));
    assert_eq!(
        page(r#"<p class="a">x &lt;script&gt;</p><br><a href="/x?a=b&amp;c">y</a>"#),
        Vec::<String>::new()
    );
    for bad in [
        "<script>alert(1)</script>",
        r#"<p onclick="x">"#,
        r#"<a href="javascript:x">"#,
        r#"<a href="//evil.example">"#,
        r#"<input value="" autofocus onfocus="x">"#,
        "<img src=x>",
        "<!-- x -->",
        "<P>",
    ] {
        assert!(!page(bad).is_empty(), "{bad}");
    }
}

/// Every text that can come from a cluster, a kernel, a file or a request holds markup.
#[test]
fn names_are_never_taken_for_markup() {
    for evil in [
        "<script>alert(1)</script>",
        "\"><img src=x onerror=alert(1)>",
        "' onfocus=alert(1) '",
        "</title><b>",
        "javascript:x",
        "&lt;b&gt;<!--",
    ] {
        let changes = vec![
            Change::Namespace(
                evil.into(),
                Some(Namespace::new(evil, Labels::from([(evil.into(), evil.into())]))),
            ),
            pod(evil, evil, [10, 0, 0, 1], &[(evil, evil)]),
            pod(evil, "other", [10, 0, 0, 2], &[]),
            policy(
                evil,
                evil,
                label(evil, evil),
                label(evil, evil),
                Port::Named { protocol: Protocol::Tcp, name: evil.into() },
            ),
        ];
        let text = || evil.to_owned();
        let mut evil_status = Status {
            version: text(),
            node: text(),
            instance: text(),
            known_differences: vec![text()],
            warnings: vec![text()],
            ..status()
        };
        evil_status.source.in_sync = false;
        evil_status.source.unread = vec![text()];
        evil_status.source.problems = vec![ObjectProblem { origin: text(), object: text(), message: text() }];
        evil_status.source.watches =
            vec![WatchStatus { name: text(), last_error: Some(text()), ..WatchStatus::default() }];
        evil_status.backends[0].name = text();
        evil_status.backends[0].last_error = Some(text());
        evil_status.backends[0].degraded =
            vec![DegradedStatus { policy: format!("{evil}/{evil}"), reason: text() }];
        evil_status.escapes =
            vec![EscapeStatus { name: text(), effect: Effect::Unjudged, what: text(), remedy: text() }];

        let view = Arc::new(view(changes));
        let pod = format!("{evil}/{evil}");
        let set = view.names.values().map(|names| names.name.to_string()).next().unwrap();
        let with = |fields: &[(&str, &str)]| link(fields);
        let queries = [
            String::new(),
            with(&[("filter", evil), ("name", evil), ("show", evil), ("page", evil)]),
            with(&[("from", evil), ("to", evil), ("protocol", evil), ("port", evil)]),
            with(&[("from", &pod), ("to", &format!("{evil}/other")), ("protocol", "TCP"), ("port", "80")]),
            with(&[("from", &format!("{evil}/other")), ("to", &pod), ("protocol", "TCP"), ("port", evil)]),
            with(&[("name", &pod)]),
            with(&[("name", &set)]),
            with(&[("show", "all")]),
        ];
        let mut shown = 0;
        for page in Page::ALL {
            for query in &queries {
                let seen = Seen {
                    report: evil_status.clone().into(),
                    view: Arc::clone(&view),
                    query: Query::parse(query),
                };
                let html = render(page, &seen);
                assert_eq!(foreign(&html), Vec::<String>::new(), "{page:?}?{query}");
                let escaped: String = maud::html! { (evil) }.into_string();
                shown += html.matches(&escaped).count();
            }
        }
        assert!(shown > 100, "it is not even shown: {shown}");
    }
}

fn link(fields: &[(&str, &str)]) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(fields);
    query.finish()
}

/// No page is larger than a picture, and none is slow, at the size that Azure NPM's documentation has for its limit.
#[test]
fn pages_stay_small_in_the_largest_cluster() {
    let name = "a-name-that-is-as-long-as-names-in-clusters-are";
    let mut changes = Vec::new();
    for n in 0..20_000_usize {
        let [_, _, high, low] = u32::try_from(n).unwrap().to_be_bytes();
        let (app, other) = (format!("app-{}", n % 500), format!("{name}-{n}"));
        let labels = [("app", app.as_str()), ("pod-template-hash", "0123456789"), ("unique", other.as_str())];
        // The first 400 are on this node, in a namespace that most policies are in.
        let namespace = if n < 400 { "crowded".to_owned() } else { format!("namespace-{}", n % 100) };
        let change = pod(&namespace, &format!("{name}-{n}"), [10, 1, high, low], &labels);
        changes.push(match change {
            Change::Pod(key, Some(pod)) if n >= 400 => {
                Change::Pod(key, Some(Pod { node: Some(format!("other-{}", n % 50).into()), ..pod }))
            }
            other @ (Change::Pod(..) | Change::Namespace(..) | Change::Policy(..)) => other,
        });
    }
    for n in 0..10_000_u16 {
        let namespace = if n < 8_000 { "crowded".to_owned() } else { format!("namespace-{}", n % 100) };
        // A thousand select all pods of the crowded namespace.
        let subjects =
            if n < 1_000 { Selector::everything() } else { label("app", &format!("app-{}", n % 500)) };
        changes.push(policy(
            &namespace,
            &format!("{name}-{n}"),
            subjects,
            label("app", &format!("app-{}", n % 7)),
            tcp(n + 1),
        ));
    }
    let mut view = view(changes);
    assert_eq!(view.goal.subjects.len(), 400);
    assert!(view.goal.programs.len() > 6_000, "{}", view.goal.programs.len());
    view.revision = 2;
    let start = std::time::Instant::now();
    let objects = view.world.objects();
    let held_up = start.elapsed();
    assert_eq!(npm_policy::world::World::from(objects), view.world);
    println!("the loop is held up for {held_up:?}, a view takes {:?}", start.elapsed() - held_up);
    let view = Arc::new(view);

    let long = "x".repeat(10_000);
    let mut status = Status { warnings: vec!["odd".to_owned(); 20_000], ..status() };
    status.warnings.extend(vec![long.clone(); 100]);
    let problem = ObjectProblem { origin: long.clone(), object: long.clone(), message: long.clone() };
    status.source.problems = vec![problem; 100];
    status.source.unread = vec![long.clone(); 100];
    let degraded = DegradedStatus { policy: format!("crowded/{name}-1"), reason: long.clone() };
    status.backends[0].degraded = vec![degraded; 100];
    let report = Report::from(status);

    let (one, other) = (format!("crowded/{name}-1"), format!("crowded/{name}-2"));
    let set = view.names.values().map(|names| names.name.to_string()).max_by_key(String::len).unwrap();
    let mut sizes = String::new();
    for page in Page::ALL {
        for query in [
            String::new(),
            link(&[("show", "all"), ("page", "3")]),
            link(&[("show", "here"), ("filter", name)]),
            link(&[("filter", "10.1.0.7")]),
            link(&[("name", &one)]),
            link(&[("name", &set)]),
            link(&[("from", &one), ("to", &other), ("protocol", "TCP"), ("port", "http")]),
        ] {
            let seen = Seen { report: report.clone(), view: Arc::clone(&view), query: Query::parse(&query) };
            let start = std::time::Instant::now();
            let html = render(page, &seen);
            let _ = writeln!(sizes, "{page:?}?{query}: {} bytes, {:?}", html.len(), start.elapsed());
            assert!(html.len() < 120_000, "{page:?}?{query}: {} bytes", html.len());
        }
    }
    println!("{sizes}");
}

/// Every verdict of the form is that of `npm-agent matrix`.
#[test]
fn the_forms_verdicts_are_the_matrixs() {
    let changes = vec![
        pod("x", "a", [10, 0, 0, 1], &[("app", "a")]),
        pod("x", "b", [10, 0, 0, 2], &[("app", "b")]),
        pod("y", "c", [10, 0, 0, 3], &[("app", "a")]),
        policy("x", "web", label("app", "b"), label("app", "a"), tcp(80)),
        policy(
            "x",
            "named",
            label("app", "a"),
            Selector::everything(),
            Port::Named { protocol: Protocol::Tcp, name: "http".into() },
        ),
    ];
    let view = Arc::new(view(changes));
    let probes = vec![
        Probe::Port(Protocol::Tcp, 80),
        Probe::Port(Protocol::Tcp, 8080),
        Probe::Port(Protocol::Udp, 80),
        Probe::Icmp,
    ];
    let request = Request {
        world: view.world.clone(),
        probes: probes.clone(),
        externals: vec![("out".into(), "192.0.2.1".parse().unwrap())],
        family: Family::V4,
        engines: BTreeSet::from([Engine::Oracle]),
    };
    let matrix = Evaluator::default().evaluate(&request).unwrap();
    let mut words = BTreeSet::new();
    for probe in probes {
        for (row, from) in matrix.endpoints.iter().enumerate() {
            for (column, to) in matrix.endpoints.iter().enumerate() {
                let word = match matrix.engines[&Engine::Oracle][&probe][row][column] {
                    Cell::Denied => "Denied",
                    Cell::Allowed | Cell::Itself => "Allowed",
                };
                let (protocol, port) = match probe {
                    Probe::Port(protocol, port) => (protocol.to_string(), port.to_string()),
                    Probe::Icmp => ("ICMP".to_owned(), String::new()),
                };
                let named = |end: &crate::matrix::Endpoint| {
                    end.name.strip_prefix("ext/").map_or(end.name.clone(), |_| end.address.to_string())
                };
                let query = link(&[
                    ("from", &named(from)),
                    ("to", &named(to)),
                    ("protocol", &protocol),
                    ("port", &port),
                ]);
                let seen =
                    Seen { report: status().into(), view: Arc::clone(&view), query: Query::parse(&query) };
                let html = render(Page::Verdict, &seen);
                let marked = format!("<strong>{word}</strong>");
                assert!(html.contains(&marked), "{} -> {} {probe}: not {word}", from.name, to.name);
                assert!(!html.contains(">differ<"), "{query}");
                words.insert(word);
            }
        }
    }
    assert_eq!(words, BTreeSet::from(["Allowed", "Denied"]));
}

#[test]
fn a_verdict_says_which_policies_decided_and_what_can_t_be_asked_why_not() {
    let changes = || {
        vec![
            pod("x", "a", [10, 0, 0, 1], &[("app", "a")]),
            pod("x", "b", [10, 0, 0, 2], &[("app", "b")]),
            policy(
                "x",
                "web",
                label("app", "b"),
                label("app", "a"),
                Port::Named { protocol: Protocol::Tcp, name: "http".into() },
            ),
        ]
    };
    let ask = |query: &str| render(Page::Verdict, &seen(view(changes()), query));
    let allowed = ask("from=x/a&to=x/b&protocol=TCP&port=http");
    assert!(
        allowed.contains("x/a → x/b TCP/8080")
            && allowed.contains(r#"<a href="/policy?name=x%2Fweb">x/web</a>"#),
        "{allowed}"
    );
    assert!(ask("from=10.0.0.1&to=x/b&protocol=TCP&port=8080").contains("<strong>Allowed</strong>"));
    let denied = ask("from=x/b&to=10.0.0.2&protocol=TCP&port=1");
    assert!(denied.contains("<strong>Allowed</strong>"), "a pod reaches itself");
    let denied = ask("from=192.0.2.1&to=x/b&protocol=TCP&port=8080");
    assert!(denied.contains("<strong>Denied</strong>") && denied.contains("isolated by"), "{denied}");
    assert!(denied.contains("selected by x/web, which does not allow TCP/8080 from 192.0.2.1"), "{denied}");
    for (query, why) in [
        ("from=a&to=x/b&protocol=TCP&port=80", "is it x/a?"),
        ("from=y/a&to=x/b&protocol=TCP&port=80", "there is no pod y/a; is it x/a?"),
        ("from=x/a&to=x/b&protocol=TCP&port=0", "neither a port from 1 to 65535"),
        ("from=x/a&to=x/b&protocol=UDP&port=http", "nor a UDP port's name on x/b"),
        ("from=x/a&to=x/b&protocol=TCP", "needs a port"),
        ("from=x/a&to=x/b&protocol=GRE&port=1", "is no protocol that can be asked about"),
        ("from=x/a&to=fd00::1&protocol=TCP&port=1", "no address family in common"),
    ] {
        let html = ask(query);
        assert!(html.contains(why), "{query}: {html}");
        assert!(!html.contains("<strong>Allowed"), "{query}");
    }
}

/// What one page links to, another shows.
#[test]
fn every_link_of_every_page_leads_somewhere() {
    let changes = || {
        vec![
            pod("x", "a", [10, 0, 0, 1], &[("app", "a")]),
            pod("x", "b", [10, 0, 0, 2], &[("app", "b")]),
            policy("x", "web", label("app", "b"), label("app", "a"), tcp(80)),
        ]
    };
    let view = Arc::new(view(changes()));
    let page = |path: &str, query: &str| {
        let page = Page::ALL.into_iter().find(|page| page.path() == path)?;
        Some(render(
            page,
            &Seen { report: status().into(), view: Arc::clone(&view), query: Query::parse(query) },
        ))
    };
    let elsewhere: BTreeSet<&str> = Document::ALL
        .map(Document::path)
        .into_iter()
        .chain(Scope::ALL.map(Scope::path))
        .chain([STYLE_PATH])
        .collect();
    let (mut seen, mut queue) = (BTreeSet::new(), vec!["/".to_owned()]);
    while let Some(at) = queue.pop() {
        if !seen.insert(at.clone()) || elsewhere.contains(at.as_str()) {
            continue;
        }
        let (path, query) = at.split_once('?').unwrap_or((&at, ""));
        let html = page(path, query).unwrap_or_else(|| panic!("nothing at {at}"));
        assert!(!html.contains("There is no policy") && !html.contains("No policy of this node"), "{at}");
        queue.extend(
            html.split("href=\"")
                .skip(1)
                .filter_map(|rest| Some(rest.split_once('"')?.0.replace("&amp;", "&"))),
        );
    }
    for wanted in ["/policy?name=x%2Fweb", "/verdict?to=x%2Fb", "/set?name=local-ns-x-AND-podlabel-app%3Ab"] {
        assert!(seen.contains(wanted), "{wanted} in {seen:?}");
    }
}
