//! The objects with their versions, and the log that watches read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use npm_agent::source::convert::{Node, document};
use npm_policy::world::World;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::resource::Resource;

/// Where an object is: resource, namespace (empty: none), name.
pub(super) type Key = (&'static Resource, String, String);

/// An object as it was at its version.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) value: Value,
    pub(super) version: u64,
    text: OnceLock<Box<str>>,
}

impl Stored {
    /// Its JSON, which is made once: a real server has it in its cache, too.
    pub(super) fn text(&self) -> &str {
        self.text.get_or_init(|| self.value.to_string().into())
    }
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Happened {
    Added,
    Modified,
    Deleted,
}

/// An entry of the log.
#[derive(Clone, Debug)]
pub(super) struct Logged {
    pub(super) version: u64,
    pub(super) key: Key,
    pub(super) happened: Happened,
    /// Its last state where it was deleted, with the version of the deletion.
    pub(super) object: Arc<Stored>,
}

/// Why something can't be done, as an HTTP code and a reason of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreError {
    NotFound,
    AlreadyExists,
    Conflict,
    Invalid,
}

/// The cluster.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    /// The newest version; told to whoever watches.
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    /// Changes up to this version are not in the log any more.
    compacted: u64,
    objects: BTreeMap<Key, Arc<Stored>>,
    log: VecDeque<Logged>,
    uids: u64,
}

impl Default for Store {
    fn default() -> Self {
        let state = State { version: 100, compacted: 100, ..State::default() };
        Self { state: Mutex::new(state), newest: watch::channel(100).0 }
    }
}

/// A list of objects as policy sees them.
pub fn world_of(list: Value) -> World {
    let mut world = World::default();
    for object in document(Node::from(list)).objects {
        object.change.into_iter().for_each(|change| world.apply(change));
    }
    world
}

impl Store {
    /// Makes or replaces the object that this value is, and gives its version. The kind must be one that the server has.
    ///
    /// # Panics
    /// The value has no kind, or no name.
    pub fn put(&self, value: Value) -> u64 {
        let kind = value["kind"].as_str().expect("an object has a kind");
        let resource = Resource::of_kind(kind).expect("a resource that the server has");
        let key = key(resource, &value).expect("an object has a name");
        let mut state = self.lock();
        let value = match state.objects.get(&key) {
            Some(old) => kept_metadata(value, &old.value),
            None => state.completed(resource, value),
        };
        let version = state.write(key, Some(value));
        self.newest.send_replace(state.version);
        version
    }

    /// Makes the JSON of all objects now, ahead of the first list.
    pub fn prepare(&self) {
        let objects: Vec<Arc<Stored>> = self.lock().objects.values().cloned().collect();
        for object in &objects {
            object.text();
        }
    }

    /// Takes an object away, and gives the version of that; `None`: it was not there.
    pub fn remove(&self, plural: &str, namespace: &str, name: &str) -> Option<u64> {
        let resource = super::resource::RESOURCES.iter().find(|resource| resource.plural == plural)?;
        self.delete(&(resource, namespace.to_owned(), name.to_owned())).ok()
    }

    /// Forgets the log: whoever wants to go on from an older version has to list.
    pub fn compact(&self) {
        let mut state = self.lock();
        state.compacted = state.version;
        state.log.clear();
    }

    /// The newest version.
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// The cluster as policy sees it.
    pub fn world(&self) -> World {
        let objects: Vec<Value> = self.lock().objects.values().map(|stored| stored.value.clone()).collect();
        world_of(json!({"apiVersion": "v1", "kind": "List", "items": objects}))
    }

    pub(super) fn get(&self, key: &Key) -> Option<Arc<Stored>> {
        self.lock().objects.get(key).cloned()
    }

    /// All objects of a resource (in a namespace), in order, and the version that this is the state of.
    pub(super) fn list(
        &self,
        resource: &'static Resource,
        namespace: Option<&str>,
    ) -> (Vec<Arc<Stored>>, u64) {
        let state = self.lock();
        let objects = state.objects.iter().filter(|((of, within, _), _)| {
            *of == resource && namespace.is_none_or(|namespace| within == namespace)
        });
        (objects.map(|(_, stored)| Arc::clone(stored)).collect(), state.version)
    }

    /// What happened after a version; `None`: that is not known any more.
    pub(super) fn since(&self, version: u64) -> Option<(Vec<Logged>, u64)> {
        let state = self.lock();
        if version < state.compacted {
            return None;
        }
        let from = state.log.partition_point(|logged| logged.version <= version);
        Some((state.log.range(from..).cloned().collect(), state.version))
    }

