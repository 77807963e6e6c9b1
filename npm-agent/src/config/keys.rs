//! The keys of the config file, Azure NPM's and ours, and what each means to this agent.
//!
//! Azure NPM's are those of `npm/config/config.go` (v1.6); a ConfigMap written for it is valid here.

use std::fmt;

/// A key of the config file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name, with its parent's: `Toggles.PlaceAzureChainFirst`. Case does not matter.
    pub name: &'static str,
    /// What it means.
    pub meaning: Meaning,
}

/// What a key means.
#[derive(Clone, Copy, Debug)]
pub enum Meaning {
    /// A setting.
    Setting(Setting),
    /// Nothing: warned of.
    Nothing {
        /// Why.
        reason: &'static str,
    },
}

/// The settings that a config file can make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// `--backend`.
    Backend,
    /// `--source`.
    Source,
    /// `--manifests`.
    Manifests,
    /// `--kubeconfig`.
    Kubeconfig,
    /// `--watch-timeout`.
    WatchTimeout,
    /// `--listening-address`.
    ListeningAddress,
    /// `--listening-port`.
    ListeningPort,
    /// Whether the HTTP server answers Prometheus: it has no flag, because operators know the toggle.
    EnablePrometheusMetrics,
    /// `--debug-access`.
    DebugAccess,
    /// Whether there is a debug API at all: it has no flag, because operators know the toggle.
    EnableHttpDebugApi,
    /// `--node`.
    Node,
    /// `--instance`.
    Instance,
    /// `--socket`.
    Socket,
    /// `--iptables-variant`.
    IptablesVariant,
    /// Where the jump stands: it has no flag, because operators know the toggle.
    PlaceAzureChainFirst,
    /// `--exclude-interfaces`.
    ExcludeInterfaces,
    /// `--proof-bit`.
    ProofBit,
    /// `--denied-connections`.
    DeniedConnections,
    /// `--log-denied`.
    LogDenied,
    /// `--pod-startup`.
    PodStartup,
    /// `--pod-interfaces`.
    PodInterfaces,
    /// `--verify-interval`.
    VerifyInterval,
    /// `--log-level`.
    LogLevel,
    /// `--log-format`.
    LogFormat,
}

impl Setting {
    /// The flag that says the same.
    pub fn flag(self) -> Option<&'static str> {
        match self {
            Self::Backend => Some("backend"),
            Self::Source => Some("source"),
            Self::Manifests => Some("manifests"),
            Self::Kubeconfig => Some("kubeconfig"),
            Self::WatchTimeout => Some("watch-timeout"),
            Self::ListeningAddress => Some("listening-address"),
            Self::ListeningPort => Some("listening-port"),
            Self::EnablePrometheusMetrics => None,
            Self::DebugAccess => Some("debug-access"),
            Self::EnableHttpDebugApi => None,
            Self::Node => Some("node"),
            Self::Instance => Some("instance"),
            Self::Socket => Some("socket"),
            Self::IptablesVariant => Some("iptables-variant"),
            Self::PlaceAzureChainFirst => None,
            Self::ExcludeInterfaces => Some("exclude-interfaces"),
            Self::ProofBit => Some("proof-bit"),
            Self::DeniedConnections => Some("denied-connections"),
            Self::LogDenied => Some("log-denied"),
            Self::PodStartup => Some("pod-startup"),
            Self::PodInterfaces => Some("pod-interfaces"),
            Self::VerifyInterval => Some("verify-interval"),
            Self::LogLevel => Some("log-level"),
            Self::LogFormat => Some("log-format"),
        }
    }
}

/// A JSON type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Boolean,
    /// A whole number from 0 to 65535.
    Port,
    /// A string.
    Text,
    /// An object.
    Object,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boolean => "true or false",
            Self::Port => "a whole number from 0 to 65535",
            Self::Text => "a string",
            Self::Object => "an object",
        })
    }
}

/// The keys that hold other keys.
pub const PARENTS: [&str; 2] = ["Toggles", "Transport"];

const WINDOWS: &str = "it is for Windows nodes, which npm-agent does not run on";
const FAN_OUT: &str = "there is no separate control plane that fans out to the nodes";
const MERGED: &str = "changes that come while the kernel is being programmed are merged by themselves";

/// All keys, Azure NPM's first.
pub const KEYS: &[Key] = &[
    nothing(
        "ResyncPeriodInMinutes",
        "objects are watched, not listed again; the kernel is verified every VerifyInterval",
    ),
    setting("ListeningPort", Setting::ListeningPort),
    setting("ListeningAddress", Setting::ListeningAddress),
    nothing("Transport.Address", FAN_OUT),
    nothing("Transport.Port", FAN_OUT),
    nothing("Transport.ServicePort", FAN_OUT),
    nothing("WindowsNetworkName", WINDOWS),
    nothing("ApplyMaxBatches", WINDOWS),
    nothing("ApplyDataPlaneMaxBatches", WINDOWS),
    nothing("ApplyIntervalInMilliseconds", WINDOWS),
    nothing("MaxBatchedACLsPerPod", WINDOWS),
    nothing("MaxPendingNetPols", MERGED),
    nothing("NetPolInvervalInMilliseconds", MERGED),
    setting("LogLevel", Setting::LogLevel),
    setting("Toggles.EnablePrometheusMetrics", Setting::EnablePrometheusMetrics),
    nothing("Toggles.EnablePprof", "it is a profiler of the Go runtime"),
    setting("Toggles.EnableHTTPDebugAPI", Setting::EnableHttpDebugApi),
    nothing("Toggles.EnableV2NPM", "there is one implementation only"),
    setting("Toggles.PlaceAzureChainFirst", Setting::PlaceAzureChainFirst),
    nothing("Toggles.ApplyIPSetsOnNeed", "only sets that a programmed rule uses are ever made"),
    nothing("Toggles.ApplyInBackground", WINDOWS),
    nothing("Toggles.NetPolInBackground", MERGED),
    nothing("Toggles.EnableNPMLite", "every policy is enforced whole"),
    setting("Backend", Setting::Backend),
    setting("Source", Setting::Source),
    setting("Manifests", Setting::Manifests),
    setting("Kubeconfig", Setting::Kubeconfig),
    setting("WatchTimeout", Setting::WatchTimeout),
    setting("DebugAccess", Setting::DebugAccess),
    setting("Node", Setting::Node),
    setting("Instance", Setting::Instance),
    setting("Socket", Setting::Socket),
    setting("IptablesVariant", Setting::IptablesVariant),
    setting("ExcludeInterfaces", Setting::ExcludeInterfaces),
    setting("ProofBit", Setting::ProofBit),
    setting("DeniedConnections", Setting::DeniedConnections),
    setting("LogDenied", Setting::LogDenied),
    setting("PodStartup", Setting::PodStartup),
    setting("PodInterfaces", Setting::PodInterfaces),
    setting("VerifyInterval", Setting::VerifyInterval),
    setting("LogFormat", Setting::LogFormat),
];

const fn setting(name: &'static str, setting: Setting) -> Key {
    Key { name, meaning: Meaning::Setting(setting) }
}

const fn nothing(name: &'static str, reason: &'static str) -> Key {
    Key { name, meaning: Meaning::Nothing { reason } }
}
