//! The logs of a run: the folder they are in, following them as they grow, and what they say about a start.
//!
//! Logs are files that the shim appends to and, when they are full, puts aside. Everything here only reads them, so it works the same whether or not
//! xpyd runs, and a slow reader never holds an engine up. Nothing here prints.

pub mod causes;
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

pub use causes::{Diagnosis, Hint, diagnose, first_error, first_error_in, hints, phase_reached};
pub use estimate::{Estimate, PastStart, Start};
pub use folder::{RunFolder, create_run_folder};
pub use follow::Follower;
pub use merge::Merge;
pub use phases::{Phase, PhaseTracker, watch_phases};
pub use rotation::Position;

/// Why logs could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// The operating system refused; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Somebody put something else at the name of the link to the newest run.
    #[error("`{}` is not a link, so it cannot be pointed at the newest run", .0.display())]
    LatestIsNotALink(std::path::PathBuf),
    /// No free name for a run's folder.
    #[error("`{}` already has a hundred folders of this second", .0.display())]
    Crowded(std::path::PathBuf),
}
