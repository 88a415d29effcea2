//! What the hub says of a token and of one repository, in a few short questions that are asked at once.

use std::thread;

use serde::Deserialize;
use ureq::http::{HeaderMap, StatusCode};

use super::access::{Access, AccessError, escaped, strange};

/// What the hub said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hub {
    /// It was not asked, and why.
    NotAsked(String),
    /// It does not answer, and why.
    Unreachable(String),
    /// It answered.
    Answered(Answered),
}

/// Its answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// Of the token; `None` without one, or when this question stayed without an answer.
    pub identity: Option<Identity>,
    /// Of the model; `None` when none was asked for.
    pub model: Option<Answer>,
    /// How far this machine's clock is before the hub's, in seconds.
    pub clock_ahead_seconds: Option<i64>,
}

/// Whom a token belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// This account.
    User(String),
    /// Nobody: it is wrong, expired or revoked.
    Invalid,
}

/// Whether a repository can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Yes.
    Open {
        /// Bytes that engines need and that are not in the cache yet, where the hub told them.
        bytes: Option<u64>,
    },
    /// Its licence has not been accepted, or there is no token that says by whom.
    Gated {
        /// Whether the token was sent, so that it is the account that lacks access.
        with_token: bool,
    },
    /// The token is not accepted for anything.
    BadToken,
    /// There is none of this name that the token can see.
    NotFound {
        /// Whether a token was sent, so that it may not be just private.
        with_token: bool,
    },
    /// The repository is there, and the branch, tag or commit is not.
    NoRevision,
    /// Too many questions from here.
    RateLimited,
    /// The hub has a problem of its own.
    Failed(String),
}

/// Asks whose the token is, and whether the repository can be had.
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
        Answer::Open { .. } => Answer::Open { bytes: size },
        other => other,
    });
    Hub::Answered(Answered {
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
        // A mirror need not have this route.
        status if !status.is_success() => None,
        _ => {
            let parsed = serde_json::from_str::<WhoAmI>(&text).map_err(|_| strange(&url, "no account"))?;
            // A name goes to the terminal: nothing but what a name may hold.
            let name = parsed
                .name
                .chars()
                .filter(|character| character.is_alphanumeric() || "-_.".contains(*character));
            Some(Identity::User(name.take(64).collect()))
        }
    };
    Ok((identity, headers))
}

fn model(access: &Access, repository: &str, revision: &str) -> Result<(Answer, HeaderMap), AccessError> {
    let path = format!(
        "{repository}/resolve/{}/config.json",
        escaped(revision).replace('/', "%2F")
    );
    let (status, headers) = access.head(&path)?;
    Ok((judge(status, &headers, access.has_token()), headers))
}

/// What an answer about a file means. The hub names the reason in `X-Error-Code`, as `huggingface_hub` reads it
/// (`utils/_http.py`); without it, the status has to do.
pub(super) fn judge(status: StatusCode, headers: &HeaderMap, with_token: bool) -> Answer {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    match (status.as_u16(), text("x-error-code")) {
        (200..=399, _) | (_, "EntryNotFound") => Answer::Open { bytes: None },
        (_, "GatedRepo") => Answer::Gated { with_token },
        (_, "RevisionNotFound") => Answer::NoRevision,
        (401, _) if text("x-error-message").starts_with("Invalid credentials") => Answer::BadToken,
        (401 | 404, "RepoNotFound") | (404, _) => Answer::NotFound { with_token },
        (401, _) if with_token => Answer::BadToken,
        // The hub hides what is private from those who say no name.
        (401, _) => Answer::NotFound { with_token },
        (403, _) => Answer::Gated { with_token },
        (429, _) => Answer::RateLimited,
        (status, _) => Answer::Failed(format!("status {status}")),
    }
}

/// By how many seconds this clock is before the one that wrote these headers.
fn clock_ahead(headers: &HeaderMap) -> Option<i64> {
    let date = headers.get("date")?.to_str().ok()?;
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp();
    Some(jiff::Timestamp::now().as_second() - theirs.as_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: u16, code: &'static str, message: &'static str, with_token: bool) -> Answer {
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
        assert_eq!(judged(200, "", "", true), Answer::Open { bytes: None });
        assert_eq!(judged(307, "", "", false), Answer::Open { bytes: None });
        assert_eq!(judged(404, "EntryNotFound", "", false), Answer::Open { bytes: None });
        assert_eq!(judged(401, "GatedRepo", "", false), Answer::Gated { with_token: false });
        assert_eq!(judged(403, "GatedRepo", "", true), Answer::Gated { with_token: true });
        assert_eq!(
            judged(401, "RepoNotFound", "", false),
            Answer::NotFound { with_token: false }
        );
        assert_eq!(
            judged(401, "", "Invalid credentials in Authorization header", true),
            Answer::BadToken
        );
        assert_eq!(
            judged(404, "RepoNotFound", "", true),
            Answer::NotFound { with_token: true }
        );
        assert_eq!(judged(404, "RevisionNotFound", "", true), Answer::NoRevision);
        assert_eq!(judged(429, "", "", true), Answer::RateLimited);
        assert_eq!(judged(503, "", "", true), Answer::Failed("status 503".to_owned()));
    }
}
