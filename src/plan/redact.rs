//! Removes secrets from a plan before it is printed or written. PURE.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

use super::Plan;
use crate::engine::{arguments, vllm};

/// The text in place of a secret.
const REDACTED: &str = "<redacted>";

/// Parts of a variable's name that mark it as a secret.
const SECRET_WORDS: [&str; 6] = ["TOKEN", "KEY", "SECRET", "PASSWORD", "AUTH", "CREDENTIALS"];

impl Plan {
    /// The plan without secrets, for people and for `plan.json`.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let mut plan = self.clone();
        for engine in &mut plan.engines {
            engine.argv = redacted_argv(&engine.argv);
            engine.env = redacted_env(&engine.env);
        }
        let endpoint = &mut plan.proxy.config.traces.otlp_endpoint;
        *endpoint = endpoint.take().map(|url| without_secrets(&url).into_owned());
        plan
    }
}

/// Options whose values are secrets.
const SECRET_OPTIONS: [&str; 2] = ["--api-key", "--hf-token"];

/// The arguments without the values of secret options in any spelling, and without values that look like a secret.
pub fn redacted_argv(argv: &[String]) -> Vec<String> {
    let hidden = |word: &String| {
        if looks_secret(word) {
            REDACTED.to_owned()
        } else {
            word.clone()
        }
    };
    let mut shown: Vec<String> = argv.iter().map(hidden).collect();
    let own = vllm::own_arguments(argv);
    let before = argv.len() - own.len();
    for given in arguments::read(own) {
        if !given.fits.iter().any(|name| SECRET_OPTIONS.contains(name)) {
            continue;
        }
        for index in given.words {
            let word = &mut shown[before + index];
            *word = match word.split_once('=') {
                Some((name, _)) if name == given.spelled => format!("{name}={REDACTED}"),
                _ if word == given.spelled => continue,
                _ => REDACTED.to_owned(),
            };
        }
    }
    shown
}

/// The variables without the values that are secret by name or by form.
pub fn redacted_env(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let is_secret = |name: &str| {
        let upper = name.to_uppercase();
        let mut parts = upper.split('_');
        parts.any(|part| SECRET_WORDS.iter().any(|word| part.ends_with(word)))
    };
    env.iter()
        .map(|(name, value)| {
            let is_secret = is_secret(name) || looks_secret(value);
            (
                name.clone(),
                if is_secret { REDACTED.to_owned() } else { value.clone() },
            )
        })
        .collect()
}

/// Whether a value looks like a secret: a token, a URL with a password or a signature, a header with credentials.
fn looks_secret(value: &str) -> bool {
    value.starts_with("hf_") || SHAPES.iter().any(|shape| shape.is_match(value))
}

/// A text without anything that looks like a secret. In the patterns, `$1` is the part before the secret.
pub fn without_secrets(text: &str) -> Cow<'_, str> {
    let replacement = format!("${{1}}{REDACTED}");
    SHAPES.iter().fold(Cow::Borrowed(text), |text, shape| {
        match shape.replace_all(&text, replacement.as_str()) {
            Cow::Borrowed(_) => text,
            Cow::Owned(clean) => Cow::Owned(clean),
        }
    })
}

/// Patterns of secrets that are recognised without a name.
static SHAPES: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    [
        // Tokens: Hugging Face, OpenAI, GitHub, AWS, JSON web tokens, and the key that xpyd makes for engines.
        r"(\bhf_)[A-Za-z0-9]{6,}",
        r"(\bapi_org_)[A-Za-z0-9]{6,}",
        r"(\bsk-)[A-Za-z0-9_-]{8,}",
        r"(\bgh[pousr]_)[A-Za-z0-9]{16,}",
        r"()\bAKIA[A-Z0-9]{16}\b",
        r"(\beyJ)[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*",
        r"(\bxpyd-run-)[0-9a-f]{8,}",
        r"(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{4,}",
        // URLs: user and password, and signatures.
        r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@]*:[^\s/@]+@",
        r#"(?i)([?&](?:x-amz-[a-z-]+|signature|policy|key-pair-id|sig|[a-z_-]*token|api[-_]?key|key|password|secret)=)[^&\s"']+"#,
    ]
    .iter()
    .map(|shape| Regex::new(shape).expect("the shapes are part of the program and a test uses them"))
    .collect()
});

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::machine::Machine;
    use crate::plan::build;
    use crate::profile::{Override, load};

    #[test]
    fn every_spelling_of_a_key_is_redacted() {
        let argv = "vllm --api-key swordfish swordfish --port 1 --api_key=swordfish --api-k=swordfish --hf-tok swordfish hf_swordfish --x y";
        let argv: Vec<String> = argv.split(' ').map(str::to_owned).collect();
        assert_eq!(
            redacted_argv(&argv).join(" "),
            "vllm --api-key <redacted> <redacted> --port 1 --api_key=<redacted> --api-k=<redacted> --hf-tok <redacted> <redacted> --x y"
        );
        let env =
            ["HF_TOKEN", "OPENAI_API_KEY", "my_secret", "MYAPIKEY"].map(|name| (name.to_owned(), "swordfish".into()));
        let mut env = BTreeMap::from(env);
        env.insert("TOKENIZERS_PARALLELISM".into(), "false".into());
        for (name, value) in [
            ("DB_URL", "postgres://u:swordfish@db/x"),
            ("CACHE", "redis://:swordfish@cache:6379/0"),
            ("HOOK", "https://hooks/x?access_token=swordfish"),
            ("EXTRA_HEADERS", "authorization=Basic swordfish="),
            ("WHATEVER", "sk-swordfish1"),
        ] {
            env.insert(name.into(), value.into());
        }
        env.insert("ENDPOINT".into(), "http://127.0.0.1:4318/v1?limit=1".into());
        let shown = redacted_env(&env);
        assert!(!shown.values().any(|value| value.contains("swordfish")), "{shown:?}");
        assert_eq!(shown["ENDPOINT"], env["ENDPOINT"]);
        assert!(!shown.values().any(|value| value == "swordfish"), "{shown:?}");
        assert_eq!(shown["TOKENIZERS_PARALLELISM"], "false");
    }

    #[test]
    fn a_redacted_plan_has_no_secret() {
        let overrides = [
            "decode.args=[\"--api-key\", \"swordfish\"]",
            "prefill.env={VLLM_API_KEY=\"swordfish\"}",
            "proxy.traces.otlp_endpoint=\"http://me:swordfish@collector/v1/traces?token=swordfish\"",
        ];
        let overrides: Vec<Override> = overrides
            .iter()
            .map(|set| Override::parse(set).expect("an override"))
            .collect();
        let profile = load("1p1d", &overrides).expect("a profile");
        let plan = build(&profile, &Machine::fixture(2, "0.32.0", None), Path::new("/run")).expect("a plan");
        let text = |plan: &Plan| serde_json::to_string(plan).expect("JSON");
        assert_eq!(text(&plan).matches("swordfish").count(), 4);
        assert!(!text(&plan.redacted()).contains("swordfish"));
    }
}
