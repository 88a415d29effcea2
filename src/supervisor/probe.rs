//! Polls an engine's readiness URL.
//!
//! It knows an address and a path, and nothing else of the engine. The state machine has the deadline.

use std::time::Duration;

use crate::plan::EngineSpec;

/// Pauses between two polls: short at first, because a simulated engine is up at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Timeout of one poll. A vLLM that starts on a busy machine can take seconds to accept a connection.
const QUESTION_DEADLINE: Duration = Duration::from_secs(5);

/// An HTTP client without a proxy from the environment and without kept connections.
pub(super) fn client() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .timeout(QUESTION_DEADLINE)
        .pool_max_idle_per_host(0)
        .build()
}

/// Completes once the engine has answered 200. A refused connection means that it is still starting: it listens last.
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

/// The address to connect to: loopback for an engine that listens on every address.
pub(super) fn reachable(engine: &EngineSpec) -> String {
    let mut endpoint = engine.endpoint.clone();
    match endpoint.host.as_str() {
        "0.0.0.0" => "127.0.0.1".clone_into(&mut endpoint.host),
        "::" => "::1".clone_into(&mut endpoint.host),
        _ => {}
    }
    endpoint.authority()
}
