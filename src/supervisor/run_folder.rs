//! The files in the run's folder that engines read when they start.

use std::io;
use std::path::Path;

use crate::plan::{EngineFile, EngineSpec};
use crate::private;

/// Writes the files that are missing: before the first start, or after the folder was removed with old logs.
pub(super) fn restore(folder: &Path, engines: &[EngineSpec]) -> io::Result<()> {
    private::create_folders(folder)?;
    for file in engines.iter().filter_map(|engine| engine.file.as_ref()) {
        if !folder.join(&file.path).try_exists()? {
            write(folder, file)?;
        }
    }
    Ok(())
}

/// Writes the file atomically: a full disk must not leave half a file for the next start.
pub(super) fn write(folder: &Path, file: &EngineFile) -> io::Result<()> {
    let path = folder.join(&file.path);
    let part = path.with_added_extension("part");
    let written = private::write(&part, &file.content).and_then(|()| fs_err::rename(&part, &path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs_err::remove_file(&part);
    }
    written
}
