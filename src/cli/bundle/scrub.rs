//! Removes secrets from texts: known ones, and everything that looks like one. PURE.
//!
//! It removes too much rather than too little, because strangers read the result.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;

use crate::plan::without_secrets;

const GONE: &str = "<redacted>";

/// Minimum length of a known secret. A shorter one would remove ordinary words.
const SHORTEST: usize = 4;

/// Patterns of named secrets; `$1` is the part before the secret.
static PATTERNS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    [
        // Private keys, over many lines.
        r"(?s)()-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\z)",
        // Headers.
        r#"(?i)((?:proxy-)?authorization["']?\s*[:=]\s*["']?)(?:(?:bearer|basic|digest|token)\s+)?[^\s"',}]+"#,
        r#"(?i)(\b(?:set-)?cookie["']?\s*[:=]\s*)[^\n]+"#,
        r#"(?i)(\bx-(?:api|auth)-[a-z-]*["']?\s*[:=]\s*["']?)[^\s"',}]+"#,
        r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{4,}",
        // Options with one or more values.
        r#"(--(?:api[-_]key|hf[-_]token)["']?(?:,\s*|\s+|=)["']?)[^\s"',-][^\s"',]*(?:["']?,?[ \t]+["']?[^\s"',-][^\s"',]*)*"#,
        // Lists and values by name, in JSON, YAML, Python and shells.
        r#"(?i)((?:api[_-]?keys?|hf[_-]?token)["']?\s*[:=]\s*)\[[^\]]*\]"#,
        r#"(?i)(\b[a-z0-9_-]*(?:api[_-]?key|access[_-]?key|private[_-]?key|secret|passwd|password|credentials?|auth[_-]?token|hf[_-]?token)["']?\s*[:=]\s*["']?)[^\s"',}\]]+"#,
        r#"(\b[A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASSWORD|AUTH)=)[^\s"']+"#,
    ]
    .iter()
    .map(|pattern| Regex::new(pattern).expect("the patterns are part of the program and a test uses them"))
    .collect()
});

/// Removes secrets from texts.
#[derive(Debug)]
pub(super) struct Scrubber {
    /// Known secrets, the longest first, because one can be a part of another.
    known: Vec<String>,
    home: Option<String>,
}

impl Scrubber {
    /// A scrubber that knows these secrets.
    pub(super) fn new(known: &[String]) -> Self {
        let home = std::env::var("HOME").ok().filter(|home| home.len() > 1);
        Self::with_home(known, home)
    }

    fn with_home(known: &[String], home: Option<String>) -> Self {
        let trimmed = known.iter().map(|secret| secret.trim().to_owned());
        let mut known: Vec<String> = trimmed.filter(|secret| secret.len() >= SHORTEST).collect();
        known.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        known.dedup();
        Self { known, home }
    }

    /// The text without secrets, and without the name of the user's home folder.
    pub(super) fn scrub(&self, text: &str) -> String {
        let mut text = Cow::Borrowed(text);
        for secret in &self.known {
            if text.contains(secret.as_str()) {
                text = Cow::Owned(text.replace(secret.as_str(), GONE));
            }
        }
        for pattern in PATTERNS.iter() {
            if let Cow::Owned(cleaned) = pattern.replace_all(&text, format!("${{1}}{GONE}").as_str()) {
                text = Cow::Owned(cleaned);
            }
        }
        let text = without_secrets(&text);
        match &self.home {
            Some(home) if text.contains(home.as_str()) => text.replace(home.as_str(), "~"),
            _ => text.into_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_secret_is_removed() {
        let scrubber = Scrubber::with_home(&["marlin-77".to_owned()], None);
        for text in [
            "a marlin-77 b",
            "authorization: Bearer swordfish",
            "\"Authorization\": \"swordfish\"",
            "-H 'Authorization: Basic swordfish'",
            "Bearer swordfish1",
            "Cookie: a=swordfish; b=c",
            "x-api-key: swordfish",
            "--api-key swordfish --port 1",
            "--api-key swordfish swordfish",
            "'--api-key', 'swordfish', 'swordfish', '--port'",
            "--api_key=swordfish",
            "--hf-token swordfish",
            "non-default args: {'api_key': ['swordfish', 'swordfish'], 'port': 1}",
            "api_key: swordfish",
            "{\"api_key\": \"swordfish\"}",
            "OPENAI_API_KEY=swordfish",
            "HF_TOKEN=swordfish vllm serve",
            "export MY_SECRET=swordfish",
            "db_password = swordfish",
            "hf_swordfishswordfish",
            "sk-swordfish-swordfish",
            "ghp_swordfishswordfish1234",
            "eyJswordfish1.swordfish.swordfish",
            "http://me:swordfish@proxy:8080/",
            "https://cdn/x?X-Amz-Signature=swordfish&a=1",
            "https://cdn/x?a=1&Signature=swordfish",
            "-----BEGIN PRIVATE KEY-----\nswordfish\n-----END PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----\nswordfish\nswordfish",
        ] {
            let clean = scrubber.scrub(text);
            assert!(
                !clean.contains("swordfish") && !clean.contains("marlin"),
                "{text} became {clean}"
            );
            assert!(clean.contains(GONE), "{text} became {clean}");
        }
    }

    #[test]
    fn useful_text_stays() {
        let scrubber = Scrubber::with_home(&["no".to_owned()], Some("/home/ada".to_owned()));
        for text in [
            "INFO 11-22 Maximum concurrency for 4,096 tokens per request: 12.00x",
            "--max-model-len 4096 --port 8100 --tokenizer org/name",
            "TOKENIZERS_PARALLELISM=false",
            "http://127.0.0.1:8100/v1/models?limit=1",
            "\"max_tokens\": 16, \"prompt_tokens\": 7",
            "no such file",
        ] {
            assert_eq!(scrubber.scrub(text), text);
        }
        assert_eq!(scrubber.scrub("File \"/home/ada/x.py\""), "File \"~/x.py\"");
    }
}
