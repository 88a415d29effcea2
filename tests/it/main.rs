//! Behaviour of xpyd through its binary and its public interfaces.

mod sim;
