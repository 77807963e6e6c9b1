//! `npm-agent matrix` as a program: what comes through a pipe, and what it says on standard error.

use crate::exec::{agent, agent_fed};

const POD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}\n";

#[test]
fn standard_input_is_read() {
    for path in ["-", "/dev/stdin"] {
        let done = agent_fed(&["matrix", "-f", path, "-o", "json"], POD);
        assert_eq!((done.code(), done.stderr().as_str()), (Some(0), ""), "{path}");
        assert!(done.stdout().contains("\"default/a\""), "{path}: {}", done.stdout());
    }
    // Beside a file; named twice; broken.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("b.yaml").display().to_string();
    std::fs::write(&file, POD.replace("name: a", "name: b")).unwrap();
    let done =
        agent_fed(&["matrix", "-f", "-", "-f", &file, "-f", "-", "-o", "json"], &format!("{POD}---\nfoo\n"));
    assert_eq!(done.code(), Some(0));
    assert!(
        done.stdout().contains("\"default/a\"") && done.stdout().contains("\"default/b\""),
        "{}",
        done.stdout()
    );
    assert!(
        done.stderr().contains("standard input: not a Kubernetes object but the string \"foo\"; left out\n"),
        "{}",
        done.stderr()
    );
    let done = agent(&["matrix", "-f", "/dev/zero"]);
    assert_eq!(done.code(), Some(2));
    assert!(done.stderr().contains("reading /dev/zero: bigger than 64 MiB"), "{}", done.stderr());
}

#[test]
fn what_is_left_out_is_said() {
    let externals = ["--external", "four=1.1.1.1", "--external", "six=2001:db8::1"];
    for (family, left_out, there) in
        [("6", "four: left out: 1.1.1.1", "six"), ("4", "six: left out: 2001:db8::1", "four")]
    {
        let done = agent_fed(
            &[&["matrix", "-f", "-", "-o", "json", "--family", family], &externals[..]].concat(),
            POD,
        );
        assert_eq!(done.code(), Some(0));
        let said = format!("ext/{left_out} is not of the family that --family asks for\n");
        assert_eq!(done.stderr(), said);
        assert!(done.stdout().contains(&format!("\"ext/{there}\"")), "{}", done.stdout());
    }
    let ports: String = (1..=40).map(|port| format!("{{port: {port}}}, ")).collect();
    let policy = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: a}}\n\
         spec: {{ingress: [{{ports: [{ports}]}}]}}\n"
    );
    let done = agent_fed(&["matrix", "-f", "-", "-o", "json"], &policy);
    assert_eq!(done.stderr(), "8 of 40 ports are not tried, from TCP/33 on: name them with --probe\n");
    assert!(done.stdout().contains("TCP/32") && !done.stdout().contains("TCP/33"));
    let done = agent_fed(&["matrix", "-f", "-", "--probe", "TCP/33"], &policy);
    assert_eq!((done.code(), done.stderr().as_str()), (Some(0), ""));
}
