//! Behaviour of xpyd through its binary and its public interfaces.

mod bench;
mod supervisor;
mod tidy;
