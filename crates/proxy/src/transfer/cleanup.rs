//! Cleans up a hand-off that ended early: frees the prefill engine's blocks, or empties the decode engine's buffer.
//!
//! Every wait is bounded. This module knows which requests do that; `cleanup_table` decides which action a hand-off
//! needs.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::abandoned::MOMENT;
use super::cleanup_table::TransferEnd;
use super::notify::Arrival;
use crate::Shared;
use crate::body::document::{Document, Edit};
use crate::body::serving_mode::GenerationKind;
use crate::error::RequestStage;
use crate::schedule::lease::{EngineLease, EngineWatch, PendingKv};
use crate::upstream::Call;
use xpyd_base::fleet::{EngineState, EngineView, Role};

/// A model that no engine serves: the decode engine answers 404 and, as seen on vLLM 0.32.0, makes the prefill engine
/// free the blocks that the request's parameters name.
pub(crate) const NO_MODEL: &str = "xpyd-releases-kv-with-this-unknown-model";

/// Deadline of one decode engine to accept a release.
const RELEASE_DEADLINE: Duration = Duration::from_secs(5);

/// Pause between two rounds of a release that no engine accepts. A change of the fleet ends it.
const RELEASE_PAUSE: Duration = Duration::from_secs(5);

/// How long a failed clean-up waits for the news that its engine has ended, which settles it as well.
const NEWS_DEADLINE: Duration = Duration::from_secs(1);

/// How long the proxy acts on an overdue notification. The prefill engine sends none while the decode engine's buffer
/// is full, and vLLM gives up a worker that waits longer.
const OVERDUE: Duration = Duration::from_mins(5);

/// Edits that make a client's body generate a single token without streaming.
pub(crate) fn one_token_edits(kind: GenerationKind) -> Vec<Edit<'static>> {
    let mut edits = vec![
        ("stream", Some("false")),
        ("stream_options", None),
        ("max_tokens", Some("1")),
        // vLLM refuses a minimum above the maximum.
        ("min_tokens", None),
    ];
    if kind == GenerationKind::Chat {
        edits.push(("max_completion_tokens", Some("1")));
    }
    edits
}

/// Everything that the clean-up of a request's KV needs.
#[derive(Debug)]
pub(crate) struct CleanupContext {
    pub(crate) decode: Arc<EngineLease>,
    /// The prefill engine, while it holds KV of this hand-off.
    pub(crate) prefill: Option<PendingKv>,
    /// Parameters that a decode leg must carry to find pushed KV.
    pub(crate) decode_params: Option<String>,
    pub(crate) headers: HeaderMap,
    pub(crate) request_id: String,
    pub(crate) consume: ConsumeRequest,
    /// How long the clean-up can wait for notifications, and then for the decode engine.
    pub(crate) deadline: Duration,
    /// Held until the KV is cleaned up, so that clean-ups count as requests in flight.
    pub(crate) permit: Arc<OwnedSemaphorePermit>,
}

/// The request that makes a decode engine take KV that was pushed to it.
#[derive(Debug)]
pub(crate) enum ConsumeRequest {
    /// The client's body, limited to one token.
    Original(GenerationKind, Bytes),
    /// A completion with this body.
    Completion(Bytes),
}

/// A clean-up action with everything it needs.
#[derive(Debug)]
pub(crate) enum Cleanup {
    Release(Box<RawValue>, TransferEnd),
    Consume,
    ConsumeOnArrival(Arrival),
    ConsumeNowAndOnArrival(Arrival),
}

/// Maximum size of a client's body that is kept while its answer streams.
const MAX_KEPT_BODY: usize = 256 << 10;

/// The clean-up without anything that would hold much memory until the end of a stream. `None` if nothing is left to
/// do it with.
pub(crate) fn for_stream(context: CleanupContext, cleanup: Cleanup) -> Option<(CleanupContext, Cleanup)> {
    let body = match (&cleanup, &context.consume) {
        (Cleanup::Release(..), _) => 0,
        (_, ConsumeRequest::Original(_, body) | ConsumeRequest::Completion(body)) => body.len(),
    };
    let consume = match cleanup {
        Cleanup::Release(..) => ConsumeRequest::Completion(Bytes::new()),
        _ => context.consume,
    };
    (body <= MAX_KEPT_BODY).then_some((CleanupContext { consume, ..context }, cleanup))
}

