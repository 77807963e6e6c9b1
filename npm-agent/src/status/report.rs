//! The status as data, and as JSON. Field names are an interface: scripts read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use npm_policy::goal::Goal;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::backend::Degraded;
use crate::escape::{Effect, Escape};

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Whether the source has to re-read everything before the answer.
    #[serde(default)]
    pub refresh: bool,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// The question could not be answered.
    Error {
        /// Why.
        error: String,
    },
    /// How things stand.
    Status(Box<Report>),
}

/// A [`Status`] with what follows from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether everything that was seen is enforced: `reasons` is empty.
    pub ready: bool,
    /// Why it is not ready, for people.
    pub reasons: Vec<String>,
    /// The rest.
    #[serde(flatten)]
    pub status: Status,
}

impl From<Status> for Report {
    fn from(status: Status) -> Self {
        let reasons = status.reasons(status.generation);
        Self { ready: reasons.is_empty(), reasons, status }
    }
}

/// How things stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// The node it programs.
    pub node: String,
    /// Its name.
    pub instance: String,
    /// When it started.
    #[serde(with = "unix_millis")]
    pub started: SystemTime,
    /// How its configuration makes it differ from what the API promises.
    pub known_differences: Vec<String>,
    /// The source.
    pub source: SourceStatus,
    /// What the compiler warns of.
    pub warnings: Vec<String>,
    /// What the source has told of.
    pub world: WorldStatus,
    /// The number of the newest goal; 0 before the source is in sync.
    pub generation: u64,
    /// The backends.
    pub backends: Vec<BackendStatus>,
    /// Why traffic of the node escapes judgement, or may; the worst first.
    #[serde(default)]
    pub escapes: Vec<EscapeStatus>,
}

impl Status {
    /// What stands between this state and one in which every backend has programmed goal `wanted` (or the first
    /// one, for 0) or a newer one, and keeps it so.
    pub fn reasons(&self, wanted: u64) -> Vec<String> {
        let wanted = wanted.max(1);
        let mut reasons = Vec::new();
        let SourceStatus { in_sync, unread, problems: _, watches } = &self.source;
        if !unread.is_empty() {
            let held = self.backends.iter().any(|backend| backend.inherited);
            let so = match held {
                true => "what an earlier process programmed stays in force",
                false => "what could be read is enforced",
            };
            reasons.push(format!("not readable since the start: {}; {so}", unread.join(", ")));
        } else if !in_sync {
            reasons.push("the source is not in sync".to_owned());
        }
        for WatchStatus { name, unwatched_ms, last_error, .. } in watches {
            let error = last_error.as_ref();
            match (in_sync, error) {
                (false, Some(error)) => reasons.push(format!("{name} can't be read: {error}")),
                (true, _) if *unwatched_ms > MAX_UNWATCHED_MS => {
                    let (seconds, error) = (unwatched_ms / 1000, error.map_or("being read", String::as_str));
                    reasons.push(format!(
                        "{name}: not watched for {seconds} s: {error}; what is known stays in force"
                    ));
                }
                (false, None) | (true, _) => {}
            }
        }
        for backend in &self.backends {
            let name = &backend.name;
            if backend.generation < wanted {
                reasons.push(format!("{name}: goal {} of {wanted} is programmed", backend.generation));
            }
            if let Some(error) = &backend.last_error {
                reasons.push(format!("{name}: failed {} times, last: {error}", backend.consecutive_failures));
            }
            let BackendStatus { unverified_ms, stale_after_ms, attempt_ms, .. } = *backend;
            if let Some(attempt_ms) = attempt_ms.filter(|attempt_ms| *attempt_ms > stale_after_ms) {
                reasons.push(format!("{name}: one attempt has been under way for {} s", attempt_ms / 1000));
            }
            if unverified_ms > stale_after_ms {
                let (since, most) = (unverified_ms / 1000, stale_after_ms / 1000);
                reasons.push(format!("{name}: not read back for {since} s, {most} s at most is normal"));
            }
        }
        // Where no policy selects a pod of this node, nothing is to be judged. What only may escape, or is judged too
        // strictly, is no failure of this agent to enforce what it has seen.
        if self.world.local_subjects > 0 {
            let unjudged = self.escapes.iter().filter(|escape| escape.effect == Effect::Unjudged);
            reasons.extend(unjudged.map(|escape| format!("not judged: {}", escape.what)));
        }
        reasons
    }
}

/// How the source stands.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Whether everything that was there at its start has been read.
    pub in_sync: bool,
    /// What of that could not be read yet, though the rest was: files, sorted.
    #[serde(default)]
    pub unread: Vec<String>,
    /// Objects that it could not take as they are, by origin.
    pub problems: Vec<ObjectProblem>,
    /// Its watches, if it watches an API server.
    #[serde(default)]
    pub watches: Vec<WatchStatus>,
}

/// How a watch of an API server stands.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WatchStatus {
    /// What is watched, as `pods`.
    pub name: String,
    /// Whether changes come as they happen.
    pub following: bool,
    /// For how long they have not, in milliseconds; 0 while they do.
    pub unwatched_ms: u64,
    /// Failed attempts since the agent's start.
    pub failures: u64,
    /// How often everything was read.
    pub lists: u64,
    /// Why it fails, if it does.
    pub last_error: Option<String>,
}

