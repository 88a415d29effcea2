//! Keeps what an engine prints: a pipe that is always drained, and a file that is only appended to.
//!
//! Parses nothing: others read the file. The engine must never wait for a disk, so what cannot be written is dropped and
//! counted, and the count is written once there is room again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

/// Room in the pipe, so that a burst does not block the engine while the guardian writes. 1 MiB is the kernel's default
/// limit for users.
const PIPE_BYTES: i32 = 1 << 20;

/// Most bytes taken from one pipe before the others get their turn.
const TURN_BYTES: usize = 1 << 20;

/// The reading end of an engine's output, and the file it goes to.
#[derive(Debug)]
pub(super) struct Log {
    pipe: File,
    file: File,
    inode: u64,
    dropped: u64,
}

/// Whether more output can come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drained {
    /// Some process still holds the writing end.
    Open,
    /// Nobody does.
    Closed,
}

impl Log {
    /// Opens `path` for appending and makes the pipe; the second value is the end to write to.
    pub(super) fn open(path: &Path) -> io::Result<(Self, OwnedFd)> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        // Only the reading end must not block: engines do not expect a non-blocking stdout.
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        // Best effort: the limit for users may be lower, and 64 KiB works as well.
        let _ = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        let pipe = File::from(reader);
        let inode = pipe.metadata()?.ino();
        let log = Self {
            pipe,
            file,
            inode,
            dropped: 0,
        };
        Ok((log, writer))
    }

    /// The pipe's inode, by which `/proc/PID/fd` names it.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// What to poll.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Moves what is in the pipe to the file, at most [`TURN_BYTES`].
    pub(super) fn drain(&mut self) -> Drained {
        let mut buffer = [0; 1 << 14];
        let mut taken = 0;
        while taken < TURN_BYTES {
            match self.pipe.read(&mut buffer) {
                Ok(0) => return Drained::Closed,
                Ok(count) => {
                    taken += count;
                    keep(&mut self.file, &mut self.dropped, &buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Drained::Closed,
            }
        }
        Drained::Open
    }
}

/// Appends `bytes`. What does not fit is counted in `dropped`; the next write that fits is preceded by a line about it.
fn keep(file: &mut impl Write, dropped: &mut u64, mut bytes: &[u8]) {
    if *dropped > 0 {
        let marker = format!("\n[xpyd: {dropped} bytes of output lost here, the disk did not take them]\n");
        if file.write_all(marker.as_bytes()).is_err() {
            *dropped += bytes.len() as u64;
            return;
        }
        *dropped = 0;
    }
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(count) if count > 0 => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => {
                *dropped += bytes.len() as u64;
                return;
            }
        }
    }
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
    fn a_full_disk_drops_output_counts_it_and_goes_on() {
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

    #[test]
    fn output_is_appended_and_the_end_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("engine.log");
        std::fs::write(&path, "before\n").unwrap();
        let (mut log, writer) = Log::open(&path).unwrap();
        let mut writer = File::from(writer);
        writer.write_all(b"after\n").unwrap();
        assert_eq!(log.drain(), Drained::Open);
        drop(writer);
        assert_eq!(log.drain(), Drained::Closed);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\nafter\n");
    }
}
