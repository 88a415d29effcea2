//! xpyd's own text output: a short summary, and the details below vLLM's table. Everything fits 80 columns.

use std::fmt::Write as _;

use crate::record::TokenCount;
use crate::report::Report;
use crate::stats::client_saturation::ClientValidity;
use crate::stats::latency_stats::{Estimate, LatencyRow, LatencyStats, TailPercentile};

/// The result in a few lines: answered requests, throughput, and each latency with its interval.
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
    let rows = &report.latency_stats().rows;
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
    let too_few = |tail: &TailPercentile| Some((tail.percentile, tail.too_few?));
    if let Some((percentile, of)) = rows.iter().flat_map(|row| &row.tails).find_map(too_few) {
        let _ = writeln!(text, "P{percentile} of {of} requests: close to the slowest one.");
    }
    text
}

/// The details below vLLM's table.
pub(crate) fn details(report: &Report) -> String {
    let (statistics, validity) = (report.latency_stats(), report.validity());
    let mut text = String::new();
    rows(&mut text, "in ms, with 95 % intervals", &statistics.rows);
    if statistics.cold > 0 {
        let title = format!("the same without the first request of each pair ({})", statistics.cold);
        rows(&mut text, &title, &statistics.without_cold);
    }
    for line in remarks(statistics, &validity) {
        let _ = writeln!(text, "{line}");
    }
    text.trim_end().to_owned()
}

/// Adds a line for each statistic of each latency.
fn rows(text: &mut String, title: &str, rows: &[LatencyRow]) {
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
            if let Some(of) = tail.too_few {
                let _ = write!(value, "  of {of} requests: close to the slowest");
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

fn remarks(statistics: &LatencyStats, validity: &ClientValidity) -> Vec<String> {
    let mut remarks = Vec::new();
    if statistics.tokens == TokenCount::Spread {
        remarks.push(
            "ITL per token is an estimate: chunks have several tokens, and the server reports only their total; \
             vLLM reports them with --extra-body '{\"return_token_ids\": true}'"
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
    let lag = &validity.lag;
    let at = |place: usize| lag.percentiles.get(place).map_or(0.0, |(_, value)| *value);
    remarks.push(format!(
        "client: requests left {:.2} ms after their time on average, {:.2} ms at most; {:.2} cores used, its busiest \
         thread {:.0} % of one",
        lag.mean,
        at(2),
        validity.cores_used(),
        validity.client_usage.busiest * 100.0
    ));
    if validity.read_delay.reads > 0 {
        remarks.push(format!(
            "client: answers waited {:.2} ms to be read on average, {:.2} ms at most; no latency includes this wait",
            validity.mean_wait(),
            validity.read_delay.most.as_secs_f64() * 1e3
        ));
    }
    if validity.connections > 0 {
        remarks.push(format!(
            "client: {} connections made, in {:.2} ms on average; TTFT includes this time, as with vLLM's client",
            validity.connections, validity.connecting
        ));
    }
    remarks
}
