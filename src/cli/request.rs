//! What `up`, `plan` and `demo` share: from the command line to a plan with its findings.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::checks;
use super::neighbours::Neighbours;
use super::usage::Switch;
use crate::engine::EngineKind;
use crate::machine::huggingface::is_repository;
use crate::machine::{self, Machine};
use crate::plan::{self, Plan, PlanError};
use crate::preflight::{Finding, Level};
use crate::profile::{self, DeviceChoice, Override, Profile, ProfileError};
use crate::proxy::{self, AccessLog, ClientKeys, Tls, Traces};
use crate::report::{ExitStatus, Failure};
use crate::service::{self, Clients, Guard, Service};
use crate::sim;
use crate::ui::Printer;

/// Which fleet.
#[derive(Debug, Clone, Args)]
pub(super) struct FleetArguments {
    /// The profile: `2p2d`, any other numbers such as `3p1d`, another shipped one (`xpyd profiles list`), or the path of a file
    #[arg(value_name = "PROFILE", conflicts_with = "profile")]
    pub fleet: Option<String>,
    /// The same as an option.
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
    /// Address on which clients are served; 0.0.0.0 is everywhere.
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<String>,
    /// Port on which clients are served; `port_offset` does not move it.
    #[arg(long)]
    pub port: Option<u16>,
    /// GPUs of each engine, over which it is spread.
    #[arg(long, visible_alias = "tp", value_name = "GPUS")]
    pub tensor_parallel_size: Option<u16>,
    /// Bind requests of one session to the same engines, as LMCache's example does.
    #[arg(long, env = "CLIENT_BOUND", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub client_bound: Option<Switch>,
    /// Header that names the session.
    #[arg(long, env = "CLIENT_BOUND_KEY", value_name = "HEADER")]
    pub client_bound_key: Option<String>,
    #[command(flatten)]
    pub service: ServiceArguments,
    /// Folder that holds one folder per run.
    #[arg(long, default_value = "logs", value_name = "DIR")]
    pub logs: PathBuf,
    /// More arguments for `vllm serve`, of all engines.
    #[arg(last = true, value_name = "VLLM ARGUMENTS")]
    pub vllm: Vec<String>,
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
    /// Origins whose web pages may ask, as vLLM takes them: `["*"]`, `["https://chat.example"]`.
    #[arg(long, value_name = "JSON", value_parser = list)]
    pub allowed_origins: Option<List>,
    /// Methods that such pages may use; all by default.
    #[arg(long, value_name = "JSON", value_parser = list)]
    pub allowed_methods: Option<List>,
    /// Headers that such pages may send; all by default.
    #[arg(long, value_name = "JSON", value_parser = list)]
    pub allowed_headers: Option<List>,
    /// Whether such pages may send cookies.
    #[arg(long)]
    pub allow_credentials: bool,
    /// Seconds of silence after which a streamed generation gets a comment, also while it waits and prefills; 0: never.
    #[arg(long, value_name = "SECONDS")]
    pub sse_keep_alive_interval: Option<u32>,
}

/// A list of texts.
#[derive(Debug, Clone)]
pub(super) struct List(Vec<String>);

