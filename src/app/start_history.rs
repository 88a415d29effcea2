//! Durations of past starts of engines, kept from one run to the next.
//!
//! The file is `$XDG_STATE_HOME/xpyd/starts.json`, or `~/.local/state/xpyd/starts.json` without that variable. It only improves
//! estimates, so a file that is missing, broken or not writable is no error. If two runs become ready at once, the last writer
//! wins.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::logs::PastStart;

/// The most starts kept: those of 64 fleets of two engines. The oldest are removed.
const MAX_STARTS: usize = 128;

/// The largest file that is read, in bytes. xpyd writes no larger one.
const MAX_BYTES: u64 = 4 << 20;

const FILE: &str = "starts.json";

/// The last good starts, the newest last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct StoredStarts(Vec<StoredStart>);

/// The last good start of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct StoredStart {
    /// [`crate::plan::start_key`].
    key: String,
    #[serde(flatten)]
    start: PastStart,
}

impl StoredStarts {
    /// Adds starts, and replaces earlier ones of the same key.
    fn add(&mut self, new: Vec<(String, PastStart)>) {
        let new = new.into_iter().map(|(key, start)| StoredStart { key, start });
        for remembered in new.filter(|new| new.start.is_sound()) {
            self.0.retain(|known| known.key != remembered.key);
            self.0.push(remembered);
        }
        let too_many = self.0.len().saturating_sub(MAX_STARTS);
        self.0.drain(..too_many);
    }
}

/// The last good starts by their keys.
pub(super) fn recall() -> HashMap<String, Arc<PastStart>> {
    let starts = folder().map(|folder| read(&folder)).unwrap_or_default();
    let by_key = starts.0.into_iter().map(|known| (known.key, Arc::new(known.start)));
    by_key.collect()
}

/// Saves good starts by their keys.
pub(super) fn remember(new: Vec<(String, PastStart)>) {
    let Some(folder) = folder() else { return };
    let mut starts = read(&folder);
    starts.add(new);
    if let Err(error) = write(&folder, &starts) {
        tracing::debug!(%error, "cannot save the durations of starts");
    }
}

fn folder() -> Option<PathBuf> {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(state.join("xpyd"))
}

fn read(folder: &Path) -> StoredStarts {
    let path = folder.join(FILE);
    let text = match fs_err::metadata(&path) {
        Ok(file) if file.is_file() && file.len() <= MAX_BYTES => fs_err::read(&path).unwrap_or_default(),
        _ => return StoredStarts::default(),
    };
    let mut starts: StoredStarts = serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot read the durations of earlier starts");
        StoredStarts::default()
    });
    starts.0.retain(|known| known.start.is_sound());
    starts
}

/// Replaces the file atomically.
fn write(folder: &Path, starts: &StoredStarts) -> io::Result<()> {
    crate::private::create_folders(folder)?;
    let half_written = folder.join(format!("{FILE}.{}", std::process::id()));
    crate::private::write(&half_written, serde_json::to_vec(starts)?)?;
    fs_err::rename(&half_written, folder.join(FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(took_ms: u64) -> PastStart {
        PastStart {
            marks: Vec::new(),
            took_ms,
        }
    }

    fn named(name: &str, took_ms: u64) -> (String, PastStart) {
        (name.to_owned(), start(took_ms))
    }

    #[test]
    fn history_keeps_the_newest_starts() {
        let mut starts = StoredStarts::default();
        starts.add(vec![named("a", 1), named("b", 1)]);
        starts.add(vec![named("a", 2), named("impossible", 0)]);
        let kept: Vec<_> = starts
            .0
            .iter()
            .map(|known| (known.key.as_str(), known.start.took_ms))
            .collect();
        assert_eq!(kept, [("b", 1), ("a", 2)]);
        starts.add((1..MAX_STARTS).map(|number| named(&number.to_string(), 3)).collect());
        assert_eq!(starts.0.len(), MAX_STARTS);
        assert_eq!(starts.0[0].key, "a");
    }

    #[test]
    fn history_round_trips_and_ignores_a_broken_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let inner = folder.path().join("xpyd");
        assert_eq!(read(&inner), StoredStarts::default());
        let mut starts = StoredStarts::default();
        starts.add(vec![named("a", 7)]);
        write(&inner, &starts).expect("written");
        assert_eq!(read(&inner), starts);
        let names: Vec<_> = fs_err::read_dir(&inner)
            .expect("a folder")
            .flatten()
            .map(|file| file.file_name())
            .collect();
        assert_eq!(names, [FILE], "nothing half written is left");
        for broken in ["", "{", "[{\"key\":1}]", "[{\"key\":\"a\",\"marks\":[],\"took_ms\":0}]"] {
            fs_err::write(inner.join(FILE), broken).expect("written");
            assert_eq!(read(&inner), StoredStarts::default(), "{broken}");
        }
    }
}
