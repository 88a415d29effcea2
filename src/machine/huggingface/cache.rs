//! The model's files on this machine: a folder, a snapshot in the cache, or parts of one.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;

use super::pointer::Repository;
use super::{beyond_us, is_repository};

/// The model's files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// The state of these files.
    pub state: CacheState,
    /// The folder with the files: the user's, or a snapshot of the cache.
    pub folder: Option<PathBuf>,
}

/// The state of a model's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheState {
    /// There is no model to look for.
    None,
    /// A folder of the user with all files that an engine needs.
    Folder,
    /// A path that is no model, or a folder that lacks files.
    BadFolder {
        /// The problem, as the rest of a sentence that begins with the path.
        problem: String,
    },
    /// A GGUF file of the user.
    GgufFile,
    /// A model that only the engine can find: an object store, another hub, a GGUF file of a repository.
    Elsewhere {
        /// The kind of place, as the rest of a sentence that begins with the name.
        what: &'static str,
    },
    /// A snapshot of the cache with all files that an engine needs.
    Complete,
    /// A snapshot with missing files.
    Partial {
        /// The missing files, or `weights` and `a tokenizer` if there is no index.
        missing: Vec<String>,
    },
    /// No file of it is in the cache.
    Absent,
}

impl CacheState {
    /// Whether files of a repository are missing.
    pub fn is_to_fetch(&self) -> bool {
        matches!(self, Self::Absent | Self::Partial { .. })
    }
}

/// A file that an interrupted download has left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The path of the file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// The kind of file.
    pub kind: LeftoverKind,
}

/// A kind of file in the cache that belongs to no finished download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftoverKind {
    /// A lock that a live process holds, so a download is running.
    HeldLock,
    /// A lock that no process holds, for a file that was never completed.
    StaleLock,
    /// A part of a file that no download can resume.
    DeadPart,
}

/// Minimum age of a leftover. Younger files can belong to a download that is just starting.
const OLD: Duration = Duration::from_mins(10);

/// Maximum size of a JSON file to read, in bytes.
const MOST_JSON: u64 = 64 << 20;

impl Model {
    pub(super) fn none() -> Self {
        Self {
            state: CacheState::None,
            folder: None,
        }
    }
}

/// Looks for the model, a path or a repository, in the places of an engine.
pub(super) fn inspect(model: &str, revision: &str, cache: &Path) -> Model {
    let path = Path::new(model);
    if path.is_dir() {
        let state = match folder_problem(path) {
            None => CacheState::Folder,
            Some(problem) => CacheState::BadFolder { problem },
        };
        let folder = Some(path.to_owned());
        return Model { state, folder };
    }
    let is_gguf = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if path.is_file() && is_gguf {
        return Model {
            state: CacheState::GgufFile,
            folder: None,
        };
    }
    if let Some(what) = beyond_us(model) {
        return beside_hub(model, what);
    }
    if !is_repository(model) {
        let problem = if path.is_file() {
            "is a file, not a folder"
        } else {
            "does not exist"
        };
        return Model {
            state: CacheState::BadFolder {
                problem: problem.to_owned(),
            },
            folder: None,
        };
    }
    let repository = Repository::new(cache, model);
    let snapshot = repository.commit(revision).map(|commit| repository.snapshot(&commit));
    let Some(folder) = snapshot.filter(|folder| folder.is_dir()) else {
        return Model {
            state: CacheState::Absent,
            folder: None,
        };
    };
    let missing = missing(&folder);
    let state = if missing.is_empty() {
        CacheState::Complete
    } else {
        CacheState::Partial { missing }
    };
    Model {
        state,
        folder: Some(folder),
    }
}

/// A model that only the engine can find, unless it is a folder on this machine.
pub(super) fn beside_hub(model: &str, what: &'static str) -> Model {
    let path = Path::new(model);
    if path.is_dir() {
        return inspect(model, "", path);
    }
    Model {
        state: CacheState::Elsewhere { what },
        folder: None,
    }
}

