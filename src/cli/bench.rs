//! `xpyd bench`: reads `vllm bench serve`'s flags, checks the server, runs the benchmark and prints its table.

mod against;
mod arguments;
mod argv_compat;
mod cancel;
#[cfg(test)]
mod captures;
mod compare;
mod find_max;
mod fleet;
mod hints;
mod latency_breakdown;
mod page;
mod prompts;
mod session;
mod setup;
mod sweep;

use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};

use owo_colors::OwoColorize as _;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use tokio_util::sync::CancellationToken;

pub use self::arguments::Arguments;
pub use self::argv_compat::compatible_argv;
use self::cancel::{CancelCause, CancelWatch};
use self::fleet::Fleet;
use self::hints::{failure, failure_hints};
use self::prompts::Prompts;
use self::session::Session;
use crate::bench::stats::client_saturation::MachineUse;
use crate::bench::{self, BenchError, Progress, Report, RunPhase, Spec};
use crate::machine::Processors;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;
use crate::ui::bench::BenchProgress;

/// A server that is known without being named: the running fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `http://host:port`.
    pub base_url: String,
}

/// Where nothing says otherwise and no fleet runs: vLLM's own defaults.
const DEFAULT_HOST: &str = "127.0.0.1";
const DEFAULT_PORT: u16 = 8000;

/// Runs the command. `defaults` is the running fleet, if there is one.
///
/// # Errors
/// When there is nothing to run: bad settings, no server, no such model; and when the result cannot be saved.
pub async fn run(arguments: Arguments, defaults: Option<Target>, printer: Printer) -> Result<ExitStatus, Failure> {
    if let (Some(result), Some(path)) = (&arguments.page.from, &arguments.page.report) {
        return page::convert(result, path, printer);
    }
    if let Some(files) = &arguments.modes.compare {
        return compare::run(files, arguments.output.json, arguments.page.report.as_deref(), printer);
    }
    check_outputs(&arguments)?;
    // A fleet of the bench's own is taken down first, however often somebody asks.
    let may_leave = arguments.fleet.profile.is_none();
    let cancel = CancelWatch::watch(arguments.ending.deadline, may_leave, printer)?;
    let status = Box::pin(with_fleet(&arguments, defaults, printer, cancel.stop.clone())).await?;
    if cancel.cause() == Some(CancelCause::Deadline) && status == ExitStatus::Forced {
        printer.error("`--deadline` was over before the run was");
        return Ok(ExitStatus::Failure);
    }
    Ok(status)
}

/// The work, with a fleet of its own if the flags want one, which is taken down however the work ends.
async fn with_fleet(
    arguments: &Arguments,
    defaults: Option<Target>,
    printer: Printer,
    stop: CancellationToken,
) -> Result<ExitStatus, Failure> {
    let Some(profile) = &arguments.fleet.profile else {
        return Box::pin(work(arguments, defaults, printer, stop)).await;
    };
    if profile.is_empty() {
        let problem = "`--profile` takes the name of a profile: the bench brings up its fleet";
        return Err(Failure::message(ExitStatus::Usage, problem)
            .hint("`xpyd profiles list` shows the names")
            .hint("vLLM's `--profile`, which starts the server's profiler, is not supported"));
    }
    // Before anything is started for it.
    let nowhere = Server {
        base_url: "http://127.0.0.1:1".to_owned(),
        headers: HeaderMap::new(),
    };
    session::check(arguments, &arguments.spec(nowhere)?)?;
    let Some(fleet) = Fleet::start(arguments, profile, printer, &stop).await? else {
        return Ok(ExitStatus::Forced);
    };
    let mut arguments = arguments.clone();
    // It was the fleet's; requests use the name that the fleet gives it.
    arguments.target.model = None;
    let worked = Box::pin(work(&arguments, Some(fleet.target.clone()), printer, stop)).await;
    // What went wrong first is told first.
    let went_down = fleet.stop(printer).await;
    let status = worked?;
    went_down.map(|()| status)
}

