//! Tracks how full the engines are, and who waits for them in a fair queue.
//!
//! Pure: no clock, no lock, no task. `selection` wraps it. Weights are tokens, because requests differ by four orders
//! of magnitude.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::breaker::Breaker;
use super::prefix::PrefixMemory;
use crate::body::document::Document;
use crate::body::media::{Condensed, MEDIA_TOKENS};
use crate::body::serving_mode::{GenerationKind, is_token_list};
use xpyd_base::fleet::{EngineId, EngineView, Incarnation};

/// Assumed tokens of an answer of unknown or large length. Reserving its maximum would leave engines empty.
const ANSWER_TOKENS: u64 = 1024;

/// Prompts up to this many tokens need no check against the context length.
const FITS_ANY_MODEL: u64 = 8192;

/// LMCache's chunk size in tokens: a hand-off occupies whole chunks of the decode engine's buffer.
const BUFFER_CHUNK: u64 = 256;

/// Maximum number of deferred waiters.
const MAX_DEFERRED: usize = 8;

/// Range of the seconds in `Retry-After`.
const RETRY_AFTER: std::ops::RangeInclusive<u64> = 1..=30;

/// The tokens that a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenDemand {
    /// Tokens of the prompt.
    pub(crate) prompt: u64,
    /// Whether the prompt was counted, not estimated from its bytes.
    pub(crate) exact: bool,
    /// Tokens to reserve for the answer.
    pub(crate) answer: u64,
}

impl TokenDemand {
    /// The demand of a request with this prompt.
    pub(crate) fn of(kind: GenerationKind, document: &Document<'_>, prompt: &Condensed<'_>) -> Self {
        let exact = is_token_list(&prompt.text);
        let tokens = if exact {
            1 + memchr::memchr_iter(b',', prompt.text.as_bytes()).count() as u64
        } else {
            let bytes = prompt.text.len() + document.given("tools").map_or(0, str::len);
            let media = prompt.media.saturating_mul(MEDIA_TOKENS);
            (bytes.div_ceil(4).max(1) as u64).saturating_add(media)
        };
        let limit = match kind {
            // vLLM 0.32 treats null as absent, which means 16.
            GenerationKind::Completions => document.given("max_tokens").unwrap_or("16"),
            GenerationKind::Chat => document
                .given("max_completion_tokens")
                .or(document.given("max_tokens"))
                .unwrap_or("null"),
        };
        let answers = document.given("n").and_then(|n| n.parse().ok()).unwrap_or(1_u64).max(1);
        let each = limit.parse().unwrap_or(ANSWER_TOKENS).min(ANSWER_TOKENS);
        Self {
            prompt: tokens,
            exact,
            answer: each.saturating_mul(answers),
        }
    }

    /// Whether the prompt could exceed the context length.
    pub(crate) fn can_be_too_long(&self) -> bool {
        self.prompt > FITS_ANY_MODEL
    }

    /// The demand under this context length. An engine refuses a longer prompt, so the rest takes no room.
    pub(crate) fn within(self, length: u64) -> Self {
        Self {
            prompt: self.prompt.min(length),
            ..self
        }
    }
}

/// What a request occupies on an engine, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Weight {
    /// Tokens of the KV cache.
    pub(crate) kv: u64,
    /// Tokens of LMCache's receive buffer, whole chunks.
    pub(crate) buffer: u64,
}

impl Weight {
    /// The buffer that a prompt of this many tokens occupies.
    pub(crate) fn buffer_for(prompt: u64) -> u64 {
        prompt.div_ceil(BUFFER_CHUNK).saturating_mul(BUFFER_CHUNK)
    }
}

/// The load of one incarnation of an engine.
#[derive(Debug)]
struct EngineLoad {
    incarnation: Incarnation,
    used: Weight,
    /// The capacity of its KV cache in tokens, as the engine reports it.
    capacity: Option<u64>,
    memory: PrefixMemory,
    breaker: Breaker,
}

/// The load of all engines, and the queue. `T` wakes a waiter.
#[derive(Debug)]
pub(crate) struct LoadTracker<T> {
    loads: BTreeMap<EngineId, EngineLoad>,
    /// The limit per decode engine. Its `kv` counts only if the user set it.
    limit: Weight,
    limit_is_given: bool,
    pub(crate) queue: Queue<T>,
}

