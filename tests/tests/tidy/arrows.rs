//! Who may import whom, and where `unsafe` may stand. The arrows are drawn in docs/ARCHITECTURE.md.

use crate::rust_source::{before_tests, paths, split};

/// What some files must not name.
struct Arrow {
    /// Beginnings of file names.
    within: &'static [&'static str],
    /// Beginnings of file names that are free of it, though `within` covers them.
    except: &'static [&'static str],
    /// Beginnings of absolute paths (`crate::..` is the file's own crate).
    forbidden: &'static [&'static str],
    why: &'static str,
}

const ARROWS: &[Arrow] = &[
    Arrow {
        within: &["npm-agent/policy/src/"],
        except: &[],
        forbidden: &[
            "std::env",
            "std::fs",
            "std::io",
            "std::net::TcpListener",
            "std::net::TcpStream",
            "std::net::ToSocketAddrs",
            "std::net::UdpSocket",
            "std::os",
            "std::process",
            "std::thread",
            "std::time::Instant",
            "std::time::SystemTime",
        ],
        why: "the core does no I/O, reads no clock, starts nothing",
    },
    Arrow {
        within: &["npm-common/src/"],
        except: &[],
        forbidden: &["std", "alloc"],
        why: "it runs in the kernel",
    },
    Arrow {
        within: &["npm-agent/src/source/", "npm-agent/src/source.rs"],
        except: &[],
        forbidden: &["crate::backend", "crate::reconcile", "crate::crosscheck"],
        why: "sources and backends never meet",
    },
    Arrow {
        within: &["npm-agent/src/backend/", "npm-agent/src/backend.rs"],
        except: &[],
        forbidden: &["crate::source", "crate::reconcile", "crate::crosscheck"],
        why: "sources and backends never meet",
    },
    Arrow {
        within: &["npm-agent/src/backend/iptables"],
        except: &[],
        forbidden: &["crate::backend::ebpf"],
        why: "the backends never meet",
    },
    Arrow {
        within: &["npm-agent/src/backend/ebpf"],
        except: &[],
        forbidden: &["crate::backend::iptables"],
        why: "the backends never meet",
    },
    Arrow {
        within: &[
            "npm-agent/src/disturbance.rs",
            "npm-agent/src/escape",
            "npm-agent/src/interfaces",
            "npm-agent/src/netlink.rs",
        ],
        except: &[],
        forbidden: &["crate::backend", "crate::source", "crate::reconcile", "crate::status", "crate::config"],
        why: "it looks at the node, whatever judges there",
    },
    Arrow {
        within: &["npm-agent/src/conntrack"],
        except: &[],
        forbidden: &["npm_policy", "crate::backend", "crate::source", "crate::reconcile"],
        why: "it knows connections, not who may open them",
    },
    Arrow {
        within: &["npm-agent/src/reconcile", "npm-agent/src/crosscheck"],
        except: &[],
        forbidden: &[
            "crate::source::kube",
            "crate::source::manifests",
            "crate::source::convert",
            "crate::backend::iptables",
            "crate::backend::ebpf",
        ],
        why: "it knows what sources and backends have in common, not which there are",
    },
    Arrow {
        within: &["npm-agent/"],
        except: &["npm-agent/src/source"],
        forbidden: &["k8s_openapi"],
        why: "Kubernetes' types stop in the source",
    },
    Arrow {
        within: &["npm-agent/"],
        except: &["npm-agent/src/backend/ebpf"],
        forbidden: &["aya"],
        why: "aya's types stop in the eBPF backend",
    },
    Arrow {
        within: &[""],
        except: &[],
        forbidden: &["std::process::Command", "tokio::process::Command"],
        why: "one exec.rs a crate runs programs",
    },
];

/// Directories whose files are tests: they may reach for what they compare.
fn is_test(name: &str) -> bool {
    name.split('/').any(|part| part == "tests" || part == "tests.rs") && !name.starts_with("tests/src/")
}

/// Complains about paths that a file must not name. Unit tests at a file's end are free, but for running programs.
pub(crate) fn check(name: &str, text: &str) -> Vec<String> {
    let code = split(text).code;
    let tests_from = before_tests(&code).lines().count();
    let module = module(name);
    let mut complaints = Vec::new();
    for path in paths(&code) {
        let absolute = absolute(&module, &path.segments);
        for Arrow { within, except, forbidden, why } in ARROWS {
            let starts = |names: &[&str]| names.iter().any(|start| name.starts_with(start));
            let runs_programs = forbidden.contains(&"std::process::Command");
            let free = if runs_programs {
                name.ends_with("/exec.rs")
            } else {
                is_test(name) || path.line > tests_from
            };
            if free || !starts(within) || starts(except) {
                continue;
            }
            if let Some(forbidden) = forbidden.iter().find(|forbidden| is_below(&absolute, forbidden)) {
                complaints.push(format!("{name}:{}: {forbidden}: {why}", path.line));
            }
        }
    }
    complaints
}

/// The module that a file is, as `crate::..`.
fn module(name: &str) -> Vec<String> {
    let inside = name.rsplit_once("src/").map_or(name, |(_, inside)| inside);
    let inside = inside.trim_end_matches(".rs");
    let mut module = vec!["crate".to_owned()];
    if !["lib", "main"].contains(&inside) {
        module.extend(inside.split('/').map(str::to_owned));
    }
    module
}

