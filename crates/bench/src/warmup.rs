//! The ready check before a run, and the lines about the load that vLLM's client prints. The lines are kept byte for
//! byte, because programs parse them.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::export::python::repr;
use crate::{BenchError, Spec};

/// Printed if the user sets no temperature.
pub const NO_TEMPERATURE: &str = "WARNING: vllm bench serve no longer sets temperature==0 (greedy) in requests by default. \
    The default will be determined on the server side and can be model/API specific. For the old behavior, include \
    --temperature=0.";

/// Pause between two attempts of the ready check.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Sends the first request until it is answered or `patience` has passed.
pub(super) async fn ready_check<F>(
    patience: Duration,
    ask: impl Fn() -> F,
    print_line: &dyn Fn(&str),
    stop: &CancellationToken,
) -> Result<(), BenchError>
where
    F: Future<Output = Result<(), String>>,
{
    print_line("Starting initial single prompt test run...");
    if patience.is_zero() {
        print_line("Skipping endpoint ready check.");
        return Ok(());
    }
    print_line(&format!(
        "Waiting for endpoint to become up in {} seconds",
        patience.as_secs()
    ));
    let deadline = Instant::now() + patience;
    loop {
        let Some(answer) = stop.run_until_cancelled(ask()).await else {
            return Ok(());
        };
        let Err(cause) = answer else {
            print_line("Initial test run completed.");
            return Ok(());
        };
        tracing::warn!(cause, "the server is not ready");
        let left = deadline.saturating_duration_since(Instant::now());
        if stop
            .run_until_cancelled(sleep(left.min(RETRY_INTERVAL)))
            .await
            .is_none()
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(BenchError::NotReady { patience, cause });
        }
    }
}

/// Prints the lines about the load.
pub(super) fn announce(spec: &Spec, print_line: &dyn Fn(&str)) {
    if spec.workload.is_self_timed() {
        print_line("Self timing is set, using the timestamps from the trace file.");
        return;
    }
    let arrivals = &spec.arrivals;
    match arrivals.ramp {
        Some(ramp) => {
            print_line(&format!("Traffic ramp-up strategy: {}.", ramp.strategy.name()));
            let (start, end) = (ramp.start, ramp.end);
            print_line(&format!(
                "Will increase RPS from {start} to {end} RPS over the duration of the benchmark."
            ));
        }
        None => print_line(&format!("Traffic request rate: {}", repr(arrivals.request_rate))),
    }
    #[expect(clippy::float_cmp, reason = "exactly 1 is a Poisson process")]
    let process = if arrivals.burstiness == 1.0 {
        "Poisson process"
    } else {
        "Gamma distribution"
    };
    print_line(&format!("Burstiness factor: {} ({process})", repr(arrivals.burstiness)));
    let limit = spec
        .max_concurrency
        .map_or_else(|| "None".to_owned(), |limit| limit.to_string());
    print_line(&format!("Maximum request concurrency: {limit}"));
    if spec.options.probe_rate > 0.0 {
        print_line(&format!("Probe request rate: {} req/s", repr(spec.options.probe_rate)));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_is_asked_every_five_seconds_until_it_answers() {
        let (said, tries) = (RefCell::new(Vec::new()), Cell::new(0));
        let print_line = |line: &str| said.borrow_mut().push(line.to_owned());
        let ask = || async {
            tries.set(tries.get() + 1);
            if tries.get() < 4 { Err("no".to_owned()) } else { Ok(()) }
        };
        let start = Instant::now();
        let stop = CancellationToken::new();
        ready_check(Duration::from_secs(16), ask, &print_line, &stop)
            .await
            .unwrap();
        assert_eq!((start.elapsed().as_secs(), tries.get()), (15, 4));
        assert_eq!(
            *said.borrow(),
            [
                "Starting initial single prompt test run...",
                "Waiting for endpoint to become up in 16 seconds",
                "Initial test run completed.",
            ]
        );
        tries.set(0);
        let error = ready_check(Duration::from_secs(12), ask, &print_line, &stop)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the server did not answer the first prompt within 12 s: no"
        );
        assert_eq!(start.elapsed().as_secs(), 27);
    }
}
