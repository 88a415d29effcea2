//! An engine's output: a pipe that is always drained, and the log file.
//!
//! It parses nothing. The engine must never wait for a full disk, and `log_file` does not.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use crate::fleet::LogLimits;
use crate::log_file::LogFile;

/// Capacity of the pipe in bytes, so that a burst does not block the engine while the shim writes. 1 MiB is the kernel's default
/// limit for users.
const PIPE_BYTES: i32 = 1 << 20;

/// The most bytes read from one pipe before the others get their turn.
const TURN_BYTES: usize = 1 << 20;

/// Bytes per read: at this size, reading a burst costs about as much as copying it.
const READ_BYTES: usize = 1 << 16;

/// The read end of an engine's output pipe, and its log file.
#[derive(Debug)]
pub(super) struct Log {
    pipe: File,
    inode: u64,
    buffer: Box<[u8]>,
    file: LogFile,
}

/// Whether more output can come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drained {
    /// A process still holds the write end.
    Open,
    /// No process holds the write end.
    Closed,
}

impl Log {
    /// Opens `path` for appending and creates the pipe. The second value is the write end.
    pub(super) fn open(path: &Path, limits: LogLimits) -> io::Result<(Self, OwnedFd)> {
        let file = LogFile::open(path, limits)?;
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        // Only the read end is non-blocking: engines do not expect a non-blocking stdout.
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        // Best effort: the limit for users can be lower, and 64 KiB works as well.
        let _ = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        let pipe = File::from(reader);
        let inode = pipe.metadata()?.ino();
        let log = Self {
            pipe,
            inode,
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
            file,
        };
        Ok((log, writer))
    }

    /// The pipe's inode, by which `/proc/PID/fd` names it.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// The descriptor to poll.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Moves the pipe's content to the file, at most [`TURN_BYTES`].
    pub(super) fn drain(&mut self) -> Drained {
        let mut taken = 0;
        while taken < TURN_BYTES {
            match self.pipe.read(&mut self.buffer) {
                Ok(0) => return Drained::Closed,
                Ok(count) => {
                    taken += count;
                    self.file.take(&self.buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Drained::Closed,
            }
        }
        Drained::Open
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn output_is_appended_and_its_end_is_detected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("engine.log");
        std::fs::write(&path, "killed in the mid").unwrap();
        let (mut log, writer) = Log::open(&path, LogLimits::default()).unwrap();
        let mut writer = File::from(writer);
        writer.write_all(b"after\n").unwrap();
        assert_eq!(log.drain(), Drained::Open);
        drop(writer);
        assert_eq!(log.drain(), Drained::Closed);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "killed in the mid\nafter\n");
    }
}
