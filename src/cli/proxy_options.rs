//! The flags of the proxy that `xpyd up` and `xpyd proxy` share, and the files that they name.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::proxy::{self, AccessLog, ClientKeys, Tls, Traces};
use crate::proxy_config::{self, Clients, Guard, ProxyConfig};
use crate::report::{ExitStatus, Failure};

/// The flags for clients' access, TLS, logs and traces.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct ProxyOptions {
    /// A file with one API key per line; clients must send one of them. `XPYD_API_KEY` adds one. If `VLLM_API_KEY` is set,
    /// the proxy sends that key to the engines.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// A file with a PEM certificate, followed by its chain; enables TLS.
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The file with the private key of `--tls-cert`.
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// A file for one JSON line per request, such as `/dev/stdout`.
    #[arg(long, value_name = "FILE")]
    pub access_log: Option<PathBuf>,
    /// URL of an OTLP collector for traces, over HTTP: `http://localhost:4318/v1/traces`.
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
    /// Origins whose web pages can use the API, in vLLM's syntax: `["*"]`, `["https://chat.example"]`.
    #[arg(long, value_name = "JSON", value_parser = list)]
    pub allowed_origins: Option<List>,
    /// Methods that these pages can use; default: all.
    #[arg(long, value_name = "JSON", value_parser = list)]
    pub allowed_methods: Option<List>,
    /// Headers that these pages can send; default: all.
    #[arg(long, value_name = "JSON", value_parser = list)]
    pub allowed_headers: Option<List>,
    /// Let these pages send cookies.
    #[arg(long)]
    pub allow_credentials: bool,
    /// Send a comment after this many seconds of silence in a stream, also while the request waits and prefills; 0: never.
    #[arg(long, value_name = "SECONDS")]
    pub sse_keep_alive_interval: Option<u32>,
}

/// A list of strings in JSON.
#[derive(Debug, Clone)]
pub(super) struct List(Vec<String>);

fn list(text: &str) -> Result<List, String> {
    serde_json::from_str(text)
        .map(List)
        .map_err(|_| r#"write a list in JSON, as for vLLM: '["*"]'"#.to_owned())
}

impl ProxyOptions {
    /// For each flag: its name, the key in the `[proxy]` table, and the value.
    pub(super) fn given(&self) -> [(&'static str, &'static str, Option<toml::Value>); 10] {
        let file = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string().into());
        let list = |list: &Option<List>| list.as_ref().map(|list| list.0.clone().into());
        let seconds = self.sse_keep_alive_interval.map(|seconds| format!("{seconds}s").into());
        [
            ("--api-key-file", "guard.api_key_file", file(&self.api_key_file)),
            ("--tls-cert", "clients.tls_cert", file(&self.tls_cert)),
            ("--tls-key", "clients.tls_key", file(&self.tls_key)),
            ("--access-log", "access_log.file", file(&self.access_log)),
            (
                "--otlp-traces-endpoint",
                "traces.otlp_endpoint",
                self.otlp_traces_endpoint.clone().map(Into::into),
            ),
            ("--allowed-origins", "cors.allowed_origins", list(&self.allowed_origins)),
            ("--allowed-methods", "cors.allowed_methods", list(&self.allowed_methods)),
            ("--allowed-headers", "cors.allowed_headers", list(&self.allowed_headers)),
            (
                "--allow-credentials",
                "cors.allow_credentials",
                self.allow_credentials.then(|| true.into()),
            ),
            ("--sse-keep-alive-interval", "streams.keep_alive", seconds),
        ]
    }

    /// Applies the flags to a configuration that comes from no profile.
    pub(super) fn apply(&self, config: &mut ProxyConfig) {
        let set = |option: &mut Option<PathBuf>, flag: &Option<PathBuf>| *option = flag.clone().or(option.take());
        set(&mut config.guard.api_key_file, &self.api_key_file);
        set(&mut config.clients.tls_cert, &self.tls_cert);
        set(&mut config.clients.tls_key, &self.tls_key);
        set(&mut config.access_log.file, &self.access_log);
        let endpoint = &mut config.traces.otlp_endpoint;
        *endpoint = self.otlp_traces_endpoint.clone().or(endpoint.take());
        let cors = &mut config.cors;
        for (option, flag) in [
            (&mut cors.allowed_origins, &self.allowed_origins),
            (&mut cors.allowed_methods, &self.allowed_methods),
            (&mut cors.allowed_headers, &self.allowed_headers),
        ] {
            if let Some(List(list)) = flag {
                option.clone_from(list);
            }
        }
        cors.allow_credentials |= self.allow_credentials;
        if let Some(seconds) = self.sse_keep_alive_interval {
            config.streams.keep_alive = Duration::from_secs(seconds.into());
        }
    }
}

