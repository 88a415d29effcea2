//! One attempt at a generation: its engines, and the legs that all serving modes consist of.
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

use super::answer::{
    AnswerClass, check_encoding, classify, classify_first_event, first_events, is_event_stream, verbatim,
};
use super::stream_body::{OutcomeOnDrop, StreamBody, StreamContext, TokenTimer};
use crate::Shared;
use crate::body::document::Document;
use crate::body::serving_mode::{self, GenerationKind};
use crate::body::sse::Events;
use crate::body::usage::{PrefillUsage, Proof};
use crate::error::{Cause, ProxyError, RequestStage};
use crate::schedule::lease::EngineLease;
use crate::schedule::pairs::CRAWL;
use crate::schedule::selection::EngineSelector;
use crate::telemetry::metrics::{HandoffOutcome, TimedStage};
use crate::telemetry::record::Record;
use crate::transfer::{self, CleanupContext, ConsumeRequest, PrefillCall, Transfer};
use crate::upstream::{AnswerBody, Call, forwardable, read_whole};
use xpyd_base::fleet::EngineId;
use xpyd_base::proxy_config::RequestDeadlines;

/// A client's generation request, read and admitted.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) kind: GenerationKind,
    pub(crate) body: Bytes,
    /// The headers that engines get.
    pub(crate) headers: HeaderMap,
    /// The session of the request, if it has one.
    pub(crate) session: Option<String>,
    /// The prefill and decode engine that must serve it, whatever the fleet's stage. For canaries.
    pub(crate) pair: Option<(EngineId, EngineId)>,
    pub(crate) deadlines: RequestDeadlines,
    pub(crate) arrived: Instant,
    pub(crate) permit: Arc<OwnedSemaphorePermit>,
    pub(crate) record: Arc<Record>,
}

/// How long the stages of an answered request took. An extension of its response.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HandoffTimings {
    /// From the prefill engine's answer until the KV arrived.
    pub(crate) handoff: Duration,
    /// From sending the decode leg to its first event or whole answer.
    pub(crate) first_byte: Duration,
}

/// How the hand-off of an answered request ended. An extension of its response.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HandoffReport {
    pub(crate) outcome: HandoffOutcome,
    /// Why a decode engine answered alone.
    pub(crate) reason: Option<&'static str>,
}

pub(crate) fn with_report(
    mut response: Response<Body>,
    outcome: HandoffOutcome,
    reason: Option<&'static str>,
) -> Response<Body> {
    response.extensions_mut().insert(HandoffReport { outcome, reason });
    response
}

/// An attempt at a request. A retry reuses it with new engines.
pub(crate) struct Attempt<'job> {
    pub(crate) shared: &'job Arc<Shared>,
    pub(crate) job: &'job Job,
    pub(crate) document: &'job Document<'job>,
    pub(crate) selector: EngineSelector<'job>,
    /// The number of this attempt, from 1.
    pub(crate) number: u32,
}

/// The answer of a prefill engine.
pub(crate) enum PrefillAnswer {
    /// The body of an answer with status 200.
    Good(Bytes),
    /// An answer with status 4xx.
    Refused,
}

/// The answer of a decode engine.
pub(crate) enum DecodeAnswer {
    /// A whole answer with status 200.
    Whole(Parts, Bytes),
    /// The head of a stream and its body.
    Stream(Parts, AnswerBody),
    /// An answer with status 4xx, for the client.
    Refused(Response<Body>),
}

