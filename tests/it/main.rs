//! Behaviour of xpyd through its binary and its public interfaces.

mod alone;
mod bench;
mod control;
mod log_flood;
mod log_merge;
mod logs;
mod proxy;
mod sim;
mod supervisor;
mod support;
mod tidy;
mod up;