/// Why a folder of the user is not a model, as the rest of a sentence.
fn folder_problem(folder: &Path) -> Option<String> {
    if !is_there(folder, &["config.json", "params.json"]) {
        return Some("has no config.json".to_owned());
    }
    let absent: Vec<String> = shards(folder)
        .into_iter()
        .filter(|shard| !folder.join(shard).exists())
        .collect();
    if let Some(first) = absent.first() {
        let more = match absent.len() {
            1 => String::new(),
            count => format!(" and {} more shards", count - 1),
        };
        return Some(format!("lacks {first}{more} of its index"));
    }
    let pointer = weights(folder).into_iter().find(|path| is_lfs_pointer(path))?;
    let name = pointer.file_name()?.to_string_lossy().into_owned();
    Some(format!(
        "has only the Git LFS pointer to {name}, not the file: run `git lfs pull` in it"
    ))
}

/// The files that a snapshot lacks; empty if an engine can start from it.
fn missing(folder: &Path) -> Vec<String> {
    let mut missing = Vec::new();
    if !is_there(folder, &["config.json", "params.json"]) {
        missing.push("config.json".to_owned());
    }
    let shards = shards(folder);
    if shards.is_empty() && weights(folder).is_empty() {
        missing.push("weights".to_owned());
    }
    // A link to a missing blob counts as missing.
    missing.extend(shards.into_iter().filter(|shard| !folder.join(shard).exists()));
    let tokenizers = [
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "tekken.json",
        "spiece.model",
    ];
    let has_tokenizer = is_there(folder, &tokenizers) || !ending(folder, &["tiktoken"]).is_empty();
    if !has_tokenizer {
        missing.push("a tokenizer".to_owned());
    }
    missing
}

fn is_there(folder: &Path, names: &[&str]) -> bool {
    names.iter().any(|name| folder.join(name).exists())
}

#[derive(Debug, Deserialize)]
struct ShardIndex {
    weight_map: std::collections::HashMap<String, String>,
}

/// The files in the model's index; empty without an index.
fn shards(folder: &Path) -> BTreeSet<String> {
    let names = [
        "model.safetensors.index.json",
        "consolidated.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ];
    // Engines use the first kind that exists.
    let index = names.iter().map(|name| folder.join(name)).find(|path| path.exists());
    let read = |path: PathBuf| -> Option<ShardIndex> {
        let is_sane = fs_err::metadata(&path).is_ok_and(|file| file.len() <= MOST_JSON);
        serde_json::from_slice(&fs_err::read(path).ok().filter(|_| is_sane)?).ok()
    };
    index
        .and_then(read)
        .map(|index| index.weight_map.into_values().collect())
        .unwrap_or_default()
}

/// The files of the folder that can be weights.
fn weights(folder: &Path) -> Vec<PathBuf> {
    ending(folder, &["safetensors", "bin", "pt", "gguf"])
}

fn ending(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let entries = fs_err::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| extensions.contains(&extension)) && path.exists()
        })
        .collect()
}

/// Whether the file is a pointer that Git writes without its LFS extension (git-lfs, `docs/spec.md`).
fn is_lfs_pointer(path: &Path) -> bool {
    let is_small = fs_err::metadata(path).is_ok_and(|file| file.len() < 1024);
    is_small && fs_err::read(path).is_ok_and(|text| text.starts_with(b"version https://git-lfs"))
}

