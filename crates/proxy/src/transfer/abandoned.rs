//! A prefill leg that continues for a moment after its client left, if the prefill engine keeps KV for a decode
//! engine.
//!
//! If an engine has just finished when its client leaves, it keeps the blocks until their lease ends, and only its
//! answer names them. So the proxy reads the answer and frees the blocks. It aborts a prefill that takes longer than
//! a moment: the engine then keeps nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use axum::http::response::Parts;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::cleanup;
use crate::Shared;
use crate::error::{Cause, ProxyError, RequestStage};
use crate::schedule::lease::{EngineLease, PendingKv};
use crate::upstream::Call;
use xpyd_base::connector::Handoff;

/// How long a prefill continues without its client, and how long its decode engine is held for pushed KV. Long enough
/// for most prompts, so that a lease rarely has to expire.
pub(crate) const MOMENT: Duration = Duration::from_secs(5);

/// The call of a prefill leg.
#[derive(Debug)]
pub(crate) struct PrefillCall {
    pub(crate) lease: Arc<EngineLease>,
    /// Counts the leg as a request in flight.
    pub(crate) _permit: Arc<OwnedSemaphorePermit>,
    pub(crate) path: &'static str,
    pub(crate) headers: HeaderMap,
    pub(crate) request_id: String,
    pub(crate) body: Bytes,
    pub(crate) deadline: Duration,
}

type Fetched = Result<(Parts, Bytes), ProxyError>;

/// Makes the call in a task of its own, and returns the whole answer.
pub(crate) async fn fetch(shared: &Arc<Shared>, call: PrefillCall) -> Fetched {
    let (mut sender, receiver) = oneshot::channel();
    let lease = Arc::clone(&call.lease);
    let own = Arc::clone(shared);
    shared.cleanups.spawn(async move {
        let request = Call {
            body: call.body.clone(),
            ..Call::post(call.path, &call.headers, &call.request_id, Vec::new())
        };
        let step = own.upstream.fetch(&call.lease.engine, request);
        let abandoned = async {
            sender.closed().await;
            tokio::select! {
                () = own.closing.cancelled() => {}
                () = tokio::time::sleep(MOMENT) => {}
            }
        };
        let fetched = tokio::select! {
            fetched = call.lease.run(RequestStage::Prefill, call.deadline, step) => fetched,
            () = abandoned => return,
        };
        // If the request is gone, dropping the answer frees the KV.
        drop(sender.send(UnclaimedAnswer {
            fetched: Some(fetched),
            kept: Some(call.lease.hold_kv()),
            headers: call.headers,
            request_id: call.request_id,
            shared: own,
        }));
    });
    match receiver.await {
        Ok(mut answer) => answer.claim(),
        Err(_) => Err(lease.failed(RequestStage::Prefill, Cause::Gone)),
    }
}

/// An answer that its request has not taken yet.
struct UnclaimedAnswer {
    fetched: Option<Fetched>,
    kept: Option<PendingKv>,
    headers: HeaderMap,
    request_id: String,
    shared: Arc<Shared>,
}

impl UnclaimedAnswer {
    fn claim(&mut self) -> Fetched {
        self.fetched.take().expect("an answer is claimed once")
    }
}

impl Drop for UnclaimedAnswer {
    fn drop(&mut self) {
        let (Some(Ok((head, body))), Some(kept)) = (self.fetched.take(), self.kept.take()) else {
            return;
        };
        let handoff = self.shared.settings.connector.read_handoff(&body);
        let (true, Ok(Handoff::Pull(params)), Ok(runtime)) =
            (head.status.is_success(), handoff, tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let (headers, request_id) = (std::mem::take(&mut self.headers), std::mem::take(&mut self.request_id));
        let release = cleanup::release_abandoned(Arc::clone(&self.shared), kept, headers, request_id, params);
        drop(self.shared.cleanups.spawn_on(release, &runtime));
    }
}
