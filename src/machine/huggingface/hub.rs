//! Asks the hub about a token and a repository, with a few short concurrent requests.

use std::thread;

use serde::Deserialize;
use ureq::http::{HeaderMap, StatusCode};

use super::access::{Access, AccessError, escaped, strange};

/// The result of asking the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hub {
    /// It was not asked, with the reason.
    NotAsked(String),
    /// It does not answer, with the reason.
    Unreachable(String),
    /// It answered at least one request.
    Answered(HubReport),
}

/// The answers of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubReport {
    /// The account of the token; `None` without a token, or if this request failed.
    pub identity: Option<Identity>,
    /// The access to the model; `None` if there was no model to ask about.
    pub model: Option<RepositoryAccess>,
    /// How far this machine's clock is ahead of the hub's, in seconds.
    pub clock_ahead_seconds: Option<i64>,
}

/// The account of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// The name of the account.
    User(String),
    /// The token is wrong, expired or revoked.
    Invalid,
}

/// Whether a repository can be downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RepositoryAccess {
    /// The repository can be downloaded.
    Open {
        /// Bytes of the needed files that are not in the cache yet, if the hub reported them.
        bytes: Option<u64>,
    },
    /// Its licence has not been accepted, or there is no token.
    Gated {
        /// Whether the request had a token, so that the account lacks access.
        with_token: bool,
    },
    /// The hub rejects the token.
    BadToken,
    /// The token can see no repository of this name.
    NotFound {
        /// Whether the request had a token; without one the repository can be private.
        with_token: bool,
    },
    /// The repository exists, but not this branch, tag or commit.
    NoRevision,
    /// Too many requests from this address.
    RateLimited,
    /// Another error of the hub.
    Failed(String),
}

/// Asks for the account of the token, and for access to the repository.
pub(super) fn ask(access: &Access, repository: Option<&str>, revision: &str) -> Hub {
    let (identity, access_answer, size) = thread::scope(|scope| {
        let identity = scope.spawn(|| access.has_token().then(|| identity(access)));
        let size = scope.spawn(|| repository.and_then(|name| super::download::size(access, name, revision)));
        let answer = repository.map(|name| model(access, name, revision));
        (identity.join().ok().flatten(), answer, size.join().ok().flatten())
    });
    let mut clock_ahead_seconds = None;
    let mut failure = None;
    let identity = match identity {
        Some(Ok((identity, headers))) => {
            clock_ahead_seconds = clock_ahead(&headers);
            identity
        }
        Some(Err(error)) => {
            failure = Some(error);
            None
        }
        None => None,
    };
    let model = match access_answer {
        Some(Ok((answer, headers))) => {
            clock_ahead_seconds = clock_ahead(&headers);
            Some(answer)
        }
        Some(Err(error)) => return Hub::Unreachable(error.to_string()),
        None => None,
    };
    if let (None, None, Some(error)) = (&model, &identity, failure) {
        return Hub::Unreachable(error.to_string());
    }
    let model = model.map(|answer| match answer {
        RepositoryAccess::Open { .. } => RepositoryAccess::Open { bytes: size },
        other => other,
    });
    Hub::Answered(HubReport {
        identity,
        model,
        clock_ahead_seconds,
    })
}

#[derive(Debug, Deserialize)]
struct WhoAmI {
    name: String,
}

fn identity(access: &Access) -> Result<(Option<Identity>, HeaderMap), AccessError> {
    let url = access.url("api/whoami-v2");
    let (status, headers, text) = access.get_text(&url)?;
    let identity = match status {
        StatusCode::UNAUTHORIZED => Some(Identity::Invalid),
        // A mirror does not need to have this route.
        status if !status.is_success() => None,
        _ => {
            let parsed = serde_json::from_str::<WhoAmI>(&text).map_err(|_| strange(&url, "no account"))?;
            // The name goes to the terminal, so only characters of a name are allowed.
            let name = parsed
                .name
                .chars()
                .filter(|character| character.is_alphanumeric() || "-_.".contains(*character));
            Some(Identity::User(name.take(64).collect()))
        }
    };
    Ok((identity, headers))
}

