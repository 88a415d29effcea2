//! The output formats of a report, one file each.

pub(super) mod file_name;
pub(super) mod html;
pub(super) mod json;
pub(super) mod python;
#[cfg(test)]
mod tests;
pub(super) mod vllm_table;
pub(super) mod xpyd_table;
