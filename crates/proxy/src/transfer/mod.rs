//! The KV transfer of a hand-off: which engine holds a request's KV, and what cleans it up when the request ends
//! early.
//!
//! A [`Transfer`] goes through reserved → prefilling → delivered → sent → consumed. If it is dropped on the way,
//! because the client left or a leg failed, it cleans up the KV: `cleanup_table` decides how, and `cleanup` does it.

mod abandoned;
mod cleanup;
mod cleanup_table;
pub(crate) mod notify;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use self::notify::Arrival;
use crate::Shared;
use crate::body::usage::Proof;
use crate::error::{Cause, ProxyError};
use crate::schedule::lease::EngineLease;
use crate::telemetry::record::Record;
use cleanup::Cleanup;
use cleanup_table::{CleanupAction, TransferEnd, TransferMode, TransferProgress, cleanup_for};
use xpyd_base::connector::Handoff;

pub(crate) use abandoned::{PrefillCall, fetch};
pub(crate) use cleanup::{CleanupContext, ConsumeRequest, one_token_edits};

/// One hand-off, from the reservation of its decode engine on.
#[derive(Debug)]
pub(crate) struct Transfer {
    shared: Arc<Shared>,
    record: Arc<Record>,
    state: TransferState,
    /// When the prefill leg was sent. The KV's lease begins later.
    prefill_sent: Option<Instant>,
    context: Option<CleanupContext>,
}

#[derive(Debug)]
enum TransferState {
    /// The decode engine is reserved; nothing was sent.
    Reserved,
    /// The prefill leg was sent. With an [`Arrival`], KV can be pushed at any time.
    Prefilling(Option<Arrival>),
    /// The KV waits for the decode leg.
    Delivered(Handoff),
    /// The decode leg was sent.
    Sent { handoff: Handoff, refused: bool },
    /// Nothing is left to clean up.
    Closed,
}

impl Transfer {
    /// Opens the transfer of a request whose decode engine is reserved.
    pub(crate) fn reserve(shared: &Arc<Shared>, record: &Arc<Record>, context: CleanupContext) -> Self {
        shared.metrics.add_open_handoffs(1);
        Self {
            shared: Arc::clone(shared),
            record: Arc::clone(record),
            state: TransferState::Reserved,
            prefill_sent: None,
            context: Some(context),
        }
    }

    /// Called before the prefill leg is sent. From now on the engine can hold KV of this hand-off.
    pub(crate) fn begin_prefill(&mut self, prefill: &EngineLease, arrival: Option<Arrival>) {
        if let Some(context) = &mut self.context {
            context.prefill = Some(prefill.hold_kv());
        }
        self.state = TransferState::Prefilling(arrival);
        self.prefill_sent = Some(Instant::now());
    }

    /// How long the KV can have been under its lease, if the lease could have ended before the decode engine read it.
    ///
    /// The lease begins after the prefill leg was sent, and the decode engine reads before its answer begins. So an
    /// answer that begins within the lease's length is right, whichever process stood still in between, the proxy
    /// included. A lease that lapsed although it was renewed has lasted longer than that.
    pub(crate) fn outlived(&self, lease: Duration) -> Option<Duration> {
        let age = self.prefill_sent?.elapsed();
        (matches!(
            self.state,
            TransferState::Sent {
                handoff: Handoff::Pull(_),
                ..
            }
        ) && age > lease)
            .then_some(age)
    }

    /// Waits for the connector's notifications, if it sends any. Cancel-safe.
    pub(crate) async fn arrived(&mut self) {
        if let TransferState::Prefilling(Some(arrival)) = &mut self.state {
            arrival.complete().await;
        }
    }

    /// Called when the KV is there for the decode leg.
    pub(crate) fn delivered(&mut self, handoff: Handoff) {
        let is_pushed = !matches!(handoff, Handoff::Pull(_));
        self.state = TransferState::Delivered(handoff);
        if let Some(context) = self.context.as_mut().filter(|_| is_pushed) {
            context.prefill = None;
        }
    }

    /// The answer's first token, if the prefill engine made it.
    pub(crate) fn first_token(&self) -> Option<u32> {
        match self.state {
            TransferState::Delivered(Handoff::PushedWithFirstToken(token)) => Some(token),
            _ => None,
        }
    }

    /// Called before the decode leg is sent. Returns its parameters as JSON text, if the connector has any. They are
    /// given out once.
    pub(crate) fn begin_decode(&mut self) -> Option<&str> {
        match std::mem::replace(&mut self.state, TransferState::Closed) {
            TransferState::Delivered(handoff) => {
                self.state = TransferState::Sent {
                    handoff,
                    refused: false,
                }
            }
            other => {
                self.state = other;
                return None;
            }
        }
        match &self.state {
            TransferState::Sent {
                handoff: Handoff::Pull(params),
                ..
            } => Some(params.get()),
            _ => self.context.as_ref()?.decode_params.as_deref(),
        }
    }

    /// Called when the decode engine has answered without having read the KV, as far as is known.
    pub(crate) fn refused(&mut self) {
        if let TransferState::Sent { refused, .. } = &mut self.state {
            *refused = true;
        }
    }

    /// Called when the decode engine has the KV.
    pub(crate) fn consumed(&mut self) {
        if let Some(reservation) = self.context.as_ref().and_then(|context| context.decode.reservation()) {
            reservation.release_buffer();
        }
        self.close();
    }