fn model(access: &Access, repository: &str, revision: &str) -> Result<(RepositoryAccess, HeaderMap), AccessError> {
    let path = format!(
        "{repository}/resolve/{}/config.json",
        escaped(revision).replace('/', "%2F")
    );
    let (status, headers) = access.head(&path)?;
    Ok((judge(status, &headers, access.has_token()), headers))
}

/// The meaning of an answer about a file. The hub names the reason in `X-Error-Code`, as `huggingface_hub` reads it
/// (`utils/_http.py`); without it, the status decides.
pub(super) fn judge(status: StatusCode, headers: &HeaderMap, with_token: bool) -> RepositoryAccess {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    match (status.as_u16(), text("x-error-code")) {
        (200..=399, _) | (_, "EntryNotFound") => RepositoryAccess::Open { bytes: None },
        (_, "GatedRepo") => RepositoryAccess::Gated { with_token },
        (_, "RevisionNotFound") => RepositoryAccess::NoRevision,
        (401, _) if text("x-error-message").starts_with("Invalid credentials") => RepositoryAccess::BadToken,
        (401 | 404, "RepoNotFound") | (404, _) => RepositoryAccess::NotFound { with_token },
        (401, _) if with_token => RepositoryAccess::BadToken,
        // The hub hides private repositories from anonymous requests.
        (401, _) => RepositoryAccess::NotFound { with_token },
        (403, _) => RepositoryAccess::Gated { with_token },
        (429, _) => RepositoryAccess::RateLimited,
        (status, _) => RepositoryAccess::Failed(format!("status {status}")),
    }
}

/// How far this clock is ahead of the server's, in seconds.
fn clock_ahead(headers: &HeaderMap) -> Option<i64> {
    let date = headers.get("date")?.to_str().ok()?;
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp();
    Some(jiff::Timestamp::now().as_second() - theirs.as_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: u16, code: &'static str, message: &'static str, with_token: bool) -> RepositoryAccess {
        let mut headers = HeaderMap::new();
        for (name, value) in [("x-error-code", code), ("x-error-message", message)] {
            if !value.is_empty() {
                headers.insert(name, value.parse().expect("a header"));
            }
        }
        judge(StatusCode::from_u16(status).expect("a status"), &headers, with_token)
    }

    #[test]
    fn every_refusal_of_the_hub_has_its_meaning() {
        assert_eq!(judged(200, "", "", true), RepositoryAccess::Open { bytes: None });
        assert_eq!(judged(307, "", "", false), RepositoryAccess::Open { bytes: None });
        assert_eq!(
            judged(404, "EntryNotFound", "", false),
            RepositoryAccess::Open { bytes: None }
        );
        assert_eq!(
            judged(401, "GatedRepo", "", false),
            RepositoryAccess::Gated { with_token: false }
        );
        assert_eq!(
            judged(403, "GatedRepo", "", true),
            RepositoryAccess::Gated { with_token: true }
        );
        assert_eq!(
            judged(401, "RepoNotFound", "", false),
            RepositoryAccess::NotFound { with_token: false }
        );
        assert_eq!(
            judged(401, "", "Invalid credentials in Authorization header", true),
            RepositoryAccess::BadToken
        );
        assert_eq!(
            judged(404, "RepoNotFound", "", true),
            RepositoryAccess::NotFound { with_token: true }
        );
        assert_eq!(judged(404, "RevisionNotFound", "", true), RepositoryAccess::NoRevision);
        assert_eq!(judged(429, "", "", true), RepositoryAccess::RateLimited);
        assert_eq!(
            judged(503, "", "", true),
            RepositoryAccess::Failed("status 503".to_owned())
        );
    }
}
