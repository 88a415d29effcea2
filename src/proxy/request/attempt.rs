//! One attempt at a generation: its engines, and the legs that every way of serving is made of.
//!
//! `flow` and `first_token` decide which legs run in which order.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::response::Parts;
use axum::http::{HeaderMap, Response};
use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::answer::{Verdict, check_encoding, first_events, is_event_stream, judge, judge_event, verbatim};
use super::stream_body::{Clock, Guarded, GuardedBody, Tally};
use crate::fleet::EngineId;
use crate::proxy::Shared;
use crate::proxy::body::document::Document;
use crate::proxy::body::serving_mode::{self, Kind};
use crate::proxy::body::sse::Events;
use crate::proxy::body::usage::{PrefillUsage, Proof};
use crate::proxy::error::{Cause, ProxyError, Stage};
use crate::proxy::schedule::lease::Seat;
use crate::proxy::schedule::pairs::CRAWL;
use crate::proxy::schedule::selection::EngineSelector;
use crate::proxy::telemetry::metrics::{Outcome, Timed};
use crate::proxy::telemetry::record::Record;
use crate::proxy::transfer::{self, Care, Consume, Entry, PrefillCall};
use crate::proxy::upstream::{AnswerBody, Call, forwardable, whole};

/// How long each stage may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    pub(crate) prefill: Duration,
    pub(crate) handoff: Duration,
    /// To the first byte of the decode leg, and between two reads.
    pub(crate) decode: Duration,
}

/// A client's request, read and admitted.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) kind: Kind,
    pub(crate) body: Bytes,
    /// The client's headers that may cross.
    pub(crate) headers: HeaderMap,
    /// The session that the request belongs to.
    pub(crate) session: Option<String>,
    /// The engines to use, whatever the fleet's stage: prefill, decode. For canaries.
    pub(crate) pair: Option<(EngineId, EngineId)>,
    pub(crate) deadlines: Deadlines,
    pub(crate) arrived: Instant,
    pub(crate) permit: Arc<OwnedSemaphorePermit>,
    pub(crate) record: Arc<Record>,
}

/// How long the stages of an answered request took; an extension of its response.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stages {
    /// From the prefill's answer until the KV was there.
    pub(crate) handoff: Duration,
    /// From sending the decode leg to its first event or whole answer.
    pub(crate) first_byte: Duration,
}

/// What became of an answered request's hand-off; an extension of its response.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Told {
    pub(crate) outcome: Outcome,
    /// Why a decode engine answered alone.
    pub(crate) reason: Option<&'static str>,
}

pub(crate) fn told(mut response: Response<Body>, outcome: Outcome, reason: Option<&'static str>) -> Response<Body> {
    response.extensions_mut().insert(Told { outcome, reason });
    response
}

/// The attempts at a request, one after the other.
pub(crate) struct Attempt<'job> {
    pub(crate) shared: &'job Arc<Shared>,
    pub(crate) job: &'job Job,
    pub(crate) document: &'job Document<'job>,
    pub(crate) selector: EngineSelector<'job>,
    /// The number of this one, from 1.
    pub(crate) number: u32,
}

/// What a prefill engine said.
pub(crate) enum Prefilled {
    /// An answer of 200.
    Answer(Bytes),
    /// An answer of 4xx.
    Refused,
}

/// What a decode engine said.
pub(crate) enum Decoded {
    /// A whole answer of 200.
    Whole(Parts, Bytes),
    /// The beginning of a stream.
    Stream(Parts, AnswerBody),
    /// An answer of 4xx, for the client.
    Refused(Response<Body>),
}

impl Attempt<'_> {
    /// A decode engine alone, and why.
    pub(crate) async fn bypass(&mut self, seat: Arc<Seat>, reason: &'static str) -> Result<Response<Body>, ProxyError> {
        let why = serving_mode::why(self.job.kind, reason);
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
    pub(crate) async fn refused(&mut self, mut entry: Entry, decode: Arc<Seat>) -> Result<Response<Body>, ProxyError> {
        entry.close();
        decode.held().inspect(|held| held.consumed());
        self.bypass(decode, "prefill_refused").await
    }

    /// Opens the ledger's entry for a hand-off.
    pub(crate) fn reserve(&self, decode: &Arc<Seat>, id: &str, consume: Consume) -> Entry {
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
    pub(crate) async fn deliver(
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
            self.selector.prefilled(prefill, decode, answer);
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
        let headers = self.job.record.leg(&seat.engine, id, &self.job.headers);
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
            transfer::fetch(self.shared, call).await?
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
    pub(crate) async fn decode(&self, seat: &Seat, id: &str, path: &str, body: Vec<u8>) -> Result<Decoded, ProxyError> {
        let deadline = self.job.deadlines.decode;
        let headers = self.job.record.leg(&seat.engine, id, &self.job.headers);
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
    pub(crate) async fn pass_on(
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
    pub(crate) fn settled(&self, decode: &Seat, proof: Proof) -> Result<Outcome, ProxyError> {
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
    pub(crate) fn tally(&self, outcome: Outcome) -> Tally {
        let is_clients = self.job.pair.is_none();
        Tally {
            record: Arc::clone(&self.job.record),
            outcome,
            pair: is_clients.then(|| (Arc::clone(self.shared), self.selector.engines.clone())),
            crawled: false,
        }
    }

    /// Measures the whole request until it is dropped.
    pub(crate) fn clock(&self) -> Clock {
        Clock {
            record: Arc::clone(&self.job.record),
            last_read: None,
            _permit: Arc::clone(&self.job.permit),
        }
    }

    /// Notes that the answer begins now.
    pub(crate) fn begin(&self, mut response: Response<Body>, decode_sent: Instant) -> Response<Body> {
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
pub(crate) fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}
