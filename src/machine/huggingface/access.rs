//! HTTP access to the hub. The token is only sent to the endpoint's own origin, so redirects are followed by hand.

use std::fmt::Write;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::crypto::ring;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{Secret, Settings};
use crate::report::one_line;

/// Time limit for an answer to a short request.
pub(super) const QUESTION: Duration = Duration::from_secs(3);

/// How long a download can receive nothing before its connection is closed.
pub(super) const STILL: Duration = Duration::from_secs(30);

/// Maximum number of redirects of one request; the hub needs two.
const MOST_REDIRECTS: usize = 5;

/// Maximum size of an answer that is not a file, in bytes. The list of a repository with thousands of files has a few MB.
const MOST_ANSWER: u64 = 32 << 20;

/// The HTTP client for the hub.
#[derive(Clone)]
pub struct Access {
    agent: Agent,
    endpoint: String,
    token: Option<Secret>,
    pub(super) cache: std::path::PathBuf,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Access")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// No connection, no answer in time, or an answer that is not HTTP.
    #[error("{host} does not answer: {reason}")]
    Unreachable {
        /// Scheme and host. Not the whole URL, because URLs of a CDN are signed.
        host: String,
        /// What went wrong, as the rest of a sentence.
        reason: String,
    },
    /// An answer that xpyd cannot understand.
    #[error("{host} answered with {reason}")]
    Strange {
        /// Scheme and host.
        host: String,
        /// What was wrong with the answer.
        reason: String,
    },
}

impl Access {
    /// A client for the hub of these settings.
    pub fn new(settings: &Settings) -> Self {
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()))
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("xpyd/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(QUESTION))
            .timeout_per_read(Some(STILL))
            .build();
        let token = settings.token.as_ref().map(|(_, secret)| secret.clone());
        Self {
            agent: config.new_agent(),
            endpoint: settings.endpoint.clone(),
            token: token.filter(|secret| !secret.reveal().is_empty()),
            cache: settings.cache.clone(),
        }
    }

    /// Whether requests to the endpoint carry a token.
    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// The URL of a path below the endpoint.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.endpoint)
    }

    /// Requests the headers. A redirect counts as an answer.
    pub(super) fn head(&self, path: &str) -> Result<(StatusCode, HeaderMap), AccessError> {
        let url = self.url(path);
        let mut request = self.agent.head(&url).config().timeout_global(Some(QUESTION)).build();
        if let Some(token) = self.token_for(&url) {
            request = request.header("authorization", token);
        }
        let answer = request.call().map_err(|error| unreachable(&url, &error))?;
        Ok((answer.status(), answer.headers().clone()))
    }

    /// Requests a short answer as text.
    pub(super) fn get_text(&self, url: &str) -> Result<(StatusCode, HeaderMap, String), AccessError> {
        let (url, answer) = self.follow(url, None, Some(QUESTION))?;
        let (parts, mut body) = answer.into_parts();
        let mut text = String::new();
        body.as_reader()
            .take(MOST_ANSWER)
            .read_to_string(&mut text)
            .map_err(|error| AccessError::Unreachable {
                host: origin(&url).to_owned(),
                reason: error.to_string(),
            })?;
        Ok((parts.status, parts.headers, text))
    }

    /// Requests a file from byte `from` on.
    pub(super) fn get_file(&self, path: &str, from: u64) -> Result<Response<Body>, AccessError> {
        let range = (from > 0).then(|| format!("bytes={from}-"));
        self.follow(&self.url(path), range.as_deref(), None)
            .map(|(_, answer)| answer)
    }

    /// Sends a request and follows redirects. The token is only sent to the endpoint's origin.
    fn follow(
        &self,
        url: &str,
        range: Option<&str>,
        limit: Option<Duration>,
    ) -> Result<(String, Response<Body>), AccessError> {
        let mut url = url.to_owned();
        for _ in 0..=MOST_REDIRECTS {
            let mut request = self.agent.get(&url).config().timeout_global(limit).build();
            if let Some(token) = self.token_for(&url) {
                request = request.header("authorization", token);
            }
            if let Some(range) = range {
                request = request.header("range", range);
            }
            let answer = request.call().map_err(|error| unreachable(&url, &error))?;
            let location = answer.headers().get("location").and_then(|value| value.to_str().ok());
            match location {
                Some(location) if answer.status().is_redirection() => {
                    url = joined(&url, location).ok_or_else(|| strange(&url, "a redirect to nowhere"))?;
                }
                _ => return Ok((url, answer)),
            }
        }
        Err(strange(&url, "too many redirects"))
    }

    /// The value of the authorization header, if it can be sent to this URL.
    fn token_for(&self, url: &str) -> Option<String> {
        let is_ours = origin(url).eq_ignore_ascii_case(origin(&self.endpoint));
        let token = self.token.as_ref().filter(|_| is_ours)?;
        Some(format!("Bearer {}", token.reveal()))
    }
}

