//! Pays what a hand-off that ended early owes: frees the prefill engine's blocks, or empties the decode engine's buffer.
//!
//! Every wait is bounded. Knows what to send to an engine; what is owed is `table`'s to say.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::abandoned::MOMENT;
use super::cleanup_table::End;
use super::notify::Arrival;
use crate::fleet::{EngineState, EngineView, Role};
use crate::proxy::Shared;
use crate::proxy::body::document::{Document, Edit};
use crate::proxy::body::serving_mode::Kind;
use crate::proxy::error::Stage as Leg;
use crate::proxy::schedule::lease::{EngineWatch, Kept, Seat};
use crate::proxy::upstream::Call;

/// A model that no engine serves: the decode engine answers 404 and, as seen on vLLM 0.32.0, lets the prefill engine
/// free the blocks of the parameters that came along.
pub(crate) const NO_MODEL: &str = "xpyd-releases-kv-with-this-unknown-model";

/// How long one engine may take to pass a release on.
const RELEASE_DEADLINE: Duration = Duration::from_secs(5);

/// The pause between two rounds of a release that no engine passes on. A change in the fleet ends it.
const RELEASE_PAUSE: Duration = Duration::from_secs(5);

/// How long a failed clean-up waits for the news that its engine has gone, which settles it as well.
const NEWS_DEADLINE: Duration = Duration::from_secs(1);

/// How long an overdue notification is still acted upon. It waits in a full buffer's queue as long as that stays full, and
/// vLLM gives up a worker that waits longer.
const OVERDUE: Duration = Duration::from_mins(5);

/// Changes that turn a client's body into one that generates a single token in one piece.
pub(crate) fn one_token_edits(kind: Kind) -> Vec<Edit<'static>> {
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
pub(crate) struct Care {
    pub(crate) decode: Arc<Seat>,
    /// The prefill engine, as long as it has KV of this hand-off.
    pub(crate) prefill: Option<Kept>,
    /// What a decode leg must carry to find pushed KV.
    pub(crate) decode_params: Option<String>,
    pub(crate) headers: HeaderMap,
    pub(crate) request_id: String,
    pub(crate) consume: Consume,
    /// How long the clean-up may wait for notifications, and then for the decode engine.
    pub(crate) deadline: Duration,
    /// Held until the KV is seen to, so that clean-ups count as requests in flight.
    pub(crate) permit: Arc<OwnedSemaphorePermit>,
}

/// The request that makes a decode engine take KV that was pushed to it.
#[derive(Debug)]
pub(crate) enum Consume {
    /// The client's body, for one token.
    Original(Kind, Bytes),
    /// A completion of these bytes.
    Completion(Bytes),
}

/// A debt, with what paying it takes.
#[derive(Debug)]
pub(crate) enum Owed {
    Release(Box<RawValue>, End),
    Consume,
    ConsumeOnceThere(Arrival),
    ConsumeNowAndLater(Arrival),
}

/// The largest body of a client that is kept for as long as its answer streams.
const MAX_KEPT_BODY: usize = 256 << 10;

/// What paying takes, without what would hold much memory until the end of a stream; `None` where that is all of it.
pub(crate) fn within_a_stream(care: Care, owed: Owed) -> Option<(Care, Owed)> {
    let body = match (&owed, &care.consume) {
        (Owed::Release(..), _) => 0,
        (_, Consume::Original(_, body) | Consume::Completion(body)) => body.len(),
    };
    let consume = match owed {
        Owed::Release(..) => Consume::Completion(Bytes::new()),
        _ => care.consume,
    };
    (body <= MAX_KEPT_BODY).then_some((Care { consume, ..care }, owed))
}

/// How a release went.
enum Released {
    /// The prefill engine knows of it, or is gone.
    Done,
    /// A decode engine that may be frozen took it: the prefill engine learns of it if that engine recovers.
    Unsure,
    /// No decode engine took it. Holds why.
    Refused(String),
}

/// What remains to be done without holding the request's places.
enum Later {
    /// A notification that has not come yet is still acted upon.
    Arrival(Arrival),
    /// Blocks are freed once an engine can pass that on.
    Release(Box<RawValue>, Released),
}

