//! What `npm-agent run` is to do: flags over environment over config file over defaults, resolved once at start.
//!
//! [`Flags`] is the one list of settings that clap reads (it takes care of the environment), [`file::File`] is
//! what the config file says, and [`Settings`] is the outcome, in which nothing is missing. `docs/configuration.md`
//! is this file for operators; a test holds the two together.

pub mod duration;
pub mod file;
pub mod keys;
pub mod value;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use npm_common::mark::ProofBit;

use self::duration::parse_duration;
use self::file::{File, Notice};
use self::value::{
    BackendKind, ChainPlacement, DebugAccess, DeniedConnections, IptablesVariant, LogDenied, LogFormat,
    LogLevel, PodStartup, Scraping, SourceKind,
};
use crate::interfaces::pods::PodInterfaces;
use crate::interfaces::select::Selection;

/// Where a config file is looked for when none is named: where Azure NPM's DaemonSet mounts its ConfigMap, then
/// where Azure NPM itself looks (`npm/config/config.go`).
pub const DEFAULT_FILES: [&str; 2] =
    ["/etc/azure-npm/azure-npm.json", "/etc/azure/azure-vnet/azure-npm.json"];

/// The directory of status sockets and locks.
pub const RUN_DIRECTORY: &str = "/run/npm-agent";

/// The instance name where none is given.
pub const DEFAULT_INSTANCE: &str = "npm-agent";

/// How often the kernel's state is read back where nothing else is said.
pub const DEFAULT_VERIFY_INTERVAL: Duration = Duration::from_secs(30);

/// How long a watch lasts where nothing else is said: load balancers cut connections that are silent for longer
/// (Azure's and Google's after 4 and 10 minutes).
pub const DEFAULT_WATCH_TIMEOUT: Duration = Duration::from_secs(290);

/// The shortest `--watch-timeout`.
pub const MIN_WATCH_TIMEOUT: Duration = Duration::from_secs(1);

/// Where the HTTP server listens, as Azure NPM's.
pub const DEFAULT_LISTENING_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// The HTTP server's port, Azure NPM's.
pub const DEFAULT_LISTENING_PORT: u16 = 10091;

/// The shortest `--verify-interval`: a read-back of a large node takes a good part of a second.
pub const MIN_VERIFY_INTERVAL: Duration = Duration::from_millis(100);

