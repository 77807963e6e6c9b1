//! Views of worlds that tests make up.

use std::time::SystemTime;

use npm_policy::compile::Compiler;
use npm_policy::world::Change;

use super::*;
use crate::reconcile::fake::NODE;
use crate::status::report::{BackendStatus, LastApply, SourceStatus, WorldStatus};

/// A ready agent's status.
pub(in crate::http) fn status() -> Status {
    let now = SystemTime::now();
    Status {
        version: "0.0.0".into(),
        node: NODE.into(),
        instance: "test".into(),
        started: now,
        known_differences: vec![],
        source: SourceStatus { in_sync: true, ..SourceStatus::default() },
        warnings: vec![],
        world: WorldStatus::default(),
        generation: 1,
        backends: vec![BackendStatus {
            name: "fake".into(),
            generation: 1,
            applies: 1,
            last_apply: Some(LastApply { at: now, duration_ms: 7, set_writes: 3, rule_writes: 2 }),
            ..BackendStatus::default()
        }],
        escapes: vec![],
    }
}

/// What there is to see after these changes.
pub(in crate::http) fn view(changes: impl IntoIterator<Item = Change>) -> View {
    let mut compiler = Compiler::new(NODE);
    compiler.apply(changes);
    View::of(NODE.into(), 1, 1, compiler.world().objects(), compiler.goal())
}
