//! Finds a tokenizer: a file, a folder, or a repository in the Hugging Face cache. Nothing is downloaded.

use std::path::{Path, PathBuf};

use super::TokenizerError;

/// The folder or file of a tokenizer, named by a path or by a repository `owner/name` in the cache `hub`.
///
/// # Errors
/// When it is not found; the reason says where it was searched.
pub fn find(name: &str, hub: &Path) -> Result<PathBuf, TokenizerError> {
    let missing = |reason: String| TokenizerError::Missing {
        name: name.to_owned(),
        reason,
    };
    let path = Path::new(name);
    if path.exists() {
        if path.is_dir() && !path.join("tokenizer.json").is_file() {
            return Err(missing("the folder has no `tokenizer.json`".to_owned()));
        }
        return Ok(path.to_owned());
    }
    let parts: Vec<&str> = name.split('/').collect();
    let is_repository = parts.len() <= 2 && parts.iter().all(|part| !part.is_empty() && !part.starts_with('.'));
    if !is_repository {
        return Err(missing("no such file or folder".to_owned()));
    }
    let repository = hub.join(format!("models--{}", parts.join("--")));
    let snapshots = repository.join("snapshots");
    let main = std::fs::read_to_string(repository.join("refs/main")).unwrap_or_default();
    let mut folders: Vec<PathBuf> = Vec::new();
    if !main.trim().is_empty() {
        folders.push(snapshots.join(main.trim()));
    }
    let others = std::fs::read_dir(&snapshots).into_iter().flatten().flatten();
    let mut others: Vec<PathBuf> = others.map(|entry| entry.path()).collect();
    others.sort();
    folders.extend(others);
    let found = folders
        .into_iter()
        .find(|folder| folder.join("tokenizer.json").is_file());
    found.ok_or_else(|| {
        missing(if repository.is_dir() {
            format!("its copy in `{}` has no `tokenizer.json`", repository.display())
        } else {
            format!(
                "no such file or folder, and no such repository in the cache `{}`",
                hub.display()
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_found_at_its_main_revision_first() {
        let hub = tempfile::tempdir().unwrap();
        let repository = hub.path().join("models--org--model");
        for revision in ["aaa", "bbb"] {
            let folder = repository.join("snapshots").join(revision);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("tokenizer.json"), "{}").unwrap();
        }
        let found = |name: &str| find(name, hub.path());
        assert_eq!(found("org/model").unwrap(), repository.join("snapshots/aaa"));
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs/main"), "bbb\n").unwrap();
        assert_eq!(found("org/model").unwrap(), repository.join("snapshots/bbb"));
        let reason = found("org/other").unwrap_err().to_string();
        assert!(reason.contains("no such repository"), "{reason}");
        let reason = found("/nowhere/at/all").unwrap_err().to_string();
        assert_eq!(reason, "no tokenizer `/nowhere/at/all`: no such file or folder");
        let empty = hub.path().to_str().unwrap();
        let reason = found(empty).unwrap_err().to_string();
        assert!(reason.ends_with("the folder has no `tokenizer.json`"), "{reason}");
    }
}
