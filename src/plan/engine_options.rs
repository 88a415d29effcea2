//! Options of the engines that set keys of the proxy, because clients connect to the proxy instead of an engine. PURE.
//!
//! A key that the profile sets for the proxy itself wins.

use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::engine::arguments;
use crate::profile::Profile;
use crate::proxy_config::{Cors, ProxyConfig, Streams};

/// The profile's proxy configuration, completed from the options of the engines.
pub(super) fn proxy_config(profile: &Profile) -> ProxyConfig {
    let mut config = profile.proxy.clone();
    let args = [&profile.vllm.args[..], &profile.decode.args].concat();
    if config.cors == Cors::default() {
        config.cors = cors(&args);
    }
    if config.streams == Streams::default() {
        let seconds = arguments::value(&args, "--sse-keep-alive-interval");
        let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(0);
        config.streams.keep_alive = Duration::from_secs(seconds);
    }
    config
}

fn cors(args: &[String]) -> Cors {
    let default = Cors::default();
    let list = |name, otherwise| json(args, name).unwrap_or(otherwise);
    let allow_credentials = arguments::read(args)
        .into_iter()
        .rfind(|given| given.name == "--allow-credentials");
    Cors {
        allowed_origins: list("--allowed-origins", default.allowed_origins),
        allowed_methods: list("--allowed-methods", default.allowed_methods),
        allowed_headers: list("--allowed-headers", default.allowed_headers),
        allow_credentials: allow_credentials.is_some_and(|given| !given.is_off()),
    }
}

/// The JSON value of an option. Invalid JSON is ignored here: the engine refuses it, and its log says so.
fn json<T: DeserializeOwned>(args: &[String], name: &str) -> Option<T> {
    serde_json::from_str(arguments::value(args, name)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &[&str]) -> Vec<String> {
        line.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn the_engines_options_are_read_in_every_spelling() {
        let any = Cors {
            allowed_origins: vec!["*".into()],
            ..Cors::default()
        };
        assert_eq!(cors(&[]), Cors::default());
        for line in [
            &["--allowed-origins", r#"["*"]"#][..],
            &["--allowed-origins=[\"*\"]"],
            &["--allowed_origins", r#"[ "*" ]"#],
            &["--allowed-origins", "[]", "--allowed-origins", r#"["*"]"#],
        ] {
            assert_eq!(cors(&args(line)), any, "{line:?}");
        }
        let all = cors(&args(&[
            "--allowed-origins",
            r#"["https://a","https://b"]"#,
            "--allowed-methods",
            r#"["GET"]"#,
            "--allowed-headers",
            r#"["x-a"]"#,
            "--allow-credentials",
        ]));
        assert_eq!(all.allowed_origins, ["https://a", "https://b"]);
        assert_eq!(
            (&all.allowed_methods[..], &all.allowed_headers[..]),
            (&["GET".to_owned()][..], &["x-a".to_owned()][..])
        );
        assert!(all.allow_credentials);
        assert!(!cors(&args(&["--allow_credentials", "--no-allow-credentials"])).allow_credentials);
    }
}