    /// Called when the decode engine's answer begins. Its usage, at the end, can still show that it did not use the
    /// KV.
    pub(crate) fn answered(&mut self) -> UnprovenTransfer {
        let cleanup = self.take_cleanup(TransferEnd::Failed);
        let context = self.context.take().map(|context| {
            self.shared.metrics.add_open_handoffs(-1);
            context
                .decode
                .reservation()
                .inspect(|reservation| reservation.release_buffer());
            // A drain of the prefill engine does not wait for the whole answer.
            CleanupContext {
                prefill: None,
                ..context
            }
        });
        UnprovenTransfer {
            shared: Arc::clone(&self.shared),
            unused_kv: context
                .zip(cleanup)
                .and_then(|(context, cleanup)| cleanup::for_stream(context, cleanup)),
        }
    }

    /// Closes the transfer of a request without KV.
    pub(crate) fn close(&mut self) {
        self.state = TransferState::Closed;
        if self.context.take().is_some() {
            self.shared.metrics.add_open_handoffs(-1);
        }
    }

    /// Moves the transfer out, for a stream that continues with it.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            record: Arc::clone(&self.record),
            state: std::mem::replace(&mut self.state, TransferState::Closed),
            prefill_sent: self.prefill_sent,
            context: self.context.take(),
        }
    }

    /// Cleans up after this failure of the request.
    pub(crate) fn failed(&mut self, error: &ProxyError) {
        let end = match error {
            ProxyError::Leg { engine, cause, .. } => match cause {
                Cause::Gone
                    if self
                        .context
                        .as_ref()
                        .is_some_and(|context| context.decode.engine.id == *engine) =>
                {
                    TransferEnd::DecodeGone
                }
                Cause::Gone => TransferEnd::PrefillGone,
                Cause::Timeout(_) => TransferEnd::Late,
                Cause::Unreachable(error) if error.is_connect() => TransferEnd::Unsent,
                Cause::Descriptors(_) => TransferEnd::Unsent,
                _ => TransferEnd::Failed,
            },
            _ => TransferEnd::Failed,
        };
        self.end(end);
    }

    fn end(&mut self, end: TransferEnd) {
        let Some(context) = self.context.take() else {
            return;
        };
        match (self.take_cleanup(end), tokio::runtime::Handle::try_current()) {
            (Some(cleanup), Ok(runtime)) => {
                let task = cleanup::run(Arc::clone(&self.shared), context, cleanup);
                drop(self.shared.cleanups.spawn_on(task, &runtime));
            }
            _ => self.shared.metrics.add_open_handoffs(-1),
        }
    }

    fn take_cleanup(&mut self, end: TransferEnd) -> Option<Cleanup> {
        let state = std::mem::replace(&mut self.state, TransferState::Closed);
        let (mode, progress) = match &state {
            TransferState::Closed => return None,
            TransferState::Reserved => (TransferMode::Pulled, TransferProgress::Reserved),
            TransferState::Prefilling(None) => (TransferMode::Pulled, TransferProgress::Prefilling),
            TransferState::Prefilling(Some(_)) => (TransferMode::Pushed, TransferProgress::Prefilling),
            TransferState::Delivered(handoff) => (mode_of(handoff), TransferProgress::Delivered),
            TransferState::Sent { handoff, refused } => {
                let progress = if *refused {
                    TransferProgress::Refused
                } else {
                    TransferProgress::Sent
                };
                (mode_of(handoff), progress)
            }
        };
        match (cleanup_for(mode, progress, end), state) {
            (
                CleanupAction::Release,
                TransferState::Delivered(Handoff::Pull(params))
                | TransferState::Sent {
                    handoff: Handoff::Pull(params),
                    ..
                },
            ) => Some(Cleanup::Release(params, end)),
            (CleanupAction::Consume, _) => Some(Cleanup::Consume),
            (CleanupAction::ConsumeOnArrival, TransferState::Prefilling(Some(arrival))) => {
                Some(Cleanup::ConsumeOnArrival(arrival))
            }
            (CleanupAction::ConsumeNowAndOnArrival, TransferState::Prefilling(Some(arrival))) => {
                Some(Cleanup::ConsumeNowAndOnArrival(arrival))
            }
            _ => None,
        }
    }
}

/// A hand-off whose answer has begun, until it is known whether its KV was used. If it is dropped, the KV counts as
/// used.
#[derive(Debug)]
pub(crate) struct UnprovenTransfer {
    shared: Arc<Shared>,
    unused_kv: Option<(CleanupContext, Cleanup)>,
}

impl UnprovenTransfer {
    /// Applies what the decode engine's usage proves. KV that it did not use is freed here: LMCache finds it only by
    /// the hand-off's tag, and vLLM reports no failed read to a prefill engine.
    pub(crate) fn prove(&mut self, proof: Proof) {
        let unused = self.unused_kv.take_if(|_| proof == Proof::Computed);
        if let (Some((context, cleanup)), Ok(runtime)) = (unused, tokio::runtime::Handle::try_current()) {
            self.shared.metrics.add_open_handoffs(1);
            let task = cleanup::run(Arc::clone(&self.shared), context, cleanup);
            drop(self.shared.cleanups.spawn_on(task, &runtime));
        }
    }
}

fn mode_of(handoff: &Handoff) -> TransferMode {
    match handoff {
        Handoff::Pull(_) => TransferMode::Pulled,
        Handoff::Pushed | Handoff::PushedWithFirstToken(_) => TransferMode::Pushed,
    }
}

impl Drop for Transfer {
    /// No other reason was given, so the client left and the request was dropped with it.
    fn drop(&mut self) {
        self.end(TransferEnd::Left);
    }
}

#[cfg(test)]
mod tests;