fn unreachable(url: &str, error: &ureq::Error) -> AccessError {
    let reason = match error {
        ureq::Error::Timeout(_) => "timeout".to_owned(),
        ureq::Error::HostNotFound => "the name cannot be resolved".to_owned(),
        ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            "the connection was refused".to_owned()
        }
        ureq::Error::Io(error) => error.to_string(),
        error => one_line(error),
    };
    AccessError::Unreachable {
        host: origin(url).to_owned(),
        reason,
    }
}

pub(super) fn strange(url: &str, reason: impl Into<String>) -> AccessError {
    AccessError::Strange {
        host: origin(url).to_owned(),
        reason: reason.into(),
    }
}

/// Scheme, host and port of a URL, as they are written.
pub(super) fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |index| index + 3);
    let length = url[start..].find(['/', '?', '#', '\\']).unwrap_or(url.len() - start);
    &url[..start + length]
}

/// The target of a redirect of `url`: another URL, or a path of the same origin.
fn joined(url: &str, location: &str) -> Option<String> {
    let lower = location.to_ascii_lowercase();
    if lower.starts_with("https://") || lower.starts_with("http://") {
        Some(location.to_owned())
    } else if location.starts_with("//") {
        Some(format!("{}:{location}", url.split_once(':')?.0))
    } else if location.starts_with('/') {
        Some(format!("{}{location}", origin(url)))
    } else {
        None
    }
}

/// Sleeps on a thread that can block.
pub(super) fn pause(duration: Duration) {
    // No code unparks it. A spurious wake-up only makes the pause shorter.
    std::thread::park_timeout(duration);
}

/// A URL path in which all but unreserved characters are escaped (RFC 3986, section 2.3).
pub(super) fn escaped(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert_eq!(origin("https://hf.co/a?b"), "https://hf.co");
        assert_eq!(origin("http://127.0.0.1:80"), "http://127.0.0.1:80");
        for other in [
            "https://hf.co@evil.org/",
            "https://hf.co.evil.org/",
            "https://hf.co:444/",
            "http://hf.co/",
        ] {
            assert_ne!(origin(other), "https://hf.co", "{other}");
        }
    }

    #[test]
    fn redirects_are_absolute_or_of_the_same_origin() {
        let url = "https://hf.co/a/b?c";
        assert_eq!(joined(url, "https://cdn.co/x").as_deref(), Some("https://cdn.co/x"));
        assert_eq!(joined(url, "//cdn.co/x").as_deref(), Some("https://cdn.co/x"));
        assert_eq!(joined(url, "/x?y").as_deref(), Some("https://hf.co/x?y"));
        assert_eq!(joined(url, "x"), None);
        assert_eq!(joined(url, "file:///etc/passwd"), None);
    }

    #[test]
    fn paths_are_escaped_except_slashes() {
        assert_eq!(escaped("a/b c%/ü#?.bin"), "a/b%20c%25/%C3%BC%23%3F.bin");
    }
}