/// The remains of interrupted downloads of this repository, and locks in use.
pub(super) fn leftovers(name: &str, cache: &Path) -> Vec<Leftover> {
    let repository = Repository::new(cache, name);
    let blobs = repository.blobs();
    let mut found = Vec::new();
    for path in files(repository.locks()) {
        let Some(blob) = path.file_stem().map(|stem| blobs.join(stem)) else {
            continue;
        };
        // `huggingface_hub` leaves the locks of finished downloads behind; they are harmless.
        let kind = if is_held(&path) {
            LeftoverKind::HeldLock
        } else if !blob.exists() && is_old(&path) {
            LeftoverKind::StaleLock
        } else {
            continue;
        };
        found.push(leftover(path, kind));
    }
    for path in files(&blobs) {
        if is_dead_part(&path) && is_old(&path) {
            found.push(leftover(path, LeftoverKind::DeadPart));
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    found
}

fn leftover(path: PathBuf, kind: LeftoverKind) -> Leftover {
    let bytes = fs_err::symlink_metadata(&path).map_or(0, |file| file.len());
    Leftover { path, bytes, kind }
}

/// `<hash>.<8 hexadecimal digits>.incomplete`, a name that only its process knew (`huggingface_hub` 2). A file
/// `<hash>.incomplete` can be resumed.
fn is_dead_part(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let parts: Vec<&str> = name.split('.').collect();
    matches!(parts[..], [hash, own, "incomplete"] if super::pointer::is_hash(hash)
        && own.len() == 8 && own.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn is_old(path: &Path) -> bool {
    let changed = fs_err::symlink_metadata(path).and_then(|file| file.modified());
    changed.is_ok_and(|changed| SystemTime::now().duration_since(changed).is_ok_and(|age| age > OLD))
}

/// Whether a process holds the lock, which is one of `flock(2)`. A file that cannot be opened counts as held.
fn is_held(path: &Path) -> bool {
    let Ok(file) = std::fs::File::open(path) else {
        return false;
    };
    Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let own = nix::unistd::geteuid().as_raw();
    let entries = fs_err::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            // Only a file of this user can be reported as a leftover, and removed.
            entry.metadata().is_ok_and(|file| file.is_file() && file.uid() == own)
        })
        .map(|entry| entry.path())
        .collect()
}

impl Leftover {
    /// Removes the file, unless a process has locked it meanwhile.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn remove(&self) -> std::io::Result<()> {
        let taken = match self.kind {
            LeftoverKind::HeldLock => true,
            LeftoverKind::StaleLock => is_held(&self.path),
            LeftoverKind::DeadPart => !is_old(&self.path),
        };
        if taken {
            return Ok(());
        }
        fs_err::remove_file(&self.path)
    }
}

/// Repositories in the cache with similar names, the most similar first.
pub(super) fn similar(name: &str, cache: &Path) -> Vec<String> {
    const CLOSE: f64 = 0.75;
    const MOST: usize = 3;
    let entries = fs_err::read_dir(cache).into_iter().flatten().flatten();
    let mut close: Vec<(f64, String)> = entries
        .filter_map(|entry| {
            let folder = entry.file_name().to_string_lossy().into_owned();
            let known = folder.strip_prefix("models--")?.replacen("--", "/", 1);
            let likeness = strsim::normalized_damerau_levenshtein(&known.to_lowercase(), &name.to_lowercase());
            (known != name && likeness >= CLOSE).then_some((likeness, known))
        })
        .collect();
    close.sort_by(|one, other| other.0.total_cmp(&one.0).then_with(|| one.1.cmp(&other.1)));
    close.into_iter().take(MOST).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// A cache with `org/model` at `main`, with these files.
    fn cache(files: &[(&str, &str)]) -> tempfile::TempDir {
        let cache = tempfile::tempdir().expect("a folder");
        let repository = Repository::new(cache.path(), "org/model");
        let snapshot = repository.snapshot(COMMIT);
        fs_err::create_dir_all(&snapshot).expect("a folder");
        fs_err::create_dir_all(repository.reference("")).expect("a folder");
        fs_err::write(repository.reference("main"), COMMIT).expect("a file");
        for (name, text) in files {
            fs_err::write(snapshot.join(name), text).expect("a file");
        }
        cache
    }

    fn state(cache: &tempfile::TempDir) -> CacheState {
        inspect("org/model", "main", cache.path()).state
    }

    const INDEX: &str = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;

    #[test]
    fn a_complete_snapshot_has_every_shard() {
        let empty = tempfile::tempdir().expect("a folder");
        assert_eq!(state(&empty), CacheState::Absent);
        let mut files = vec![("config.json", "{}"), ("model.safetensors.index.json", INDEX)];
        files.push(("model-1.safetensors", "x"));
        let partial = CacheState::Partial {
            missing: vec!["model-2.safetensors".to_owned(), "a tokenizer".to_owned()],
        };
        assert_eq!(state(&cache(&files)), partial);
        files.extend([("model-2.safetensors", "x"), ("tokenizer.json", "{}")]);
        assert_eq!(state(&cache(&files)), CacheState::Complete);
    }

    #[test]
    fn a_dangling_link_is_missing() {
        let files = [("config.json", "{}"), ("tokenizer.json", "{}")];
        let cache = cache(&files);
        let folder = Repository::new(cache.path(), "org/model").snapshot(COMMIT);
        std::os::unix::fs::symlink("../../blobs/gone", folder.join("model.safetensors")).expect("a link");
        let weights = CacheState::Partial {
            missing: vec!["weights".to_owned()],
        };
        assert_eq!(state(&cache), weights);
    }

    #[test]
    fn a_bad_folder_has_a_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_str().expect("text");
        let problem = || match inspect(path, "main", Path::new("/none")).state {
            CacheState::BadFolder { problem } => problem,
            other => format!("{other:?}"),
        };
        assert_eq!(problem(), "has no config.json");
        fs_err::write(folder.path().join("config.json"), "{}").expect("a file");
        fs_err::write(folder.path().join("model.safetensors.index.json"), INDEX).expect("a file");
        assert_eq!(problem(), "lacks model-1.safetensors and 1 more shards of its index");
        fs_err::write(folder.path().join("model-1.safetensors"), "x").expect("a file");
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
        fs_err::write(folder.path().join("model-2.safetensors"), pointer).expect("a file");
        assert!(problem().contains("git lfs pull"), "{}", problem());
        fs_err::write(folder.path().join("model-2.safetensors"), "x").expect("a file");
        assert_eq!(problem(), "Folder");
    }

    #[test]
    fn leftovers_are_old_and_unlocked() {
        let cache = cache(&[]);
        let repository = Repository::new(cache.path(), "org/model");
        fs_err::create_dir_all(repository.locks()).expect("a folder");
        fs_err::create_dir_all(repository.blobs()).expect("a folder");
        let (gone, done) = ("a".repeat(40), "b".repeat(40));
        let lock = repository.locks().join(format!("{gone}.lock"));
        let part = repository.blobs().join(format!("{gone}.0123abcd.incomplete"));
        let others = [
            repository.locks().join(format!("{done}.lock")),
            repository.blobs().join(&done),
            repository.blobs().join(format!("{gone}.incomplete")),
        ];
        for path in others.iter().chain([&lock, &part]) {
            fs_err::write(path, "x").expect("a file");
        }
        let kinds = || -> Vec<LeftoverKind> {
            leftovers("org/model", cache.path())
                .iter()
                .map(|leftover| leftover.kind)
                .collect()
        };
        assert_eq!(kinds(), [], "all of it is young");
        let old = SystemTime::now() - 2 * OLD;
        for path in others.iter().chain([&lock, &part]) {
            std::fs::File::options()
                .append(true)
                .open(path)
                .and_then(|file| file.set_modified(old))
                .expect("a time");
        }
        assert_eq!(kinds(), [LeftoverKind::StaleLock, LeftoverKind::DeadPart]);
        let held = Flock::lock(
            std::fs::File::open(&lock).expect("a file"),
            FlockArg::LockExclusiveNonblock,
        );
        let held = held.map_err(|(_, error)| error).expect("a lock");
        assert_eq!(kinds(), [LeftoverKind::HeldLock, LeftoverKind::DeadPart]);
        drop(held);
        for leftover in leftovers("org/model", cache.path()) {
            leftover.remove().expect("it goes");
        }
        assert!(!lock.exists() && !part.exists() && others.iter().all(|path| path.exists()));
    }

    #[test]
    fn similar_cached_names_are_found() {
        let cache = tempfile::tempdir().expect("a folder");
        for folder in [
            "models--Qwen--Qwen2.5-0.5B-Instruct",
            "models--other--model",
            "datasets--Qwen--Qwen2.5-0.5B",
        ] {
            fs_err::create_dir(cache.path().join(folder)).expect("a folder");
        }
        assert_eq!(
            similar("Qwen/Qwen2.5-0.5b-Instuct", cache.path()),
            ["Qwen/Qwen2.5-0.5B-Instruct"]
        );
    }
}
