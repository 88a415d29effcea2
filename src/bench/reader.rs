//! What the events of one answer say, at the price of a scan: an event is parsed only where more is in it than a token.

use std::time::Duration;

use memchr::memmem::Finder;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;

use super::client::server_message;
use super::record::{Answer, Backlog, EngineTimes};
use super::sse::{Decoder, EventTooLarge};
use crate::wire::Receipt;

/// The most bytes of one event. A token with log-probabilities is a few kilobytes.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// Why a stream holds no whole answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    #[error("the server failed during the stream: {0}")]
    Server(String),
    #[error("the stream holds what is no completion chunk")]
    Malformed(#[source] serde_json::Error),
    #[error("the stream holds what is no completion chunk")]
    TooLarge(#[from] EventTooLarge),
    #[error("the stream ended without a token")]
    NoToken,
    #[error("the stream ended early, without `[DONE]`")]
    Unfinished,
}

/// Tells plain token events from those that must be parsed.
///
/// It looks for names between quotes. A quote within a text is escaped, so a name that is found is a key or a whole value;
/// taking a value for a key costs a parse and nothing else.
#[derive(Debug)]
pub(super) struct Scanner {
    choices: Finder<'static>,
    error: Finder<'static>,
    usage: Finder<'static>,
    token_ids: Finder<'static>,
    keep_text: bool,
}

impl Scanner {
    /// `keep_text` has every event parsed.
    pub(super) fn new(keep_text: bool) -> Self {
        Self {
            choices: Finder::new(r#""choices""#),
            error: Finder::new(r#""error""#),
            usage: Finder::new(r#""usage""#),
            token_ids: Finder::new(r#""token_ids""#),
            keep_text,
        }
    }

    /// Whether the event is a chunk with a choice, and neither tells of usage nor of an error.
    fn is_plain(&self, event: &[u8]) -> bool {
        let value = |finder: &Finder<'_>| {
            finder
                .find(event)
                .map(|at| value_after(&event[at + finder.needle().len()..]))
        };
        let begins_list =
            |value: &[u8]| value.first() == Some(&b'[') && value[1..].trim_ascii_start().starts_with(b"{");
        let is_null = |value: &[u8]| value.starts_with(b"null");
        event.first() == Some(&b'{')
            && event.last() == Some(&b'}')
            && value(&self.choices).is_some_and(begins_list)
            && value(&self.error).is_none_or(is_null)
            && value(&self.usage).is_none_or(is_null)
    }

    /// How many token ids the event holds.
    fn tokens(&self, event: &[u8]) -> Option<u32> {
        let at = self.token_ids.find(event)?;
        let list = value_after(&event[at + self.token_ids.needle().len()..]).strip_prefix(b"[")?;
        let list = &list[..memchr::memchr(b']', list)?];
        let commas = memchr::memchr_iter(b',', list).count();
        let is_empty = list.trim_ascii().is_empty();
        u32::try_from(if is_empty { 0 } else { commas + 1 }).ok()
    }
}

/// The value of a key, given what follows the key; the same bytes if there is no colon.
fn value_after(rest: &[u8]) -> &[u8] {
    let rest = rest.trim_ascii_start();
    rest.strip_prefix(b":").unwrap_or(rest).trim_ascii_start()
}

/// Follows the events of one answer.
#[derive(Debug)]
pub(super) struct Reader<'client> {
    scanner: &'client Scanner,
    started: Instant,
    decoder: Decoder,
    events: Events,
    /// The read that is being taken in, and when it came, since the start.
    read: Option<Receipt>,
    last: Duration,
}

/// What the events said so far.
#[derive(Debug, Default)]
struct Events {
    answer: Answer,
    has_token: bool,
    is_done: bool,
    tells_ids: bool,
    /// The server's count that runs along.
    counted: u64,
    /// Chunks with a choice in the read that is being taken in.
    in_read: u64,
}

/// The parts of a completion chunk that count, of both routes.
#[derive(Debug, Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    metrics: Option<EngineMetrics>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    token_ids: Option<Vec<u64>>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
}

/// vLLM's `PerRequestMetrics`, in milliseconds. Its time to the first token begins where the queue ends.
#[derive(Debug, Deserialize)]
struct EngineMetrics {
    queue_time_ms: Option<f64>,
    time_to_first_token_ms: Option<f64>,
}

impl EngineMetrics {
    fn times(&self) -> Option<EngineTimes> {
        let duration = |milliseconds: Option<f64>| Duration::try_from_secs_f64(milliseconds? / 1000.0).ok();
        Some(EngineTimes {
            queue: duration(self.queue_time_ms)?,
            first_token: duration(self.time_to_first_token_ms)?,
        })
    }
}

#[derive(Debug, Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

impl<'client> Reader<'client> {
    pub(super) fn new(scanner: &'client Scanner, started: Instant) -> Self {
        Self {
            scanner,
            started,
            decoder: Decoder::new(MAX_EVENT_BYTES),
            events: Events::default(),
            read: None,
            last: Duration::ZERO,
        }
    }

    /// Takes bytes that came in one read.
    pub(super) fn feed(&mut self, bytes: &[u8], receipt: Receipt) -> Result<(), AnswerError> {
        let received = receipt.at.saturating_duration_since(self.started);
        // The pieces of one read have one receipt.
        if self.read != Some(receipt) {
            self.events.answer.backlog.add(receipt.waited);
            self.events.in_read = 0;
            self.read = Some(receipt);
            self.last = received;
        }
        let (events, scanner) = (&mut self.events, self.scanner);
        let mut outcome = Ok(());
        self.decoder.feed(bytes, |event| {
            if outcome.is_ok() {
                outcome = events.take(scanner, event, received);
            }
        })?;
        if receipt.waited.is_some_and(|waited| waited > Backlog::LATE) {
            self.events.answer.backlog.merged += self.events.in_read.saturating_sub(1);
            self.events.in_read = self.events.in_read.min(1);
        }
        outcome
    }

    pub(super) fn finish(mut self) -> Result<Answer, AnswerError> {
        let mut outcome = Ok(());
        self.decoder
            .finish(|event| outcome = self.events.take(self.scanner, event, self.last))?;
        outcome?;
        self.events.finish()
    }
}

impl Events {
    /// Takes one event. A chunk with a choice counts as a token even when its text is empty, as in vLLM: a special token
    /// has none, and so has the chunk of a chat that names the role.
    fn take(&mut self, scanner: &Scanner, event: &[u8], received: Duration) -> Result<(), AnswerError> {
        // Until text has come every event is parsed, to find the first one that has some.
        if self.answer.first_text.is_some() && !scanner.keep_text && scanner.is_plain(event) {
            let tokens = self.tells_ids.then(|| scanner.tokens(event)).flatten();
            self.token(received, tokens);
            return Ok(());
        }
        if event == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(event).map_err(AnswerError::Malformed)?;
        if chunk.error.is_some_and(|error| !error.is_null()) {
            let message = server_message(event).unwrap_or_else(|| "no message".to_owned());
            return Err(AnswerError::Server(message));
        }
        let counted = chunk.usage.as_ref().and_then(|usage| usage.completion_tokens);
        if let Some(choice) = chunk.choices.into_iter().flatten().next() {
            let ids = choice.token_ids.map(|ids| ids.len() as u64);
            self.tells_ids |= ids.is_some();
            let tokens = ids.or(counted.map(|counted| counted.saturating_sub(self.counted)));
            self.token(received, tokens.and_then(|tokens| u32::try_from(tokens).ok()));
            let text = choice
                .text
                .or(choice.delta.and_then(|delta| delta.content))
                .unwrap_or_default();
            if !text.is_empty() && self.answer.first_text.is_none() {
                self.answer.first_text = Some(received);
            }
            if scanner.keep_text {
                self.answer.text.push_str(&text);
            }
        }
        if let Some(metrics) = chunk.metrics {
            self.answer.told.engine = metrics.times();
        }
        if let Some(usage) = chunk.usage {
            self.counted = counted.unwrap_or(self.counted);
            self.answer.prompt_tokens = usage.prompt_tokens;
            self.answer.completion_tokens = usage.completion_tokens;
        }
        Ok(())
    }

    /// Counts a chunk with a choice.
    fn token(&mut self, received: Duration, tokens: Option<u32>) {
        let answer = &mut self.answer;
        let chunks = answer.gaps.len() + usize::from(self.has_token);
        // The list is for all chunks or for none: a gap in it would shift what follows.
        match tokens {
            Some(tokens) if answer.chunk_tokens.len() == chunks => answer.chunk_tokens.push(tokens),
            _ => answer.chunk_tokens.clear(),
        }
        if self.has_token {
            answer.gaps.push(received.saturating_sub(answer.latency));
        } else {
            answer.first_token = received;
            self.has_token = true;
        }
        answer.latency = received;
        self.in_read += 1;
    }

    fn finish(self) -> Result<Answer, AnswerError> {
        if !self.has_token {
            Err(AnswerError::NoToken)
        } else if !self.is_done {
            Err(AnswerError::Unfinished)
        } else {
            Ok(self.answer)
        }
    }
}

#[cfg(test)]
mod tests;
