//! `xpyd up`: from the command line to a running fleet, and its end.

use std::path::{Path, PathBuf};

use clap::Args;

use super::fleet_arguments::FleetArguments;
use super::planning::{build, preflight};
use super::proxy_options::open_parts;
use super::run_lifecycle::{KEEP_LOGS, acquire, announce, conclude, create_folder, log_to, seconds};
use super::{attach, block_on, checks, command, detach, engine_key, fetch};
use crate::app::{self, Ready, Run};
use crate::control::rundir::{self, DEFAULT_NAME};
use crate::fleet::EngineId;
use crate::plan::{self, Plan};
use crate::proxy;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::shim::orphans;
use crate::ui::Printer;

/// Arguments of `xpyd up`.
#[derive(Debug, Clone, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    fleet: FleetArguments,
    /// Only print what xpyd would do, like `xpyd plan`.
    #[arg(long)]
    dry_run: bool,
    /// Return as soon as the fleet is ready, and leave it running; `xpyd down` stops it.
    #[arg(short, long, conflicts_with = "dry_run")]
    detach: bool,
    /// Name of the run, for `xpyd down`, `status` and `logs` if there are several.
    #[arg(long, default_value = "default")]
    name: String,
    /// Write the engines that serve to this file, in llm-d's format, for other proxies: `xpyd proxy --discover file:FILE`.
    #[arg(long, value_name = "FILE")]
    write_endpoints: Option<PathBuf>,
    /// Number of folders of old runs to keep.
    #[arg(long, default_value_t = KEEP_LOGS, value_name = "COUNT")]
    keep_logs: usize,
    /// Set by `--detach` on the process that stays.
    #[arg(long, hide = true)]
    detached_child: bool,
    /// Set by `xpyd bench --profile`: the parent whose end also ends this run.
    #[arg(long, hide = true, value_name = "PID", requires = "detached_child")]
    ends_with: Option<i32>,
}

impl Arguments {
    /// Whether the run goes on after the command has returned.
    pub(super) fn detaches(&self) -> bool {
        self.detach
    }
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    if arguments.detached_child {
        detach::become_session_leader()?;
    }
    if let Some(parent) = arguments.ends_with {
        detach::end_with(parent)?;
    }
    let (profile, machine) = arguments.fleet.survey()?;
    let draft = build(&profile, &machine, &arguments.fleet.logs.join("RUN"))?;
    if arguments.detach && !arguments.detached_child {
        outlives_the_terminal(draft.proxy.config.access_log.file.as_deref())?;
        return block_on(detach::start(&arguments.name, printer));
    }
    // The claim is held until the end of the run.
    let (mut profile, draft, _ports) =
        arguments
            .fleet
            .beside_others(&arguments.name, profile, draft, &machine, !arguments.dry_run, printer)?;
    if arguments.dry_run {
        super::plan::show(&draft, &machine, false, printer)?;
        return Ok(ExitStatus::Success);
    }
    let proxy_parts = open_parts(&draft.proxy.config)?;
    let run_dir = acquire(&arguments.name)?;
    let attach = attach::find(&arguments.name)?;
    let engine_key = engine_key::choose(&mut profile, &draft, attach.as_ref())?;
    // Held until the end of the run, so that no other run removes the folder as an old one.
    let folder;
    let plan = if let Some(kept) = &attach {
        let plan = build(
            &attach::with_running_gpus(&profile, kept, &arguments.name)?,
            &machine,
            &kept.kept.run_dir,
        )?;
        attach::resume(plan, kept, &arguments.name)?
    } else {
        preflight(&draft, &machine, printer)?;
        fetch::model(&draft, &profile, &machine, printer)?;
        folder = create_folder(&arguments.fleet.logs, &draft, arguments.keep_logs, printer)?;
        build(&profile, &machine, folder.path())?
    };
    let _log = log_to(&plan.run_dir, profile.logs)?;
    if let Some(kept) = &attach {
        let who = attach::describe(kept);
        printer.status(format!("attaching to the engines that an earlier xpyd left: {who}"));
        printer.status(format!("logs in {}", plan.run_dir.display()));
    } else {
        announce(&plan, printer);
        if let Some(orphans_message) = checks::orphans_message(&orphans::find()) {
            printer.status(format!("note: {orphans_message}: {}", checks::REAP_HINT));
        }
    }
    let detached = arguments.detached_child;
    if let Some(fate) = rundir::fate_at_logout().filter(|_| detached && arguments.ends_with.is_none()) {
        printer.status(format!("note: {fate}"));
    }
    let key = key_expression(&plan);
    let run = Run {
        plan: plan.clone(),
        name: arguments.name.clone(),
        run_dir,
        detached,
        has_parent: arguments.ends_with.is_some(),
        attach,
        proxy_parts: proxy::Parts {
            engine_key: engine_key.proxy_key,
            ..proxy_parts
        },
        engine_key: engine_key.generated,
        grow: Box::new(move |plan, role, count| plan::grow(&profile, &machine, plan, role, count)),
        printer,
        prints_throughput: true,
        write_endpoints: arguments.write_endpoints.clone(),
    };
    let log = plan.run_dir.join("xpyd.log");
    let ended = block_on(app::run(run, async move |ready: Ready| {
        announce_ready(&ready, &key, detached, printer);
        if detached {
            detach::release_parent(&log);
        }
        std::future::pending::<()>().await;
    }))?;
    conclude(&ended, &plan, &arguments.name, printer)
}

