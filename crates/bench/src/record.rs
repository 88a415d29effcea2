//! The record of one finished request. Plain values: `load` and `client` write them, `stats` reads them.

use std::time::Duration;

/// A finished request. Times are since the start of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Index in the workload, from 0.
    pub index: usize,
    /// Scheduled release time.
    pub scheduled: Duration,
    /// Actual release time. The difference to `scheduled` is the client's lag.
    pub released: Duration,
    /// Time at which it could be sent: later than `released` if it waited for other requests (`max_concurrency`).
    pub admitted: Duration,
    /// Time of sending: right before its connection was opened or, on an idle connection, right before it was written.
    pub started: Duration,
    /// The answer, or the error in one line.
    pub result: Result<Answer, String>,
}

/// A complete streamed answer. Times are since the request was sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// Time to the first chunk with output: one with a choice that does not only name the role.
    pub first_token: Duration,
    /// Gap before each further chunk with output.
    pub gaps: Vec<Duration>,
    /// Time to the last chunk with output. The usage chunk and the end of the stream do not count.
    pub latency: Duration,
    /// Prompt tokens as counted by the server.
    pub prompt_tokens: Option<u64>,
    /// Answer tokens as counted by the server.
    pub completion_tokens: Option<u64>,
    /// Time to connect, which is part of all times; zero on a reused connection.
    pub connected: Duration,
    /// Tokens of each chunk with a choice, if the server reported them by ids or by a running count. Else empty.
    pub chunk_tokens: Vec<u32>,
    /// Delay between the arrival of data and its read. It is not part of the times where the kernel timestamps data.
    pub read_delay: ReadDelay,
    /// The text; empty unless it is kept or its tokens must still be counted.
    pub text: String,
    /// Timings that the server reported in headers and chunks.
    pub timings: ServerTimings,
}

/// Timings that xpyd's proxy and some other servers report with an answer. Empty if they report none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerTimings {
    /// `x-xpyd-handoff`: the outcome of the hand-off.
    pub handoff: Option<String>,
    /// `Server-Timing`: the length of each stage before the answer.
    pub timing: Option<String>,
    /// Times that the engine reports with `--enable-per-request-metrics`.
    pub engine: Option<EngineTimes>,
}

/// The engine's times of one request: `metrics` in vLLM's last chunk or in its whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineTimes {
    /// From arrival in the scheduler to being scheduled.
    pub queue: Duration,
    /// From being scheduled to the first token.
    pub first_token: Duration,
}

/// Delay between the arrival of data and its read by the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReadDelay {
    /// Reads with a kernel timestamp.
    pub reads: u64,
    /// Reads without one; their times include the delay.
    pub unknown: u64,
    /// Chunks that were read together with an earlier one after a delay of more than [`ReadDelay::LATE`]. If they
    /// arrived separately, the gap between them is lost.
    pub merged: u64,
    /// Sum of all delays.
    pub total: Duration,
    /// Longest delay.
    pub most: Duration,
}

/// How the tokens of each chunk were counted, in decreasing order of trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokenCount {
    /// As many chunks as tokens.
    OnePerChunk,
    /// Reported by the server for every chunk.
    Reported,
    /// Only the total is known; it is spread evenly over the chunks.
    Spread,
}

/// CPU use of the client during a run.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ClientUsage {
    /// Number of worker threads.
    pub threads: usize,
    /// Highest share of a core, 0 to 1, that a worker thread used in any half second. 0 for a shorter run.
    pub busiest: f64,
    /// CPU time of all threads of the process.
    pub processor_time: Duration,
    /// Length of the run.
    pub wall_time: Duration,
    /// Cores available to the process.
    pub cores: usize,
}

impl Record {
    /// The client's lag: the delay of the release, and of sending after admission. Waiting for other requests does not
    /// count.
    pub fn release_lag(&self) -> Duration {
        self.released.saturating_sub(self.scheduled) + self.started.saturating_sub(self.admitted)
    }

    /// Time that the request waited in the client for others to end.
    pub fn queue_time(&self) -> Duration {
        self.started.saturating_sub(self.released)
    }
}

impl ReadDelay {
    /// A delay long enough for a server to have sent another chunk.
    pub const LATE: Duration = Duration::from_millis(1);

    /// Counts one read.
    pub(super) fn add(&mut self, waited: Option<Duration>) {
        match waited {
            None => self.unknown += 1,
            Some(waited) => {
                self.reads += 1;
                self.total += waited;
                self.most = self.most.max(waited);
            }
        }
    }

    /// The sum of two.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            reads: self.reads + other.reads,
            unknown: self.unknown + other.unknown,
            merged: self.merged + other.merged,
            total: self.total + other.total,
            most: self.most.max(other.most),
        }
    }
}

/// Splits the gap before each chunk among its tokens. A chunk without tokens adds its gap to the next one.
fn split_gaps(gaps: impl Iterator<Item = f64>, chunk_tokens: &[u32]) -> Vec<f64> {
    let mut shared = Vec::new();
    let mut waited = 0.0;
    let mut has_token = chunk_tokens[0] > 0;
    for (gap, &tokens) in gaps.zip(&chunk_tokens[1..]) {
        waited += gap;
        if tokens == 0 {
            continue;
        }
        if has_token {
            shared.extend(std::iter::repeat_n(waited / f64::from(tokens), tokens as usize));
        }
        has_token = true;
        waited = 0.0;
    }
    shared
}

impl Answer {
    /// Answer tokens: the count of the server or a tokenizer, else one per chunk.
    pub fn output_tokens(&self) -> u64 {
        match self.completion_tokens {
            None | Some(0) => 1 + self.gaps.len() as u64,
            Some(counted) => counted,
        }
    }

    /// The gap of each token after the first, in seconds: the gap before its chunk, split among the tokens of the
    /// chunk. Also returns how the tokens were counted.
    pub fn token_gaps(&self) -> (Vec<f64>, TokenCount) {
        let chunks = self.gaps.len() + 1;
        let gaps = self.gaps.iter().map(Duration::as_secs_f64);
        let tokens = usize::try_from(self.output_tokens()).unwrap_or(usize::MAX);
        if self.chunk_tokens.len() == chunks {
            return (split_gaps(gaps, &self.chunk_tokens), TokenCount::Reported);
        }
        if tokens == chunks {
            return (gaps.collect(), TokenCount::OnePerChunk);
        }
        let per_chunk = tokens.saturating_sub(1).max(1) as f64 / self.gaps.len().max(1) as f64;
        (gaps.map(|gap| gap / per_chunk).collect(), TokenCount::Spread)
    }

    /// Seconds per output token after the first. `None` for an answer of one token.
    pub fn time_per_output_token(&self) -> Option<f64> {
        let later_tokens = self.output_tokens() - 1;
        let decoding = self.latency.as_secs_f64() - self.first_token.as_secs_f64();
        (later_tokens > 0).then(|| decoding / later_tokens as f64)
    }
}
