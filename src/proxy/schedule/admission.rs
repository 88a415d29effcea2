//! Who may go to the engines now, and who waits: what requests weigh, how full engines are, and a fair queue.
//!
//! Pure: no clock, no lock, no task. `seats` wraps it. Weights are tokens, because requests differ by four orders of magnitude.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::breaker::Breaker;
use super::prefix::Memory;
use crate::fleet::{EngineId, EngineView, Incarnation};
use crate::proxy::body::document::Document;
use crate::proxy::body::media::{Condensed, MEDIA_TOKENS};
use crate::proxy::body::serving_mode::{Kind, is_token_list};

/// Tokens that an answer of unknown or great length is taken for. Reserving all that it may become would leave engines empty.
const ANSWER_TOKENS: u64 = 1024;

/// Prompts of so many tokens need no look at how many the model reads.
const FITS_ANY_MODEL: u64 = 8192;

/// LMCache's chunk: a hand-off takes whole ones of the decode engine's buffer.
const BUFFER_CHUNK: u64 = 256;

/// Waiters that let others go first at once.
const MOST_ASIDE: usize = 8;

/// Seconds that a client may be told to wait.
const RETRY_AFTER: std::ops::RangeInclusive<u64> = 1..=30;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ask {
    /// Tokens of the prompt.
    pub(crate) prompt: u64,
    /// Whether that was counted, not estimated from its bytes.
    pub(crate) exact: bool,
    /// Tokens to reserve for the answer.
    pub(crate) answer: u64,
}

