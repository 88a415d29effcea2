//! What is known of one request after it has ended. Plain values: `load` and `client` write them, `stats` reads them.

use std::time::Duration;

/// One request that has ended. Instants are since the start of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its place in the workload, from 0.
    pub index: usize,
    /// When the schedule wanted it out.
    pub scheduled: Duration,
    /// When the client came to it: later than scheduled by the client's own lag.
    pub released: Duration,
    /// When it was sent: later than released if it waited for others (`max_concurrency`).
    pub started: Duration,
    /// What came back, or why nothing usable did, in one line.
    pub result: Result<Answer, String>,
}

/// A whole streamed answer. Times are since the request was sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// Until the first chunk with a choice was received.
    pub first_token: Duration,
    /// Between each chunk with a choice and the one before.
    pub gaps: Vec<Duration>,
    /// Until the last chunk with a choice was received. The usage chunk and the end of the stream do not count.
    pub latency: Duration,
    /// Tokens of the prompt as the server counted them.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer as the server counted them.
    pub completion_tokens: Option<u64>,
    /// The text; empty unless it is kept.
    pub text: String,
    /// What the server told of the request in the headers of its answer.
    pub told: Told,
}

/// What xpyd's proxy, and some other servers, tell of a request in the headers of its answer. Empty where they do not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Told {
    /// `x-xpyd-handoff`: what became of the hand-off.
    pub handoff: Option<String>,
    /// `Server-Timing`: how long the stages took until the answer began.
    pub timing: Option<String>,
    /// What the engine that answered says of the request, with `--enable-per-request-metrics`.
    pub engine: Option<EngineTimes>,
}

/// An engine's own times of one request: `metrics` of vLLM 0.32's last chunk, or of its whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineTimes {
    /// From its arrival in the scheduler until it was scheduled.
    pub queue: Duration,
    /// From there to its first token.
    pub first_token: Duration,
}

impl Record {
    /// How late the client was.
    pub fn release_lag(&self) -> Duration {
        self.released.saturating_sub(self.scheduled)
    }

    /// How long the request waited in the client for others to end.
    pub fn queue_time(&self) -> Duration {
        self.started.saturating_sub(self.released)
    }
}

impl Answer {
    /// Tokens of the answer: the server's count, else one per chunk.
    pub fn output_tokens(&self) -> u64 {
        match self.completion_tokens {
            None | Some(0) => 1 + self.gaps.len() as u64,
            Some(counted) => counted,
        }
    }

    /// Seconds per output token after the first. `None` for an answer of one token.
    pub fn time_per_output_token(&self) -> Option<f64> {
        let later_tokens = self.output_tokens() - 1;
        let decoding = self.latency.as_secs_f64() - self.first_token.as_secs_f64();
        (later_tokens > 0).then(|| decoding / later_tokens as f64)
    }
}
