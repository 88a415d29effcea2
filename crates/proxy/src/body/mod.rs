//! Bodies and event streams: reading and editing them, and the rule of each request field.

pub(crate) mod document;
pub(crate) mod field_table;
pub(crate) mod media;
pub(crate) mod read;
pub(crate) mod serving_mode;
pub(crate) mod sse;
pub(crate) mod usage;
