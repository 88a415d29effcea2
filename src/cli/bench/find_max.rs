//! `xpyd bench --find-max`: searches for the highest rate that meets the objectives.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::Arguments;
use super::session::Session;
use crate::bench::record::Answer;
use crate::bench::search::sprt::{Decision, RequestOutcome, Sprt};
use crate::bench::search::{ProbeVerdict, Search, SearchEnd, Step, first_rate};
use crate::bench::stats::client_saturation::ClientValidity;
use crate::bench::stats::goodput;
use crate::bench::{Metric, Objective, Record, Report, Spec, sweep};
use crate::report::{ExitStatus, Failure};
use crate::ui::time_span;

/// The first rate if neither the flags nor a burst give one.
const FIRST_RATE: f64 = 1.0;
/// Requests of that burst, and its time limit.
const BURST: usize = 64;
const LONGEST_BURST: Duration = Duration::from_secs(30);
/// Single requests before the first probe. The first one can be cold.
const SINGLE_REQUESTS: usize = 3;
/// A server is idle again when a single request takes at most this factor of the first latency, plus [`IDLE_MARGIN`].
const IDLE_FACTOR: f64 = 1.25;
const IDLE_MARGIN: Duration = Duration::from_millis(20);
/// Longest wait for an idle server after a probe that was cut.
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);
/// Assumed time to fill the server before any probe has measured it.
const FILL: Duration = Duration::from_secs(5);
/// Most requests of one probe.
const MOST_REQUESTS: usize = 200_000;

/// A finished probe.
struct Probe {
    rate: f64,
    verdict: ProbeVerdict,
    sprt: Sprt,
    sent: usize,
    ttft_p99: Option<f64>,
    lasted: Duration,
    /// The shortest latency, about the time to fill the server.
    quickest: Duration,
    invalid: Option<String>,
    cause: Option<String>,
    /// Whether requests were in flight when it ended.
    was_cut: bool,
}

/// The latency of a single request at an idle server.
struct IdleLatency {
    latency: Duration,
    /// The objectives that even this request misses.
    missed: Option<String>,
}

/// Why the search ended.
enum EndReason {
    /// A single request at an idle server misses these objectives.
    MissedWhenIdle(String),
    Search(SearchEnd),
    Time,
    Interrupted,
}

/// Runs the search.
pub(super) async fn run(session: &Session<'_>) -> Result<ExitStatus, Failure> {
    let modes = &session.arguments.modes;
    let objectives = session.first.objectives.clone();
    let wanted = format!("{} for {}% of requests", names(&objectives), percent(modes.attainment));
    session.printer.status(format_args!(
        "searching for the highest rate that meets {wanted}, with `{}` at {}; every probe has its own prompts, made from seed {} and its number",
        session.first.model,
        session.first.base_url,
        session.first.workload.seed()
    ));
    session.line(HEADER);
    let began = Instant::now();
    let deadline = began + modes.max_time;
    let mut probes: Vec<Probe> = Vec::new();
    let idle = Box::pin(measure_idle(session, &objectives)).await?;
    let missed = idle.as_ref().and_then(|idle| idle.missed.clone());
    let first = match (&missed, session.arguments.load.request_rate) {
        (Some(_), _) => FIRST_RATE,
        (None, rate) if rate.is_finite() => rate,
        (None, _) => Box::pin(burst(session, idle.as_ref(), deadline)).await?,
    };
    let mut search = Search::new(first, modes.tolerance);
    let end = loop {
        if let Some(missed) = missed {
            break EndReason::MissedWhenIdle(missed);
        }
        let rate = match search.step() {
            Step::Done(ending) => break EndReason::Search(ending),
            Step::Probe(rate) => rate,
        };
        if session.stop.is_cancelled() {
            break EndReason::Interrupted;
        }
        if Instant::now() >= deadline {
            break EndReason::Time;
        }
        let fill = probes
            .iter()
            .map(|probe| probe.quickest)
            .max()
            .unwrap_or(FILL)
            .max(FILL);
        match Box::pin(probe(session, &objectives, rate, fill, deadline)).await? {
            Some(probe) => {
                if probe.was_cut {
                    Box::pin(wait_until_idle(session, idle.as_ref(), deadline)).await?;
                }
                session.line(&line(&probe));
                for note in notes(&probe, &objectives) {
                    session.printer.status(format_args!("{:13}{note}", ""));
                }
                search.take(rate, probe.verdict);
                probes.push(probe);
            }
            None if session.stop.is_cancelled() => break EndReason::Interrupted,
            None => break EndReason::Time,
        }
    };
    let (low, high) = search.bracket();
    for text in summary(&end, low, high, &wanted, &probes, &objectives) {
        session.sentence(&text);
    }
    session.sentence(&format!(
        "{} probes, {} requests, {}",
        probes.len(),
        probes.iter().map(|probe| probe.sent).sum::<usize>(),
        time_span(began.elapsed())
    ));
    session.finish("find-max", document(session, &objectives, &end, (low, high), &probes))?;
    Ok(match (&end, low) {
        (EndReason::Interrupted, _) => ExitStatus::Forced,
        (_, None) => ExitStatus::Failure,
        (_, Some(_)) => ExitStatus::Success,
    })
}

