//! One request, top to bottom: parse, decide, reserve decode, pick prefill, prefill leg, hand-off, decode leg, stream on.
//!
//! A retry starts at the top with a new pair of engines and a new id, and only while no byte has gone to the client.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::response::Parts;
use axum::http::{HeaderMap, HeaderValue, Response};
use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Shared;
use super::admission::Ask;
use super::answer::{Verdict, check_encoding, first_events, is_event_stream, judge, judge_event, verbatim};
use super::body::Document;
use super::error::{Cause, ProxyError, Stage};
use super::guard::{Clock, Guarded, GuardedBody, Tally};
use super::ledger::{self, Care, Consume, Entry, PrefillCall, one_token_edits};
use super::media::{self, Condensed};
use super::metrics::{Outcome, Timed};
use super::pairs::CRAWL;
use super::record::Record;
use super::rules::{self, Course, Kind};
use super::seats::Seated;
use super::sse::Events;
use super::upstream::{AnswerBody, Call, Seat, forwardable, whole};
use super::usage::{PrefillUsage, Proof};
use crate::fleet::{EngineId, EngineView};

/// How long each stage may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadlines {
    pub(super) prefill: Duration,
    pub(super) handoff: Duration,
    /// To the first byte of the decode leg, and between two reads.
    pub(super) decode: Duration,
}

/// A client's request, read and admitted.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) kind: Kind,
    pub(super) body: Bytes,
    /// The client's headers that may cross.
    pub(super) headers: HeaderMap,
    /// The session that the request belongs to.
    pub(super) session: Option<String>,
    /// The engines to use, whatever the fleet's stage: prefill, decode. For canaries.
    pub(super) pair: Option<(EngineId, EngineId)>,
    pub(super) deadlines: Deadlines,
    pub(super) arrived: Instant,
    pub(super) permit: Arc<OwnedSemaphorePermit>,
    pub(super) record: Arc<Record>,
}

/// How long the stages of an answered request took; an extension of its response.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stages {
    /// From the prefill's answer until the KV was there.
    pub(super) handoff: Duration,
    /// From sending the decode leg to its first event or whole answer.
    pub(super) first_byte: Duration,
}

/// What became of an answered request's hand-off; an extension of its response.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Told {
    pub(super) outcome: Outcome,
    /// Why a decode engine answered alone.
    pub(super) reason: Option<&'static str>,
}

pub(super) fn told(mut response: Response<Body>, outcome: Outcome, reason: Option<&'static str>) -> Response<Body> {
    response.extensions_mut().insert(Told { outcome, reason });
    response
}

/// The attempts at a request, one after the other.
pub(super) struct Attempt<'job> {
    pub(super) shared: &'job Arc<Shared>,
    pub(super) job: &'job Job,
    pub(super) document: &'job Document<'job>,
    /// Its prompt, as far as its size goes.
    pub(super) prompt: &'job Condensed<'job>,
    /// What it asks for.
    pub(super) ask: Ask,
    /// The number of this one, from 1.
    number: u32,
    /// Engines that the next attempt should leave alone.
    pub(super) tried: Vec<Arc<EngineView>>,
    /// The engines of this attempt.
    pub(super) engines: Vec<Arc<EngineView>>,
}

/// What a prefill engine said.
pub(super) enum Prefilled {
    /// An answer of 200.
    Answer(Bytes),
    /// An answer of 4xx.
    Refused,
}

/// What a decode engine said.
pub(super) enum Decoded {
    /// A whole answer of 200.
    Whole(Parts, Bytes),
    /// The beginning of a stream.
    Stream(Parts, AnswerBody),
    /// An answer of 4xx, for the client.
    Refused(Response<Body>),
}

