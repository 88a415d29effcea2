//! Hugging Face: the cache, the token, the model's files on this machine, and the hub's answers.
//!
//! Every variable has the meaning that it has for `huggingface_hub` (its `constants.py` and `utils/_auth.py`, version 2.4).

mod access;
mod cache;
mod download;
mod hub;
mod pointer;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::expand::expanded;
pub use access::{Access, AccessError};
pub use cache::{CacheState, Leftover, LeftoverKind, Model};
pub use download::{DownloadError, Progress, download};
pub use hub::{Hub, HubReport, Identity, RepositoryAccess};

/// The default hub.
const ENDPOINT: &str = "https://huggingface.co";

/// With this variable, vLLM gets models from `ModelScope`.
pub const MODELSCOPE: &str = "VLLM_USE_MODELSCOPE";

/// The default revision.
pub const MAIN: &str = "main";

/// Token, cache, and the hub's answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HuggingFace {
    /// Facts about the token, if there is one. The token itself is not part of it.
    pub token: Option<Token>,
    /// The model's files on this machine.
    pub model: Model,
    /// The hub's answers about the token and the model.
    pub hub: Hub,
    /// The base of all URLs of the hub: `https://huggingface.co`.
    pub endpoint: String,
    /// The cache folder, with one folder per repository.
    pub cache: PathBuf,
    /// Free bytes on the cache's file system; `None` if unknown.
    pub free_bytes: Option<u64>,
    /// Remains of interrupted downloads of this model.
    pub leftovers: Vec<Leftover>,
    /// Repositories in the cache with similar names.
    pub similar: Vec<String>,
}

/// Facts about a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The place where it was found.
    pub source: TokenSource,
    /// Whether it has the form `hf_…`.
    pub well_formed: bool,
}

/// The place where a token was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The environment variable with this name.
    Environment(&'static str),
    /// The file that `hf auth login` writes.
    File(PathBuf),
}

impl fmt::Display for TokenSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment(name) => formatter.write_str(name),
            Self::File(path) => write!(formatter, "{}", path.display()),
        }
    }
}

/// A secret that never appears in messages, logs or debug output.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret")
    }
}

impl Secret {
    /// The secret, for the one header that carries it.
    fn reveal(&self) -> &str {
        &self.0
    }
}

/// Folders and hub, from environment variables. Those that the profile gives the engines win.
#[derive(Debug, Clone)]
pub struct Settings {
    endpoint: String,
    cache: PathBuf,
    offline: Option<&'static str>,
    /// Whether engines get models from `ModelScope`.
    uses_modelscope: bool,
    token: Option<(Token, Secret)>,
    token_files: [PathBuf; 2],
}

impl Settings {
    /// The folder with all downloaded repositories.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The token file from the variables, and the default one.
    pub fn token_files(&self) -> &[PathBuf; 2] {
        &self.token_files
    }

    /// Reads the variables of `profile`, then those of this process.
    pub fn read(profile: &BTreeMap<String, String>) -> Self {
        Self::from(&|name| profile.get(name).cloned().or_else(|| std::env::var(name).ok()))
    }

    fn from(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let text = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let folder = |name: &str| text(name).map(|path| expanded(&path, variable));
        let home = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| folder("HOME").map(|home| home.join(".cache/huggingface")))
            .unwrap_or_else(|| PathBuf::from(".cache/huggingface"));
        let cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let is_true = |name: &&str| {
            text(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let usual_token_file = home.join("token");
        let token_file = folder("HF_TOKEN_PATH").unwrap_or_else(|| usual_token_file.clone());
        Self {
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            cache,
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(is_true),
            uses_modelscope: text(MODELSCOPE).is_some_and(|value| value.eq_ignore_ascii_case("true")),
            token: token(&text, &token_file),
            token_files: [token_file, usual_token_file],
        }
    }
}

fn token(text: &dyn Fn(&str) -> Option<String>, file: &Path) -> Option<(Token, Secret)> {
    let found = |source, text: &str| {
        let text: String = text.trim().to_owned();
        let well_formed = is_well_formed(&text);
        // A token that cannot be sent in a header is no token.
        let sendable = !text.is_empty() && text.chars().all(|character| character.is_ascii_graphic());
        let secret = Secret(if sendable { text } else { String::new() });
        (Token { source, well_formed }, secret)
    };
    let from_environment = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]
        .into_iter()
        .find_map(|name| Some(found(TokenSource::Environment(name), &text(name)?)));
    from_environment.or_else(|| {
        let text = fs_err::read_to_string(file).ok()?;
        (!text.trim().is_empty()).then(|| found(TokenSource::File(file.to_owned()), &text))
    })
}

