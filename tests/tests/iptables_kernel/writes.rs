//! What the metrics are told of single writes.

use std::time::Duration;

use npm_agent::backend::{Backend, Write, Written};
use npm_policy::goal::Goal;

use super::{backend, in_namespace, rich_goal};

fn count(writes: &[Write], wanted: Written) -> usize {
    writes.iter().filter(|write| write.what == wanted).count()
}

#[test]
fn every_write_is_told_once_with_its_time() {
    in_namespace(|variant| {
        let mut backend = backend(variant);
        backend.apply(&rich_goal()).unwrap();
        let writes = backend.writes();
        assert!(count(&writes, Written::Sets) >= 2, "both families have sets: {writes:?}");
        assert!(count(&writes, Written::Chains) >= 2, "both families have chains: {writes:?}");
        // A program was started for each of them.
        assert!(
            writes.iter().all(|write| !write.failed && write.took > Duration::from_micros(50)),
            "{writes:?}"
        );
        assert_eq!(backend.writes(), [], "told already");

        backend.verify().unwrap();
        assert_eq!(backend.writes(), [], "nothing was written");
        backend.apply(&Goal::default()).unwrap();
        assert!(count(&backend.writes(), Written::Sets) >= 2, "the sets are gone");
    });
}
