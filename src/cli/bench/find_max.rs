//! `xpyd bench --find-max`: probes rates until the highest that meets the objectives is known closely enough.

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

/// The first rate, where the flags name none and a burst does not tell.
const FIRST_RATE: f64 = 1.0;
/// Requests of that burst, and how long it may take.
const BURST: usize = 64;
const LONGEST_BURST: Duration = Duration::from_secs(30);
/// Requests that are sent alone before the first probe. The first one may be cold.
const ALONE: usize = 3;
/// A server is at rest again when a request alone takes no more than this much longer than at first, or than the moment below.
const AT_REST: f64 = 1.25;
const MOMENT: Duration = Duration::from_millis(20);
/// How long a server may take to come to rest after a probe that was cut.
const REST: Duration = Duration::from_mins(1);
/// How long a server takes to fill, before anything is known of it.
const FILL: Duration = Duration::from_secs(5);
/// Most requests that are made up for one probe.
const MOST_REQUESTS: usize = 200_000;

/// A probe that has ended.
struct Probe {
    rate: f64,
    verdict: ProbeVerdict,
    sprt: Sprt,
    sent: usize,
    ttft_p99: Option<f64>,
    lasted: Duration,
    /// Of the answers: about how long the server takes to fill.
    quickest: Duration,
    invalid: Option<String>,
    cause: Option<String>,
    /// Requests were at the server when it ended.
    was_cut: bool,
}

/// What a request meets that is alone at the server.
struct Alone {
    latency: Duration,
    /// The objectives that even it misses, if it does.
    missed: Option<String>,
}

/// Why the search is over.
enum EndReason {
    /// A request alone misses these objectives.
    Alone(String),
    Search(SearchEnd),
    Time,
    Interrupted,
}

