//! A log file that is rotated by size: a full file gets a number, and a new one begins.
//!
//! The writer must never wait for a full disk, so output that cannot be written is dropped and counted. The count is written once
//! there is room again.
//!
//! `prefiller1.log` becomes `prefiller1.1.log`, the next one `prefiller1.2.log`, and so on: a higher number is newer. No number is
//! used twice, so readers (`logs::rotation`, which knows this scheme) find the next file after any number of rotations. A renamed
//! file is never written to.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use crate::fleet::LogLimits;
use crate::private;

/// How far a file can exceed its limit, in bytes, up to the end of a line.
const LONGEST_LINE: u64 = 4 << 20;

/// The current file of a log, and the numbers of the full ones.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    limits: LogLimits,
    file: File,
    size: u64,
    /// The size in bytes at which the file is rotated at the next end of a line.
    rotate_at: u64,
    dropped: u64,
    /// Numbers of the older files, the oldest first.
    older: VecDeque<u64>,
    /// The number that the current file gets.
    number: u64,
}

impl LogFile {
    /// Opens `path`, with the limits of the log.
    pub fn open(path: &Path, limits: LogLimits) -> io::Result<Self> {
        let limits = LogLimits {
            file_bytes: limits.file_bytes.min(largest_file()),
            ..limits
        };
        let mut file = append_to(path)?;
        let mut size = file.metadata()?.len();
        // The last output of a killed incarnation can lack a newline.
        if size > 0 && !ends_with_newline(path, size)? {
            file.write_all(b"\n")?;
            size += 1;
        }
        let older = older_files(path)?;
        let mut sink = Self {
            path: path.to_owned(),
            limits,
            file,
            size,
            rotate_at: limits.file_bytes,
            dropped: 0,
            number: older.back().map_or(1, |newest| newest + 1),
            older,
        };
        sink.forget_old();
        Ok(sink)
    }

    /// Appends `bytes`, and rotates the file when it is full.
    pub fn take(&mut self, mut bytes: &[u8]) {
        if !self.is_in_place() {
            self.replace();
        }
        while !bytes.is_empty() {
            let room = usize::try_from(self.rotate_at.saturating_sub(self.size)).unwrap_or(usize::MAX);
            if bytes.len() < room {
                return self.keep(bytes);
            }
            // The line that reaches the limit ends in this file, unless it is too long.
            let from = room.saturating_sub(1);
            let end = bytes[from..].iter().position(|byte| *byte == b'\n');
            let is_endless = self.size + bytes.len() as u64 > self.rotate_at.saturating_add(LONGEST_LINE);
            let (now, is_full) = match end {
                Some(end) => (from + end + 1, true),
                None => (bytes.len(), is_endless),
            };
            self.keep(&bytes[..now]);
            bytes = &bytes[now..];
            if is_full && self.rotate().is_err() {
                // The rotation failed: this file continues, and the next attempt is one file size away.
                self.rotate_at = self.size.saturating_add(self.limits.file_bytes);
            }
        }
    }

    /// Whether the log's path still is the open file: another process can remove or rename it.
    fn is_in_place(&self) -> bool {
        let named = fs::metadata(&self.path);
        let own = self.file.metadata();
        named.is_ok_and(|named| own.is_ok_and(|own| (named.dev(), named.ino()) == (own.dev(), own.ino())))
    }

    /// Opens the log's path again, if possible.
    fn replace(&mut self) {
        if let Ok(file) = append_to(&self.path) {
            self.size = file.metadata().map_or(0, |metadata| metadata.len());
            self.rotate_at = self.limits.file_bytes;
            self.file = file;
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.size += keep(&mut self.file, &mut self.dropped, bytes);
    }

    /// Renames the full file and opens a new one.
    fn rotate(&mut self) -> io::Result<()> {
        let full = older_path(&self.path, self.number);
        fs::rename(&self.path, &full)?;
        self.file = match append_to(&self.path) {
            Ok(file) => file,
            Err(error) => {
                fs::rename(&full, &self.path)?;
                return Err(error);
            }
        };
        self.older.push_back(self.number);
        self.number += 1;
        self.size = 0;
        self.rotate_at = self.limits.file_bytes;
        self.forget_old();
        Ok(())
    }

    /// Removes full files that are too many or too old, the oldest first.
    fn forget_old(&mut self) {
        while let Some(&oldest) = self.older.front() {
            let path = older_path(&self.path, oldest);
            // The newest full file stays in any case: the next number follows from it.
            let is_surplus = self.older.len() + 1 > self.limits.files.max(2) as usize;
            let is_stale = self.older.len() > 1 && is_older_than(&path, self.limits.age);
            if !is_surplus && !is_stale {
                return;
            }
            // A file that cannot be removed is no reason to stop an engine.
            let _ = fs::remove_file(path);
            self.older.pop_front();
        }
    }
}

/// The size limit in bytes that follows from the user's limit (`ulimit -f`): half of it, because a file ends at the end of a line.
fn largest_file() -> u64 {
    let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(soft, _)| soft);
    if limit == u64::MAX { limit } else { (limit / 2).max(1) }
}

/// Opens the file. Creates its folder again if that was removed with old logs.
fn append_to(path: &Path) -> io::Result<File> {
    let open = || private::append(path).map(|file| file.into_parts().0);
    match (open(), path.parent()) {
        (Err(error), Some(folder)) if error.kind() == io::ErrorKind::NotFound => {
            private::create_folders(folder)?;
            open()
        }
        (opened, _) => opened,
    }
}

