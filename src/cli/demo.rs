//! `xpyd demo`: start, use and stop of a fleet of simulated engines, for new users.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use clap::Args;
use futures_util::StreamExt;
use tokio::process::Command;

use super::detach::status_after;
use super::other_runs::OtherRuns;
use super::planning::{build, profile_failure};
use super::run_lifecycle::{KEEP_LOGS, acquire, announce, conclude, create_folder, log_to};
use super::{block_on, engine_key, fleet_arguments};
use crate::app::{self, Ready, Run};
use crate::machine;
use crate::profile::{self, Override};
use crate::proxy;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Arguments of `xpyd demo`.
#[derive(Debug, Clone, Args)]
pub(super) struct Arguments {
    /// Requests of the benchmark, one per second.
    #[arg(long, default_value_t = 30, value_name = "COUNT")]
    num_prompts: usize,
    /// Timing of the simulated engines.
    #[arg(long, default_value = "h100-llama-3.1-8b")]
    preset: String,
    /// Offset of every port of the fleet; default: an offset at which all ports are free.
    #[arg(long)]
    port_offset: Option<u16>,
    /// Folder that holds one folder per run.
    #[arg(long, default_value = "logs", value_name = "DIR")]
    logs: PathBuf,
}

const QUESTION: &str = "Why do people split prefill from decode?";

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    fleet_arguments::working_folder()?;
    let machine = machine::survey(&machine::SurveyRequest::nothing());
    let profile = |offset: u16| {
        let overrides = [
            Override::flag("--engine", "engine", "sim"),
            Override::flag("--preset", "sim.preset", arguments.preset.as_str()),
            Override::flag("--port-offset", "port_offset", i64::from(offset)),
        ];
        profile::load("2p2d", &overrides).map_err(profile_failure)
    };
    // The claim on the ports is held until the end of the run.
    let (offset, _ports) = if let Some(offset) = arguments.port_offset {
        (offset, None)
    } else {
        let plan = |offset| build(&profile(offset)?, &machine, &arguments.logs);
        let found = OtherRuns::find().free_offset(0, plan)?;
        found.map_or((0, None), |(offset, claim)| (offset, Some(claim)))
    };
    let mut profile = profile(offset)?;
    let draft = build(&profile, &machine, &arguments.logs)?;
    // Its own name, so that a demo does not conflict with a running fleet.
    let name = format!("demo-{}", std::process::id());
    let run_dir = acquire(&name)?;
    let folder = create_folder(&arguments.logs, &draft, KEEP_LOGS, printer)?;
    let engine_key = engine_key::choose(&mut profile, &draft, None)?;
    let plan = build(&profile, &machine, folder.path())?;
    let _log = log_to(folder.path(), profile.logs)?;
    printer.status("xpyd demo: 2 prefill + 2 decode engines, simulated, so no GPU is needed.\n");
    announce(&plan, printer);
    let run = Run {
        plan: plan.clone(),
        name: name.clone(),
        run_dir,
        detached: false,
        has_parent: false,
        attach: None,
        grow: Box::new(move |plan, role, count| crate::plan::grow(&profile, &machine, plan, role, count)),
        proxy_parts: proxy::Parts {
            engine_key: engine_key.proxy_key,
            ..proxy::Parts::default()
        },
        engine_key: engine_key.generated,
        printer,
        // The benchmark has the terminal meanwhile.
        prints_throughput: false,
        write_endpoints: None,
    };
    let num_prompts = arguments.num_prompts;
    let page = plan.run_dir.join("bench.html");
    let mut worked = Ok(ExitStatus::Success);
    let ended = block_on(app::run(run, async |ready: Ready| {
        printer.status(format!(
            "ready: every pair handed over correctly; the OpenAI API is at {}/v1",
            ready.url
        ));
        worked = show(&ready, num_prompts, &page, printer).await;
        printer.status("\ntaking everything down");
    }))?;
    let ended = conclude(&ended, &plan, &name, printer)?;
    let worked = worked?;
    if worked == ExitStatus::Success && ended == ExitStatus::Success {
        next_steps(printer);
    }
    Ok(if ended == ExitStatus::Success { worked } else { ended })
}

