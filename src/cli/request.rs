//! What `up`, `plan` and `demo` share: from the command line to a plan with its findings.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::checks;
use crate::engine::EngineKind;
use crate::machine::{self, Machine};
use crate::plan::{self, Plan, PlanError};
use crate::preflight::{Finding, Level};
use crate::profile::{self, DeviceChoice, Override, Profile, ProfileError};
use crate::proxy::{self, AccessLog, ClientKeys, Tls, Traces};
use crate::report::{ExitStatus, Failure};
use crate::service::{self, Clients, Guard, Service};
use crate::ui::Printer;

/// Which fleet.
#[derive(Debug, Clone, Args)]
pub(super) struct FleetArguments {
    /// A shipped profile (see `xpyd profiles list`) or the path of a file.
    #[arg(short, long, default_value = "2p2d", value_name = "NAME|FILE")]
    pub profile: String,
    /// Changes one key of the profile; may be repeated, later ones win.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Model path or Hugging Face repository.
    #[arg(long)]
    pub model: Option<String>,
    /// What serves the model: real vLLM, or the built-in simulated engine.
    #[arg(long, value_enum)]
    pub engine: Option<EngineFlag>,
    /// How KV moves from prefill to decode.
    #[arg(long, value_enum)]
    pub connector: Option<ConnectorFlag>,
    /// Port of the proxy.
    #[arg(long)]
    pub port: Option<u16>,
    /// Bind requests of one session to the same engines, as LMCache's example does.
    #[arg(long, env = "CLIENT_BOUND", num_args = 0..=1, default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new(), value_name = "BOOL")]
    pub client_bound: Option<bool>,
    /// Header that names the session.
    #[arg(long, env = "CLIENT_BOUND_KEY", value_name = "HEADER")]
    pub client_bound_key: Option<String>,
    #[command(flatten)]
    pub service: ServiceArguments,
    /// Folder that holds one folder per run.
    #[arg(long, default_value = "logs", value_name = "DIR")]
    pub logs: PathBuf,
}

/// How clients are served, by flags that `xpyd proxy` has as well.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct ServiceArguments {
    /// A file with one API key a line, of which clients must bear one. `XPYD_API_KEY` is one more. Where
    /// `VLLM_API_KEY` is set, engines are sent that key.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// A file with a certificate in PEM, and with those that vouch for it after it: TLS is spoken instead of plain HTTP.
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The file with the private key of `--tls-cert`.
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// A file for one JSON line per request, such as `/dev/stdout`.
    #[arg(long, value_name = "FILE")]
    pub access_log: Option<PathBuf>,
    /// A collector of traces, by OTLP over HTTP: `http://localhost:4318/v1/traces`.
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
}

impl ServiceArguments {
    /// Flag, key below a profile's `[proxy]`, and value.
    fn given(&self) -> [(&'static str, &'static str, Option<String>); 5] {
        let file = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        [
            ("--api-key-file", "guard.api_key_file", file(&self.api_key_file)),
            ("--tls-cert", "clients.tls_cert", file(&self.tls_cert)),
            ("--tls-key", "clients.tls_key", file(&self.tls_key)),
            ("--access-log", "access_log.file", file(&self.access_log)),
            (
                "--otlp-traces-endpoint",
                "traces.otlp_endpoint",
                self.otlp_traces_endpoint.clone(),
            ),
        ]
    }

