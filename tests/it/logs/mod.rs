//! Logs: of engines, merged and followed; what failures in them mean; and xpyd's own.

mod diagnosis;
mod follow;
mod merge;
mod own_log;
