//! The layout of `huggingface_hub`'s cache: one folder per repository, with blobs by hash, and snapshots of links to them.

use std::path::{Component, Path, PathBuf};

/// The folder of one repository, which does not have to exist.
#[derive(Debug, Clone)]
pub(super) struct Repository {
    folder: PathBuf,
    locks: PathBuf,
}

impl Repository {
    /// The folder of the model repository `name` in the cache.
    pub(super) fn new(cache: &Path, name: &str) -> Self {
        let folder = format!("models--{}", name.replace('/', "--"));
        Self {
            locks: cache.join(".locks").join(&folder),
            folder: cache.join(folder),
        }
    }

    /// The file with the commit of a branch or tag.
    pub(super) fn reference(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision)
    }

    /// The folder with the files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The folder with all contents, named by their hashes.
    pub(super) fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }

    /// The folder with the locks of downloads.
    pub(super) fn locks(&self) -> &Path {
        &self.locks
    }

    /// The commit of a branch, a tag or a commit hash.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        if !is_plain(revision) {
            return None;
        }
        let text = fs_err::read_to_string(self.reference(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }
}

/// Whether a text is a full commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hash(text)
}

/// Whether a text can be the name of a blob: a SHA-1 or a SHA-256.
pub(super) fn is_hash(text: &str) -> bool {
    [40, 64].contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a path of a repository stays within the folder that it is joined to.
pub(super) fn is_plain(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    !path.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// The link from a file of a snapshot to its blob. It is relative, so that the cache can be moved.
pub(super) fn link(file: &str, blob: &str) -> PathBuf {
    let depth = file.split('/').count() + 1;
    let mut path: PathBuf = std::iter::repeat_n("..", depth).collect();
    path.push("blobs");
    path.push(blob);
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_those_of_huggingface_hub() {
        assert_eq!(link("config.json", "d7ed"), Path::new("../../blobs/d7ed"));
        assert_eq!(link("onnx/a/model.bin", "d7ed"), Path::new("../../../../blobs/d7ed"));
    }

    #[test]
    fn nothing_leaves_its_folder() {
        for path in ["../x", "a/../../x", "/x", "", "./x"] {
            assert!(!is_plain(path) || path == "./x", "{path}");
        }
        assert!(is_plain("a/b.json"));
        assert!(!is_hash("../../../../etc/passwd") && !is_hash(&"g".repeat(40)) && is_hash(&"a".repeat(64)));
    }
}