/// Answers a request.
pub(super) async fn answer(shared: &Arc<Shared>, job: Job) -> Result<Response<Body>, ProxyError> {
    let document = Document::parse(&job.body)?;
    let course = rules::course(job.kind, &document, shared.settings.connector.decode_flow());
    let prompt = media::condensed(document.given(job.kind.prompt_field()).unwrap_or_default());
    let mut ask = Ask::of(job.kind, &document, &prompt);
    if ask.may_be_too_long() {
        let length = shared.model_length(&job.headers).await;
        ask = length.map_or(ask, |length| ask.within(length));
    }
    let mut attempt = Attempt {
        shared,
        job: &job,
        document: &document,
        prompt: &prompt,
        ask,
        number: 0,
        tried: Vec::new(),
        engines: Vec::new(),
    };
    let mut most = shared.settings.service.routing.attempts;
    if job.pair.is_some() {
        // The first hand-off of a fresh pair may fail, a second failure is what a canary is to find.
        most = most.min(2);
    }
    // What busy engines ask for: one may be free sooner, but nobody knows which.
    let mut longest = None;
    loop {
        attempt.number += 1;
        let mut error = match Box::pin(attempt.run(&course)).await {
            Ok(response) => {
                shared.seats.succeeded(&attempt.engines);
                return Ok(attempt.labelled(response));
            }
            Err(error) => error,
        };
        attempt.blame(&error);
        if let Some(retry_after) = error.busy() {
            longest = longest.max(*retry_after);
            *retry_after = longest;
        }
        if attempt.number >= most || !attempt.may_retry(&error) {
            return Err(error);
        }
        tracing::warn!(
            error = crate::report::one_line(&error),
            "trying another pair of engines"
        );
        job.record.retried();
    }
}