fn ends_with_newline(path: &Path, size: u64) -> io::Result<bool> {
    let mut last = [0];
    File::open(path)?.read_exact_at(&mut last, size - 1)?;
    Ok(last == *b"\n")
}

/// Whether a file was last written longer ago than that; false if that is unknown.
fn is_older_than(path: &Path, age: Duration) -> bool {
    let written = fs::metadata(path).and_then(|metadata| metadata.modified());
    written.is_ok_and(|written| written.elapsed().is_ok_and(|elapsed| elapsed > age))
}

/// The path of the full file with this number: `decoder1.3.log` for `decoder1.log`.
fn older_path(path: &Path, number: u64) -> PathBuf {
    path.with_extension(format!("{number}.log"))
}

/// The numbers of the full files of the log at `path`, the oldest first.
fn older_files(path: &Path) -> io::Result<VecDeque<u64>> {
    let (Some(folder), Some(stem)) = (path.parent(), path.file_stem().and_then(|stem| stem.to_str())) else {
        return Ok(VecDeque::new());
    };
    let mut numbers: Vec<u64> = fs::read_dir(folder)?
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let number = name.strip_prefix(stem)?.strip_prefix('.')?.strip_suffix(".log")?;
            number.parse().ok()
        })
        .collect();
    numbers.sort_unstable();
    Ok(numbers.into())
}

/// Appends `bytes`. Returns how many were written, marker included. Adds the others to `dropped`; the next successful write begins
/// with a line about them.
fn keep(file: &mut impl Write, dropped: &mut u64, mut bytes: &[u8]) -> u64 {
    let mut written = 0;
    if *dropped > 0 {
        let marker = format!("\n[xpyd: {dropped} bytes of output lost here, the disk did not take them]\n");
        if file.write_all(marker.as_bytes()).is_err() {
            *dropped += bytes.len() as u64;
            return 0;
        }
        *dropped = 0;
        written += marker.len() as u64;
    }
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(count) if count > 0 => {
                bytes = &bytes[count..];
                written += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => {
                *dropped += bytes.len() as u64;
                break;
            }
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with `room` bytes left.
    #[derive(Default)]
    struct Disk {
        content: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let count = bytes.len().min(self.room);
            self.room -= count;
            self.content.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_drops_and_counts_output() {
        let mut disk = Disk {
            room: 5,
            ..Disk::default()
        };
        let mut dropped = 0;
        keep(&mut disk, &mut dropped, b"12345678");
        keep(&mut disk, &mut dropped, b"90");
        assert_eq!(dropped, 5);
        disk.room = 1000;
        keep(&mut disk, &mut dropped, b"later");
        let content = String::from_utf8(disk.content).unwrap();
        assert_eq!(dropped, 0);
        assert!(content.starts_with("12345\n[xpyd: 5 bytes"), "{content}");
        assert!(content.ends_with("]\nlater"), "{content}");
    }

    const LIMITS: LogLimits = LogLimits {
        file_bytes: 100,
        files: 3,
        age: Duration::from_hours(1),
    };

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_removed_log_folder_is_created_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/decoder1.log");
        let mut log = LogFile::open(&path, LIMITS).unwrap();
        fs::remove_dir_all(folder.path().join("run")).unwrap();
        log.take(b"a line\n");
        assert_eq!(read(&path), "a line\n");
    }

    #[test]
    fn full_files_get_growing_numbers_and_the_oldest_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("decoder1.log");
        for number in 1..=5 {
            // A line each, longer than a file may be.
            let mut sink = LogFile::open(&path, LIMITS).unwrap();
            sink.take(format!("{number:0120}\n").as_bytes());
        }
        assert_eq!(older_files(&path).unwrap(), [4, 5]);
        assert_eq!(read(&older_path(&path, 5)), format!("{:0120}\n", 5));
        assert_eq!(read(&path), "");
    }

    #[test]
    fn old_full_files_are_removed_except_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("decoder1.log");
        for number in [1, 2] {
            let file = File::create(older_path(&path, number)).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }
        LogFile::open(&path, LIMITS).unwrap();
        assert_eq!(older_files(&path).unwrap(), [2]);
    }

    #[test]
    fn a_log_that_cannot_be_renamed_continues() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("decoder1.log");
        let mut sink = LogFile::open(&path, LIMITS).unwrap();
        fs::create_dir(older_path(&path, 1)).unwrap();
        fs::write(older_path(&path, 1).join("in the way"), "").unwrap();
        let lines = "a line\n".repeat(200);
        sink.take(lines.as_bytes());
        assert_eq!(read(&path), lines);
    }

    proptest::proptest! {
        #[test]
        fn rotation_loses_nothing_and_cuts_no_line(
            lines in proptest::collection::vec("[a-z]{0,40}", 0..60),
            piece in 1..300_usize,
            file_bytes in 1..200_u64,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("decoder1.log");
            let mut sink = LogFile::open(&path, LogLimits { file_bytes, files: 1000, ..LIMITS }).unwrap();
            let text = lines.join("\n") + "\n";
            text.as_bytes().chunks(piece).for_each(|piece| sink.take(piece));
            let older = older_files(&path).unwrap();
            let files: Vec<String> = older.iter().map(|number| read(&older_path(&path, *number))).collect();
            for file in &files {
                let last_line = file.lines().last().unwrap().len() as u64 + 1;
                proptest::prop_assert!(file.ends_with('\n'));
                proptest::prop_assert!((file_bytes..file_bytes + last_line).contains(&(file.len() as u64)));
            }
            proptest::prop_assert_eq!(files.concat() + &read(&path), text);
        }
    }
}
