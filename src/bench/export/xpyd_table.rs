//! What xpyd has to say beside vLLM's table: a screen of it, or what its numbers are worth in detail, and what the client
//! itself did. Everything fits 80 columns.

use std::fmt::Write as _;

use crate::bench::record::TokenCount;
use crate::bench::report::Report;
use crate::bench::stats::client_saturation::Verdict;
use crate::bench::stats::latency_stats::{Estimate, Row, Statistics, Tail};

/// The whole result in a few lines: how many requests were answered, how fast, and each latency with its interval.
pub(crate) fn summary(report: &Report) -> String {
    let metrics = &report.metrics;
    let mut text = format!(
        "{} of {} requests answered in {:.1} s: {:.2} req/s",
        metrics.completed,
        report.records.len(),
        metrics.duration,
        metrics.request_throughput()
    );
    let _ = write!(text, ", {:.1} tokens/s", metrics.output_throughput());
    if let Some(goodput) = metrics.request_goodput {
        let _ = write!(text, ", {goodput:.2} req/s good");
    }
    text.push('\n');
    let rows = &report.statistics().rows;
    if rows.is_empty() {
        return text;
    }
    let _ = write!(text, "\n{:<14}{:>12}  {:<22}", "", "median", "95 % interval");
    for tail in &rows[0].tails {
        let _ = write!(text, "{:>12}", format!("P{}", tail.percentile));
    }
    text.push('\n');
    for row in rows {
        let interval = row.median.interval;
        let interval = interval.map(|(low, high)| format!("{low:.1} to {high:.1}"));
        let median = format!("{:.1} ms", row.median.value);
        let _ = write!(
            text,
            "{:<14}{median:>12}  {:<22}",
            row.label,
            interval.unwrap_or_default()
        );
        for tail in &row.tails {
            let _ = write!(text, "{:>12}", format!("{:.1} ms", tail.estimate.value));
        }
        text.push('\n');
    }
    let of_few = |tail: &Tail| Some((tail.percentile, tail.of_few?));
    if let Some((percentile, of)) = rows.iter().flat_map(|row| &row.tails).find_map(of_few) {
        let _ = writeln!(
            text,
            "P{percentile} of {of} requests: hardly more than the slowest one."
        );
    }
    text
}

/// Everything that is known beside the table.
pub(crate) fn details(report: &Report) -> String {
    let (statistics, verdict) = (report.statistics(), report.verdict());
    let mut text = String::new();
    rows(&mut text, "in ms, with 95 % intervals", &statistics.rows);
    if statistics.cold > 0 {
        let title = format!("the same without the first request of each pair ({})", statistics.cold);
        rows(&mut text, &title, &statistics.without_cold);
    }
    for line in remarks(statistics, &verdict) {
        let _ = writeln!(text, "{line}");
    }
    text.trim_end().to_owned()
}

/// A line for each statistic of each latency.
fn rows(text: &mut String, title: &str, rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(text, "{title}");
    for row in rows {
        let mut lines = vec![
            ("mean".to_owned(), estimate(row.mean)),
            ("median".to_owned(), estimate(row.median)),
        ];
        lines.extend(row.tails.iter().map(|tail| {
            let mut value = estimate(tail.estimate);
            if let Some(of) = tail.of_few {
                let _ = write!(value, "  of {of} requests: hardly more than the slowest");
            }
            (format!("P{}", tail.percentile), value)
        }));
        let labels = std::iter::once(row.label).chain(std::iter::repeat(""));
        for (label, (name, value)) in labels.zip(lines) {
            let _ = writeln!(text, "  {label:<16}{name:<8}{value}");
        }
    }
}

fn estimate(estimate: Estimate) -> String {
    match estimate.interval {
        Some((low, high)) => format!("{:>10.2}  [{low:.2}, {high:.2}]", estimate.value),
        None => format!("{:>10.2}", estimate.value),
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
            "client: answers waited {:.2} ms to be read on average, {:.2} ms at most; no latency includes this wait",
            verdict.mean_wait(),
            verdict.backlog.most.as_secs_f64() * 1e3
        ));
    }
    if verdict.connections > 0 {
        remarks.push(format!(
            "client: {} connections made, in {:.2} ms on average; TTFT includes this time, as with vLLM's client",
            verdict.connections, verdict.connecting
        ));
    }
    remarks
}
