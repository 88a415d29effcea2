//! The phases of a request in the report: names and lengths.

use super::run::{Request, Run};
use crate::latency_breakdown::Stage;
use crate::stats::percentile_of_sorted;

/// A phase of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestPhase {
    /// Waiting in the client for other requests to end.
    ClientQueue,
    /// A stage of the time to first token, if the server reported it.
    Stage(Stage),
    /// The time to first token, if the server reported no stages.
    Wait,
    /// From the first token to the last.
    Decoding,
}

/// Number of phases.
const COUNT: usize = Stage::ALL.len() + 3;

impl RequestPhase {
    /// All phases in the order of a request.
    pub(super) fn all() -> [Self; COUNT] {
        std::array::from_fn(|place| match place {
            0 => Self::ClientQueue,
            place if place <= Stage::ALL.len() => Self::Stage(Stage::ALL[place - 1]),
            place if place + 1 < COUNT => Self::Wait,
            _ => Self::Decoding,
        })
    }

    /// Its name for people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ClientQueue => "client queue",
            Self::Stage(stage) => stage.label(),
            Self::Wait => "until the first token",
            Self::Decoding => "later tokens",
        }
    }

    /// The CSS class, which is also the key of a stage in the result file.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::ClientQueue => "client_queue",
            Self::Stage(stage) => stage.key(),
            Self::Wait => "wait",
            Self::Decoding => "decoding",
        }
    }

    /// The length of the phase in a request, in seconds.
    pub(super) fn of(self, request: &Request) -> f64 {
        let timing = request.result.as_ref().ok();
        match (self, &request.reported) {
            (Self::ClientQueue, _) => request.queued,
            (Self::Decoding, _) => timing.map_or(0.0, |timing| timing.end() - timing.first_token),
            (Self::Wait, None) => request.first_token(),
            (Self::Stage(stage), Some(reported)) => reported.stages[stage as usize],
            (Self::Wait, Some(_)) | (Self::Stage(_), None) => 0.0,
        }
    }

    /// The phases with any length in the run.
    pub(super) fn used(run: &Run) -> Vec<Self> {
        let is_used = |phase: &Self| run.requests.iter().any(|request| phase.of(request) > 0.0);
        Self::all().into_iter().filter(is_used).collect()
    }

    /// Its lengths over answered requests, ascending.
    pub(super) fn lengths(self, run: &Run) -> Vec<f64> {
        let mut lengths: Vec<f64> = run.answered().map(|(request, _)| self.of(request)).collect();
        lengths.sort_unstable_by(f64::total_cmp);
        lengths
    }

    /// Its median over answered requests.
    pub(super) fn median(self, run: &Run) -> f64 {
        let lengths = self.lengths(run);
        if lengths.is_empty() {
            0.0
        } else {
            percentile_of_sorted(&lengths, 50.0)
        }
    }
}
