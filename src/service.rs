//! How clients are served, as the user wants it: one vocabulary for a profile's `[proxy]` table, the plan, the proxy and
//! `xpyd proxy --set`, so that an option is spelled once.

use serde::{Deserialize, Serialize};

/// All of it. Every option has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Service {
    /// Which engines a request goes to.
    pub routing: Routing,
}

/// Which engines a request goes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Routing {
    /// Pairs of engines that one request may be tried with, the first one included, as long as its client has got nothing.
    pub attempts: u32,
}

impl Default for Routing {
    fn default() -> Self {
        Self { attempts: 3 }
    }
}

impl Service {
    /// The options that `KEY=VALUE` texts change, such as `routing.attempts=2`; later ones win.
    ///
    /// # Errors
    /// A sentence that names the text.
    pub fn from_overrides(texts: &[String]) -> Result<Self, String> {
        let mut table = toml::Table::new();
        for text in texts {
            let wrong = |why: &str| format!("`--set {text}`: {why}");
            let (key, value) = text.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
            let value = value
                .parse::<toml::Value>()
                .unwrap_or_else(|_| toml::Value::String(value.to_owned()));
            let mut parts: Vec<&str> = key.trim().split('.').collect();
            let last = parts.pop().unwrap_or_default();
            let mut inner = &mut table;
            for part in parts {
                let entry = inner
                    .entry(part)
                    .or_insert_with(|| toml::Value::Table(toml::Table::new()));
                inner = entry.as_table_mut().ok_or_else(|| wrong("it is no table"))?;
            }
            inner.insert(last.to_owned(), value);
        }
        table
            .try_into()
            .map_err(|error: toml::de::Error| format!("`--set`: {}", error.message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(texts: &[&str]) -> Result<Service, String> {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        Service::from_overrides(&texts)
    }

    #[test]
    fn options_are_changed_by_their_path_and_the_last_one_wins() {
        assert_eq!(from(&[]), Ok(Service::default()));
        let service = from(&["routing.attempts=5", "routing.attempts=2"]).expect("known options");
        assert_eq!(service.routing.attempts, 2);
    }

    #[test]
    fn unknown_options_and_values_of_another_kind_are_named() {
        for (text, told) in [
            ("routing.atempts=5", "unknown field `atempts`"),
            ("routing=5", "invalid type"),
            ("routing.attempts=many", "invalid type"),
            ("routing", "expected KEY=VALUE"),
        ] {
            let error = from(&[text]).expect_err(text);
            assert!(error.contains(told), "{error}");
        }
    }
}
