//! The canaries of a run: bounded each and all together, so that what they showed is always reported.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::proxy::Proxy;
use crate::report::one_line;
use crate::supervisor;

/// How long the canaries of a round can take, for each pair in it. The first hand-off of a fresh pair of real engines takes half
/// a minute on an idle host.
pub(super) const VERIFY_DEADLINE: Duration = Duration::from_mins(5);

/// How long one canary may take. The first one of vLLM on overloaded cores took more than two minutes.
const CANARY_DEADLINE: Duration = Duration::from_mins(4);

/// What is left of [`VERIFY_DEADLINE`] to report what the canaries showed.
const VERIFY_MARGIN: Duration = Duration::from_secs(10);

/// One canary through every pair, one after the other: on a fresh pair the first hand-off is slow enough by itself.
pub(super) fn canaries(proxy: Proxy, took: watch::Sender<Duration>) -> supervisor::Verify {
    Box::new(move |pairs| {
        let (proxy, took) = (proxy.clone(), took.clone());
        Box::pin(async move {
            let began = Instant::now();
            let end = began + VERIFY_DEADLINE * u32::try_from(pairs.len()).unwrap_or(1).max(1) - VERIFY_MARGIN;
            let mut trials = Vec::new();
            for (prefill, decode) in pairs {
                let deadline = end.min(Instant::now() + CANARY_DEADLINE);
                let canary = tokio::time::timeout_at(deadline, proxy.canary(&prefill, &decode)).await;
                let failed = |why: String| {
                    supervisor::Trial::Failed(format!("the hand-off from {prefill} to {decode} does not work: {why}"))
                };
                trials.push(match canary {
                    Ok(Ok(_)) => supervisor::Trial::Worked,
                    Ok(Err(error)) => failed(one_line(&error)),
                    Err(_) if deadline == end => supervisor::Trial::Untried,
                    Err(_) => failed(format!(
                        "it took longer than {}",
                        humantime::format_duration(CANARY_DEADLINE)
                    )),
                });
            }
            took.send_replace(began.elapsed());
            trials
        })
    })
}
