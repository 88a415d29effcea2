//! The access log: a JSON line for every request. A thread of its own writes it, so that no request waits for a disk.
//!
//! This module knows lines and a file, not the content of a line. Lines that do not fit into the queue are dropped
//! and counted.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use fs_err::os::unix::fs::OpenOptionsExt as _;
use nix::fcntl::OFlag;
use prometheus_client::metrics::counter::Counter;

/// Maximum lines in the queue. At half a kilobyte each, they take a few megabytes.
const MAX_WAITING: usize = 8192;

/// Maximum bytes of one write.
const BATCH_BYTES: usize = 64 << 10;

/// An open access log. Clones are the same log. Dropping the last one waits until everything is written.
#[derive(Debug, Clone)]
pub struct AccessLog(Arc<OpenLog>);

#[derive(Debug)]
struct OpenLog {
    /// `None` only while the log is dropped.
    lines: Option<SyncSender<String>>,
    writer: Option<JoinHandle<()>>,
    dropped: Counter,
}

impl AccessLog {
    /// Opens the log and appends to it. A file of more than `max_bytes` is renamed to `FILE.1`, and a new one is
    /// started.
    ///
    /// # Errors
    /// When the file cannot be opened, or the thread cannot start.
    pub fn open(path: &Path, max_bytes: u64) -> io::Result<Self> {
        let dropped = Counter::default();
        let log = LogFile {
            file: append_to(path)?,
            path: path.to_owned(),
            max_bytes,
        };
        let (lines, waiting) = sync_channel(MAX_WAITING);
        let uncounted = dropped.clone();
        let writer = std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_all(log, &waiting, &uncounted))?;
        Ok(Self(Arc::new(OpenLog {
            lines: Some(lines),
            writer: Some(writer),
            dropped,
        })))
    }

    /// Queues a line, without its line end, for the writer.
    pub(crate) fn write_line(&self, line: String) {
        let sent = self.0.lines.as_ref().map(|lines| lines.try_send(line));
        if !matches!(sent, Some(Ok(()))) {
            self.0.dropped.inc();
        }
    }

    /// The counter of dropped lines.
    pub(crate) fn dropped(&self) -> Counter {
        self.0.dropped.clone()
    }
}

impl Drop for OpenLog {
    fn drop(&mut self) {
        self.lines = None;
        if let Some(Err(_)) = self.writer.take().map(JoinHandle::join) {
            tracing::error!("the access log writer stopped unexpectedly");
        }
    }
}

/// Writes lines until all senders are dropped.
fn write_all(mut log: LogFile, lines: &Receiver<String>, dropped: &Counter) {
    while let Ok(line) = lines.recv() {
        let mut batch = line + "\n";
        let mut count = 1;
        while batch.len() < BATCH_BYTES
            && let Ok(line) = lines.try_recv()
        {
            batch.push_str(&line);
            batch.push('\n');
            count += 1;
        }
        if let Err(error) = log.write(batch.as_bytes()) {
            dropped.inc_by(count);
            tracing::warn!(%error, "cannot write the access log");
        }
    }
}

/// The log file and its path.
#[derive(Debug)]
struct LogFile {
    file: File,
    path: PathBuf,
    max_bytes: u64,
}

impl LogFile {
    fn write(&mut self, batch: &[u8]) -> io::Result<()> {
        let open = self.file.metadata()?;
        let named = std::fs::metadata(&self.path).ok();
        let is_moved = named.is_none_or(|named| (named.dev(), named.ino()) != (open.dev(), open.ino()));
        if is_moved {
            // Another program has rotated the file: further lines belong into the new one.
            self.file = append_to(&self.path)?;
        } else if open.is_file() && open.len() > 0 && open.len() + batch.len() as u64 > self.max_bytes {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            std::fs::rename(&self.path, old)?;
            self.file = append_to(&self.path)?;
        }
        self.file.write_all(batch)
    }
}

/// Opens the file for appending. A pipe without a reader is an error, because opening it would block until a reader
/// comes.
fn append_to(path: &Path) -> io::Result<File> {
    let is_pipe = fs_err::metadata(path).is_ok_and(|file| file.file_type().is_fifo());
    if is_pipe {
        // Fails at once if no reader exists.
        drop(
            fs_err::OpenOptions::new()
                .write(true)
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open(path)?,
        );
    }
    Ok(xpyd_base::private::append(path)?.into_parts().0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotated_log_loses_no_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let [path, moved, old] = ["log", "moved", "log.1"].map(|name| folder.path().join(name));
        let mut log = LogFile {
            file: append_to(&path).expect("a file"),
            path: path.clone(),
            max_bytes: 10,
        };
        let mut write = |text: &str| log.write(text.as_bytes()).expect("written");
        let read = |path: &Path| std::fs::read_to_string(path).expect("a file");
        write("one\n");
        std::fs::rename(&path, &moved).expect("rotated");
        write("two\n");
        assert_eq!((read(&moved), read(&path)), ("one\n".into(), "two\n".into()));
        write("three\n");
        assert_eq!(read(&path), "two\nthree\n");
        write("four\n");
        assert_eq!((read(&old), read(&path)), ("two\nthree\n".into(), "four\n".into()));
        std::fs::remove_file(&path).expect("removed");
        write("a line that is longer than a file may be\n");
        assert_eq!(read(&path), "a line that is longer than a file may be\n");
    }

    #[test]
    fn a_dropped_log_has_written_or_counted_every_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let log = AccessLog::open(&path, 1 << 20).expect("a log");
        for line in 0..1000 {
            log.write_line(line.to_string());
        }
        let dropped = log.dropped();
        drop(log);
        let text = std::fs::read_to_string(&path).expect("a file");
        assert_eq!(text.lines().count() as u64 + dropped.get(), 1000);
        assert_eq!(dropped.get(), 0);

        // A disk that is always full.
        let log = AccessLog::open(Path::new("/dev/full"), 1 << 20).expect("a device");
        log.write_line("lost".into());
        let dropped = log.dropped();
        drop(log);
        assert_eq!(dropped.get(), 1);
        assert!(AccessLog::open(folder.path(), 1).is_err(), "a folder is no file");
    }
}
