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
    /// When it could be sent: later than released if it waited for others (`max_concurrency`).
    pub admitted: Duration,
    /// When it was sent: right before its connection was made or, on one that was idle, right before it was written.
    pub started: Duration,
    /// What came back, or why nothing usable did, in one line.
    pub result: Result<Answer, String>,
}

/// A whole streamed answer. Times are since the request was sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// Until the first chunk with output was received: one with a choice that does not just name the role.
    pub first_token: Duration,
    /// Between each chunk with output and the one before.
    pub gaps: Vec<Duration>,
    /// Until the last chunk with output was received. The usage chunk and the end of the stream do not count.
    pub latency: Duration,
    /// Tokens of the prompt as the server counted them.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer as the server counted them.
    pub completion_tokens: Option<u64>,
    /// How long the connection took, which is part of all times; zero on a connection that was used before.
    pub connected: Duration,
    /// Tokens of each chunk with a choice, where the server told: by their ids, or by a count that runs along. Else empty.
    pub chunk_tokens: Vec<u32>,
    /// How late the answer was read, which is in none of its times where the kernel stamps what comes.
    pub backlog: Backlog,
    /// The text; empty unless it is kept, or still to be counted.
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

/// An engine's own times of one request: `metrics` of vLLM's last chunk, or of its whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineTimes {
    /// From its arrival in the scheduler until it was scheduled.
    pub queue: Duration,
    /// From there to its first token.
    pub first_token: Duration,
}

/// How long what came had to wait to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backlog {
    /// Reads that the kernel told of.
    pub reads: u64,
    /// Reads that it told nothing of; their times hold whatever wait there was.
    pub unknown: u64,
    /// Chunks that came out of one read with an earlier one after a wait of more than [`Backlog::LATE`]. They may have come
    /// apart, and then the gap between them is lost.
    pub merged: u64,
    /// The waits together.
    pub total: Duration,
    /// The longest wait.
    pub most: Duration,
}

/// How it is known which chunk held how many tokens. The order is that of trust, the most first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokenCount {
    /// There are as many chunks as tokens.
    OnePerChunk,
    /// The server told of every chunk.
    Told,
    /// Only the whole number is known, and spread evenly over the chunks.
    Spread,
}

/// What a run cost the client itself.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Effort {
    /// Threads that sent requests and read answers.
    pub threads: usize,
    /// The share of a core, 0 to 1, that the busiest of these threads used in the half second where it used most. 0 when
    /// the run was shorter.
    pub busiest: f64,
    /// What all threads of the process used.
    pub processor_time: Duration,
    /// How long the run took.
    pub wall_time: Duration,
    /// Cores that the process may use.
    pub cores: usize,
}

impl Record {
    /// How late the client was: in coming to the request, and in sending it once it could. Waits for others are none of it.
    pub fn release_lag(&self) -> Duration {
        self.released.saturating_sub(self.scheduled) + self.started.saturating_sub(self.admitted)
    }

    /// How long the request waited in the client for others to end.
    pub fn queue_time(&self) -> Duration {
        self.started.saturating_sub(self.released)
    }
}

impl Backlog {
    /// A wait that is long enough for a server to have sent more.
    pub const LATE: Duration = Duration::from_millis(1);

    /// Counts one more read.
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

    /// Of this answer and another one.
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

/// Each token's part of the gap before its chunk. A chunk without tokens adds its gap to the next one.
fn shared(gaps: impl Iterator<Item = f64>, chunk_tokens: &[u32]) -> Vec<f64> {
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
    /// Tokens of the answer: the server's count or a tokenizer's, else one per chunk.
    pub fn output_tokens(&self) -> u64 {
        match self.completion_tokens {
            None | Some(0) => 1 + self.gaps.len() as u64,
            Some(counted) => counted,
        }
    }

    /// Seconds per token after the first, of each token: the gap before its chunk, shared among the tokens of the chunk. And
    /// how well it is known which chunk held how many.
    pub fn token_gaps(&self) -> (Vec<f64>, TokenCount) {
        let chunks = self.gaps.len() + 1;
        let gaps = self.gaps.iter().map(Duration::as_secs_f64);
        let tokens = usize::try_from(self.output_tokens()).unwrap_or(usize::MAX);
        if self.chunk_tokens.len() == chunks {
            return (shared(gaps, &self.chunk_tokens), TokenCount::Told);
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