/// Checks the flags of a search.
pub(super) fn check(arguments: &Arguments, first: &Spec) -> Result<(), Failure> {
    if first.objectives.is_empty() {
        let problem = "`--find-max` needs objectives to meet";
        return Err(
            Failure::message(ExitStatus::Usage, problem).hint("set them, for example `--goodput ttft:500 tpot:20`")
        );
    }
    if arguments.load.max_concurrency.is_some() {
        let problem = "`--max-concurrency` delays requests in the client, which no objective measures";
        return Err(Failure::message(ExitStatus::Usage, problem).hint("remove `--max-concurrency`"));
    }
    Ok(())
}

/// Probes a rate until the test decides; `None` if the time is over or the user stopped the run.
async fn probe(
    session: &Session<'_>,
    objectives: &[Objective],
    rate: f64,
    fill: Duration,
    deadline: Instant,
) -> Result<Option<Probe>, Failure> {
    let modes = &session.arguments.modes;
    let shortest = modes.min_probe.as_secs_f64();
    let counted = (Sprt::max_requests(modes.attainment) as f64).max(rate * shortest);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a number of requests, clamped"
    )]
    let count = ((counted + rate * 2.0 * fill.as_secs_f64()).ceil() as usize + 20).min(MOST_REQUESTS);
    let spec = session.spec(|arguments| {
        arguments.load.request_rate = rate;
        arguments.data.num_prompts = count;
    })?;
    let decided = session.stop.child_token();
    let sprt = RefCell::new((Sprt::new(modes.attainment, objectives.len(), shortest), 0));
    let observe = |records: &[Record]| {
        let (sprt, counted) = &mut *sprt.borrow_mut();
        for record in &records[*counted..] {
            sprt.add(record.index, outcome(record, objectives));
        }
        if *counted < records.len() && sprt.decision() != Decision::Undecided {
            decided.cancel();
        }
        *counted = records.len();
    };
    let began = Instant::now();
    let mut in_time = true;
    let report = {
        let run = session.run(&spec, "probe", &observe, decided.clone());
        tokio::pin!(run);
        if let Ok(report) = timeout_at(deadline, &mut run).await {
            report?
        } else {
            in_time = false;
            decided.cancel();
            run.await?
        }
    };
    let (sprt, _) = sprt.into_inner();
    let decision = if report.is_partial() {
        sprt.decision()
    } else {
        sprt.final_decision()
    };
    if decision == Decision::Undecided && (!in_time || session.stop.is_cancelled()) {
        return Ok(None);
    }
    Ok(Some(finished_probe(rate, decision, sprt, &report, began.elapsed())))
}