fn is_well_formed(token: &str) -> bool {
    token
        .trim()
        .strip_prefix("hf_")
        .is_some_and(|rest| rest.len() >= 16 && rest.chars().all(|character| character.is_ascii_alphanumeric()))
}

/// Looks for token and model in the places of `huggingface_hub`. Asks the hub only about a model that is not on this
/// machine, or about the token's account.
pub(super) fn survey(wanted: &super::SurveyRequest<'_>, settings: &Settings) -> HuggingFace {
    let (model, revision) = (wanted.model, wanted.revision);
    let found = match model {
        None => Model::none(),
        Some(model) if settings.uses_modelscope => cache::beside_hub(model, "comes from ModelScope"),
        Some(model) => cache::inspect(model, revision, &settings.cache),
    };
    let repository = model.filter(|model| is_repository(model) && !settings.uses_modelscope);
    let asks_for_account = wanted.asks_for_account && settings.token.is_some();
    let hub = match (settings.offline, &found.state) {
        (Some(variable), _) => Hub::NotAsked(format!("{variable} is set")),
        (None, state) if state.is_to_fetch() => hub::ask(&Access::new(settings), repository, revision),
        (None, _) if asks_for_account => hub::ask(&Access::new(settings), None, revision),
        (None, CacheState::Complete) => Hub::NotAsked("the model is in the cache".to_owned()),
        (None, CacheState::Folder | CacheState::BadFolder { .. }) => Hub::NotAsked("the model is a folder".to_owned()),
        (None, CacheState::GgufFile) => Hub::NotAsked("the model is a file".to_owned()),
        (None, CacheState::Elsewhere { .. }) => Hub::NotAsked("the engine downloads the model itself".to_owned()),
        (None, _) => Hub::NotAsked("there is nothing to download".to_owned()),
    };
    let is_unknown =
        matches!(&hub, Hub::Answered(answered) if matches!(answered.model, Some(RepositoryAccess::NotFound { .. })));
    HuggingFace {
        token: settings.token.as_ref().map(|(token, _)| token.clone()),
        model: found,
        hub,
        endpoint: settings.endpoint.clone(),
        free_bytes: free_bytes(&settings.cache),
        leftovers: repository.map_or_else(Vec::new, |repository| cache::leftovers(repository, &settings.cache)),
        similar: match repository {
            Some(repository) if is_unknown => cache::similar(repository, &settings.cache),
            _ => Vec::new(),
        },
        cache: settings.cache.clone(),
    }
}

/// Whether this can be the name of a repository: `gpt2` or `org/model`.
pub fn is_repository(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part
                .chars()
                .all(|character| character.is_ascii_alphanumeric() || "-_.".contains(character))
    };
    match model.split_once('/') {
        Some((owner, name)) => part(owner) && part(name),
        None => part(model),
    }
}

/// Why only the engine can resolve this name, as the rest of a sentence; `None` for a path or a repository.
fn beyond_us(model: &str) -> Option<&'static str> {
    let is_gguf = model.to_ascii_lowercase().ends_with(".gguf");
    if let Some((scheme, _)) = model.split_once("://") {
        let is_name = !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
        let is_page = ["http", "https"].contains(&scheme);
        return (is_name && (is_gguf || !is_page)).then_some("is an address on another machine");
    }
    let parts: Vec<&str> = model.split('/').collect();
    let is_plain = |part: &&str| !part.is_empty() && !part.starts_with(['.', '~']);
    if is_gguf && parts.len() >= 3 && parts.iter().all(is_plain) {
        return Some("is a GGUF file of a repository");
    }
    let (name, quantization) = model.rsplit_once(':')?;
    let is_word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    (name.contains('/') && is_repository(name) && is_word(quantization))
        .then_some("names a quantisation of a repository")
}