/// Refuses an access log that a detached run would lose: the terminal and the pipes of its parent close after the start.
fn outlives_the_terminal(access_log: Option<&Path>) -> Result<(), Failure> {
    const OF_THE_TERMINAL: [&str; 5] = ["/dev/stdout", "/dev/stderr", "/dev/tty", "/dev/fd", "/proc/self/fd"];
    let Some(path) = access_log.filter(|path| OF_THE_TERMINAL.iter().any(|place| path.starts_with(place))) else {
        return Ok(());
    };
    let problem = format!(
        "`--access-log {}` is closed with the terminal, but `--detach` outlives it",
        path.display()
    );
    Err(Failure::message(ExitStatus::Usage, problem).hint("name a file: `--access-log access.jsonl`"))
}

/// A shell expression with a client's API key.
fn key_expression(plan: &Plan) -> String {
    let file = plan.proxy.config.guard.api_key_file.as_ref();
    let in_variable = std::env::var_os("XPYD_API_KEY").is_some_and(|keys| !keys.is_empty());
    match file.and_then(|file| std::path::absolute(file).ok()) {
        Some(file) if !in_variable => format!("$(grep -m1 '^[^#]' '{}')", file.display()),
        _ => "$XPYD_API_KEY".to_owned(),
    }
}

fn announce_ready(ready: &Ready, key: &str, detached: bool, printer: Printer) {
    let checked = format!("handed over correctly (checked in {})", seconds(ready.verified_in));
    printer.status(if ready.not_serving.is_empty() {
        format!("ready: every pair of engines {checked}")
    } else {
        let names: Vec<&str> = ready.not_serving.iter().map(EngineId::as_str).collect();
        format!(
            "ready: every pair of engines that serve {checked}; not serving yet: {}",
            names.join(", ")
        )
    });
    printer.status(format!("\n  OpenAI API   {}/v1   model {}", ready.url, ready.model));
    let header = if ready.wants_key {
        format!("-H \"Authorization: Bearer {key}\" ")
    } else {
        String::new()
    };
    printer.status(format!(
        "  try          curl {}/v1/completions {header}-H 'content-type: application/json' \\\n                 -d '{{\"model\": \"{}\", \"prompt\": \"Hello\", \"max_tokens\": 16}}'",
        ready.url, ready.model
    ));
    printer.status(format!("  and          {}", next_commands(ready, key).join(" · ")));
    if !detached {
        printer.status("\npress Ctrl+C to stop");
    }
}

/// The next commands to type.
fn next_commands(ready: &Ready, key: &str) -> Vec<String> {
    let mut commands = vec![command("status", &ready.name), command("logs decoder1 -f", &ready.name)];
    // With TLS the benchmark needs flags that depend on the issuer of the certificate.
    if ready.url.starts_with("http://") {
        let key = if ready.wants_key {
            format!("OPENAI_API_KEY=\"{key}\" ")
        } else {
            String::new()
        };
        let server = if ready.name == DEFAULT_NAME {
            String::new()
        } else {
            format!(" --base-url {}", ready.url)
        };
        commands.push(format!("{key}xpyd bench{server}"));
    }
    commands.push(command("down", &ready.name));
    commands
}