/// Pays what is owed.
pub(crate) async fn pay(shared: Arc<Shared>, care: Care, owed: Owed) {
    let later = match owed {
        Owed::Release(params, end) => {
            let released = release(&shared, &care, &params, end).await;
            (!matches!(released, Released::Done)).then_some(Later::Release(params, released))
        }
        Owed::Consume => {
            consume(&shared, &care, &care.decode).await;
            None
        }
        Owed::ConsumeOnceThere(mut arrival) => {
            // If its client leaves, a prefill engine aborts the request and never notifies. So the decode engine is held for a moment only.
            care.decode.held().inspect(|held| held.abandoned());
            let came = tokio::select! {
                biased;
                () = arrival.complete() => Some(true),
                () = care.decode.gone() => None,
                () = prefill_gone(&care) => Some(true),
                () = tokio::time::sleep(care.deadline.min(MOMENT)) => Some(false),
            };
            if came.is_some() {
                consume(&shared, &care, &care.decode).await;
            }
            (came == Some(false)).then_some(Later::Arrival(arrival))
        }
        Owed::ConsumeNowAndLater(arrival) => {
            consume(&shared, &care, &care.decode).await;
            Some(Later::Arrival(arrival))
        }
    };
    shared.metrics.open_handoffs(-1);
    match later {
        Some(Later::Arrival(arrival)) => expect_overdue(&shared, care, arrival).await,
        Some(Later::Release(params, released)) => release_later(&shared, care, &params, released).await,
        None => {}
    }
}

/// Continues to wait for a notification, or for the end of the engine that would send it. Holds no engine and no place, so nothing
/// waits for this.
async fn expect_overdue(shared: &Arc<Shared>, care: Care, mut arrival: Arrival) {
    let Ok(_place) = Arc::clone(&shared.overdue).try_acquire_owned() else {
        return;
    };
    let Care {
        decode,
        prefill,
        decode_params,
        headers,
        request_id,
        consume: request,
        deadline,
        permit,
    } = care;
    let engine = decode.watch();
    let prefill = prefill.map(Kept::into_watch);
    drop((decode, permit));
    let came = tokio::select! {
        () = arrival.complete() => true,
        () = gone(prefill.as_ref()) => true,
        () = engine.gone() => false,
        () = shared.closing.cancelled() => false,
        () = tokio::time::sleep(OVERDUE) => false,
    };
    let (Some(seat), Ok(permit)) = (came.then(|| engine.seat()).flatten(), shared.admit()) else {
        return;
    };
    tracing::debug!(request = request_id, "an overdue notification came");
    let care = Care {
        decode: Arc::new(seat),
        prefill: None,
        decode_params,
        headers,
        request_id,
        consume: request,
        deadline,
        permit: Arc::new(permit),
    };
    consume(shared, &care, &care.decode).await;
}

/// Returns once the prefill engine has gone, if it had KV of this hand-off.
async fn gone(prefill: Option<&EngineWatch>) {
    match prefill {
        Some(prefill) => prefill.gone().await,
        None => std::future::pending().await,
    }
}