impl<T> LoadTracker<T> {
    /// `kv`: tokens per decode engine, 0 for no limit, `None` for the capacity that the engine reports. `buffer`:
    /// tokens of LMCache's buffer, 0 for no limit.
    pub(crate) fn new(kv: Option<u64>, buffer: u64) -> Self {
        let or_none = |tokens| if tokens == 0 { u64::MAX } else { tokens };
        Self {
            loads: BTreeMap::new(),
            limit: Weight {
                kv: or_none(kv.unwrap_or_default()),
                buffer: or_none(buffer),
            },
            limit_is_given: kv.is_some(),
            queue: Queue::default(),
        }
    }

    /// The load of this incarnation. A newer incarnation starts empty. `None` if the incarnation is outdated.
    fn load_mut(&mut self, engine: &EngineView) -> Option<&mut EngineLoad> {
        let new = || EngineLoad {
            incarnation: engine.incarnation,
            used: Weight::default(),
            capacity: None,
            memory: PrefixMemory::default(),
            breaker: Breaker::default(),
        };
        let load = self.loads.entry(engine.id.clone()).or_insert_with(new);
        if load.incarnation < engine.incarnation {
            *load = new();
        }
        (load.incarnation == engine.incarnation).then_some(load)
    }

    fn known_load(&self, engine: &EngineView) -> Option<&EngineLoad> {
        self.loads
            .get(&engine.id)
            .filter(|load| load.incarnation == engine.incarnation)
    }

    /// The breaker of this incarnation. `None` if it is outdated.
    pub(crate) fn breaker(&mut self, engine: &EngineView) -> Option<&mut Breaker> {
        self.load_mut(engine).map(|load| &mut load.breaker)
    }

    /// Whether it has failed so often that other engines are preferred.
    pub(crate) fn is_failing(&self, engine: &EngineView, now: Instant) -> bool {
        self.known_load(engine).is_some_and(|load| load.breaker.is_open(now))
    }

    /// Tokens of the requests on it.
    pub(crate) fn tokens(&self, engine: &EngineView) -> u64 {
        self.known_load(engine).map_or(0, |load| load.used.kv)
    }

    /// Tokens at the beginning of the prompt that it has read before.
    pub(crate) fn known_tokens(&self, engine: &EngineView, chunks: &[u64]) -> u64 {
        self.known_load(engine)
            .map_or(0, |load| load.memory.known_tokens(chunks))
    }

    /// Whether a decode engine has room for `weight`. A request larger than the whole engine fits into an empty one;
    /// it would wait forever otherwise.
    pub(crate) fn fits(&self, engine: &EngineView, weight: Weight) -> bool {
        let Some(load) = self.known_load(engine) else {
            return true;
        };
        let capacity = load.capacity.filter(|_| !self.limit_is_given);
        let fits = |used: u64, more: u64, limit| used == 0 || used.saturating_add(more) <= limit;
        fits(load.used.kv, weight.kv, capacity.unwrap_or(self.limit.kv))
            && fits(load.used.buffer, weight.buffer, self.limit.buffer)
    }

    /// Adds a request to an engine.
    pub(crate) fn enter(&mut self, engine: &EngineView, weight: Weight, chunks: &[u64]) {
        self.change(engine, Weight::default(), weight);
        if let Some(load) = self.load_mut(engine) {
            load.memory.read(chunks);
        }
    }

    /// Changes the weight of a request, to zero when it leaves.
    pub(crate) fn change(&mut self, engine: &EngineView, before: Weight, now: Weight) {
        if let Some(load) = self.load_mut(engine) {
            let changed = |used: u64, before, now| used.saturating_sub(before).saturating_add(now);
            load.used = Weight {
                kv: changed(load.used.kv, before.kv, now.kv),
                buffer: changed(load.used.buffer, before.buffer, now.buffer),
            };
        }
    }

    /// Sets the capacity of the engine's KV cache in tokens.
    pub(crate) fn set_capacity(&mut self, engine: &EngineView, tokens: u64) {
        if let Some(load) = self.load_mut(engine) {
            load.capacity = Some(tokens);
        }
    }
}

/// The queue. Clients take turns, and the requests of one client keep their order. Only the head can try, so small
/// requests do not overtake a large one forever. If the head has no room only by an estimate, it is deferred: for a
/// while others go first, because the estimate can be wrong.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    /// Clients that wait, the next one first. Each has at least one waiter.
    clients: VecDeque<(u64, VecDeque<(u64, T)>)>,
    /// Deferred waiters, the first one first.
    deferred: VecDeque<Deferred<T>>,
    /// How long others go before a deferred waiter.
    pub(crate) patience: Duration,
    next: u64,
    waiting: usize,
    served_at: Option<Instant>,
    /// Moving average of the time between two served waiters.
    interval: Duration,
}

