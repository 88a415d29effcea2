//! What the proxy reports of itself: metrics, access log, traces, and the record that feeds them.

pub(crate) mod access_log;
pub(crate) mod engine_metrics;
pub(crate) mod merge;
pub(crate) mod metrics;
pub(crate) mod record;
pub(crate) mod traces;
