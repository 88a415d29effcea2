//! Behaviour of xpyd through its binary and its public interfaces.

mod alone;
mod bench;
mod control;
mod logs;
mod matrix;
mod proxy;
mod sim;
mod supervisor;
mod support;
mod tidy;
mod up;
