//! Where the cluster's objects come from: what every source says to the reconcile loop.

pub mod convert;
mod key;
pub mod kube;
pub mod manifests;

use npm_policy::world::Change;

/// What a source tells the reconcile loop, in order, over one channel.
#[derive(Debug)]
pub enum Event {
    /// These objects are so from now on; they belong together (one file, one burst) and are compiled together.
    Changes(Vec<Change>),
    /// What is wrong with the objects of one origin (a file, a watch) from now on. Replaces what was said of the
    /// origin before; an empty list clears it. It comes before the changes that belong to it: whoever counts failures
    /// has to know of a version's problem when the version comes.
    Problems {
        /// The file or the watch.
        origin: String,
        /// Everything that is wrong there.
        problems: Vec<Problem>,
    },
    /// Everything that was there when the source started, and could be read, has been sent; nothing may be programmed
    /// before. Sent again when what could not be read changes, until it is [`Completeness::Complete`], which is final.
    InSync(Completeness),
    /// How a watch stands from now on. A source that watches nothing over a network never says so.
    Watch {
        /// What is watched, as `pods`.
        name: &'static str,
        /// How it stands.
        state: WatchState,
    },
    /// The answer to a refresh request with this number: everything that was there when the request was made has
    /// been sent.
    Refreshed(u64),
}

/// Whether the source knows all that was there when it started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// Not yet: an earlier process may have enforced what is in here, and this one has never read it.
    Incomplete {
        /// The files or watches, sorted; not empty.
        unread: Vec<String>,
    },
    /// Yes. What breaks from now on keeps its last good objects.
    Complete,
}

/// How a watch stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchState {
    /// Everything that is there is being read.
    Listing,
    /// Everything that was there has been read, and changes come as they happen.
    Following {
        /// How often everything was read.
        lists: u64,
    },
    /// Nobody answers, or not as they should. What is known stays as it is; the source tries again.
    Failing {
        /// The last failure, for people.
        error: String,
        /// Failures since something worked.
        failures: u32,
    },
}

/// Something that a source could not take as it stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// The object, as `NetworkPolicy default/web`, or the file where no object could be recognised.
    pub object: String,
    /// What is wrong and what was done instead, lower case, for people:
    /// `ingress[0].ports[1]: endPort 80 is below port 90; the policy isolates its pods and allows nothing`.
    pub message: String,
}