/// One run, or what the mode makes of many.
async fn work(
    arguments: &Arguments,
    defaults: Option<Target>,
    printer: Printer,
    stop: CancellationToken,
) -> Result<ExitStatus, Failure> {
    let modes = &arguments.modes;
    if modes.flag().is_none() {
        return match Box::pin(measure(arguments, defaults, printer, stop)).await? {
            None => {
                printer.status("stopped before the first request");
                Ok(ExitStatus::Forced)
            }
            Some(report) => print_report(arguments, &report, printer),
        };
    }
    let Some(session) = Session::open(arguments, defaults, printer, stop).await? else {
        return Ok(ExitStatus::Forced);
    };
    if let Some(points) = &modes.sweep {
        return Box::pin(sweep::run(&session, points)).await;
    }
    match &modes.against {
        Some(url) => Box::pin(against::run(&session, url)).await,
        None => Box::pin(find_max::run(&session)).await,
    }
}

/// The report, or nothing if the stop came before the first request.
async fn measure(
    arguments: &Arguments,
    defaults: Option<Target>,
    printer: Printer,
    stop: CancellationToken,
) -> Result<Option<Report>, Failure> {
    let mut spec = arguments.spec(Server::of(arguments, base_url(&arguments.target, defaults))?)?;
    let shown = BenchProgress::wanted(printer, !arguments.output.disable_tqdm);
    shown.begin("making prompts");
    spec.check().map_err(failure)?;
    let has_table = OutputDetail::of(&arguments.output, printer).has_table;
    let print_line = |line: &str| {
        if arguments.output.json {
            return;
        }
        match line.strip_prefix("WARNING: ") {
            // What cannot be written now cannot be at the end, where that is a failure.
            _ if has_table => shown.suspend(|| drop(printer.data(line))),
            Some(warning) if line != bench::NO_TEMPERATURE => {
                shown.suspend(|| printer.status(format_args!("warning: {warning}")));
            }
            _ => {}
        }
    };
    shown.begin("asking the server for its models");
    let Some(root) = stop
        .run_until_cancelled(find_model(arguments, &mut spec, &print_line, printer))
        .await
        .transpose()?
    else {
        return Ok(None);
    };
    // Making prompts shows a progress of its own.
    shown.clear();
    let prompts = Prompts::open(arguments, &spec, root, printer)?;
    let prepared = stop.run_until_cancelled(prompts.prepare(&mut spec, &print_line));
    if prepared.await.transpose()?.is_none() {
        return Ok(None);
    }
    if arguments.sampling.temperature.is_none() {
        print_line(bench::NO_TEMPERATURE);
    }
    shown.suspend(|| printer.status(arguments.headline(&spec)));

    if arguments.load.ready_check_timeout_sec > 0 {
        shown.begin("waiting for the first answer");
    }
    let setup = setup::of(&spec).await;
    let gpus = latency_breakdown::Gpus::watch(&spec.base_url);
    let show = |progress: Progress| {
        gpus.follow(&progress);
        shown.update(phase_label(progress.phase), &progress);
    };
    let before = Processors::now();
    let run = bench::run_with_lines(&spec, &show, &print_line, stop.clone());
    let report = shown.until_stopped(stop.cancelled(), run).await;
    let after = Processors::now();
    let mut report = report.map_err(failure)?;
    let shares = before.zip(after).and_then(|(before, after)| after.shares_since(before));
    report.extras.machine = shares.map(|(busy, stolen)| MachineUse { busy, stolen });
    report.extras.gpus = gpus.finish();
    report.extras.setup = setup;
    Ok(Some(report))
}

/// The server that the flags name, else the running fleet, else vLLM's default.
fn base_url(target: &arguments::Target, fleet: Option<Target>) -> String {
    if let Some(base_url) = &target.base_url {
        return without_version(base_url, target);
    }
    match fleet {
        Some(fleet) if target.host.is_none() && target.port.is_none() => fleet.base_url,
        _ => {
            let host = target.host.as_deref().unwrap_or(DEFAULT_HOST);
            // A bare IPv6 address stands in brackets in a URL.
            let host = if host.contains(':') && !host.starts_with('[') {
                format!("[{host}]")
            } else {
                host.to_owned()
            };
            format!("http://{host}:{}", target.port.unwrap_or(DEFAULT_PORT))
        }
    }
}

/// Clients of OpenAI's API take the URL with `/v1`, so people have it at hand; the paths here begin with it.
fn without_version(url: &str, target: &arguments::Target) -> String {
    let has_version = target
        .endpoint
        .as_deref()
        .is_none_or(|endpoint| endpoint.starts_with("/v1/"));
    let without = url.trim_end_matches('/').strip_suffix("/v1").filter(|_| has_version);
    without.unwrap_or(url).to_owned()
}

