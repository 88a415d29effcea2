//! `xpyd bench --sweep`: one run per rate or concurrency, and the curve as it grows.

use std::cell::Cell;
use std::num::NonZeroUsize;

use serde_json::{Value, json};

use super::Arguments;
use super::session::Session;
use crate::bench::stats::Distribution;
use crate::bench::sweep::{Axis, Points, Row, is_overloaded};
use crate::bench::{Record, Report};
use crate::report::{ExitStatus, Failure};

/// Fewest requests after which a point may be ended early.
const FEWEST: usize = 80;

/// Runs all points, or as many as the server keeps up with.
pub(super) async fn run(session: &Session<'_>, points: &Points) -> Result<ExitStatus, Failure> {
    session.printer.status(format_args!(
        "sweep of {points}: {} requests each, to `{}` at {}; every point has prompts of its own, made from seed {} and its number",
        session.arguments.data.num_prompts,
        session.first.model,
        session.first.base_url,
        session.first.workload.seed()
    ));
    session.line(&header(points.axis));
    let mut told = Vec::new();
    let mut end = None;
    for &asked in &points.values {
        let spec = session.spec(|arguments| set(arguments, points.axis, asked))?;
        let (report, was_cut) = point(session, &spec, points.axis).await?;
        let mut row = Row::of(asked, points.axis, &report);
        row.is_overloaded |= was_cut;
        session.line(&line(&row));
        if let Some(cause) = report.failures().first() {
            session
                .printer
                .error(format_args!("{} requests failed: {}", cause.count, cause.cause));
        }
        let is_overloaded = row.is_overloaded;
        told.push((row, report));
        if session.stop.is_cancelled() {
            end = Some("interrupted".to_owned());
            break;
        }
        if is_overloaded {
            end = Some(format!(
                "the server fell behind more and more at {} {asked}",
                points.axis.name()
            ));
            break;
        }
    }
    if let Some(end) = &end {
        session.printer.status(format_args!("stopped: {end}"));
    }
    session.finish("sweep", document(session, points, &told, end.as_ref()))?;
    let has_failed = told.iter().any(|(row, _)| row.failed > 0);
    let is_stopped = session.stop.is_cancelled();
    Ok(session.arguments.output.exit_status(is_stopped, has_failed))
}

/// Whether the flags make a sweep.
pub(super) fn check(arguments: &Arguments, points: &Points) -> Result<(), Failure> {
    if points.axis == Axis::Rate && arguments.load.request_rate.is_finite() {
        let problem = "`--request-rate` and `--sweep rate=…` both decide the rate";
        return Err(Failure::message(ExitStatus::Usage, problem).hint("leave out `--request-rate`"));
    }
    Ok(())
}

fn set(arguments: &mut Arguments, axis: Axis, asked: f64) {
    match axis {
        Axis::Rate => arguments.load.request_rate = asked,
        Axis::Concurrency => {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a sweep's concurrency is a small whole number"
            )]
            let limit = asked as usize;
            arguments.load.max_concurrency = NonZeroUsize::new(limit);
        }
    }
}

/// One point, and whether it was cut because the server fell behind.
async fn point(session: &Session<'_>, spec: &crate::bench::Spec, axis: Axis) -> Result<(Report, bool), Failure> {
    let cut = session.stop.child_token();
    let next_look = Cell::new(FEWEST);
    let look = |records: &[Record]| {
        // A tenth more each time, so that looking costs little beside what is looked at.
        if axis == Axis::Rate && records.len() >= next_look.get() {
            next_look.set(records.len() + records.len() / 10);
            if is_overloaded(records) {
                cut.cancel();
            }
        }
    };
    let report = session.run(spec, "point", &look, cut.clone()).await?;
    let was_cut = cut.is_cancelled() && !session.stop.is_cancelled();
    Ok((report, was_cut))
}

fn header(axis: Axis) -> String {
    let [mean, median, high] = ["TTFT MEAN", "P50", "P99"];
    format!(
        "{:>12} {:>9} {:>9} {mean:>10} {median:>9} {high:>9} {:>10} {high:>8} {:>10} {:>8}  NOTE",
        axis.name().to_uppercase(),
        "SENT/S",
        "SERVED/S",
        "TPOT MEAN",
        "TOK/S",
        "GOOD/S"
    )
}

fn line(row: &Row) -> String {
    let high = |distribution: &Distribution| {
        let found = distribution
            .percentiles
            .iter()
            .find(|(percentile, _)| *percentile >= 99.0);
        found.map_or_else(|| "-".to_owned(), |(_, value)| format!("{value:.1}"))
    };
    let good = row.goodput.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2}"));
    let mut notes = Vec::new();
    if row.is_overloaded {
        notes.push("overloaded".to_owned());
    }
    if row.is_partial {
        notes.push("ended early".to_owned());
    }
    if row.failed > 0 {
        notes.push(format!("{} failed", row.failed));
    }
    notes.extend(row.invalid.iter().map(|why| format!("not valid: {why}")));
    format!(
        "{:>12} {:>9.2} {:>9.2} {:>10.1} {:>9.1} {:>9} {:>10.2} {:>8} {:>10.1} {good:>8}  {}",
        row.asked,
        row.sent,
        row.served,
        row.ttft.mean,
        row.ttft.median,
        high(&row.ttft),
        row.tpot.mean,
        high(&row.tpot),
        row.output_throughput,
        if notes.is_empty() {
            "-".to_owned()
        } else {
            notes.join(", ")
        }
    )
}

fn document(
    session: &Session<'_>,
    points: &Points,
    told: &[(Row, Report)],
    end: Option<&String>,
) -> [(&'static str, Value); 3] {
    let detailed = session.arguments.output.save_detailed;
    let entries: Vec<Value> = told
        .iter()
        .map(|(row, report)| {
            let mut entry = row.to_json();
            entry["seed"] = json!(report.spec.workload.seed());
            entry["result"] = report.to_json(detailed);
            entry
        })
        .collect();
    [
        ("axis", json!(points.axis.name())),
        ("stopped", json!(end)),
        ("points", Value::Array(entries)),
    ]
}
