//! The supervisor.

pub mod guardian;
