//! One generated sequence: sampling, text and end. Pure; the scheduler drives it.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::engine_core::tokens::{END_OF_TURN, KvState, decode_into, mix};
use crate::kv::blocks::Blocks;
use crate::kv::params::Transfer;

/// The difference between the probabilities of two tokens that are equally likely up to rounding.
const EQUALLY_LIKELY: f64 = 0.01;

/// How a sequence is sampled and when it ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sampling {
    /// Most tokens to generate; at least 1.
    pub(crate) max_tokens: usize,
    /// Fewest tokens before a natural end.
    pub(crate) min_tokens: usize,
    /// Whether only `max_tokens` and stop strings end it.
    pub(crate) ignore_eos: bool,
    /// Stop strings.
    pub(crate) stop: Vec<String>,
    /// Stop tokens.
    pub(crate) stop_token_ids: Vec<u32>,
    /// Whether the stop string stays in the text.
    pub(crate) include_stop: bool,
    /// Mixed into every draw; 0 for greedy sampling.
    pub(crate) salt: u64,
    /// Number of alternatives per token; `None` reports no probabilities.
    pub(crate) logprobs: Option<u32>,
    /// The token sequences that a grammar allows; `None` allows all.
    pub(crate) allowed: Option<Arc<[Vec<u32>]>>,
}

impl Sampling {
    /// The salt of choice number `choice`. Greedy choices are all equal.
    pub(crate) fn salt_of(temperature: f64, seed: Option<i64>, choice: usize) -> u64 {
        if temperature == 0.0 || (seed.is_none() && choice == 0) {
            return 0;
        }
        mix(seed.unwrap_or_default().cast_unsigned(), choice as u64) | 1
    }
}

/// A request for one sequence from the API to the scheduler.
#[derive(Debug)]
pub(crate) struct Request {
    /// The engine's request id: `cmpl-<base>-<index>-<8 hex>`.
    pub(crate) id: String,
    /// Its index among the sequences of the client's request.
    pub(crate) index: usize,
    /// The prompt.
    pub(crate) prompt: Arc<[u32]>,
    /// Sampling settings.
    pub(crate) sampling: Sampling,
    /// Whether to report every token or only the complete output.
    pub(crate) stream: bool,
    /// Its KV transfer.
    pub(crate) transfer: Transfer,
    /// Cache salt: only requests with the same salt share cached KV.
    pub(crate) cache_salt: Option<String>,
    /// The channel of its outputs. Closed when the client disconnects.
    pub(crate) output: mpsc::Sender<Output>,
}

/// The probability of one token.
#[derive(Debug, Clone)]
pub(crate) struct TokenLogprob {
    /// The token.
    pub(crate) token: u32,
    /// Its log probability.
    pub(crate) logprob: f64,
    /// The best alternatives, itself first.
    pub(crate) top: Vec<(u32, f64)>,
}

/// A partial output of one sequence.
#[derive(Debug)]
pub(crate) struct Output {
    /// The request's [`Request::index`].
    pub(crate) index: usize,
    /// Text since the last output.
    pub(crate) text: String,
    /// Tokens since the last output.
    pub(crate) tokens: Vec<u32>,
    /// Their probabilities, if requested.
    pub(crate) logprobs: Vec<TokenLogprob>,
    /// Set on the last output.
    pub(crate) end: Option<SequenceEnd>,
}

/// How a sequence ended.
#[derive(Debug)]
pub(crate) enum SequenceEnd {
    /// With an answer.
    Finished(Finish),
    /// With HTTP status 500, as after a failed KV load.
    Failed,
}

/// A complete answer.
#[derive(Debug)]
pub(crate) struct Finish {
    /// `length`, `stop` or `abort`.
    pub(crate) reason: &'static str,
    /// The stop string or stop token.
    pub(crate) stop_reason: Value,
    /// `kv_transfer_params` of the answer.
    pub(crate) kv_transfer_params: Value,
    /// Prompt tokens that were not computed here.
    pub(crate) cached_tokens: usize,
    /// Its times; `None` without a token.
    pub(crate) times: Option<Box<Times>>,
}

