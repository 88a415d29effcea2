//! Seats on engines for one attempt of a request: waits for a decode engine that has room, then takes one of each role.
//!
//! The shell around `admission`, `prefix` and `pick`, which decide. The lease on KV begins with the prefill's answer, so
//! the wait is over before any seat is taken.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::HeaderValue;
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::admission::{Ask, Book, Weight};
use super::breaker::Breaker;
use super::lease::Seat;
use super::pick::{self, Candidate, Wish};
use super::prefix;
use crate::fleet::{EngineId, EngineState, EngineView, FleetView, Role};
use crate::proxy::Shared;
use crate::proxy::body::document::Document;
use crate::proxy::error::{ProxyError, Stage};
use crate::proxy::hash::hash_of;
use crate::proxy::telemetry::metrics::Timed;
use crate::proxy::telemetry::record::Record;
use crate::service::{Admission, Policy, WithoutPrefill};

/// How full the engines are and who waits, for all requests of a proxy.
#[derive(Debug)]
pub(crate) struct Seats(Mutex<Book<Arc<Notify>>>);

impl Seats {
    pub(crate) fn new(admission: &Admission) -> Self {
        let mut book = Book::new(admission.decode_tokens, admission.buffer_tokens);
        book.queue.patience = admission.queue_deadline / 2;
        Self(Mutex::new(book))
    }

    fn lock(&self) -> MutexGuard<'_, Book<Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine says how many KV tokens it has room for.
    pub(crate) fn said(&self, engine: &EngineView, tokens: u64) {
        let mut book = self.lock();
        book.said(engine, tokens);
        wake(&book);
    }

    /// A request failed on the engine, by the engine's fault.
    pub(crate) fn failed(&self, engine: &EngineView) {
        let mut book = self.lock();
        if book.breaker(engine).is_some_and(|breaker| breaker.fail(Instant::now())) {
            tracing::warn!(engine = %engine.id, "it fails one request after the other; others are preferred for a while");
        }
    }

    /// A request was answered by these engines.
    pub(crate) fn succeeded(&self, engines: &[Arc<EngineView>]) {
        let mut book = self.lock();
        for engine in engines {
            book.breaker(engine).into_iter().for_each(Breaker::succeed);
        }
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().queue.len()
    }
}

/// Lets those whose turn it is try again. Waking all would cost a scan of the fleet each.
fn wake(book: &Book<Arc<Notify>>) {
    book.queue.wakers().for_each(|waker| waker.notify_one());
}

/// What a request weighs on the engine of its seat. Dropping it frees that.
#[derive(Debug)]
pub(crate) struct Held {
    shared: Arc<Shared>,
    engine: Arc<EngineView>,
    weight: Mutex<Weight>,
}

impl Held {
    fn change(&self, change: impl FnOnce(Weight) -> Weight) {
        let mut book = self.shared.seats.lock();
        let mut weight = self.weight.lock().unwrap_or_else(PoisonError::into_inner);
        let now = change(*weight);
        book.change(&self.engine, *weight, now);
        *weight = now;
        wake(&book);
    }

    /// The request has ended before its KV was there: only the buffer may still be written to.
    pub(crate) fn abandoned(&self) {
        self.change(|weight| Weight { kv: 0, ..weight });
    }

    /// The engine has taken the KV out of LMCache's buffer.
    pub(crate) fn consumed(&self) {
        self.change(|weight| Weight { buffer: 0, ..weight });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.change(|_| Weight::default());
    }
}

/// A place in the queue. Dropping it leaves.
struct Ticket<'request> {
    shared: &'request Shared,
    client: u64,
    number: u64,
    turn: Arc<Notify>,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut book = self.shared.seats.lock();
        book.queue.leave(self.client, self.number);
        wake(&book);
    }
}

/// The seats of an attempt.
pub(crate) enum Seated {
    /// A prefill engine hands over to a decode engine.
    Pair(Arc<Seat>, Arc<Seat>),
    /// The decode engine answers alone, and why.
    Alone(Arc<Seat>, &'static str),
}

/// A request, as far as the choice of engines goes.
struct Choice {
    session: Option<u64>,
    chunks: Vec<u64>,
    beginning: u64,
}

/// A seat, and how many of the prompt's tokens its engine had read before.
struct Taken {
    seat: Arc<Seat>,
    known: u64,
}

/// Selects the engines of one request, attempt after attempt.
pub(crate) struct EngineSelector<'job> {
    pub(crate) shared: &'job Arc<Shared>,
    pub(crate) record: &'job Record,
    /// The engines to use, whatever the fleet's stage: prefill, decode. For canaries.
    pub(crate) pair: Option<&'job (EngineId, EngineId)>,
    pub(crate) session: Option<&'job str>,
    /// The client's key, by which clients take turns in the queue.
    pub(crate) authorization: Option<&'job HeaderValue>,
    pub(crate) document: &'job Document<'job>,
    /// The prompt as JSON text, with hashes in place of media.
    pub(crate) prompt: &'job str,
    pub(crate) ask: Ask,
    /// Engines that the next attempt should leave alone.
    pub(crate) tried: Vec<Arc<EngineView>>,
    /// The engines of this attempt.
    pub(crate) engines: Vec<Arc<EngineView>>,
}

