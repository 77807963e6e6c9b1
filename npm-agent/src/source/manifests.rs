//! The manifests source.