impl Attempt<'_> {
    /// Lets the decode engine answer alone, for this reason.
    pub(crate) async fn bypass(
        &mut self,
        lease: Arc<EngineLease>,
        reason: &'static str,
    ) -> Result<Response<Body>, ProxyError> {
        let why = serving_mode::reason_for(self.job.kind, reason);
        tracing::debug!(reason, why, "a decode engine answers alone");
        let id = new_id();
        let sent = Instant::now();
        let body = self.document.edited(&[]);
        let decoded = self.decode(&lease, &id, self.job.kind.path(), body).await?;
        let response = self.pass_on(&lease, None, decoded, sent).await?;
        if response.extensions().get::<HandoffReport>().is_some() {
            return Ok(response);
        }
        Ok(with_report(response, HandoffOutcome::Bypassed, Some(reason)))
    }

    /// Lets the decode engine answer what the prefill engine refused. The refusal can be about the proxy's edits of
    /// the prefill leg, so the client gets the decode engine's answer to its own request.
    pub(crate) async fn refused(
        &mut self,
        mut transfer: Transfer,
        decode: Arc<EngineLease>,
    ) -> Result<Response<Body>, ProxyError> {
        transfer.close();
        decode.reservation().inspect(|reservation| reservation.release_buffer());
        self.bypass(decode, "prefill_refused").await
    }

    /// Opens the transfer of a hand-off.
    pub(crate) fn reserve(&self, decode: &Arc<EngineLease>, id: &str, consume: ConsumeRequest) -> Transfer {
        let context = CleanupContext {
            decode: Arc::clone(decode),
            headers: self.job.headers.clone(),
            request_id: id.to_owned(),
            consume,
            deadline: self.job.deadlines.handoff,
            permit: Arc::clone(&self.job.permit),
            prefill: None,
            decode_params: self.shared.settings.connector.decode_params(id),
        };
        Transfer::reserve(self.shared, &self.job.record, context)
    }

    /// Runs the prefill leg and waits for the KV. Afterwards the transfer is delivered, unless the engine refused.
    pub(crate) async fn deliver(
        &self,
        prefill: &Arc<EngineLease>,
        decode: &EngineLease,
        transfer: &mut Transfer,
        id: &str,
        path: &'static str,
        body: Vec<u8>,
    ) -> Result<(PrefillAnswer, Duration), ProxyError> {
        let connector = &self.shared.settings.connector;
        let notifications = self.shared.notifications.as_ref().filter(|_| connector.notifies());
        let ranks = prefill.engine.endpoint.tensor_parallel;
        let count = self.shared.settings.notifications.unwrap_or(ranks);
        transfer.begin_prefill(
            prefill,
            notifications.map(|notifications| notifications.expect(id, count)),
        );
        let legs = async {
            let prefilled = self.prefill(prefill, id, path, body).await?;
            let PrefillAnswer::Good(answer) = &prefilled else {
                return Ok((prefilled, Duration::ZERO));
            };
            self.selector.prefill_answered(prefill, decode, answer);
            let handoff = self.shared.settings.connector.read_handoff(answer);
            let handoff = handoff.map_err(|error| prefill.failed(RequestStage::Handoff, error.into()))?;
            let answered = Instant::now();
            let arrived = async {
                transfer.arrived().await;
                Ok(())
            };
            prefill
                .run(RequestStage::Handoff, self.job.deadlines.handoff, arrived)
                .await?;
            transfer.delivered(handoff);
            self.job.record.observe_stage(TimedStage::Handoff, answered.elapsed());
            Ok((prefilled, answered.elapsed()))
        };
        tokio::select! {
            biased;
            outcome = legs => outcome,
            () = decode.gone() => Err(decode.failed(RequestStage::Handoff, Cause::Gone)),
        }
    }

    async fn prefill(
        &self,
        lease: &Arc<EngineLease>,
        id: &str,
        path: &'static str,
        body: Vec<u8>,
    ) -> Result<PrefillAnswer, ProxyError> {
        let sent = Instant::now();
        let headers = self.job.record.leg(&lease.engine, id, &self.job.headers);
        let deadline = self.job.deadlines.prefill;
        let (head, body) = if self.shared.settings.connector.notifies() {
            let call = Call::post(path, &headers, id, body);
            let step = self.shared.upstream.fetch(&lease.engine, call);
            lease.run(RequestStage::Prefill, deadline, step).await?
        } else {
            let call = PrefillCall {
                lease: Arc::clone(lease),
                _permit: Arc::clone(&self.job.permit),
                path,
                headers: headers.into_owned(),
                request_id: id.to_owned(),
                body: body.into(),
                deadline,
            };
            transfer::fetch(self.shared, call).await?
        };
        match classify(&head, &body).map_err(|cause| lease.failed(RequestStage::Prefill, cause))? {
            AnswerClass::Good => {
                self.job.record.observe_stage(TimedStage::Prefill, sent.elapsed());
                self.job.record.prefill_answered(&body);
                Ok(PrefillAnswer::Good(body))
            }
            AnswerClass::Refused => Ok(PrefillAnswer::Refused),
        }
    }

    /// Sends the decode leg. Returns a stream as soon as its header is there.
    pub(crate) async fn decode(
        &self,
        lease: &EngineLease,
        id: &str,
        path: &str,
        body: Vec<u8>,
    ) -> Result<DecodeAnswer, ProxyError> {
        let deadline = self.job.deadlines.decode_idle;
        let headers = self.job.record.leg(&lease.engine, id, &self.job.headers);
        let call = Call::post(path, &headers, id, body);
        let step = self.shared.upstream.send(&lease.engine, call);
        let (head, body) = lease.run(RequestStage::Decode, deadline, step).await?.into_parts();
        if head.status.is_success() && is_event_stream(&head) {
            check_encoding(&head).map_err(|cause| lease.failed(RequestStage::Decode, cause))?;
            return Ok(DecodeAnswer::Stream(head, body));
        }
        let body = lease.run(RequestStage::Decode, deadline, read_whole(body)).await?;
        match classify(&head, &body).map_err(|cause| lease.failed(RequestStage::Decode, cause))? {
            AnswerClass::Good => Ok(DecodeAnswer::Whole(head, body)),
            AnswerClass::Refused => Ok(DecodeAnswer::Refused(verbatim(head, body))),
        }
    }

    /// Forwards a decode engine's answer, with the prefill engine's usage if there was one. A stream is held back
    /// until its first event, because an error there can still become a status or another attempt.
    pub(crate) async fn pass_on(
        &self,
        lease: &Arc<EngineLease>,
        transfer_and_usage: Option<(&mut Transfer, PrefillUsage)>,
        decoded: DecodeAnswer,
        sent: Instant,
    ) -> Result<Response<Body>, ProxyError> {
        let timer = self.token_timer();
        let (mut transfer, usage) =
            transfer_and_usage.map_or((None, None), |(transfer, usage)| (Some(transfer), Some(usage)));
        let refuse = |transfer: &mut Option<&mut Transfer>, refusal| {
            if let Some(transfer) = transfer {
                transfer.refused();
            }
            self.job.record.observe_outcome(HandoffOutcome::Refused);
            Ok(with_report(refusal, HandoffOutcome::Refused, None))
        };
        let (head, mut body) = match decoded {
            DecodeAnswer::Refused(response) => return refuse(&mut transfer, response),
            DecodeAnswer::Whole(head, body) => {
                self.job.record.decode_answered(&body);
                self.check_lease(lease, transfer.as_deref_mut())?;
                let Some(transfer) = transfer else {
                    let _on_drop = self.outcome_on_drop(HandoffOutcome::Bypassed);
                    return Ok(self.begin_answer(verbatim(head, body), sent));
                };
                let (body, proof) = match usage.and_then(|usage| usage.correct(&body)) {
                    Some((corrected, proof)) => (corrected.into(), proof),
                    None => (body, Proof::None),
                };
                transfer.answered().prove(proof);
                let outcome = self.handoff_outcome(lease, proof)?;
                let _on_drop = self.outcome_on_drop(outcome);
                return Ok(self.begin_answer(with_report(verbatim(head, body), outcome, None), sent));
            }
            DecodeAnswer::Stream(head, body) => (head, body),
        };
        let mut events = Events::default();
        let first = lease.run(
            RequestStage::Decode,
            self.job.deadlines.decode_idle,
            first_events(&mut body, &mut events),
        );
        let first = first.await?;
        if let Some(refusal) =
            classify_first_event(&first).map_err(|cause| lease.failed(RequestStage::Decode, cause))?
        {
            return refuse(&mut transfer, refusal);
        }
        self.check_lease(lease, transfer.as_deref_mut())?;
        let is_handoff = transfer.is_some();
        let mut on_drop = self.outcome_on_drop(if is_handoff {
            HandoffOutcome::Sent
        } else {
            HandoffOutcome::Bypassed
        });
        on_drop.crawled = sent.elapsed() >= CRAWL;
        let stream = StreamContext {
            unproven: transfer.map(Transfer::answered),
            events: Some(events),
            usage,
            on_drop: Some(on_drop),
            ..StreamContext::new(Arc::clone(lease), self.job.deadlines.decode_idle, timer)
        };
        let headers = forwardable(&head.headers);
        let body = Body::new(StreamBody::after(first, body, stream));
        let mut response = Response::from_parts(head, body);
        *response.headers_mut() = headers;
        Ok(self.begin_answer(response, sent))
    }

    /// Fails a hand-off if the prefill engine could have given its KV away before the decode engine read it. No byte
    /// of the answer has gone to the client.
    fn check_lease(&self, decode: &EngineLease, transfer: Option<&mut Transfer>) -> Result<(), ProxyError> {
        let lease = self.shared.settings.deadlines.kv_lease;
        let (Some(transfer), Some(lease)) = (transfer, lease) else {
            return Ok(());
        };
        let Some(age) = transfer.outlived(lease) else {
            return Ok(());
        };
        // The decode engine has confirmed the read to the prefill engine, so no blocks are left to free.
        transfer.consumed();
        self.shared.metrics.count_outlived_lease();
        Err(decode.failed(RequestStage::Handoff, Cause::LeaseOver { age, lease }))
    }

    /// The outcome of a hand-off with a whole answer. A strict one fails if its KV did not arrive.
    pub(crate) fn handoff_outcome(&self, decode: &EngineLease, proof: Proof) -> Result<HandoffOutcome, ProxyError> {
        match proof {
            Proof::Received => Ok(HandoffOutcome::Transferred),
            Proof::None => Ok(HandoffOutcome::Sent),
            Proof::Computed if self.shared.settings.config.handoff.strict => {
                Err(decode.failed(RequestStage::Handoff, Cause::Recomputed))
            }
            Proof::Computed => Ok(HandoffOutcome::Recomputed),
        }
    }

    /// Counts the outcome of an answered request when it is dropped.
    pub(crate) fn outcome_on_drop(&self, outcome: HandoffOutcome) -> OutcomeOnDrop {
        let is_clients = self.job.pair.is_none();
        OutcomeOnDrop {
            record: Arc::clone(&self.job.record),
            outcome,
            pair: is_clients.then(|| (Arc::clone(self.shared), self.selector.engines.clone())),
            crawled: false,
        }
    }

    /// Holds the request's admission permit and measures its stream until it is dropped.
    pub(crate) fn token_timer(&self) -> TokenTimer {
        TokenTimer {
            record: Arc::clone(&self.job.record),
            last_read: None,
            _permit: Arc::clone(&self.job.permit),
        }
    }

    /// Records that the answer begins now.
    pub(crate) fn begin_answer(&self, mut response: Response<Body>, decode_sent: Instant) -> Response<Body> {
        let first_byte = decode_sent.elapsed();
        self.job.record.observe_stage(TimedStage::DecodeFirstByte, first_byte);
        self.job.record.observe_first_token(self.job.arrived.elapsed());
        response.extensions_mut().insert(HandoffTimings {
            first_byte,
            ..HandoffTimings::default()
        });
        response
    }
}

/// A request id that is unique over all proxies and restarts, because KV is matched by it.
pub(crate) fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}
