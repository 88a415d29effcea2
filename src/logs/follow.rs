//! Follows a growing log through all of its files.
//!
//! A follower polls the file ten times a second. It reads each file to its end before the next one, after any number of rotations,
//! and starts over if the file was truncated.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::lines::LineSplitter;
use super::rotation::{self, LogFilePart};
use super::start::ReadStart;

/// Time between two polls of a file without new data.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The most bytes per poll, so that a flood in one log does not starve the others.
const BYTES_PER_LOOK: u64 = 1024 * 1024;

/// The line in place of full files that were removed before they were read, because the follower was slower than the engine.
const GAP: &[u8] = b"[xpyd: output is missing here: it was removed before it was read]";

/// Reads one log, now and as it grows. The file can be created later.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    first: Begin,
    file: Option<OpenLog>,
    splitter: LineSplitter,
    /// The number of lines still to skip.
    skip: usize,
    buffer: Vec<u8>,
}

/// The file to open first.
#[derive(Debug, Clone, Copy)]
enum Begin {
    Oldest,
    /// The current file, from this byte on.
    Current(u64),
}

#[derive(Debug)]
struct OpenLog {
    part: LogFilePart,
    position: u64,
}

impl Follower {
    /// Reads the whole log, full files included.
    pub fn from_start(path: &Path) -> Self {
        Self::new(path, Begin::Oldest)
    }

    /// Reads the current file from the byte `offset` on; from its start if it is shorter than that.
    pub fn from_offset(path: &Path, offset: u64) -> Self {
        Self::new(path, Begin::Current(offset))
    }

    /// Reads the log from this line on; all of it without one.
    pub fn from_line(path: &Path, start: Option<ReadStart>) -> io::Result<Self> {
        let mut follower = Self::from_start(path);
        if let Some(start) = start {
            follower.skip = start.skip;
            follower.open(start.part, start.offset)?;
        }
        Ok(follower)
    }

    fn new(path: &Path, first: Begin) -> Self {
        Self {
            path: path.to_owned(),
            first,
            file: None,
            splitter: LineSplitter::default(),
            skip: 0,
            buffer: Vec::new(),
        }
    }

    /// The new lines since the last call, up to about a megabyte. Empty only if there are none now.
    pub fn read_new(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        while lines.is_empty() && self.look(&mut lines)? {}
        Ok(lines)
    }

    /// The unfinished line at the end, if the log is complete.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        self.splitter.finish()
    }

    /// Waits for at least one new line. Safe to cancel.
    pub async fn next(&mut self) -> io::Result<Vec<Vec<u8>>> {
        loop {
            let lines = self.read_new()?;
            if !lines.is_empty() {
                return Ok(lines);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Reads once. Returns false if there is nothing to read now.
    fn look(&mut self, lines: &mut Vec<Vec<u8>>) -> io::Result<bool> {
        if self.file.is_none() {
            self.open_first()?;
        }
        let Some(log) = self.file.as_mut() else {
            return Ok(false);
        };
        // Checked before reading, so everything that was written before the rotation is read below, or at the next poll.
        let is_newest = match fs_err::metadata(&self.path) {
            Ok(now) => now.ino() == log.part.inode,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        let file = &mut log.part.file;
        if file.metadata()?.len() < log.position {
            log.position = 0;
            file.seek(SeekFrom::Start(0))?;
            self.splitter.reset();
        }
        self.buffer.clear();
        let count = file.take(BYTES_PER_LOOK).read_to_end(&mut self.buffer)?;
        log.position += count as u64;
        let skip = &mut self.skip;
        self.splitter.feed(&self.buffer, |line| {
            if *skip > 0 {
                *skip -= 1;
            } else {
                lines.push(line);
            }
        });
        if count > 0 || is_newest {
            return Ok(count > 0);
        }
        let number = log.part.number;
        let Some(next) = rotation::after(&self.path, number, Some(log.part.inode))? else {
            return Ok(false);
        };
        if next.number > number + 1 {
            lines.extend(self.splitter.finish());
            lines.push(GAP.to_owned());
        }
        self.open(next, 0)?;
        Ok(true)
    }

    fn open_first(&mut self) -> io::Result<()> {
        let (number, offset) = match self.first {
            Begin::Oldest => (0, 0),
            Begin::Current(offset) => (u64::MAX, offset),
        };
        match rotation::after(&self.path, number, None)? {
            Some(part) => self.open(part, offset),
            None => Ok(()),
        }
    }

    fn open(&mut self, mut part: LogFilePart, offset: u64) -> io::Result<()> {
        let length = part.file.metadata()?.len();
        let position = if offset > length { 0 } else { offset };
        part.file.seek(SeekFrom::Start(position))?;
        self.file = Some(OpenLog { part, position });
        Ok(())
    }
}
