//! The files in the run's folder that engines read when they start.

use std::io;
use std::path::Path;

use crate::plan::RenderedFile;
use crate::private;

/// Writes the files that are not there: the run has not begun, or its folder was removed with old logs.
pub(super) fn restore(folder: &Path, files: &[RenderedFile]) -> io::Result<()> {
    private::create_folders(folder)?;
    for file in files {
        let path = folder.join(&file.path);
        if !path.try_exists()? {
            private::write(&path, &file.content)?;
        }
    }
    Ok(())
}