async fn prefill_gone(care: &Care) {
    match &care.prefill {
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
    (Kind::Completions.path(), Bytes::from(body))
}

/// Frees the prefill engine's blocks: any decode engine can pass that on, the request's own one first if it is well.
async fn release(shared: &Arc<Shared>, care: &Care, params: &RawValue, end: End) -> Released {
    let own_is_well = !matches!(end, End::Unsent | End::Late | End::DecodeGone);
    let own = Arc::clone(&care.decode);
    let view = Arc::clone(&shared.view.borrow());
    let others = view
        .serving(Role::Decode)
        .filter(|engine| engine.id != own.engine.id)
        .filter_map(|engine| Seat::take(engine, &shared.view))
        .map(Arc::new);
    let mut seats: Vec<Arc<Seat>> = others.collect();
    seats.insert(if own_is_well { 0 } else { seats.len() }, own);
    let request = release_request(params);
    let mut refusals = Vec::new();
    for seat in &seats {
        let sent = send(
            shared,
            &care.headers,
            &care.request_id,
            seat,
            request.clone(),
            RELEASE_DEADLINE,
        );
        let sent = tokio::select! {
            biased;
            sent = sent => sent,
            () = prefill_gone(care) => {
                shared.metrics.cleaned_up(true);
                return Released::Done;
            }
        };
        match sent {
            Ok(()) => {
                shared.metrics.cleaned_up(true);
                // The HTTP half of a frozen engine still answers.
                let may_be_frozen = end == End::Late && Arc::ptr_eq(&seat.engine, &care.decode.engine);
                return if may_be_frozen {
                    Released::Unsure
                } else {
                    Released::Done
                };
            }
            Err(refusal) => refusals.push(refusal),
        }
    }
    Released::Refused(refusals.join("; "))
}

/// Keeps trying to free the prefill engine's blocks until their lease ends, through decode engines as they come back. Holds
/// nothing that anything else waits for.
async fn release_later(shared: &Arc<Shared>, care: Care, params: &RawValue, released: Released) {
    let Care {
        decode,
        prefill,
        headers,
        request_id: request,
        permit,
        ..
    } = care;
    let own = decode.watch();
    let prefill = prefill.map(Kept::into_watch);
    drop((decode, permit));
    let passed_on = async {
        if matches!(released, Released::Unsure) {
            own.gone().await;
        }
        pass_release_on(shared, &headers, &request, params).await;
    };
    let is_freed = while_leased(shared, prefill.as_ref(), passed_on).await;
    if let Released::Refused(error) = released {
        shared.metrics.cleaned_up(is_freed);
        if !is_freed {
            warn_of_stranded(&request, &error);
        }
    }
}

/// Frees the blocks that an answer names which came after its client had left.
pub(crate) async fn release_abandoned(
    shared: Arc<Shared>,
    kept: Kept,
    headers: HeaderMap,
    request_id: String,
    params: Box<RawValue>,
) {
    let prefill = kept.into_watch();
    let passed_on = pass_release_on(&shared, &headers, &request_id, &params);
    let is_freed = while_leased(&shared, Some(&prefill), passed_on).await;
    shared.metrics.cleaned_up(is_freed);
    if !is_freed {
        warn_of_stranded(&request_id, "no decode engine passed it on");
    }
}

fn warn_of_stranded(request: &str, error: &str) {
    tracing::warn!(
        request,
        error,
        "could not free the KV of a request that ended early: its lease will"
    );
}

/// Tries to free blocks for as long as their lease can last; whether they are free then.
async fn while_leased(shared: &Shared, prefill: Option<&EngineWatch>, passed_on: impl Future<Output = ()>) -> bool {
    let place = Arc::clone(&shared.overdue).try_acquire_owned();
    let lease = match (&place, shared.settings.kv_lease) {
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

/// Returns once a decode engine has passed a release on. One that clients cannot use yet can do that as well, and must:
/// its canary may wait for the very blocks.
async fn pass_release_on(shared: &Arc<Shared>, headers: &HeaderMap, request_id: &str, params: &RawValue) {
    let mut view = shared.view.clone();
    let request = release_request(params);
    loop {
        let now = Arc::clone(&view.borrow_and_update());
        let usable = |engine: &&Arc<EngineView>| {
            engine.role == Role::Decode && matches!(engine.state, EngineState::Healthy | EngineState::Ready)
        };
        for engine in now.engines.iter().filter(usable) {
            let Some(seat) = Seat::take(engine, &shared.view) else {
                continue;
            };
            let sent = send(shared, headers, request_id, &seat, request.clone(), RELEASE_DEADLINE);
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
async fn consume(shared: &Arc<Shared>, care: &Care, seat: &Seat) {
    let (kind, body, mut edits) = match &care.consume {
        Consume::Original(kind, body) => (*kind, body, one_token_edits(*kind)),
        Consume::Completion(body) => (Kind::Completions, body, Vec::new()),
    };
    if let Some(params) = &care.decode_params {
        edits.push(("kv_transfer_params", Some(params)));
    }
    // It was parsed before; were it not, the engine would say so.
    let body = Document::parse(body).map_or_else(|_| body.clone(), |document| document.edited(&edits).into());
    let outcome = send(
        shared,
        &care.headers,
        &care.request_id,
        seat,
        (kind.path(), body),
        care.deadline,
    )
    .await;
    let refusal = match outcome {
        // Its buffer went with it.
        Err(_) if timeout(NEWS_DEADLINE, seat.gone()).await.is_ok() => None,
        outcome => outcome.err(),
    };
    if let Some(error) = &refusal {
        let request = &care.request_id;
        tracing::warn!(
            request,
            error,
            "could not empty the decode engine's buffer of a request that ended early"
        );
    }
    shared.metrics.cleaned_up(refusal.is_none());
}

/// Sends one request of a clean-up; a sentence if it did not do.
async fn send(
    shared: &Shared,
    headers: &HeaderMap,
    request_id: &str,
    seat: &Seat,
    (path, body): (&'static str, Bytes),
    deadline: Duration,
) -> Result<(), String> {
    let call = Call {
        body,
        ..Call::post(path, headers, request_id, Vec::new())
    };
    let step = shared.upstream.fetch(&seat.engine, call);
    match seat.run(Leg::Handoff, deadline, step).await {
        Ok((head, _)) if head.status.is_success() || head.status == StatusCode::NOT_FOUND => Ok(()),
        Ok((head, _)) => Err(format!("`{}` answered {}", seat.engine.id, head.status)),
        Err(error) => Err(crate::report::one_line(&error)),
    }
}