/// The result of a release.
enum ReleaseOutcome {
    /// The prefill engine knows of it, or is gone.
    Done,
    /// A decode engine that could be frozen accepted it: the prefill engine learns of it only if that engine
    /// recovers.
    Unsure,
    /// No decode engine accepted it. Holds the reasons.
    Refused(String),
}

/// The rest of a clean-up, which no longer holds the request's places on engines.
enum FollowUp {
    /// Wait for an overdue notification.
    Arrival(Arrival),
    /// Free blocks once a decode engine accepts the release.
    Release(Box<RawValue>, ReleaseOutcome),
}

/// Runs a clean-up.
pub(crate) async fn run(shared: Arc<Shared>, context: CleanupContext, cleanup: Cleanup) {
    let follow_up = match cleanup {
        Cleanup::Release(params, end) => {
            let released = release(&shared, &context, &params, end).await;
            (!matches!(released, ReleaseOutcome::Done)).then_some(FollowUp::Release(params, released))
        }
        Cleanup::Consume => {
            consume(&shared, &context, &context.decode).await;
            None
        }
        Cleanup::ConsumeOnArrival(mut arrival) => {
            // If its client leaves, a prefill engine aborts the request and never notifies. So the decode engine is
            // held for a moment only.
            context
                .decode
                .reservation()
                .inspect(|reservation| reservation.release_kv());
            let came = tokio::select! {
                biased;
                () = arrival.complete() => Some(true),
                () = context.decode.gone() => None,
                () = prefill_gone(&context) => Some(true),
                () = tokio::time::sleep(context.deadline.min(MOMENT)) => Some(false),
            };
            if came.is_some() {
                consume(&shared, &context, &context.decode).await;
            }
            (came == Some(false)).then_some(FollowUp::Arrival(arrival))
        }
        Cleanup::ConsumeNowAndOnArrival(arrival) => {
            consume(&shared, &context, &context.decode).await;
            Some(FollowUp::Arrival(arrival))
        }
    };
    shared.metrics.add_open_handoffs(-1);
    match follow_up {
        Some(FollowUp::Arrival(arrival)) => expect_overdue(&shared, context, arrival).await,
        Some(FollowUp::Release(params, released)) => release_later(&shared, context, &params, released).await,
        None => {}
    }
}

/// Waits for an overdue notification, or for the end of the engine that would send it. It holds no engine and no
/// permit, so nothing waits for it.
async fn expect_overdue(shared: &Arc<Shared>, context: CleanupContext, mut arrival: Arrival) {
    let Ok(_place) = Arc::clone(&shared.overdue).try_acquire_owned() else {
        return;
    };
    let CleanupContext {
        decode,
        prefill,
        decode_params,
        headers,
        request_id,
        consume: request,
        deadline,
        permit,
    } = context;
    let engine = decode.watch();
    let prefill = prefill.map(PendingKv::into_watch);
    drop((decode, permit));
    let came = tokio::select! {
        () = arrival.complete() => true,
        () = gone(prefill.as_ref()) => true,
        () = engine.gone() => false,
        () = shared.closing.cancelled() => false,
        () = tokio::time::sleep(OVERDUE) => false,
    };
    let (Some(lease), Ok(permit)) = (came.then(|| engine.lease()).flatten(), shared.admit()) else {
        return;
    };
    tracing::debug!(request = request_id, "an overdue notification arrived");
    let context = CleanupContext {
        decode: Arc::new(lease),
        prefill: None,
        decode_params,
        headers,
        request_id,
        consume: request,
        deadline,
        permit: Arc::new(permit),
    };
    consume(shared, &context, &context.decode).await;
}

/// Returns once the prefill engine has ended, if it held KV of this hand-off.
async fn gone(prefill: Option<&EngineWatch>) {
    match prefill {
        Some(prefill) => prefill.gone().await,
        None => std::future::pending().await,
    }
}

