//! Behaviour of xpyd through its binary and its public interfaces.

mod bench;
mod cli;
mod gpu;
mod hub;
mod logs;
mod proxy;
mod repository;
mod supervisor;
mod support;
