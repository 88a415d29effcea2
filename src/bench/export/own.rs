//! What xpyd has to say below vLLM's table: what its numbers are worth, and what the client itself did.

use std::fmt::Write as _;

use crate::bench::honesty::Verdict;
use crate::bench::interval::{Estimate, Row, Statistics, Tail};
use crate::bench::record::TokenCount;
use crate::bench::report::Report;

/// Wide enough for `12345.67 [12345.67, 12345.67]`.
const COLUMN: usize = 29;

pub(crate) fn render(report: &Report) -> String {
    let (statistics, verdict) = (report.statistics(), report.verdict());
    let mut text = String::new();
    rows(&mut text, "with 95 % intervals", &statistics.rows);
    if statistics.cold > 0 {
        let title = format!("without {} cold", statistics.cold);
        rows(&mut text, &title, &statistics.without_cold);
    }
    for line in remarks(statistics, &verdict) {
        let _ = writeln!(text, "{line}");
    }
    text.trim_end().to_owned()
}

fn rows(text: &mut String, title: &str, rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let _ = write!(text, "{title:<20} {:>COLUMN$} {:>COLUMN$}", "mean ms", "median ms");
    for tail in &first.tails {
        let (Tail::Percentile(percentile, _) | Tail::Slowest { percentile, .. }) = tail;
        let _ = write!(text, " {:>COLUMN$}", format!("P{percentile} ms"));
    }
    text.push('\n');
    for row in rows {
        let _ = write!(
            text,
            "{:<20} {:>COLUMN$} {:>COLUMN$}",
            row.label,
            estimate(row.mean),
            estimate(row.median)
        );
        for tail in &row.tails {
            let cell = match *tail {
                Tail::Percentile(_, value) => estimate(value),
                Tail::Slowest { value, of, .. } => format!("{value:.2}, the slowest of {of}"),
            };
            let _ = write!(text, " {cell:>COLUMN$}");
        }
        text.push('\n');
    }
}

fn estimate(estimate: Estimate) -> String {
    match estimate.interval {
        Some((low, high)) => format!("{:.2} [{low:.2}, {high:.2}]", estimate.value),
        None => format!("{:.2}", estimate.value),
    }
}

fn remarks(statistics: &Statistics, verdict: &Verdict) -> Vec<String> {
    let mut remarks = Vec::new();
    if statistics.tokens == TokenCount::Spread {
        remarks.push(
            "ITL per token: chunks held several tokens, and only their whole number is known, spread evenly; \
             --extra-body '{\"return_token_ids\": true}' has vLLM tell"
                .to_owned(),
        );
    }
    let stalls = statistics.stalls;
    if stalls.count > 0 {
        remarks.push(format!(
            "stalls: {} of {} gaps took more than twice the median, in {} requests, the longest {:.1} ms",
            stalls.count, stalls.gaps, stalls.requests, stalls.longest
        ));
    }
    let lag = &verdict.lag;
    let at = |place: usize| lag.percentiles.get(place).map_or(0.0, |(_, value)| *value);
    remarks.push(format!(
        "client: requests left {:.2} ms after their time on average, {:.2} ms at most; {:.2} cores used, its busiest \
         thread {:.0} % of one",
        lag.mean,
        at(2),
        verdict.cores_used(),
        verdict.effort.busiest * 100.0
    ));
    if verdict.backlog.reads > 0 {
        remarks.push(format!(
            "client: what came waited {:.2} ms to be read on average, {:.2} ms at most, which is in no time above",
            verdict.mean_wait(),
            verdict.backlog.most.as_secs_f64() * 1e3
        ));
    }
    if verdict.connections > 0 {
        remarks.push(format!(
            "client: connections made: {}, in {:.2} ms on average, which is in TTFT, as with vLLM's client",
            verdict.connections, verdict.connecting
        ));
    }
    remarks.extend(verdict.notes.iter().map(|note| format!("note: {note}")));
    remarks
}
