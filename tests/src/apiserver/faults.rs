//! What the server does wrong when a test wants it to: to requests before they are answered, and to watches that are
//! open.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast;

/// How many disturbances a watch may be behind.
const MAX_BEHIND: usize = 256;

/// What kind of request a fault is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Whatever is asked.
    Any,
    /// A page of a list.
    List,
    /// A watch that goes on from a version.
    Watch,
    /// A watch that begins with all objects.
    StreamingList,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is answered with this code.
    Refuse {
        /// The HTTP code.
        code: u16,
        /// `Retry-After` in seconds.
        retry_after: Option<u64>,
    },
    /// It is answered after a while.
    Delay(Duration),
    /// It is never answered.
    Hang,
    /// The connection is closed instead.
    Reset,
    /// It is answered with something that is no JSON.
    Garbage,
    /// The answer breaks off after so many bytes, and the connection with it.
    Truncate(usize),
}

/// What becomes of a watch that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disturbance {
    /// The connection is closed amid the answer.
    Cut,
    /// The answer ends as if its time was over.
    End,
    /// A part of a line, and the end.
    CutLine,
    /// An ERROR event with this code, and the end.
    Error(u16),
    /// A line that is no JSON.
    Garbage,
    /// Events from before the last one are sent again: so many of them.
    Repeat(usize),
    /// The next two events come in the wrong order.
    Swap,
    /// Nothing more is sent, though the connection stays.
    Mute,
}

/// A fault that waits for its request.
#[derive(Clone, Debug)]
struct Rule {
    on: On,
    /// `None`: any.
    plural: Option<&'static str>,
    left: u32,
    fault: Fault,
}

/// The faults that a test has planted.
#[derive(Debug)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
    disturbances: broadcast::Sender<(Option<&'static str>, Disturbance)>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { rules: Mutex::default(), disturbances: broadcast::channel(MAX_BEHIND).0 }
    }
}

impl Faults {
    /// Plants a fault for the next `times` requests of this kind (for a resource, or any).
    pub fn plant(&self, on: On, plural: Option<&'static str>, times: u32, fault: Fault) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.push(Rule { on, plural, left: times, fault });
    }

    /// How many requests are still to fail.
    pub fn planted(&self) -> u32 {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|rule| rule.left).sum()
    }

    /// Takes back what was planted and has not happened.
    pub fn clear(&self) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Disturbs the watches that are open now (of a resource, or all); gives how many there were of all.
    pub fn disturb(&self, plural: Option<&'static str>, disturbance: Disturbance) -> usize {
        self.disturbances.send((plural, disturbance)).unwrap_or_default()
    }

    pub(super) fn disturbances(&self) -> broadcast::Receiver<(Option<&'static str>, Disturbance)> {
        self.disturbances.subscribe()
    }

    /// The fault for a request, if there is one.
    pub(super) fn take(&self, on: On, plural: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |rule: &&mut Rule| {
            (rule.on == On::Any || rule.on == on) && rule.plural.is_none_or(|wanted| wanted == plural)
        };
        let rule = rules.iter_mut().find(fits)?;
        let fault = rule.fault.clone();
        rule.left = rule.left.saturating_sub(1);
        rules.retain(|rule| rule.left > 0);
        Some(fault)
    }
}