/// The flags of `npm-agent run`, as given: `None` is "not said", so that the config file can say it.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Flags {
    /// Config file: Azure NPM's JSON with our keys
    ///
    /// Flags and environment variables win over it; keys that it does not have keep their defaults.
    /// [default: /etc/azure-npm/azure-npm.json, else /etc/azure/azure-vnet/azure-npm.json, if there is one]
    #[arg(long, env = "NPM_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// What programs the kernel: iptables or ebpf
    ///
    /// iptables: iptables and ipset, in Azure NPM's chains and sets. ebpf: programs at the egress of every interface,
    /// on the kernel's own connection tracking.
    /// [default: iptables]
    #[arg(long, env = "NPM_BACKEND", value_name = "BACKEND")]
    pub backend: Option<BackendKind>,

    /// Where the cluster's objects come from: manifests or kube
    ///
    /// manifests: plain Kubernetes YAML or JSON files in the directory --manifests, watched for changes. kube: the
    /// cluster's API server, watched. [default: manifests]
    #[arg(long, env = "NPM_SOURCE", value_name = "SOURCE")]
    pub source: Option<SourceKind>,

    /// Directory with the manifests of --source manifests
    ///
    /// Namespaces, Pods (with status.podIP and spec.nodeName) and NetworkPolicies.
    #[arg(long, env = "NPM_MANIFESTS", value_name = "DIR")]
    pub manifests: Option<PathBuf>,

    /// How --source kube reaches the API server: the current context of this kubeconfig file
    ///
    /// Read again when a watch fails. [default: the pod's service account]
    #[arg(long, env = "NPM_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// How long --source kube lets one watch last before it asks anew; a server silent for longer is taken for dead
    ///
    /// A number with a unit: 30s, 5m; at least 1s; up to a quarter longer, at random. [default: 290s]
    #[arg(long, env = "NPM_WATCH_TIMEOUT", value_name = "DURATION", value_parser = parse_watch_timeout)]
    pub watch_timeout: Option<Duration>,

    /// Address of the HTTP server: the status page, /healthz, /readyz, /node-metrics, /cluster-metrics, /debug/
    ///
    /// Of either family; :: is all addresses of both. [default: 0.0.0.0]
    #[arg(long, env = "NPM_LISTENING_ADDRESS", value_name = "IP", value_parser = value::parse_address)]
    pub listening_address: Option<IpAddr>,

    /// Port of the HTTP server; 0: no HTTP server
    ///
    /// [default: 10091]
    #[arg(long, env = "NPM_LISTENING_PORT", value_name = "PORT")]
    pub listening_port: Option<u16>,

    /// Who may see what policies say, over HTTP: loopback, anyone or nobody
    ///
    /// The status page with its verdicts, /debug/ and /npm/v1/debug/manager: names, labels and addresses of the whole
    /// cluster's pods. Probes and metrics are for whoever reaches the port. [default: loopback]
    #[arg(long, env = "NPM_DEBUG_ACCESS", value_name = "WHO")]
    pub debug_access: Option<DebugAccess>,

    /// This node's name, as in the pods' spec.nodeName
    ///
    /// Only policies that select pods of this node are programmed.
    /// [default: the environment variable HOSTNAME, else the kernel's host name]
    #[arg(long, env = "NPM_NODE", value_name = "NAME", value_parser = value::parse_node)]
    pub node: Option<String>,

    /// Name of this agent among several on one machine (in network namespaces of their own)
    ///
    /// Lower-case letters, digits, '-' and '.'. [default: npm-agent]
    #[arg(long, env = "NPM_INSTANCE", value_name = "NAME", value_parser = value::parse_instance)]
    pub instance: Option<String>,

    /// Unix socket that answers `npm-agent status`
    ///
    /// Only its owner can connect. [default: /run/npm-agent/INSTANCE.sock]
    #[arg(long, env = "NPM_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Which iptables to program: auto, nft or legacy
    ///
    /// auto: the one that kubelet and kube-proxy use on this node. [default: auto]
    #[arg(long, env = "NPM_IPTABLES_VARIANT", value_name = "VARIANT")]
    pub iptables_variant: Option<IptablesVariant>,

    /// Interfaces that the eBPF backend leaves alone: patterns of names, with commas between them
    ///
    /// `*`, `?` and `[abc]` as in file names: docker*,mgmt0. What leaves through them is judged by nobody. The loopback
    /// is left alone in any case. (The iptables backend judges in FORWARD, whatever the interface.) [default: none]
    #[arg(
        long,
        env = "NPM_EXCLUDE_INTERFACES",
        value_name = "PATTERNS",
        value_parser = value::parse_interfaces
    )]
    pub exclude_interfaces: Option<Selection>,
    /// The bit of connection marks that says "judged and allowed": 0x1000000
    ///
    /// One bit, as a hexadecimal or decimal number, which nothing else on the node may write. [default: 0x1000000]
    #[arg(long, env = "NPM_PROOF_BIT", value_name = "BIT", value_parser = value::parse_proof_bit)]
    pub proof_bit: Option<ProofBit>,

    /// What becomes of established connections that policies deny by now: keep or cut
    ///
    /// cut: their packets are dropped, both ways, once the policies are programmed. It makes every forwarded packet
    /// pass two more rules, and takes the bit above --proof-bit as well. [default: keep]
    #[arg(long, env = "NPM_DENIED_CONNECTIONS", value_name = "WHAT")]
    pub denied_connections: Option<DeniedConnections>,

    /// Whether denied flows are logged, with the names of pods and policies: never or flows
    ///
    /// flows: a line for each flow, at most 10 a second; the eBPF backend only. They are counted in any case.
    /// [default: never]
    #[arg(long, env = "NPM_LOG_DENIED", value_name = "WHAT")]
    pub log_denied: Option<LogDenied>,

    /// What becomes of a new pod's traffic before its policies are programmed: allow or hold
    ///
    /// hold: behind --pod-interfaces, an address that is not known to be a pod's of this node, with its policies
    /// programmed, reaches its own node only, and only the node reaches it; also while no agent runs. [default: allow]
    #[arg(long, env = "NPM_POD_STARTUP", value_name = "WHAT")]
    pub pod_startup: Option<PodStartup>,

    /// The interfaces that lead to pods, for --pod-startup hold: names, with commas between them
    ///
    /// A `*` at the end of a name stands for whatever follows. [default: azv*,cali*,veth*,cbr0,cni0]
    #[arg(
        long,
        env = "NPM_POD_INTERFACES",
        value_name = "NAMES",
        value_parser = value::parse_pod_interfaces
    )]
    pub pod_interfaces: Option<PodInterfaces>,

    /// How often to read back the kernel's state and repair what others changed
    ///
    /// A number with a unit: 500ms, 30s, 5m, 1h; at least 100ms. [default: 30s]
    #[arg(long, env = "NPM_VERIFY_INTERVAL", value_name = "DURATION", value_parser = parse_verify_interval)]
    pub verify_interval: Option<Duration>,

    /// Least severe log records to write: error, warn, info, debug or trace
    ///
    /// error: not enforcing, a person must act. warn: enforcing, but look. info: what changed. [default: info]
    #[arg(long, env = "NPM_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,

    /// How logs look on standard error: auto, human or json
    ///
    /// auto: human on a terminal, JSON (one object a line) otherwise. [default: auto]
    #[arg(long, env = "NPM_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// What the agent is to do; nothing is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What programs the kernel.
    pub backend: BackendKind,
    /// Where the objects come from.
    pub source: Source,
    /// Where the HTTP server listens; `None`: there is none.
    pub listening: Option<SocketAddr>,
    /// Whether it answers Prometheus.
    pub scraping: Scraping,
    /// Whom it shows what policies say.
    pub debug_access: DebugAccess,
    /// This node's name.
    pub node: String,
    /// This agent's name.
    pub instance: String,
    /// The status socket.
    pub socket: PathBuf,
    /// Which iptables.
    pub iptables_variant: IptablesVariant,
    /// Where the jump to our chains stands.
    pub placement: ChainPlacement,
    /// Which interfaces need the eBPF program.
    pub interfaces: Selection,
    /// The bit of connection marks that is the proof of an allowed connection.
    pub proof: ProofBit,
    /// What becomes of established connections that policies deny by now.
    pub denied_connections: DeniedConnections,
    /// Whether denied flows are logged.
    pub log_denied: LogDenied,
    /// What becomes of a pod's traffic before its policies are programmed.
    pub pod_startup: PodStartup,
    /// Which interfaces lead to pods.
    pub pod_interfaces: PodInterfaces,
    /// The time between two read-backs.
    pub verify_interval: Duration,
    /// Which log records to write.
    pub log_level: LogLevel,
    /// How they look.
    pub log_format: LogFormat,
    /// The config file that was read.
    pub file: Option<PathBuf>,
    /// What to say about the config file once logging runs.
    pub notices: Vec<Notice>,
}