/// Asks the server for its first model, or whether it has the one that the user named; gives what that was loaded from.
///
/// A model that the server does not list is asked for all the same, as vLLM's client does: an adapter that is loaded when it is
/// first asked for, or a gateway's alias, is in no list.
async fn find_model(
    arguments: &Arguments,
    spec: &mut Spec,
    print_line: &dyn Fn(&str),
    printer: Printer,
) -> Result<Option<String>, Failure> {
    let insecure = spec.options.is_insecure;
    if spec.model.is_empty() {
        print_line("Model not specified, fetching first model from server...");
        let model = bench::discover_with(&spec.base_url, &spec.headers, insecure, None)
            .await
            .map_err(failure)?;
        let root = model.root.unwrap_or_else(|| model.id.clone());
        print_line(&format!("First model name: {}, first model id: {root}", model.id));
        spec.model = model.id;
        spec.naming.model_id = Some(root);
        return Ok(None);
    }
    match bench::discover_with(&spec.base_url, &spec.headers, insecure, Some(&spec.model)).await {
        // vLLM's client does not ask, so a server without a list is measured, too.
        Ok(model) => Ok(model.root),
        Err(BenchError::NoModelList { .. }) => Ok(None),
        Err(error @ BenchError::UnknownModel { .. }) => {
            printer.error(format_args!("warning: {error}; it is asked for all the same"));
            for hint in failure(error).hints {
                printer.error(format_args!("hint: {hint}"));
            }
            Ok(None)
        }
        // It may come up in the time that the user gives it.
        Err(BenchError::Unreachable { .. }) if arguments.load.ready_check_timeout_sec > 0 => Ok(None),
        Err(error) => Err(failure(error)),
    }
}

/// The label of a phase in progress lines.
fn phase_label(phase: RunPhase) -> &'static str {
    match phase {
        RunPhase::Preparing => "prompts",
        RunPhase::WarmingUp => "warm-up",
        RunPhase::Measuring => "benchmark",
    }
}

/// How much is shown.
#[derive(Debug, Clone, Copy)]
struct OutputDetail {
    /// vLLM's lines and table on stdout, which scripts read; else the result on half a screen.
    has_table: bool,
    /// Everything beside them on stderr; else what nobody may miss.
    has_details: bool,
}

impl OutputDetail {
    /// As the flags say. People at a terminal get what fits their screen, files and pipes all there is.
    fn of(output: &arguments::Output, printer: Printer) -> Self {
        Self {
            has_table: output.details || output.as_vllm || printer.data_width().is_none(),
            has_details: output.details || !printer.is_terminal(),
        }
    }
}

fn print_report(arguments: &Arguments, report: &Report, printer: Printer) -> Result<ExitStatus, Failure> {
    let output = &arguments.output;
    let detail = OutputDetail::of(output, printer);
    print_failures(arguments, report, detail, printer);
    print_validity(&report.validity(), printer);
    if output.json {
        printer.data(report.to_text(output.save_detailed))?;
    } else if detail.has_table {
        printer.data(report.table())?;
    } else {
        printer.prose(report.summary())?;
    }
    latency_breakdown::print(report, detail.has_details, printer);
    if detail.has_details {
        printer.status(report.remarks());
    }
    for note in report.validity().notes {
        printer.status(format_args!("note: {note}"));
    }
    if output.save_result || output.append_result {
        let path = save(arguments, report)?;
        printer.status(format_args!("result saved to {}", path.display()));
    }
    if let Some(path) = &arguments.page.report {
        page::write(report, path, printer)?;
    }
    if !detail.has_details {
        printer.status("`--details` shows where the time went, and vLLM's table".dimmed());
    }
    // Last, where it is seen.
    if report.is_partial() {
        printer.status(format_args!(
            "stopped: {} requests ended, {} were dropped in flight, {} were never sent",
            report.records.len(),
            report.dropped,
            report.unsent
        ));
    }
    Ok(output.exit_status(report.is_partial(), report.failed() > 0))
}

