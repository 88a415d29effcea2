//! Logs: engine logs followed and merged, the diagnosis of failures, and xpyd's own log.

mod diagnosis;
mod follow;
mod merge;
mod own_log;
