//! The size of a model, from its `config.json` and the sizes of its weight files.

use std::path::Path;

use serde::Deserialize;

/// The size of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSize {
    /// Size of the weights, in bytes.
    pub weights_bytes: u64,
    /// Whether it is the size of the files; otherwise it is computed from the configuration.
    pub weights_are_exact: bool,
    /// Longest context that the model supports, in tokens.
    pub max_positions: Option<u64>,
    /// The size of a token's KV.
    pub kv: KvShape,
}

/// The numbers that determine the KV size of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct KvShape {
    /// Layers that keep the KV of every token.
    pub full_layers: u64,
    /// Layers that only keep the KV of the last [`window`](Self::window) tokens.
    pub window_layers: u64,
    /// Number of tokens in a window layer.
    pub window: u64,
    /// Number of KV heads, which tensor-parallel ranks share out; 0 with MLA, where every rank keeps everything.
    pub heads: u64,
    /// Values per token and layer, keys and values of all heads.
    pub values: u64,
    /// Bytes per value, unless the engine quantises its cache.
    pub value_bytes: u64,
}

impl KvShape {
    /// KV size of one request of `tokens` on one of `ranks`, in bytes, with `value_bytes` per value.
    pub fn bytes(&self, tokens: u64, ranks: u64, value_bytes: u64) -> u64 {
        let kept = self.full_layers * tokens + self.window_layers * tokens.min(self.window);
        let whole = kept.saturating_mul(self.values * value_bytes);
        if self.heads == 0 {
            return whole;
        }
        // With more ranks than heads, ranks have copies.
        whole / self.heads * self.heads.div_ceil(ranks.max(1))
    }
}

/// The relevant parts of a `config.json`. The names are those of Hugging Face's `transformers`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Config {
    #[serde(rename = "text_config")]
    text: Option<Box<Config>>,
    num_hidden_layers: u64,
    hidden_size: u64,
    intermediate_size: u64,
    vocab_size: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    tie_word_embeddings: bool,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    max_position_embeddings: Option<u64>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    kv_lora_rank: Option<u64>,
    qk_rope_head_dim: Option<u64>,
    #[serde(alias = "n_routed_experts", alias = "num_experts")]
    num_local_experts: Option<u64>,
    moe_intermediate_size: Option<u64>,
    #[serde(rename = "quantization_config")]
    quantization: Option<Quantization>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Quantization {
    bits: Option<u64>,
    quant_method: Option<String>,
}

/// The index of weights in several files.
#[derive(Debug, Deserialize)]
struct Index {
    metadata: IndexMetadata,
}

#[derive(Debug, Deserialize)]
struct IndexMetadata {
    total_size: u64,
}

/// The size of the model in this folder, if its configuration can be read.
pub(super) fn survey(folder: &Path) -> Option<ModelSize> {
    let config = fs_err::read_to_string(folder.join("config.json")).ok()?;
    size(&config, weights(folder))
}