/// How long a watch may fail before the agent is not ready: a server that is replaced is back sooner.
pub const MAX_UNWATCHED_MS: u64 = 60_000;

/// Something that a source could not take as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectProblem {
    /// The file or watch.
    pub origin: String,
    /// The object.
    pub object: String,
    /// What is wrong and what was done instead.
    pub message: String,
}

/// How much there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WorldStatus {
    /// Pods of all nodes.
    pub pods: usize,
    /// Namespaces that were seen.
    pub namespaces: usize,
    /// Policies.
    pub policies: usize,
    /// Pods of this node that some policy selects.
    pub local_subjects: usize,
}

/// How a backend stands.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Its name.
    pub name: String,
    /// The number of the goal that the kernel has; 0: none of this process.
    pub generation: u64,
    /// Whether the kernel has what an earlier process programmed: nothing was applied since.
    #[serde(default)]
    pub inherited: bool,
    /// Goals applied.
    pub applies: u64,
    /// The last of them.
    pub last_apply: Option<LastApply>,
    /// Read-backs.
    pub verifies: u64,
    /// The last of them.
    #[serde(with = "unix_millis_option")]
    pub last_verify: Option<SystemTime>,
    /// How long ago the kernel was last known to be as it should: the last apply or read-back that succeeded, or the
    /// start. In milliseconds.
    #[serde(default)]
    pub unverified_ms: u64,
    /// How long the attempt under way has taken so far, in milliseconds.
    #[serde(default)]
    pub attempt_ms: Option<u64>,
    /// How long either may be before the backend is not ready, in milliseconds.
    #[serde(default)]
    pub stale_after_ms: u64,
    /// Failures since it started.
    pub failures: u64,
    /// Failures in a row, until now.
    pub consecutive_failures: u32,
    /// The last of these.
    pub last_error: Option<String>,
    /// Things that someone else had changed and that were repaired.
    pub drift_repairs: u64,
    /// Policies that allow less than they say.
    pub degraded: Vec<DegradedStatus>,
    /// How much of the goal is programmed.
    pub size: Size,
}

/// What an apply did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastApply {
    /// When it began.
    #[serde(with = "unix_millis")]
    pub at: SystemTime,
    /// How long it took.
    pub duration_ms: u64,
    /// Set members and sets written.
    pub set_writes: usize,
    /// Chains written.
    pub rule_writes: usize,
}

/// A policy that allows less than it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DegradedStatus {
    /// `namespace/name`.
    pub policy: String,
    /// Why.
    pub reason: String,
}

impl From<Degraded> for DegradedStatus {
    fn from(Degraded { policy, reason }: Degraded) -> Self {
        Self { policy: policy.to_string(), reason }
    }
}

/// Why traffic of the node escapes judgement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EscapeStatus {
    /// Its name.
    pub name: String,
    /// What it does to traffic that policies are about.
    pub effect: Effect,
    /// The reason, for people.
    pub what: String,
    /// What to do about it, for people.
    pub remedy: String,
}

impl From<(Effect, Escape)> for EscapeStatus {
    fn from((effect, escape): (Effect, Escape)) -> Self {
        Self {
            name: escape.name().to_owned(),
            effect,
            what: escape.to_string(),
            remedy: escape.remedy().to_owned(),
        }
    }
}

/// How large a goal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Size {
    /// Sets.
    pub sets: usize,
    /// Their members, of both families.
    pub members: usize,
    /// Policies that select pods of this node.
    pub policies: usize,
    /// Their ingress and egress rules.
    pub rules: usize,
}

impl Size {
    /// Of this goal.
    pub fn of(goal: &Goal) -> Self {
        let rules = |clauses: &Option<Vec<_>>| clauses.as_ref().map_or(0, Vec::len);
        Self {
            sets: goal.sets.len(),
            members: goal.sets.iter().map(|(_, set)| set.v4.len() + set.v6.len()).sum(),
            policies: goal.programs.len(),
            rules: goal
                .programs
                .iter()
                .map(|(_, program)| rules(&program.ingress) + rules(&program.egress))
                .sum(),
        }
    }
}

/// A time as milliseconds since 1970.
mod unix_millis {
    use super::{Deserialize, Deserializer, Duration, Serializer, SystemTime, UNIX_EPOCH};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
        // A clock before 1970 is a clock that was never set; 0 says as much.
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        serializer.serialize_u64(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemTime, D::Error> {
        let millis = u64::deserialize(deserializer)?;
        UNIX_EPOCH
            .checked_add(Duration::from_millis(millis))
            .ok_or_else(|| serde::de::Error::custom("time out of range"))
    }
}

/// A time as milliseconds since 1970, or null.
mod unix_millis_option {
    use super::{Deserialize, Deserializer, Serialize, Serializer, SystemTime, unix_millis};

    #[derive(Serialize, Deserialize)]
    struct Millis(#[serde(with = "unix_millis")] SystemTime);

    pub(super) fn serialize<S: Serializer>(
        time: &Option<SystemTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        time.map(Millis).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        Ok(Option::<Millis>::deserialize(deserializer)?.map(|Millis(time)| time))
    }
}