/// Opens the files of a proxy and reads its secrets. The key of the engines is not among them.
pub(super) fn open_parts(config: &ProxyConfig) -> Result<proxy::Parts, Failure> {
    Ok(proxy::Parts {
        client_keys: client_keys(&config.guard)?,
        tls: tls(&config.clients)?,
        engine_key: None,
        access_log: access_log(&config.access_log)?,
        traces: traces(&config.traces)?,
    })
}

fn tls(clients: &Clients) -> Result<Option<Tls>, Failure> {
    let alone = |path: &PathBuf, given, missing| {
        let error = format!("`{given}` is `{}`, but `{missing}` is not set", path.display());
        Failure::message(ExitStatus::Usage, error).hint("TLS needs both `--tls-cert FILE` and `--tls-key FILE`")
    };
    match (&clients.tls_cert, &clients.tls_key) {
        (None, None) => Ok(None),
        (Some(cert), None) => Err(alone(cert, "tls_cert", "tls_key")),
        (None, Some(key)) => Err(alone(key, "tls_key", "tls_cert")),
        (Some(cert), Some(key)) => Tls::open(cert, key).map(Some).map_err(|error| {
            Failure::new(ExitStatus::Usage, error)
                .hint("use a PEM certificate followed by its chain, and its private key in PEM, not encrypted")
        }),
    }
}

fn access_log(options: &proxy_config::AccessLog) -> Result<Option<AccessLog>, Failure> {
    let open = |path: &PathBuf| {
        AccessLog::open(path, options.max_bytes).map_err(|error| {
            let context = format!("cannot write the access log `{}`", path.display());
            Failure::new(ExitStatus::Usage, anyhow::Error::new(error).context(context))
                .hint("name a file in a folder that exists, or `/dev/stdout`")
        })
    };
    options.file.as_ref().map(open).transpose()
}

fn traces(options: &proxy_config::Traces) -> Result<Option<Traces>, Failure> {
    let open = |endpoint: &String| {
        Traces::open(endpoint, options.percent).map_err(|error| {
            Failure::new(ExitStatus::Usage, error)
                .hint("write the whole URL of the collector's HTTP port: `http://localhost:4318/v1/traces`")
        })
    };
    options.otlp_endpoint.as_ref().map(open).transpose()
}

fn client_keys(guard: &Guard) -> Result<ClientKeys, Failure> {
    let usage = |error: anyhow::Error| {
        Failure::new(ExitStatus::Usage, error)
            .hint("write one key per line, in visible ASCII characters; `#` begins a comment")
    };
    let mut keys = ClientKeys::default();
    if let Some(path) = &guard.api_key_file {
        let text = fs_err::read_to_string(path).map_err(|error| usage(error.into()))?;
        keys = ClientKeys::read(&text)
            .map_err(|error| usage(anyhow::Error::new(error).context(format!("cannot use `{}`", path.display()))))?;
        if keys.is_empty() {
            return Err(usage(anyhow::Error::msg(format!(
                "`{}` has no API key",
                path.display()
            ))));
        }
    }
    let variable = std::env::var("XPYD_API_KEY").unwrap_or_default();
    let more = ClientKeys::read(&variable)
        .map_err(|error| usage(anyhow::Error::new(error).context("cannot use `XPYD_API_KEY`")))?;
    Ok(keys.and(more))
}
