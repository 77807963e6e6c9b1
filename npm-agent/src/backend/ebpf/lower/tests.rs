//! What only the shape of the maps shows; that the verdicts are right is `tests/tests/ebpf_agreement.rs`'s.
