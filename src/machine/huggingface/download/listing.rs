//! Lists the files of a repository at one commit, and selects those that engines need.

use std::collections::HashSet;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, StatusCode};

use super::super::access::{Access, AccessError, escaped, pause, strange};
use super::super::hub::{RepositoryAccess, judge};
use super::super::pointer::{is_commit, is_hash, is_plain};
use super::DownloadError;

/// Maximum number of pages of a list, of up to 1000 files each.
const MOST_PAGES: usize = 20;

/// Pauses between attempts if the hub does not answer, or is overloaded.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
];

/// The longest pause that xpyd accepts from the hub.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// The files of one commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Path within the repository.
    pub(super) path: String,
    /// Size in bytes.
    pub(super) bytes: u64,
    /// Its name in the cache: SHA-256 for a large file, Git's SHA-1 for the others.
    pub(super) hash: String,
}

#[derive(Debug, Deserialize)]
struct Info {
    sha: String,
}

#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    oid: String,
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// Requests the commit of the revision and its files, with retries.
pub(super) fn fetch(
    access: &Access,
    repository: &str,
    revision: &str,
    note: &dyn Fn(String),
) -> Result<Listing, DownloadError> {
    let mut pauses = PAUSES.iter();
    loop {
        let (error, asked) = match ask(access, repository, revision) {
            Ok(listing) => return Ok(listing),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(error, asked)) => (error, asked),
        };
        let Some(next) = pauses.next() else {
            return Err(error);
        };
        let wait = asked.unwrap_or(*next).min(LONGEST_PAUSE);
        note(format!("{error}; trying again in {:.1} s", wait.as_secs_f64()));
        pause(wait);
    }
}

/// [`fetch`] without retries.
pub(super) fn once(access: &Access, repository: &str, revision: &str) -> Option<Listing> {
    ask(access, repository, revision).ok()
}

/// Whether a retry can help, and the pause that the hub asks for.
enum Failure {
    Final(DownloadError),
    Passing(DownloadError, Option<Duration>),
}

impl From<AccessError> for Failure {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Unreachable { .. } => Self::Passing(error.into(), None),
            AccessError::Strange { .. } => Self::Final(error.into()),
        }
    }
}

fn ask(access: &Access, repository: &str, revision: &str) -> Result<Listing, Failure> {
    let commit = if is_commit(revision) {
        revision.to_owned()
    } else {
        let revision = escaped(revision).replace('/', "%2F");
        let url = access.url(&format!("api/models/{repository}/revision/{revision}"));
        let info: Info =
            serde_json::from_str(&get(access, &url)?.0).map_err(|_| Failure::from(strange(&url, "no commit")))?;
        info.sha
    };
    if !is_commit(&commit) {
        return Err(strange(&access.url(""), "an invalid commit").into());
    }
    let mut url = Some(access.url(&format!("api/models/{repository}/tree/{commit}?recursive=true")));
    let mut files = Vec::new();
    for _ in 0..MOST_PAGES {
        let Some(page) = url.take() else {
            break;
        };
        let (text, headers) = get(access, &page)?;
        let entries: Vec<Entry> =
            serde_json::from_str(&text).map_err(|_| Failure::from(strange(&page, "an invalid list of files")))?;
        for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
            files.push(checked(entry, &page)?);
        }
        url = next_page(&headers);
    }
    Ok(Listing {
        commit,
        files: needed(files),
    })
}

fn get(access: &Access, url: &str) -> Result<(String, HeaderMap), Failure> {
    let (status, headers, text) = access.get_text(url)?;
    if status.is_success() {
        return Ok((text, headers));
    }
    Err(refusal(status, &headers, access.has_token()))
}

fn refusal(status: StatusCode, headers: &HeaderMap, with_token: bool) -> Failure {
    let answer = judge(status, headers, with_token);
    match answer {
        RepositoryAccess::RateLimited | RepositoryAccess::Failed(_) => {
            Failure::Passing(DownloadError::Refused(answer), asked_pause(headers))
        }
        answer => Failure::Final(DownloadError::Refused(answer)),
    }
}

/// The seconds in `Retry-After`.
pub(super) fn asked_pause(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_PAUSE))
}