/// A deferred waiter.
#[derive(Debug)]
struct Deferred<T> {
    number: u64,
    since: Instant,
    waker: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            clients: VecDeque::new(),
            deferred: VecDeque::new(),
            patience: Duration::from_secs(15),
            next: 0,
            waiting: 0,
            served_at: None,
            interval: Duration::ZERO,
        }
    }
}

impl<T> Queue<T> {
    pub(crate) fn len(&self) -> usize {
        self.waiting
    }

    /// Joins the queue. The returned number identifies the waiter.
    pub(crate) fn join(&mut self, client: u64, waker: T) -> u64 {
        let number = self.next;
        self.next += 1;
        self.waiting += 1;
        match self.clients.iter_mut().find(|(key, _)| *key == client) {
            Some((_, line)) => line.push_back((number, waker)),
            None => self.clients.push_back((client, VecDeque::from([(number, waker)]))),
        }
        number
    }

    /// The waiter whose turn it is.
    pub(crate) fn head(&self) -> Option<&(u64, T)> {
        self.clients.front().and_then(|(_, line)| line.front())
    }

    /// All waiters that could get a place now.
    pub(crate) fn wakers(&self) -> impl Iterator<Item = &T> {
        let deferred = self.deferred.iter().map(|waiter| &waiter.waker);
        deferred.chain(self.head().map(|(_, waker)| waker))
    }

    /// Whether this waiter, or a request that has not joined, can try now.
    pub(crate) fn can_try(&self, number: Option<u64>, now: Instant) -> bool {
        let overdue = self.deferred.front().filter(|first| now >= first.since + self.patience);
        match overdue {
            Some(first) => number == Some(first.number),
            None => number == self.head().map(|(head, _)| *head) || self.is_deferred(number),
        }
    }

    fn is_deferred(&self, number: Option<u64>) -> bool {
        self.deferred.iter().any(|waiter| Some(waiter.number) == number)
    }

    /// Defers the head: others go first, and it can try beside them. Only a few waiters are deferred at a time,
    /// because each is woken whenever room appears.
    pub(crate) fn defer(&mut self, number: u64, now: Instant) -> bool {
        let is_head = self.head().is_some_and(|(head, _)| *head == number);
        if !is_head || self.deferred.len() >= MAX_DEFERRED {
            return false;
        }
        let waiters = self.pop().map(|(number, waker)| Deferred {
            number,
            since: now,
            waker,
        });
        self.deferred.extend(waiters);
        true
    }

    /// Removes the head and passes the turn to the next client.
    fn pop(&mut self) -> Option<(u64, T)> {
        let (client, mut line) = self.clients.pop_front()?;
        let head = line.pop_front();
        if !line.is_empty() {
            self.clients.push_back((client, line));
        }
        head
    }

    /// Removes a waiter that got a place.
    pub(crate) fn serve(&mut self, number: u64, now: Instant) {
        let before = self.deferred.len();
        self.deferred.retain(|waiter| waiter.number != number);
        if self.deferred.len() == before {
            self.pop();
        }
        self.waiting -= 1;
        if let Some(before) = self.served_at.replace(now) {
            self.interval = (self.interval * 7 + now.saturating_duration_since(before)) / 8;
        }
        self.rest();
    }

    /// Removes a waiter without a place. Does nothing if it was served.
    pub(crate) fn leave(&mut self, client: u64, number: u64) {
        let deferred = self.deferred.len();
        self.deferred.retain(|waiter| waiter.number != number);
        self.waiting -= deferred - self.deferred.len();
        let Some(place) = self.clients.iter().position(|(key, _)| *key == client) else {
            return self.rest();
        };
        let line = &mut self.clients[place].1;
        let before = line.len();
        line.retain(|(waiter, _)| *waiter != number);
        self.waiting -= before - line.len();
        if line.is_empty() {
            self.clients.remove(place);
        }
        self.rest();
    }

    /// Time in which no request waits does not show how fast waiters are served.
    fn rest(&mut self) {
        if self.waiting == 0 {
            self.served_at = None;
        }
    }

    /// Seconds until a client could get a place, estimated from how fast recent waiters got theirs.
    pub(crate) fn retry_after(&self) -> u64 {
        let all = self.interval.as_secs_f64() * (self.waiting as f64 + 1.0);
        let seconds = Duration::try_from_secs_f64(all.ceil()).map_or(u64::MAX, |time| time.as_secs());
        seconds.clamp(*RETRY_AFTER.start(), *RETRY_AFTER.end())
    }
}

#[cfg(test)]
mod tests;
