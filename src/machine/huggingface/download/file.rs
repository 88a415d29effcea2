//! Downloads one file: under the lock of `huggingface_hub`, resumable, verified by its hash.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use ring::digest;
use tokio::time::Instant;

use super::super::access::{Access, AccessError, escaped, pause};
use super::super::hub::{RepositoryAccess, judge};
use super::super::pointer::{Repository, link};
use super::listing::{RemoteFile, asked_pause};
use super::{ByteCounter, DownloadError};

/// Maximum number of attempts in a row without a new byte.
const MOST_IDLE: u32 = 6;

/// How often a whole file can arrive damaged.
const MOST_DAMAGED: u32 = 3;

/// The pause after the first failed attempt. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(300);

/// How long another process can hold a lock. A large file over a slow connection takes hours, and engines would wait as
/// long.
const LOCK_DEADLINE: Duration = Duration::from_hours(2);

/// Interval between attempts to take a lock.
const LOCK_PAUSE: Duration = Duration::from_millis(200);

const PIECE: usize = 1 << 20;

/// The common data of the files of a download.
#[derive(Debug, Clone, Copy)]
pub(super) struct DownloadJob<'download> {
    pub(super) access: &'download Access,
    pub(super) repository: &'download str,
    pub(super) place: &'download Repository,
    pub(super) commit: &'download str,
    pub(super) counter: &'download ByteCounter<'download>,
}

/// How an attempt failed.
enum AttemptError {
    /// Another attempt cannot help.
    Final(DownloadError),
    /// Another attempt can help, after the pause that the hub asked for, if any.
    Passing(DownloadError, Option<Duration>),
}

impl From<io::Error> for AttemptError {
    fn from(error: io::Error) -> Self {
        Self::Final(error.into())
    }
}