/// One chat, then the benchmark.
async fn show(ready: &Ready, num_prompts: usize, page: &Path, printer: Printer) -> Result<ExitStatus, Failure> {
    printer.status(format!(
        "\n1. one chat, streamed (generated text, with the timing of a GPU)\n\n> {QUESTION}"
    ));
    chat(ready, printer).await?;
    printer.status(format!(
        "\n2. the benchmark of LMCache's example: {num_prompts} requests of 7500 tokens in and 200 out, one a second.\n\
         TTFT, the time to the first token, is the time of prefill and KV transfer; TPOT, the time per later token, depends on the decode engine.\n"
    ));
    benchmark(&ready.url, num_prompts, page, printer).await
}

/// Runs the benchmark in its own process. In the same process as the proxy, it would measure the proxy's work as its own.
async fn benchmark(url: &str, num_prompts: usize, page: &Path, printer: Printer) -> Result<ExitStatus, Failure> {
    let program = std::env::current_exe().map_err(anyhow::Error::from)?;
    let mut command = Command::new(program);
    command
        .args(["bench", "--recipe", "lmcache-xpyd", "--base-url", url])
        .args(["--num-prompts", &num_prompts.to_string()])
        .arg("--report")
        .arg(page)
        .stdin(Stdio::null())
        // The end of the fleet ends the benchmark.
        .kill_on_drop(true);
    if printer.quiet {
        command.arg("--quiet");
    }
    let ended = command.status().await;
    let ended = ended.map_err(|error| anyhow::Error::new(error).context("cannot start the benchmark"))?;
    Ok(status_after(ended))
}

/// Streams one answer to the terminal.
async fn chat(ready: &Ready, printer: Printer) -> Result<(), Failure> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .build()
        .map_err(anyhow::Error::from)?;
    let body = serde_json::json!({
        "model": ready.model, "stream": true, "max_tokens": 48,
        "messages": [{"role": "user", "content": QUESTION}],
    });
    let answer = client
        .post(format!("{}/v1/chat/completions", ready.url))
        .json(&body)
        .send()
        .await;
    let mut chunks = answer
        .and_then(reqwest::Response::error_for_status)
        .map_err(anyhow::Error::from)?
        .bytes_stream();
    let mut pending = Vec::new();
    while let Some(chunk) = chunks.next().await {
        pending.extend_from_slice(&chunk.map_err(anyhow::Error::from)?);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let event = line
                .strip_prefix(b"data: ")
                .map(serde_json::from_slice::<serde_json::Value>);
            if let Some(Ok(event)) = event {
                printer.data_part(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default())?;
            }
        }
    }
    printer.data("")
}

fn next_steps(printer: Printer) {
    let xpyd = program();
    // As wide as the longest of these commands, and two spaces.
    let width = xpyd.len() + " up --engine sim".len() + 2;
    printer.status("\nNext:");
    for (arguments, what) in [
        ("up --engine sim", "the same fleet, until Ctrl+C"),
        ("plan", "show what it would do on this machine with real vLLM"),
        ("up", "do it: 2 prefill + 2 decode engines on 4 GPUs"),
        ("profiles list", "other profiles"),
    ] {
        printer.status(format!("  {:width$}{what}", format!("{xpyd} {arguments}")));
    }
}

/// How to call this program: its name if PATH has one of that name, else its path.
fn program() -> String {
    let on_path = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("xpyd").is_file()));
    let here = std::env::current_dir().ok();
    let program = std::env::current_exe().ok().filter(|_| !on_path);
    program.map_or_else(
        || "xpyd".to_owned(),
        |program| {
            let relative = here.and_then(|here| program.strip_prefix(here).ok().map(Path::to_owned));
            let shown = relative.unwrap_or(program).display().to_string();
            // Linux adds this where the file was replaced since the start.
            shown.trim_end_matches(" (deleted)").to_owned()
        },
    )
}