/// Searches.
pub(super) async fn run(session: &Session<'_>) -> Result<ExitStatus, Failure> {
    let modes = &session.arguments.modes;
    let objectives = session.first.objectives.clone();
    let wanted = format!("{} for {}% of requests", named(&objectives), percent(modes.attainment));
    session.printer.status(format_args!(
        "searching the highest rate that meets {wanted}, to `{}` at {}; every probe has prompts of its own, made from seed {} and its number",
        session.first.model,
        session.first.base_url,
        session.first.workload.seed()
    ));
    session.line(HEADER);
    let began = Instant::now();
    let deadline = began + modes.max_time;
    let mut probes: Vec<Probe> = Vec::new();
    let alone = Box::pin(alone(session, &objectives)).await?;
    let missed = alone.as_ref().and_then(|alone| alone.missed.clone());
    let first = match (&missed, session.arguments.load.request_rate) {
        (Some(_), _) => FIRST_RATE,
        (None, rate) if rate.is_finite() => rate,
        (None, _) => Box::pin(burst(session, alone.as_ref(), deadline)).await?,
    };
    let mut search = Search::new(first, modes.tolerance);
    let end = loop {
        if let Some(missed) = missed {
            break EndReason::Alone(missed);
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
                    Box::pin(rest(session, alone.as_ref(), deadline)).await?;
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

/// Whether the flags make a search.
pub(super) fn check(arguments: &Arguments, first: &Spec) -> Result<(), Failure> {
    if first.objectives.is_empty() {
        let problem = "`--find-max` needs objectives to meet";
        return Err(Failure::message(ExitStatus::Usage, problem).hint("name them: `--goodput ttft:500 tpot:20`"));
    }
    if arguments.load.max_concurrency.is_some() {
        let problem = "`--max-concurrency` holds requests back in the client, where no objective sees them wait";
        return Err(Failure::message(ExitStatus::Usage, problem).hint("leave it out of `--find-max`"));
    }
    Ok(())
}

/// Probes a rate until it is decided; `None` if the time or the user's patience ran out before.
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
    let vote = |records: &[Record]| {
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
        let run = session.run(&spec, "probe", &vote, decided.clone());
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
    Ok(Some(judged(rate, decision, sprt, &report, began.elapsed())))
}

/// Sends a few requests, one after the other; `None` if one failed or the user stopped it.
async fn alone(session: &Session<'_>, objectives: &[Objective]) -> Result<Option<Alone>, Failure> {
    let report = Box::pin(one_by_one(session, ALONE)).await?;
    let answers: Vec<&Answer> = report
        .records
        .iter()
        .filter_map(|record| record.result.as_ref().ok())
        .collect();
    let Some(quickest) = answers
        .iter()
        .map(|answer| answer.latency)
        .min()
        .filter(|_| answers.len() == ALONE)
    else {
        return Ok(None);
    };
    let is_missed = |objective: &&Objective| answers.iter().all(|answer| !objective.is_met(answer));
    let missed: Vec<Objective> = objectives.iter().filter(is_missed).copied().collect();
    Ok(Some(Alone {
        latency: quickest,
        missed: (!missed.is_empty()).then(|| named(&missed)),
    }))
}

/// Sends many requests at once, to see about how much the server can do: probes of rates far below that take minutes each.
async fn burst(session: &Session<'_>, alone: Option<&Alone>, deadline: Instant) -> Result<f64, Failure> {
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
    Box::pin(rest(session, alone, deadline)).await?;
    Ok(first)
}

/// Waits until the server has let go of what the last probe left behind: a request alone takes as long as at first.
async fn rest(session: &Session<'_>, alone: Option<&Alone>, deadline: Instant) -> Result<(), Failure> {
    let Some(alone) = alone else {
        return Ok(());
    };
    let limit = alone.latency.mul_f64(AT_REST) + MOMENT;
    let deadline = deadline.min(Instant::now() + REST);
    while Instant::now() < deadline && !session.stop.is_cancelled() {
        let report = Box::pin(one_by_one(session, 1)).await?;
        let is_at_rest = |record: &Record| record.result.as_ref().is_ok_and(|answer| answer.latency <= limit);
        if report.records.iter().all(is_at_rest) {
            return Ok(());
        }
    }
    Ok(())
}

async fn one_by_one(session: &Session<'_>, count: usize) -> Result<Report, Failure> {
    let spec = session.spec(|arguments| {
        arguments.load.request_rate = f64::INFINITY;
        arguments.load.max_concurrency = NonZeroUsize::new(1);
        arguments.data.num_prompts = count;
    })?;
    session.run(&spec, "one at a time", &|_| {}, session.stop.clone()).await
}

fn judged(rate: f64, decision: Decision, sprt: Sprt, report: &Report, lasted: Duration) -> Probe {
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

/// What is to be known of a probe, below its line.
fn notes(probe: &Probe, objectives: &[Objective]) -> Vec<String> {
    let mut notes = broken(&probe.sprt, objectives);
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

/// Which objectives were missed how often, the one most often missed first, and how many requests failed.
fn broken(sprt: &Sprt, objectives: &[Objective]) -> Vec<String> {
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

fn named(objectives: &[Objective]) -> String {
    objectives.iter().map(name).collect::<Vec<_>>().join(" ")
}

fn percent(share: f64) -> f64 {
    // Without the digits that a hundredth of a double has.
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
        EndReason::Alone(missed) => lines.push(format!("even a request that is alone at the server misses {missed}")),
        EndReason::Search(SearchEnd::Probes) => {
            lines.push("too many probes: the verdicts contradict each other".to_owned())
        }
        EndReason::Time => {
            lines.push(
                "the time was over (`--max-time`) before the search was: `--max-time 30m` gives it more".to_owned(),
            );
        }
        EndReason::Interrupted => lines.push("interrupted".to_owned()),
    }
    lines.push(match (low, high) {
        (Some(low), Some(high)) if matches!(end, EndReason::Search(SearchEnd::Found)) => {
            format!("meets {wanted} up to {low:.2} req/s, and no longer at {high:.2}")
        }
        (Some(low), Some(high)) => {
            format!("meets {wanted} at {low:.2} req/s at least, and not at {high:.2}; rates between were not tried")
        }
        (Some(low), None) => format!("meets {wanted} at {low:.2} req/s at least; higher rates were not tried"),
        (None, Some(high)) => format!("does not meet {wanted} at {high:.3} req/s; what it does below is not known"),
        (None, None) if matches!(end, EndReason::Alone(_)) => format!("no rate meets {wanted}"),
        (None, None) => format!("whether it meets {wanted} is not known"),
    });
    if let Some(first) = high.and_then(|high| first_broken(high, probes, objectives)) {
        lines.push(format!("what gives way first: {first}"));
    }
    lines
}

/// What broke at the lowest rate that failed.
fn first_broken(high: f64, probes: &[Probe], objectives: &[Objective]) -> Option<String> {
    let is_lowest = |probe: &&Probe| probe.verdict == ProbeVerdict::Fail && probe.rate.total_cmp(&high).is_eq();
    let probe = probes.iter().rev().find(is_lowest)?;
    let broken = broken(&probe.sprt, objectives);
    let counted = probe.sprt.counted();
    Some(format!(
        "{} of {counted} requests at {high:.2} req/s",
        broken.join(", ")
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
        EndReason::Alone(_) => "a request alone misses",
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
            json!(high.and_then(|high| first_broken(high, probes, objectives))),
        ),
        ("probes", probes.iter().map(entry).collect()),
    ]
}
