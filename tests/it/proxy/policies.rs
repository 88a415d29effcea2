//! Which engines requests go to, by the options of `[proxy.routing]`.

use serde_json::json;
use xpyd::connector::{Connector, Nixl};
use xpyd::fleet::Role;
use xpyd::service::{Policy, Routing};

use super::fake::{self, COMPLETION, Fake, Going, Rig, answer, nixl_prefilled};
use super::{decoder, prefiller};
use crate::support::{Place, completion, get};

async fn rig(routing: Routing, prefill: &[&Fake], decode: &[&Fake]) -> Rig {
    let ports = |fakes: &[&Fake]| fakes.iter().map(|fake| fake.port).collect::<Vec<_>>();
    let mut settings = fake::settings(Connector::Nixl(Nixl {}));
    settings.session_header = Some("session-id".into());
    settings.service.routing = routing;
    Rig::start(settings, &ports(prefill), &ports(decode), 1, None).await
}

fn prompt(beginning: &str, end: usize) -> String {
    json!({"prompt": format!("{}{end}", beginning.repeat(300)), "max_tokens": 1}).to_string()
}

async fn ask(rig: &Rig, body: String) {
    assert_eq!(rig.complete(body).await, (200, COMPLETION.to_owned()));
}

#[tokio::test]
async fn by_default_pairs_stay_together_and_take_turns() {
    let (p1, p2, d1, d2) = (prefiller().await, prefiller().await, decoder().await, decoder().await);
    let rig = rig(Routing::default(), &[&p1, &p2], &[&d1, &d2]).await;
    for end in 0..4 {
        ask(&rig, prompt("x", end)).await;
    }
    for (prefill, decode) in [(&p1, &d1), (&p2, &d2)] {
        let ids = |fake: &Fake| fake.seen().iter().map(|seen| seen.id().to_owned()).collect::<Vec<_>>();
        assert_eq!(ids(prefill).len(), 2);
        assert_eq!(ids(prefill), ids(decode));
    }
    rig.finish().await;
}

#[tokio::test]
async fn a_prompt_goes_where_its_beginning_was_read() {
    let (p1, p2, decode) = (prefiller().await, prefiller().await, decoder().await);
    let routing = Routing {
        prefill_policy: Policy::Prefix,
        ..Routing::default()
    };
    let rig = rig(routing, &[&p1, &p2], &[&decode]).await;
    for end in 0..6 {
        ask(&rig, prompt("a", end)).await;
    }
    assert_eq!(
        (p1.seen().len(), p2.seen().len()),
        (6, 0),
        "round robin would alternate"
    );
    // The engine is lost; the other one reads the prompt and keeps it.
    rig.lose(Role::Prefill, 0);
    for end in 0..2 {
        ask(&rig, prompt("a", end)).await;
    }
    assert_eq!(p2.seen().len(), 2);
    rig.finish().await;
}

#[tokio::test]
async fn tokens_count_and_not_requests() {
    let gate = tokio_util::sync::CancellationToken::new();
    let slow = |gate: &tokio_util::sync::CancellationToken| {
        let gate = gate.clone();
        Fake::start(move |seen| {
            let gate = gate.clone();
            async move {
                if seen.raw.contains("\"user\":\"slow\"") {
                    gate.cancelled().await;
                }
                answer(200, COMPLETION)
            }
        })
    };
    let (prefill, d1, d2) = (prefiller().await, slow(&gate).await, slow(&gate).await);
    let routing = Routing {
        decode_policy: Policy::LeastTokens,
        ..Routing::default()
    };
    let rig = rig(routing, &[&prefill], &[&d1, &d2]).await;
    let large = json!({"prompt": vec![1; 900], "max_tokens": 1, "user": "slow"}).to_string();
    let large = Going::start(rig.post("/v1/completions", large).send());
    d1.saw(1).await;
    let mut small = Vec::new();
    for count in 1..=3 {
        let body = json!({"prompt": [1, 2, 3], "max_tokens": 1, "user": "slow"}).to_string();
        small.push(Going::start(rig.post("/v1/completions", body).send()));
        d2.saw(count).await;
    }
    assert_eq!((d1.seen().len(), d2.seen().len()), (1, 3));
    gate.cancel();
    assert_eq!(large.end().await.unwrap().status(), 200);
    for sent in small {
        assert_eq!(sent.end().await.unwrap().status(), 200);
    }
    rig.finish().await;
}

#[tokio::test]
async fn a_hash_sends_equal_beginnings_and_sessions_to_one_engine() {
    let (prefill, d1, d2) = (prefiller().await, decoder().await, decoder().await);
    let routing = Routing {
        decode_policy: Policy::ConsistentHash,
        ..Routing::default()
    };
    let rig = rig(routing, &[&prefill], &[&d1, &d2]).await;
    let counts = || [d1.seen().len(), d2.seen().len()];
    for beginning in ["a", "b", "c", "d", "e", "f"] {
        let before = counts();
        for end in 0..2 {
            ask(&rig, prompt(beginning, end)).await;
        }
        let grown = [counts()[0] - before[0], counts()[1] - before[1]];
        assert!(grown == [2, 0] || grown == [0, 2], "{grown:?}");
    }
    let before = counts();
    for beginning in ["a", "b", "c", "d", "e", "f"] {
        let request = rig.post("/v1/completions", prompt(beginning, 0));
        let response = request.header("session-id", "mine").send().await.unwrap();
        assert_eq!(response.status(), 200);
    }
    let grown = [counts()[0] - before[0], counts()[1] - before[1]];
    assert!(
        grown == [6, 0] || grown == [0, 6],
        "a session stays together: {grown:?}"
    );
    rig.finish().await;
}

#[tokio::test]
async fn short_and_well_known_prompts_need_no_prefill_engine() {
    let (prefill, decode) = (Fake::start(|_| async { nixl_prefilled() }).await, decoder().await);
    let routing = Routing {
        decode_policy: Policy::Prefix,
        prefill_threshold: 50,
        ..Routing::default()
    };
    let rig = rig(routing, &[&prefill], &[&decode]).await;
    let ids = |count: usize| json!({"prompt": (0..count).collect::<Vec<_>>(), "max_tokens": 1}).to_string();
    // Sent, and the prefills so far: 128 tokens are known once a prompt of 150 was read.
    for (tokens, prefills) in [(49, 0), (50, 1), (150, 2), (150, 2), (170, 2), (178, 3)] {
        ask(&rig, ids(tokens)).await;
        assert_eq!(prefill.seen().len(), prefills, "after {tokens} tokens");
    }
    assert_eq!(rig.metric(r#"xpyd_handoff_total{outcome="bypassed"}"#), "3");
    assert!(!decode.seen()[0].raw.contains("kv_transfer_params"));
    rig.finish().await;
}

/// Every policy on a whole fleet, chosen by the profile's keys: the answers are those of any other, and canaries still hand
/// over where no client's prompt would be.
#[test]
fn a_fleet_answers_the_same_under_every_policy() {
    let mut answers = Vec::new();
    for policy in ["round-robin", "least-tokens", "prefix", "consistent-hash"] {
        let place = Place::new();
        let keys = [
            format!("proxy.routing.prefill_policy={policy}"),
            format!("proxy.routing.decode_policy={policy}"),
        ];
        let mut run = place.up(&[
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
        let port = place.proxy_port();
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
