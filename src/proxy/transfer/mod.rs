//! The ledger of hand-offs: who owns a request's KV, and what must happen to it when the request ends early.
//!
//! An [`Entry`] goes through reserved → prefilling → handed → sent → consumed. Dropped on the way, because the client
//! left or a leg failed, it sees to the KV: `table` says what is owed, `cleanup` pays it.

mod abandoned;
mod cleanup;
mod cleanup_table;
pub(crate) mod notify;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use self::notify::Arrival;
use crate::connector::Handoff;
use crate::proxy::Shared;
use crate::proxy::body::usage::Proof;
use crate::proxy::error::{Cause, ProxyError};
use crate::proxy::schedule::lease::Seat;
use crate::proxy::telemetry::record::Record;
use cleanup::Owed;
use cleanup_table::{Debt, End, Progress, Way, owed};

pub(crate) use abandoned::{PrefillCall, fetch};
pub(crate) use cleanup::{Care, Consume, one_token_edits};

/// One hand-off, from the reservation of its decode engine on.
#[derive(Debug)]
pub(crate) struct Entry {
    shared: Arc<Shared>,
    record: Arc<Record>,
    stage: Stage,
    /// When the prefill leg was sent. The KV's lease begins later.
    begun: Option<Instant>,
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
    pub(crate) fn reserve(shared: &Arc<Shared>, record: &Arc<Record>, care: Care) -> Self {
        shared.metrics.open_handoffs(1);
        Self {
            shared: Arc::clone(shared),
            record: Arc::clone(record),
            stage: Stage::Reserved,
            begun: None,
            care: Some(care),
        }
    }

    /// The prefill leg is about to be sent. From now on the engine may have KV of this hand-off.
    pub(crate) fn prefilling(&mut self, prefill: &Seat, arrival: Option<Arrival>) {
        if let Some(care) = &mut self.care {
            care.prefill = Some(prefill.keep());
        }
        self.stage = Stage::Prefilling(arrival);
        self.begun = Some(Instant::now());
    }

    /// How long the KV can have been under its lease, if that may have ended before the decode engine read it.
    ///
    /// The lease begins after the prefill leg was sent, and the decode engine reads before its answer begins. So an answer
    /// that begins within the lease's length is right whichever process stood still in between, this one included; and a
    /// lease that lapsed although it had been renewed has lasted longer than that.
    pub(crate) fn outlived(&self, lease: Duration) -> Option<Duration> {
        let age = self.begun?.elapsed();
        (matches!(
            self.stage,
            Stage::Sent {
                handoff: Handoff::Pull(_),
                ..
            }
        ) && age > lease)
            .then_some(age)
    }

    /// Waits for the connector's notifications, if it has any. Safe to cancel.
    pub(crate) async fn arrived(&mut self) {
        if let Stage::Prefilling(Some(arrival)) = &mut self.stage {
            arrival.complete().await;
        }
    }

    /// The KV is there for the decode leg.
    pub(crate) fn handed(&mut self, handoff: Handoff) {
        let is_pushed = !matches!(handoff, Handoff::Pull(_));
        self.stage = Stage::Handed(handoff);
        if let Some(care) = self.care.as_mut().filter(|_| is_pushed) {
            care.prefill = None;
        }
    }

    /// The answer's first token, where the prefill engine made it.
    pub(crate) fn first_token(&self) -> Option<u32> {
        match self.stage {
            Stage::Handed(Handoff::PushedWithFirstToken(token)) => Some(token),
            _ => None,
        }
    }

