//! What of a plan may be shown and written down: everything but the secrets in arguments and variables. PURE.

use std::collections::BTreeMap;

use super::Plan;

/// What stands in a secret's place.
const REDACTED: &str = "<redacted>";

/// A variable whose name has a part that ends like this is a secret.
const SECRET_WORDS: [&str; 6] = ["TOKEN", "KEY", "SECRET", "PASSWORD", "AUTH", "CREDENTIALS"];

impl Plan {
    /// The plan for people and for `plan.json`: what is a secret is left out.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let mut plan = self.clone();
        for engine in &mut plan.engines {
            engine.argv = redacted_argv(&engine.argv);
            engine.env = redacted_env(&engine.env);
        }
        plan
    }
}

/// The arguments without the values of `--api-key`, which takes several, and without Hugging Face's tokens.
pub fn redacted_argv(argv: &[String]) -> Vec<String> {
    let mut secrets_follow = false;
    argv.iter()
        .map(|argument| {
            let name = argument.split_once('=').map_or(argument.as_str(), |(name, _)| name);
            let is_key = name.replace('_', "-") == "--api-key";
            if argument.starts_with('-') {
                secrets_follow = is_key && name == argument;
            } else if secrets_follow {
                return REDACTED.to_owned();
            }
            if is_key && name != argument {
                format!("{name}={REDACTED}")
            } else if looks_secret(argument) {
                REDACTED.to_owned()
            } else {
                argument.clone()
            }
        })
        .collect()
}

/// The variables without the values of those that are secrets by their name or their value.
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

/// Hugging Face's tokens begin like this.
fn looks_secret(value: &str) -> bool {
    value.starts_with("hf_")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::machine::Machine;
    use crate::plan::build;
    use crate::profile::{Override, load};

    #[test]
    fn every_spelling_of_a_key_is_left_out_and_nothing_else() {
        let argv =
            "vllm --api-key swordfish swordfish --port 1 --api_key=swordfish --api-key=swordfish hf_swordfish --x y";
        let argv: Vec<String> = argv.split(' ').map(str::to_owned).collect();
        assert_eq!(
            redacted_argv(&argv).join(" "),
            "vllm --api-key <redacted> <redacted> --port 1 --api_key=<redacted> --api-key=<redacted> <redacted> --x y"
        );
        let env =
            ["HF_TOKEN", "OPENAI_API_KEY", "my_secret", "MYAPIKEY"].map(|name| (name.to_owned(), "swordfish".into()));
        let mut env = BTreeMap::from(env);
        env.insert("TOKENIZERS_PARALLELISM".into(), "false".into());
        let shown = redacted_env(&env);
        assert!(!shown.values().any(|value| value == "swordfish"), "{shown:?}");
        assert_eq!(shown["TOKENIZERS_PARALLELISM"], "false");
    }

    #[test]
    fn a_plan_to_be_shown_holds_no_secret() {
        let overrides = [
            "decode.args=[\"--api-key\", \"swordfish\"]",
            "prefill.env={VLLM_API_KEY=\"swordfish\"}",
        ];
        let overrides: Vec<Override> = overrides
            .iter()
            .map(|set| Override::parse(set).expect("an override"))
            .collect();
        let profile = load("1p1d", &overrides).expect("a profile");
        let plan = build(&profile, &Machine::fixture(2, "0.32.0", None), Path::new("/run")).expect("a plan");
        let text = |plan: &Plan| serde_json::to_string(plan).expect("JSON");
        assert_eq!(text(&plan).matches("swordfish").count(), 2);
        assert!(!text(&plan.redacted()).contains("swordfish"));
    }
}
