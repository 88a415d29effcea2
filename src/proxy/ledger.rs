//! The ledger of hand-offs: who owns a request's KV, and what must happen to it when the request ends early.
//!
//! An [`Entry`] goes through reserved → prefilling → handed → sent → consumed. Dropped on the way, because the client
//! left or a leg failed, it sees to the KV: pulled KV is released on the prefill engine, pushed KV is consumed on the
//! decode engine, whose buffer nothing else frees. Knows connectors only through their [`Handoff`].

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::OwnedSemaphorePermit;

use super::Shared;
use super::body::{Document, Edit};
use super::error::Stage as Leg;
use super::metrics::Outcome;
use super::notify::Arrival;
use super::record::Record;
use super::rules::Kind;
use super::upstream::{Call, Seat};
use crate::connector::Handoff;

/// A model that no engine serves: the decode engine answers 404 and, as seen on vLLM 0.32.0, lets the prefill engine
/// free the blocks of the parameters that came along.
const NO_MODEL: &str = "xpyd-releases-kv-with-this-unknown-model";

/// Changes that turn a client's body into one that generates a single token in one piece.
pub(super) fn one_token_edits(kind: Kind) -> Vec<Edit<'static>> {
    let mut edits = vec![
        ("stream", Some("false")),
        ("stream_options", None),
        ("max_tokens", Some("1")),
        // vLLM refuses a minimum above the maximum.
        ("min_tokens", None),
    ];
    if kind == Kind::Chat {
        edits.push(("max_completion_tokens", Some("1")));
    }
    edits
}

/// What is needed to see to the KV of a request that ends early.
#[derive(Debug)]
pub(super) struct Care {
    pub(super) decode: Arc<Seat>,
    pub(super) headers: HeaderMap,
    pub(super) request_id: String,
    pub(super) consume: Consume,
    /// How long the clean-up may wait for notifications, and then for the decode engine.
    pub(super) deadline: Duration,
    /// Held until the KV is seen to, so that clean-ups count as requests in flight.
    pub(super) _permit: Arc<OwnedSemaphorePermit>,
}

/// The request that makes a decode engine take KV that was pushed to it.
#[derive(Debug)]
pub(super) enum Consume {
    /// The client's body, for one token.
    Original(Kind, Bytes),
    /// A completion of these bytes.
    Completion(Bytes),
}

/// One hand-off, from the reservation of its decode engine on.
#[derive(Debug)]
pub(super) struct Entry {
    shared: Arc<Shared>,
    record: Arc<Record>,
    stage: Stage,
    care: Option<Care>,
}

#[derive(Debug)]
enum Stage {
    /// The decode engine is reserved; nothing was sent.
    Reserved,
    /// The prefill leg was sent. With an [`Arrival`], KV may be pushed without further notice.
    Prefilling(Option<Arrival>),
    /// The KV waits for the decode leg.
    Handed(Handoff),
    /// The decode leg was sent.
    Sent { handoff: Handoff, refused: bool },
    /// Nothing is left to do.
    Closed,
}

impl Entry {
    /// Opens an entry for a request whose decode engine is reserved.
    pub(super) fn reserve(shared: &Arc<Shared>, record: &Arc<Record>, care: Care) -> Self {
        shared.metrics.open_handoffs(1);
        Self {
            shared: Arc::clone(shared),
            record: Arc::clone(record),
            stage: Stage::Reserved,
            care: Some(care),
        }
    }

    /// The prefill leg is about to be sent.
    pub(super) fn prefilling(&mut self, arrival: Option<Arrival>) {
        self.stage = Stage::Prefilling(arrival);
    }

    /// Waits for the connector's notifications, if it has any. Safe to cancel.
    pub(super) async fn arrived(&mut self) {
        if let Stage::Prefilling(Some(arrival)) = &mut self.stage {
            arrival.complete().await;
        }
    }

    /// The KV is there for the decode leg.
    pub(super) fn handed(&mut self, handoff: Handoff) {
        self.stage = Stage::Handed(handoff);
    }

    /// The answer's first token, where the prefill engine made it.
    pub(super) fn first_token(&self) -> Option<u32> {
        match self.stage {
            Stage::Handed(Handoff::PushedWithFirstToken(token)) => Some(token),
            _ => None,
        }
    }

    /// The decode leg is about to be sent, with these parameters if the connector has any. They are given out once.
    pub(super) fn send(&mut self) -> Option<&RawValue> {
        match std::mem::replace(&mut self.stage, Stage::Closed) {
            Stage::Handed(handoff) => {
                self.stage = Stage::Sent {
                    handoff,
                    refused: false,
                }
            }
            other => {
                self.stage = other;
                return None;
            }
        }
        match &self.stage {
            Stage::Sent {
                handoff: Handoff::Pull(params),
                ..
            } => Some(params),
            _ => None,
        }
    }