    /// Says the same of a service that comes from no profile.
    pub(super) fn change(&self, service: &mut Service) {
        let set = |option: &mut Option<PathBuf>, flag: &Option<PathBuf>| *option = flag.clone().or(option.take());
        set(&mut service.guard.api_key_file, &self.api_key_file);
        set(&mut service.clients.tls_cert, &self.tls_cert);
        set(&mut service.clients.tls_key, &self.tls_key);
        set(&mut service.access_log.file, &self.access_log);
        let endpoint = &mut service.traces.otlp_endpoint;
        *endpoint = self.otlp_traces_endpoint.clone().or(endpoint.take());
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum EngineFlag {
    Vllm,
    Sim,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ConnectorFlag {
    Auto,
    Nixl,
    #[value(name = "lmcache")]
    LmCache,
}

/// Offsets that are tried for a fleet beside others.
const OFFSETS: [u16; 4] = [0, 20, 40, 60];

/// The first offset at which every port of the fleet is free. Where none is, the last one, and whoever starts says so.
pub(super) fn free_offset(plan: impl Fn(u16) -> Result<Plan, Failure>) -> Result<u16, Failure> {
    for offset in OFFSETS {
        let is_free = |(port, _): &(u16, _)| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
        if plan(offset)?.ports().iter().all(is_free) {
            return Ok(offset);
        }
    }
    Ok(OFFSETS[OFFSETS.len() - 1])
}

impl FleetArguments {
    /// A profile as it is.
    pub(super) fn of_profile(profile: &str) -> Self {
        Self {
            profile: profile.to_owned(),
            set: Vec::new(),
            model: None,
            engine: None,
            connector: None,
            port: None,
            client_bound: None,
            client_bound_key: None,
            service: ServiceArguments::default(),
            logs: PathBuf::from("logs"),
        }
    }

    /// An offset at which this fleet's ports are free.
    pub(super) fn free_offset(&self) -> Result<u16, Failure> {
        let (_, machine) = self.survey()?;
        free_offset(|offset| {
            let mut moved = self.clone();
            moved.set.push(format!("port_offset={offset}"));
            build(&moved.profile()?, &machine, &self.logs)
        })
    }

    /// The profile with everything the command line says on top.
    pub(super) fn profile(&self) -> Result<Profile, Failure> {
        let mut overrides = Vec::new();
        for text in &self.set {
            overrides.push(Override::parse(text).map_err(profile_failure)?);
        }
        let mut flag = |name: &str, key: &str, value: Option<toml::Value>| {
            overrides.extend(value.map(|value| Override::flag(name, key, value)));
        };
        flag("--model", "model", self.model.clone().map(Into::into));
        flag("--engine", "engine", self.engine.and_then(value_name).map(Into::into));
        flag(
            "--connector",
            "connector",
            self.connector.and_then(value_name).map(Into::into),
        );
        flag("--port", "proxy.port", self.port.map(|port| i64::from(port).into()));
        flag(
            "--client-bound",
            "proxy.bind_sessions",
            self.client_bound.map(Into::into),
        );
        flag(
            "--client-bound-key",
            "proxy.session_header",
            self.client_bound_key.clone().map(Into::into),
        );
        for (name, key, value) in self.service.given() {
            flag(name, &format!("proxy.{key}"), value.map(Into::into));
        }
        profile::load(&self.profile, &overrides).map_err(profile_failure)
    }

    /// The profile and the facts about this machine that matter to it.
    pub(super) fn survey(&self) -> Result<(Profile, Machine), Failure> {
        let profile = self.profile()?;
        let simulated = profile.engine == EngineKind::Sim;
        let machine = machine::survey(&machine::Wanted {
            model: (!simulated).then_some(&profile.model),
            asks_for_account: false,
            revision: plan::revision(&profile),
            env: &profile.vllm.env,
            program: (!simulated).then_some(profile.vllm.program.as_str()),
            gpus: !simulated && profile.device == DeviceChoice::Cuda,
        });
        Ok((profile, machine))
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "passed to `and_then`; the values are `Copy`"
)]
pub(super) fn value_name(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

pub(super) fn profile_failure(error: ProfileError) -> Failure {
    let hint = error.hint();
    let failure = Failure::new(ExitStatus::Usage, error);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// What a proxy that serves so needs, but for the key of its engines.
pub(super) fn proxy_parts(service: &Service) -> Result<proxy::Parts, Failure> {
    Ok(proxy::Parts {
        client_keys: client_keys(&service.guard)?,
        tls: tls(&service.clients)?,
        engine_key: None,
        access_log: access_log(&service.access_log)?,
        traces: traces(&service.traces)?,
    })
}

fn tls(clients: &Clients) -> Result<Option<Tls>, Failure> {
    let alone = |path: &PathBuf, given, missing| {
        let error = format!("`{given}` is `{}`, and there is no `{missing}`", path.display());
        Failure::message(ExitStatus::Usage, error).hint("TLS needs both `--tls-cert FILE` and `--tls-key FILE`")
    };
    match (&clients.tls_cert, &clients.tls_key) {
        (None, None) => Ok(None),
        (Some(cert), None) => Err(alone(cert, "tls_cert", "tls_key")),
        (None, Some(key)) => Err(alone(key, "tls_key", "tls_cert")),
        (Some(cert), Some(key)) => Tls::open(cert, key).map(Some).map_err(|error| {
            Failure::new(ExitStatus::Usage, error).hint(
                "name a certificate in PEM, with those that vouch for it after it, and its private key in PEM, not encrypted",
            )
        }),
    }
}

fn access_log(options: &service::AccessLog) -> Result<Option<AccessLog>, Failure> {
    let open = |path: &PathBuf| {
        AccessLog::open(path, options.max_bytes).map_err(|error| {
            let context = format!("cannot write the access log `{}`", path.display());
            Failure::new(ExitStatus::Usage, anyhow::Error::new(error).context(context))
                .hint("name a file in a folder that exists, or `/dev/stdout`")
        })
    };
    options.file.as_ref().map(open).transpose()
}

fn traces(options: &service::Traces) -> Result<Option<Traces>, Failure> {
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
        Failure::new(ExitStatus::Usage, error).hint("one key a line, of visible ASCII characters; `#` begins a comment")
    };
    let mut keys = ClientKeys::default();
    if let Some(path) = &guard.api_key_file {
        let text = fs_err::read_to_string(path).map_err(|error| usage(error.into()))?;
        keys = ClientKeys::read(&text)
            .map_err(|error| usage(anyhow::Error::new(error).context(format!("cannot use `{}`", path.display()))))?;
        if keys.is_empty() {
            return Err(usage(anyhow::Error::msg(format!(
                "`{}` holds no API key",
                path.display()
            ))));
        }
    }
    let variable = std::env::var("XPYD_API_KEY").unwrap_or_default();
    let more = ClientKeys::read(&variable)
        .map_err(|error| usage(anyhow::Error::new(error).context("cannot use `XPYD_API_KEY`")))?;
    Ok(keys.and(more))
}

/// Builds the plan of a run in `run_dir`.
pub(super) fn build(profile: &Profile, machine: &Machine, run_dir: &Path) -> Result<Plan, Failure> {
    plan::build(profile, machine, run_dir).map_err(|error| {
        let status = match &error {
            PlanError::UnsafeConnector(_) | PlanError::NoGpuLeft { .. } => ExitStatus::Preflight,
            PlanError::PortTooHigh { .. } | PlanError::PortTwice { .. } | PlanError::UnequalRanks { .. } => {
                ExitStatus::Usage
            }
        };
        let hint = error.hint();
        Failure::new(status, error).hint(hint)
    })
}

/// Checks the plan against the machine, prints what is not as it should be, and fails if the run cannot work.
pub(super) fn preflight(plan: &Plan, machine: &Machine, printer: Printer) -> Result<(), Failure> {
    let findings = checks::of_plan(plan, machine);
    let failures = findings.iter().filter(|finding| finding.level == Level::Fail).count();
    for finding in &findings {
        match finding.level {
            Level::Pass => {}
            Level::Warn => printer.status(line(finding)),
            Level::Fail => printer.error(line(finding)),
        }
    }
    if failures == 0 {
        return Ok(());
    }
    let noun = if failures == 1 { "problem" } else { "problems" };
    Err(Failure::message(
        ExitStatus::Preflight,
        format!(
            "this machine cannot run profile `{}`: {failures} {noun} above",
            plan.profile
        ),
    ))
}

/// A finding in one or two lines.
pub(super) fn line(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Pass => "pass",
        Level::Warn => "warn",
        Level::Fail => "fail",
    };
    let hint = finding
        .hint
        .as_ref()
        .map(|hint| format!("\n      hint: {hint}"))
        .unwrap_or_default();
    format!("{level}  {}: {}{hint}", finding.check, finding.message)
}
