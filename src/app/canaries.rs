//! The canaries of a run. Each has a deadline and each round has one, so a result is always reported.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::fleet::EngineId;
use crate::proxy::{CanaryPrompts, Proxy};
use crate::report::one_line;
use crate::supervisor::{CanaryResult, CanaryRound, HookFuture};

/// How long the canaries of a round can take, for each pair in it. The first hand-off of a fresh pair of real engines takes half
/// a minute on an idle host.
pub(super) const VERIFY_DEADLINE: Duration = Duration::from_mins(5);

/// How long one canary can take. The first one of vLLM on overloaded cores took more than two minutes.
const CANARY_DEADLINE: Duration = Duration::from_mins(4);

/// The part of [`VERIFY_DEADLINE`] that is left for reporting the results.
const VERIFY_MARGIN: Duration = Duration::from_secs(10);

/// Sends canaries through the proxy.
pub(super) struct Canaries {
    proxy: Proxy,
    duration: watch::Sender<Duration>,
}

impl Canaries {
    /// `duration` gets the time of each round up to the last pair that worked.
    pub(super) fn new(proxy: Proxy, duration: watch::Sender<Duration>) -> Self {
        Self { proxy, duration }
    }

    /// Sends one canary through every pair: one after the other unless the round says otherwise, because the first hand-off of a
    /// fresh pair is slow even on an idle host.
    pub(super) fn run(&self, round: CanaryRound) -> HookFuture<Vec<CanaryResult>> {
        Box::pin(send(self.proxy.clone(), self.duration.clone(), round))
    }
}

async fn send(proxy: Proxy, duration: watch::Sender<Duration>, round: CanaryRound) -> Vec<CanaryResult> {
    let CanaryRound { pairs, at_once, worked } = round;
    let began = Instant::now();
    let count = pairs.len().max(1);
    let end = began + VERIFY_DEADLINE * u32::try_from(count).unwrap_or(1) - VERIFY_MARGIN;
    let mut seen = HashSet::new();
    let canaries = pairs.into_iter().map(|pair| {
        // A fault with long prompts alone belongs to an engine, not to a pair, so each engine takes part in one long canary a round.
        let are_new = [&pair.0, &pair.1].map(|engine| seen.insert(engine.clone()));
        let prompts = if are_new.contains(&true) {
            CanaryPrompts::ShortAndLong
        } else {
            CanaryPrompts::Short
        };
        let (proxy, duration, worked) = (&proxy, &duration, &worked);
        async move {
            let result = canary(proxy, &pair, prompts, end).await;
            if result == CanaryResult::Worked {
                duration.send_replace(began.elapsed());
                // The receiver is gone if a newer round has begun.
                let _ = worked.try_send(pair);
            }
            result
        }
    });
    let canaries = stream::iter(canaries).buffered(if at_once { count } else { 1 });
    canaries.collect().await
}

/// Sends a round of canaries through these pairs, one after the other. Returns why each one failed, in one line.
pub async fn verify_pairs(proxy: &Proxy, pairs: Vec<(EngineId, EngineId)>) -> Vec<Result<(), String>> {
    let round = CanaryRound {
        pairs,
        at_once: false,
        worked: mpsc::channel(1).0,
    };
    let results = send(proxy.clone(), watch::Sender::new(Duration::ZERO), round).await;
    let reason = |result| match result {
        CanaryResult::Worked => Ok(()),
        CanaryResult::Failed(reason) => Err(reason),
        CanaryResult::Untried => Err("there was no time for it".to_owned()),
    };
    results.into_iter().map(reason).collect()
}

async fn canary(
    proxy: &Proxy,
    (prefill, decode): &(EngineId, EngineId),
    prompts: CanaryPrompts,
    end: Instant,
) -> CanaryResult {
    let deadline = end.min(Instant::now() + CANARY_DEADLINE);
    let canary = tokio::time::timeout_at(deadline, proxy.canary(prefill, decode, prompts)).await;
    let failed =
        |why: String| CanaryResult::Failed(format!("the hand-off from {prefill} to {decode} does not work: {why}"));
    match canary {
        Ok(Ok(_)) => CanaryResult::Worked,
        Ok(Err(error)) => failed(one_line(&error)),
        Err(_) if deadline == end => CanaryResult::Untried,
        Err(_) => failed(format!(
            "it took longer than {}",
            humantime::format_duration(CANARY_DEADLINE)
        )),
    }
}