impl Ask {
    /// What a request with this prompt asks for.
    pub(crate) fn of(kind: Kind, document: &Document<'_>, prompt: &Condensed<'_>) -> Self {
        let exact = is_token_list(&prompt.text);
        let tokens = if exact {
            1 + memchr::memchr_iter(b',', prompt.text.as_bytes()).count() as u64
        } else {
            let bytes = prompt.text.len() + document.given("tools").map_or(0, str::len);
            let media = prompt.media.saturating_mul(MEDIA_TOKENS);
            (bytes.div_ceil(4).max(1) as u64).saturating_add(media)
        };
        let limit = match kind {
            // vLLM 0.32 takes null for absent, which means 16.
            Kind::Completions => document.given("max_tokens").unwrap_or("16"),
            Kind::Chat => document
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

    /// Whether its prompt may be taken for more than a model reads.
    pub(crate) fn may_be_too_long(&self) -> bool {
        self.prompt > FITS_ANY_MODEL
    }

    /// The same where the model reads so many tokens. An engine refuses a longer prompt, so that it takes no room.
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
    /// Of its KV cache.
    pub(crate) kv: u64,
    /// Of LMCache's receive buffer, whole chunks.
    pub(crate) buffer: u64,
}

impl Weight {
    /// The buffer that a prompt of so many tokens takes.
    pub(crate) fn buffer_for(prompt: u64) -> u64 {
        prompt.div_ceil(BUFFER_CHUNK).saturating_mul(BUFFER_CHUNK)
    }
}

/// One incarnation of an engine.
#[derive(Debug)]
struct Room {
    incarnation: Incarnation,
    used: Weight,
    /// The KV tokens that the engine says it has room for.
    said: Option<u64>,
    memory: Memory,
    breaker: Breaker,
}

/// How full the engines are, and who waits. `T` is how a waiter is woken.
#[derive(Debug)]
pub(crate) struct Book<T> {
    rooms: BTreeMap<EngineId, Room>,
    /// Of a decode engine; KV only if the user gave it.
    limit: Weight,
    limit_is_given: bool,
    pub(crate) queue: Queue<T>,
}

impl<T> Book<T> {
    /// `kv`: tokens per decode engine, 0 for no limit, `None` for what the engine says. `buffer`: the same of LMCache's buffer,
    /// 0 for no limit.
    pub(crate) fn new(kv: Option<u64>, buffer: u64) -> Self {
        let or_none = |tokens| if tokens == 0 { u64::MAX } else { tokens };
        Self {
            rooms: BTreeMap::new(),
            limit: Weight {
                kv: or_none(kv.unwrap_or_default()),
                buffer: or_none(buffer),
            },
            limit_is_given: kv.is_some(),
            queue: Queue::default(),
        }
    }

    /// The room of this incarnation; a newer one begins empty. `None` for one that has gone.
    fn room(&mut self, engine: &EngineView) -> Option<&mut Room> {
        let new = || Room {
            incarnation: engine.incarnation,
            used: Weight::default(),
            said: None,
            memory: Memory::default(),
            breaker: Breaker::default(),
        };
        let room = self.rooms.entry(engine.id.clone()).or_insert_with(new);
        if room.incarnation < engine.incarnation {
            *room = new();
        }
        (room.incarnation == engine.incarnation).then_some(room)
    }

    fn known_room(&self, engine: &EngineView) -> Option<&Room> {
        self.rooms
            .get(&engine.id)
            .filter(|room| room.incarnation == engine.incarnation)
    }

    /// What is known of its failures; `None` if it has gone.
    pub(crate) fn breaker(&mut self, engine: &EngineView) -> Option<&mut Breaker> {
        self.room(engine).map(|room| &mut room.breaker)
    }

    /// Whether it has failed so often that others are to be preferred.
    pub(crate) fn is_failing(&self, engine: &EngineView, now: Instant) -> bool {
        self.known_room(engine).is_some_and(|room| room.breaker.is_open(now))
    }

    /// Tokens of the requests on it.
    pub(crate) fn tokens(&self, engine: &EngineView) -> u64 {
        self.known_room(engine).map_or(0, |room| room.used.kv)
    }

    /// Tokens at the prompt's beginning that it has read before.
    pub(crate) fn known_tokens(&self, engine: &EngineView, chunks: &[u64]) -> u64 {
        self.known_room(engine)
            .map_or(0, |room| room.memory.known_tokens(chunks))
    }

    /// Whether a decode engine has room for `weight`. What is larger than the whole engine fits into an empty one, because it
    /// would wait for ever otherwise.
    pub(crate) fn fits(&self, engine: &EngineView, weight: Weight) -> bool {
        let Some(room) = self.known_room(engine) else {
            return true;
        };
        let said = room.said.filter(|_| !self.limit_is_given);
        let fits = |used: u64, more: u64, limit| used == 0 || used.saturating_add(more) <= limit;
        fits(room.used.kv, weight.kv, said.unwrap_or(self.limit.kv))
            && fits(room.used.buffer, weight.buffer, self.limit.buffer)
    }

    /// A request goes to an engine.
    pub(crate) fn enter(&mut self, engine: &EngineView, weight: Weight, chunks: &[u64]) {
        self.change(engine, Weight::default(), weight);
        if let Some(room) = self.room(engine) {
            room.memory.read(chunks);
        }
    }

    /// A request weighs another amount now; nothing once it has left.
    pub(crate) fn change(&mut self, engine: &EngineView, before: Weight, now: Weight) {
        if let Some(room) = self.room(engine) {
            let changed = |used: u64, before, now| used.saturating_sub(before).saturating_add(now);
            room.used = Weight {
                kv: changed(room.used.kv, before.kv, now.kv),
                buffer: changed(room.used.buffer, before.buffer, now.buffer),
            };
        }
    }

    /// The engine says how many KV tokens it has room for.
    pub(crate) fn said(&mut self, engine: &EngineView, tokens: u64) {
        if let Some(room) = self.room(engine) {
            room.said = Some(tokens);
        }
    }
}

/// Those who wait: clients take turns, and the requests of one client go in the order of their arrival. Only the head may try,
/// so nothing small overtakes something large for ever. Who only by an estimate has no room steps aside: for a while others go
/// first, because the estimate may be wrong.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    /// Clients that wait, whose turn it is first; each has at least one waiter.
    clients: VecDeque<(u64, VecDeque<(u64, T)>)>,
    /// Who has stepped aside, the first one first.
    aside: VecDeque<Aside<T>>,
    /// How long others go first.
    pub(crate) patience: Duration,
    next: u64,
    waiting: usize,
    served_at: Option<Instant>,
    /// Between two that were served.
    interval: Duration,
}

/// A waiter that has stepped aside.
#[derive(Debug)]
struct Aside<T> {
    number: u64,
    since: Instant,
    waker: T,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            clients: VecDeque::new(),
            aside: VecDeque::new(),
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

