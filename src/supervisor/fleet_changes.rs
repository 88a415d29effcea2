//! `scaled.json`: how the fleet differs from the plan of its start. It names the engines that were added since, and those that
//! were drained on request.
//!
//! It lies in the run's folder, so that the next xpyd attaches to the fleet with these changes.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::fleet::EngineId;
use crate::private;

const FILE: &str = "scaled.json";

/// The changes to a plan since the start of its run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FleetChanges {
    /// Engines that were added after the start.
    #[serde(rename = "joined")]
    pub added: BTreeSet<EngineId>,
    /// Engines that were drained on request.
    pub stopped: BTreeSet<EngineId>,
}

impl FleetChanges {
    /// Reads the file in the run's folder. Without a file, or if it cannot be read, there are no changes.
    pub fn read(run_dir: &Path) -> Self {
        let text = fs_err::read(run_dir.join(FILE));
        let read = text.and_then(|text| serde_json::from_slice(&text).map_err(io::Error::from));
        read.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%error, "cannot read `scaled.json`");
            }
            Self::default()
        })
    }

    /// Changes it, and writes the file if it differs.
    pub(super) fn change(&mut self, run_dir: &Path, change: impl FnOnce(&mut Self)) {
        let before = self.clone();
        change(self);
        if *self != before
            && let Err(error) = self.write(run_dir)
        {
            tracing::warn!(%error, "cannot write `scaled.json`: an xpyd that attaches will not know which engines were added or drained");
        }
    }

    /// Replaces the file atomically.
    fn write(&self, run_dir: &Path) -> io::Result<()> {
        let new = run_dir.join(format!("{FILE}.new"));
        private::write(&new, serde_json::to_vec(self)?)?;
        fs_err::rename(&new, run_dir.join(FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_private_and_optional() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(FleetChanges::read(folder.path()), FleetChanges::default());
        let changes = FleetChanges {
            added: BTreeSet::from([EngineId::named("prefiller3")]),
            stopped: BTreeSet::from([EngineId::named("decoder2")]),
        };
        changes.write(folder.path()).expect("a file");
        assert!(!private::is_open_to_others(&folder.path().join(FILE)));
        assert_eq!(FleetChanges::read(folder.path()), changes);
        fs_err::write(folder.path().join(FILE), "{").expect("a file");
        assert_eq!(FleetChanges::read(folder.path()), FleetChanges::default());
    }
}
