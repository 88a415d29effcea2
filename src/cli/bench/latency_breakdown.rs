//! Prints the latency breakdown, the use of remote KV, and GPU use after the table.

use std::cell::Cell;

use crate::bench::latency_breakdown::gpus::{self, MeanMax};
use crate::bench::latency_breakdown::{BreakdownSummary, GpuUse, RemoteKv, Stage, StageRow, TOLERANCE};
use crate::bench::{Progress, Report, RunPhase};
use crate::machine::{GpuTotals, GpuWatch};
use crate::ui::{Printer, Table};

/// Share of cached prompt tokens below which no warning is printed. Prompts share the first tokens of a template.
const UNREMARKABLE_CACHE: f64 = 0.02;

/// Measures this machine's GPUs during the measured part of a run. Empty without GPUs or for a remote server.
pub(super) struct Gpus {
    watch: Option<GpuWatch>,
    is_measuring: Cell<bool>,
}

impl Gpus {
    pub(super) fn watch(base_url: &str) -> Self {
        let is_here = ["http://127.", "http://localhost", "http://[::1]"]
            .iter()
            .any(|here| base_url.starts_with(here));
        Self {
            watch: if is_here { GpuWatch::begin() } else { None },
            is_measuring: Cell::new(false),
        }
    }

    /// Follows the progress of the run.
    pub(super) fn follow(&self, progress: &Progress) {
        if progress.phase == RunPhase::Measuring && !self.is_measuring.replace(true) {
            self.watch.iter().for_each(GpuWatch::reset);
        }
    }

    pub(super) fn finish(self) -> Vec<GpuUse> {
        let totals = self.watch.map(GpuWatch::finish).unwrap_or_default();
        totals.into_iter().map(over_the_run).collect()
    }
}

fn over_the_run(totals: GpuTotals) -> GpuUse {
    let spread = |(sum, max): (f64, f64)| MeanMax {
        mean: sum / totals.samples.max(1) as f64,
        max,
    };
    GpuUse {
        index: totals.index,
        samples: totals.samples,
        utilisation: spread(totals.utilisation),
        power: spread(totals.power),
        memory: spread(totals.memory),
        energy_joules: totals.energy,
        name: totals.name,
    }
}

/// Prints what the server reported. Without details it is one line and the warnings.
pub(super) fn print(report: &Report, has_details: bool, printer: Printer) {
    if let Some(summary) = report.latency_breakdown() {
        if has_details {
            print_stages(&summary, printer);
        } else if let Some(shares) = shares(&summary.rows) {
            printer.status(format_args!("time to first token: {shares}"));
        }
        for warning in warnings(&summary) {
            printer.error(format_args!("warning: {warning}"));
        }
    }
    if has_details {
        print_gpus(report, printer);
    }
}

fn print_stages(summary: &BreakdownSummary, printer: Printer) {
    printer.status(format_args!(
        "\nstages of the time to first token{}\n\n{}",
        if summary.timed_requests > 0 {
            ", as measured by client, proxy and engines"
        } else {
            ", on average, from the server's counters"
        },
        stages(&summary.rows)
    ));
    if summary.pairs.len() > 1 {
        printer.status(format_args!("\n{}", pairs(summary)));
    }
    for remark in remarks(summary) {
        printer.status(remark);
    }
}

/// The largest stages: `61 % prefill, 22 % proxy queue`.
fn shares(rows: &[StageRow]) -> Option<String> {
    const LEAST: f64 = 0.02;
    let is_stage = |row: &&StageRow| !row.is_part && row.share >= LEAST && row.share < 1.0;
    let mut stages: Vec<&StageRow> = rows.iter().filter(is_stage).collect();
    stages.sort_by(|one, other| other.share.total_cmp(&one.share));
    let stages = stages
        .iter()
        .map(|row| format!("{:.0} % {}", row.share * 100.0, row.label));
    let text = stages.collect::<Vec<_>>().join(", ");
    (!text.is_empty()).then_some(text)
}

fn number(milliseconds: f64) -> String {
    format!("{milliseconds:9.2}")
}

fn stages(rows: &[StageRow]) -> Table<5> {
    let mut table = Table::new(["stage", "  mean ms", "      p50", "      p99", " share"]);
    for row in rows {
        let percentile = |value: Option<f64>| value.map_or_else(|| format!("{:>9}", "-"), number);
        table.row([
            format!("{}{}", if row.is_part { "  " } else { "" }, row.label),
            number(row.mean_ms),
            percentile(row.percentiles_ms.map(|(median, _)| median)),
            percentile(row.percentiles_ms.map(|(_, most)| most)),
            format!("{:5.1}%", row.share * 100.0),
        ]);
    }
    table
}

