//! The preflight: whether this machine can carry the plan. Pure: a plan and a machine give findings, each with a hint.

use serde::Serialize;

use crate::connector::Connector;
use crate::engine::EngineKind;
use crate::machine::{Engine, Gpus, Machine, TokenSource, Version};
use crate::plan::Plan;

/// One result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `gpu`, `vllm`, `hf_token`.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found, in one sentence.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Pass,
    /// The run may go on.
    Warn,
    /// The run cannot work.
    Fail,
}

/// Repositories whose files need a token and an accepted licence, by prefix.
const GATED: &[&str] = &["meta-llama/", "google/gemma", "mistralai/Mixtral-8x22B", "CohereForAI/"];

/// Checks everything; the order is the order of a start.
pub fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let mut findings = Vec::new();
    if plan.engine == EngineKind::Vllm {
        findings.extend(software(plan, machine));
        findings.extend(gpus(plan, machine));
        findings.extend(cpu(plan, machine));
        findings.extend(cache_memory(plan, machine));
        findings.extend(model(plan, machine));
    }
    findings
}

fn finding(check: &'static str, level: Level, message: String, hint: Option<&str>) -> Finding {
    Finding {
        check,
        level,
        message,
        hint: hint.map(str::to_owned),
    }
}

fn software(plan: &Plan, machine: &Machine) -> Vec<Finding> {
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

fn gpus(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let needed = plan.gpus_needed();
    if needed == 0 {
        return Vec::new();
    }
    let no_gpu = "try the simulated engines with `--engine sim`, or real vLLM without a GPU with `--profile cpu-1p1d`";
    let found = match &machine.gpus {
        Gpus::Found(found) => found,
        Gpus::Unavailable(reason) => {
            return vec![finding(
                "gpu",
                Level::Fail,
                format!("the plan needs {needed} GPUs: {reason}"),
                Some(no_gpu),
            )];
        }
        Gpus::NotAsked => return Vec::new(),
    };
    let missing: Vec<String> = plan
        .engines
        .iter()
        .flat_map(|engine| &engine.gpus)
        .filter(|index| !found.iter().any(|gpu| gpu.index == **index))
        .map(u32::to_string)
        .collect();
    if !missing.is_empty() {
        let message = format!(
            "the plan needs {needed} GPUs, and xpyd may use {} here (none with index {})",
            found.len(),
            missing.join(", ")
        );
        let hint = "choose a smaller profile (`xpyd profiles list`), `--set prefill.count=1`, or widen CUDA_VISIBLE_DEVICES; \
            without GPUs, try `--engine sim`";
        return vec![finding("gpu", Level::Fail, message, Some(hint))];
    }
    let names: Vec<&str> = found.iter().map(|gpu| gpu.name.as_str()).collect();
    vec![finding(
        "gpu",
        Level::Pass,
        format!("{needed} of {} GPUs ({})", found.len(), summary(&names)),
        None,
    )]
}

/// What an engine without a GPU takes besides its KV: vLLM 0.32 with a tiny model had 4 GB in three processes.
const CPU_ENGINE_BYTES: u64 = 4 << 30;

fn cpu(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    if plan.gpus_needed() > 0 {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let engines = plan.engines.len() as u64;
    if machine.available_memory_bytes < engines * CPU_ENGINE_BYTES {
        let message = format!(
            "{engines} engines on the CPU take about {} GiB, and {} GiB are available",
            (engines * CPU_ENGINE_BYTES) >> 30,
            machine.available_memory_bytes >> 30
        );
        findings.push(finding(
            "memory",
            Level::Warn,
            message,
            Some("choose a profile with fewer engines"),
        ));
    }
    // UCX's progress thread spins, one in every worker that has a NIXL agent.
    let workers: usize = plan
        .engines
        .iter()
        .map(|engine| usize::from(engine.endpoint.tensor_parallel))
        .sum();
    if machine.cores <= workers {
        let message = format!(
            "each of the {workers} workers keeps one core busy even when idle, and there are {} cores: expect slow starts",
            machine.cores
        );
        findings.push(finding("cores", Level::Warn, message, None));
    }
    findings
}

/// Whether the cache servers' memory is there.
fn cache_memory(plan: &Plan, machine: &Machine) -> Option<Finding> {
    let Connector::LmCacheMp(lmcache) = &plan.connector else {
        return None;
    };
    let needed = lmcache.l1_bytes.saturating_mul(plan.engines.len() as u64);
    let sizes = format!(
        "{} cache servers take {} MiB, and {} MiB are available",
        plan.engines.len(),
        needed >> 20,
        machine.available_memory_bytes >> 20
    );
    Some(if needed <= machine.available_memory_bytes {
        finding("cache_memory", Level::Pass, sizes, None)
    } else {
        let hint = "make them smaller, for example with `--set lmcache_mp.l1_size=2GiB`";
        finding("cache_memory", Level::Fail, sizes, Some(hint))
    })
}

/// `4 × NVIDIA H100` for equal names, else all of them.
fn summary(names: &[&str]) -> String {
    match names.first() {
        Some(first) if names.iter().all(|name| name == first) => format!("{} × {first}", names.len()),
        _ => names.join(", "),
    }
}

fn model(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let model = &plan.model;
    if machine.hugging_face.model_is_local {
        return vec![finding(
            "model",
            Level::Pass,
            format!("`{model}` is on this machine"),
            None,
        )];
    }
    if model.starts_with('/') || model.starts_with('.') {
        let message = format!("the model folder `{model}` has no config.json");
        return vec![finding(
            "model",
            Level::Fail,
            message,
            Some("check the path given as `model`"),
        )];
    }
    let gated = GATED.iter().any(|prefix| model.starts_with(prefix));
    let licence = format!(
        "accept the licence at https://huggingface.co/{model}, then `export HF_TOKEN=hf_…` (or `hf auth login`)"
    );
    match &machine.hugging_face.token {
        None if gated => {
            let message = format!("`{model}` is gated and not cached, and there is no Hugging Face token");
            vec![finding("hf_token", Level::Fail, message, Some(&licence))]
        }
        Some(token) if gated && !token.well_formed => {
            let place = match &token.source {
                TokenSource::Environment(name) => (*name).to_owned(),
                TokenSource::File(path) => path.display().to_string(),
            };
            let message = format!("the token in {place} does not have the form `hf_…`, and `{model}` is gated");
            vec![finding("hf_token", Level::Fail, message, Some(&licence))]
        }
        None | Some(_) => {
            let message = format!("`{model}` is not cached: the engines will download it first");
            vec![finding("model", Level::Warn, message, None)]
        }
    }
}

#[cfg(test)]
mod tests;