impl DownloadJob<'_> {
    /// Downloads the file into the snapshot.
    pub(super) fn fetch(&self, file: &RemoteFile) -> Result<(), DownloadError> {
        let blob = self.place.blobs().join(&file.hash);
        let pointer = self.place.snapshot(self.commit).join(&file.path);
        fs_err::create_dir_all(self.place.blobs())?;
        fs_err::create_dir_all(self.place.locks())?;
        if let Some(folder) = pointer.parent() {
            fs_err::create_dir_all(folder)?;
        }
        let lock = self.lock(file)?;
        if blob.exists() {
            self.counter.add(signed(file.bytes));
        } else {
            self.fetch_blob(file, &blob)?;
        }
        drop(lock);
        point(&pointer, &link(&file.path, &file.hash), &blob)
    }

    /// Waits until no other process downloads this file. `None` if the file system has no locks.
    fn lock(&self, file: &RemoteFile) -> Result<Option<Flock<File>>, DownloadError> {
        let path = self.place.locks().join(format!("{}.lock", file.hash));
        let give_up = Instant::now() + LOCK_DEADLINE;
        let mut handle = open_lock(&path)?;
        let mut is_told = false;
        loop {
            match Flock::lock(handle, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Some(lock)),
                Err((back, nix::errno::Errno::EAGAIN)) if Instant::now() < give_up && !self.counter.is_over() => {
                    handle = back;
                }
                Err((_, nix::errno::Errno::EAGAIN)) => {
                    return Err(DownloadError::Locked {
                        name: file.path.clone(),
                        lock: path.display().to_string(),
                    });
                }
                // A file system without locks: at worst a file is downloaded twice.
                Err(_) => return Ok(None),
            }
            if !is_told {
                self.counter.note(format!(
                    "another process is downloading {}; waiting for it ({})",
                    file.path,
                    path.display()
                ));
                is_told = true;
            }
            pause(LOCK_PAUSE);
        }
    }

    fn fetch_blob(&self, file: &RemoteFile, blob: &Path) -> Result<(), DownloadError> {
        let (part, claim) = claim_part(blob)?;
        let result = self.fetch_part(file, &part);
        if result.is_ok() {
            fs_err::rename(&part, blob)?;
        } else if claim.is_none() {
            drop(fs_err::remove_file(&part));
        }
        result
    }

    /// Downloads the whole file to this path, in several attempts if necessary.
    fn fetch_part(&self, file: &RemoteFile, part: &Path) -> Result<(), DownloadError> {
        let (mut idle, mut damaged) = (0, 0);
        let mut counted: u64 = 0;
        loop {
            let before = size(part);
            let (error, asked) = match self.attempt(file, part, &mut counted) {
                Ok(true) => return Ok(()),
                Ok(false) => {
                    // Not removed: the claim is on this file.
                    open_part(part)?.set_len(0)?;
                    self.counter.add(-signed(std::mem::take(&mut counted)));
                    damaged += 1;
                    if damaged == MOST_DAMAGED {
                        return Err(DownloadError::Damaged {
                            name: file.path.clone(),
                            times: damaged,
                        });
                    }
                    self.counter
                        .note(format!("{} arrived damaged; downloading it again", file.path));
                    continue;
                }
                Err(AttemptError::Final(error)) => return Err(error),
                Err(AttemptError::Passing(error, asked)) => (error, asked),
            };
            idle = if size(part) > before { 0 } else { idle + 1 };
            if idle == MOST_IDLE || self.counter.is_over() {
                return Err(error);
            }
            let wait = asked.unwrap_or(FIRST_PAUSE * 2_u32.pow(idle));
            self.counter.note(format!(
                "{}: {error}; resuming in {:.1} s",
                file.path,
                wait.as_secs_f64()
            ));
            pause(wait);
        }
    }

    /// Downloads the rest of the file, once. Returns whether the file now has the right hash.
    fn attempt(&self, file: &RemoteFile, part: &Path, counted: &mut u64) -> Result<bool, AttemptError> {
        let mut target = open_part(part)?;
        let mut have = target.metadata()?.len();
        if have > file.bytes {
            target.set_len(0)?;
            have = 0;
        }
        let mut hasher = Hasher::new(file);
        let read = hasher.read(&mut target)?;
        self.count(counted, read);
        if have < file.bytes {
            let path = format!("{}/resolve/{}/{}", self.repository, self.commit, escaped(&file.path));
            let answer = self.access.get_file(&path, have).map_err(passing)?;
            let status = answer.status();
            match status.as_u16() {
                206 if starts_at(answer.headers(), have) => {}
                // A server without range requests starts from the beginning.
                200 => {
                    target.set_len(0)?;
                    hasher = Hasher::new(file);
                    self.count(counted, 0);
                    have = 0;
                }
                _ => return Err(refusal(status, answer.headers(), self.access)),
            }
            let mut body = answer.into_body();
            self.copy(file, &mut body.as_reader(), &mut target, &mut hasher, (have, counted))?;
        }
        target.sync_data()?;
        Ok(hasher.fits())
    }

    fn copy(
        &self,
        file: &RemoteFile,
        body: &mut dyn Read,
        target: &mut File,
        hasher: &mut Hasher,
        (mut have, counted): (u64, &mut u64),
    ) -> Result<(), AttemptError> {
        let mut piece = vec![0; PIECE];
        while have < file.bytes {
            let read = body
                .read(&mut piece)
                .map_err(|error| self.broke_off(&error.to_string()))?;
            if read == 0 {
                return Err(self.broke_off("the connection ended early"));
            }
            let bytes = &piece[..read];
            target.write_all(bytes)?;
            hasher.feed(bytes);
            have += read as u64;
            self.count(counted, have);
            if self.counter.is_over() {
                return Err(self.broke_off("another file failed"));
            }
        }
        Ok(())
    }

    fn broke_off(&self, reason: &str) -> AttemptError {
        passing(AccessError::Unreachable {
            host: super::super::access::origin(&self.access.url("")).to_owned(),
            reason: reason.to_owned(),
        })
    }

    /// Updates the progress: `now` bytes of the file are on this machine.
    fn count(&self, counted: &mut u64, now: u64) {
        self.counter.add(signed(now) - signed(*counted));
        *counted = now;
    }
}

