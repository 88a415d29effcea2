//! The files in the run's folder that engines read when they start.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::plan::RenderedFile;

/// Writes the files that are not there: the run has not begun, or its folder was removed with old logs.
pub(super) fn restore(folder: &Path, files: &[RenderedFile]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    for file in files {
        let path = folder.join(&file.path);
        if !path.try_exists()? {
            fs_err::write(path, &file.content)?;
        }
    }
    Ok(())
}
