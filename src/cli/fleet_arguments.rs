//! The flags with which `up`, `plan` and `bench --profile` choose a fleet, and how they become a profile.

use std::path::{Path, PathBuf};

use clap::Args;

use super::allocation;
use super::other_runs::{self, OtherRuns};
use super::planning::{build, profile_failure};
use super::proxy_options::ProxyOptions;
use super::usage::Switch;
use crate::connector::{ConnectorChoice, Device};
use crate::engine::EngineKind;
use crate::machine::huggingface::is_repository;
use crate::machine::{self, Machine};
use crate::plan::{self, Plan};
use crate::profile::{self, Override, Profile, ProfileError};
use crate::report::{ExitStatus, Failure};
use crate::sim;
use crate::sockets::PortClaim;
use crate::ui::Printer;

/// The flags that choose a fleet.
#[derive(Debug, Clone, Args)]
pub(super) struct FleetArguments {
    /// The profile: `2p2d`, other numbers such as `3p1d`, another shipped profile (`xpyd profiles list`), or the path of a
    /// file
    #[arg(value_name = "PROFILE", conflicts_with = "profile")]
    pub fleet: Option<String>,
    /// The same as an option.
    #[arg(short, long, default_value = "2p2d", value_name = "NAME|FILE")]
    pub profile: String,
    /// Set one key of the profile; can be repeated, later ones win.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Model path or Hugging Face repository.
    #[arg(long)]
    pub model: Option<String>,
    /// The engine: real vLLM, or the built-in simulated engine.
    #[arg(long, value_enum)]
    pub engine: Option<EngineKind>,
    /// How KV moves from prefill to decode.
    #[arg(long, value_enum)]
    pub connector: Option<ConnectorChoice>,
    /// Address for clients; 0.0.0.0 is every address of this machine.
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<String>,
    /// Port for clients; `port_offset` does not change it.
    #[arg(long)]
    pub port: Option<u16>,
    /// Tensor-parallel GPUs of each engine.
    #[arg(long, visible_alias = "tp", value_name = "GPUS")]
    pub tensor_parallel_size: Option<u16>,
    /// Send the requests of one session to the same engines, as LMCache's example does.
    #[arg(long, env = "CLIENT_BOUND", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub client_bound: Option<Switch>,
    /// Name of the header with the session.
    #[arg(long, env = "CLIENT_BOUND_KEY", value_name = "HEADER")]
    pub client_bound_key: Option<String>,
    #[command(flatten)]
    pub proxy: ProxyOptions,
    /// Folder that holds one folder per run.
    #[arg(long, default_value = "logs", value_name = "DIR")]
    pub logs: PathBuf,
    /// More arguments for `vllm serve`, for all engines.
    #[arg(last = true, value_name = "VLLM ARGUMENTS")]
    pub vllm: Vec<String>,
}

/// Fails if the working folder has been removed: a run writes below it, and engines start in it.
pub(super) fn working_folder() -> Result<(), Failure> {
    std::env::current_dir().map(drop).map_err(|error| {
        let error = anyhow::Error::new(error).context("cannot use the working folder; it may have been deleted");
        Failure::new(ExitStatus::Failure, error).hint("`cd` to a folder that exists")
    })
}