async fn prefill_gone(context: &CleanupContext) {
    match &context.prefill {
        Some(kept) => kept.gone().await,
        None => std::future::pending().await,
    }
}

/// The request that makes a decode engine tell a prefill engine to free blocks.
fn release_request(params: &RawValue) -> (&'static str, Bytes) {
    let body = format!(
        r#"{{"model":"{NO_MODEL}","prompt":"x","max_tokens":1,"kv_transfer_params":{}}}"#,
        params.get()
    );
    (GenerationKind::Completions.path(), Bytes::from(body))
}

/// Frees the prefill engine's blocks through any decode engine, the request's own one first if it is healthy.
async fn release(
    shared: &Arc<Shared>,
    context: &CleanupContext,
    params: &RawValue,
    end: TransferEnd,
) -> ReleaseOutcome {
    let own_is_well = !matches!(end, TransferEnd::Unsent | TransferEnd::Late | TransferEnd::DecodeGone);
    let own = Arc::clone(&context.decode);
    let view = Arc::clone(&shared.view.borrow());
    let others = view
        .serving(Role::Decode)
        .filter(|engine| engine.id != own.engine.id)
        .filter_map(|engine| EngineLease::acquire(engine, &shared.view))
        .map(Arc::new);
    let mut leases: Vec<Arc<EngineLease>> = others.collect();
    leases.insert(if own_is_well { 0 } else { leases.len() }, own);
    let request = release_request(params);
    let mut refusals = Vec::new();
    for lease in &leases {
        let sent = send(
            shared,
            &context.headers,
            &context.request_id,
            lease,
            request.clone(),
            RELEASE_DEADLINE,
        );
        let sent = tokio::select! {
            biased;
            sent = sent => sent,
            () = prefill_gone(context) => {
                shared.metrics.count_cleanup(true);
                return ReleaseOutcome::Done;
            }
        };
        match sent {
            Ok(()) => {
                shared.metrics.count_cleanup(true);
                // The HTTP process of a frozen engine still answers.
                let may_be_frozen = end == TransferEnd::Late && Arc::ptr_eq(&lease.engine, &context.decode.engine);
                return if may_be_frozen {
                    ReleaseOutcome::Unsure
                } else {
                    ReleaseOutcome::Done
                };
            }
            Err(refusal) => refusals.push(refusal),
        }
    }
    ReleaseOutcome::Refused(refusals.join("; "))
}

/// Keeps trying to free the prefill engine's blocks until their lease ends, through decode engines as they come back.
/// Nothing waits for this.
async fn release_later(shared: &Arc<Shared>, context: CleanupContext, params: &RawValue, released: ReleaseOutcome) {
    let CleanupContext {
        decode,
        prefill,
        headers,
        request_id: request,
        permit,
        ..
    } = context;
    let own = decode.watch();
    let prefill = prefill.map(PendingKv::into_watch);
    drop((decode, permit));
    let passed_on = async {
        if matches!(released, ReleaseOutcome::Unsure) {
            own.gone().await;
        }
        pass_release_on(shared, &headers, &request, params).await;
    };
    let is_freed = while_leased(shared, prefill.as_ref(), passed_on).await;
    if let ReleaseOutcome::Refused(error) = released {
        shared.metrics.count_cleanup(is_freed);
        if !is_freed {
            warn_of_stranded(&request, &error);
        }
    }
}

/// Frees the blocks that an answer names which came after its client had left.
pub(crate) async fn release_abandoned(
    shared: Arc<Shared>,
    kept: PendingKv,
    headers: HeaderMap,
    request_id: String,
    params: Box<RawValue>,
) {
    let prefill = kept.into_watch();
    let passed_on = pass_release_on(&shared, &headers, &request_id, &params);
    let is_freed = while_leased(&shared, Some(&prefill), passed_on).await;
    shared.metrics.count_cleanup(is_freed);
    if !is_freed {
        warn_of_stranded(&request_id, "no decode engine accepted the release");
    }
}

