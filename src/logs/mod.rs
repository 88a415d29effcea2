//! The logs of a run: their folder, following them as they grow, the phases of a start, and the diagnosis of a failure.
//!
//! The shim appends to logs and rotates them. This module only reads them, so it works with and without a running xpyd, and a slow
//! reader never delays an engine. It prints nothing.

pub mod diagnosis;
pub mod estimate;
pub mod folder;
pub mod follow;
pub mod lines;
pub mod merge;
pub mod phases;
#[cfg(test)]
mod reference;
pub mod roles;
mod rotation;
pub mod stamp;
pub mod start;

pub use diagnosis::{Diagnosis, Hint, diagnose, first_error, first_error_in, hints, phase_reached};
pub use estimate::{Estimate, PastStart, StartEstimator};
pub use folder::{RunFolder, create_run_folder};
pub use follow::Follower;
pub use merge::Merge;
pub use phases::{Phase, PhaseTracker, watch_phases};
pub use rotation::Position;

/// Why logs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// The operating system refused; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The path of the link to the newest run is another file.
    #[error("`{}` is not a symbolic link, so it cannot point at the newest run", .0.display())]
    LatestIsNotALink(std::path::PathBuf),
    /// No free name for a run's folder is left.
    #[error("`{}` already has a hundred run folders of this second", .0.display())]
    Crowded(std::path::PathBuf),
}
