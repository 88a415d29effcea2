//! Reads the events of one streamed answer. A plain token event is only scanned; every other event is parsed as JSON.

use std::time::Duration;

use memchr::memmem::Finder;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::Backend;
use crate::client::http::MAX_BYTES;
use crate::client::server_message;
use crate::client::sse::{EventTooLarge, SseDecoder};
use crate::record::{Answer, EngineTimes, ReadDelay};
use xpyd_base::http1::RxTimestamp;

/// Finish reasons that mean a failure. vLLM sends `abort` and `error`.
const FAILURES: [&str; 7] = [
    "abort",
    "aborted",
    "error",
    "failed",
    "cancelled",
    "canceled",
    "timeout",
];

/// Why a stream is not a complete answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("the server failed during the stream: {0}")]
    Server(String),
    #[error("the stream contains an event that is not a completion chunk")]
    Malformed(#[source] serde_json::Error),
    #[error(transparent)]
    TooLarge(#[from] EventTooLarge),
    #[error("the server ended the answer with `finish_reason` `{0}`")]
    Failed(String),
    #[error("the stream ended without a token")]
    NoToken,
    #[error("the stream ended early, without `[DONE]`")]
    Unfinished,
}

/// What to do with the text of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TextPolicy {
    /// Keep it for the report.
    Keep,
    /// Keep it if the server reports no token count, to count the tokens later.
    Count,
    /// Discard it.
    Drop,
}

/// Distinguishes plain token events from events that must be parsed.
///
/// It searches for quoted names. A quote within a text is escaped, so a match is a key or a whole value. Taking a value
/// for a key only costs a parse.
#[derive(Debug)]
pub(crate) struct Scanner {
    choices: Finder<'static>,
    error: Finder<'static>,
    usage: Finder<'static>,
    finish: Finder<'static>,
    role: Finder<'static>,
    token_ids: Finder<'static>,
    text: Finder<'static>,
    is_chat: bool,
    texts: TextPolicy,
}

