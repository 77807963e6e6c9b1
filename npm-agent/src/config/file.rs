//! Reading the config file: JSON to [`File`], every key of it accounted for.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use npm_common::mark::ProofBit;
use serde_json::{Map, Value};

use super::keys::{KEYS, Key, Kind, Meaning, PARENTS, Setting};
use super::value::{
    BackendKind, ChainPlacement, DebugAccess, DeniedConnections, IptablesVariant, LogDenied, LogFormat,
    LogLevel, PodStartup, Scraping, SourceKind, ValueError,
};
use super::{ConfigError, parse_verify_interval, parse_watch_timeout, value};
use crate::interfaces::pods::PodInterfaces;
use crate::interfaces::select::Selection;

/// What a config file says; `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// `Backend`.
    pub backend: Option<BackendKind>,
    /// `Source`.
    pub source: Option<SourceKind>,
    /// `Manifests`.
    pub manifests: Option<PathBuf>,
    /// `Kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `WatchTimeout`.
    pub watch_timeout: Option<Duration>,
    /// `ListeningAddress`.
    pub listening_address: Option<IpAddr>,
    /// `ListeningPort`.
    pub listening_port: Option<u16>,
    /// `Toggles.EnablePrometheusMetrics`.
    pub scraping: Option<Scraping>,
    /// `DebugAccess`.
    pub debug_access: Option<DebugAccess>,
    /// `Toggles.EnableHTTPDebugAPI`, where it is false: what holds unless [`File::debug_access`] says more.
    pub no_debug_api: Option<DebugAccess>,
    /// `Node`.
    pub node: Option<String>,
    /// `Instance`.
    pub instance: Option<String>,
    /// `Socket`.
    pub socket: Option<PathBuf>,
    /// `IptablesVariant`.
    pub iptables_variant: Option<IptablesVariant>,
    /// `Toggles.PlaceAzureChainFirst`.
    pub placement: Option<ChainPlacement>,
    /// `ExcludeInterfaces`.
    pub interfaces: Option<Selection>,
    /// `ProofBit`.
    pub proof: Option<ProofBit>,
    /// `DeniedConnections`.
    pub denied_connections: Option<DeniedConnections>,
    /// `LogDenied`.
    pub log_denied: Option<LogDenied>,
    /// `PodStartup`.
    pub pod_startup: Option<PodStartup>,
    /// `PodInterfaces`.
    pub pod_interfaces: Option<PodInterfaces>,
    /// `VerifyInterval`.
    pub verify_interval: Option<Duration>,
    /// `LogLevel`.
    pub log_level: Option<LogLevel>,
    /// `LogFormat`.
    pub log_format: Option<LogFormat>,
    /// Keys that do not do what their writer may expect, in the order of the file's keys.
    pub notices: Vec<Notice>,
}

/// A key that does not do what its writer may expect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The key, with its parent, as the file spells it.
    pub key: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.reason)
    }
}

impl File {
    /// Reads a file.
    ///
    /// # Errors
    /// It can't be read, is no JSON object, or a setting in it has a value that means nothing.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Understands the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// As [`File::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        // An editor on Windows may have put a byte order mark there; Azure NPM's ConfigMaps come from all kinds.
        let text = text.trim_start_matches('\u{feff}');
        let value = serde_json::from_str(text)
            .map_err(|source| ConfigError::Syntax { path: path.to_owned(), source })?;
        let mut reader = Reader { path, file: Self::default(), seen: BTreeSet::new() };
        let object = reader.object("the file", &value)?;
        reader.read(None, object)?;
        Ok(reader.file)
    }
}

/// A file that is being read.
struct Reader<'a> {
    path: &'a Path,
    file: File,
    /// The known keys that have been met.
    seen: BTreeSet<&'static str>,
}