/// The times of a sequence.
#[derive(Debug, Clone)]
pub(crate) struct Times {
    /// Time until it was scheduled, including a KV transfer.
    pub(crate) queue: Duration,
    /// From there to its first token.
    pub(crate) first_token: Duration,
    /// From there to its last token.
    pub(crate) generation: Duration,
    made: usize,
}

impl Times {
    /// vLLM 0.32's `PerRequestMetrics`.
    pub(crate) fn to_json(&self) -> Value {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        let inference = milliseconds(self.first_token + self.generation);
        let mut times = json!({
            "time_to_first_token_ms": milliseconds(self.first_token),
            "generation_time_ms": milliseconds(self.generation),
            "queue_time_ms": milliseconds(self.queue),
        });
        if self.made > 1 {
            times["mean_itl_ms"] = json!(milliseconds(self.generation) / (self.made - 1) as f64);
        }
        if inference > 0.0 {
            times["tokens_per_second"] = json!(self.made as f64 / inference * 1000.0);
        }
        times
    }
}

/// A sequence in the scheduler.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request: Request,
    /// Records of the prompt from another engine.
    pub(crate) loaded: Vec<u64>,
    /// Blocks of the prompt, once it is scheduled.
    pub(crate) blocks: Option<Blocks>,
    /// Prompt tokens that `usage` reports as cached.
    pub(crate) cached_tokens: usize,
    /// Generated tokens.
    pub(crate) made: usize,
    /// Time of scheduling.
    pub(crate) scheduled: Option<Instant>,
    queued: Instant,
    first_token_at: Option<Instant>,
    /// Whether it takes the other one of two equally likely second tokens; `None` if one is likelier.
    pub(crate) tie: Option<bool>,
    first: Option<u32>,
    /// The selected allowed sequence.
    drawn: usize,
    state: KvState,
    previous: Option<u32>,
    text: Vec<u8>,
    reported: usize,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
}

impl Sequence {
    pub(crate) fn new(request: Request) -> Self {
        Self {
            // The last token of the prompt and not none: a prompt that ends with the first token of an answer must
            // continue like that answer.
            previous: request.prompt.last().copied(),
            request,
            loaded: Vec::new(),
            blocks: None,
            cached_tokens: 0,
            made: 0,
            scheduled: None,
            queued: Instant::now(),
            first_token_at: None,
            tie: None,
            first: None,
            drawn: 0,
            state: KvState::default(),
            text: Vec::new(),
            reported: 0,
            tokens: Vec::new(),
            logprobs: Vec::new(),
        }
    }

    /// Prompt tokens left to compute. A fully loaded prompt has one: its last token is computed again.
    pub(crate) fn uncomputed(&self) -> usize {
        self.request.prompt.len() - self.usable()
    }

    fn usable(&self) -> usize {
        self.loaded.len().min(self.request.prompt.len() - 1)
    }

    /// Tokens of the sequence so far.
    pub(crate) fn context(&self) -> usize {
        self.request.prompt.len() + self.made
    }

    /// The first generated token.
    pub(crate) fn first_token(&self) -> Option<u32> {
        self.first
    }

