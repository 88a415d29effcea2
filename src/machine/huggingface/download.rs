//! Downloads a model into the cache, once for all engines: several files at a time, each verified by its hash, resumable.

mod file;
mod listing;

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use self::listing::RemoteFile;
use super::access::{Access, AccessError};
use super::hub::RepositoryAccess;
use super::pointer::Repository;

/// Number of concurrent files. The hub's CDN limits the rate of each connection.
const AT_ONCE: usize = 4;

/// Disk space that stays free, in bytes.
const RESERVE_BYTES: u64 = 1 << 30;

/// The progress of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes on this machine.
    pub bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Number of files on this machine.
    pub files: usize,
    /// Number of all files.
    pub total_files: usize,
}

/// Why a model could not be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The hub denies access.
    #[error("the hub denies access: {0:?}")]
    Refused(RepositoryAccess),
    /// The hub is unreachable, or breaks the connection again and again.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A file arrived with a wrong hash several times.
    #[error("{name} arrived damaged {times} times: its hash differs from the hub's")]
    Damaged {
        /// The name of the file.
        name: String,
        /// Number of attempts.
        times: u32,
    },
    /// The disk is too small for the files.
    #[error("{needed} bytes are missing, but only {free} are free in {folder}")]
    NoSpace {
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The cache folder.
        folder: String,
    },
    /// Another process holds the lock of a file for too long.
    #[error("another process has locked {name} for too long; the lock is {lock}")]
    Locked {
        /// The name of the file.
        name: String,
        /// The path of the lock.
        lock: String,
    },
    /// Writing to the disk failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The counters of one download, which its threads share.
#[derive(Debug)]
struct ByteCounter<'watch> {
    bytes: AtomicU64,
    files: AtomicUsize,
    total_bytes: u64,
    total_files: usize,
    /// Set by the first thread that fails, so that the others stop.
    failed: AtomicBool,
    watch: DownloadWatch<'watch>,
}

/// Callbacks for the progress, and for messages while the download waits.
struct DownloadWatch<'watch> {
    progress: &'watch (dyn Fn(Progress) + Sync),
    note: &'watch (dyn Fn(String) + Sync),
}

impl std::fmt::Debug for DownloadWatch<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Watch")
    }
}

impl ByteCounter<'_> {
    /// Adds bytes, or subtracts them when a file was damaged.
    fn add(&self, bytes: i64) {
        if bytes >= 0 {
            self.bytes.fetch_add(bytes.unsigned_abs(), Ordering::Relaxed);
        } else {
            self.bytes.fetch_sub(bytes.unsigned_abs(), Ordering::Relaxed);
        }
        self.report();
    }

    fn report(&self) {
        (self.watch.progress)(Progress {
            bytes: self.bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes,
            files: self.files.load(Ordering::Relaxed),
            total_files: self.total_files,
        });
    }

    fn note(&self, text: String) {
        (self.watch.note)(text);
    }

    fn is_over(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// Downloads all files of `repository` at `revision` that an engine needs. The branch points to them only once all are
/// complete.
///
/// # Errors
/// When the hub denies access or is unreachable, the disk is full, or a file arrives damaged several times. Complete and
/// partial files are kept, and the next download resumes.
pub fn download(
    access: &Access,
    repository: &str,
    revision: &str,
    progress: &(dyn Fn(Progress) + Sync),
    note: &(dyn Fn(String) + Sync),
) -> Result<(), DownloadError> {
    let listing = listing::fetch(access, repository, revision, note)?;
    let place = Repository::new(&access.cache, repository);
    check_space(access, repository, &listing.files)?;
    let counter = ByteCounter {
        bytes: AtomicU64::new(0),
        files: AtomicUsize::new(0),
        total_bytes: listing.files.iter().map(|file| file.bytes).sum(),
        total_files: listing.files.len(),
        failed: AtomicBool::new(false),
        watch: DownloadWatch { progress, note },
    };
    counter.report();
    let job = file::DownloadJob {
        access,
        repository,
        place: &place,
        commit: &listing.commit,
        counter: &counter,
    };
    fetch_all(&job, listing.files.iter().collect())?;
    if revision != listing.commit {
        file::write_whole(&place.reference(revision), listing.commit.as_bytes())?;
    }
    Ok(())
}

/// Bytes of the needed files that are not in the cache yet. The hub is asked once, without retries.
pub(super) fn size(access: &Access, repository: &str, revision: &str) -> Option<u64> {
    let files = listing::once(access, repository, revision)?.files;
    Some(still_to_come(access, repository, &files))
}

/// The threads take files from a common list, the largest first, so that no thread is left with a large one at the end.
fn fetch_all(job: &file::DownloadJob<'_>, mut files: Vec<&RemoteFile>) -> Result<(), DownloadError> {
    files.sort_by_key(|file| file.bytes);
    let queue = Mutex::new(files);
    let next = || queue.lock().ok().and_then(|mut files| files.pop());
    let work = || {
        while let Some(file) = next() {
            if job.counter.is_over() {
                return Ok(());
            }
            if let Err(error) = job.fetch(file) {
                // Later errors only say that another file failed.
                let is_first = !job.counter.failed.swap(true, Ordering::Relaxed);
                return if is_first { Err(error) } else { Ok(()) };
            }
            job.counter.files.fetch_add(1, Ordering::Relaxed);
            job.counter.report();
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let results = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread panicked").into()))
        });
        results.fold(Ok(()), Result::and)
    })
}

/// Bytes of these files that are not in the cache yet.
fn still_to_come(access: &Access, repository: &str, files: &[RemoteFile]) -> u64 {
    let place = Repository::new(&access.cache, repository);
    let here = |file: &RemoteFile| {
        let blob = place.blobs().join(&file.hash);
        let part = blob.with_extension("incomplete");
        let size = |path: &std::path::Path| fs_err::metadata(path).ok().map(|file| file.len());
        size(&blob).or_else(|| size(&part)).unwrap_or(0)
    };
    files.iter().map(|file| file.bytes.saturating_sub(here(file))).sum()
}

fn check_space(access: &Access, repository: &str, files: &[RemoteFile]) -> Result<(), DownloadError> {
    let needed = still_to_come(access, repository, files);
    match super::free_bytes(&access.cache) {
        Some(free) if needed > 0 && free < needed.saturating_add(RESERVE_BYTES.min(needed)) => {
            Err(DownloadError::NoSpace {
                needed,
                free,
                folder: access.cache.display().to_string(),
            })
        }
        _ => Ok(()),
    }
}
