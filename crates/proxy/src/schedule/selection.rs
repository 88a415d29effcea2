//! Selects the engines of an attempt: waits for a decode engine with room, then acquires a lease on one engine of
//! each role.
//!
//! The shell around `admission`, `prefix` and `pick`, which decide. The lease on KV begins with the prefill engine's
//! answer, so the wait ends before any lease on an engine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::HeaderValue;
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::admission::{LoadTracker, TokenDemand, Weight};
use super::breaker::Breaker;
use super::lease::EngineLease;
use super::pick::{self, Candidate, SelectionRequest};
use super::prefix;
use crate::Shared;
use crate::body::document::Document;
use crate::error::{ProxyError, RequestStage};
use crate::hash::hash_of;
use crate::telemetry::metrics::TimedStage;
use crate::telemetry::record::Record;
use xpyd_base::fleet::{EngineId, EngineState, EngineView, FleetView, Role};
use xpyd_base::proxy_config::{Admission, Policy, WithoutPrefill};

/// The load of the engines and the queue, for all requests of a proxy.
#[derive(Debug)]
pub(crate) struct Scheduler(Mutex<LoadTracker<Arc<Notify>>>);

impl Scheduler {
    pub(crate) fn new(admission: &Admission) -> Self {
        let mut tracker = LoadTracker::new(admission.decode_tokens, admission.buffer_tokens);
        tracker.queue.patience = admission.queue_deadline / 2;
        Self(Mutex::new(tracker))
    }

    fn lock(&self) -> MutexGuard<'_, LoadTracker<Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the capacity of the engine's KV cache in tokens.
    pub(crate) fn set_capacity(&self, engine: &EngineView, tokens: u64) {
        let mut tracker = self.lock();
        tracker.set_capacity(engine, tokens);
        wake(&tracker);
    }

    /// Records a failure that is the engine's fault.
    pub(crate) fn failed(&self, engine: &EngineView) {
        let mut tracker = self.lock();
        if tracker
            .breaker(engine)
            .is_some_and(|breaker| breaker.fail(Instant::now()))
        {
            tracing::warn!(engine = %engine.id, "the engine fails one request after the other: other engines are preferred for a while");
        }
    }

    /// Records that these engines answered a request.
    pub(crate) fn succeeded(&self, engines: &[Arc<EngineView>]) {
        let mut tracker = self.lock();
        for engine in engines {
            tracker.breaker(engine).into_iter().for_each(Breaker::succeed);
        }
    }

    /// The number of waiting requests.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().queue.len()
    }
}

/// Wakes the waiters whose turn it is. Waking all would cost a scan of the fleet each.
fn wake(tracker: &LoadTracker<Arc<Notify>>) {
    tracker.queue.wakers().for_each(|waker| waker.notify_one());
}

/// The tokens that a request occupies on an engine. Dropping it frees them.
#[derive(Debug)]
pub(crate) struct Reservation {
    shared: Arc<Shared>,
    engine: Arc<EngineView>,
    weight: Mutex<Weight>,
}

impl Reservation {
    fn change(&self, change: impl FnOnce(Weight) -> Weight) {
        let mut tracker = self.shared.scheduler.lock();
        let mut weight = self.weight.lock().unwrap_or_else(PoisonError::into_inner);
        let now = change(*weight);
        tracker.change(&self.engine, *weight, now);
        *weight = now;
        wake(&tracker);
    }

    /// Frees the KV share of a request that ended before its KV arrived. Only the buffer can still be written to.
    pub(crate) fn release_kv(&self) {
        self.change(|weight| Weight { kv: 0, ..weight });
    }

    /// Frees the buffer share, once the engine has taken the KV out of LMCache's buffer.
    pub(crate) fn release_buffer(&self) {
        self.change(|weight| Weight { buffer: 0, ..weight });
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.change(|_| Weight::default());
    }
}

/// A place in the queue. Dropping it leaves the queue.
struct QueueTicket<'request> {
    shared: &'request Shared,
    client: u64,
    number: u64,
    turn: Arc<Notify>,
}

impl Drop for QueueTicket<'_> {
    fn drop(&mut self) {
        let mut tracker = self.shared.scheduler.lock();
        tracker.queue.leave(self.client, self.number);
        wake(&tracker);
    }
}

