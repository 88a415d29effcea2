//! Whether a run may be believed: what the client itself added to what it measured. Pure.
//!
//! A run is invalid when the client was late to send by more than a twentieth of what it measured, when one of its threads
//! had no core left, or when it read so late that gaps are lost. What the machine was doing besides is a note: it is part
//! of what a benchmark on the same machine measures.

use serde_json::{Value, json};

use crate::bench::record::{Backlog, Effort, Record};
use crate::bench::report::{Report, Uncounted};
use crate::bench::stats::{Distribution, Metric};

/// The most that requests may leave late, as a share of the median time to first token.
const LAG_SHARE: f64 = 0.05;
/// The least lag that counts, in milliseconds. Below it the kernel alone decides when a thread runs.
const LEAST_LAG: f64 = 1.0;
/// The lag that always counts where requests have a schedule, in milliseconds: beyond it the load is another one.
const MOST_LAG: f64 = 10.0;
/// The share of a core beyond which a thread cannot be said to have kept up.
const BUSY_THREAD: f64 = 0.8;
/// The share of chunks whose gaps may be lost.
const MERGED_SHARE: f64 = 0.01;
/// The share of the machine's time in use beyond which somebody waits for a core.
const BUSY_MACHINE: f64 = 0.9;
/// The share of time that other virtual machines may take.
const STOLEN: f64 = 0.02;

/// How the machine's cores spent the time of a run, as shares of all of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MachineUse {
    /// Somebody ran on them.
    pub busy: f64,
    /// The machine is virtual, and others ran on them.
    pub stolen: f64,
}

/// Whether a run may be believed.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Why not; it may be if there is none.
    pub reasons: Vec<String>,
    /// What to know about its numbers.
    pub notes: Vec<String>,
    /// How late requests left, in milliseconds; with P50, P99 and the most.
    pub lag: Distribution,
    /// How late answers were read.
    pub backlog: Backlog,
    /// What it cost the client.
    pub effort: Effort,
    /// Connections that were made.
    pub connections: usize,
    /// How long they took on average, in milliseconds. It is part of the time to first token, as it is in vLLM's client.
    pub connecting: f64,
}

impl Verdict {
    /// On a run.
    pub fn on(report: &Report) -> Self {
        let answers = || report.records.iter().filter_map(|record| record.result.as_ref().ok());
        let connected: Vec<f64> = answers()
            .map(|answer| answer.connected.as_secs_f64() * 1e3)
            .filter(|connected| *connected > 0.0)
            .collect();
        let backlog = answers().fold(Backlog::default(), |sum, answer| sum.and(answer.backlog));
        let chunks = answers().map(|answer| answer.gaps.len() as u64 + 1).sum();
        let mut verdict = Self {
            reasons: Vec::new(),
            notes: Vec::new(),
            lag: report.release_lag(),
            backlog,
            effort: report.effort,
            connections: connected.len(),
            connecting: connected.iter().sum::<f64>() / connected.len().max(1) as f64,
        };
        let median = |metric| report.metrics.latency(metric).map_or(0.0, |latency| latency.median);
        // Chunks that come closer than a late read is late would be read together by anybody.
        if median(Metric::Itl) < Backlog::LATE.as_secs_f64() * 1e3 {
            verdict.backlog.merged = 0;
        }
        let is_scheduled = report.spec.arrivals.request_rate.is_finite();
        verdict.judge(median(Metric::Ttft), chunks, is_scheduled);
        verdict.annotate(report.beside.machine, &report.records);
        verdict.notes.extend(report.beside.uncounted.map(Uncounted::note));
        verdict
    }

    /// What to do about a run that may not be believed.
    pub const ADVICE: &str = "free a core for the client, run it on another machine, or measure longer answers";

    /// Whether the numbers may be believed.
    pub fn is_valid(&self) -> bool {
        self.reasons.is_empty()
    }

    fn judge(&mut self, ttft: f64, chunks: u64, is_scheduled: bool) {
        let lag = self.lag.percentiles.get(1).map_or(0.0, |(_, value)| *value);
        let limit = (LAG_SHARE * ttft).max(LEAST_LAG);
        let limit = if is_scheduled { limit.min(MOST_LAG) } else { limit };
        if ttft > 0.0 && lag > limit {
            self.reasons.push(format!(
                "requests left this client up to {lag:.1} ms late (P99), and {limit:.1} ms are the most that a median time \
                 to first token of {ttft:.1} ms allows"
            ));
        }
        if self.effort.busiest > BUSY_THREAD {
            self.reasons.push(format!(
                "a thread of this client used {:.0} % of its core at times, and {:.0} % are the most at which it surely \
                 keeps up",
                self.effort.busiest * 100.0,
                BUSY_THREAD * 100.0
            ));
        }
        let merged = self.backlog.merged as f64 / (chunks as f64).max(1.0);
        if merged > MERGED_SHARE {
            self.reasons.push(format!(
                "{:.1} % of the chunks were read late and together with others, so that the gaps before them are lost",
                merged * 100.0
            ));
        }
    }

    fn annotate(&mut self, machine: Option<MachineUse>, records: &[Record]) {
        // The kernel begins to stamp a moment after it was asked for the first time.
        if self.backlog.unknown * 20 > self.backlog.reads && !records.is_empty() {
            self.notes.push(
                "the kernel did not say when answers arrived, so times end when they were read and hold this client's own \
                 delay"
                    .to_owned(),
            );
        }
        let Some(machine) = machine else { return };
        if machine.stolen > STOLEN {
            self.notes.push(format!(
                "other virtual machines took {:.0} % of this one's time during the run",
                machine.stolen * 100.0
            ));
        }
        if machine.busy > BUSY_MACHINE {
            self.notes.push(format!(
                "this machine's cores were {:.0} % busy during the run, {:.0} % of it this client's doing",
                machine.busy * 100.0,
                self.cores_used() / (self.effort.cores as f64 * machine.busy) * 100.0
            ));
        }
    }

    /// Cores that the client used on average.
    pub fn cores_used(&self) -> f64 {
        self.effort.processor_time.as_secs_f64() / self.effort.wall_time.as_secs_f64().max(1e-9)
    }

    /// How long what came waited to be read, on average, in milliseconds.
    pub fn mean_wait(&self) -> f64 {
        self.backlog.total.as_secs_f64() * 1e3 / (self.backlog.reads as f64).max(1.0)
    }

    /// What stands under `xpyd.client` in the result file.
    pub(in crate::bench) fn to_json(&self) -> Value {
        json!({
            "threads": self.effort.threads,
            "busiest_thread_share": self.effort.busiest,
            "cores_used": self.cores_used(),
            "cores": self.effort.cores,
            "reads": self.backlog.reads,
            "reads_without_receipt": self.backlog.unknown,
            "wait_to_be_read_ms": {"mean": self.mean_wait(), "max": self.backlog.most.as_secs_f64() * 1e3},
            "chunks_merged_late": self.backlog.merged,
            "connections": self.connections,
            "connect_ms": self.connecting,
        })
    }
}

#[cfg(test)]
mod tests;
