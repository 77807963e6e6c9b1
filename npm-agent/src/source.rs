//! Where the cluster's objects come from: what every source says to the reconcile loop.

pub mod convert;
pub mod manifests;

use npm_policy::world::Change;

/// What a source tells the reconcile loop, in order, over one channel.
#[derive(Debug)]
pub enum Event {
    /// These objects are so from now on; they belong together (one file, one burst) and are compiled together.
    Changes(Vec<Change>),
    /// What is wrong with the objects of one origin (a file, a watch) from now on. Replaces what was said of the
    /// origin before; an empty list clears it.
    Problems {
        /// The file or the watch.
        origin: String,
        /// Everything that is wrong there.
        problems: Vec<Problem>,
    },
    /// Everything that was there when the source started has been sent. Sent once; nothing may be programmed before.
    InSync,
    /// The answer to a refresh request with this number: everything that was there when the request was made has
    /// been sent.
    Refreshed(u64),
}

/// Something that a source could not take as it stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The object, as `NetworkPolicy default/web`, or the file where no object could be recognised.
    pub object: String,
    /// What is wrong and what was done instead, lower case, for people:
    /// `ingress[0].ports[1]: endPort 80 is below port 90; the policy isolates its pods and allows nothing`.
    pub message: String,
}
