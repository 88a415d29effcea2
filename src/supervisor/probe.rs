//! Asks an engine whether it is up.
//!
//! Knows an address and a path, nothing of what an engine is. No deadline here: the state machine has it.

use std::time::Duration;

use crate::plan::EngineSpec;

/// Pauses between two questions: short at first, because a simulated engine is up at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// One question. A vLLM that starts on a busy machine may take seconds to accept.
const QUESTION_DEADLINE: Duration = Duration::from_secs(5);

/// A client for probes: no proxy from the environment, no connection kept.
pub(super) fn client() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .timeout(QUESTION_DEADLINE)
        .pool_max_idle_per_host(0)
        .build()
}

/// Returns once the engine has answered 200. A refused connection means that it is still starting: it listens last.
pub(super) async fn until_up(client: reqwest::Client, engine: EngineSpec) {
    let url = format!("http://{}{}", reachable(&engine), engine.ready_path);
    let mut pause = FIRST_PAUSE;
    loop {
        let answer = client.get(&url).send().await;
        if answer.is_ok_and(|answer| answer.status() == reqwest::StatusCode::OK) {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Where to ask: an engine that listens on every address is asked on the loopback one.
pub(super) fn reachable(engine: &EngineSpec) -> String {
    let mut endpoint = engine.endpoint.clone();
    match endpoint.host.as_str() {
        "0.0.0.0" => "127.0.0.1".clone_into(&mut endpoint.host),
        "::" => "::1".clone_into(&mut endpoint.host),
        _ => {}
    }
    endpoint.authority()
}