/// The size of the weight files.
fn weights(folder: &Path) -> Option<u64> {
    let index = fs_err::read_to_string(folder.join("model.safetensors.index.json")).ok();
    if let Some(index) = index.and_then(|text| serde_json::from_str::<Index>(&text).ok()) {
        return Some(index.metadata.total_size);
    }
    let files = fs_err::read_dir(folder).ok()?.flatten();
    let weights = files.filter(|file| {
        file.path()
            .extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    // The files are links in the cache.
    let sizes = weights.filter_map(|file| Some(fs_err::metadata(file.path()).ok()?.len()));
    let total: u64 = sizes.sum();
    (total > 0).then_some(total)
}

/// The size from the text of a `config.json`, and the size of the weights if it is known. PURE.
fn size(config: &str, weights: Option<u64>) -> Option<ModelSize> {
    let outer: Config = serde_json::from_str(config).ok()?;
    let mut config = outer.text.as_deref().cloned().unwrap_or_else(|| outer.clone());
    config.torch_dtype = config.torch_dtype.or(outer.torch_dtype);
    config.dtype = config.dtype.or(outer.dtype);
    config.quantization = config.quantization.or(outer.quantization);
    if config.num_hidden_layers == 0 || config.num_attention_heads == 0 {
        return None;
    }
    Some(ModelSize {
        weights_bytes: weights.unwrap_or_else(|| config.reckoned_weights()),
        weights_are_exact: weights.is_some(),
        max_positions: config.max_position_embeddings,
        kv: config.kv(),
    })
}

impl Config {
    fn value_bytes(&self) -> u64 {
        match self.dtype.as_deref().or(self.torch_dtype.as_deref()) {
            // vLLM then computes in 16 bits.
            Some("float32") | None => 2,
            Some(name) if name.contains("float8") => 1,
            Some(_) => 2,
        }
    }

    fn head_dim(&self) -> u64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    fn heads(&self) -> u64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads).max(1)
    }

    fn kv(&self) -> KvShape {
        let kind = |wanted: &str| {
            let kinds = self.layer_types.iter().flatten();
            kinds.filter(|kind| kind.as_str() == wanted).count() as u64
        };
        let window = self.sliding_window.filter(|_| self.use_sliding_window != Some(false));
        let (full_layers, window_layers) = match (&self.layer_types, window) {
            (Some(_), _) => (kind("full_attention"), kind("sliding_attention")),
            (None, Some(_)) => (0, self.num_hidden_layers),
            (None, None) => (self.num_hidden_layers, 0),
        };
        let (heads, values) = match self.kv_lora_rank {
            Some(rank) => (0, rank + self.qk_rope_head_dim.unwrap_or(0)),
            None => (self.heads(), 2 * self.heads() * self.head_dim()),
        };
        KvShape {
            full_layers,
            window_layers,
            window: window.unwrap_or(u64::MAX),
            heads,
            values,
            value_bytes: self.value_bytes(),
        }
    }

    /// Parameters of attention, feed-forward layers and the vocabulary; everything else is far smaller.
    fn reckoned_weights(&self) -> u64 {
        let (hidden, head) = (self.hidden_size, self.head_dim());
        let attention = 2 * hidden * head * (self.num_attention_heads + self.heads());
        let experts = self.num_local_experts.unwrap_or(1).max(1);
        let inner = self
            .moe_intermediate_size
            .filter(|_| experts > 1)
            .unwrap_or(self.intermediate_size);
        let feed_forward = 3 * hidden * inner * experts;
        let vocabulary = self.vocab_size * hidden * if self.tie_word_embeddings { 1 } else { 2 };
        let layers = self.num_hidden_layers * (attention + feed_forward);
        let bits = match &self.quantization {
            Some(Quantization { bits: Some(bits), .. }) => *bits,
            Some(Quantization {
                quant_method: Some(method),
                ..
            }) if method.contains("mxfp4") => 4,
            Some(_) => 8,
            None => 8 * self.value_bytes(),
        };
        layers * bits / 8 + vocabulary * self.value_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    fn reckoned(config: &str) -> ModelSize {
        size(config, None).expect("a model")
    }

    #[test]
    fn size_of_llama_3_1_8b() {
        let llama = reckoned(
            r#"{"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
            "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
            "max_position_embeddings": 131072, "tie_word_embeddings": false}"#,
        );
        assert_eq!(llama.kv.bytes(1, 1, 2), 131_072);
        assert_eq!(llama.kv.bytes(1, 2, 2), 65_536);
        assert_eq!(llama.kv.bytes(1, 16, 2), 16_384, "more ranks than heads");
        assert_eq!(llama.kv.bytes(16_384, 1, 2), 2 << 30);
        assert!((14.9..15.0).contains(&(llama.weights_bytes as f64 / GIB)), "{llama:?}");
        assert_eq!(llama.max_positions, Some(131_072));
    }

    #[test]
    fn mla_kv_is_on_every_rank() {
        // DeepSeek-V3: 61 layers, 512 + 64 values.
        let deepseek = reckoned(
            r#"{"num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "vocab_size": 129280,
            "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "n_routed_experts": 256, "moe_intermediate_size": 2048, "quantization_config": {"quant_method": "fp8"}}"#,
        );
        assert_eq!(deepseek.kv.bytes(1, 1, 2), 61 * 576 * 2);
        assert_eq!(deepseek.kv.bytes(1, 8, 2), 61 * 576 * 2);
        assert!(
            (600.0..720.0).contains(&(deepseek.weights_bytes as f64 / GIB)),
            "{deepseek:?}"
        );
    }

    #[test]
    fn window_layers_stop_growing() {
        let layers = r#"["sliding_attention", "full_attention"]"#;
        let config = format!(
            r#"{{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 1, "sliding_window": 10, "layer_types": {layers}}}"#
        );
        let kv = reckoned(&config).kv;
        assert_eq!(kv.bytes(100, 1, 2), (100 + 10) * 2 * 64 * 2);
        // Qwen2's configuration has a window that the model does not use.
        let unused = reckoned(
            r#"{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 1, "sliding_window": 10, "use_sliding_window": false}"#,
        );
        assert_eq!(unused.kv.bytes(100, 1, 2), 2 * 100 * 2 * 64 * 2);
    }

    #[test]
    fn nested_text_config_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = r#"{"torch_dtype": "bfloat16", "text_config": {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}}"#;
        fs_err::write(folder.path().join("config.json"), config).expect("a file");
        fs_err::write(folder.path().join("model.safetensors"), [0; 100]).expect("a file");
        let name = folder.path().display().to_string();
        let found = survey(Path::new(&name)).expect("a model");
        assert_eq!((found.weights_bytes, found.weights_are_exact), (100, true));
        let index = r#"{"metadata": {"total_size": 12345}, "weight_map": {}}"#;
        fs_err::write(folder.path().join("model.safetensors.index.json"), index).expect("a file");
        assert_eq!(survey(Path::new(&name)).expect("a model").weights_bytes, 12_345);
        assert_eq!(survey(Path::new("org/nowhere")), None);
        assert_eq!(size("{}", None), None);
    }
}