/// A source, with what it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// A cluster's API server.
    Kube {
        /// The credentials; `None`: the pod's service account.
        kubeconfig: Option<PathBuf>,
        /// How long one watch lasts.
        watch_timeout: Duration,
    },
}

/// The names that the machine gives the node, for where none is configured.
#[derive(Clone, Debug, Default)]
pub struct HostNames {
    /// The environment variable `HOSTNAME`.
    pub environment: Option<String>,
    /// `/proc/sys/kernel/hostname`.
    pub kernel: Option<String>,
}

impl HostNames {
    /// Asks the machine.
    pub fn of_this_machine() -> Self {
        // A name that is not there or not readable is simply not a candidate; that there is none is an error later.
        let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        Self { environment: std::env::var("HOSTNAME").ok(), kernel }
    }

    fn first(&self) -> Option<String> {
        let names = [&self.environment, &self.kernel];
        names.into_iter().flatten().map(|name| name.trim().to_owned()).find(|name| !name.is_empty())
    }
}

impl Settings {
    /// Reads the config file that `flags` or [`DEFAULT_FILES`] name and resolves everything.
    ///
    /// # Errors
    /// A named file is not there, the file can't be understood, or something needed is said nowhere.
    pub fn load(flags: Flags, host: &HostNames) -> Result<Self, ConfigError> {
        let (file, path) = read_file(flags.config.clone())?;
        Self::resolve(flags, file, path, host)
    }

