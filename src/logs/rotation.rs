//! The files of one log: full ones with numbers, `decoder1.1.log`, `decoder1.2.log`, and the current one, `decoder1.log`.
//!
//! `log_file` has the scheme: a higher number is newer, no number is used twice, and nothing is written to a file after it got
//! one. So a reader that knows the number of its file finds the next one after any number of rotations.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_err::File;

/// An open file of a log.
#[derive(Debug)]
pub(super) struct LogFilePart {
    pub(super) file: File,
    /// Its number, or the number that the current file will get.
    pub(super) number: u64,
    pub(super) inode: u64,
}

/// A position in a log that stays valid through rotations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The number of the file, or the one that the current file will get.
    number: u64,
    /// The offset in the file, in bytes.
    offset: u64,
}

impl Position {
    /// The beginning of every log.
    pub const START: Self = Self { number: 0, offset: 0 };

    /// The current end of the log.
    pub fn end_of(log: &Path) -> io::Result<Self> {
        Ok(match all(log)?.last() {
            Some(last) => Self {
                number: last.number,
                offset: last.file.metadata()?.len(),
            },
            None => Self::START,
        })
    }
}

/// The last `most` bytes of a log after `from`, without files that were removed meanwhile.
pub(super) fn end_since(log: &Path, from: Position, most: u64) -> io::Result<Vec<u8>> {
    let parts = all(log)?;
    if parts.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("no log `{}`", log.display()),
        ));
    }
    let (mut room, mut ends) = (most, Vec::new());
    for mut part in parts.into_iter().rev().filter(|part| part.number >= from.number) {
        let length = part.file.metadata()?.len();
        let begin = if part.number == from.number { from.offset } else { 0 };
        let begin = begin.max(length.saturating_sub(room)).min(length);
        part.file.seek(SeekFrom::Start(begin))?;
        let mut bytes = Vec::new();
        part.file.take(length - begin).read_to_end(&mut bytes)?;
        room -= bytes.len() as u64;
        ends.push(bytes);
    }
    ends.reverse();
    Ok(ends.concat())
}

/// Splits the name of a full file from its number: `decoder1.3` is file 3 of `decoder1`.
pub(super) fn split_number(stem: &str) -> Option<(&str, u64)> {
    let (name, number) = stem.rsplit_once('.')?;
    Some((name, number.parse().ok()?))
}

/// Opens the file after the one with this number and inode; `None` if there is none now. Skips files that were removed, which
/// shows in the number.
pub(super) fn after(log: &Path, number: u64, inode: Option<u64>) -> io::Result<Option<LogFilePart>> {
    loop {
        let numbers = full_files(log)?;
        if let Some(next) = numbers.iter().copied().filter(|next| *next > number).min() {
            match open(&log.with_extension(format!("{next}.log")), next)? {
                Some(part) => return Ok(Some(part)),
                // Removed meanwhile.
                None => continue,
            }
        }
        let newest = numbers.into_iter().max().unwrap_or(0);
        let Some(part) = open(log, newest + 1)? else {
            return Ok(None);
        };
        // If it was renamed meanwhile, another file is next, with another number.
        if full_files(log)?.into_iter().max().unwrap_or(0) == newest {
            return Ok((Some(part.inode) != inode).then_some(part));
        }
    }
}

/// Opens all files of a log, the oldest first.
pub(super) fn all(log: &Path) -> io::Result<Vec<LogFilePart>> {
    let mut parts: Vec<LogFilePart> = Vec::new();
    loop {
        let last = parts.last();
        match after(log, last.map_or(0, |part| part.number), last.map(|part| part.inode))? {
            Some(part) => parts.push(part),
            None => return Ok(parts),
        }
    }
}

fn open(path: &Path, number: u64) -> io::Result<Option<LogFilePart>> {
    match File::open(path) {
        Ok(file) => {
            let inode = file.metadata()?.ino();
            Ok(Some(LogFilePart { file, number, inode }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The numbers of the full files, in any order.
fn full_files(log: &Path) -> io::Result<Vec<u64>> {
    let folder = match log.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let entries = match fs_err::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let name = log.file_stem();
    Ok(entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let path = PathBuf::from(entry.file_name());
            let (of, number) = split_number(path.file_stem()?.to_str()?)?;
            let is_of_this_log = path.extension()? == "log" && name? == of;
            is_of_this_log.then_some(number)
        })
        .collect())
}
