//! What the tests share: a test environment, running programs, HTTP requests, and waiting.

mod http;
mod run;
mod test_env;

use std::sync::mpsc;
use std::time::Duration;

pub(crate) use http::*;
pub(crate) use run::*;
pub(crate) use test_env::*;

/// The longest wait for anything. Only a defect reaches it: with a load of 10 per core, some steps take a minute.
pub(crate) const DEADLINE: Duration = Duration::from_mins(4);

/// The model of the simulated engines.
pub(crate) const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Calls `ask` until it returns `Ok`, with pauses that grow to 100 ms. A call is often a whole `xpyd status`, and calls without
/// a pause would take CPU time from the process that is waited for.
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let (_never, pause) = mpsc::channel::<()>();
    let began = std::time::SystemTime::now();
    let mut wait = Duration::from_millis(5);
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(state) => assert!(
                began.elapsed().is_ok_and(|elapsed| elapsed < DEADLINE),
                "waited too long for {what}: {state}"
            ),
        }
        assert!(pause.recv_timeout(wait).is_err(), "nothing is sent");
        wait = (wait * 2).min(Duration::from_millis(100));
    }
}

/// Waits until `condition` holds, on the test's runtime.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "waited too long until {what}");
        tokio::task::yield_now().await;
        tokio::time::timeout(Duration::from_millis(5), std::future::pending::<()>())
            .await
            .expect_err("it never ends");
    }
}