impl<'job> EngineSelector<'job> {
    /// A place on a decode engine, then one on a prefill engine, unless the prompt is too short to need that.
    pub(crate) async fn seats(&mut self) -> Result<Seated, ProxyError> {
        let choice = self.choice();
        let connector = &self.shared.settings.connector;
        let buffer = if connector.notifies() {
            Weight::buffer_for(self.ask.prompt)
        } else {
            0
        };
        let Taken { seat: decode, known } = self.decode_seat(&choice, buffer).await?;
        let threshold = self.shared.settings.service.routing.prefill_threshold;
        if self.pair.is_none() && self.ask.prompt.saturating_sub(known) < threshold {
            decode.held().inspect(|held| held.consumed());
            return Ok(Seated::Alone(decode, "prefill_threshold"));
        }
        let turn = self.shared.next_turn(Role::Prefill);
        let weight = Weight {
            kv: self.ask.prompt,
            buffer: 0,
        };
        let prefill = match self.take(Role::Prefill, &choice, weight, turn, None) {
            Ok(prefill) => prefill.ok_or(ProxyError::NoEngine(Role::Prefill))?.seat,
            Err(ProxyError::NoEngine(Role::Prefill)) if self.aggregates() => {
                decode.held().inspect(|held| held.consumed());
                return Ok(Seated::Alone(decode, "without_prefill"));
            }
            Err(error) => return Err(error),
        };
        connector
            .check_pair(&prefill.engine.endpoint, &decode.engine.endpoint)
            .map_err(|error| prefill.failed(Stage::Handoff, error.into()))?;
        Ok(Seated::Pair(prefill, decode))
    }

    /// Whether decode engines may prefill as well where no prefill engine serves.
    fn aggregates(&self) -> bool {
        self.pair.is_none() && self.shared.settings.service.routing.without_prefill == WithoutPrefill::Aggregate
    }

    /// A place on a decode engine that answers alone.
    pub(crate) async fn seat_alone(&mut self) -> Result<Arc<Seat>, ProxyError> {
        let choice = self.choice();
        Ok(self.decode_seat(&choice, 0).await?.seat)
    }

    fn choice(&self) -> Choice {
        let routing = &self.shared.settings.service.routing;
        let uses = |policy| routing.prefill_policy == policy || routing.decode_policy == policy;
        let (document, prompt) = (self.document, self.prompt);
        // What the chat template puts before the messages.
        let seed = || hash_of((document.get("model"), document.get("tools")));
        Choice {
            session: self.session.map(hash_of),
            chunks: if uses(Policy::Prefix) {
                prefix::chunks(seed(), prompt)
            } else {
                Vec::new()
            },
            beginning: if uses(Policy::ConsistentHash) {
                prefix::beginning(seed(), prompt)
            } else {
                0
            },
        }
    }

    /// Waits for a decode engine that has room, in a fair queue, up to the deadline of the queue.
    async fn decode_seat(&mut self, choice: &Choice, buffer: u64) -> Result<Taken, ProxyError> {
        let shared: &Arc<Shared> = self.shared;
        let kv = self.ask.prompt.saturating_add(self.ask.answer);
        let weight = Weight { kv, buffer };
        let turn = shared.next_turn(Role::Decode);
        if let Some(taken) = self.take(Role::Decode, choice, weight, turn, None)? {
            return Ok(taken);
        }
        let ticket = self.join()?;
        let began = Instant::now();
        let limit = shared.settings.service.admission.queue_deadline;
        let mut deadline = std::pin::pin!(tokio::time::sleep(limit));
        let mut view = shared.view.clone();
        view.mark_unchanged();
        loop {
            if let Some(taken) = self.take(Role::Decode, choice, weight, turn, Some(&ticket))? {
                self.record.took(Timed::Queue, began.elapsed());
                return Ok(taken);
            }
            tokio::select! {
                () = ticket.turn.notified() => {}
                Ok(()) = view.changed() => {}
                () = &mut deadline => {
                    self.record.took(Timed::Queue, began.elapsed());
                    let retry_after = shared.seats.lock().queue.retry_after();
                    return Err(ProxyError::QueueTimeout { limit, retry_after });
                }
            }
        }
    }

