//! The lab and what the tests share.

pub mod exec;
pub mod features;
pub mod kubernetes;
pub mod lab;
pub mod monitoring;
pub mod opinions;
pub mod property;
pub mod random;
pub mod scenario;
pub mod table;
