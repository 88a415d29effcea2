//! Files and folders that only their user can read: files of a run can contain prompts, paths and names.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

use fs_err::os::unix::fs::OpenOptionsExt as _;
use fs_err::{File, OpenOptions};

const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// Creates one folder.
pub fn create_folder(path: &Path) -> io::Result<()> {
    create(DirBuilder::new().mode(FOLDER_MODE), path)
}

/// Creates a folder and its parents. Existing folders keep their mode.
pub fn create_folders(path: &Path) -> io::Result<()> {
    create(DirBuilder::new().recursive(true).mode(FOLDER_MODE), path)
}

fn create(builder: &DirBuilder, path: &Path) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot create `{}`: {error}", path.display()));
    builder.create(path).map_err(named)
}

/// Whether users other than the owner can read or change a file.
pub fn is_open_to_others(path: &Path) -> bool {
    fs_err::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o077 != 0)
}

/// Writes a whole file. An existing file keeps its mode.
pub fn write(path: &Path, content: impl AsRef<[u8]>) -> io::Result<()> {
    let options = &mut OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(path)?;
    io::Write::write_all(&mut file, content.as_ref())
}

/// Opens a file for appending.
pub fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(FILE_MODE).open(path)
}
