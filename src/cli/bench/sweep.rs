//! `xpyd bench --sweep`: one run per rate or concurrency.

use std::cell::Cell;
use std::num::NonZeroUsize;

use serde_json::{Value, json};

use super::Arguments;
use super::session::Session;
use crate::bench::stats::Distribution;
use crate::bench::stats::client_saturation::ClientValidity;
use crate::bench::sweep::{Axis, Points, SweepPoint, is_overloaded};
use crate::bench::{Record, Report};
use crate::report::{ExitStatus, Failure};

/// Fewest requests before a point can end early.
const FEWEST: usize = 80;

/// Runs the points until the server is overloaded.
pub(super) async fn run(session: &Session<'_>, points: &Points) -> Result<ExitStatus, Failure> {
    session.printer.status(format_args!(
        "sweep of {points}: {} requests each, to `{}` at {}; every point has its own prompts, made from seed {} and its number",
        session.arguments.data.num_prompts,
        session.first.model,
        session.first.base_url,
        session.first.workload.seed()
    ));
    let has_objectives = !session.first.objectives.is_empty();
    session.line(&header(points.axis, has_objectives));
    let mut measured = Vec::new();
    let mut end = None;
    for (number, &asked) in points.values.iter().enumerate() {
        let spec = session.spec(|arguments| set(arguments, points.axis, asked))?;
        let label = format!("point {} of {}", number + 1, points.values.len());
        let (report, was_cut) = point(session, &spec, points.axis, &label).await?;
        let mut point = SweepPoint::of(asked, points.axis, &report);
        point.is_overloaded |= was_cut;
        session.line(&line(&point, has_objectives));
        let name = format!("{} {asked}", points.axis.name());
        if let Some(cause) = report.failures().first() {
            let text = format!("{name}: {} requests failed: {}", cause.count, cause.cause);
            session.printer.error(text);
        }
        if let Some(why) = &point.invalid {
            let text = format!("{name}: not valid: {why}\nhint: {}", ClientValidity::ADVICE);
            session.printer.error(text);
        }
        let is_overloaded = point.is_overloaded;
        measured.push((point, report));
        if session.stop.is_cancelled() {
            end = Some("interrupted".to_owned());
            break;
        }
        if is_overloaded {
            end = Some(format!("the server was overloaded at {} {asked}", points.axis.name()));
            break;
        }
    }
    if let Some(end) = &end {
        session.printer.status(format_args!("stopped: {end}"));
    }
    session.finish("sweep", document(session, points, &measured, end.as_ref()))?;
    let has_failed = measured.iter().any(|(point, _)| point.failed > 0);
    let is_stopped = session.stop.is_cancelled();
    Ok(session.arguments.output.exit_status(is_stopped, has_failed))
}

/// Checks the flags of a sweep.
pub(super) fn check(arguments: &Arguments, points: &Points) -> Result<(), Failure> {
    if points.axis == Axis::Rate && arguments.load.request_rate.is_finite() {
        let problem = "`--request-rate` and `--sweep rate=…` both decide the rate";
        return Err(Failure::message(ExitStatus::Usage, problem).hint("remove `--request-rate`"));
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

/// Runs one point. Also returns whether it was cut because of overload.
async fn point(
    session: &Session<'_>,
    spec: &crate::bench::Spec,
    axis: Axis,
    label: &str,
) -> Result<(Report, bool), Failure> {
    let cut = session.stop.child_token();
    let next_check = Cell::new(FEWEST);
    let check_overload = |records: &[Record]| {
        // Again after 10 % more requests, so that the check costs little.
        if axis == Axis::Rate && records.len() >= next_check.get() {
            next_check.set(records.len() + records.len() / 10);
            if is_overloaded(records) {
                cut.cancel();
            }
        }
    };
    let report = session.run(spec, label, &check_overload, cut.clone()).await?;
    let was_cut = cut.is_cancelled() && !session.stop.is_cancelled();
    Ok((report, was_cut))
}

/// The header of the table, which fits 80 columns. `--json` has more.
fn header(axis: Axis, has_objectives: bool) -> String {
    let asked = match axis {
        Axis::Rate => "RATE",
        Axis::Concurrency => "AT ONCE",
    };
    format!(
        "{asked:>7} {:>8} {:>8} {:>8} {:>8} {:>7} {:>8} {}",
        "SERVED/S",
        "TTFT P50",
        "P99",
        "TPOT P50",
        "P99",
        "TOK/S",
        if has_objectives { " GOOD/S" } else { "" }
    )
    .trim_end()
    .to_owned()
}

fn line(point: &SweepPoint, has_objectives: bool) -> String {
    let high = |distribution: &Distribution| {
        let found = distribution
            .percentiles
            .iter()
            .find(|(percentile, _)| *percentile >= 99.0);
        found.map_or_else(|| "-".to_owned(), |(_, value)| format!("{value:.1}"))
    };
    let good = point.goodput.filter(|_| has_objectives);
    let good = good.map(|rate| format!("{rate:>7.2} ")).unwrap_or_default();
    let failed = (point.failed > 0).then(|| format!("{} failed", point.failed));
    let states = [
        point.is_overloaded.then(|| "overloaded".to_owned()),
        failed,
        point.invalid.as_ref().map(|_| "not valid".to_owned()),
        point.is_partial.then(|| "ended early".to_owned()),
    ];
    format!(
        "{:>7} {:>8.2} {:>8.1} {:>8} {:>8.2} {:>7} {:>8.1} {good}{}",
        point.asked,
        point.served,
        point.ttft.median,
        high(&point.ttft),
        point.tpot.median,
        high(&point.tpot),
        point.output_throughput,
        // The most important one; all are printed below.
        states.into_iter().flatten().next().unwrap_or_else(|| "ok".to_owned())
    )
}

fn document(
    session: &Session<'_>,
    points: &Points,
    measured: &[(SweepPoint, Report)],
    end: Option<&String>,
) -> [(&'static str, Value); 3] {
    let detailed = session.arguments.output.save_detailed;
    let entries: Vec<Value> = measured
        .iter()
        .map(|(point, report)| {
            let mut entry = point.to_json();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_fits_80_columns() {
        let distribution = Distribution {
            mean: 0.0,
            median: 123_456.7,
            deviation: 0.0,
            percentiles: vec![(99.0, 98_765.4)],
        };
        let point = SweepPoint {
            asked: 1024.25,
            sent: 1024.0,
            served: 12_345.67,
            failed: 0,
            tpot: Distribution {
                median: 9999.99,
                ..distribution.clone()
            },
            ttft: distribution,
            output_throughput: 123_456.7,
            goodput: Some(1234.5),
            is_overloaded: true,
            is_partial: true,
            invalid: Some("a long reason".to_owned()),
        };
        let line = line(&point, true);
        assert!(line.len() <= 80 && line.ends_with("overloaded"), "{line}");
        let header = header(Axis::Rate, true);
        assert!(header.ends_with("GOOD/S") && header.len() < line.len(), "{header}");
        assert!(!super::header(Axis::Rate, false).contains("GOOD"));
    }
}
