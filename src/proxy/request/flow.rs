//! One request, top to bottom: parse, decide, reserve decode, pick prefill, prefill leg, hand-off, decode leg, stream on.
//!
//! A retry starts at the top with a new pair of engines and a new id, and only while no byte has gone to the client.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use tokio::time::Instant;

use super::attempt::{Attempt, Job, Prefilled, Stages, Told, new_id};
use crate::fleet::EngineView;
use crate::proxy::Shared;
use crate::proxy::body::document::Document;
use crate::proxy::body::media;
use crate::proxy::body::serving_mode::{self, Course};
use crate::proxy::body::usage::PrefillUsage;
use crate::proxy::error::{Cause, ProxyError, Stage};
use crate::proxy::schedule::admission::Ask;
use crate::proxy::schedule::lease::Seat;
use crate::proxy::schedule::selection::EngineSelector;
use crate::proxy::schedule::selection::Seated;
use crate::proxy::telemetry::metrics::Outcome;
use crate::proxy::transfer::{Consume, Entry, one_token_edits};

/// Answers a request.
pub(crate) async fn answer(shared: &Arc<Shared>, job: Job) -> Result<Response<Body>, ProxyError> {
    let document = Document::parse(&job.body)?;
    let course = serving_mode::course(job.kind, &document, shared.settings.connector.decode_flow());
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
        selector: EngineSelector {
            shared,
            record: &job.record,
            pair: job.pair.as_ref(),
            session: job.session.as_deref(),
            authorization: job.headers.get(header::AUTHORIZATION),
            document: &document,
            prompt: &prompt.text,
            ask,
            tried: Vec::new(),
            engines: Vec::new(),
        },
        number: 0,
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
                shared.seats.succeeded(&attempt.selector.engines);
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
        self.selector.engines.clear();
        let outcome = match course {
            Course::Bypass(reason) => {
                let seat = self.selector.seat_alone().await?;
                self.bypass(seat, reason).await
            }
            Course::Handoff => self.hand_over().await,
            Course::Splice(request) => super::first_token::run(self, request).await,
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
        for engine in &self.selector.engines {
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
            let engine = self.selector.engines.iter().find(|engine| engine.id == *id);
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
            self.shared.note_handoff(&self.selector.engines, true);
        }
        // KV that does not arrive may be the fault of either.
        let is_avoided = |engine: &Arc<EngineView>| engine.id == *id || *stage == Stage::Handoff;
        self.selector
            .tried
            .extend(self.selector.engines.drain(..).filter(is_avoided));
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
                .is_none_or(|busy| self.selector.has_untried(busy.role, &view))
    }

    /// Prefill on one engine, decode on another.
    async fn hand_over(&mut self) -> Result<Response<Body>, ProxyError> {
        let (prefill, decode) = match self.selector.seats().await? {
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
}