/// Whether the numbers that follow may be believed. The exit code is that of the requests: scripts that know vLLM's ask whether
/// they went well, and `xpyd.valid` in the result says whether their times may be believed.
fn print_validity(validity: &bench::stats::client_saturation::ClientValidity, printer: Printer) {
    for reason in &validity.reasons {
        printer.error(format_args!("{}: {reason}", "INVALID".red().bold()));
    }
    if validity.is_valid() {
        printer.status(format_args!(
            "{}: the client kept up, so the numbers are the server's",
            "valid".green()
        ));
    } else {
        printer.error(format_args!(
            "hint: {}",
            bench::stats::client_saturation::ClientValidity::ADVICE
        ));
    }
}

/// Failures as vLLM shows them, a line each; then by cause, and what mends them.
fn print_failures(arguments: &Arguments, report: &Report, detail: OutputDetail, printer: Printer) {
    if !arguments.output.json && detail.has_table {
        for line in report.failure_lines() {
            drop(printer.data(line));
        }
    }
    if let Some(summary) = report.failure_summary() {
        printer.error(summary);
    }
    for hint in failure_hints(&report.failures(), &report.spec) {
        printer.error(format_args!("hint: {hint}"));
    }
    if report.failed() > 0 && report.metrics.completed == 0 {
        printer.error("no request was answered, so every number is 0");
    }
}

fn result_folder(arguments: &Arguments) -> &Path {
    arguments.output.result_dir.as_deref().unwrap_or(Path::new("."))
}

/// Checks before the first request that the result and the page can be saved: creates a file in the folder of each, and removes it.
fn check_outputs(arguments: &Arguments) -> Result<(), Failure> {
    let output = &arguments.output;
    let saves = output.save_result || output.append_result;
    let name = output.result_filename.as_deref().unwrap_or("result");
    let result = saves.then(|| result_folder(arguments).join(name));
    let probe = |file: &Path| {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        fs_err::create_dir_all(folder)?;
        let probe = folder.join(format!(".xpyd-{}", std::process::id()));
        fs_err::write(&probe, "")?;
        fs_err::remove_file(&probe)
    };
    for (file, option) in [(result, "--result-dir"), (arguments.page.report.clone(), "--report")] {
        if let Some(Err(error)) = file.as_deref().map(probe) {
            return Err(Failure::new(ExitStatus::Usage, error).hint(format!("name another place with `{option}`")));
        }
    }
    Ok(())
}

/// Writes the result file, as vLLM does: its name, one line without an end, and a line more where it is appended.
fn save(arguments: &Arguments, report: &Report) -> Result<PathBuf, Failure> {
    let output = &arguments.output;
    let name = output.result_filename.clone().unwrap_or_else(|| report.file_name());
    let folder = result_folder(arguments);
    let path = folder.join(name);
    let text = report.to_text(output.save_detailed);
    let write = || {
        fs_err::create_dir_all(folder)?;
        if !output.append_result {
            return fs_err::write(&path, text);
        }
        let mut file = fs_err::OpenOptions::new().create(true).append(true).open(&path)?;
        let is_begun = file.seek(std::io::SeekFrom::End(0))? > 0;
        let separator = if is_begun { "\n" } else { "" };
        file.write_all(format!("{separator}{text}").as_bytes())
    };
    write().map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    Ok(path)
}

/// A server that requests go to, and the headers of all of them.
struct Server {
    base_url: String,
    headers: HeaderMap,
}

impl Server {
    /// The server at a URL. A header on the command line goes before the URL's user, and that before `OPENAI_API_KEY`, which
    /// becomes a bearer token, as in vLLM.
    fn of(arguments: &Arguments, base_url: String) -> Result<Self, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(key) = std::env::var_os("OPENAI_API_KEY").filter(|key| !key.is_empty()) {
            let value = key
                .into_string()
                .ok()
                .and_then(|key| HeaderValue::try_from(format!("Bearer {key}")).ok());
            let mut value = value.ok_or_else(|| {
                Failure::message(ExitStatus::Usage, "`OPENAI_API_KEY` holds what an HTTP header cannot")
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let (base_url, user) = match bench::credentials(&base_url) {
            Some((url, user)) => (url, Some(user)),
            None => (base_url, None),
        };
        if let Some(user) = user {
            headers.insert(AUTHORIZATION, user);
        }
        for arguments::Header { name, value } in &arguments.target.header {
            headers.insert(name.clone(), value.clone());
        }
        Ok(Self { base_url, headers })
    }
}
