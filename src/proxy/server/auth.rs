//! API keys: those that let clients in, and the one that lets xpyd in at its engines.
//!
//! Knows the `Authorization` header; neither reads files nor knows what a request asks for. No key is ever printed.

use std::fmt;

use axum::http::{HeaderMap, HeaderValue, Method, header};
use subtle::{Choice, ConstantTimeEq};

/// Paths that are open to everyone, as they are on vLLM with `--api-key`: they ask nothing of an engine's GPU.
const OPEN: [&str; 5] = ["/health", "/ping", "/metrics", "/version", "/load"];

/// A key that no header can carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an API key is made of visible ASCII characters")]
pub struct KeyError;

/// A line of a text that is no key. The text of the line is not kept, because it may be most of a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is no API key")]
pub struct LineError {
    /// Its number, from 1.
    pub line: usize,
    /// Why.
    pub source: KeyError,
}

/// The keys of which a client must bear one. None lets everyone in.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ClientKeys(Vec<Box<[u8]>>);

impl ClientKeys {
    /// The keys of a text, one a line; empty lines and those that begin with `#` are none. A byte order mark is skipped:
    /// editors on Windows write one.
    ///
    /// # Errors
    /// For a key that no header can carry.
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

    /// These keys and the other ones.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request may come in. All keys are compared to their end, so that the time tells nothing of them.
    pub(crate) fn let_in(&self, method: &Method, path: &str, headers: &HeaderMap) -> bool {
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

/// How many, and never which.
impl fmt::Debug for ClientKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ClientKeys({})", self.0.len())
    }
}

/// The key that a request bears.
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

/// The key that engines want, as the value of a header. Marked as sensitive, so that nothing prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineKey {
    value: HeaderValue,
    is_xpyds_own: bool,
}

impl EngineKey {
    /// The key of these characters.
    ///
    /// # Errors
    /// When no header can carry it.
    pub fn new(key: &str) -> Result<Self, KeyError> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", checked(key)?)).map_err(|_| KeyError)?;
        value.set_sensitive(true);
        Ok(Self {
            value,
            is_xpyds_own: false,
        })
    }

    /// The same key, which clients cannot have: it replaces whatever they send.
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

    /// Puts it into the headers of a call, in place of any other.
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
        keys.let_in(&Method::POST, path, headers)
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
    fn only_what_vllm_leaves_open_is_open_and_only_under_that_very_path() {
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
        assert!(keys.let_in(&Method::OPTIONS, "/v1/models", &HeaderMap::new()));
    }

    #[test]
    fn keys_are_never_printed_and_must_fit_into_a_header() {
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
