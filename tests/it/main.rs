//! Behaviour of xpyd through its binary and its public interfaces.

mod alone;
mod bench;
mod causes;
mod chaos;
mod clients;
mod control;
mod exact;
mod keep;
mod lmcache_mp;
mod log_flood;
mod log_merge;
mod logs;
mod matrix;
mod measure;
mod ports;
mod proxy;
mod readme;
mod restart;
mod scale;
mod sim;
mod status;
mod supervisor;
mod support;
mod tidy;
mod up;
