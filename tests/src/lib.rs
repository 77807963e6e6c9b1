//! The lab and what the tests share.

pub mod exec;
pub mod features;
pub mod lab;
pub mod random;
pub mod table;