fn warn_of_stranded(request: &str, error: &str) {
    tracing::warn!(
        request,
        error,
        "cannot free the KV of a request that ended early: it stays until its lease ends"
    );
}

/// Tries to free blocks for as long as their lease can last. Returns whether they are free.
async fn while_leased(shared: &Shared, prefill: Option<&EngineWatch>, passed_on: impl Future<Output = ()>) -> bool {
    let place = Arc::clone(&shared.overdue).try_acquire_owned();
    let lease = match (&place, shared.settings.deadlines.kv_lease) {
        (Ok(_), Some(lease)) => lease,
        _ => RELEASE_DEADLINE,
    };
    tokio::select! {
        biased;
        () = passed_on => true,
        () = gone(prefill) => true,
        () = shared.closing.cancelled() => false,
        () = tokio::time::sleep(lease) => false,
    }
}

/// Returns once a decode engine has accepted a release. An engine that does not serve clients yet can accept it too,
/// and must: its canary can wait for these very blocks.
async fn pass_release_on(shared: &Arc<Shared>, headers: &HeaderMap, request_id: &str, params: &RawValue) {
    let mut view = shared.view.clone();
    let request = release_request(params);
    loop {
        let now = Arc::clone(&view.borrow_and_update());
        let usable = |engine: &&Arc<EngineView>| {
            engine.role == Role::Decode && matches!(engine.state, EngineState::Healthy | EngineState::Ready)
        };
        for engine in now.engines.iter().filter(usable) {
            let Some(lease) = EngineLease::acquire(engine, &shared.view) else {
                continue;
            };
            let sent = send(shared, headers, request_id, &lease, request.clone(), RELEASE_DEADLINE);
            if sent.await.is_ok() {
                return;
            }
        }
        tokio::select! {
            changed = view.changed() => if changed.is_err() {
                std::future::pending::<()>().await;
            },
            () = tokio::time::sleep(RELEASE_PAUSE) => {}
        }
    }
}

/// Empties the decode engine's buffer of this hand-off's KV.
async fn consume(shared: &Arc<Shared>, context: &CleanupContext, lease: &EngineLease) {
    let (kind, body, mut edits) = match &context.consume {
        ConsumeRequest::Original(kind, body) => (*kind, body, one_token_edits(*kind)),
        ConsumeRequest::Completion(body) => (GenerationKind::Completions, body, Vec::new()),
    };
    if let Some(params) = &context.decode_params {
        edits.push(("kv_transfer_params", Some(params)));
    }
    // The body was parsed before. If it were invalid, the engine would refuse it.
    let body = Document::parse(body).map_or_else(|_| body.clone(), |document| document.edited(&edits).into());
    let outcome = send(
        shared,
        &context.headers,
        &context.request_id,
        lease,
        (kind.path(), body),
        context.deadline,
    )
    .await;
    let refusal = match outcome {
        // The buffer is gone with its engine.
        Err(_) if timeout(NEWS_DEADLINE, lease.gone()).await.is_ok() => None,
        outcome => outcome.err(),
    };
    if let Some(error) = &refusal {
        let request = &context.request_id;
        tracing::warn!(
            request,
            error,
            "cannot empty the decode engine's buffer after a request that ended early"
        );
    }
    shared.metrics.count_cleanup(refusal.is_none());
}

/// Sends one clean-up request. The error is a sentence.
async fn send(
    shared: &Shared,
    headers: &HeaderMap,
    request_id: &str,
    lease: &EngineLease,
    (path, body): (&'static str, Bytes),
    deadline: Duration,
) -> Result<(), String> {
    let call = Call {
        body,
        ..Call::post(path, headers, request_id, Vec::new())
    };
    let step = shared.upstream.fetch(&lease.engine, call);
    match lease.run(RequestStage::Handoff, deadline, step).await {
        Ok((head, _)) if head.status.is_success() || head.status == StatusCode::NOT_FOUND => Ok(()),
        Ok((head, _)) => Err(format!("`{}` answered {}", lease.engine.id, head.status)),
        Err(error) => Err(xpyd_base::report::one_line(&error)),
    }
}
