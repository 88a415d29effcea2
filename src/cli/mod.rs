//! To come.

pub mod down;
pub mod logs;
pub mod status;
