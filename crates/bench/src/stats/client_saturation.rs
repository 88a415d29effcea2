//! Checks whether the client limited the measurement. Pure.
//!
//! A run is invalid if the client sent late by more than 5 % of the measured latency, if a client thread had no spare
//! core, or if late reads lost gaps between chunks. The load of the machine itself is only a note, because it is part
//! of a benchmark on that machine.

use serde_json::{Value, json};

use crate::record::{ClientUsage, ReadDelay, Record};
use crate::report::{MissingUsage, Report};
use crate::stats::{Distribution, Metric};

/// Largest send lag, as a share of the median time to first token.
const LAG_SHARE: f64 = 0.05;
/// Smallest lag that counts, in milliseconds. Below it only the kernel's scheduler matters.
const LEAST_LAG: f64 = 1.0;
/// Lag that always counts if requests have a schedule, in milliseconds: beyond it the load is different.
const MOST_LAG: f64 = 10.0;
/// CPU share of a thread above which it can fall behind.
const BUSY_THREAD: f64 = 0.8;
/// Largest share of chunks whose gaps can be lost.
const MERGED_SHARE: f64 = 0.01;
/// CPU use of the machine above which processes wait for a core.
const BUSY_MACHINE: f64 = 0.9;
/// Largest share of CPU time that other virtual machines can take.
const STOLEN: f64 = 0.02;

/// The CPU use of the machine during a run, as shares of all CPU time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MachineUse {
    /// Share in use.
    pub busy: f64,
    /// Share that other virtual machines took (steal time).
    pub stolen: f64,
}

/// Whether the numbers of a run are those of the server.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientValidity {
    /// Why the run is invalid; empty if it is valid.
    pub reasons: Vec<String>,
    /// Remarks that do not make the run invalid.
    pub notes: Vec<String>,
    /// Send lag in milliseconds, with P50, P99 and maximum.
    pub lag: Distribution,
    /// Delay between the arrival of data and its read.
    pub read_delay: ReadDelay,
    /// CPU use of the client.
    pub client_usage: ClientUsage,
    /// Number of opened connections.
    pub connections: usize,
    /// Mean time to connect, in milliseconds. It is part of the time to first token, as in vLLM's client.
    pub connecting: f64,
}

impl ClientValidity {
    /// Checks a run.
    pub fn of(report: &Report) -> Self {
        let answers = || report.records.iter().filter_map(|record| record.result.as_ref().ok());
        let connected: Vec<f64> = answers()
            .map(|answer| answer.connected.as_secs_f64() * 1e3)
            .filter(|connected| *connected > 0.0)
            .collect();
        let read_delay = answers().fold(ReadDelay::default(), |sum, answer| sum.and(answer.read_delay));
        let chunks = answers().map(|answer| answer.gaps.len() as u64 + 1).sum();
        let mut validity = Self {
            reasons: Vec::new(),
            notes: Vec::new(),
            lag: report.release_lag(),
            read_delay,
            client_usage: report.client_usage,
            connections: connected.len(),
            connecting: connected.iter().sum::<f64>() / connected.len().max(1) as f64,
        };
        let median = |metric| report.metrics.latency(metric).map_or(0.0, |latency| latency.median);
        // Chunks that arrive within 1 ms of each other are read together by any client.
        if median(Metric::Itl) < ReadDelay::LATE.as_secs_f64() * 1e3 {
            validity.read_delay.merged = 0;
        }
        let is_scheduled = report.spec.arrivals.request_rate.is_finite();
        validity.judge(median(Metric::Ttft), chunks, is_scheduled);
        validity.annotate(report.extras.machine, &report.records);
        validity
            .notes
            .extend(report.extras.missing_usage.map(MissingUsage::note));
        validity
    }

    /// How to fix an invalid run.
    pub const ADVICE: &str = "free a core for the client, run it on another machine, or measure longer answers";

    /// Whether the run is valid.
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
        if self.client_usage.busiest > BUSY_THREAD {
            self.reasons.push(format!(
                "a thread of this client used {:.0} % of its core at times, and {:.0} % are the most at which it surely \
                 keeps up",
                self.client_usage.busiest * 100.0,
                BUSY_THREAD * 100.0
            ));
        }
        let merged = self.read_delay.merged as f64 / (chunks as f64).max(1.0);
        if merged > MERGED_SHARE {
            self.reasons.push(format!(
                "{:.1} % of the chunks were read late and together with others, so that the gaps before them are lost",
                merged * 100.0
            ));
        }
    }

    fn annotate(&mut self, machine: Option<MachineUse>, records: &[Record]) {
        // The kernel starts to timestamp a moment after the first request for it.
        if self.read_delay.unknown * 20 > self.read_delay.reads && !records.is_empty() {
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
                self.cores_used() / (self.client_usage.cores as f64 * machine.busy) * 100.0
            ));
        }
    }

    /// Mean number of cores that the client used.
    pub fn cores_used(&self) -> f64 {
        self.client_usage.processor_time.as_secs_f64() / self.client_usage.wall_time.as_secs_f64().max(1e-9)
    }

    /// Mean delay between arrival and read, in milliseconds.
    pub fn mean_wait(&self) -> f64 {
        self.read_delay.total.as_secs_f64() * 1e3 / (self.read_delay.reads as f64).max(1.0)
    }

    /// The object `xpyd.client` of the result file.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "threads": self.client_usage.threads,
            "busiest_thread_share": self.client_usage.busiest,
            "cores_used": self.cores_used(),
            "cores": self.client_usage.cores,
            "reads": self.read_delay.reads,
            "reads_without_receipt": self.read_delay.unknown,
            "wait_to_be_read_ms": {"mean": self.mean_wait(), "max": self.read_delay.most.as_secs_f64() * 1e3},
            "chunks_merged_late": self.read_delay.merged,
            "connections": self.connections,
            "connect_ms": self.connecting,
        })
    }
}

#[cfg(test)]
mod tests;
