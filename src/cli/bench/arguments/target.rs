//! Flags of `xpyd bench`: the server and the form of requests.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use reqwest::header::{CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};

/// The server flags.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Target")]
pub struct Target {
    /// The server as `http://host:port` or `https://host` [default: the running fleet, else --host and --port].
    #[arg(long, value_name = "URL")]
    pub base_url: Option<String>,
    /// Host of the server [default: 127.0.0.1].
    #[arg(long)]
    pub host: Option<String>,
    /// Port of the server [default: 8000].
    #[arg(long)]
    pub port: Option<u16>,
    /// The request type: `openai` and `vllm` send completions, `openai-chat` sends chats [default: openai].
    #[arg(long, value_name = "NAME", default_value = "openai", hide_default_value = true)]
    pub backend: BackendName,
    /// Path of the requests [default: by backend].
    #[arg(long, value_name = "PATH")]
    pub endpoint: Option<String>,
    /// The model [default: the first that the server lists].
    #[arg(long)]
    pub model: Option<String>,
    /// Name of the model in requests [default: --model].
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Names of `LoRA` adapters; each request uses one of them instead of the model.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub lora_modules: Vec<String>,
    /// How adapters are assigned to requests.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = LoraAssignment::Random)]
    pub lora_assignment: LoraAssignment,
    /// Headers of every request, including `Host`. `OPENAI_API_KEY` is sent as a bearer token, the user of a URL as
    /// basic authorization.
    #[arg(long, value_name = "NAME=VALUE", num_args = 0..)]
    pub header: Vec<Header>,
    /// Prefix of request ids [default: `bench-`, eight random digits, `-`].
    #[arg(long, value_name = "TEXT", value_parser = id_prefix)]
    pub request_id_prefix: Option<String>,
    /// Accepts any certificate of an `https` server, such as a self-signed one. `SSL_CERT_FILE` is the safe
    /// alternative.
    #[arg(long)]
    pub insecure: bool,
}

/// The backends, by vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendName {
    /// `/v1/completions`
    Openai,
    /// The same as `openai`
    Vllm,
    /// `/v1/chat/completions`
    OpenaiChat,
}

impl FromStr for BackendName {
    type Err = String;

    /// Parses vLLM's names. Known backends that xpyd does not measure get their own message.
    fn from_str(name: &str) -> Result<Self, String> {
        const OTHERS: [&str; 10] = [
            "openai-responses",
            "openai-audio",
            "openai-embeddings",
            "openai-embeddings-chat",
            "openai-embeddings-clip",
            "openai-embeddings-vlm2vec",
            "infinity-embeddings",
            "infinity-embeddings-clip",
            "vllm-pooling",
            "vllm-rerank",
        ];
        let own = [Self::Openai, Self::Vllm, Self::OpenaiChat];
        let found = own.into_iter().find(|backend| backend.name() == name);
        found.ok_or_else(|| {
            let names = own.map(|backend| format!("`{}`", backend.name())).join(", ");
            if OTHERS.contains(&name) {
                format!("xpyd measures text generation only; use one of {names}")
            } else {
                format!("the backends are {names}")
            }
        })
    }
}

impl BackendName {
    /// Whether requests are chats.
    pub(crate) fn is_chat(self) -> bool {
        matches!(self, Self::OpenaiChat)
    }

    /// The name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::Vllm => "vllm",
            Self::OpenaiChat => "openai-chat",
        }
    }
}

/// How adapters are assigned to requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoraAssignment {
    /// At random, by the seed
    Random,
    /// In turn
    RoundRobin,
}

fn id_prefix(text: &str) -> Result<String, String> {
    let is_header = HeaderValue::try_from(text).is_ok_and(|value| value.to_str().is_ok());
    is_header
        .then(|| text.to_owned())
        .ok_or_else(|| "it has characters that are not allowed in an HTTP header".to_owned())
}

/// A header given on the command line. Its value is not printed.
#[derive(Debug, Clone)]
pub struct Header {
    /// Its name.
    pub name: HeaderName,
    /// Its value.
    pub value: HeaderValue,
}

impl FromStr for Header {
    type Err = String;

    /// Parses `NAME=VALUE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("a header must have the form `NAME=VALUE`")?;
        let name = HeaderName::try_from(name.trim()).map_err(|_| "the name is not a valid HTTP header name")?;
        if [CONTENT_LENGTH, TRANSFER_ENCODING].contains(&name) {
            return Err(format!("xpyd sets `{name}` itself"));
        }
        if name == "x-request-id" {
            return Err("every request has its own id; set its beginning with `--request-id-prefix`".to_owned());
        }
        let mut value = HeaderValue::try_from(value.trim())
            .map_err(|_| "the value has characters that are not allowed in a header")?;
        value.set_sensitive(true);
        Ok(Self { name, value })
    }
}
