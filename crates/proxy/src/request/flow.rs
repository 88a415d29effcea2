//! One generation from top to bottom: parse, choose the serving mode, select engines, run the legs, stream the
//! answer.
//!
//! A retry starts with new engines and a new id, and only while no byte has gone to the client.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use tokio::time::Instant;

use super::attempt::{Attempt, HandoffReport, HandoffTimings, Job, PrefillAnswer, new_id};
use crate::Shared;
use crate::body::document::Document;
use crate::body::media;
use crate::body::serving_mode::{self, ServingMode};
use crate::body::usage::PrefillUsage;
use crate::error::{Cause, ProxyError, RequestStage};
use crate::schedule::admission::TokenDemand;
use crate::schedule::lease::EngineLease;
use crate::schedule::selection::EngineSelector;
use crate::schedule::selection::Selection;
use crate::telemetry::metrics::HandoffOutcome;
use crate::transfer::{ConsumeRequest, Transfer, one_token_edits};
use xpyd_base::fleet::EngineView;

/// Answers a generation.
pub(crate) async fn answer(shared: &Arc<Shared>, job: Job) -> Result<Response<Body>, ProxyError> {
    let document = Document::parse(&job.body)?;
    let mode = serving_mode::serving_mode(job.kind, &document, shared.settings.connector.decode_flow());
    let prompt = media::condensed(document.given(job.kind.prompt_field()).unwrap_or_default());
    let mut demand = TokenDemand::of(job.kind, &document, &prompt);
    if demand.can_be_too_long() {
        let length = shared.model_length(&job.headers).await;
        demand = length.map_or(demand, |length| demand.within(length));
    }
    let mut attempt = Attempt {
        shared,
        job: &job,
        document: &document,
        selector: EngineSelector {
            shared,
            record: &job.record,
            pair: job.pair.as_ref(),
            session: job.session.as_deref(),
            authorization: job.headers.get(header::AUTHORIZATION),
            document: &document,
            prompt: &prompt.text,
            demand,
            tried: Vec::new(),
            engines: Vec::new(),
        },
        number: 0,
    };
    let mut most = shared.settings.config.routing.attempts;
    if job.pair.is_some() {
        // The first hand-off of a new pair can fail. A second failure is what the canary must find.
        most = most.min(2);
    }
    // The longest wait that busy engines requested: one could be free sooner, but the proxy cannot know which.
    let mut longest = None;
    loop {
        attempt.number += 1;
        let mut error = match Box::pin(attempt.run(&mode)).await {
            Ok(response) => {
                shared.scheduler.succeeded(&attempt.selector.engines);
                return Ok(attempt.with_handoff_header(response));
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
            error = xpyd_base::report::one_line(&error),
            "retrying with other engines"
        );
        job.record.retried();
    }
}

impl Attempt<'_> {
    async fn run(&mut self, mode: &ServingMode) -> Result<Response<Body>, ProxyError> {
        self.selector.engines.clear();
        let outcome = match mode {
            ServingMode::DecodeOnly(reason) => {
                let lease = self.selector.select_decode_only().await?;
                self.bypass(lease, reason).await
            }
            ServingMode::Handoff => self.hand_over().await,
            ServingMode::FirstToken(request) => super::first_token::run(self, request).await,
        };
        if matches!(outcome, Err(ProxyError::Leg { .. })) {
            self.job.record.observe_outcome(HandoffOutcome::Failed);
        }
        outcome
    }

    /// Adds the header that reports how the hand-off ended, in the syntax of RFC 8941:
    /// `transferred;decode="decoder2";prefill="prefiller1";attempt=1`.
    fn with_handoff_header(&self, mut response: Response<Body>) -> Response<Body> {
        let HandoffReport { outcome, reason } = response.extensions().get().copied().unwrap_or_default();
        let mut label = outcome.as_str().to_owned();
        let mut add = |name: &str, value: &str| label.extend([";", name, "=\"", value, "\""]);
        if let Some(reason) = reason {
            add("reason", reason);
        }
        for engine in &self.selector.engines {
            add(&engine.role.to_string(), engine.id.as_str());
        }
        label.extend([";attempt=", &self.number.to_string()]);
        if let Ok(value) = HeaderValue::from_str(&label) {
            response.headers_mut().insert("x-xpyd-handoff", value);
        }
        response
    }

    /// Records which engines the next attempt must avoid.
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
            let engine = self.selector.engines.iter().find(|engine| engine.id == *id);
            engine.inspect(|engine| self.shared.scheduler.failed(engine));
        }
        let may_be_handoff = matches!(stage, RequestStage::Handoff | RequestStage::Decode)
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
            self.shared.note_handoff(&self.selector.engines, true);
        }
        // Either engine can be at fault if KV does not arrive.
        let is_avoided = |engine: &Arc<EngineView>| engine.id == *id || *stage == RequestStage::Handoff;
        self.selector
            .tried
            .extend(self.selector.engines.drain(..).filter(is_avoided));
    }

    /// Whether another attempt makes sense. A busy engine is not asked again at once, so another engine must exist.
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
                .is_none_or(|busy| self.selector.has_untried(busy.role, &view))
    }

    /// Prefills on one engine and decodes on another.
    async fn hand_over(&mut self) -> Result<Response<Body>, ProxyError> {
        let (prefill, decode) = match self.selector.select().await? {
            Selection::Pair(prefill, decode) => (prefill, decode),
            Selection::DecodeOnly(decode, reason) => return self.bypass(decode, reason).await,
        };
        let id = new_id();
        let mut transfer = self.reserve(
            &decode,
            &id,
            ConsumeRequest::Original(self.job.kind, self.job.body.clone()),
        );
        match Box::pin(self.legs(prefill, &decode, &mut transfer, &id)).await {
            Ok(Some(response)) => Ok(response),
            Ok(None) => self.refused(transfer, decode).await,
            Err(error) => {
                transfer.failed(&error);
                Err(error)
            }
        }
    }

    /// Both legs of a hand-off. `None` if the prefill engine refuses its leg.
    async fn legs(
        &self,
        prefill: Arc<EngineLease>,
        decode: &Arc<EngineLease>,
        transfer: &mut Transfer,
        id: &str,
    ) -> Result<Option<Response<Body>>, ProxyError> {
        let path = self.job.kind.path();
        let connector = &self.shared.settings.connector;
        let params = connector.prefill_params(id, &decode.engine.endpoint);
        let mut edits = one_token_edits(self.job.kind);
        edits.push(("kv_transfer_params", Some(&params)));
        let body = self.document.edited(&edits);
        let (answer, handoff_time) = match self.deliver(&prefill, decode, transfer, id, path, body).await? {
            (PrefillAnswer::Good(answer), time) => (answer, time),
            (PrefillAnswer::Refused, _) => return Ok(None),
        };
        let usage = PrefillUsage::of(&answer);
        drop(answer);
        drop(prefill);
        let sent = Instant::now();
        let edit = transfer
            .begin_decode()
            .map(|params| ("kv_transfer_params", Some(params)));
        let body = self.document.edited(edit.as_slice());
        let decoded = self.decode(decode, id, path, body).await?;
        let mut response = self.pass_on(decode, Some((transfer, usage)), decoded, sent).await?;
        if let Some(stages) = response.extensions_mut().get_mut::<HandoffTimings>() {
            stages.handoff = handoff_time;
        }
        Ok(Some(response))
    }
}
