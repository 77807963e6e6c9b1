//! Which of flag, file and default wins; what each key of the file does.

use super::*;

fn file(text: &str) -> Result<File, ConfigError> {
    File::parse(text, Path::new("npm.json"))
}

/// The whole message, causes included.
fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn host() -> HostNames {
    HostNames { environment: Some("from-env\n".into()), kernel: Some("from-kernel\n".into()) }
}

fn manifests() -> Flags {
    Flags { manifests: Some("m".into()), ..Flags::default() }
}

#[test]
fn nothing_said_gives_the_defaults() {
    let settings = Settings::resolve(manifests(), File::default(), None, &host()).unwrap();
    let expected = Settings {
        backend: BackendKind::Iptables,
        source: Source::Manifests("m".into()),
        listening: Some("0.0.0.0:10091".parse().unwrap()),
        scraping: Scraping::Served,
        debug_access: DebugAccess::Loopback,
        node: "from-env".into(),
        instance: "npm-agent".into(),
        socket: "/run/npm-agent/npm-agent.sock".into(),
        iptables_variant: IptablesVariant::Auto,
        placement: ChainPlacement::First,
        interfaces: Selection::default(),
        proof: ProofBit::DEFAULT,
        denied_connections: DeniedConnections::Keep,
        log_denied: LogDenied::Never,
        pod_startup: PodStartup::Allow,
        pod_interfaces: PodInterfaces::default(),
        verify_interval: Duration::from_secs(30),
        log_level: LogLevel::Info,
        log_format: LogFormat::Auto,
        file: None,
        notices: vec![],
    };
    assert_eq!(settings, expected);
}