impl Scanner {
    /// A scanner for one route. Texts that are kept need every event parsed.
    pub(crate) fn new(texts: TextPolicy, backend: Backend) -> Self {
        Self {
            choices: Finder::new(r#""choices""#),
            error: Finder::new(r#""error""#),
            usage: Finder::new(r#""usage""#),
            finish: Finder::new(r#""finish_reason""#),
            role: Finder::new(r#""role""#),
            token_ids: Finder::new(r#""token_ids""#),
            text: Finder::new(match backend {
                Backend::Completions => r#""text""#,
                Backend::Chat => r#""content""#,
            }),
            is_chat: backend == Backend::Chat,
            texts,
        }
    }

    /// Whether the event is a chunk with output and without usage, finish reason or error.
    fn is_plain(&self, event: &[u8]) -> bool {
        let value = |finder: &Finder<'_>| value_of(finder, event);
        let begins_list =
            |value: &[u8]| value.first() == Some(&b'[') && value[1..].trim_ascii_start().starts_with(b"{");
        let is_null = |value: &[u8]| value.starts_with(b"null");
        let mut ends = self.finish.find_iter(event);
        event.first() == Some(&b'{')
            && event.last() == Some(&b'}')
            && value(&self.choices).is_some_and(begins_list)
            && value(&self.error).is_none_or(is_null)
            && value(&self.usage).is_none_or(is_null)
            && ends.all(|at| is_null(value_after(&event[at + self.finish.needle().len()..])))
            // A chat chunk without content, such as the one that names the role, has no output.
            && (!self.is_chat
                || self.role.find(event).is_none() && value(&self.text).is_some_and(|value| value.starts_with(b"\"")))
    }

    /// The number of token ids in the event.
    fn tokens(&self, event: &[u8]) -> Option<u32> {
        let list = value_of(&self.token_ids, event)?.strip_prefix(b"[")?;
        let list = &list[..memchr::memchr(b']', list)?];
        let commas = memchr::memchr_iter(b',', list).count();
        let is_empty = list.trim_ascii().is_empty();
        u32::try_from(if is_empty { 0 } else { commas + 1 }).ok()
    }

    /// Appends the text of the event.
    fn add_text(&self, event: &[u8], text: &mut String) {
        let Some(value) = value_of(&self.text, event).filter(|value| value.starts_with(b"\"")) else {
            return;
        };
        let mut string = serde_json::Deserializer::from_slice(value);
        if let Ok(piece) = <std::borrow::Cow<'_, str>>::deserialize(&mut string) {
            text.push_str(&piece);
        }
    }
}

/// The value of a key, if the event has that key.
fn value_of<'event>(finder: &Finder<'_>, event: &'event [u8]) -> Option<&'event [u8]> {
    let at = finder.find(event)?;
    Some(value_after(&event[at + finder.needle().len()..]))
}

/// The value after a key; the same bytes if no colon follows.
fn value_after(rest: &[u8]) -> &[u8] {
    let rest = rest.trim_ascii_start();
    rest.strip_prefix(b":").unwrap_or(rest).trim_ascii_start()
}

/// Reads the events of one answer.
#[derive(Debug)]
pub(crate) struct ResponseReader<'client> {
    scanner: &'client Scanner,
    started: Instant,
    decoder: SseDecoder,
    events: Events,
    /// The current socket read, and its time since the start.
    read: Option<RxTimestamp>,
    last: Duration,
}

/// The state that the events have built so far.
#[derive(Debug, Default)]
struct Events {
    answer: Answer,
    has_token: bool,
    has_text: bool,
    /// The server marked the answer as complete: by `[DONE]` or a finish reason.
    is_done: bool,
    has_token_ids: bool,
    /// Output tokens so far, where the server counts them in each chunk.
    counted: u64,
    /// Chunks with output in the current read.
    in_read: u64,
}

/// The fields of a completion chunk that matter, for both routes.
#[derive(Debug, Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    metrics: Option<PerRequestMetrics>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    /// Unparsed, because the set of its keys matters.
    delta: Option<Map<String, Value>>,
    token_ids: Option<Vec<u64>>,
    finish_reason: Option<Value>,
}

impl Choice {
    /// Whether it has output, by vLLM's rule: a chat chunk that only names the role has none.
    fn has_output(&self) -> bool {
        let Some(delta) = &self.delta else {
            return true;
        };
        let output = [
            "content",
            "reasoning",
            "reasoning_content",
            "tool_calls",
            "function_call",
        ];
        let is_there = |key: &str| match delta.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(entries)) => !entries.is_empty(),
            Some(_) => true,
        };
        // A special token has an empty text and no role.
        let is_special = delta.get("content").is_some_and(|content| content == "") && !delta.contains_key("role");
        output.into_iter().any(is_there) || is_special
    }

    /// The text of either route. If the content is a list of parts, the texts of those parts that have one.
    fn text(&self) -> String {
        let content = self.delta.as_ref().and_then(|delta| delta.get("content"));
        match (&self.text, content) {
            (Some(text), _) | (None, Some(Value::String(text))) => text.clone(),
            (None, Some(Value::Array(parts))) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
            _ => String::new(),
        }
    }

    /// Whether it has a finish reason: an error if that reason means a failure.
    fn end(&self) -> Result<bool, AnswerError> {
        let reason = match &self.finish_reason {
            None | Some(Value::Null) => return Ok(false),
            Some(Value::String(reason)) => reason.as_str(),
            // SGLang sends an object that names its type.
            Some(other) => other["type"].as_str().unwrap_or_default(),
        };
        if FAILURES.iter().any(|failure| reason.eq_ignore_ascii_case(failure)) {
            return Err(AnswerError::Failed(reason.to_owned()));
        }
        Ok(true)
    }
}

/// vLLM's `PerRequestMetrics`, in milliseconds. The time to first token starts when the request leaves the queue.
#[derive(Debug, Deserialize)]
struct PerRequestMetrics {
    queue_time_ms: Option<f64>,
    time_to_first_token_ms: Option<f64>,
}

impl PerRequestMetrics {
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

impl<'client> ResponseReader<'client> {
    pub(crate) fn new(scanner: &'client Scanner, started: Instant) -> Self {
        Self {
            scanner,
            started,
            decoder: SseDecoder::new(MAX_BYTES),
            events: Events::default(),
            read: None,
            last: Duration::ZERO,
        }
    }