fn list(text: &str) -> Result<List, String> {
    serde_json::from_str(text)
        .map(List)
        .map_err(|_| r#"write a list in JSON, as for vLLM: '["*"]'"#.to_owned())
}

impl ServiceArguments {
    /// Flag, key below a profile's `[proxy]`, and value.
    fn given(&self) -> [(&'static str, &'static str, Option<toml::Value>); 10] {
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

    /// Says the same of a service that comes from no profile.
    pub(super) fn change(&self, service: &mut Service) {
        let set = |option: &mut Option<PathBuf>, flag: &Option<PathBuf>| *option = flag.clone().or(option.take());
        set(&mut service.guard.api_key_file, &self.api_key_file);
        set(&mut service.clients.tls_cert, &self.tls_cert);
        set(&mut service.clients.tls_key, &self.tls_key);
        set(&mut service.access_log.file, &self.access_log);
        let endpoint = &mut service.traces.otlp_endpoint;
        *endpoint = self.otlp_traces_endpoint.clone().or(endpoint.take());
        let cors = &mut service.cors;
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
            service.streams.keep_alive = Duration::from_secs(seconds.into());
        }
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
    #[value(name = "lmcache-mp")]
    LmCacheMp,
}

/// Fails where the working folder has been removed: a run writes below it, and engines start in it.
pub(super) fn working_folder() -> Result<(), Failure> {
    std::env::current_dir().map(drop).map_err(|error| {
        let error = anyhow::Error::new(error).context("cannot use the working folder; it may have been deleted");
        Failure::new(ExitStatus::Failure, error).hint("`cd` to a folder that exists")
    })
}

impl FleetArguments {
    /// A profile as it is.
    pub(super) fn of_profile(profile: &str) -> Self {
        Self {
            fleet: None,
            profile: profile.to_owned(),
            set: Vec::new(),
            model: None,
            engine: None,
            connector: None,
            host: None,
            port: None,
            tensor_parallel_size: None,
            client_bound: None,
            client_bound_key: None,
            service: ServiceArguments::default(),
            logs: PathBuf::from("logs"),
            vllm: Vec::new(),
        }
    }

    /// An offset at which this fleet's ports are free.
    pub(super) fn free_offset(&self) -> Result<u16, Failure> {
        let (_, machine) = self.survey()?;
        let plan = |offset| build(&self.at(offset).profile()?, &machine, &self.logs);
        Ok(Neighbours::look().free_offset(0, plan)?.unwrap_or_default())
    }

    /// The same fleet with all its ports moved.
    fn at(&self, offset: u16) -> Self {
        let mut moved = self.clone();
        moved.set.push(format!("port_offset={offset}"));
        moved
    }

    /// Whether the user has said which ports there are to be.
    fn has_chosen_ports(&self) -> bool {
        let sets_offset = |text: &String| text.trim_start().starts_with("port_offset");
        self.port.is_some() || self.set.iter().any(sets_offset)
    }

    /// The fleet on free ports, where another run has those of its profile and the user has not chosen any.
    pub(super) fn beside_others(
        &self,
        name: &str,
        profile: Profile,
        draft: Plan,
        machine: &Machine,
        printer: Printer,
    ) -> Result<(Profile, Plan), Failure> {
        if self.has_chosen_ports() {
            return Ok((profile, draft));
        }
        let neighbours = Neighbours::look();
        // A run of the same name is in the way as a whole.
        let Some(other) = neighbours.in_the_way(&draft).filter(|other| other.name != name) else {
            return Ok((profile, draft));
        };
        let plan = |offset| build(&self.at(offset).profile()?, machine, &draft.run_dir);
        let Some(offset) = neighbours.free_offset(profile.port_offset, plan)? else {
            return Ok((profile, draft));
        };
        printer.status(format!(
            "note: run `{}` has ports of this profile, so all of them are moved by {}: the proxy is on {}",
            other.name,
            offset - profile.port_offset,
            plan(offset)?.proxy.port
        ));
        let moved = self.at(offset).profile()?;
        Ok((moved, plan(offset)?))
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
        flag("--host", "proxy.host", self.host.clone().map(Into::into));
        for role in ["prefill", "decode"] {
            let ranks = self.tensor_parallel_size.map(|ranks| i64::from(ranks).into());
            flag("--tensor-parallel-size", &format!("{role}.tensor_parallel"), ranks);
        }
        flag("--port", "proxy.port", self.port.map(|port| i64::from(port).into()));
        flag(
            "--client-bound",
            "proxy.bind_sessions",
            self.client_bound.and_then(|Switch(given)| given).map(Into::into),
        );
        flag(
            "--client-bound-key",
            "proxy.session_header",
            self.client_bound_key.clone().map(Into::into),
        );
        for (name, key, value) in self.service.given() {
            flag(name, &format!("proxy.{key}"), value);
        }
        let name = self.fleet.as_ref().unwrap_or(&self.profile);
        let mut profile = profile::load_with(name, &overrides, &self.vllm).map_err(|error| {
            let is_unknown = matches!(error, ProfileError::Unknown { .. } | ProfileError::Read { .. });
            let failure = profile_failure(error);
            match &self.fleet {
                // What a newcomer from `vllm serve MODEL` types.
                Some(model)
                    if is_unknown
                        && Path::new(model).extension().is_none_or(|kind| kind != "toml")
                        && is_repository(model) =>
                {
                    failure.hint(format!("a model is given by `--model {model}`"))
                }
                _ => failure,
            }
        })?;
        profile.proxy.port_is_exact = self.port.is_some();
        simulation(&profile)?;
        Ok(profile)
    }

    /// The profile and the facts about this machine that matter to it.
    pub(super) fn survey(&self) -> Result<(Profile, Machine), Failure> {
        working_folder()?;
        let profile = self.profile()?;
        let simulated = profile.engine == EngineKind::Sim;
        let machine = machine::survey(&machine::Wanted {
            model: (!simulated).then_some(&profile.model),
            asks_for_account: false,
            revision: plan::revision(&profile),
            env: &plan::shared_env(&profile),
            program: (!simulated).then_some(profile.vllm.program.as_str()),
            gpus: !simulated && profile.device == DeviceChoice::Cuda,
        });
        Ok((profile, machine))
    }
}

/// Checks what only simulated engines read, before any of them starts.
fn simulation(profile: &Profile) -> Result<(), Failure> {
    let usage =
        |error: anyhow::Error, key: &str| Failure::new(ExitStatus::Usage, error.context(format!("`{key}` is wrong")));
    let preset = &profile.sim.preset;
    if sim::Preset::named(preset).is_none() {
        let error = sim::OptionsError::Preset(preset.clone());
        return Err(usage(error.into(), "sim.preset").hint("docs/presets.md tells what each preset stands for"));
    }
    for fault in &profile.sim.faults {
        fault
            .parse::<sim::Fault>()
            .map_err(|error| usage(error.into(), "sim.faults"))?;
    }
    Ok(())
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
