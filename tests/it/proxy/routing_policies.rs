//! The routing policies of `[proxy.routing]`: which engines get a request.

use serde_json::json;
use xpyd::connector::{Connector, Nixl};
use xpyd::fleet::Role;
use xpyd::proxy_config::{Policy, Routing};

use super::harness::{
    self, BackgroundTask, COMPLETION, ProxyHarness, ScriptedEngine, decode_engine, json_response,
    nixl_prefill_response, prefill_engine,
};
use crate::support::{TestEnv, completion, get};

async fn harness(routing: Routing, prefill: &[&ScriptedEngine], decode: &[&ScriptedEngine]) -> ProxyHarness {
    let ports = |fakes: &[&ScriptedEngine]| fakes.iter().map(|fake| fake.port).collect::<Vec<_>>();
    let mut settings = harness::settings(Connector::Nixl(Nixl {}));
    settings.config.bind_sessions = true;
    settings.config.routing = routing;
    ProxyHarness::start(settings, &ports(prefill), &ports(decode), 1, None).await
}

fn prompt(beginning: &str, end: usize) -> String {
    json!({"prompt": format!("{}{end}", beginning.repeat(300)), "max_tokens": 1}).to_string()
}

async fn ask(harness: &ProxyHarness, body: String) {
    assert_eq!(harness.complete(body).await, (200, COMPLETION.to_owned()));
}