    /// The decode engine answered without having looked at the KV, as far as is known.
    pub(super) fn refused(&mut self) {
        if let Stage::Sent { refused, .. } = &mut self.stage {
            *refused = true;
        }
    }

    /// The decode engine has the KV.
    pub(super) fn consumed(mut self) {
        self.record.handed(Outcome::Transferred);
        if let Some(held) = self.care.as_ref().and_then(|care| care.decode.held()) {
            held.consumed();
        }
        self.close();
    }

    /// There is no KV, and none will come.
    pub(super) fn void(mut self) {
        self.close();
    }

    /// Closes the entry before its end: nothing is owed.
    pub(super) fn close(&mut self) {
        self.stage = Stage::Closed;
        if self.care.take().is_some() {
            self.shared.metrics.open_handoffs(-1);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some(care) = self.care.take() else {
            return;
        };
        let stage = std::mem::replace(&mut self.stage, Stage::Closed);
        let owed = match stage {
            Stage::Reserved | Stage::Closed | Stage::Prefilling(None) => None,
            Stage::Prefilling(Some(arrival)) => Some(Owed::ConsumeAfter(arrival)),
            // A decode engine whose client leaves tells the prefill engine by itself.
            Stage::Sent {
                handoff: Handoff::Pull(_),
                refused: false,
            } => None,
            Stage::Handed(handoff) | Stage::Sent { handoff, .. } => Some(match handoff {
                Handoff::Pull(params) => Owed::Release(params),
                Handoff::Pushed | Handoff::PushedWithFirstToken(_) => Owed::Consume,
            }),
        };
        let shared = Arc::clone(&self.shared);
        match (owed, tokio::runtime::Handle::try_current()) {
            (Some(owed), Ok(runtime)) => {
                let cleanup = async move {
                    see_to(&shared, &care, owed).await;
                    shared.metrics.open_handoffs(-1);
                };
                drop(self.shared.cleanups.spawn_on(cleanup, &runtime));
            }
            _ => shared.metrics.open_handoffs(-1),
        }
    }
}

/// What is still to be done for KV whose request ended early.
enum Owed {
    /// Free the prefill engine's blocks.
    Release(Box<RawValue>),
    /// Free the decode engine's buffer.
    Consume,
    /// The same, if the KV comes at all.
    ConsumeAfter(Arrival),
}

async fn see_to(shared: &Shared, care: &Care, owed: Owed) {
    let (path, body) = match owed {
        Owed::Release(params) => {
            let body = format!(
                r#"{{"model":"{NO_MODEL}","prompt":"x","max_tokens":1,"kv_transfer_params":{}}}"#,
                params.get()
            );
            (Kind::Completions.path(), Bytes::from(body))
        }
        Owed::Consume => consume_call(&care.consume),
        Owed::ConsumeAfter(mut arrival) => {
            let came = tokio::select! {
                biased;
                () = arrival.complete() => true,
                () = care.decode.gone() => false,
                () = tokio::time::sleep(care.deadline) => false,
            };
            if !came {
                return;
            }
            consume_call(&care.consume)
        }
    };
    let call = Call {
        body,
        ..Call::post(path, &care.headers, &care.request_id, Vec::new())
    };
    let answer = care
        .decode
        .run(
            Leg::Handoff,
            care.deadline,
            shared.upstream.fetch(&care.decode.engine, call),
        )
        .await;
    let refusal = match answer {
        Ok((head, _)) if head.status.is_success() || head.status == StatusCode::NOT_FOUND => None,
        Ok((head, _)) => Some(format!("the engine answered {}", head.status)),
        Err(error) => Some(crate::report::one_line(&error)),
    };
    if let Some(error) = &refusal {
        let engine = &care.decode.engine.id;
        tracing::warn!(%engine, request = care.request_id, error, "could not free the KV of a request that ended early");
    }
    shared.metrics.cleaned_up(refusal.is_none());
}

fn consume_call(consume: &Consume) -> (&'static str, Bytes) {
    match consume {
        Consume::Completion(body) => (Kind::Completions.path(), body.clone()),
        Consume::Original(kind, body) => {
            // It was parsed before; were it not, the engine would say so.
            let edited = Document::parse(body).map_or_else(
                |_| body.clone(),
                |document| document.edited(&one_token_edits(*kind)).into(),
            );
            (kind.path(), edited)
        }
    }
}

#[cfg(test)]
mod tests;