fn pairs(summary: &BreakdownSummary) -> Table<6> {
    let mut table = Table::new([
        "pair, means in ms",
        "requests",
        "     ttft",
        "  prefill",
        "   decode",
        "1st request",
    ]);
    for pair in &summary.pairs {
        let sum = |wanted: &[Stage]| {
            let of = pair.stages_ms.iter().filter(|(stage, _)| wanted.contains(stage));
            number(of.map(|(_, mean)| mean).sum())
        };
        table.row([
            pair.name.clone(),
            format!("{:8}", pair.requests),
            number(pair.ttft_ms),
            sum(&[Stage::PrefillQueue, Stage::PrefillCompute, Stage::Prefill]),
            sum(&[Stage::Handoff, Stage::DecodeQueue, Stage::FirstStep, Stage::Decode]),
            number(pair.first_ttft_ms),
        ]);
    }
    table
}

fn remarks(summary: &BreakdownSummary) -> Vec<String> {
    let mut remarks = Vec::new();
    if let Some(cold) = &summary.cold {
        let more = cold.cold_ms - cold.warm_ms;
        remarks.push(format!(
            "mean TTFT {:.2} ms; {:.2} ms without the first request of each pair of engines ({} requests, each {:.2} ms {})",
            cold.all_ms,
            cold.warm_ms,
            cold.requests,
            more.abs(),
            if more < 0.0 { "faster" } else { "slower" },
        ));
    }
    if let Some(remote) = summary.remote.as_ref().filter(|remote| remote.used == remote.answered) {
        remarks.push(format!(
            "{} of {} requests used remote KV{}",
            remote.used,
            remote.answered,
            evidence(remote)
        ));
    }
    remarks
}

fn evidence(remote: &RemoteKv) -> &'static str {
    if remote.is_counted {
        ", according to the decode engines"
    } else {
        ", according to the proxy: the engines' counters are not available"
    }
}

/// Warnings that change the meaning of the numbers.
fn warnings(summary: &BreakdownSummary) -> Vec<String> {
    let mut warnings = Vec::new();
    let unexplained = summary.unexplained;
    if unexplained.is_too_much() {
        warnings.push(format!(
            "the stages do not add up: {:.1} % of the time to first token is unexplained on average, {:.1} % for request {}; \
             up to {:.0} % is normal",
            unexplained.mean * 100.0,
            unexplained.worst * 100.0,
            unexplained.worst_request,
            TOLERANCE * 100.0,
        ));
    }
    let Some(remote) = &summary.remote else {
        return warnings;
    };
    if remote.used < remote.answered {
        let mut why: Vec<String> = Vec::new();
        if remote.recomputed > 0 {
            why.push(format!("the decode engine recomputed {}", remote.recomputed));
        }
        let others = remote
            .outcomes
            .iter()
            .filter(|(outcome, _)| !matches!(outcome.as_str(), "transferred" | "sent"));
        why.extend(others.map(|(outcome, count)| format!("{count} {outcome}")));
        warnings.push(format!(
            "only {} of {} requests used remote KV{}: {}; the others were not disaggregated",
            remote.used,
            remote.answered,
            evidence(remote),
            why.join(", "),
        ));
    }
    if remote.cached_share() > UNREMARKABLE_CACHE {
        warnings.push(format!(
            "{:.0} % of the prompt tokens were in the prefill engines' caches, so this run measured the cache: use another \
             `--seed`",
            remote.cached_share() * 100.0,
        ));
    }
    warnings
}

fn print_gpus(report: &Report, printer: Printer) {
    for gpu in &report.extras.gpus {
        printer.status(format_args!(
            "GPU {} ({}): utilisation {:.0} % (at most {:.0}), {:.0} W (at most {:.0}), {:.1} GiB (at most {:.1})",
            gpu.index,
            gpu.name,
            gpu.utilisation.mean,
            gpu.utilisation.max,
            gpu.power.mean,
            gpu.power.max,
            gpu.memory.mean / GIB,
            gpu.memory.max / GIB,
        ));
    }
    if let Some(joules) = gpus::joules_per_token(&report.extras.gpus, report.metrics.total_output_tokens) {
        printer.status(format_args!("{joules:.2} J of GPU energy per output token"));
    }
}

const GIB: f64 = (1_u64 << 30) as f64;
