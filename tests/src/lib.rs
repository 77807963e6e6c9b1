//! The lab and what the tests share.

pub mod apiserver;
pub mod bench;
pub mod browser;
pub mod chaos;
pub mod exec;
pub mod features;
pub mod frames;
pub mod kubernetes;
pub mod lab;
pub mod monitoring;
pub mod opinions;
pub mod pair;
pub mod programs;
pub mod property;
pub mod random;
pub mod scenario;
pub mod sequence;
pub mod statistics;
pub mod table;
pub mod tls;