fn checked(entry: Entry, url: &str) -> Result<RemoteFile, Failure> {
    let (hash, bytes) = entry.lfs.map_or((entry.oid, entry.size), |lfs| (lfs.oid, lfs.size));
    // Both become paths on this machine.
    if !is_plain(&entry.path) || !is_hash(&hash) {
        return Err(strange(url, "an invalid file name or hash").into());
    }
    Ok(RemoteFile {
        path: entry.path,
        bytes,
        hash,
    })
}

/// `<URL>; rel="next"` in the header `Link` (RFC 8288).
fn next_page(headers: &HeaderMap) -> Option<String> {
    let link = headers.get("link")?.to_str().ok()?;
    let (url, rest) = link.strip_prefix('<')?.split_once('>')?;
    rest.contains("rel=\"next\"").then(|| url.to_owned())
}

/// The files that engines read: without weights of other programs, weights in another format than the one that vLLM uses
/// (safetensors first, `model_executor/model_loader/default_loader.py` of vLLM 0.32), and images.
fn needed(files: Vec<RemoteFile>) -> Vec<RemoteFile> {
    const OTHERS: [&str; 16] = [
        "h5",
        "msgpack",
        "onnx",
        "onnx_data",
        "ot",
        "tflite",
        "mlmodel",
        "pth",
        "ckpt",
        "png",
        "jpg",
        "jpeg",
        "gif",
        "webp",
        "mp4",
        "pdf",
    ];
    let extension = |file: &RemoteFile| file.path.rsplit('.').next().unwrap_or_default().to_lowercase();
    let is_root = |file: &RemoteFile| !file.path.contains('/');
    let is_consolidated = |file: &RemoteFile| file.path.starts_with("consolidated");
    let formats: HashSet<String> = files
        .iter()
        .filter(|file| is_root(file) && !is_consolidated(file))
        .map(&extension)
        .collect();
    let has = |format: &str| formats.contains(format);
    let is_needed = |file: &RemoteFile| {
        let extension = extension(file);
        let folder = file.path.split_once('/').map(|(folder, _)| folder.to_lowercase());
        let is_other_program = OTHERS.contains(&extension.as_str())
            || folder
                .is_some_and(|folder| ["original", "onnx", "openvino", "coreml", "metal"].contains(&folder.as_str()));
        let is_other_format = match extension.as_str() {
            "bin" | "pt" | "gguf" => has("safetensors"),
            _ => false,
        };
        let is_double = is_consolidated(file) && (has("safetensors") || has("bin")) && extension != "json";
        !is_other_program && !is_other_format && !is_double
    };
    files.into_iter().filter(|file| is_needed(file)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(paths: &[&str]) -> Vec<String> {
        let files = paths.iter().map(|path| RemoteFile {
            path: (*path).to_owned(),
            bytes: 1,
            hash: "a".repeat(40),
        });
        needed(files.collect()).into_iter().map(|file| file.path).collect()
    }

    #[test]
    fn only_one_weight_format_is_downloaded() {
        let llama = [
            "config.json",
            "model-1.safetensors",
            "model.safetensors.index.json",
            "original/consolidated.00.pth",
            "pytorch_model.bin",
            "tokenizer.json",
            "picture.png",
        ];
        assert_eq!(
            kept(&llama),
            [
                "config.json",
                "model-1.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json"
            ]
        );
        assert_eq!(kept(&["pytorch_model.bin", "tf_model.h5"]), ["pytorch_model.bin"]);
        assert_eq!(
            kept(&["consolidated.safetensors", "params.json"]),
            ["consolidated.safetensors", "params.json"]
        );
        assert_eq!(
            kept(&["consolidated.safetensors", "model.safetensors", "modeling_x.py"]),
            ["model.safetensors", "modeling_x.py"]
        );
    }

    #[test]
    fn paths_outside_the_cache_are_refused() {
        let entry = |path: &str, oid: &str| Entry {
            kind: "file".to_owned(),
            path: path.to_owned(),
            oid: oid.to_owned(),
            size: 1,
            lfs: None,
        };
        let hash = "a".repeat(40);
        assert!(checked(entry("a/b", &hash), "http://hub/").is_ok());
        for (path, hash) in [("../b", hash.as_str()), ("/b", &hash), ("b", "../../b"), ("b", "")] {
            assert!(checked(entry(path, hash), "http://hub/").is_err(), "{path} {hash}");
        }
    }
}