#[tokio::test]
async fn by_default_pairs_rotate() {
    let (p1, p2, d1, d2) = (
        prefill_engine().await,
        prefill_engine().await,
        decode_engine().await,
        decode_engine().await,
    );
    let harness = harness(Routing::default(), &[&p1, &p2], &[&d1, &d2]).await;
    for end in 0..4 {
        ask(&harness, prompt("x", end)).await;
    }
    for (prefill, decode) in [(&p1, &d1), (&p2, &d2)] {
        let ids = |fake: &ScriptedEngine| {
            fake.requests()
                .iter()
                .map(|seen| seen.id().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(prefill).len(), 2);
        assert_eq!(ids(prefill), ids(decode));
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_prompt_goes_to_the_engine_with_its_prefix() {
    let (p1, p2, decode) = (prefill_engine().await, prefill_engine().await, decode_engine().await);
    let routing = Routing {
        prefill_policy: Policy::Prefix,
        ..Routing::default()
    };
    let harness = harness(routing, &[&p1, &p2], &[&decode]).await;
    for end in 0..6 {
        ask(&harness, prompt("a", end)).await;
    }
    assert_eq!(
        (p1.requests().len(), p2.requests().len()),
        (6, 0),
        "round robin would alternate"
    );
    // The engine fails. The other one computes the prompt and caches it.
    harness.lose(Role::Prefill, 0);
    for end in 0..2 {
        ask(&harness, prompt("a", end)).await;
    }
    assert_eq!(p2.requests().len(), 2);
    harness.finish().await;
}

#[tokio::test]
async fn load_is_measured_in_tokens() {
    let gate = tokio_util::sync::CancellationToken::new();
    let slow = |gate: &tokio_util::sync::CancellationToken| {
        let gate = gate.clone();
        ScriptedEngine::start(move |seen| {
            let gate = gate.clone();
            async move {
                if seen.raw.contains("\"user\":\"slow\"") {
                    gate.cancelled().await;
                }
                json_response(200, COMPLETION)
            }
        })
    };
    let (prefill, d1, d2) = (prefill_engine().await, slow(&gate).await, slow(&gate).await);
    let routing = Routing {
        decode_policy: Policy::LeastTokens,
        ..Routing::default()
    };
    let harness = harness(routing, &[&prefill], &[&d1, &d2]).await;
    let large = json!({"prompt": vec![1; 900], "max_tokens": 1, "user": "slow"}).to_string();
    let large = BackgroundTask::start(harness.post("/v1/completions", large).send());
    d1.wait_for_requests(1).await;
    let mut small = Vec::new();
    for count in 1..=3 {
        let body = json!({"prompt": [1, 2, 3], "max_tokens": 1, "user": "slow"}).to_string();
        small.push(BackgroundTask::start(harness.post("/v1/completions", body).send()));
        d2.wait_for_requests(count).await;
    }
    assert_eq!((d1.requests().len(), d2.requests().len()), (1, 3));
    gate.cancel();
    assert_eq!(large.end().await.unwrap().status(), 200);
    for sent in small {
        assert_eq!(sent.end().await.unwrap().status(), 200);
    }
    harness.finish().await;
}

#[tokio::test]
async fn the_hash_policy_keeps_prefixes_and_sessions_together() {
    let (prefill, d1, d2) = (prefill_engine().await, decode_engine().await, decode_engine().await);
    let routing = Routing {
        decode_policy: Policy::ConsistentHash,
        ..Routing::default()
    };
    let harness = harness(routing, &[&prefill], &[&d1, &d2]).await;
    let counts = || [d1.requests().len(), d2.requests().len()];
    for beginning in ["a", "b", "c", "d", "e", "f"] {
        let before = counts();
        for end in 0..2 {
            ask(&harness, prompt(beginning, end)).await;
        }
        let grown = [counts()[0] - before[0], counts()[1] - before[1]];
        assert!(grown == [2, 0] || grown == [0, 2], "{grown:?}");
    }
    let before = counts();
    for beginning in ["a", "b", "c", "d", "e", "f"] {
        let request = harness.post("/v1/completions", prompt(beginning, 0));
        let response = request.header("session-id", "mine").send().await.unwrap();
        assert_eq!(response.status(), 200);
    }
    let grown = [counts()[0] - before[0], counts()[1] - before[1]];
    assert!(
        grown == [6, 0] || grown == [0, 6],
        "a session stays together: {grown:?}"
    );
    harness.finish().await;
}

#[tokio::test]
async fn short_and_cached_prompts_skip_the_prefill_engine() {
    let (prefill, decode) = (
        ScriptedEngine::start(|_| async { nixl_prefill_response() }).await,
        decode_engine().await,
    );
    let routing = Routing {
        decode_policy: Policy::Prefix,
        prefill_threshold: 50,
        ..Routing::default()
    };
    let harness = harness(routing, &[&prefill], &[&decode]).await;
    let ids = |count: usize| json!({"prompt": (0..count).collect::<Vec<_>>(), "max_tokens": 1}).to_string();
    // The request, and the number of prefills so far. After a prompt of 150 tokens, 128 of them are cached.
    for (tokens, prefills) in [(49, 0), (50, 1), (150, 2), (150, 2), (170, 2), (178, 3)] {
        ask(&harness, ids(tokens)).await;
        assert_eq!(prefill.requests().len(), prefills, "after {tokens} tokens");
    }
    assert_eq!(harness.metric(r#"xpyd_handoff_total{outcome="bypassed"}"#), "3");
    assert!(!decode.requests()[0].raw.contains("kv_transfer_params"));
    harness.finish().await;
}

/// Runs a whole fleet with each policy. All policies give the same answers, and canaries transfer KV even if the policy lets
/// clients' prompts skip the prefill engine.
#[test]
fn every_policy_gives_the_same_answers() {
    let mut answers = Vec::new();
    for policy in ["round-robin", "least-tokens", "prefix", "consistent-hash"] {
        let env = TestEnv::new();
        let keys = [
            format!("proxy.routing.prefill_policy={policy}"),
            format!("proxy.routing.decode_policy={policy}"),
        ];
        let mut run = env.up(&[
            "--profile",
            "2p2d-nixl",
            "--set",
            &keys[0],
            "--set",
            &keys[1],
            "--set",
            "proxy.routing.prefill_threshold=20",
        ]);
        run.wait_until_ready();
        let port = env.proxy_port();
        let long = "word ".repeat(200);
        let model = serde_json::from_str::<serde_json::Value>(&get(port, "/v1/models")).unwrap();
        let model = model["data"][0]["id"].as_str().unwrap();
        answers.push([
            completion(port, model, "short"),
            completion(port, model, &long),
            completion(port, model, &long),
        ]);
        let metrics = get(port, "/metrics");
        assert!(
            metrics.contains(r#"xpyd_handoff_total{outcome="bypassed"}"#),
            "{metrics}"
        );
        run.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(run.end().0, 0);
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
}