/// Bytes that this user can write to the file system of the folder, which does not have to exist.
fn free_bytes(folder: &Path) -> Option<u64> {
    let folder = std::path::absolute(folder).ok()?;
    let there = folder.ancestors().find(|folder| folder.exists())?;
    let space = nix::sys::statvfs::statvfs(there).ok()?;
    Some(space.blocks_available() * space.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        let variables = variables.to_vec();
        Settings::from(&move |name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn folders_follow_the_variables() {
        let cache = |variables: &[(&str, &str)]| settings(variables).cache;
        assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(
            cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]),
            Path::new("/c/huggingface/hub")
        );
        assert_eq!(
            cache(&[("HF_HOME", "$S/hf"), ("S", "/scratch")]),
            Path::new("/scratch/hf/hub")
        );
        assert_eq!(cache(&[("HF_HUB_CACHE", "~root/hub")]), Path::new("/root/hub"));
        assert_eq!(
            settings(&[("HF_TOKEN_PATH", "${S}/t"), ("S", "/scratch")]).token_files[0],
            Path::new("/scratch/t")
        );
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), Path::new("/h/hf/hub"));
        assert_eq!(
            cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/hub")]),
            Path::new("/hub")
        );
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
    }

    #[test]
    fn a_modelscope_model_is_not_looked_up() {
        let surveyed = |value: &str| {
            // Nothing listens there, so the hub counts as unreachable.
            let variables = [
                (MODELSCOPE, value),
                ("HF_ENDPOINT", "http://127.0.0.1:9"),
                ("HF_HOME", "/none"),
            ];
            let env = BTreeMap::new();
            let wanted = super::super::SurveyRequest {
                model: Some("org/only-there"),
                asks_for_account: false,
                revision: MAIN,
                env: &env,
                program: None,
                gpus: false,
            };
            survey(&wanted, &settings(&variables))
        };
        for value in ["True", "true"] {
            let found = surveyed(value);
            assert!(matches!(found.hub, Hub::NotAsked(_)), "{found:?}");
            assert!(matches!(found.model.state, CacheState::Elsewhere { .. }), "{found:?}");
        }
        assert!(matches!(surveyed("False").hub, Hub::Unreachable(_)));
    }

    #[test]
    fn engine_only_names_are_not_mistakes() {
        for model in [
            "s3://bucket/model",
            "gs://bucket/model",
            "az://container/model",
            "org/model-GGUF:Q4_K_M",
            "org/model-GGUF/x-Q4_K_M.gguf",
            "https://example.com/x.gguf",
        ] {
            assert!(beyond_us(model).is_some(), "{model}");
        }
        for model in [
            "org/model",
            "gpt2",
            "./x",
            "/m/x.gguf",
            "./m/x.gguf",
            "a/b/c",
            "org/model@v2",
            "https://huggingface.co/org/m",
        ] {
            assert_eq!(beyond_us(model), None, "{model}");
        }
    }

    #[test]
    fn endpoint_and_offline_variables_are_read() {
        assert_eq!(
            settings(&[("HF_ENDPOINT", "http://mirror/ ")]).endpoint,
            "http://mirror"
        );
        assert_eq!(settings(&[]).endpoint, ENDPOINT);
        assert_eq!(settings(&[("HF_HUB_OFFLINE", "1")]).offline, Some("HF_HUB_OFFLINE"));
        assert_eq!(
            settings(&[("TRANSFORMERS_OFFLINE", "yes")]).offline,
            Some("TRANSFORMERS_OFFLINE")
        );
        assert_eq!(settings(&[("HF_HUB_OFFLINE", "0")]).offline, None);
    }

    #[test]
    fn tokens_have_a_form_and_are_never_shown() {
        let secret = "hf_abcdefghijklmnopqrstuvwxyz";
        assert!(is_well_formed(&format!("{secret}\n")));
        for wrong in ["", "hf_", "abcdefghijklmnopqrstuvwxyz", "hf_abc def ghijklmnopqrstuv"] {
            assert!(!is_well_formed(wrong), "{wrong}");
        }
        let settings = settings(&[("HF_TOKEN", secret)]);
        assert!(!format!("{settings:?}").contains(secret));
        assert!(!format!("{:?}", Access::new(&settings)).contains(secret));
    }

    #[test]
    fn repositories_and_paths_are_distinguished() {
        for name in ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct"] {
            assert!(is_repository(name), "{name}");
        }
        for path in [
            "/models/x",
            "./x",
            "../x",
            "~/x",
            "a/b/c",
            "a/",
            "",
            "a b",
            "a/..",
            "s3://x/y",
        ] {
            assert!(!is_repository(path), "{path}");
        }
    }
}