    pub(super) fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    pub(super) fn create(&self, key: Key, value: Value) -> Result<Arc<Stored>, StoreError> {
        let mut state = self.lock();
        if state.objects.contains_key(&key) {
            return Err(StoreError::AlreadyExists);
        }
        let value = state.completed(key.0, value);
        state.write(key.clone(), Some(value));
        self.newest.send_replace(state.version);
        state.objects.get(&key).cloned().ok_or(StoreError::NotFound)
    }

    /// Replaces an object by what `change` makes of it.
    pub(super) fn update(
        &self,
        key: &Key,
        change: impl FnOnce(&Value) -> Option<Value>,
    ) -> Result<Arc<Stored>, StoreError> {
        let mut state = self.lock();
        let old = state.objects.get(key).cloned().ok_or(StoreError::NotFound)?;
        let new = change(&old.value).ok_or(StoreError::Invalid)?;
        let wanted = new["metadata"]["resourceVersion"].as_str();
        if wanted.is_some_and(|wanted| !wanted.is_empty() && wanted != old.version.to_string()) {
            return Err(StoreError::Conflict);
        }
        let new = kept_metadata(new, &old.value);
        if new == old.value {
            return Ok(old);
        }
        state.write(key.clone(), Some(new));
        self.newest.send_replace(state.version);
        state.objects.get(key).cloned().ok_or(StoreError::NotFound)
    }

    /// Deletes an object, and gives the version of that; a namespace takes along what is in it.
    pub(super) fn delete(&self, key: &Key) -> Result<u64, StoreError> {
        let mut state = self.lock();
        if !state.objects.contains_key(key) {
            return Err(StoreError::NotFound);
        }
        if key.0.kind == "Namespace" {
            let within = |(_, namespace, _): &&Key| *namespace == key.2;
            let inside: Vec<Key> = state.objects.keys().filter(within).cloned().collect();
            for key in inside {
                state.write(key, None);
            }
        }
        let version = state.write(key.clone(), None);
        self.newest.send_replace(state.version);
        Ok(version)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Writes an object, or its end, as the next version.
    fn write(&mut self, key: Key, value: Option<Value>) -> u64 {
        self.version += 1;
        let version = self.version;
        let stamped = |mut value: Value| {
            value["metadata"]["resourceVersion"] = json!(version.to_string());
            Arc::new(Stored { value, version, text: OnceLock::new() })
        };
        let (happened, object) = match value {
            Some(value) => {
                let object = stamped(value);
                let before = self.objects.insert(key.clone(), Arc::clone(&object));
                (if before.is_some() { Happened::Modified } else { Happened::Added }, object)
            }
            None => {
                let Some(old) = self.objects.remove(&key) else { return version };
                (Happened::Deleted, stamped(old.value.clone()))
            }
        };
        self.log.push_back(Logged { version, key, happened, object });
        version
    }

    /// What the server puts into an object that is made.
    fn completed(&mut self, resource: &Resource, mut value: Value) -> Value {
        self.uids += 1;
        value["apiVersion"] = json!(resource.api_version());
        value["kind"] = json!(resource.kind);
        let uid = format!("00000000-0000-4000-8000-{:012x}", self.uids);
        let name = value["metadata"]["name"].clone();
        let metadata = &mut value["metadata"];
        metadata["uid"] = json!(uid);
        if metadata["creationTimestamp"].is_null() {
            metadata["creationTimestamp"] = json!(now());
        }
        if resource.kind == "Namespace" {
            metadata["labels"]["kubernetes.io/metadata.name"] = name;
            value["status"]["phase"] = json!("Active");
        }
        value
    }
}

/// What of the metadata a client does not change.
fn kept_metadata(mut new: Value, old: &Value) -> Value {
    for field in ["uid", "creationTimestamp", "resourceVersion"] {
        new["metadata"][field] = old["metadata"][field].clone();
    }
    new["apiVersion"] = old["apiVersion"].clone();
    new["kind"] = old["kind"].clone();
    new
}

/// Where an object belongs; `None`: it has no name.
pub(super) fn key(resource: &'static Resource, value: &Value) -> Option<Key> {
    let text = |field: &str| value["metadata"][field].as_str().unwrap_or_default().to_owned();
    let namespace = match (resource.namespaced, text("namespace")) {
        (false, _) => String::new(),
        (true, namespace) if namespace.is_empty() => "default".to_owned(),
        (true, namespace) => namespace,
    };
    Some((resource, namespace, text("name"))).filter(|(_, _, name)| !name.is_empty())
}

/// The time, as the API writes it.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, seconds) = (since / 86_400, since % 86_400);
    // Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days, for days after 1970.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
