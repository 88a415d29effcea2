//! The tokenizer of a model, equal to Python's `transformers`: the `tokenizers` crate plus the rules that transformers
//! adds.
//!
//! The prompts depend on the exact ids of transformers 5.19: the size of the vocabulary, the special ids, and the ids
//! that a server puts in front of a text.

mod find;
mod template;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, ModelWrapper, PostProcessor as _};

pub use self::find::find;
use self::template::Template;

/// A tokenizer with the properties that transformers derives.
#[derive(Debug)]
pub struct Tokenizer {
    name: String,
    inner: tokenizers::Tokenizer,
    vocabulary_size: u32,
    special_ids: HashSet<u32>,
    added_to_text: usize,
    cleans_up: bool,
    template: Option<Template>,
}

/// Two tokenizers with the same name are equal.
impl PartialEq for Tokenizer {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// Why a tokenizer is missing or fails.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// No tokenizer of that name.
    #[error("no tokenizer `{name}`: {reason}")]
    Missing {
        /// The requested name.
        name: String,
        /// Where it was searched.
        reason: String,
    },
    /// A file of the tokenizer cannot be read.
    #[error("cannot read the tokenizer's file {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer rejects a text or ids.
    #[error("the tokenizer `{name}` fails: {reason}")]
    Use {
        /// Its name.
        name: String,
        /// Its error.
        reason: String,
    },
    /// The chat template is missing or fails.
    #[error("the chat template of the tokenizer `{name}` {reason}")]
    Template {
        /// The tokenizer's name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// The named special tokens of transformers, in its order.
const NAMED: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl Tokenizer {
    /// Loads the tokenizer of a model folder, or a `tokenizer.json` with its neighbours. `name` is for messages.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing or a file is invalid.
    pub fn load(name: &str, path: &Path) -> Result<Self, TokenizerError> {
        let (folder, file) = if path.is_dir() {
            (path, path.join("tokenizer.json"))
        } else {
            (path.parent().unwrap_or(Path::new(".")), path.to_owned())
        };
        let body = read_json(&file)?.ok_or_else(|| TokenizerError::Missing {
            name: name.to_owned(),
            reason: format!("`{}` has no `tokenizer.json`", folder.display()),
        })?;
        let mut config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        if !config.contains_key("added_tokens_decoder") {
            // Older tokenizers have their special tokens in a separate file.
            let own = read_json(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
            config.extend(own);
        }
        let model = read_json(&folder.join("config.json"))?.unwrap_or_default();
        let class = class(&config, &model);
        let bad = |reason: String| TokenizerError::File {
            path: file.clone(),
            reason,
        };
        let body = Value::Object(rebuilt(class, body, &config)).to_string();
        let mut inner = tokenizers::Tokenizer::from_bytes(body).map_err(|error| bad(error.to_string()))?;
        // Truncation and padding in the file must not change prompts.
        inner.with_truncation(None).map_err(|error| bad(error.to_string()))?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(config.get("split_special_tokens") == Some(&json!(true)));

        let specials = special_tokens(class, &config);
        let unknown = specials.iter().find(|(name, _)| name == "unk_token");
        let unknown = unknown.and_then(|(_, token)| inner.token_to_id(token));
        let missing: Vec<AddedToken> = specials
            .iter()
            .filter(|(_, token)| inner.token_to_id(token).is_none())
            .map(|(_, token)| AddedToken::from(token.clone(), true))
            .collect();
        inner
            .add_special_tokens(missing)
            .map_err(|error| bad(error.to_string()))?;
        let ids = specials
            .iter()
            .filter_map(|(_, token)| inner.token_to_id(token).or(unknown));
        let special_ids = ids.collect();
        let vocabulary_size = u32::try_from(inner.get_vocab_size(false)).map_err(|error| bad(error.to_string()))?;
        if vocabulary_size == 0 {
            return Err(bad("its vocabulary is empty".to_owned()));
        }
        let is_bpe = matches!(inner.get_model(), ModelWrapper::BPE(_));
        Ok(Self {
            name: name.to_owned(),
            vocabulary_size,
            special_ids,
            added_to_text: inner
                .get_post_processor()
                .map_or(0, |processor| processor.added_tokens(false)),
            // transformers does not clean up spaces of byte-pair models, whatever the file says.
            cleans_up: !is_bpe && config.get("clean_up_tokenization_spaces") == Some(&json!(true)),
            template: Template::read(folder, &config, specials)?,
            inner,
        })
    }

    /// The name: a model name or a path.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size of the vocabulary without added tokens: transformers' `vocab_size`.
    pub fn vocabulary_size(&self) -> u32 {
        self.vocabulary_size
    }

    /// Whether the id is one of transformers' `all_special_ids`.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Number of ids that are added to one text: transformers' `num_special_tokens_to_add()`.
    pub fn added_to_text(&self) -> usize {
        self.added_to_text
    }

    /// All ids of the vocabulary and of added tokens, except special ones, ascending.
    pub fn plain_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.inner.get_vocab(true).into_values().collect();
        ids.retain(|&id| !self.is_special(id));
        ids.sort_unstable();
        ids
    }

    /// The ids of a text, without added ones.
    ///
    /// # Errors
    /// When the tokenizer rejects the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| self.fails(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The number of ids of a text on a server, including added ones.
    ///
    /// # Errors
    /// When the tokenizer rejects the text.
    pub fn count(&self, text: &str) -> Result<u64, TokenizerError> {
        let encoding = self.inner.encode_fast(text, true).map_err(|error| self.fails(&error))?;
        Ok(encoding.len() as u64)
    }

    /// The text of ids, special tokens included.
    ///
    /// # Errors
    /// When the tokenizer rejects the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let text = self.inner.decode(ids, false).map_err(|error| self.fails(&error))?;
        Ok(if self.cleans_up { clean_up(text) } else { text })
    }

    /// One user message in the model's chat template, with the beginning of the answer.
    ///
    /// # Errors
    /// When the template is missing or fails.
    pub fn apply_template(&self, content: &str, settings: &Map<String, Value>) -> Result<String, TokenizerError> {
        let fails = |reason: String| TokenizerError::Template {
            name: self.name.clone(),
            reason,
        };
        let template = self.template.as_ref().ok_or_else(|| fails("is missing".to_owned()))?;
        template.render(content, settings).map_err(fails)
    }

    fn fails(&self, error: &tokenizers::Error) -> TokenizerError {
        TokenizerError::Use {
            name: self.name.clone(),
            reason: error.to_string(),
        }
    }
}

/// The JSON object of a file; `None` if the file does not exist.
fn read_json(path: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let bad = |reason: String| TokenizerError::File {
        path: path.to_owned(),
        reason,
    };
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| bad(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// The tokenizer class of transformers, without `Fast`: the file's, unless the model type has a better one.
fn class<'a>(config: &'a Map<String, Value>, model: &Map<String, Value>) -> &'a str {
    let named = config.get("tokenizer_class").and_then(Value::as_str);
    let kind = model.get("model_type").and_then(Value::as_str);
    match (named, kind) {
        (_, Some("qwen2" | "qwen3")) | (None, Some("qwen2_moe" | "qwen3_moe")) => "Qwen2Tokenizer",
        (None, Some("llama")) => "LlamaTokenizer",
        (None, Some("gpt2" | "opt" | "phi")) => "GPT2Tokenizer",
        (Some(class), _) => class.trim_end_matches("Fast"),
        (None, _) => "",
    }
}

/// The special tokens by name, then unnamed ones, each once. The class gives defaults.
fn special_tokens(class: &str, config: &Map<String, Value>) -> Vec<(String, String)> {
    let defaults: &[(&str, &str)] = match class {
        "LlamaTokenizer" => &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
        "Qwen2Tokenizer" => &[
            ("unk_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|endoftext|>"),
        ],
        "GPT2Tokenizer" | "CodeGenTokenizer" => &[
            ("unk_token", "<|endoftext|>"),
            ("bos_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
        ],
        "GPTNeoXTokenizer" => &[
            ("unk_token", "<|endoftext|>"),
            ("bos_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|padding|>"),
        ],
        "GemmaTokenizer" => &[
            ("unk_token", "<unk>"),
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
        _ => &[],
    };
    let mut found: Vec<(String, String)> = Vec::new();
    for name in NAMED {
        let default = defaults.iter().find(|(key, _)| *key == name).map(|(_, token)| *token);
        let token = config.get(name).map_or(default, content);
        found.extend(token.map(|token| (name.to_owned(), token.to_owned())));
    }
    let others = ["extra_special_tokens", "additional_special_tokens"]
        .into_iter()
        .filter_map(|key| config.get(key))
        .find(|value| !matches!(value, Value::Null) && value.as_array().is_none_or(|tokens| !tokens.is_empty()));
    match others {
        Some(Value::Array(tokens)) => {
            let tokens = tokens.iter().filter_map(content);
            found.extend(tokens.map(|token| (String::new(), token.to_owned())));
        }
        Some(Value::Object(tokens)) => {
            let tokens = tokens.iter().filter_map(|(name, token)| Some((name, content(token)?)));
            found.extend(tokens.map(|(name, token)| (name.clone(), token.to_owned())));
        }
        _ => {}
    }
    // A model-specific `…_token` is also special.
    for (name, value) in config {
        let is_own = name.ends_with("_token") && !NAMED.contains(&name.as_str());
        if let Some(token) = content(value).filter(|_| is_own) {
            found.push((name.clone(), token.to_owned()));
        }
    }
    found
}

/// A token in a configuration: a text, or an object with its text.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// The tokenizer file as the transformers class rebuilds it: it keeps the vocabulary, the added tokens and the
/// post-processor, and replaces the rest.
fn rebuilt(class: &str, mut body: Map<String, Value>, config: &Map<String, Value>) -> Map<String, Value> {
    let is = |key: &str| config.get(key).and_then(Value::as_bool);
    if class == "LlamaTokenizer" && body["model"]["type"] == "BPE" {
        let prefix = is("add_prefix_space").unwrap_or(true);
        let scheme = match (prefix, is("legacy").unwrap_or(false)) {
            (false, _) => "never",
            (true, true) => "always",
            (true, false) => "first",
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        body.insert("normalizer".to_owned(), Value::Null);
        body.insert(
            "pre_tokenizer".to_owned(),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false}),
        );
        body.insert("decoder".to_owned(), json!({"type": "Sequence", "decoders": decoders}));
        if let Some(model) = body.get_mut("model").and_then(Value::as_object_mut) {
            for (key, value) in [
                ("fuse_unk", json!(true)),
                ("byte_fallback", json!(true)),
                ("dropout", Value::Null),
                ("unk_token", Value::Null),
                ("ignore_merges", json!(false)),
            ] {
                model.insert(key.to_owned(), value);
            }
        }
    }
    body
}

/// transformers' clean-up of decoded text for word-based models: no space before closing punctuation.
fn clean_up(text: String) -> String {
    let pairs = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    pairs.iter().fold(text, |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests;
