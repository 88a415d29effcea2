//! What past starts of engines took, kept from one run to the next.
//!
//! In `$XDG_STATE_HOME/xpyd/starts.json`, or `~/.local/state/xpyd/starts.json` without that variable. It only makes
//! estimates better, so a file that is missing, broken or cannot be written is no error. Two runs that become ready at
//! once may each write their own; the last one stays.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::logs::PastStart;

/// Starts kept: those of 64 fleets of two engines. The oldest go.
const MAX_STARTS: usize = 128;

/// A larger file was not written by us.
const MAX_BYTES: u64 = 4 << 20;

const FILE: &str = "starts.json";

/// The last good starts, the newest last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Starts(Vec<Remembered>);

/// The last good start of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    /// [`crate::plan::start_key`].
    key: String,
    #[serde(flatten)]
    start: PastStart,
}

impl Starts {
    /// Adds starts, which take the place of earlier ones of the same key.
    fn add(&mut self, new: Vec<(String, PastStart)>) {
        let new = new.into_iter().map(|(key, start)| Remembered { key, start });
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

/// Remembers good starts by their keys.
pub(super) fn remember(new: Vec<(String, PastStart)>) {
    let Some(folder) = folder() else { return };
    let mut starts = read(&folder);
    starts.add(new);
    if let Err(error) = write(&folder, &starts) {
        tracing::debug!(%error, "what the starts took cannot be kept");
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

fn read(folder: &Path) -> Starts {
    let path = folder.join(FILE);
    let text = match fs_err::metadata(&path) {
        Ok(file) if file.is_file() && file.len() <= MAX_BYTES => fs_err::read(&path).unwrap_or_default(),
        _ => return Starts::default(),
    };
    let mut starts: Starts = serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::debug!(%error, "what earlier starts took cannot be read");
        Starts::default()
    });
    starts.0.retain(|known| known.start.is_sound());
    starts
}

/// Replaces the file as a whole, so that no reader sees half of it.
fn write(folder: &Path, starts: &Starts) -> io::Result<()> {
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
    fn the_newest_of_a_key_is_kept_and_the_oldest_go_first() {
        let mut starts = Starts::default();
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
    fn what_was_written_is_read_and_a_broken_file_is_an_empty_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let inner = folder.path().join("xpyd");
        assert_eq!(read(&inner), Starts::default());
        let mut starts = Starts::default();
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
            assert_eq!(read(&inner), Starts::default(), "{broken}");
        }
    }
}
