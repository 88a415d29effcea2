//! `xpyd bench`: reads `vllm bench serve`'s flags, checks the server, runs the benchmark and prints its table.

mod arguments;
mod attribution;
mod compare;

use std::path::Path;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use tokio_util::sync::CancellationToken;

pub use self::arguments::Arguments;
use crate::bench::{self, BenchError, Phase, Progress, Report};
use crate::report::{ExitStatus, Failure};
use crate::signals::StopSignals;
use crate::ui::Printer;
use crate::ui::bench::{BenchProgress, Snapshot};

/// A server that is known without being named: the running fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `http://host:port`.
    pub base_url: String,
    /// The name of its model in requests.
    pub model: String,
}

/// Where nothing says otherwise: xpyd's own proxy.
const DEFAULT_HOST: &str = "127.0.0.1";
const DEFAULT_PORT: u16 = 9100;

/// Runs the command. `defaults` is the running fleet, if there is one.
///
/// # Errors
/// When there is nothing to run: bad settings, no server, no such model; and when the result cannot be saved.
pub async fn run(arguments: Arguments, defaults: Option<Target>, printer: Printer) -> Result<ExitStatus, Failure> {
    if let Some(files) = &arguments.modes.compare {
        return compare::run(files, arguments.output.json, printer);
    }
    let mut signals = StopSignals::listen().map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    let stop = CancellationToken::new();
    let benchmark = measure(&arguments, defaults, printer, stop.clone());
    tokio::pin!(benchmark);
    let report = tokio::select! {
        report = &mut benchmark => report?,
        // What has ended is still worth its table, so the benchmark is asked to stop and awaited.
        _ = signals.next() => {
            stop.cancel();
            benchmark.await?
        }
    };
    match report {
        None => Ok(ExitStatus::Forced),
        Some(report) => present(&arguments, &report, printer),
    }
}

/// The report, or nothing if the stop came before the first request.
async fn measure(
    arguments: &Arguments,
    defaults: Option<Target>,
    printer: Printer,
    stop: CancellationToken,
) -> Result<Option<Report>, Failure> {
    let headers = headers(arguments)?;
    let is_named =
        arguments.target.base_url.is_some() || arguments.target.host.is_some() || arguments.target.port.is_some();
    let fleet = defaults.filter(|_| !is_named);
    let base_url = match (&fleet, &arguments.target.base_url) {
        (Some(fleet), _) => fleet.base_url.clone(),
        (None, Some(base_url)) => base_url.clone(),
        (None, None) => {
            let host = arguments.target.host.as_deref().unwrap_or(DEFAULT_HOST);
            // A bare IPv6 address stands in brackets in a URL.
            let host = if host.contains(':') && !host.starts_with('[') {
                format!("[{host}]")
            } else {
                host.to_owned()
            };
            format!("http://{host}:{}", arguments.target.port.unwrap_or(DEFAULT_PORT))
        }
    };
    let wanted = arguments
        .target
        .model
        .as_deref()
        .or(fleet.as_ref().map(|fleet| fleet.model.as_str()));
    let mut spec = arguments.spec(base_url, headers)?;
    spec.check().map_err(failure)?;
    let discovery = stop.run_until_cancelled(bench::discover(&spec.base_url, &spec.headers, wanted));
    let Some(model) = discovery.await else {
        return Ok(None);
    };
    spec.model = model.map_err(failure)?.id;
    printer.status(arguments.headline(&spec));

    let shown = BenchProgress::new(printer);
    let gpus = attribution::Gpus::watch(&spec.base_url);
    let follow = |progress: Progress| {
        gpus.follow(&progress);
        shown.update(&snapshot(&progress));
    };
    let report = bench::run(&spec, &follow, stop).await;
    shown.finish();
    let mut report = report.map_err(failure)?;
    report.gpus = gpus.finish();
    Ok(Some(report))
}

fn snapshot(progress: &Progress) -> Snapshot {
    Snapshot {
        label: match progress.phase {
            Phase::WarmingUp => "warm-up",
            Phase::Measuring => "benchmark",
        },
        total: progress.total,
        done: progress.done,
        failed: progress.failed,
        in_flight: progress.in_flight,
        elapsed: progress.elapsed,
        mean_ttft_ms: progress.mean_ttft_ms,
        mean_tpot_ms: progress.mean_tpot_ms,
    }
}