impl FleetArguments {
    /// A profile without any changes.
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
            proxy: ProxyOptions::default(),
            logs: PathBuf::from("logs"),
            vllm: Vec::new(),
        }
    }

    /// An offset at which all ports of this fleet are free, with a claim on them.
    pub(super) fn free_offset(&self) -> Result<(u16, Option<PortClaim>), Failure> {
        let (_, machine) = self.survey()?;
        let plan = |offset| build(&self.at(offset).profile()?, &machine, &self.logs);
        let found = OtherRuns::find().free_offset(0, plan)?;
        Ok(found.map_or((0, None), |(offset, claim)| (offset, Some(claim))))
    }

    /// The same fleet with this port offset.
    fn at(&self, offset: u16) -> Self {
        let mut moved = self.clone();
        moved.set.push(format!("port_offset={offset}"));
        moved
    }

    /// Whether the user has chosen the ports.
    fn has_chosen_ports(&self) -> bool {
        let sets_offset = |text: &String| text.trim_start().starts_with("port_offset");
        self.port.is_some() || self.set.iter().any(sets_offset)
    }

    /// The fleet on free ports, if another run uses ports of its profile and the user has not chosen any. The claim on its
    /// ports must be held until they are open; without `is_starting` there is none.
    pub(super) fn beside_others(
        &self,
        name: &str,
        profile: Profile,
        draft: Plan,
        machine: &Machine,
        is_starting: bool,
        printer: Printer,
    ) -> Result<(Profile, Plan, Option<PortClaim>), Failure> {
        let own = is_starting.then(|| other_runs::claim(&draft)).flatten();
        let is_claimed = if is_starting {
            own.is_none()
        } else {
            other_runs::is_claimed(&draft)
        };
        if self.has_chosen_ports() {
            return Ok((profile, draft, own));
        }
        let other_runs = OtherRuns::find();
        let other = match other_runs.conflicting(&draft) {
            Some(other) if other.name != name => format!("run `{}`", other.name),
            None if is_claimed => "another run that starts now".to_owned(),
            // A run of the same name conflicts as a whole.
            _ => return Ok((profile, draft, own)),
        };
        drop(own);
        let plan = |offset| build(&self.at(offset).profile()?, machine, &draft.run_dir);
        let Some((offset, claim)) = other_runs.free_offset(profile.port_offset, plan)? else {
            return Ok((profile, draft, None));
        };
        printer.status(format!(
            "note: {other} uses ports of this profile, so all ports are moved by {}: the proxy is on port {}",
            offset - profile.port_offset,
            plan(offset)?.proxy.config.port
        ));
        let moved = self.at(offset).profile()?;
        Ok((moved, plan(offset)?, Some(claim)))
    }

    /// The profile with the flags of the command line.
    pub(super) fn profile(&self) -> Result<Profile, Failure> {
        let mut overrides = Vec::new();
        for text in &self.set {
            overrides.push(Override::parse(text).map_err(profile_failure)?);
        }
        let mut flag = |name: &str, key: &str, value: Option<toml::Value>| {
            overrides.extend(value.map(|value| Override::flag(name, key, value)));
        };
        flag("--model", "model", self.model.clone().map(Into::into));
        flag("--engine", "engine", self.engine.map(|engine| engine.name().into()));
        flag(
            "--connector",
            "connector",
            self.connector.map(|connector| connector.name().into()),
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
        for (name, key, value) in self.proxy.given() {
            flag(name, &format!("proxy.{key}"), value);
        }
        let name = self.fleet.as_ref().unwrap_or(&self.profile);
        let mut profile = profile::load_with(name, &overrides, &self.vllm).map_err(|error| {
            let is_unknown = matches!(error, ProfileError::Unknown { .. } | ProfileError::Read { .. });
            let failure = profile_failure(error);
            match &self.fleet {
                // Users of `vllm serve MODEL` type this.
                Some(model)
                    if is_unknown
                        && Path::new(model).extension().is_none_or(|kind| kind != "toml")
                        && is_repository(model) =>
                {
                    failure.hint(format!("to choose a model, use `--model {model}`"))
                }
                _ => failure,
            }
        })?;
        profile.proxy_port_is_exact = self.port.is_some();
        simulation(&profile)?;
        Ok(profile)
    }

    /// The profile, and the facts about this machine that it needs.
    pub(super) fn survey(&self) -> Result<(Profile, Machine), Failure> {
        working_folder()?;
        let profile = self.profile()?;
        let simulated = profile.engine == EngineKind::Sim;
        let machine = machine::survey(&machine::SurveyRequest {
            model: (!simulated).then_some(&profile.model),
            asks_for_account: false,
            revision: plan::revision(&profile),
            env: &plan::shared_env(&profile),
            program: (!simulated).then_some(profile.vllm.program.as_str()),
            gpus: !simulated && profile.device == Device::Cuda,
        });
        let machine = allocation::with_other_nodes(machine, &profile, &self.logs)?;
        Ok((profile, machine))
    }
}

/// Checks the keys that only simulated engines read, before any of them starts.
fn simulation(profile: &Profile) -> Result<(), Failure> {
    let usage =
        |error: anyhow::Error, key: &str| Failure::new(ExitStatus::Usage, error.context(format!("`{key}` is invalid")));
    let preset = &profile.sim.preset;
    if sim::Preset::named(preset).is_none() {
        let error = sim::OptionsError::Preset(preset.clone());
        return Err(usage(error.into(), "sim.preset").hint("docs/presets.md describes the presets"));
    }
    for fault in &profile.sim.faults {
        fault
            .parse::<sim::Fault>()
            .map_err(|error| usage(error.into(), "sim.faults"))?;
    }
    Ok(())
}