    fn resolve(
        flags: Flags,
        file: File,
        path: Option<PathBuf>,
        host: &HostNames,
    ) -> Result<Self, ConfigError> {
        let instance = flags.instance.or(file.instance).unwrap_or_else(|| DEFAULT_INSTANCE.to_owned());
        let source = match flags.source.or(file.source).unwrap_or_default() {
            SourceKind::Manifests => {
                Source::Manifests(flags.manifests.or(file.manifests).ok_or(ConfigError::NoManifests)?)
            }
            SourceKind::Kube => Source::Kube {
                kubeconfig: flags.kubeconfig.or(file.kubeconfig),
                watch_timeout: flags.watch_timeout.or(file.watch_timeout).unwrap_or(DEFAULT_WATCH_TIMEOUT),
            },
        };
        let address = flags.listening_address.or(file.listening_address).unwrap_or(DEFAULT_LISTENING_ADDRESS);
        let port = flags.listening_port.or(file.listening_port).unwrap_or(DEFAULT_LISTENING_PORT);
        Ok(Self {
            backend: flags.backend.or(file.backend).unwrap_or_default(),
            source,
            listening: (port != 0).then_some(SocketAddr::new(address, port)),
            scraping: file.scraping.unwrap_or_default(),
            debug_access: flags.debug_access.or(file.debug_access).or(file.no_debug_api).unwrap_or_default(),
            node: flags.node.or(file.node).or_else(|| host.first()).ok_or(ConfigError::NoNode)?,
            socket: flags.socket.or(file.socket).unwrap_or_else(|| default_socket(&instance)),
            instance,
            iptables_variant: flags.iptables_variant.or(file.iptables_variant).unwrap_or_default(),
            placement: file.placement.unwrap_or_default(),
            interfaces: flags.exclude_interfaces.or(file.interfaces).unwrap_or_default(),
            proof: flags.proof_bit.or(file.proof).unwrap_or_default(),
            denied_connections: flags.denied_connections.or(file.denied_connections).unwrap_or_default(),
            log_denied: flags.log_denied.or(file.log_denied).unwrap_or_default(),
            pod_startup: flags.pod_startup.or(file.pod_startup).unwrap_or_default(),
            pod_interfaces: flags.pod_interfaces.or(file.pod_interfaces).unwrap_or_default(),
            verify_interval: flags
                .verify_interval
                .or(file.verify_interval)
                .unwrap_or(DEFAULT_VERIFY_INTERVAL),
            log_level: flags.log_level.or(file.log_level).unwrap_or_default(),
            log_format: flags.log_format.or(file.log_format).unwrap_or_default(),
            file: path,
            notices: file.notices,
        })
    }
}

/// What the config file says that is named, or else the one in the default place, and where it is; nothing if there is none.
///
/// # Errors
/// As [`File::read`].
pub(crate) fn read_file(named: Option<PathBuf>) -> Result<(File, Option<PathBuf>), ConfigError> {
    let path = named.or_else(|| DEFAULT_FILES.iter().map(PathBuf::from).find(|path| path.exists()));
    let file = path.as_deref().map(File::read).transpose()?;
    Ok((file.unwrap_or_default(), path))
}

/// The status socket of an instance for which no other is named.
pub fn default_socket(instance: &str) -> PathBuf {
    Path::new(RUN_DIRECTORY).join(format!("{instance}.sock"))
}

/// Reads a `--verify-interval`.
///
/// # Errors
/// It is no duration, or shorter than [`MIN_VERIFY_INTERVAL`].
pub fn parse_verify_interval(text: &str) -> Result<Duration, value::ValueError> {
    let interval = parse_duration(text)?;
    if interval < MIN_VERIFY_INTERVAL {
        return Err(value::ValueError::TooShort { minimum: MIN_VERIFY_INTERVAL });
    }
    Ok(interval)
}

/// Reads a `--watch-timeout`.
///
/// # Errors
/// It is no duration, or shorter than [`MIN_WATCH_TIMEOUT`].
pub fn parse_watch_timeout(text: &str) -> Result<Duration, value::ValueError> {
    let timeout = parse_duration(text)?;
    if timeout < MIN_WATCH_TIMEOUT {
        return Err(value::ValueError::TooShort { minimum: MIN_WATCH_TIMEOUT });
    }
    Ok(timeout)
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read config file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("config file {} is not JSON", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A value is of the wrong type.
    #[error("config file {}: {key} must be {expected}, not {found}", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The key, with its parent.
        key: String,
        /// What it must be.
        expected: keys::Kind,
        /// What is there.
        found: String,
    },
    /// A value means nothing.
    #[error("config file {}: {key}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with its parent.
        key: String,
        /// What is wrong with it.
        #[source]
        source: value::ValueError,
    },
    /// One key is there twice, in different spellings.
    #[error("config file {}: {key} is given twice, in different spellings", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// The source needs a directory.
    #[error(
        "source manifests needs a directory: --manifests, NPM_MANIFESTS, or Manifests in the config file"
    )]
    NoManifests,
    /// Nobody knows the node's name.
    #[error("this node's name is not known: --node, NPM_NODE, HOSTNAME, or Node in the config file")]
    NoNode,
}

#[cfg(test)]
mod tests;