/// The engines of an attempt.
pub(crate) enum Selection {
    /// A prefill engine that hands over to a decode engine.
    Pair(Arc<EngineLease>, Arc<EngineLease>),
    /// A decode engine that answers alone, and why.
    DecodeOnly(Arc<EngineLease>, &'static str),
}

/// What selection needs to know of a prompt and its session.
struct PromptKey {
    session: Option<u64>,
    chunks: Vec<u64>,
    beginning: u64,
}

/// A lease, and how many of the prompt's tokens its engine has read before.
struct Placement {
    lease: Arc<EngineLease>,
    known: u64,
}

/// Selects the engines of one request, attempt after attempt.
pub(crate) struct EngineSelector<'job> {
    pub(crate) shared: &'job Arc<Shared>,
    pub(crate) record: &'job Record,
    /// The prefill and decode engine that must serve it, whatever the fleet's stage. For canaries.
    pub(crate) pair: Option<&'job (EngineId, EngineId)>,
    pub(crate) session: Option<&'job str>,
    /// The client's key. Clients take turns in the queue by it.
    pub(crate) authorization: Option<&'job HeaderValue>,
    pub(crate) document: &'job Document<'job>,
    /// The prompt as JSON text, with hashes in place of media.
    pub(crate) prompt: &'job str,
    pub(crate) demand: TokenDemand,
    /// Engines that the next attempt must avoid.
    pub(crate) tried: Vec<Arc<EngineView>>,
    /// The engines of this attempt.
    pub(crate) engines: Vec<Arc<EngineView>>,
}

impl<'job> EngineSelector<'job> {
    /// Leases a decode engine, then a prefill engine, unless the prompt is too short to need one.
    pub(crate) async fn select(&mut self) -> Result<Selection, ProxyError> {
        let key = self.key();
        let connector = &self.shared.settings.connector;
        let buffer = if connector.notifies() {
            Weight::buffer_for(self.demand.prompt)
        } else {
            0
        };
        let Placement { lease: decode, known } = self.wait_for_decode(&key, buffer).await?;
        let threshold = self.shared.settings.config.routing.prefill_threshold;
        if self.pair.is_none() && self.demand.prompt.saturating_sub(known) < threshold {
            decode.reservation().inspect(|reservation| reservation.release_buffer());
            return Ok(Selection::DecodeOnly(decode, "prefill_threshold"));
        }
        let turn = self.shared.next_turn(Role::Prefill);
        let weight = Weight {
            kv: self.demand.prompt,
            buffer: 0,
        };
        let prefill = match self.try_place(Role::Prefill, &key, weight, turn, None) {
            Ok(prefill) => prefill.ok_or(ProxyError::NoEngine(Role::Prefill))?.lease,
            Err(ProxyError::NoEngine(Role::Prefill)) if self.aggregates() => {
                decode.reservation().inspect(|reservation| reservation.release_buffer());
                return Ok(Selection::DecodeOnly(decode, "without_prefill"));
            }
            Err(error) => return Err(error),
        };
        connector
            .check_pair(&prefill.engine.endpoint, &decode.engine.endpoint)
            .map_err(|error| prefill.failed(RequestStage::Handoff, error.into()))?;
        Ok(Selection::Pair(prefill, decode))
    }

    /// Whether decode engines prefill as well if no prefill engine serves.
    fn aggregates(&self) -> bool {
        self.pair.is_none() && self.shared.settings.config.routing.without_prefill == WithoutPrefill::Aggregate
    }

    /// Leases a decode engine that answers alone.
    pub(crate) async fn select_decode_only(&mut self) -> Result<Arc<EngineLease>, ProxyError> {
        let key = self.key();
        Ok(self.wait_for_decode(&key, 0).await?.lease)
    }