/// Opens a lock file, which can belong to another user: `flock` only needs read permission. A new lock file gets the write
/// permissions of its folder, or `huggingface_hub` of another user could not take the lock.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = fs_err::OpenOptions::new();
    match options.append(true).create_new(true).open(path) {
        Ok(new) => {
            let folder = path.parent().unwrap_or(path);
            let mode = fs_err::metadata(folder)?.permissions().mode() & 0o666 | 0o600;
            // A failure here must not end the download.
            drop(new.file().set_permissions(Permissions::from_mode(mode)));
            Ok(new.into_file())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let writable = fs_err::OpenOptions::new().append(true).open(path);
            let file = writable.or_else(|_| fs_err::File::open(path))?;
            Ok(file.into_file())
        }
        Err(error) => Err(error),
    }
}

/// Opens the partial file to resume it. A file of another user that cannot be opened is replaced.
fn open_part(path: &Path) -> io::Result<File> {
    let mut options = fs_err::OpenOptions::new();
    options.create(true).read(true).append(true);
    let opened = options.open(path).or_else(|error| {
        if error.kind() == io::ErrorKind::PermissionDenied && fs_err::remove_file(path).is_ok() {
            return options.open(path);
        }
        Err(error)
    });
    Ok(opened?.into_file())
}

/// The partial file, which only this process writes. It is the common one, from which older versions of
/// `huggingface_hub` resume too. If another process writes that one, whose cache has another folder for locks, or if the
/// file system has no locks, it is a new one, without a claim, with a name of `huggingface_hub` 2.
fn claim_part(blob: &Path) -> io::Result<(PathBuf, Option<Flock<File>>)> {
    let common = blob.with_extension("incomplete");
    if let Ok(claim) = Flock::lock(open_part(&common)?, FlockArg::LockExclusiveNonblock) {
        let (ours, named) = (claim.metadata()?, fs_err::metadata(&common));
        // In the meantime, the file can have become the blob.
        if named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
            return Ok((common, Some(claim)));
        }
    }
    let own = format!("{:08x}.incomplete", rand::random::<u32>());
    Ok((blob.with_extension(own), None))
}

fn passing(error: AccessError) -> AttemptError {
    AttemptError::Passing(error.into(), None)
}

fn refusal(status: ureq::http::StatusCode, headers: &ureq::http::HeaderMap, access: &Access) -> AttemptError {
    let answer = match judge(status, headers, access.has_token()) {
        // The status is neither 200 nor 206, and not an error.
        RepositoryAccess::Open { .. } => RepositoryAccess::Failed(format!("status {}", status.as_u16())),
        answer => answer,
    };
    match answer {
        RepositoryAccess::RateLimited | RepositoryAccess::Failed(_) => {
            AttemptError::Passing(DownloadError::Refused(answer), asked_pause(headers))
        }
        answer => AttemptError::Final(DownloadError::Refused(answer)),
    }
}

/// Whether `Content-Range: bytes 5-9/10` begins at the requested byte.
fn starts_at(headers: &ureq::http::HeaderMap, have: u64) -> bool {
    let range = headers.get("content-range").and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok());
    start == Some(have)
}

/// Creates the link of a snapshot, or a copy if the file system has no links.
fn point(pointer: &Path, target: &Path, blob: &Path) -> Result<(), DownloadError> {
    if pointer.exists() {
        return Ok(());
    }
    // A link to a removed blob is in the way.
    match fs_err::remove_file(pointer) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    match std::os::unix::fs::symlink(target, pointer) {
        Ok(()) => Ok(()),
        Err(_) if pointer.exists() => Ok(()),
        Err(_) => Ok(fs_err::copy(blob, pointer).map(drop)?),
    }
}