/// Sends a few requests one by one; `None` if one failed or the user stopped the run.
async fn measure_idle(session: &Session<'_>, objectives: &[Objective]) -> Result<Option<IdleLatency>, Failure> {
    let report = Box::pin(run_sequentially(session, SINGLE_REQUESTS)).await?;
    let answers: Vec<&Answer> = report
        .records
        .iter()
        .filter_map(|record| record.result.as_ref().ok())
        .collect();
    let Some(quickest) = answers
        .iter()
        .map(|answer| answer.latency)
        .min()
        .filter(|_| answers.len() == SINGLE_REQUESTS)
    else {
        return Ok(None);
    };
    let is_missed = |objective: &&Objective| answers.iter().all(|answer| !objective.is_met(answer));
    let missed: Vec<Objective> = objectives.iter().filter(is_missed).copied().collect();
    Ok(Some(IdleLatency {
        latency: quickest,
        missed: (!missed.is_empty()).then(|| names(&missed)),
    }))
}

/// Sends many requests at once to estimate the capacity. Probes at rates far below it take minutes each.
async fn burst(session: &Session<'_>, idle: Option<&IdleLatency>, deadline: Instant) -> Result<f64, Failure> {
    let spec = session.spec(|arguments| {
        arguments.load.request_rate = f64::INFINITY;
        arguments.data.num_prompts = BURST;
    })?;
    let end = session.stop.child_token();
    let report = {
        let run = session.run(&spec, "burst", &|_| {}, end.clone());
        tokio::pin!(run);
        if let Ok(report) = timeout_at(deadline.min(Instant::now() + LONGEST_BURST), &mut run).await {
            report?
        } else {
            end.cancel();
            run.await?
        }
    };
    let end = |record: &Record| Some((record.started + record.result.as_ref().ok()?.latency).as_secs_f64());
    let ends: Vec<f64> = report.records.iter().filter_map(end).collect();
    let answered = ends.len();
    let first = first_rate(ends).unwrap_or(FIRST_RATE);
    session.printer.status(format_args!(
        "{answered} of {BURST} requests sent at once were answered within {}: the search begins at {first} req/s",
        time_span(report.client_usage.wall_time)
    ));
    Box::pin(wait_until_idle(session, idle, deadline)).await?;
    Ok(first)
}

/// Waits until the server is idle: until a single request takes as long as at first.
async fn wait_until_idle(session: &Session<'_>, idle: Option<&IdleLatency>, deadline: Instant) -> Result<(), Failure> {
    let Some(idle) = idle else {
        return Ok(());
    };
    let limit = idle.latency.mul_f64(IDLE_FACTOR) + IDLE_MARGIN;
    let deadline = deadline.min(Instant::now() + IDLE_TIMEOUT);
    while Instant::now() < deadline && !session.stop.is_cancelled() {
        let report = Box::pin(run_sequentially(session, 1)).await?;
        let is_idle = |record: &Record| record.result.as_ref().is_ok_and(|answer| answer.latency <= limit);
        if report.records.iter().all(is_idle) {
            return Ok(());
        }
    }
    Ok(())
}

async fn run_sequentially(session: &Session<'_>, count: usize) -> Result<Report, Failure> {
    let spec = session.spec(|arguments| {
        arguments.load.request_rate = f64::INFINITY;
        arguments.load.max_concurrency = NonZeroUsize::new(1);
        arguments.data.num_prompts = count;
    })?;
    session.run(&spec, "one at a time", &|_| {}, session.stop.clone()).await
}

fn finished_probe(rate: f64, decision: Decision, sprt: Sprt, report: &Report, lasted: Duration) -> Probe {
    let invalid = sweep::why_invalid(report);
    let ttft = report.metrics.latency(Metric::Ttft);
    let answers = report.records.iter().filter_map(|record| record.result.as_ref().ok());
    Probe {
        rate,
        verdict: match decision {
            _ if invalid.is_some() => ProbeVerdict::Invalid,
            Decision::Pass => ProbeVerdict::Pass,
            Decision::Fail => ProbeVerdict::Fail,
            Decision::Undecided => ProbeVerdict::Invalid,
        },
        sprt,
        sent: report.records.len() + report.dropped,
        ttft_p99: ttft.and_then(|ttft| ttft.percentiles.last().map(|(_, value)| *value)),
        lasted,
        quickest: answers.map(|answer| answer.latency).min().unwrap_or_default(),
        invalid,
        cause: report.failures().into_iter().next().map(|group| group.cause),
        was_cut: report.dropped > 0,
    }
}

