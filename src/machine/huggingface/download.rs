//! Fetches a model into the cache, once for all engines: several files at a time, each checked by its hash, and gone on with
//! after a break.

mod file;
mod listing;

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use self::listing::RemoteFile;
use super::access::{Access, AccessError};
use super::hub::Answer;
use super::pointer::Repository;

/// Files that come at the same time. The hub's CDN gives one connection a part of what a line can carry.
const AT_ONCE: usize = 4;

/// What stays free of the disk.
const RESERVE_BYTES: u64 = 1 << 30;

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are here.
    pub bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Files that are here.
    pub files: usize,
    /// All files.
    pub total_files: usize,
}

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The hub refuses.
    #[error("the hub does not give it: {0:?}")]
    Refused(Answer),
    /// The hub is not there, or breaks off again and again.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A file was not what the hub said, several times.
    #[error("{name} arrived damaged {times} times: its hash is not the one that the hub names")]
    Damaged {
        /// The file.
        name: String,
        /// How often it was fetched.
        times: u32,
    },
    /// The files do not fit.
    #[error("{needed} bytes are still to come, and {free} are free in {folder}")]
    NoSpace {
        /// Bytes.
        needed: u64,
        /// Bytes.
        free: u64,
        /// The cache.
        folder: String,
    },
    /// Another process holds the lock of a file for too long.
    #[error("another process has been downloading {name} for too long; its lock is {lock}")]
    Locked {
        /// The file.
        name: String,
        /// The lock's path.
        lock: String,
    },
    /// The disk refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Counts of one download, which its threads share.
#[derive(Debug)]
struct Counter<'watch> {
    bytes: AtomicU64,
    files: AtomicUsize,
    total_bytes: u64,
    total_files: usize,
    /// Set by the first thread that fails: the others stop at their next look.
    failed: AtomicBool,
    watch: Watch<'watch>,
}

/// Who is told how far it is, and what it waits for.
struct Watch<'watch> {
    progress: &'watch (dyn Fn(Progress) + Sync),
    note: &'watch (dyn Fn(String) + Sync),
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Watch")
    }
}

impl Counter<'_> {
    /// More bytes are here, or fewer, when a file was damaged.
    fn add(&self, bytes: i64) {
        if bytes >= 0 {
            self.bytes.fetch_add(bytes.unsigned_abs(), Ordering::Relaxed);
        } else {
            self.bytes.fetch_sub(bytes.unsigned_abs(), Ordering::Relaxed);
        }
        self.tell();
    }

    fn tell(&self) {
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

/// Fetches all files of `repository` at `revision` that an engine needs. The branch points to them once all are there.
///
/// # Errors
/// When the hub refuses or stays away, the disk is full, or a file keeps arriving damaged. What has arrived is kept, and the
/// next download goes on with it.
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
    let counter = Counter {
        bytes: AtomicU64::new(0),
        files: AtomicUsize::new(0),
        total_bytes: listing.files.iter().map(|file| file.bytes).sum(),
        total_files: listing.files.len(),
        failed: AtomicBool::new(false),
        watch: Watch { progress, note },
    };
    counter.tell();
    let job = file::Job {
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

/// Bytes of the files that engines need and that are not in the cache yet; asked once.
pub(super) fn size(access: &Access, repository: &str, revision: &str) -> Option<u64> {
    let files = listing::once(access, repository, revision)?.files;
    Some(still_to_come(access, repository, &files))
}

/// Takes the files from a common list, the largest first, so that no thread is left alone with one at the end.
fn fetch_all(job: &file::Job<'_>, mut files: Vec<&RemoteFile>) -> Result<(), DownloadError> {
    files.sort_by_key(|file| file.bytes);
    let queue = Mutex::new(files);
    let next = || queue.lock().ok().and_then(|mut files| files.pop());
    let work = || {
        while let Some(file) = next() {
            if job.counter.is_over() {
                return Ok(());
            }
            if let Err(error) = job.fetch(file) {
                job.counter.failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
            job.counter.files.fetch_add(1, Ordering::Relaxed);
            job.counter.tell();
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
