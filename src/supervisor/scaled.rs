//! How the fleet differs from the plan of its start: which engines joined since, and which were asked to stay stopped.
//!
//! It stands in the run's folder, where the next xpyd finds it: an attach resumes the fleet as it had become.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::fleet::EngineId;
use crate::private;

const FILE: &str = "scaled.json";

/// What became of the plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scaled {
    /// Engines that joined after the start.
    pub joined: BTreeSet<EngineId>,
    /// Engines that were asked to stop and to stay so.
    pub stopped: BTreeSet<EngineId>,
}

impl Scaled {
    /// Reads it from the run's folder. Without a file the fleet is as it was planned.
    pub fn read(run_dir: &Path) -> Self {
        let text = fs_err::read(run_dir.join(FILE));
        let read = text.and_then(|text| serde_json::from_slice(&text).map_err(io::Error::from));
        read.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%error, "what became of the plan cannot be read");
            }
            Self::default()
        })
    }

    /// Changes it, and writes it down if it differs now.
    pub(super) fn change(&mut self, run_dir: &Path, change: impl FnOnce(&mut Self)) {
        let before = self.clone();
        change(self);
        if *self != before
            && let Err(error) = self.write(run_dir)
        {
            tracing::warn!(%error, "an xpyd that attaches will not know which engines joined or were stopped");
        }
    }

    /// Writes it whole or not at all.
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
    fn it_is_private_read_as_it_was_written_and_empty_without_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(Scaled::read(folder.path()), Scaled::default());
        let scaled = Scaled {
            joined: BTreeSet::from([EngineId::named("prefiller3")]),
            stopped: BTreeSet::from([EngineId::named("decoder2")]),
        };
        scaled.write(folder.path()).expect("a file");
        assert!(!private::is_open_to_others(&folder.path().join(FILE)));
        assert_eq!(Scaled::read(folder.path()), scaled);
        fs_err::write(folder.path().join(FILE), "{").expect("a file");
        assert_eq!(Scaled::read(folder.path()), Scaled::default());
    }
}