fn outcome(record: &Record, objectives: &[Objective]) -> RequestOutcome {
    let answer = record.result.as_ref().ok();
    let latency = answer.map(|answer| answer.latency).unwrap_or_default();
    let is_missed = |objective: &Objective| answer.is_some_and(|answer| !objective.is_met(answer));
    RequestOutcome {
        released: record.released.as_secs_f64(),
        ended: (record.started + latency).as_secs_f64(),
        first_token: answer.map(|answer| answer.first_token.as_secs_f64()),
        missed: (0..objectives.len())
            .filter(|&place| is_missed(&objectives[place]))
            .collect(),
    }
}

const HEADER: &str = "      REQ/S  VERDICT      GOOD   VOTES    SENT    TOOK";

fn line(probe: &Probe) -> String {
    let verdict = match probe.verdict {
        ProbeVerdict::Pass => "pass",
        ProbeVerdict::Fail => "fail",
        ProbeVerdict::Invalid => "not valid",
    };
    format!(
        "{:>11.3}  {verdict:<9} {:>6.1}% {:>7} {:>7} {:>7}",
        probe.rate,
        probe.sprt.share() * 100.0,
        probe.sprt.counted(),
        probe.sent,
        time_span(probe.lasted),
    )
}

/// The notes below the line of a probe.
fn notes(probe: &Probe, objectives: &[Objective]) -> Vec<String> {
    let mut notes = missed_counts(&probe.sprt, objectives);
    if probe.sprt.is_growing() {
        notes.push("the queue grows".to_owned());
    }
    let mut notes: Vec<String> = (!notes.is_empty()).then(|| notes.join(", ")).into_iter().collect();
    notes.extend(probe.cause.clone());
    if let Some(why) = &probe.invalid {
        notes.push(format!("not valid: {why}"));
        notes.push(format!("hint: {}", ClientValidity::ADVICE));
    }
    notes
}

/// How often each objective was missed, the most frequent first, and how many requests failed.
fn missed_counts(sprt: &Sprt, objectives: &[Objective]) -> Vec<String> {
    let mut counts: Vec<(usize, String)> = sprt
        .missed()
        .iter()
        .zip(objectives)
        .map(|(&count, objective)| (count, format!("{count} missed {}", name(objective))))
        .collect();
    counts.push((sprt.failed(), format!("{} failed", sprt.failed())));
    counts.retain(|(count, _)| *count > 0);
    counts.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    counts.into_iter().map(|(_, text)| text).collect()
}

fn name(objective: &Objective) -> String {
    format!("{}:{}", objective.latency.name(), objective.milliseconds)
}

fn names(objectives: &[Objective]) -> String {
    objectives.iter().map(name).collect::<Vec<_>>().join(" ")
}

fn percent(share: f64) -> f64 {
    // Without the rounding error of the multiplication.
    (share * 1e8).round() / 1e6
}