    /// The decode leg is about to be sent, with these parameters if the connector has any, as JSON text. They are given out once.
    pub(crate) fn send(&mut self) -> Option<&str> {
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
            } => Some(params.get()),
            _ => self.care.as_ref()?.decode_params.as_deref(),
        }
    }

    /// The decode engine answered without having looked at the KV, as far as is known.
    pub(crate) fn refused(&mut self) {
        if let Stage::Sent { refused, .. } = &mut self.stage {
            *refused = true;
        }
    }

    /// The decode engine has the KV.
    pub(crate) fn consumed(&mut self) {
        if let Some(held) = self.care.as_ref().and_then(|care| care.decode.held()) {
            held.consumed();
        }
        self.close();
    }

    /// The decode engine's answer begins. What its usage says at the end may still show that it did not use the KV.
    pub(crate) fn answered(&mut self) -> Unproven {
        let owed = self.owed(End::Failed);
        let care = self.care.take().map(|care| {
            self.shared.metrics.open_handoffs(-1);
            care.decode.held().inspect(|held| held.consumed());
            // A drain of the prefill engine does not wait for the whole answer.
            Care { prefill: None, ..care }
        });
        Unproven {
            shared: Arc::clone(&self.shared),
            rest: care
                .zip(owed)
                .and_then(|(care, owed)| cleanup::within_a_stream(care, owed)),
        }
    }

    /// There is no KV, and none will come.
    pub(crate) fn close(&mut self) {
        self.stage = Stage::Closed;
        if self.care.take().is_some() {
            self.shared.metrics.open_handoffs(-1);
        }
    }

    /// Moves the hand-off out, for a stream that goes on with it.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            record: Arc::clone(&self.record),
            stage: std::mem::replace(&mut self.stage, Stage::Closed),
            begun: self.begun,
            care: self.care.take(),
        }
    }

    /// The request has failed.
    pub(crate) fn failed(&mut self, error: &ProxyError) {
        let end = match error {
            ProxyError::Leg { engine, cause, .. } => match cause {
                Cause::Gone if self.care.as_ref().is_some_and(|care| care.decode.engine.id == *engine) => {
                    End::DecodeGone
                }
                Cause::Gone => End::PrefillGone,
                Cause::Timeout(_) => End::Late,
                Cause::Unreachable(error) if error.is_connect() => End::Unsent,
                Cause::Descriptors(_) => End::Unsent,
                _ => End::Failed,
            },
            _ => End::Failed,
        };
        self.end(end);
    }

    fn end(&mut self, end: End) {
        let Some(care) = self.care.take() else {
            return;
        };
        match (self.owed(end), tokio::runtime::Handle::try_current()) {
            (Some(owed), Ok(runtime)) => {
                let cleanup = cleanup::pay(Arc::clone(&self.shared), care, owed);
                drop(self.shared.cleanups.spawn_on(cleanup, &runtime));
            }
            _ => self.shared.metrics.open_handoffs(-1),
        }
    }

    fn owed(&mut self, end: End) -> Option<Owed> {
        let stage = std::mem::replace(&mut self.stage, Stage::Closed);
        let (way, progress) = match &stage {
            Stage::Closed => return None,
            Stage::Reserved => (Way::Pulled, Progress::Reserved),
            Stage::Prefilling(None) => (Way::Pulled, Progress::Prefilling),
            Stage::Prefilling(Some(_)) => (Way::Pushed, Progress::Prefilling),
            Stage::Handed(handoff) => (way(handoff), Progress::Handed),
            Stage::Sent { handoff, refused } => {
                let progress = if *refused { Progress::Refused } else { Progress::Sent };
                (way(handoff), progress)
            }
        };
        match (owed(way, progress, end), stage) {
            (
                Debt::Release,
                Stage::Handed(Handoff::Pull(params))
                | Stage::Sent {
                    handoff: Handoff::Pull(params),
                    ..
                },
            ) => Some(Owed::Release(params, end)),
            (Debt::Consume, _) => Some(Owed::Consume),
            (Debt::ConsumeOnceThere, Stage::Prefilling(Some(arrival))) => Some(Owed::ConsumeOnceThere(arrival)),
            (Debt::ConsumeNowAndLater, Stage::Prefilling(Some(arrival))) => Some(Owed::ConsumeNowAndLater(arrival)),
            _ => None,
        }
    }
}

/// A hand-off whose answer has begun, until it is known whether its KV was used. Dropped, it counts as used.
#[derive(Debug)]
pub(crate) struct Unproven {
    shared: Arc<Shared>,
    rest: Option<(Care, Owed)>,
}

impl Unproven {
    /// Takes in what the decode engine's usage proves. KV that it did not use is freed: nothing else would free it, because LMCache
    /// finds it by the hand-off's tag only, and vLLM reports no read that failed to a prefill engine.
    pub(crate) fn prove(&mut self, proof: Proof) {
        let unused = self.rest.take_if(|_| proof == Proof::Computed);
        if let (Some((care, owed)), Ok(runtime)) = (unused, tokio::runtime::Handle::try_current()) {
            self.shared.metrics.open_handoffs(1);
            let cleanup = cleanup::pay(Arc::clone(&self.shared), care, owed);
            drop(self.shared.cleanups.spawn_on(cleanup, &runtime));
        }
    }
}

fn way(handoff: &Handoff) -> Way {
    match handoff {
        Handoff::Pull(_) => Way::Pulled,
        Handoff::Pushed | Handoff::PushedWithFirstToken(_) => Way::Pushed,
    }
}

impl Drop for Entry {
    /// Nobody said why it ended: the client left, and took the request along.
    fn drop(&mut self) {
        self.end(End::Left);
    }
}

#[cfg(test)]
mod tests;
