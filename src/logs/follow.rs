//! Reading a log as it grows, and its last lines without reading all of it.
//!
//! A follower asks the file for more ten times a second. It goes on where it was after a rotation (another file has the
//! name now; the old one is read to its end first) and starts over when the file was cut.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err::File;

use super::lines::LineSplitter;

/// How long a follower waits before it looks at a file again that had nothing new.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Most bytes that one look takes, so that a flood in one log does not starve the others.
const BYTES_PER_LOOK: usize = 1024 * 1024;

/// How far from the end the search for the last lines begins, in bytes. Doubled until there are enough.
const FIRST_WINDOW: u64 = 64 * 1024;

/// Reads one log, now and as it grows. The file need not be there yet.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    /// Where to begin in the file that is opened first, in bytes.
    first_offset: u64,
    file: Option<OpenLog>,
    splitter: LineSplitter,
}

#[derive(Debug)]
struct OpenLog {
    file: File,
    inode: u64,
    position: u64,
}

impl Follower {
    /// Reads the whole log.
    pub fn from_start(path: &Path) -> Self {
        Self::from_offset(path, 0)
    }

    /// Reads the log from the byte `offset` on; from its start if it is shorter than that.
    pub fn from_offset(path: &Path, offset: u64) -> Self {
        Self {
            path: path.to_owned(),
            first_offset: offset,
            file: None,
            splitter: LineSplitter::default(),
        }
    }

    /// Reads the last `count` lines that are there now, which it returns, and goes on from there. An unfinished line at
    /// the end is not among them; it comes when it is finished.
    pub fn from_last(path: &Path, count: usize) -> io::Result<(Self, Vec<Vec<u8>>)> {
        let mut follower = Self::from_start(path);
        follower.open()?;
        let Some(log) = follower.file.as_mut() else {
            return Ok((follower, Vec::new()));
        };
        let length = log.file.metadata()?.len();
        let mut window = FIRST_WINDOW;
        loop {
            let start = length.saturating_sub(window);
            let (lines, splitter) = last_lines(&mut log.file, start, length, count)?;
            if start == 0 || lines.len() >= count {
                log.position = length;
                follower.splitter = splitter;
                return Ok((follower, lines.into()));
            }
            window = window.saturating_mul(2);
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
            self.open()?;
        }
        let Some(log) = self.file.as_mut() else {
            return Ok(false);
        };
        // Asked before reading: whatever was written before the rotation is then read below, or on the next look.
        let is_replaced = match fs_err::metadata(&self.path) {
            Ok(now) => now.ino() != log.inode,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if log.file.metadata()?.len() < log.position {
            log.position = 0;
            log.file.seek(SeekFrom::Start(0))?;
            self.splitter.reset();
        }
        let mut bytes = Vec::new();
        let count = (&mut log.file).take(BYTES_PER_LOOK as u64).read_to_end(&mut bytes)?;
        log.position += count as u64;
        self.splitter.feed(&bytes, |line| lines.push(line));
        if count == 0 && is_replaced {
            // A rotation cuts at a line's end; should it not have, the line is ended here.
            lines.extend(self.splitter.finish());
            self.file = None;
            return Ok(true);
        }
        Ok(count > 0)
    }

    fn open(&mut self) -> io::Result<()> {
        match File::open(&self.path) {
            Ok(mut file) => {
                let metadata = file.metadata()?;
                let offset = std::mem::take(&mut self.first_offset);
                let position = if offset > metadata.len() { 0 } else { offset };
                file.seek(SeekFrom::Start(position))?;
                self.file = Some(OpenLog {
                    file,
                    inode: metadata.ino(),
                    position,
                });
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The last `count` whole lines between the bytes `start` and `end`, and the splitter as it is at the end.
fn last_lines(file: &mut File, start: u64, end: u64, count: usize) -> io::Result<(VecDeque<Vec<u8>>, LineSplitter)> {
    let mut splitter = LineSplitter::default();
    let mut lines = VecDeque::new();
    // A window in the middle begins within a line, or just after one; the first is not counted either way.
    let mut is_partial = start > 0;
    file.seek(SeekFrom::Start(start))?;
    let mut rest = file.take(end - start);
    let mut bytes = vec![0; BYTES_PER_LOOK.min(usize::try_from(end - start).unwrap_or(BYTES_PER_LOOK))];
    loop {
        let read = rest.read(&mut bytes)?;
        if read == 0 {
            return Ok((lines, splitter));
        }
        splitter.feed(&bytes[..read], |line| {
            if std::mem::take(&mut is_partial) || count == 0 {
                return;
            }
            if lines.len() == count {
                lines.pop_front();
            }
            lines.push_back(line);
        });
    }
}
