//! The lab and what the tests share.

pub mod apiserver;
pub mod chaos;
pub mod exec;
pub mod features;
pub mod kubernetes;
pub mod lab;
pub mod opinions;
pub mod property;
pub mod random;
pub mod scenario;
pub mod table;
