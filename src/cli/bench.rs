//! `xpyd bench`: reads the flags of `vllm bench serve`, checks the server, runs the benchmark and prints the table.

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
mod html_report;
mod latency_breakdown;
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

/// The default server: the running fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `http://host:port`.
    pub base_url: String,
}

/// The defaults of vLLM, used without flags and without a running fleet.
const DEFAULT_HOST: &str = "127.0.0.1";
const DEFAULT_PORT: u16 = 8000;

/// Runs the command. `defaults` is the running fleet, if there is one.
///
/// # Errors
/// When settings are invalid, the server or the model is missing, or the result cannot be saved.
pub async fn run(arguments: Arguments, defaults: Option<Target>, printer: Printer) -> Result<ExitStatus, Failure> {
    if let (Some(result), Some(path)) = (&arguments.html_report.from, &arguments.html_report.report) {
        return html_report::convert(result, path, printer);
    }
    if let Some(files) = &arguments.modes.compare {
        return compare::run(
            files,
            arguments.output.json,
            arguments.html_report.report.as_deref(),
            printer,
        );
    }
    check_outputs(&arguments)?;
    // The benchmark's own fleet is always taken down first, even after a second Ctrl+C.
    let may_leave = arguments.fleet.profile.is_none();
    let cancel = CancelWatch::watch(arguments.deadline.deadline, may_leave, printer)?;
    let status = Box::pin(with_fleet(&arguments, defaults, printer, cancel.stop.clone())).await?;
    if cancel.cause() == Some(CancelCause::Deadline) && status == ExitStatus::Forced {
        printer.error("the run did not finish within `--deadline`");
        return Ok(ExitStatus::Failure);
    }
    Ok(status)
}

/// Runs the benchmark, with a fleet of its own if the flags ask for one. The fleet is always taken down.
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
        let problem = "`--profile` needs the name of a profile, whose fleet is started for the benchmark";
        return Err(Failure::message(ExitStatus::Usage, problem)
            .hint("`xpyd profiles list` shows the profiles")
            .hint("vLLM's `--profile`, which starts the server's profiler, is not supported"));
    }
    // Before the fleet is started.
    let nowhere = Server {
        base_url: "http://127.0.0.1:1".to_owned(),
        headers: HeaderMap::new(),
    };
    session::check(arguments, &arguments.spec(nowhere)?)?;
    let Some(fleet) = Fleet::start(arguments, profile, printer, &stop).await? else {
        return Ok(ExitStatus::Forced);
    };
    let mut arguments = arguments.clone();
    // It was the model of the fleet; requests use the name under which the fleet serves it.
    arguments.target.model = None;
    let worked = Box::pin(work(&arguments, Some(fleet.target.clone()), printer, stop)).await;
    // The first error is reported first.
    let went_down = fleet.stop(printer).await;
    let status = worked?;
    went_down.map(|()| status)
}

/// Runs the benchmark once, or as often as the mode needs.
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

/// Runs once. `None` if the run was stopped before the first request.
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
            // If this write fails, the final write fails too, and that is an error.
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
    // Making prompts shows its own progress.
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

/// The server from the flags, else the running fleet, else vLLM's default.
fn base_url(target: &arguments::Target, fleet: Option<Target>) -> String {
    if let Some(base_url) = &target.base_url {
        return without_version(base_url, target);
    }
    match fleet {
        Some(fleet) if target.host.is_none() && target.port.is_none() => fleet.base_url,
        _ => {
            let host = target.host.as_deref().unwrap_or(DEFAULT_HOST);
            // An IPv6 address in a URL needs brackets.
            let host = if host.contains(':') && !host.starts_with('[') {
                format!("[{host}]")
            } else {
                host.to_owned()
            };
            format!("http://{host}:{}", target.port.unwrap_or(DEFAULT_PORT))
        }
    }
}

/// Removes `/v1` from a URL. OpenAI clients expect it in the URL; the paths here include it.
fn without_version(url: &str, target: &arguments::Target) -> String {
    let has_version = target
        .endpoint
        .as_deref()
        .is_none_or(|endpoint| endpoint.starts_with("/v1/"));
    let without = url.trim_end_matches('/').strip_suffix("/v1").filter(|_| has_version);
    without.unwrap_or(url).to_owned()
}

/// Asks the server for its first model, or checks the model that the user named. Returns what the model was loaded
/// from.
///
/// A model that is not listed is used anyway, as in vLLM's client: an adapter that loads on first use, or an alias of a
/// gateway, is in no list.
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
        // vLLM's client does not ask, so a server without a list is accepted.
        Ok(model) => Ok(model.root),
        Err(BenchError::NoModelList { .. }) => Ok(None),
        Err(error @ BenchError::UnknownModel { .. }) => {
            printer.error(format_args!("warning: {error}; the benchmark uses it anyway"));
            for hint in failure(error).hints {
                printer.error(format_args!("hint: {hint}"));
            }
            Ok(None)
        }
        // The server can still start within the time of the ready check.
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

/// How much to print.
#[derive(Debug, Clone, Copy)]
struct OutputDetail {
    /// vLLM's lines and table on stdout, for scripts; else a short summary.
    has_table: bool,
    /// All details on stderr; else only what every user must see.
    has_details: bool,
}

impl OutputDetail {
    /// Follows the flags. A terminal gets a short output; files and pipes get everything.
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
    if let Some(path) = &arguments.html_report.report {
        html_report::write(report, path, printer)?;
    }
    if !detail.has_details {
        printer.status("`--details` shows where the time went, and vLLM's table".dimmed());
    }
    // Last, so that it is visible.
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

/// Prints whether the run is valid. The exit code depends only on failed requests, as scripts for vLLM expect;
/// `xpyd.valid` in the result has the validity.
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

/// Prints failures as vLLM does, then by cause with hints.
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
        printer.error("no request was answered, so all numbers are 0");
    }
}

fn result_folder(arguments: &Arguments) -> &Path {
    arguments.output.result_dir.as_deref().unwrap_or(Path::new("."))
}

/// Checks before the first request that the result and the HTML report can be saved: creates a file in each folder
/// and removes it.
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
    for (file, option) in [
        (result, "--result-dir"),
        (arguments.html_report.report.clone(), "--report"),
    ] {
        if let Some(Err(error)) = file.as_deref().map(probe) {
            return Err(Failure::new(ExitStatus::Usage, error).hint(format!("choose another folder with `{option}`")));
        }
    }
    Ok(())
}

/// Writes the result file as vLLM does: the same name, one line without a line end, and a further line if it is
/// appended.
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

/// A server and the headers of all requests to it.
struct Server {
    base_url: String,
    headers: HeaderMap,
}

impl Server {
    /// The server at a URL. A header on the command line takes precedence over the user of the URL, and that over
    /// `OPENAI_API_KEY`, which becomes a bearer token, as in vLLM.
    fn of(arguments: &Arguments, base_url: String) -> Result<Self, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(key) = std::env::var_os("OPENAI_API_KEY").filter(|key| !key.is_empty()) {
            let value = key
                .into_string()
                .ok()
                .and_then(|key| HeaderValue::try_from(format!("Bearer {key}")).ok());
            let mut value = value.ok_or_else(|| {
                Failure::message(
                    ExitStatus::Usage,
                    "`OPENAI_API_KEY` has characters that are not allowed in an HTTP header",
                )
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