/// As Go's JSON does.
#[test]
fn null_is_absent() {
    for text in [
        r#"{"Toggles": null}"#,
        r#"{"Node": null, "Backend": null}"#,
        r#"{"toggles": {"PlaceAzureChainFirst": null}}"#,
    ] {
        assert_eq!(file(text).unwrap(), File::default(), "{text}");
    }
    let unknown = file(r#"{"Nodes": null}"#).unwrap();
    assert_eq!(unknown.notices.len(), 1, "{unknown:?}");
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let text = r#"{"Backend": "iptables", "Source": "manifests", "Manifests": "dir", "Node": "n1", "Instance": "i1",
        "ListeningAddress": "::1", "ListeningPort": 9000, "Kubeconfig": "kc", "WatchTimeout": "9s",
        "Socket": "s1", "IptablesVariant": "nft", "VerifyInterval": "5s", "ProofBit": "0x20", "DeniedConnections": "Cut", "LogDenied": "Flows", "PodStartup": "Hold", "PodInterfaces": "gke*", "ExcludeInterfaces": "docker*, mgmt0", "LogLevel": "Debug", "LogFormat": "json",
         "DebugAccess": "anyone",
         "Toggles": {"PlaceAzureChainFirst": true, "EnablePrometheusMetrics": false, "EnableHTTPDebugAPI": false}}"#;
    let settings = Settings::resolve(Flags::default(), file(text).unwrap(), None, &host()).unwrap();
    let of_file = Settings {
        backend: BackendKind::Iptables,
        source: Source::Manifests("dir".into()),
        listening: Some("[::1]:9000".parse().unwrap()),
        scraping: Scraping::Refused,
        debug_access: DebugAccess::Anyone,
        node: "n1".into(),
        instance: "i1".into(),
        socket: "s1".into(),
        iptables_variant: IptablesVariant::Nft,
        placement: ChainPlacement::First,
        interfaces: "docker*, mgmt0".parse().unwrap(),
        proof: ProofBit::new(0x20).unwrap(),
        denied_connections: DeniedConnections::Cut,
        log_denied: LogDenied::Flows,
        pod_startup: PodStartup::Hold,
        pod_interfaces: "gke*".parse().unwrap(),
        verify_interval: Duration::from_secs(5),
        log_level: LogLevel::Debug,
        log_format: LogFormat::Json,
        file: None,
        notices: vec![],
    };
    assert_eq!(settings, of_file);

    let flags = Flags {
        config: None,
        backend: Some(BackendKind::Iptables),
        source: Some(SourceKind::Manifests),
        manifests: Some("flag".into()),
        kubeconfig: Some("kube-flag".into()),
        watch_timeout: Some(Duration::from_secs(8)),
        listening_address: Some("127.0.0.1".parse().unwrap()),
        listening_port: Some(9001),
        debug_access: Some(DebugAccess::Nobody),
        node: Some("n2".into()),
        instance: Some("i2".into()),
        socket: Some("s2".into()),
        iptables_variant: Some(IptablesVariant::Legacy),
        exclude_interfaces: Some("br?".parse().unwrap()),
        proof_bit: ProofBit::new(0x40),
        denied_connections: Some(DeniedConnections::Keep),
        log_denied: Some(LogDenied::Never),
        pod_startup: Some(PodStartup::Allow),
        pod_interfaces: Some("eni*,br0".parse().unwrap()),
        verify_interval: Some(Duration::from_secs(7)),
        log_level: Some(LogLevel::Trace),
        log_format: Some(LogFormat::Human),
    };
    let settings = Settings::resolve(flags.clone(), file(text).unwrap(), None, &host()).unwrap();
    let of_flags = Settings {
        source: Source::Manifests("flag".into()),
        listening: Some("127.0.0.1:9001".parse().unwrap()),
        debug_access: DebugAccess::Nobody,
        node: "n2".into(),
        instance: "i2".into(),
        socket: "s2".into(),
        iptables_variant: IptablesVariant::Legacy,
        interfaces: "br?".parse().unwrap(),
        proof: ProofBit::new(0x40).unwrap(),
        denied_connections: DeniedConnections::Keep,
        log_denied: LogDenied::Never,
        pod_startup: PodStartup::Allow,
        pod_interfaces: "eni*,br0".parse().unwrap(),
        verify_interval: Duration::from_secs(7),
        log_level: LogLevel::Trace,
        log_format: LogFormat::Human,
        ..of_file
    };
    assert_eq!(settings, of_flags);

    let kube = |flags: Flags| {
        let flags = Flags { source: Some(SourceKind::Kube), ..flags };
        Settings::resolve(flags, file(text).unwrap(), None, &host()).unwrap().source
    };
    let expected = |path: &str, seconds| Source::Kube {
        kubeconfig: Some(path.into()),
        watch_timeout: Duration::from_secs(seconds),
    };
    assert_eq!((kube(Flags::default()), kube(flags)), (expected("kc", 9), expected("kube-flag", 8)));
}

#[test]
fn without_a_kubeconfig_it_is_the_service_account_and_without_a_port_nobody_listens() {
    let flags = Flags { source: Some(SourceKind::Kube), listening_port: Some(0), ..Flags::default() };
    let settings = Settings::resolve(flags, File::default(), None, &host()).unwrap();
    let source = Source::Kube { kubeconfig: None, watch_timeout: Duration::from_secs(290) };
    assert_eq!((settings.source, settings.listening), (source, None));
}

#[test]
fn the_socket_follows_the_instance_and_the_node_the_machine() {
    let flags = Flags { instance: Some("lab".into()), ..manifests() };
    let no_environment = HostNames { environment: Some(String::new()), ..host() };
    let settings = Settings::resolve(flags, File::default(), None, &no_environment).unwrap();
    assert_eq!(settings.socket, Path::new("/run/npm-agent/lab.sock"));
    assert_eq!(settings.node, "from-kernel");

    let error = Settings::resolve(manifests(), File::default(), None, &HostNames::default()).unwrap_err();
    assert!(matches!(error, ConfigError::NoNode));
    let error = Settings::resolve(Flags::default(), File::default(), None, &host()).unwrap_err();
    assert!(matches!(error, ConfigError::NoManifests));
}

