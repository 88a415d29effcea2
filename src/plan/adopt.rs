//! What the proxy takes over from the options of its engines, because clients meet the proxy in the engines' place.
//!
//! Pure. What the profile says of the proxy itself goes first.

use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::engine::arguments;
use crate::profile::Profile;
use crate::service::{Cors, Service, Streams};

/// How clients are served.
pub(super) fn service(profile: &Profile) -> Service {
    let mut service = profile.proxy.service.clone();
    let args = [&profile.vllm.args[..], &profile.decode.args].concat();
    if service.cors == Cors::default() {
        service.cors = cors(&args);
    }
    if service.streams == Streams::default() {
        let seconds = arguments::value(&args, "--sse-keep-alive-interval");
        let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(0);
        service.streams.keep_alive = Duration::from_secs(seconds);
    }
    service
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

/// The JSON value of an option. What is none ends the engine, whose log says so.
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