    /// Whether the client has disconnected.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.request.output.is_closed()
    }

    /// Uses the loaded records and computes the rest of the prompt. Returns the records of the whole prompt.
    pub(crate) fn prefill(&mut self) -> Vec<u64> {
        let usable = self.usable();
        let mut records = std::mem::take(&mut self.loaded);
        records.truncate(usable);
        for record in &records {
            self.state.absorb(*record);
        }
        debug_assert_eq!(self.state.length(), usable);
        records.reserve_exact(self.request.prompt.len() - usable);
        for token in &self.request.prompt[usable..] {
            records.push(self.state.compute(*token));
        }
        records
    }

    /// Generates the next token. Returns the end if it was the last one.
    pub(crate) fn advance(&mut self) -> Option<Finish> {
        let sampling = &self.request.sampling;
        let draw = self.state.draw(sampling.salt);
        let may_end = !sampling.ignore_eos && self.made >= sampling.min_tokens;
        let mut token = draw.token(self.previous, may_end);
        if let Some(allowed) = sampling.allowed.as_ref().filter(|allowed| !allowed.is_empty()) {
            if self.made == 0 {
                self.drawn = draw.choice(allowed.len());
            }
            token = allowed[self.drawn].get(self.made).copied().unwrap_or(END_OF_TURN);
        }
        let other = self.tie.filter(|_| self.made == 1).map(|takes_other| {
            let other = draw.alternative(64).0;
            let (made, left) = if takes_other { (other, token) } else { (token, other) };
            token = made;
            left
        });
        self.made += 1;
        self.first.get_or_insert(token);
        self.first_token_at.get_or_insert_with(Instant::now);
        self.previous = Some(token);
        self.tokens.push(token);
        if let Some(alternatives) = sampling.logprobs {
            let mut top = vec![(token, draw.logprob())];
            top.extend(other.map(|other| (other, draw.logprob() - EQUALLY_LIKELY)));
            top.extend((1..alternatives).map(|rank| draw.alternative(rank)));
            top.truncate(alternatives.max(1) as usize);
            self.logprobs.push(TokenLogprob {
                token,
                logprob: draw.logprob(),
                top,
            });
        }
        if token == END_OF_TURN {
            return Some(self.finish("stop", Value::Null));
        }
        self.state.compute(token);
        let before = self.text.len();
        decode_into(token, &mut self.text);
        let sampling = &self.request.sampling;
        if self.made >= sampling.min_tokens {
            if sampling.stop_token_ids.contains(&token) {
                return Some(self.finish("stop", token.into()));
            }
            if let Some((stop, end)) = self.find_stop(before) {
                self.text.truncate(end);
                return Some(self.finish("stop", stop.into()));
            }
        }
        (self.made >= self.request.sampling.max_tokens).then(|| self.finish("length", Value::Null))
    }

    /// The first stop string completed by the text after `before`, and where the text ends.
    fn find_stop(&self, before: usize) -> Option<(String, usize)> {
        let sampling = &self.request.sampling;
        sampling
            .stop
            .iter()
            .filter_map(|stop| {
                let start = before.saturating_sub(stop.len() - 1);
                let found = start
                    + self.text[start..]
                        .windows(stop.len())
                        .position(|window| window == stop.as_bytes())?;
                Some((found, stop))
            })
            .min()
            .map(|(found, stop)| {
                let end = if sampling.include_stop {
                    found + stop.len()
                } else {
                    found
                };
                (stop.clone(), end)
            })
    }

    /// An end for `reason`.
    pub(crate) fn finish(&self, reason: &'static str, stop_reason: Value) -> Finish {
        Finish {
            reason,
            stop_reason,
            kv_transfer_params: Value::Null,
            cached_tokens: self.cached_tokens,
            times: self.times().map(Box::new),
        }
    }

    fn times(&self) -> Option<Times> {
        let (scheduled, first) = (self.scheduled?, self.first_token_at?);
        Some(Times {
            queue: scheduled - self.queued,
            first_token: first - scheduled,
            generation: first.elapsed(),
            made: self.made,
        })
    }

    /// The next output; `None` if there is nothing to send.
    pub(crate) fn report(&mut self, end: Option<SequenceEnd>) -> Option<Output> {
        if end.is_none() && !self.request.stream {
            return None;
        }
        // Text that can be the beginning of a stop string is held back.
        let held = if end.is_none() {
            self.request.sampling.stop.iter().map(String::len).max().unwrap_or(1) - 1
        } else {
            0
        };
        let mut until = self.text.len().saturating_sub(held).max(self.reported);
        while until > self.reported && until < self.text.len() && !starts_character(self.text[until]) {
            until -= 1;
        }
        let text = String::from_utf8_lossy(&self.text[self.reported..until]).into_owned();
        self.reported = until;
        Some(Output {
            index: self.request.index,
            text,
            tokens: std::mem::take(&mut self.tokens),
            logprobs: std::mem::take(&mut self.logprobs),
            end,
        })
    }
}

