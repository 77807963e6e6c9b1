//! The command line.

pub mod matrix;
