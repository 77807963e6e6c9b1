//! The lab and what the tests share.

pub mod exec;
pub mod lab;
pub mod table;
