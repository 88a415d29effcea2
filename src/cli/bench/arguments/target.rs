//! Flags of `xpyd bench`: which server is asked, and how.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use reqwest::header::{CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};

/// Flags that say which server is asked, and how.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Target")]
pub struct Target {
    /// The server, as `http://host:port` or `https://host` [default: the running fleet, else --host and --port].
    #[arg(long, value_name = "URL")]
    pub base_url: Option<String>,
    /// The server's host [default: 127.0.0.1].
    #[arg(long)]
    pub host: Option<String>,
    /// The server's port [default: 8000].
    #[arg(long)]
    pub port: Option<u16>,
    /// The kind of requests: `openai` and `vllm` are completions, `openai-chat` chats [default: openai].
    #[arg(long, value_name = "NAME", default_value = "openai", hide_default_value = true)]
    pub backend: BackendName,
    /// The path of the requests [default: by backend].
    #[arg(long, value_name = "PATH")]
    pub endpoint: Option<String>,
    /// The model [default: the first that the server lists].
    #[arg(long)]
    pub model: Option<String>,
    /// The model's name in requests [default: --model].
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Names of low-rank adapters (`LoRA`); each request asks for one of them in place of the model.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub lora_modules: Vec<String>,
    /// Which request asks for which adapter.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = LoraAssignment::Random)]
    pub lora_assignment: LoraAssignment,
    /// Headers of every request, `Host` too. `OPENAI_API_KEY` is sent as a bearer token, the user of a URL as basic
    /// authorization.
    #[arg(long, value_name = "NAME=VALUE", num_args = 0..)]
    pub header: Vec<Header>,
    /// What the requests' ids begin with [default: `bench-`, eight random digits, `-`].
    #[arg(long, value_name = "TEXT", value_parser = id_prefix)]
    pub request_id_prefix: Option<String>,
    /// Trusts any certificate of an `https` server, such as one that it made itself. `SSL_CERT_FILE` names whom to trust
    /// instead.
    #[arg(long)]
    pub insecure: bool,
}

/// The names of backends, as vLLM has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendName {
    /// `/v1/completions`
    Openai,
    /// The same
    Vllm,
    /// `/v1/chat/completions`
    OpenaiChat,
}

impl FromStr for BackendName {
    type Err = String;

    /// Reads vLLM's names. Those of what this benchmark does not measure are told from typing errors.
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
                format!("`vllm bench serve` has it, but xpyd measures generations only: {names}")
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

    /// As it is written.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::Vllm => "vllm",
            Self::OpenaiChat => "openai-chat",
        }
    }
}

/// Which request asks for which adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoraAssignment {
    /// Any one, by the seed
    Random,
    /// One after the other
    RoundRobin,
}

fn id_prefix(text: &str) -> Result<String, String> {
    let is_header = HeaderValue::try_from(text).is_ok_and(|value| value.to_str().is_ok());
    is_header
        .then(|| text.to_owned())
        .ok_or_else(|| "it holds what an HTTP header cannot".to_owned())
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

    /// Reads `NAME=VALUE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("a header is written `NAME=VALUE`")?;
        let name = HeaderName::try_from(name.trim()).map_err(|_| "the name is not one of an HTTP header")?;
        if [CONTENT_LENGTH, TRANSFER_ENCODING].contains(&name) {
            return Err(format!("`{name}` says how a body is sent, which is this client's own"));
        }
        if name == "x-request-id" {
            return Err("every request has an id of its own, which `--request-id-prefix` begins".to_owned());
        }
        let mut value = HeaderValue::try_from(value.trim()).map_err(|_| "the value holds what a header cannot")?;
        value.set_sensitive(true);
        Ok(Self { name, value })
    }
}
