//! The canaries of a run: bounded each and all together, so that what they showed is always reported.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::fleet::EngineId;
use crate::proxy::{CanaryPrompts, Proxy};
use crate::report::one_line;
use crate::supervisor::{self, CanaryRound, Trial};

/// How long the canaries of a round can take, for each pair in it. The first hand-off of a fresh pair of real engines takes half
/// a minute on an idle host.
pub(super) const VERIFY_DEADLINE: Duration = Duration::from_mins(5);

/// How long one canary may take. The first one of vLLM on overloaded cores took more than two minutes.
const CANARY_DEADLINE: Duration = Duration::from_mins(4);

/// What is left of [`VERIFY_DEADLINE`] to report what the canaries showed.
const VERIFY_MARGIN: Duration = Duration::from_secs(10);

/// One canary through every pair: one after the other unless the round says otherwise, because on a fresh pair the first hand-off
/// is slow enough by itself. `took` gets the time of a round up to the last pair that worked.
pub(super) fn canaries(proxy: Proxy, took: watch::Sender<Duration>) -> supervisor::Verify {
    Box::new(move |round| Box::pin(send(proxy.clone(), took.clone(), round)))
}

async fn send(proxy: Proxy, took: watch::Sender<Duration>, round: CanaryRound) -> Vec<Trial> {
    let CanaryRound { pairs, at_once, worked } = round;
    let began = Instant::now();
    let count = pairs.len().max(1);
    let end = began + VERIFY_DEADLINE * u32::try_from(count).unwrap_or(1) - VERIFY_MARGIN;
    let mut seen = HashSet::new();
    let canaries = pairs.into_iter().map(|pair| {
        // What is wrong with long prompts alone is wrong with an engine, not with a pair: each engine asks one in a round.
        let are_new = [&pair.0, &pair.1].map(|engine| seen.insert(engine.clone()));
        let prompts = if are_new.contains(&true) {
            CanaryPrompts::ShortAndLong
        } else {
            CanaryPrompts::Short
        };
        let (proxy, took, worked) = (&proxy, &took, &worked);
        async move {
            let trial = canary(proxy, &pair, prompts, end).await;
            if trial == Trial::Worked {
                took.send_replace(began.elapsed());
                // The receiver is gone if a newer round has begun.
                let _ = worked.try_send(pair);
            }
            trial
        }
    });
    let canaries = stream::iter(canaries).buffered(if at_once { count } else { 1 });
    canaries.collect().await
}

async fn canary(
    proxy: &Proxy,
    (prefill, decode): &(EngineId, EngineId),
    prompts: CanaryPrompts,
    end: Instant,
) -> Trial {
    let deadline = end.min(Instant::now() + CANARY_DEADLINE);
    let canary = tokio::time::timeout_at(deadline, proxy.canary(prefill, decode, prompts)).await;
    let failed = |why: String| Trial::Failed(format!("the hand-off from {prefill} to {decode} does not work: {why}"));
    match canary {
        Ok(Ok(_)) => Trial::Worked,
        Ok(Err(error)) => failed(one_line(&error)),
        Err(_) if deadline == end => Trial::Untried,
        Err(_) => failed(format!(
            "it took longer than {}",
            humantime::format_duration(CANARY_DEADLINE)
        )),
    }
}