impl Attempt<'_> {
    async fn run(&mut self, course: &Course) -> Result<Response<Body>, ProxyError> {
        self.engines.clear();
        let outcome = match course {
            Course::Bypass(reason) => {
                let seat = self.seat_alone().await?;
                self.bypass(seat, reason).await
            }
            Course::Handoff => self.hand_over().await,
            Course::Splice(request) => super::splice::run(self, request).await,
        };
        if matches!(outcome, Err(ProxyError::Leg { .. })) {
            self.job.record.handed(Outcome::Failed);
        }
        outcome
    }

    /// The answer with a header that says what became of its hand-off, in the syntax of RFC 8941:
    /// `transferred;decode="decoder2";prefill="prefiller1";attempt=1`.
    fn labelled(&self, mut response: Response<Body>) -> Response<Body> {
        let Told { outcome, reason } = response.extensions().get().copied().unwrap_or_default();
        let mut label = outcome.as_str().to_owned();
        let mut add = |name: &str, value: &str| label.extend([";", name, "=\"", value, "\""]);
        if let Some(reason) = reason {
            add("reason", reason);
        }
        for engine in &self.engines {
            add(&engine.role.to_string(), engine.id.as_str());
        }
        label.extend([";attempt=", &self.number.to_string()]);
        if let Ok(value) = HeaderValue::from_str(&label) {
            response.headers_mut().insert("x-xpyd-handoff", value);
        }
        response
    }

    /// Notes which engines the next attempt should leave alone.
    fn blame(&mut self, error: &ProxyError) {
        let ProxyError::Leg {
            stage,
            engine: id,
            cause,
        } = error
        else {
            return;
        };
        if error.blames_engine() {
            let engine = self.engines.iter().find(|engine| engine.id == *id);
            engine.inspect(|engine| self.shared.seats.failed(engine));
        }
        let may_be_handoff = matches!(stage, Stage::Handoff | Stage::Decode)
            && !matches!(
                cause,
                Cause::Gone
                    | Cause::Unreachable(_)
                    | Cause::Pair(_)
                    | Cause::Descriptors(_)
                    | Cause::Busy { .. }
                    | Cause::Encoded(_)
            );
        if may_be_handoff && self.job.pair.is_none() {
            self.shared.note_handoff(&self.engines, true);
        }
        // KV that does not arrive may be the fault of either.
        let is_avoided = |engine: &Arc<EngineView>| engine.id == *id || *stage == Stage::Handoff;
        self.tried.extend(self.engines.drain(..).filter(is_avoided));
    }

    /// Whether another attempt makes sense. A busy engine is not asked again at once, so there must be another one.
    fn may_retry(&self, error: &ProxyError) -> bool {
        let ProxyError::Leg {
            engine,
            cause: Cause::Busy { .. },
            ..
        } = error
        else {
            return error.can_be_retried();
        };
        let view = Arc::clone(&self.shared.view.borrow());
        self.job.pair.is_some()
            || view
                .engine(engine)
                .is_none_or(|busy| self.has_untried(busy.role, &view))
    }

    /// A decode engine alone, and why.
    pub(super) async fn bypass(&mut self, seat: Arc<Seat>, reason: &'static str) -> Result<Response<Body>, ProxyError> {
        let why = rules::why(self.job.kind, reason);
        tracing::debug!(reason, why, "answered by a decode engine alone");
        let id = new_id();
        let sent = Instant::now();
        let body = self.document.edited(&[]);
        let decoded = self.decode(&seat, &id, self.job.kind.path(), body).await?;
        let response = self.pass_on(&seat, None, decoded, sent).await?;
        if response.extensions().get::<Told>().is_some() {
            return Ok(response);
        }
        Ok(told(response, Outcome::Bypassed, Some(reason)))
    }

    /// The prefill engine has refused a request, in words that may be about its own leg of it: the decode engine has the
    /// last word, on what the client asked for.
    pub(super) async fn refused(&mut self, mut entry: Entry, decode: Arc<Seat>) -> Result<Response<Body>, ProxyError> {
        entry.close();
        decode.held().inspect(|held| held.consumed());
        self.bypass(decode, "prefill_refused").await
    }

    /// Prefill on one engine, decode on another.
    async fn hand_over(&mut self) -> Result<Response<Body>, ProxyError> {
        let (prefill, decode) = match self.seats().await? {
            Seated::Pair(prefill, decode) => (prefill, decode),
            Seated::Alone(decode, reason) => return self.bypass(decode, reason).await,
        };
        let id = new_id();
        let mut entry = self.reserve(&decode, &id, Consume::Original(self.job.kind, self.job.body.clone()));
        match Box::pin(self.legs(prefill, &decode, &mut entry, &id)).await {
            Ok(Some(response)) => Ok(response),
            Ok(None) => self.refused(entry, decode).await,
            Err(error) => {
                entry.failed(&error);
                Err(error)
            }
        }
    }

    /// Both legs of a hand-off; no answer if the prefill engine refuses its own.
    async fn legs(
        &self,
        prefill: Arc<Seat>,
        decode: &Arc<Seat>,
        entry: &mut Entry,
        id: &str,
    ) -> Result<Option<Response<Body>>, ProxyError> {
        let path = self.job.kind.path();
        let connector = &self.shared.settings.connector;
        let params = connector.prefill_params(id, &decode.engine.endpoint);
        let mut edits = one_token_edits(self.job.kind);
        edits.push(("kv_transfer_params", Some(&params)));
        let body = self.document.edited(&edits);
        let (answer, handoff_time) = match self.deliver(&prefill, decode, entry, id, path, body).await? {
            (Prefilled::Answer(answer), time) => (answer, time),
            (Prefilled::Refused, _) => return Ok(None),
        };
        let usage = PrefillUsage::of(&answer);
        drop(answer);
        drop(prefill);
        let sent = Instant::now();
        let edit = entry.send().map(|params| ("kv_transfer_params", Some(params)));
        let body = self.document.edited(edit.as_slice());
        let decoded = self.decode(decode, id, path, body).await?;
        let mut response = self.pass_on(decode, Some((entry, usage)), decoded, sent).await?;
        if let Some(stages) = response.extensions_mut().get_mut::<Stages>() {
            stages.handoff = handoff_time;
        }
        Ok(Some(response))
    }

    /// Opens the ledger's entry for a hand-off.
    pub(super) fn reserve(&self, decode: &Arc<Seat>, id: &str, consume: Consume) -> Entry {
        let care = Care {
            decode: Arc::clone(decode),
            headers: self.job.headers.clone(),
            request_id: id.to_owned(),
            consume,
            deadline: self.job.deadlines.handoff,
            permit: Arc::clone(&self.job.permit),
            prefill: None,
            decode_params: self.shared.settings.connector.decode_params(id),
        };
        Entry::reserve(self.shared, &self.job.record, care)
    }

    /// The prefill leg and the KV's way: afterwards the entry is handed, unless the engine refused.
    pub(super) async fn deliver(
        &self,
        prefill: &Arc<Seat>,
        decode: &Seat,
        entry: &mut Entry,
        id: &str,
        path: &'static str,
        body: Vec<u8>,
    ) -> Result<(Prefilled, Duration), ProxyError> {
        let connector = &self.shared.settings.connector;
        let notifications = self.shared.notifications.as_ref().filter(|_| connector.notifies());
        let ranks = prefill.engine.endpoint.tensor_parallel;
        let count = self.shared.settings.notifications.unwrap_or(ranks);
        entry.prefilling(
            prefill,
            notifications.map(|notifications| notifications.expect(id, count)),
        );
        let legs = async {
            let prefilled = self.prefill(prefill, id, path, body).await?;
            let Prefilled::Answer(answer) = &prefilled else {
                return Ok((prefilled, Duration::ZERO));
            };
            self.prefilled(prefill, decode, answer);
            let handoff = self.shared.settings.connector.read_handoff(answer);
            let handoff = handoff.map_err(|error| prefill.failed(Stage::Handoff, error.into()))?;
            let answered = Instant::now();
            let arrived = async {
                entry.arrived().await;
                Ok(())
            };
            prefill.run(Stage::Handoff, self.job.deadlines.handoff, arrived).await?;
            entry.handed(handoff);
            self.job.record.took(Timed::Handoff, answered.elapsed());
            Ok((prefilled, answered.elapsed()))
        };
        tokio::select! {
            biased;
            outcome = legs => outcome,
            () = decode.gone() => Err(decode.failed(Stage::Handoff, Cause::Gone)),
        }
    }

    async fn prefill(
        &self,
        seat: &Arc<Seat>,
        id: &str,
        path: &'static str,
        body: Vec<u8>,
    ) -> Result<Prefilled, ProxyError> {
        let sent = Instant::now();
        let headers = self.job.record.leg(seat, id, &self.job.headers);
        let deadline = self.job.deadlines.prefill;
        let (head, body) = if self.shared.settings.connector.notifies() {
            let call = Call::post(path, &headers, id, body);
            let step = self.shared.upstream.fetch(&seat.engine, call);
            seat.run(Stage::Prefill, deadline, step).await?
        } else {
            let call = PrefillCall {
                seat: Arc::clone(seat),
                _permit: Arc::clone(&self.job.permit),
                path,
                headers: headers.into_owned(),
                request_id: id.to_owned(),
                body: body.into(),
                deadline,
            };
            ledger::fetch(self.shared, call).await?
        };
        match judge(&head, &body).map_err(|cause| seat.failed(Stage::Prefill, cause))? {
            Verdict::Good => {
                self.job.record.took(Timed::Prefill, sent.elapsed());
                self.job.record.prefilled(&body);
                Ok(Prefilled::Answer(body))
            }
            Verdict::Refused => Ok(Prefilled::Refused),
        }
    }

    /// Sends the decode leg. A stream is returned as soon as its head is there.
    pub(super) async fn decode(&self, seat: &Seat, id: &str, path: &str, body: Vec<u8>) -> Result<Decoded, ProxyError> {
        let deadline = self.job.deadlines.decode;
        let headers = self.job.record.leg(seat, id, &self.job.headers);
        let call = Call::post(path, &headers, id, body);
        let step = self.shared.upstream.send(&seat.engine, call);
        let (head, body) = seat.run(Stage::Decode, deadline, step).await?.into_parts();
        if head.status.is_success() && is_event_stream(&head) {
            check_encoding(&head).map_err(|cause| seat.failed(Stage::Decode, cause))?;
            return Ok(Decoded::Stream(head, body));
        }
        let body = seat.run(Stage::Decode, deadline, whole(body)).await?;
        match judge(&head, &body).map_err(|cause| seat.failed(Stage::Decode, cause))? {
            Verdict::Good => Ok(Decoded::Whole(head, body)),
            Verdict::Refused => Ok(Decoded::Refused(verbatim(head, body))),
        }
    }

    /// Passes a decode engine's answer on, with the usage of the prefill engine where one was asked. A stream is held back
    /// until its first event, because an error there can still become a status, or another attempt.
    async fn pass_on(
        &self,
        seat: &Arc<Seat>,
        handed: Option<(&mut Entry, PrefillUsage)>,
        decoded: Decoded,
        sent: Instant,
    ) -> Result<Response<Body>, ProxyError> {
        let clock = self.clock();
        let (mut entry, usage) = handed.map_or((None, None), |(entry, usage)| (Some(entry), Some(usage)));
        let refuse = |entry: &mut Option<&mut Entry>, refusal| {
            if let Some(entry) = entry {
                entry.refused();
            }
            self.job.record.handed(Outcome::Refused);
            Ok(told(refusal, Outcome::Refused, None))
        };
        let (head, mut body) = match decoded {
            Decoded::Refused(response) => return refuse(&mut entry, response),
            Decoded::Whole(head, body) => {
                self.job.record.decoded(&body);
                self.check_lease(seat, entry.as_deref_mut())?;
                let Some(entry) = entry else {
                    let _tally = self.tally(Outcome::Bypassed);
                    return Ok(self.begin(verbatim(head, body), sent));
                };
                let (body, proof) = match usage.and_then(|usage| usage.correct(&body)) {
                    Some((corrected, proof)) => (corrected.into(), proof),
                    None => (body, Proof::None),
                };
                entry.answered().prove(proof);
                let outcome = self.settled(seat, proof)?;
                let _tally = self.tally(outcome);
                return Ok(self.begin(told(verbatim(head, body), outcome, None), sent));
            }
            Decoded::Stream(head, body) => (head, body),
        };
        let mut events = Events::default();
        let first = seat.run(
            Stage::Decode,
            self.job.deadlines.decode,
            first_events(&mut body, &mut events),
        );
        let first = first.await?;
        if let Some(refusal) = judge_event(&first).map_err(|cause| seat.failed(Stage::Decode, cause))? {
            return refuse(&mut entry, refusal);
        }
        self.check_lease(seat, entry.as_deref_mut())?;
        let handed = entry.is_some();
        let mut tally = self.tally(if handed { Outcome::Sent } else { Outcome::Bypassed });
        tally.crawled = sent.elapsed() >= CRAWL;
        let guarded = Guarded {
            unproven: entry.map(Entry::answered),
            events: Some(events),
            usage,
            tally: Some(tally),
            ..Guarded::new(Arc::clone(seat), self.job.deadlines.decode, clock)
        };
        let headers = forwardable(&head.headers);
        let body = Body::new(GuardedBody::after(first, body, guarded));
        let mut response = Response::from_parts(head, body);
        *response.headers_mut() = headers;
        Ok(self.begin(response, sent))
    }

    /// Fails a hand-off whose KV may have been given away before the decode engine read it. No byte of the answer has gone
    /// to the client.
    fn check_lease(&self, decode: &Seat, entry: Option<&mut Entry>) -> Result<(), ProxyError> {
        let lease = self.shared.settings.kv_lease;
        let (Some(entry), Some(lease)) = (entry, lease) else {
            return Ok(());
        };
        let Some(age) = entry.outlived(lease) else {
            return Ok(());
        };
        // The decode engine has told the prefill engine that it is done with these blocks, so none are left to free.
        entry.consumed();
        self.shared.metrics.lease_over();
        Err(decode.failed(Stage::Handoff, Cause::LeaseOver { age, lease }))
    }

    /// How a hand-off ended that has come to a whole answer. A strict one has failed if its KV did not arrive.
    pub(super) fn settled(&self, decode: &Seat, proof: Proof) -> Result<Outcome, ProxyError> {
        match proof {
            Proof::Received => Ok(Outcome::Transferred),
            Proof::None => Ok(Outcome::Sent),
            Proof::Computed if self.shared.settings.service.handoff.strict => {
                Err(decode.failed(Stage::Handoff, Cause::Recomputed))
            }
            Proof::Computed => Ok(Outcome::Recomputed),
        }
    }

    /// Counts a hand-off that has come to an answer, or a request that needed none.
    pub(super) fn tally(&self, outcome: Outcome) -> Tally {
        let is_clients = self.job.pair.is_none();
        Tally {
            record: Arc::clone(&self.job.record),
            outcome,
            pair: is_clients.then(|| (Arc::clone(self.shared), self.engines.clone())),
            crawled: false,
        }
    }

    /// Measures the whole request until it is dropped.
    pub(super) fn clock(&self) -> Clock {
        Clock {
            record: Arc::clone(&self.job.record),
            last_read: None,
            _permit: Arc::clone(&self.job.permit),
        }
    }

    /// Notes that the answer begins now.
    pub(super) fn begin(&self, mut response: Response<Body>, decode_sent: Instant) -> Response<Body> {
        let first_byte = decode_sent.elapsed();
        self.job.record.took(Timed::DecodeFirstByte, first_byte);
        self.job.record.first_token_after(self.job.arrived.elapsed());
        response.extensions_mut().insert(Stages {
            first_byte,
            ..Stages::default()
        });
        response
    }
}

/// An id that no other request has, over all proxies and restarts: KV is matched by it.
pub(super) fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}