impl Reader<'_> {
    fn read(&mut self, parent: Option<&str>, object: &Map<String, Value>) -> Result<(), ConfigError> {
        for (key, value) in object {
            // As Go's JSON reads it: null leaves what was there before, the default.
            let is_absent = value.is_null();
            if parent.is_none() && PARENTS.iter().any(|parent| parent.eq_ignore_ascii_case(key)) {
                if !is_absent {
                    let children = self.object(key, value)?;
                    self.read(Some(key), children)?;
                }
                continue;
            }
            let name = match parent {
                Some(parent) => format!("{parent}.{key}"),
                None => key.clone(),
            };
            match KEYS.iter().find(|known| known.name.eq_ignore_ascii_case(&name)) {
                Some(_) if is_absent => {}
                Some(known) => self.known(known, name, value)?,
                None => self.notice(name, "npm-agent does not know this key; it is ignored"),
            }
        }
        Ok(())
    }

    fn known(&mut self, key: &Key, name: String, value: &Value) -> Result<(), ConfigError> {
        if !self.seen.insert(key.name) {
            return Err(ConfigError::Twice { path: self.path.to_owned(), key: name });
        }
        match key.meaning {
            Meaning::Setting(setting) => self.setting(setting, &name, value),
            Meaning::Nothing { reason } => {
                self.notice(name, format!("ignored: {reason}"));
                Ok(())
            }
        }
    }

    fn setting(&mut self, setting: Setting, name: &str, value: &Value) -> Result<(), ConfigError> {
        match setting {
            Setting::Backend => self.file.backend = Some(self.parsed(name, value, str::parse)?),
            Setting::Source => self.file.source = Some(self.parsed(name, value, str::parse)?),
            Setting::Manifests => self.file.manifests = Some(self.parsed(name, value, path)?),
            Setting::Kubeconfig => self.file.kubeconfig = Some(self.parsed(name, value, path)?),
            Setting::WatchTimeout => {
                self.file.watch_timeout = Some(self.parsed(name, value, parse_watch_timeout)?);
            }
            Setting::ListeningAddress => {
                self.file.listening_address = Some(self.parsed(name, value, value::parse_address)?);
            }
            Setting::ListeningPort => {
                let port = value.as_u64().and_then(|port| u16::try_from(port).ok());
                let port = port.ok_or_else(|| self.wrong_type(name, Kind::Port, value))?;
                self.file.listening_port = Some(port);
            }
            Setting::EnablePrometheusMetrics => {
                self.file.scraping = Some(match self.boolean(name, value)? {
                    true => Scraping::Served,
                    false => Scraping::Refused,
                });
            }
            Setting::DebugAccess => self.file.debug_access = Some(self.parsed(name, value, str::parse)?),
            // Azure NPM's true lets everybody in, and stands in every ConfigMap of its: here it says no more than the
            // default does.
            Setting::EnableHttpDebugApi => {
                self.file.no_debug_api = (!self.boolean(name, value)?).then_some(DebugAccess::Nobody);
            }
            Setting::Node => self.file.node = Some(self.parsed(name, value, value::parse_node)?),
            Setting::Instance => {
                self.file.instance = Some(self.parsed(name, value, value::parse_instance)?)
            }
            Setting::Socket => self.file.socket = Some(self.parsed(name, value, path)?),
            Setting::IptablesVariant => {
                self.file.iptables_variant = Some(self.parsed(name, value, str::parse)?);
            }
            Setting::ExcludeInterfaces => {
                self.file.interfaces = Some(self.parsed(name, value, value::parse_interfaces)?);
            }
            Setting::ProofBit => self.file.proof = Some(self.parsed(name, value, value::parse_proof_bit)?),
            Setting::LogDenied => self.file.log_denied = Some(self.parsed(name, value, str::parse)?),
            Setting::DeniedConnections => {
                self.file.denied_connections = Some(self.parsed(name, value, str::parse)?);
            }
            Setting::PodStartup => self.file.pod_startup = Some(self.parsed(name, value, str::parse)?),
            Setting::PodInterfaces => {
                self.file.pod_interfaces = Some(self.parsed(name, value, value::parse_pod_interfaces)?);
            }
            Setting::VerifyInterval => {
                self.file.verify_interval = Some(self.parsed(name, value, parse_verify_interval)?);
            }
            Setting::LogLevel => self.file.log_level = Some(self.parsed(name, value, str::parse)?),
            Setting::LogFormat => self.file.log_format = Some(self.parsed(name, value, str::parse)?),
            Setting::PlaceAzureChainFirst => match self.boolean(name, value)? {
                true => self.file.placement = Some(ChainPlacement::First),
                false => {
                    self.file.placement = Some(ChainPlacement::AfterKubeServices);
                    self.notice(name.to_owned(), PLACED_BEHIND);
                }
            },
        }
        Ok(())
    }

    fn boolean(&self, key: &str, value: &Value) -> Result<bool, ConfigError> {
        value.as_bool().ok_or_else(|| self.wrong_type(key, Kind::Boolean, value))
    }

    fn parsed<T>(
        &self,
        key: &str,
        value: &Value,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Result<T, ConfigError> {
        let text = value.as_str().ok_or_else(|| self.wrong_type(key, Kind::Text, value))?;
        parse(text).map_err(|source| ConfigError::Value {
            path: self.path.to_owned(),
            key: key.to_owned(),
            source,
        })
    }

    fn object<'v>(&self, key: &str, value: &'v Value) -> Result<&'v Map<String, Value>, ConfigError> {
        value.as_object().ok_or_else(|| self.wrong_type(key, Kind::Object, value))
    }

    fn wrong_type(&self, key: &str, expected: Kind, found: &Value) -> ConfigError {
        let found = match found {
            Value::Array(_) => "an array".to_owned(),
            Value::Object(_) => "an object".to_owned(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => found.to_string(),
        };
        ConfigError::Type { path: self.path.to_owned(), key: key.to_owned(), expected, found }
    }

    fn notice(&mut self, key: String, reason: impl Into<String>) {
        self.file.notices.push(Notice { key, reason: reason.into() });
    }
}

/// What `PlaceAzureChainFirst: false` costs: Azure NPM's own continuous integration checks for it
/// (azure-container-networking, pull request 3420).
pub const PLACED_BEHIND: &str = "honoured: rules that stand before ours in FORWARD accept traffic of Services with \
     externalTrafficPolicy Cluster before policies are asked; remove the key or set it to true to close that";

fn path(text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() {
        return Err(ValueError::EmptyPath);
    }
    Ok(PathBuf::from(text))
}