/// The result in sentences.
fn summary(
    end: &EndReason,
    low: Option<f64>,
    high: Option<f64>,
    wanted: &str,
    probes: &[Probe],
    objectives: &[Objective],
) -> Vec<String> {
    let mut lines = Vec::new();
    match end {
        EndReason::Search(SearchEnd::Found) => {}
        EndReason::Search(SearchEnd::NothingPasses) => lines.push("even the lowest rate fails".to_owned()),
        EndReason::Search(SearchEnd::EverythingPasses) => lines.push("even the highest rate passes".to_owned()),
        EndReason::Search(SearchEnd::ClientLimit) => {
            lines.push("the client could not keep up, so the search ended early".to_owned());
            lines.push(format!("hint: {}", ClientValidity::ADVICE));
        }
        EndReason::MissedWhenIdle(missed) => {
            lines.push(format!("even a single request at an idle server misses {missed}"));
        }
        EndReason::Search(SearchEnd::Probes) => {
            lines.push("too many probes: their results contradict each other".to_owned());
        }
        EndReason::Time => {
            lines.push(
                "the search did not finish within `--max-time`: increase it, for example `--max-time 30m`".to_owned(),
            );
        }
        EndReason::Interrupted => lines.push("interrupted".to_owned()),
    }
    lines.push(match (low, high) {
        (Some(low), Some(high)) if matches!(end, EndReason::Search(SearchEnd::Found)) => {
            format!("meets {wanted} up to {low:.2} req/s, but not at {high:.2}")
        }
        (Some(low), Some(high)) => {
            format!("meets {wanted} at least up to {low:.2} req/s, but not at {high:.2}; rates between were not tested")
        }
        (Some(low), None) => format!("meets {wanted} at least up to {low:.2} req/s; higher rates were not tested"),
        (None, Some(high)) => format!("does not meet {wanted} at {high:.3} req/s; lower rates were not tested"),
        (None, None) if matches!(end, EndReason::MissedWhenIdle(_)) => format!("no rate meets {wanted}"),
        (None, None) => format!("it is unknown whether it meets {wanted}"),
    });
    if let Some(first) = high.and_then(|high| first_failure(high, probes, objectives)) {
        lines.push(format!("first to fail: {first}"));
    }
    lines
}

/// What failed at the lowest failing rate.
fn first_failure(high: f64, probes: &[Probe], objectives: &[Objective]) -> Option<String> {
    let is_lowest = |probe: &&Probe| probe.verdict == ProbeVerdict::Fail && probe.rate.total_cmp(&high).is_eq();
    let probe = probes.iter().rev().find(is_lowest)?;
    let missed_counts = missed_counts(&probe.sprt, objectives);
    let counted = probe.sprt.counted();
    Some(format!(
        "{} of {counted} requests at {high:.2} req/s",
        missed_counts.join(", ")
    ))
}

fn document(
    session: &Session<'_>,
    objectives: &[Objective],
    end: &EndReason,
    (low, high): (Option<f64>, Option<f64>),
    probes: &[Probe],
) -> [(&'static str, Value); 8] {
    let entry = |probe: &Probe| {
        let missed = probe.sprt.missed().iter().zip(objectives);
        let missed = missed.map(|(count, objective)| (objective.latency.name().to_owned(), json!(count)));
        json!({
            "rate": probe.rate,
            "verdict": match probe.verdict {
                ProbeVerdict::Pass => "pass",
                ProbeVerdict::Fail => "fail",
                ProbeVerdict::Invalid => "invalid",
            },
            "good": probe.sprt.share(),
            "votes": probe.sprt.counted(),
            "sent": probe.sent,
            "failed": probe.sprt.failed(),
            "missed": Value::Object(missed.collect()),
            "growing": probe.sprt.is_growing(),
            "ttft_ms": probe.ttft_p99,
            "seconds": probe.lasted.as_secs_f64(),
            "why_invalid": probe.invalid,
        })
    };
    let ending = match end {
        EndReason::Search(SearchEnd::Found) => "found",
        EndReason::Search(SearchEnd::NothingPasses) => "nothing passes",
        EndReason::Search(SearchEnd::EverythingPasses) => "everything passes",
        EndReason::Search(SearchEnd::ClientLimit) => "client limit",
        EndReason::Search(SearchEnd::Probes) => "too many probes",
        EndReason::MissedWhenIdle(_) => "a request alone misses",
        EndReason::Time => "time",
        EndReason::Interrupted => "interrupted",
    };
    let modes = &session.arguments.modes;
    [
        ("objectives", goodput::to_json(objectives)),
        ("attainment", json!(modes.attainment)),
        ("tolerance", json!(modes.tolerance)),
        ("ending", json!(ending)),
        ("rate", json!(low)),
        ("fails_at", json!(high)),
        (
            "first_broken",
            json!(high.and_then(|high| first_failure(high, probes, objectives))),
        ),
        ("probes", probes.iter().map(entry).collect()),
    ]
}