    /// A place on the best engine that has room; `None` if it is not this request's turn, or no engine has any.
    fn take(
        &mut self,
        role: Role,
        choice: &Choice,
        weight: Weight,
        turn: usize,
        ticket: Option<&Ticket<'_>>,
    ) -> Result<Option<Taken>, ProxyError> {
        let shared = self.shared;
        let routing = &shared.settings.service.routing;
        let wish = Wish {
            policy: if role == Role::Prefill {
                routing.prefill_policy
            } else {
                routing.decode_policy
            },
            session: choice.session,
            beginning: choice.beginning,
            tokens: self.ask.prompt,
        };
        let view = Arc::clone(&shared.view.borrow());
        let engines = self.engines(role, &view)?;
        // Prefill engines queue by themselves, and canaries go where they are told to.
        let is_limited = role == Role::Decode && self.pair.is_none();
        let now = Instant::now();
        let mut book = shared.seats.lock();
        let number = ticket.map(|ticket| ticket.number);
        if is_limited && !book.queue.may_try(number, now) {
            return Ok(None);
        }
        let count = engines.len();
        let rank = |place| (place + count - turn % count) % count;
        let mut candidates: Vec<Candidate<'_>> = engines
            .into_iter()
            .enumerate()
            .map(|(place, engine)| Candidate {
                engine,
                rank: rank(place),
                tokens: book.tokens(engine),
                known: book.known_tokens(engine, &choice.chunks),
                has_room: !is_limited || book.fits(engine, weight),
                tried: self.has_tried(engine) || book.is_failing(engine, now),
            })
            .collect();
        while let Some(place) = pick::best(&candidates, &wish) {
            let Candidate { engine, known, .. } = candidates.swap_remove(place);
            let Some(seat) = Seat::take(engine, &shared.view) else {
                continue;
            };
            book.enter(engine, weight, &choice.chunks);
            book.breaker(engine).into_iter().for_each(|breaker| breaker.enter(now));
            if let Some(number) = number {
                book.queue.serve(number, now);
            }
            wake(&book);
            self.engines.push(Arc::clone(engine));
            let held = Held {
                shared: Arc::clone(shared),
                engine: Arc::clone(engine),
                weight: Mutex::new(weight),
            };
            let seat = Arc::new(seat.holding(held));
            return Ok(Some(Taken { seat, known }));
        }
        if candidates.is_empty() {
            return Err(ProxyError::NoEngine(role));
        }
        if number.is_some_and(|number| !self.ask.exact && book.queue.step_aside(number, now)) {
            wake(&book);
        }
        Ok(None)
    }

    fn has_tried(&self, engine: &EngineView) -> bool {
        let is_same = |tried: &Arc<EngineView>| tried.id == engine.id && tried.incarnation == engine.incarnation;
        self.tried.iter().any(is_same)
    }

    /// Whether this request has not failed yet on an engine that serves.
    pub(crate) fn has_untried(&self, role: Role, view: &FleetView) -> bool {
        view.serving(role).any(|engine| !self.has_tried(engine))
    }

    /// The engines that may be asked; at least one.
    fn engines<'view>(&self, role: Role, view: &'view FleetView) -> Result<Vec<&'view Arc<EngineView>>, ProxyError> {
        let engines: Vec<_> = match self.pair {
            Some((prefill, decode)) => {
                let id = if role == Role::Prefill { prefill } else { decode };
                let up = |state| matches!(state, EngineState::Healthy | EngineState::Ready);
                view.engine(id).into_iter().filter(|engine| up(engine.state)).collect()
            }
            None if !view.stage.serves() => return Err(ProxyError::NotServing(view.stage)),
            None => view.serving(role).collect(),
        };
        if engines.is_empty() {
            Err(ProxyError::NoEngine(role))
        } else {
            Ok(engines)
        }
    }

    /// The prefill engine has answered: it computes nothing more for this request, and it has counted the prompt.
    pub(crate) fn prefilled(&self, prefill: &Seat, decode: &Seat, answer: &[u8]) {
        #[derive(Deserialize)]
        struct Answer {
            usage: Usage,
        }
        #[derive(Deserialize)]
        struct Usage {
            prompt_tokens: u64,
        }
        prefill.held().inspect(|held| held.change(|_| Weight::default()));
        let ask = self.ask;
        if ask.exact {
            return;
        }
        if let (Some(held), Ok(answer)) = (decode.held(), serde_json::from_slice::<Answer>(answer)) {
            let prompt = answer.usage.prompt_tokens;
            held.change(|weight| Weight {
                kv: weight.kv.saturating_sub(ask.prompt).saturating_add(prompt),
                buffer: if weight.buffer == 0 {
                    0
                } else {
                    Weight::buffer_for(prompt)
                },
            });
        }
    }

    /// Joins the queue, unless it is full.
    fn join(&self) -> Result<Ticket<'job>, ProxyError> {
        let shared: &'job Shared = self.shared;
        let client = match (self.authorization, self.session) {
            (Some(key), _) => hash_of(key.as_bytes()),
            (None, Some(session)) => hash_of(session),
            (None, None) => 0,
        };
        let limit = shared.settings.service.admission.max_queued;
        let mut book = shared.seats.lock();
        if book.queue.len() >= limit {
            let retry_after = book.queue.retry_after();
            return Err(ProxyError::QueueFull { limit, retry_after });
        }
        let turn = Arc::new(Notify::new());
        let number = book.queue.join(client, Arc::clone(&turn));
        Ok(Ticket {
            shared,
            client,
            number,
            turn,
        })
    }
}
