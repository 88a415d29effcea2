//! The forms of a report, one file each.

pub(super) mod file;
pub(super) mod html;
pub(super) mod json;
pub(super) mod own;
pub(super) mod python;
pub(super) mod table;
#[cfg(test)]
mod tests;
