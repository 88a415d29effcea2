//! Checks that the packages of the engines are installed, compatible, and support the options of the plan.

use super::{Finding, Level, compatibility, finding, options};
use crate::connector::Connector;
use crate::machine::{Installation, Machine, PythonEnvironment, Version};
use crate::plan::Plan;

const INSTALL_NIXL: &str = "`pip install nixl` in the environment of vLLM";
const INSTALL_LMCACHE: &str = "`pip install -U nixl \"lmcache>=0.5.6\"` in the environment of vLLM";
const INSTALL_VLLM: &str = "`pip install vllm nixl` and activate its environment, or set its path with `--set \
    vllm.program=/path/to/vllm`; without vLLM, try `--engine sim`";

pub(super) fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let Installation::Found {
        vllm,
        lmcache,
        nixl,
        environment,
        ..
    } = &machine.engine
    else {
        return vec![missing(&machine.engine, Level::Fail)];
    };
    let mut findings = found(machine);
    let nixl = ("nixl", nixl, INSTALL_NIXL);
    let lmcache = ("lmcache", lmcache, INSTALL_LMCACHE);
    let needed = match plan.connector {
        Connector::Nixl(_) => vec![nixl],
        Connector::LmCache(_) => vec![lmcache],
        Connector::LmCacheMp(_) => vec![nixl, lmcache],
    };
    let packages = needed.into_iter();
    findings.extend(packages.map(|(name, version, install)| package(name, version.as_ref(), vllm.is_some(), install)));
    findings.extend(cache_program(plan, environment, vllm.is_some()));
    findings.extend(compatibility::check(Some(plan), &machine.engine));
    findings.extend(options::unknown(plan, environment, vllm.as_ref()));
    findings.extend(options::unregistered(plan, environment, vllm.as_ref()));
    findings.extend(options::different(plan));
    findings.extend(options::hash_seed(plan));
    findings
}

/// The installed software, without a plan.
pub(super) fn overview(machine: &Machine) -> Vec<Finding> {
    let Installation::Found { lmcache, nixl, .. } = &machine.engine else {
        return vec![missing(&machine.engine, Level::Warn)];
    };
    let mut findings = found(machine);
    let optional = [("nixl", nixl, INSTALL_NIXL), ("lmcache", lmcache, INSTALL_LMCACHE)];
    findings.extend(optional.into_iter().map(|(name, version, install)| match version {
        Some(version) => finding(name, Level::Pass, format!("{name} {version}"), None),
        None if name == "nixl" => {
            let message = "NIXL is not installed; KV transfers need NIXL or LMCache".to_owned();
            finding(name, Level::Warn, message, Some(install))
        }
        None => finding(
            name,
            Level::Pass,
            "LMCache is not installed; NIXL does not need it".to_owned(),
            None,
        ),
    }));
    findings.extend(compatibility::check(None, &machine.engine));
    findings
}

fn missing(engine: &Installation, level: Level) -> Finding {
    let name = match engine {
        Installation::Missing(name) => name.as_str(),
        Installation::NotAsked | Installation::Found { .. } => "vllm",
    };
    let place = if name.contains('/') { "" } else { " on PATH" };
    let message = format!("the program `{name}` was not found{place}");
    finding("vllm", level, message, Some(INSTALL_VLLM))
}

/// vLLM and the Python that runs it.
fn found(machine: &Machine) -> Vec<Finding> {
    let Installation::Found {
        program,
        vllm,
        environment,
        ..
    } = &machine.engine
    else {
        return Vec::new();
    };
    let vllm = if let Some(version) = vllm {
        let message = format!("vLLM {version} at {}", program.display());
        finding("vllm", Level::Pass, message, None)
    } else {
        let message = format!("the version of {} cannot be read", program.display());
        let hint = "perhaps it is a script of another environment: `head -1` shows its Python, and `python -m pip \
            show vllm` there its version";
        finding("vllm", Level::Warn, message, Some(hint))
    };
    vec![vllm].into_iter().chain(python(environment)).collect()
}

fn python(environment: &PythonEnvironment) -> Option<Finding> {
    let version = environment.python_version.as_ref()?;
    let torch = environment.packages.get("torch").map(|torch| {
        let cuda = environment.cuda.as_ref().map(|cuda| format!(" for CUDA {cuda}"));
        // A version such as `2.13.0+cu130` has it already.
        let cuda = cuda.filter(|_| !torch.contains('+')).unwrap_or_default();
        format!(", torch {torch}{cuda}")
    });
    let message = format!("Python {version}{}", torch.unwrap_or_default());
    Some(finding("python", Level::Pass, message, None))
}

/// Whether a package is installed. If no package's metadata could be read, there is no finding.
fn package(name: &'static str, version: Option<&Version>, others_are_known: bool, install: &str) -> Finding {
    match version {
        Some(version) => finding(name, Level::Pass, format!("{name} {version}"), None),
        None if others_are_known => {
            let message = format!("{name} is not installed in vLLM's environment");
            finding(name, Level::Fail, message, Some(install))
        }
        None => {
            let message = format!("cannot check whether {name} is installed");
            finding(name, Level::Warn, message, None)
        }
    }
}

/// Whether the program of the cache servers is installed.
fn cache_program(plan: &Plan, environment: &PythonEnvironment, is_known: bool) -> Option<Finding> {
    let is_needed = matches!(plan.connector, Connector::LmCacheMp(_)) && is_known;
    (is_needed && !environment.has_lmcache_program).then(|| {
        let message =
            "the program `lmcache` is not in the folder of `vllm`, but every engine needs a cache server".to_owned();
        finding("lmcache_program", Level::Fail, message, Some(INSTALL_LMCACHE))
    })
}