    fn key(&self) -> PromptKey {
        let routing = &self.shared.settings.config.routing;
        let uses = |policy| routing.prefill_policy == policy || routing.decode_policy == policy;
        let (document, prompt) = (self.document, self.prompt);
        // The chat template puts model and tools before the messages.
        let seed = || hash_of((document.get("model"), document.get("tools")));
        PromptKey {
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

    /// Waits in a fair queue for a decode engine with room, up to the queue's deadline.
    async fn wait_for_decode(&mut self, key: &PromptKey, buffer: u64) -> Result<Placement, ProxyError> {
        let shared: &Arc<Shared> = self.shared;
        let kv = self.demand.prompt.saturating_add(self.demand.answer);
        let weight = Weight { kv, buffer };
        let turn = shared.next_turn(Role::Decode);
        if let Some(placement) = self.try_place(Role::Decode, key, weight, turn, None)? {
            return Ok(placement);
        }
        let ticket = self.join()?;
        let began = Instant::now();
        let limit = shared.settings.config.admission.queue_deadline;
        let mut deadline = std::pin::pin!(tokio::time::sleep(limit));
        let mut view = shared.view.clone();
        view.mark_unchanged();
        loop {
            if let Some(placement) = self.try_place(Role::Decode, key, weight, turn, Some(&ticket))? {
                self.record.observe_stage(TimedStage::Queue, began.elapsed());
                return Ok(placement);
            }
            tokio::select! {
                () = ticket.turn.notified() => {}
                Ok(()) = view.changed() => {}
                () = &mut deadline => {
                    self.record.observe_stage(TimedStage::Queue, began.elapsed());
                    let retry_after = shared.scheduler.lock().queue.retry_after();
                    return Err(ProxyError::QueueTimeout { limit, retry_after });
                }
            }
        }
    }

    /// Leases the best engine with room. `None` if it is not this request's turn, or no engine has room.
    fn try_place(
        &mut self,
        role: Role,
        key: &PromptKey,
        weight: Weight,
        turn: usize,
        ticket: Option<&QueueTicket<'_>>,
    ) -> Result<Option<Placement>, ProxyError> {
        let shared = self.shared;
        let routing = &shared.settings.config.routing;
        let request = SelectionRequest {
            policy: if role == Role::Prefill {
                routing.prefill_policy
            } else {
                routing.decode_policy
            },
            session: key.session,
            beginning: key.beginning,
            tokens: self.demand.prompt,
        };
        let view = Arc::clone(&shared.view.borrow());
        let engines = self.engines(role, &view)?;
        // Prefill engines queue by themselves, and canaries have given engines.
        let is_limited = role == Role::Decode && self.pair.is_none();
        let now = Instant::now();
        let mut tracker = shared.scheduler.lock();
        let number = ticket.map(|ticket| ticket.number);
        if is_limited && !tracker.queue.can_try(number, now) {
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
                tokens: tracker.tokens(engine),
                known: tracker.known_tokens(engine, &key.chunks),
                has_room: !is_limited || tracker.fits(engine, weight),
                tried: self.has_tried(engine) || tracker.is_failing(engine, now),
            })
            .collect();
        while let Some(place) = pick::best(&candidates, &request) {
            let Candidate { engine, known, .. } = candidates.swap_remove(place);
            let Some(lease) = EngineLease::acquire(engine, &shared.view) else {
                continue;
            };
            tracker.enter(engine, weight, &key.chunks);
            tracker
                .breaker(engine)
                .into_iter()
                .for_each(|breaker| breaker.enter(now));
            if let Some(number) = number {
                tracker.queue.serve(number, now);
            }
            wake(&tracker);
            self.engines.push(Arc::clone(engine));
            let reservation = Reservation {
                shared: Arc::clone(shared),
                engine: Arc::clone(engine),
                weight: Mutex::new(weight),
            };
            let lease = Arc::new(lease.with_reservation(reservation));
            return Ok(Some(Placement { lease, known }));
        }
        if candidates.is_empty() {
            return Err(ProxyError::NoEngine(role));
        }
        if number.is_some_and(|number| !self.demand.exact && tracker.queue.defer(number, now)) {
            wake(&tracker);
        }
        Ok(None)
    }

    fn has_tried(&self, engine: &EngineView) -> bool {
        let is_same = |tried: &Arc<EngineView>| tried.id == engine.id && tried.incarnation == engine.incarnation;
        self.tried.iter().any(is_same)
    }

    /// Whether an engine serves on which this request has not failed.
    pub(crate) fn has_untried(&self, role: Role, view: &FleetView) -> bool {
        view.serving(role).any(|engine| !self.has_tried(engine))
    }

    /// The engines that can get the request, at least one.
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

    /// Records the prefill engine's answer: it computes nothing more for this request, and its answer counts the
    /// prompt.
    pub(crate) fn prefill_answered(&self, prefill: &EngineLease, decode: &EngineLease, answer: &[u8]) {
        #[derive(Deserialize)]
        struct Answer {
            usage: Usage,
        }
        #[derive(Deserialize)]
        struct Usage {
            prompt_tokens: u64,
        }
        prefill
            .reservation()
            .inspect(|reservation| reservation.change(|_| Weight::default()));
        let demand = self.demand;
        if demand.exact {
            return;
        }
        if let (Some(reservation), Ok(answer)) = (decode.reservation(), serde_json::from_slice::<Answer>(answer)) {
            let prompt = answer.usage.prompt_tokens;
            reservation.change(|weight| Weight {
                kv: weight.kv.saturating_sub(demand.prompt).saturating_add(prompt),
                buffer: if weight.buffer == 0 {
                    0
                } else {
                    Weight::buffer_for(prompt)
                },
            });
        }
    }

    /// Joins the queue, unless it is full.
    fn join(&self) -> Result<QueueTicket<'job>, ProxyError> {
        let shared: &'job Shared = self.shared;
        let client = match (self.authorization, self.session) {
            (Some(key), _) => hash_of(key.as_bytes()),
            (None, Some(session)) => hash_of(session),
            (None, None) => 0,
        };
        let limit = shared.settings.config.admission.max_queued;
        let mut tracker = shared.scheduler.lock();
        if tracker.queue.len() >= limit {
            let retry_after = tracker.queue.retry_after();
            return Err(ProxyError::QueueFull { limit, retry_after });
        }
        let turn = Arc::new(Notify::new());
        let number = tracker.queue.join(client, Arc::clone(&turn));
        Ok(QueueTicket {
            shared,
            client,
            number,
            turn,
        })
    }
}