/// `self` and `super` resolved against the file's module.
fn absolute(module: &[String], segments: &[String]) -> Vec<String> {
    let mut base = module.to_vec();
    let mut relative = false;
    let mut rest = segments;
    while let [first, others @ ..] = rest {
        match first.as_str() {
            "super" => {
                base.pop();
            }
            "self" => {}
            _ => break,
        }
        relative = true;
        rest = others;
    }
    if relative { [&base, rest].concat() } else { segments.to_vec() }
}

fn is_below(path: &[String], forbidden: &str) -> bool {
    let forbidden: Vec<&str> = forbidden.split("::").collect();
    path.len() >= forbidden.len() && path.iter().zip(&forbidden).all(|(segment, want)| segment == want)
}

/// Where `unsafe` may stand; everything else says `#![forbid(unsafe_code)]` or inherits the workspace's lint.
const UNSAFE: &[&str] = &[
    "npm-ebpf/src/",
    "npm-common/src/user.rs",
    "npm-agent/src/backend/ebpf",
    "npm-agent/src/memory.rs",
    "tests/",
];
/// Crates that have no such place.
const FORBIDS_UNSAFE: &[&str] =
    &["npm-agent/policy/src/lib.rs", "npm-agent/src/main.rs", "npm-common/src/lib.rs", "xtask/src/main.rs"];

/// Complains about `unsafe` where it may not stand, and about crates that do not forbid it.
pub(crate) fn unsafe_code(name: &str, text: &str) -> Vec<String> {
    let code = split(text).code;
    let mut complaints = Vec::new();
    if FORBIDS_UNSAFE.contains(&name) && !code.contains("#![forbid(unsafe_code)]") {
        complaints.push(format!("{name}: does not say #![forbid(unsafe_code)]"));
    }
    if !UNSAFE.iter().any(|start| name.starts_with(start)) {
        for (index, line) in code.lines().enumerate() {
            let mut words = line.split(|c: char| !(c.is_alphanumeric() || c == '_'));
            if words.any(|word| word == "unsafe") {
                complaints.push(format!("{name}:{}: unsafe has no place here", index + 1));
            }
        }
    }
    complaints
}

#[test]
fn every_arrow_is_held() {
    let bad = [
        ("npm-agent/policy/src/compile.rs", "use std::{collections::BTreeMap, time::Instant};"),
        ("npm-agent/policy/src/compile.rs", "fn f() { std::fs::read(x); }"),
        ("npm-common/src/packet.rs", "use std::net::IpAddr;"),
        ("npm-agent/src/source/manifests.rs", "use crate::backend::Backend;"),
        ("npm-agent/src/backend.rs", "use crate::source::Event;"),
        ("npm-agent/src/backend/iptables/render.rs", "use super::super::ebpf::lower;"),
        ("npm-agent/src/backend/iptables.rs", "use super::ebpf;"),
        ("npm-agent/src/backend/ebpf/maps.rs", "use crate::backend::{iptables::render, Backend};"),
        ("npm-agent/src/conntrack/entry.rs", "use npm_policy::flow::Flow;"),
        ("npm-agent/src/reconcile.rs", "use crate::backend::iptables::Iptables;"),
        ("npm-agent/src/crosscheck/count.rs", "use crate::source::kube;"),
        ("npm-agent/src/escape/survey.rs", "use crate::backend::iptables::variant::Variant;"),
        ("npm-agent/src/run.rs", "use k8s_openapi::api;"),
        ("npm-agent/src/run.rs", "use aya::Ebpf;"),
        ("npm-agent/src/run.rs", "use std::process::Command;"),
        ("tests/tests/lab.rs", "fn f() { std::process::Command::new(a); }"),
    ];
    for (name, text) in bad {
        assert_eq!(check(name, text).len(), 1, "{name}: {text}");
    }
    // Each arrow is among them.
    for arrow in ARROWS {
        let shown = bad.iter().any(|(name, text)| check(name, text)[0].ends_with(arrow.why));
        assert!(shown, "no bad example: {}", arrow.why);
    }
}

#[test]
fn what_is_allowed_passes() {
    let good = [
        ("npm-agent/policy/src/compile.rs", "use std::collections::BTreeMap; use std::net::IpAddr;"),
        (
            "npm-agent/policy/src/compile.rs",
            "// std::fs\nlet a = \"std::fs\";\n#[cfg(test)]\nmod t { use std::fs; }",
        ),
        ("npm-agent/policy/tests/oracle.rs", "use std::env;"),
        ("npm-agent/src/source/convert.rs", "use k8s_openapi::api;"),
        ("npm-agent/src/backend/iptables/render.rs", "use super::layout; use crate::backend::Backend;"),
        ("npm-agent/src/exec.rs", "use std::process::Command;"),
        (
            "npm-agent/src/run.rs",
            "use std::process::ExitCode; use crate::source; use crate::backend::iptables;",
        ),
        ("npm-agent/src/run.rs", "use crate::ayah; use layers::aya;"),
    ];
    for (name, text) in good {
        assert_eq!(check(name, text), Vec::<String>::new(), "{name}: {text}");
    }
}

#[test]
fn unsafe_is_seen() {
    assert_eq!(unsafe_code("npm-agent/src/run.rs", "unsafe { x() }").len(), 1);
    assert_eq!(unsafe_code("npm-agent/policy/src/lib.rs", "").len(), 1);
    assert!(unsafe_code("npm-agent/src/run.rs", "// unsafe\nlet unsafe_code = 1;").is_empty());
    assert!(unsafe_code("npm-ebpf/src/main.rs", "unsafe { x() }").is_empty());
}