    /// Processes the bytes of one socket read.
    pub(crate) fn feed(&mut self, bytes: &[u8], timestamp: RxTimestamp) -> Result<(), AnswerError> {
        let received = timestamp.at.saturating_duration_since(self.started);
        // The pieces of one read have one timestamp.
        if self.read != Some(timestamp) {
            self.events.answer.read_delay.add(timestamp.waited);
            self.events.in_read = 0;
            self.read = Some(timestamp);
            self.last = received;
        }
        let (events, scanner) = (&mut self.events, self.scanner);
        let mut outcome = Ok(());
        self.decoder.feed(bytes, |name, event| {
            if outcome.is_ok() {
                outcome = events.take(scanner, name, event, received);
            }
        })?;
        if timestamp.waited.is_some_and(|waited| waited > ReadDelay::LATE) {
            self.events.answer.read_delay.merged += self.events.in_read.saturating_sub(1);
            self.events.in_read = self.events.in_read.min(1);
        }
        outcome
    }

    pub(crate) fn finish(mut self) -> Result<Answer, AnswerError> {
        let mut outcome = Ok(());
        self.decoder
            .finish(|name, event| outcome = self.events.take(self.scanner, name, event, self.last))?;
        outcome?;
        self.events.finish(self.scanner)
    }
}

impl Events {
    /// Processes one event. A chunk with output counts as a token even when its text is empty, as in vLLM, because a
    /// special token has no text.
    fn take(&mut self, scanner: &Scanner, name: &[u8], event: &[u8], received: Duration) -> Result<(), AnswerError> {
        if name == b"error" {
            let message = server_message(event).unwrap_or_else(|| "no message".to_owned());
            return Err(AnswerError::Server(message));
        }
        // Every event is parsed until the first text has arrived.
        if self.has_text && scanner.texts != TextPolicy::Keep && scanner.is_plain(event) {
            let tokens = self.has_token_ids.then(|| scanner.tokens(event)).flatten();
            if scanner.texts == TextPolicy::Count {
                scanner.add_text(event, &mut self.answer.text);
            }
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
        let choices = chunk.choices.unwrap_or_default();
        for choice in &choices {
            self.is_done |= choice.end()?;
        }
        if let Some(choice) = choices.into_iter().next().filter(Choice::has_output) {
            let ids = choice.token_ids.as_ref().map(|ids| ids.len() as u64);
            self.has_token_ids |= ids.is_some();
            let tokens = ids.or(counted.map(|counted| counted.saturating_sub(self.counted)));
            self.token(received, tokens.and_then(|tokens| u32::try_from(tokens).ok()));
            let text = choice.text();
            self.has_text |= !text.is_empty();
            if scanner.texts != TextPolicy::Drop {
                self.answer.text.push_str(&text);
            }
        }
        if let Some(metrics) = chunk.metrics {
            self.answer.timings.engine = metrics.times();
        }
        if let Some(usage) = chunk.usage {
            self.counted = counted.unwrap_or(self.counted);
            self.answer.prompt_tokens = usage.prompt_tokens;
            self.answer.completion_tokens = usage.completion_tokens;
        }
        Ok(())
    }

    /// Counts a chunk with output.
    fn token(&mut self, received: Duration, tokens: Option<u32>) {
        let answer = &mut self.answer;
        let chunks = answer.gaps.len() + usize::from(self.has_token);
        // The list covers all chunks or none: a missing entry would shift the entries after it.
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

    fn finish(mut self, scanner: &Scanner) -> Result<Answer, AnswerError> {
        if scanner.texts == TextPolicy::Count && self.answer.completion_tokens.is_some_and(|tokens| tokens > 0) {
            self.answer.text = String::new();
        }
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
