//! Commands: clap types, and one thin file per verb.

pub mod sim;
