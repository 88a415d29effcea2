//! Reading a log as it grows, over all the files it consists of.
//!
//! A follower asks the file for more ten times a second. It reads a file to its end before it goes on with the next one,
//! however many rotations there were meanwhile, and starts over when the file was cut.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::lines::LineSplitter;
use super::rotation::{self, Part};
use super::start::Start;

/// How long a follower waits before it looks at a file again that had nothing new.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Most bytes that one look takes, so that a flood in one log does not starve the others.
const BYTES_PER_LOOK: u64 = 1024 * 1024;

/// Stands where full files were removed before they were read: the follower was slower than the engine for long.
const GAP: &[u8] = b"[xpyd: output is missing here, it was removed before it was read]";

/// Reads one log, now and as it grows. The file need not be there yet.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    first: First,
    file: Option<OpenLog>,
    splitter: LineSplitter,
    /// Lines still to be passed over.
    skip: usize,
    buffer: Vec<u8>,
}

/// Which file to open first.
#[derive(Debug, Clone, Copy)]
enum First {
    Oldest,
    /// The one that is written, from this byte on.
    Present(u64),
}

#[derive(Debug)]
struct OpenLog {
    part: Part,
    position: u64,
}

impl Follower {
    /// Reads the whole log, full files too.
    pub fn from_start(path: &Path) -> Self {
        Self::new(path, First::Oldest)
    }

    /// Reads the file that is written now from the byte `offset` on; from its start if it is shorter than that.
    pub fn from_offset(path: &Path, offset: u64) -> Self {
        Self::new(path, First::Present(offset))
    }

    /// Reads the log from a line on that was looked for; all of it without one.
    pub fn from_line(path: &Path, start: Option<Start>) -> io::Result<Self> {
        let mut follower = Self::from_start(path);
        if let Some(start) = start {
            follower.skip = start.skip;
            follower.open(start.part, start.offset)?;
        }
        Ok(follower)
    }

    fn new(path: &Path, first: First) -> Self {
        Self {
            path: path.to_owned(),
            first,
            file: None,
            splitter: LineSplitter::default(),
            skip: 0,
            buffer: Vec::new(),
        }
    }

    /// The lines that are new since the last call, in pieces of a megabyte: none only if there are none now.
    pub fn read_new(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        while lines.is_empty() && self.look(&mut lines)? {}
        Ok(lines)
    }

    /// The unfinished line at the end, when no more will come.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        self.splitter.finish()
    }

    /// Waits for new lines; at least one. Safe to cancel.
    pub async fn next(&mut self) -> io::Result<Vec<Vec<u8>>> {
        loop {
            let lines = self.read_new()?;
            if !lines.is_empty() {
                return Ok(lines);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Reads once; false when there is nothing to read now.
    fn look(&mut self, lines: &mut Vec<Vec<u8>>) -> io::Result<bool> {
        if self.file.is_none() {
            self.open_first()?;
        }
        let Some(log) = self.file.as_mut() else {
            return Ok(false);
        };
        // Asked before reading: whatever was written before the rotation is then read below, or on the next look.
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
            First::Oldest => (0, 0),
            First::Present(offset) => (u64::MAX, offset),
        };
        match rotation::after(&self.path, number, None)? {
            Some(part) => self.open(part, offset),
            None => Ok(()),
        }
    }

    fn open(&mut self, mut part: Part, offset: u64) -> io::Result<()> {
        let length = part.file.metadata()?.len();
        let position = if offset > length { 0 } else { offset };
        part.file.seek(SeekFrom::Start(position))?;
        self.file = Some(OpenLog { part, position });
        Ok(())
    }
}
