//! Flags of `xpyd bench`: which server is asked, and how.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use reqwest::header::{HeaderName, HeaderValue};

/// Flags that say which server is asked, and how.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Target")]
pub struct Target {
    /// The server, as `http://host:port` [default: the running fleet, else --host and --port].
    #[arg(long, value_name = "URL", conflicts_with_all = ["host", "port"])]
    pub base_url: Option<String>,
    /// The server's host [default: 127.0.0.1].
    #[arg(long)]
    pub host: Option<String>,
    /// The server's port [default: 9100].
    #[arg(long)]
    pub port: Option<u16>,
    /// The kind of requests.
    #[arg(long, value_enum, default_value_t = BackendName::Openai)]
    pub backend: BackendName,
    /// The path of the requests [default: by backend].
    #[arg(long, value_name = "PATH")]
    pub endpoint: Option<String>,
    /// The model's name in requests [default: the first that the server lists].
    #[arg(long)]
    pub model: Option<String>,
    /// Headers of every request. `OPENAI_API_KEY` is sent as a bearer token.
    #[arg(long, value_name = "NAME=VALUE", num_args = 1..)]
    pub header: Vec<Header>,
}

/// The names of backends, as vLLM has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendName {
    /// `/v1/completions`, with prompts of token ids.
    #[value(alias = "vllm")]
    Openai,
    /// `/v1/chat/completions`, with prompts of words, about one token each.
    OpenaiChat,
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
        let mut value = HeaderValue::try_from(value.trim()).map_err(|_| "the value holds what a header cannot")?;
        value.set_sensitive(true);
        Ok(Self { name, value })
    }
}
