//! Hugging Face: is there a token, and is the model here already? Nothing is asked over the network.

use std::path::{Path, PathBuf};

/// Token and cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HuggingFace {
    /// The token, if one was found. Its text is never kept.
    pub token: Option<Token>,
    /// Whether the model is a folder, or in the cache.
    pub model_is_local: bool,
}

/// What is known of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Where it was found.
    pub source: TokenSource,
    /// Whether it has the form `hf_…`.
    pub well_formed: bool,
}

/// Where a token was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The variable of this name.
    Environment(&'static str),
    /// The file that `hf auth login` writes.
    File(PathBuf),
}

/// Looks for token and model where `huggingface_hub` does.
pub(super) fn survey(model: &str) -> HuggingFace {
    let (home, hub) = (home(), hub());
    HuggingFace {
        token: token(&home),
        model_is_local: is_local(model, &hub),
    }
}

/// Where repositories are cached.
pub(super) fn hub() -> PathBuf {
    std::env::var_os("HF_HUB_CACHE").map_or_else(|| home().join("hub"), PathBuf::from)
}

/// `HF_HOME`, or `huggingface` in the user's cache folder.
fn home() -> PathBuf {
    let path = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    path("HF_HOME")
        .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
        .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface")))
        .unwrap_or_else(|| PathBuf::from(".cache/huggingface"))
}

fn token(home: &Path) -> Option<Token> {
    let from_environment = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(|name| {
        let text = std::env::var(name).ok().filter(|text| !text.trim().is_empty())?;
        Some(Token {
            source: TokenSource::Environment(name),
            well_formed: is_well_formed(&text),
        })
    });
    from_environment.or_else(|| {
        let path = std::env::var_os("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let text = fs_err::read_to_string(&path)
            .ok()
            .filter(|text| !text.trim().is_empty())?;
        Some(Token {
            source: TokenSource::File(path),
            well_formed: is_well_formed(&text),
        })
    })
}

fn is_well_formed(token: &str) -> bool {
    token
        .trim()
        .strip_prefix("hf_")
        .is_some_and(|rest| rest.len() >= 16 && rest.chars().all(|character| character.is_ascii_alphanumeric()))
}

/// Whether the model is a folder with a `config.json`, or a snapshot in the cache has one.
fn is_local(model: &str, hub: &Path) -> bool {
    if Path::new(model).join("config.json").is_file() {
        return true;
    }
    let snapshots = hub
        .join(format!("models--{}", model.replace('/', "--")))
        .join("snapshots");
    fs_err::read_dir(snapshots)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.path().join("config.json").exists()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_snapshot_is_local() {
        let hub = tempfile::tempdir().expect("a folder");
        assert!(!is_local("org/model", hub.path()));
        let snapshot = hub.path().join("models--org--model/snapshots/abc");
        fs_err::create_dir_all(&snapshot).expect("a folder");
        assert!(!is_local("org/model", hub.path()), "an unfinished download");
        fs_err::write(snapshot.join("config.json"), "{}").expect("a file");
        assert!(is_local("org/model", hub.path()));
    }

    #[test]
    fn tokens_have_a_form() {
        assert!(is_well_formed("hf_abcdefghijklmnopqrstuvwxyz\n"));
        for wrong in ["", "hf_", "abcdefghijklmnopqrstuvwxyz", "hf_abc def ghijklmnopqrstuv"] {
            assert!(!is_well_formed(wrong), "{wrong}");
        }
    }
}
