//! To come.

pub mod proxy;