    /// Joins; the number is the waiter's own.
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

    /// Whose turn it is.
    pub(crate) fn head(&self) -> Option<&(u64, T)> {
        self.clients.front().and_then(|(_, line)| line.front())
    }

    /// Everybody who may be able to get a seat.
    pub(crate) fn wakers(&self) -> impl Iterator<Item = &T> {
        let aside = self.aside.iter().map(|waiter| &waiter.waker);
        aside.chain(self.head().map(|(_, waker)| waker))
    }

    /// Whether this waiter, or one who has not joined yet, may try.
    pub(crate) fn may_try(&self, number: Option<u64>, now: Instant) -> bool {
        let overdue = self.aside.front().filter(|first| now >= first.since + self.patience);
        match overdue {
            Some(first) => number == Some(first.number),
            None => number == self.head().map(|(head, _)| *head) || self.is_aside(number),
        }
    }

    fn is_aside(&self, number: Option<u64>) -> bool {
        self.aside.iter().any(|waiter| Some(waiter.number) == number)
    }

    /// The head lets others go first, and may try beside them from now on. Not more than a few do that, because each of them is
    /// woken whenever there is room.
    pub(crate) fn step_aside(&mut self, number: u64, now: Instant) -> bool {
        let is_head = self.head().is_some_and(|(head, _)| *head == number);
        if !is_head || self.aside.len() >= MOST_ASIDE {
            return false;
        }
        let waiters = self.pop().map(|(number, waker)| Aside {
            number,
            since: now,
            waker,
        });
        self.aside.extend(waiters);
        true
    }

    /// Takes the head out: the next client's turn.
    fn pop(&mut self) -> Option<(u64, T)> {
        let (client, mut line) = self.clients.pop_front()?;
        let head = line.pop_front();
        if !line.is_empty() {
            self.clients.push_back((client, line));
        }
        head
    }

    /// A waiter got a seat.
    pub(crate) fn serve(&mut self, number: u64, now: Instant) {
        let before = self.aside.len();
        self.aside.retain(|waiter| waiter.number != number);
        if self.aside.len() == before {
            self.pop();
        }
        self.waiting -= 1;
        if let Some(before) = self.served_at.replace(now) {
            self.interval = (self.interval * 7 + now.saturating_duration_since(before)) / 8;
        }
        self.rest();
    }

    /// A waiter goes without a seat. Harmless for one that was served.
    pub(crate) fn leave(&mut self, client: u64, number: u64) {
        let aside = self.aside.len();
        self.aside.retain(|waiter| waiter.number != number);
        self.waiting -= aside - self.aside.len();
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

    /// The time in which nobody waits says nothing of how fast waiters are served.
    fn rest(&mut self) {
        if self.waiting == 0 {
            self.served_at = None;
        }
    }

    /// Seconds after which a client may well get a seat, by how fast others got theirs of late.
    pub(crate) fn retry_after(&self) -> u64 {
        let all = self.interval.as_secs_f64() * (self.waiting as f64 + 1.0);
        let seconds = Duration::try_from_secs_f64(all.ceil()).map_or(u64::MAX, |time| time.as_secs());
        seconds.clamp(*RETRY_AFTER.start(), *RETRY_AFTER.end())
    }
}

#[cfg(test)]
mod tests;