fn starts_character(byte: u8) -> bool {
    byte & 0b1100_0000 != 0b1000_0000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine_core::tokens::encode;

    fn sequence(sampling: Sampling) -> (Sequence, mpsc::Receiver<Output>) {
        let (output, receiver) = mpsc::channel(1);
        let request = Request {
            id: "cmpl-1-0-00000000".into(),
            index: 0,
            prompt: encode("Tell me a story about a river").into(),
            sampling,
            stream: true,
            transfer: Transfer::None,
            cache_salt: None,
            output,
        };
        (Sequence::new(request), receiver)
    }

    /// Runs a sequence to its end and returns its texts, its tokens and its end.
    fn run(sampling: Sampling) -> (Vec<String>, Vec<u32>, Finish) {
        let (mut sequence, _receiver) = sequence(sampling);
        sequence.prefill();
        let (mut texts, mut tokens) = (Vec::new(), Vec::new());
        loop {
            let finish = sequence.advance();
            let ended = finish.is_some();
            let output = sequence.report(finish.map(SequenceEnd::Finished)).expect("streams");
            texts.push(output.text);
            tokens.extend(output.tokens);
            if ended {
                let Some(SequenceEnd::Finished(finish)) = output.end else {
                    panic!("finished")
                };
                return (texts, tokens, finish);
            }
        }
    }

    fn endless(max_tokens: usize) -> Sampling {
        Sampling {
            max_tokens,
            ignore_eos: true,
            ..Sampling::default()
        }
    }

    #[test]
    fn tokens_depend_on_prompt_and_seed() {
        assert_eq!(run(endless(20)).1, run(endless(20)).1);
        let salt = Sampling::salt_of(1.0, Some(7), 0);
        let seeded = run(Sampling { salt, ..endless(20) }).1;
        assert_ne!(seeded, run(endless(20)).1);
        assert_eq!(Sampling::salt_of(0.0, Some(7), 3), 0);
    }

    #[test]
    fn a_stop_string_over_several_tokens_is_never_sent() {
        let whole = run(endless(40)).0.concat();
        let stop = whole[20..33].to_owned();
        let (texts, _, finish) = run(Sampling {
            stop: vec![stop.clone()],
            ..endless(40)
        });
        assert_eq!(finish.reason, "stop");
        assert_eq!(finish.stop_reason, Value::from(stop.clone()));
        assert_eq!(texts.concat(), whole[..whole.find(&stop).unwrap()]);
    }

    #[test]
    fn an_answer_ends_unless_eos_is_ignored() {
        let free = Sampling {
            max_tokens: 5000,
            ..Sampling::default()
        };
        let (_, tokens, finish) = run(free.clone());
        assert_eq!((finish.reason, tokens.last()), ("stop", Some(&END_OF_TURN)));
        let (_, longer, _) = run(Sampling {
            min_tokens: tokens.len() + 1,
            ..free
        });
        assert!(longer.len() > tokens.len());
    }

    #[test]
    fn loaded_records_equal_computed_ones() {
        let (mut alone, _keep) = sequence(endless(10));
        let records = alone.prefill();
        let (mut loaded, _keep_too) = sequence(endless(10));
        loaded.loaded = records.clone();
        assert_eq!(loaded.uncomputed(), 1);
        assert_eq!(loaded.prefill(), records);
        let (mut garbled, _keep_three) = sequence(endless(10));
        garbled.loaded = records;
        garbled.loaded[0] ^= 1;
        garbled.prefill();
        for one in [&mut alone, &mut loaded, &mut garbled] {
            while one.advance().is_none() {}
        }
        assert_eq!(alone.tokens, loaded.tokens);
        assert_ne!(alone.tokens, garbled.tokens);
    }
}
