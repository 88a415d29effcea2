//! Describes what was measured, for the result file and the HTML report: command, host, server and fleet.

use std::path::Path;

use serde_json::{Value, json};

use crate::bench::{self, Spec};
use crate::cli::plan::shell_word;
use crate::cli::run_plan::RunPlan;
use crate::control::rundir::{self, FoundRun, RunInfo};
use crate::machine::{self, Host, Installation, Machine, SurveyRequest};
use crate::plan;

/// The flag with secret values: `NAME=VALUE`.
const HEADERS: &str = "--header";

/// The command, this host, the server, and the fleet if it belongs to this user.
pub(super) async fn of(spec: &Spec) -> Value {
    let version = bench::version(spec).await;
    let run = run_at(&spec.base_url);
    let fleet = run.and_then(|run| fleet(&run));
    let is_simulated = version.as_ref().is_some_and(|version| version["simulated"] == true)
        || fleet.as_ref().is_some_and(|fleet| fleet["engine"] == "sim");
    json!({
        "command": command(std::env::args()),
        "host": Host::here(),
        "xpyd": env!("CARGO_PKG_VERSION"),
        "server": {
            "url": spec.base_url,
            "version": version.as_ref().and_then(|version| version["version"].as_str()),
            "simulated": is_simulated,
        },
        "fleet": fleet,
    })
}

/// The run of this user that serves at a URL.
fn run_at(base_url: &str) -> Option<RunInfo> {
    let place = place(base_url)?;
    let mut runs = rundir::visible().into_iter().filter_map(|seen| match seen {
        FoundRun::Up(run) => Some(*run),
        _ => None,
    });
    runs.find(|run| self::place(&run.proxy_url).as_ref() == Some(&place))
}

/// Scheme and port of a URL of this machine; all loopback names are equal.
fn place(url: &str) -> Option<(String, u16)> {
    let url = reqwest::Url::parse(url).ok()?;
    let is_here = matches!(url.host_str()?, "127.0.0.1" | "localhost" | "[::1]" | "0.0.0.0");
    let port = url.port_or_known_default()?;
    is_here.then(|| (url.scheme().to_owned(), port))
}

/// The fleet of a run, from its plan, and the installed versions.
fn fleet(run: &RunInfo) -> Option<Value> {
    let plan = RunPlan::read(&run.logs_dir)?;
    let (engines, program) = (plan.engines(), plan.vllm());
    let count = |role: &str| engines.iter().filter(|engine| engine["role"] == role).count();
    let machine = program.map(|program| {
        machine::survey(&SurveyRequest {
            program: Some(program),
            gpus: true,
            ..SurveyRequest::nothing()
        })
    });
    let plan = plan.value();
    Some(json!({
        "run": run.name,
        "profile": plan["profile"],
        "engine": plan["engine"],
        "connector": plan["connector"]["name"],
        "prefill_engines": count("prefill"),
        "decode_engines": count("decode"),
        "gpus": machine.as_ref().map(|machine| gpus(machine, engines)),
        "versions": machine.as_ref().map(versions),
    }))
}

/// The GPUs of the engines: `4 x NVIDIA H200`.
fn gpus(machine: &Machine, engines: &[Value]) -> Vec<String> {
    let indices = engines
        .iter()
        .flat_map(|engine| engine["gpus"].as_array().into_iter().flatten());
    let mut counts: Vec<(String, usize)> = Vec::new();
    for index in indices
        .filter_map(Value::as_u64)
        .filter_map(|index| u32::try_from(index).ok())
    {
        let name = machine
            .gpus
            .get(index)
            .map_or_else(|| "unknown".to_owned(), |gpu| gpu.name.clone());
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
    }
    counts
        .into_iter()
        .map(|(name, count)| format!("{count} x {name}"))
        .collect()
}

fn versions(machine: &Machine) -> Vec<String> {
    let mut known = Vec::new();
    if let Installation::Found {
        vllm,
        lmcache,
        nixl,
        environment,
        ..
    } = &machine.engine
    {
        let own = [("vllm", vllm), ("nixl", nixl), ("lmcache", lmcache)];
        known.extend(
            own.iter()
                .filter_map(|(name, version)| Some(format!("{name} {}", version.as_ref()?.text))),
        );
        let torch = environment.packages.get("torch");
        known.extend(torch.map(|version| format!("torch {version}")));
    }
    known.extend(machine.driver.versions());
    known
}

/// The command line without secrets.
fn command(words: impl Iterator<Item = String>) -> String {
    let mut is_header = false;
    let words = words.enumerate().map(|(place, word)| {
        if place == 0 {
            return program_name(&word);
        }
        if !word.starts_with("--") {
            return if is_header {
                without_value(&word)
            } else {
                without_user(&word)
            };
        }
        let (flag, value) = word.split_once('=').unwrap_or((&word, ""));
        is_header = flag == HEADERS;
        match value {
            "" => word,
            value if is_header => format!("{flag}={}", without_value(value)),
            value => format!("{flag}={}", without_user(value)),
        }
    });
    let words = plan::redacted_argv(&words.collect::<Vec<_>>());
    let line: Vec<String> = words.iter().map(|word| shell_word(word)).collect();
    plan::without_secrets(&line.join(" ")).into_owned()
}

fn program_name(path: &str) -> String {
    Path::new(path)
        .file_name()
        .map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
}

fn without_value(header: &str) -> String {
    header
        .split_once('=')
        .map_or_else(|| header.to_owned(), |(name, _)| format!("{name}=<redacted>"))
}

fn without_user(word: &str) -> String {
    bench::credentials(word).map_or_else(|| word.to_owned(), |(url, _)| url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_has_no_secrets() {
        let line = "/usr/bin/xpyd bench --base-url http://u:p@h:1 --header Authorization=Bearer-x X-Key=2 --model m \
                    --header=A=b --goodput ttft:500 -- --api-key s3cr3t";
        assert_eq!(
            command(line.split(' ').map(str::to_owned)),
            "xpyd bench --base-url http://h:1/ --header 'Authorization=<redacted>' 'X-Key=<redacted>' --model m \
             '--header=A=<redacted>' --goodput ttft:500 -- --api-key '<redacted>'"
        );
    }

    #[test]
    fn loopback_names_are_equal() {
        assert_eq!(place("http://localhost:9100"), place("http://127.0.0.1:9100/"));
        assert_ne!(place("http://localhost:9100"), place("https://localhost:9100"));
        assert_eq!(place("http://10.0.0.1:9100"), None);
    }
}