/// The ConfigMap of Azure NPM's own DaemonSet (`npm/azure-npm.yaml`), all defaults written out.
const AZURE: &str = r#"{"ResyncPeriodInMinutes": 15, "ListeningPort": 10091, "ListeningAddress": "0.0.0.0",
    "ApplyMaxBatches": 100, "ApplyIntervalInMilliseconds": 500, "MaxBatchedACLsPerPod": 30,
    "MaxPendingNetPols": 100, "NetPolInvervalInMilliseconds": 500,
    "Transport": {"Address": "0.0.0.0", "Port": 10092, "ServicePort": 9002},
    "Toggles": {"EnablePrometheusMetrics": true, "EnablePprof": true, "EnableHTTPDebugAPI": true,
        "EnableV2NPM": true, "PlaceAzureChainFirst": false, "ApplyIPSetsOnNeed": false,
        "ApplyInBackground": true, "NetPolInBackground": true, "EnableNPMLite": false}}"#;

#[test]
fn azure_npms_own_file_is_taken_and_each_key_without_effect_is_named_once() {
    let file = file(AZURE).unwrap();
    assert_eq!(file.placement, Some(ChainPlacement::AfterKubeServices));
    let mut named: Vec<&str> = file.notices.iter().map(|notice| notice.key.as_str()).collect();
    named.sort_unstable();
    assert_eq!(
        named,
        [
            "ApplyIntervalInMilliseconds",
            "ApplyMaxBatches",
            "MaxBatchedACLsPerPod",
            "MaxPendingNetPols",
            "NetPolInvervalInMilliseconds",
            "ResyncPeriodInMinutes",
            "Toggles.ApplyIPSetsOnNeed",
            "Toggles.ApplyInBackground",
            "Toggles.EnableNPMLite",
            "Toggles.EnablePprof",
            "Toggles.EnableV2NPM",
            "Toggles.NetPolInBackground",
            "Toggles.PlaceAzureChainFirst",
            "Transport.Address",
            "Transport.Port",
            "Transport.ServicePort",
        ]
    );
}

