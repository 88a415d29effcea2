//! API keys: those of clients, and the key that xpyd sends to its engines.
//!
//! This module knows the `Authorization` header. It reads no files and prints no key.

use std::fmt;

use axum::http::{HeaderMap, HeaderValue, Method, header};
use subtle::{Choice, ConstantTimeEq};

/// Paths that are open to everyone, as on vLLM with `--api-key`: they use no GPU of an engine. `/ready` and `/live` are
/// xpyd's own.
const OPEN: [&str; 7] = ["/health", "/ping", "/ready", "/live", "/metrics", "/version", "/load"];

/// A key that a header cannot carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an API key must consist of visible ASCII characters")]
pub struct KeyError;

/// A line that is not a valid API key. The error omits the text of the line, because it could be most of a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is not a valid API key")]
pub struct LineError {
    /// The number of the line, from 1.
    pub line: usize,
    /// Why the key is not valid.
    pub source: KeyError,
}

/// The keys that clients can use. Without a key, every client is allowed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ClientKeys(Vec<Box<[u8]>>);

impl ClientKeys {
    /// Reads one key per line. Empty lines and lines that begin with `#` are skipped, as is a byte order mark, which
    /// editors on Windows write.
    ///
    /// # Errors
    /// For a key that a header cannot carry.
    pub fn read(text: &str) -> Result<Self, LineError> {
        let text = text.trim_start_matches('\u{feff}');
        let lines = text.lines().map(str::trim).zip(1..);
        let keys = lines.filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
        keys.map(|(key, line)| match checked(key) {
            Ok(key) => Ok(key.as_bytes().into()),
            Err(source) => Err(LineError { line, source }),
        })
        .collect::<Result<_, _>>()
        .map(Self)
    }

    /// Adds the other keys.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the request is allowed. It compares all keys to their end, so the time reveals nothing about them.
    pub(crate) fn allows(&self, method: &Method, path: &str, headers: &HeaderMap) -> bool {
        if self.is_empty() || *method == Method::OPTIONS || OPEN.contains(&path) {
            return true;
        }
        let given = bearer(headers).unwrap_or_default();
        let known = self
            .0
            .iter()
            .fold(Choice::from(0), |known, key| known | key.ct_eq(given));
        known.into()
    }
}

/// Prints the number of keys only.
impl fmt::Debug for ClientKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ClientKeys({})", self.0.len())
    }
}

/// The key in a request's headers.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(b"bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

fn checked(key: &str) -> Result<&str, KeyError> {
    let is_visible = |byte: u8| byte.is_ascii_graphic();
    if !key.is_empty() && key.bytes().all(is_visible) {
        Ok(key)
    } else {
        Err(KeyError)
    }
}

/// The key of the engines, as a header value marked as sensitive, so that nothing prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineKey {
    value: HeaderValue,
    is_xpyds_own: bool,
}

impl EngineKey {
    /// Makes the header value of a key.
    ///
    /// # Errors
    /// When a header cannot carry the key.
    pub fn new(key: &str) -> Result<Self, KeyError> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", checked(key)?)).map_err(|_| KeyError)?;
        value.set_sensitive(true);
        Ok(Self {
            value,
            is_xpyds_own: false,
        })
    }

    /// Marks the key as known to xpyd only: it replaces the key of every client.
    #[must_use]
    pub fn known_to_xpyd_only(self) -> Self {
        Self {
            is_xpyds_own: true,
            ..self
        }
    }

    /// Whether it replaces the key of every client.
    pub(crate) fn is_xpyds_own(&self) -> bool {
        self.is_xpyds_own
    }

    /// Sets the key in the headers of a call.
    pub(crate) fn add_to(&self, headers: &mut HeaderMap) {
        headers.insert(header::AUTHORIZATION, self.value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearing(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(value).expect("a value"))])
    }

    fn lets_in(keys: &ClientKeys, path: &str, headers: &HeaderMap) -> bool {
        keys.allows(&Method::POST, path, headers)
    }

    #[test]
    fn only_one_of_the_keys_lets_in() {
        let keys = ClientKeys::read("# team a\n one \n\ntwo").expect("keys");
        for (value, is_in) in [
            ("Bearer one", true),
            ("bearer two", true),
            ("Bearer  two", true),
            ("Bearer on", false),
            ("Bearer onetwo", false),
            ("Bearer ", false),
            ("Bearer", false),
            ("Basic one", false),
            ("one", false),
            ("Bearer # team a", false),
        ] {
            assert_eq!(lets_in(&keys, "/v1/models", &bearing(value)), is_in, "{value}");
        }
        assert!(!lets_in(&keys, "/v1/models", &HeaderMap::new()));
        assert!(lets_in(&ClientKeys::default(), "/v1/models", &HeaderMap::new()));
    }

    #[test]
    fn only_vllms_open_paths_need_no_key() {
        let keys = ClientKeys::read("one").expect("a key");
        for path in OPEN {
            assert!(lets_in(&keys, path, &HeaderMap::new()), "{path}");
        }
        for path in [
            "/v1/models",
            "/tokenize",
            "/metrics/",
            "//metrics",
            "/health/../v1/models",
            "/unknown",
            "/",
        ] {
            assert!(!lets_in(&keys, path, &HeaderMap::new()), "{path}");
        }
        assert!(keys.allows(&Method::OPTIONS, "/v1/models", &HeaderMap::new()));
    }

    #[test]
    fn keys_are_never_printed() {
        let keys = ClientKeys::read("swordfish").expect("a key");
        let engine = EngineKey::new("swordfish").expect("a key");
        let mut headers = HeaderMap::new();
        engine.add_to(&mut headers);
        assert!(!format!("{keys:?}{engine:?}{headers:?}").contains("swordfish"));
        for wrong in ["sword fish", "schwertfisch\u{e4}"] {
            let second = format!("\u{feff}one\n{wrong}");
            let source = KeyError;
            assert_eq!(ClientKeys::read(&second), Err(LineError { line: 2, source }));
            assert_eq!(EngineKey::new(wrong), Err(KeyError));
        }
        assert_eq!(EngineKey::new(""), Err(KeyError));
    }
}