fn present(arguments: &Arguments, report: &Report, printer: Printer) -> Result<ExitStatus, Failure> {
    if report.is_partial() {
        printer.status(format_args!(
            "stopped: {} requests ended, {} were dropped in flight, {} were never sent",
            report.records.len(),
            report.dropped,
            report.unsent
        ));
    }
    if let Some(failures) = report.failure_summary() {
        printer.error(failures);
        if report.failures().iter().any(|group| group.cause.contains("vocabulary")) {
            printer.error("hint: `--vocab-size N` keeps the prompts' token ids below the model's vocabulary size");
        }
    }
    if arguments.output.json {
        printer.data(report.to_json(arguments.output.save_detailed));
    } else {
        printer.data(report.table());
    }
    attribution::tell(report, printer);
    let lag = report.release_lag();
    if let [.., (_, most)] = lag.percentiles[..] {
        printer.status(format_args!(
            "requests left this client {:.2} ms after their time on average, {most:.2} ms at most",
            lag.mean
        ));
    }
    if arguments.output.save_result {
        let path = save(arguments, report)?;
        printer.status(format_args!("result saved to {}", path.display()));
    }
    Ok(if report.is_partial() {
        ExitStatus::Forced
    } else if report.failed() > 0 {
        ExitStatus::Failure
    } else {
        ExitStatus::Success
    })
}

/// Writes the result file, by vLLM's rule for its name.
fn save(arguments: &Arguments, report: &Report) -> Result<std::path::PathBuf, Failure> {
    let spec = &report.spec;
    let default_name = || {
        let limit = spec
            .max_concurrency
            .map(|limit| format!("-concurrency{limit}"))
            .unwrap_or_default();
        let model = spec.model.rsplit('/').next().unwrap_or_default();
        // `{:?}` writes whole numbers as Python does: `1.0`.
        let rate = spec.arrivals.request_rate;
        format!(
            "{}-{rate:?}qps{limit}-{model}-{}.json",
            spec.backend.name(),
            report.date
        )
    };
    let name = arguments.output.result_filename.clone().unwrap_or_else(default_name);
    let folder = arguments.output.result_dir.as_deref().unwrap_or(Path::new("."));
    let path = folder.join(name);
    let write = || {
        fs_err::create_dir_all(folder)?;
        fs_err::write(&path, report.to_json(arguments.output.save_detailed).to_string() + "\n")
    };
    write().map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    Ok(path)
}

/// The headers of every request. As in vLLM, `OPENAI_API_KEY` becomes a bearer token unless a header says otherwise.
fn headers(arguments: &Arguments) -> Result<HeaderMap, Failure> {
    let mut headers = HeaderMap::new();
    if let Some(key) = std::env::var_os("OPENAI_API_KEY").filter(|key| !key.is_empty()) {
        let value = key
            .into_string()
            .ok()
            .and_then(|key| HeaderValue::try_from(format!("Bearer {key}")).ok());
        let mut value = value
            .ok_or_else(|| Failure::message(ExitStatus::Usage, "`OPENAI_API_KEY` holds what an HTTP header cannot"))?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    for arguments::Header { name, value } in &arguments.target.header {
        headers.insert(name.clone(), value.clone());
    }
    Ok(headers)
}

/// The failure of a run that could not begin, with what mends it.
fn failure(error: BenchError) -> Failure {
    let hints: Vec<String> = match &error {
        BenchError::Unreachable { .. } => vec![
            "`xpyd up` or `xpyd demo` starts a fleet; `xpyd status` says whether one runs".to_owned(),
            "`--base-url http://host:port` names another server".to_owned(),
        ],
        BenchError::NoModelList { .. } => {
            vec!["`--base-url` ends before the path: `http://host:port`, without `/v1`".to_owned()]
        }
        BenchError::UnknownModel { served, .. } if served.is_empty() => Vec::new(),
        BenchError::UnknownModel { served, .. } => vec![format!(
            "it serves {}; without `--model` the first is taken",
            served
                .iter()
                .map(|name| format!("`{name}`"))
                .collect::<Vec<_>>()
                .join(", ")
        )],
        BenchError::BaseUrl(url) if url.starts_with("https://") => {
            vec![
                "the benchmark speaks no TLS: start the fleet without `tls_cert` to measure it, or name a server's plain \
                 HTTP address with `--base-url`"
                    .to_owned(),
            ]
        }
        BenchError::Workload(_)
        | BenchError::RequestRate(_)
        | BenchError::Burstiness(_)
        | BenchError::TooSlow { .. }
        | BenchError::BaseUrl(_)
        | BenchError::Client(_) => Vec::new(),
    };
    let mut failure = Failure::new(ExitStatus::Usage, error);
    failure.hints = hints;
    failure
}