#[test]
fn azure_npms_toggle_takes_the_debug_api_away_and_never_opens_it() {
    for (text, access) in [
        (r#"{"Node": "n"}"#, DebugAccess::Loopback),
        (r#"{"Toggles": {"EnableHTTPDebugAPI": true}}"#, DebugAccess::Loopback),
        (r#"{"TOGGLES": {"enablehttpdebugapi": false}}"#, DebugAccess::Nobody),
        (r#"{"Toggles": {"EnableHTTPDebugAPI": false}, "DebugAccess": "loopback"}"#, DebugAccess::Loopback),
    ] {
        let file = file(text).unwrap();
        assert_eq!(file.notices, [], "{text}");
        let flags = Flags { manifests: Some("dir".into()), ..Flags::default() };
        let settings = Settings::resolve(flags, file, None, &host()).unwrap();
        assert_eq!(settings.debug_access, access, "{text}");
    }
    assert!(file(r#"{"Toggles": {"EnableHTTPDebugAPI": "no"}}"#).is_err());
}

#[test]
fn unknown_keys_are_named_and_ignored() {
    let file = file(r#"{"Nodes": "x", "Toggles": {"Fly": true}, "PlaceAzureChainFirst": true, "Node": "n"}"#)
        .unwrap();
    assert_eq!(file.node.as_deref(), Some("n"));
    assert_eq!(file.placement, None, "the toggle counts under Toggles only, as in Azure NPM");
    let named: Vec<&str> = file.notices.iter().map(|notice| notice.key.as_str()).collect();
    assert_eq!(named, ["Nodes", "PlaceAzureChainFirst", "Toggles.Fly"]);
    assert!(file.notices.iter().all(|notice| notice.reason.contains("does not know")));
}

#[test]
fn what_cannot_be_meant_is_an_error_that_names_the_key() {
    for (text, expected) in [
        ("", "config file npm.json is not JSON: EOF while parsing a value at line 1 column 0"),
        ("[]", "config file npm.json: the file must be an object, not an array"),
        (r#"{"Toggles": true}"#, "config file npm.json: Toggles must be an object, not true"),
        (
            r#"{"Toggles": {"PlaceAzureChainFirst": "false"}}"#,
            r#"config file npm.json: Toggles.PlaceAzureChainFirst must be true or false, not "false""#,
        ),
        (r#"{"Node": []}"#, "config file npm.json: Node must be a string, not an array"),
        (r#"{"Node": ""}"#, r#"config file npm.json: Node: "" is no node name"#),
        (r#"{"LogLevel": 3}"#, "config file npm.json: LogLevel must be a string, not 3"),
        (
            r#"{"LogLevel": "loud"}"#,
            r#"config file npm.json: LogLevel: "loud" is none of info, error, warn, debug, trace"#,
        ),
        (
            r#"{"ListeningPort": 65536}"#,
            "config file npm.json: ListeningPort must be a whole number from 0 to 65535, not 65536",
        ),
        (
            r#"{"Backend": "nftables"}"#,
            r#"config file npm.json: Backend: "nftables" is none of iptables, ebpf"#,
        ),
        (
            r#"{"ListeningAddress": "all"}"#,
            r#"config file npm.json: ListeningAddress: "all" is no IP address"#,
        ),
        (r#"{"WatchTimeout": "10ms"}"#, "config file npm.json: WatchTimeout: at least 1s is needed"),
        (r#"{"VerifyInterval": "1ms"}"#, "config file npm.json: VerifyInterval: at least 100ms is needed"),
        (
            r#"{"ExcludeInterfaces": "eth["}"#,
            r#"config file npm.json: ExcludeInterfaces: "eth[" is no pattern of interface names: invalid range pattern"#,
        ),
        (
            r#"{"ProofBit": "0x3000000"}"#,
            "config file npm.json: ProofBit: \"0x3000000\" is not one bit of a connection mark, as 0x1000000; 0xe00 (ours) \
             and 0xc000 (kube-proxy's) are taken by packet marks",
        ),
        (r#"{"ProofBit": 16777216}"#, "config file npm.json: ProofBit must be a string, not 16777216"),
        (r#"{"PodStartup": "wait"}"#, r#"config file npm.json: PodStartup: "wait" is none of allow, hold"#),
        (
            r#"{"PodInterfaces": "*"}"#,
            r#"config file npm.json: PodInterfaces: "*" does not say which interfaces lead to pods: a name, or the beginning of one, is needed"#,
        ),
        (r#"{"Socket": ""}"#, "config file npm.json: Socket: an empty path"),
        (
            r#"{"Node": "a", "node": "b"}"#,
            "config file npm.json: node is given twice, in different spellings",
        ),
    ] {
        assert_eq!(message(&file(text).unwrap_err()), expected);
    }
}

#[test]
fn a_file_that_is_named_and_not_there_is_an_error() {
    let flags = Flags { config: Some("/nonexistent/npm.json".into()), ..manifests() };
    let error = Settings::load(flags, &host()).unwrap_err();
    assert!(message(&error).starts_with("cannot read config file /nonexistent/npm.json: "), "{error}");
}

#[test]
fn every_key_is_known_by_one_name() {
    for (index, key) in keys::KEYS.iter().enumerate() {
        assert!(
            keys::KEYS[..index].iter().all(|other| !other.name.eq_ignore_ascii_case(key.name)),
            "{} is there twice",
            key.name
        );
    }
}

#[test]
fn a_proof_bit_is_one_bit_that_means_nothing_else() {
    for (text, mask) in [("0x1000000", 0x0100_0000), ("0X80", 0x80), ("1", 1), ("2147483648", 1 << 31)] {
        assert_eq!(value::parse_proof_bit(text).map(ProofBit::mask), Ok(mask), "{text}");
    }
    for text in [
        "",
        "0",
        "0x0",
        "3",
        "0x100",
        "0x200",
        "0x2000",
        "0x4000",
        "0x8000",
        "0x100000000",
        "1000000h",
        "-1",
        "0x",
    ] {
        assert!(value::parse_proof_bit(text).is_err(), "{text}");
    }
}