/// Writes a file atomically.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs_err::create_dir_all(folder)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let half: PathBuf = path.with_file_name(name);
    fs_err::write(&half, content)?;
    fs_err::rename(&half, path)
}

/// The hash by which the hub names the file: SHA-256 for a large file, Git's for the others.
struct Hasher {
    context: digest::Context,
    wanted: String,
}

impl Hasher {
    fn new(file: &RemoteFile) -> Self {
        let is_git = file.hash.len() == 40;
        let algorithm = if is_git {
            &digest::SHA1_FOR_LEGACY_USE_ONLY
        } else {
            &digest::SHA256
        };
        let mut context = digest::Context::new(algorithm);
        if is_git {
            context.update(format!("blob {}\0", file.bytes).as_bytes());
        }
        Self {
            context,
            wanted: file.hash.to_ascii_lowercase(),
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    /// Hashes the existing part of the file, and returns its length in bytes.
    fn read(&mut self, file: &mut File) -> io::Result<u64> {
        file.seek(SeekFrom::Start(0))?;
        let mut piece = vec![0; PIECE];
        let mut total = 0;
        loop {
            let read = file.read(&mut piece)?;
            if read == 0 {
                return Ok(total);
            }
            self.feed(&piece[..read]);
            total += read as u64;
        }
    }

    /// Whether the hash is the expected one.
    fn fits(self) -> bool {
        let digest = self.context.finish();
        let bytes = digest.as_ref();
        let written = |index: usize| self.wanted.get(2 * index..2 * index + 2);
        let is_same = |(index, byte): (usize, &u8)| {
            written(index).and_then(|text| u8::from_str_radix(text, 16).ok()) == Some(*byte)
        };
        self.wanted.len() == 2 * bytes.len() && bytes.iter().enumerate().all(is_same)
    }
}

fn size(path: &Path) -> u64 {
    fs_err::metadata(path).map_or(0, |file| file.len())
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_of_other_users_can_be_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let mode = |path: &Path| fs_err::metadata(path).expect("a file").permissions().mode() & 0o777;
        fs_err::set_permissions(folder.path(), Permissions::from_mode(0o777)).expect("a mode");
        let path = folder.path().join("a.lock");
        let held = Flock::lock(open_lock(&path).expect("a lock"), FlockArg::LockExclusiveNonblock);
        assert!(held.is_ok());
        assert_eq!(mode(&path), 0o666);
        fs_err::set_permissions(&path, Permissions::from_mode(0o444)).expect("a mode");
        drop(held);
        let again = Flock::lock(open_lock(&path).expect("a lock"), FlockArg::LockExclusiveNonblock);
        assert!(again.is_ok());
        let error = open_lock(&folder.path().join("none/a.lock")).expect_err("no such folder");
        assert!(error.to_string().contains("none/a.lock"), "{error}");
    }

    #[test]
    fn two_processes_never_write_the_same_partial_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let blob = folder.path().join("abc");
        let (common, claim) = claim_part(&blob).expect("a file");
        assert!(claim.is_some());
        let (own, no_claim) = claim_part(&blob).expect("a file");
        assert!(no_claim.is_none());
        assert_ne!(common, own);
        drop(claim);
        assert!(matches!(claim_part(&blob), Ok((path, Some(_))) if path == common));
    }

    #[test]
    fn hashes_are_those_of_git_and_of_large_files() {
        // `git hash-object` of an empty file, and `sha256sum` of "abc".
        let file = |hash: &str, bytes| RemoteFile {
            path: "x".to_owned(),
            bytes,
            hash: hash.to_owned(),
        };
        assert!(Hasher::new(&file("e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", 0)).fits());
        let sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let mut hasher = Hasher::new(&file(sha, 3));
        hasher.feed(b"abc");
        assert!(hasher.fits());
        assert!(!Hasher::new(&file(sha, 3)).fits());
    }
}
