//! Whether what the engines are made of is installed.

use super::{Finding, Level, finding};
use crate::connector::Connector;
use crate::machine::{Engine, Machine, Version};
use crate::plan::Plan;

pub(super) fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let Engine::Found {
        program,
        vllm,
        lmcache,
        nixl,
        ..
    } = &machine.engine
    else {
        let name = match &machine.engine {
            Engine::Missing(name) => name.as_str(),
            Engine::NotAsked | Engine::Found { .. } => "vllm",
        };
        let message = format!("the program `{name}` was not found");
        let hint = "`pip install vllm` and activate its environment, or name it with `--set vllm.program=/path/to/vllm`; \
            without vLLM, try `--engine sim`";
        return vec![finding("vllm", Level::Fail, message, Some(hint))];
    };
    let mut findings = vec![match vllm {
        Some(version) => finding(
            "vllm",
            Level::Pass,
            format!("vLLM {version} at {}", program.display()),
            None,
        ),
        None => finding(
            "vllm",
            Level::Warn,
            format!("the version of {} could not be read", program.display()),
            None,
        ),
    }];
    let nixl = ("nixl", nixl, "`pip install nixl` in the environment of vLLM");
    let lmcache = (
        "lmcache",
        lmcache,
        "`pip install lmcache nixl` in the environment of vLLM",
    );
    let needed = match plan.connector {
        Connector::Nixl(_) => vec![nixl],
        Connector::LmCache(_) => vec![lmcache],
        Connector::LmCacheMp(_) => vec![nixl, lmcache],
    };
    let packages = needed.into_iter();
    findings.extend(packages.map(|(name, version, install)| package(name, version.as_ref(), vllm.is_some(), install)));
    findings
}

/// Whether a package is there. Where no package's metadata could be read, nothing can be said about one.
fn package(name: &'static str, version: Option<&Version>, others_are_known: bool, install: &str) -> Finding {
    match version {
        Some(version) => finding(name, Level::Pass, format!("{name} {version}"), None),
        None if others_are_known => {
            let message = format!("{name} is not installed beside vLLM");
            finding(name, Level::Fail, message, Some(install))
        }
        None => {
            let message = format!("whether {name} is installed could not be read");
            finding(name, Level::Warn, message, None)
        }
    }
}
