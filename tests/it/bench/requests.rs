//! The bench client against a scripted server over real sockets: what it sends, counts and prints. Measured values are not
//! asserted.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::num::NonZeroUsize;
use std::time::Duration;

use axum::http::HeaderMap;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use xpyd::bench::{self, Arrivals, Backend, BenchError, Progress, Report, Spec};

use super::fake_server::{Behaviour, Server};

async fn run(spec: &Spec) -> Report {
    bench::run(spec, &|_| {}, CancellationToken::new()).await.unwrap()
}

#[tokio::test]
async fn every_request_is_sent_and_counted() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let report = run(&server.spec()).await;
    let metrics = &report.metrics;
    assert_eq!((metrics.completed, metrics.failed), (8, 0));
    assert_eq!(
        (metrics.total_input_tokens, metrics.total_output_tokens),
        (8 * 17, 8 * 6)
    );
    assert_eq!(report.records.len(), 8);
    assert!(
        report
            .records
            .iter()
            .all(|record| record.result.as_ref().unwrap().gaps.len() == 2)
    );
    assert!(!report.is_partial() && report.failure_summary().is_none());
    assert!(
        report
            .table()
            .contains("Total input tokens:                      136       \n")
    );
    let detailed = report.to_json(true);
    assert_eq!(detailed["generated_texts"][7], " x y x y x y");
}

#[tokio::test]
async fn a_completion_request_equals_vllms() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let mut spec = server.spec();
    spec.headers.insert("x-tenant", "t1".parse().unwrap());
    spec.extra_body.insert("temperature".to_owned(), json!(0));
    run(&spec).await;
    let seen = server.seen.lock().unwrap();
    let mut ids: Vec<&str> = seen
        .iter()
        .map(|(_, headers, _)| headers["x-request-id"].to_str().unwrap())
        .collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 8);
    assert!(ids[0].starts_with("bench-") && ids[0].ends_with("-0"));
    let (path, headers, body) = &seen[0];
    assert_eq!(
        (path.as_str(), headers["x-tenant"].as_bytes()),
        ("/v1/completions", &b"t1"[..])
    );
    let prompt = body["prompt"].as_array().unwrap();
    assert_eq!(prompt.len(), 16);
    let written = serde_json::to_string(body)
        .unwrap()
        .replace(&serde_json::to_string(prompt).unwrap(), "PROMPT");
    assert_eq!(
        written,
        r#"{"model":"tiny","prompt":PROMPT,"repetition_penalty":1.0,"max_tokens":6,"logprobs":null,"stream":true,"#
            .to_owned()
            + r#""stream_options":{"include_usage":true},"ignore_eos":true,"temperature":0}"#
    );
}

#[tokio::test]
async fn the_same_seed_sends_the_same_prompts() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let mut spec = server.spec();
    // One request at a time, so that they arrive in order.
    spec.max_concurrency = NonZeroUsize::new(1);
    run(&spec).await;
    run(&spec).await;
    let seen = server.seen.lock().unwrap();
    let prompts: Vec<&Value> = seen.iter().map(|(_, _, body)| &body["prompt"]).collect();
    assert_eq!(prompts[..8], prompts[8..]);
    assert_ne!(prompts[0], prompts[1]);
}

#[tokio::test]
async fn a_chat_request_contains_text() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let spec = Spec {
        backend: Backend::Chat,
        endpoint: Backend::Chat.endpoint().to_owned(),
        ..server.spec()
    };
    let report = run(&spec).await;
    assert_eq!(report.metrics.completed, 8);
    let seen = server.seen.lock().unwrap();
    let (path, _, body) = &seen[0];
    assert_eq!(path, "/v1/chat/completions");
    let message = &body["messages"][0];
    assert_eq!((&message["role"], body.get("prompt")), (&json!("user"), None));
    let text = message["content"][0]["text"].as_str().unwrap();
    assert_eq!(text.split(' ').count(), 16);
}

#[tokio::test]
async fn failures_are_counted_separately_and_grouped_by_cause() {
    let server = Server::start(|index| match index {
        1 | 2 => Behaviour::Fail,
        3 => Behaviour::FailInStream,
        4 => Behaviour::EndEarly,
        5 => Behaviour::Break,
        _ => Behaviour::Answer,
    })
    .await;
    let mut spec = server.spec();
    spec.max_concurrency = NonZeroUsize::new(1);
    let report = run(&spec).await;
    assert_eq!((report.metrics.completed, report.failed()), (3, 5));
    assert_eq!(report.metrics.total_output_tokens, 3 * 6);
    let causes: Vec<(String, usize)> = report
        .failures()
        .into_iter()
        .map(|group| (group.cause, group.count))
        .collect();
    assert_eq!(causes[0], ("HTTP 500 Internal Server Error: out of luck".to_owned(), 2));
    let once: Vec<&str> = causes[1..].iter().map(|(cause, _)| cause.as_str()).collect();
    assert!(
        once[0].starts_with("the server failed during the stream: decoder1 died"),
        "{once:?}"
    );
    assert!(once[1].starts_with("the stream broke off: "), "{once:?}");
    assert_eq!(once[2], "the stream ended early, without `[DONE]`");
    assert!(
        report
            .table()
            .contains("Failed requests:                         5         \n")
    );
}

#[tokio::test]
async fn a_hung_request_fails_at_its_deadline() {
    let server = Server::start(|index| if index == 0 { Behaviour::Hang } else { Behaviour::Answer }).await;
    let mut spec = server.spec();
    spec.request_timeout = Duration::from_millis(200);
    let report = run(&spec).await;
    assert_eq!(report.failures()[0].cause, "the answer was not complete within 0.2 s");
}

#[tokio::test]
async fn a_cancelled_run_reports_finished_requests() {
    let server = Server::start(|index| if index < 3 { Behaviour::Answer } else { Behaviour::Hang }).await;
    let mut spec = server.spec();
    spec.max_concurrency = NonZeroUsize::new(1);
    let stop = CancellationToken::new();
    let progress = |progress: Progress| {
        if progress.done == 3 {
            stop.cancel();
        }
    };
    let report = bench::run(&spec, &progress, stop.clone()).await.unwrap();
    assert_eq!(report.metrics.completed, 3);
    assert_eq!((report.dropped, report.unsent), (5, 0));
    assert!(report.is_partial());
}

#[tokio::test]
async fn warmups_copy_the_first_prompt_and_do_not_count() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let spec = Spec {
        warmups: 3,
        ..server.spec()
    };
    let report = run(&spec).await;
    assert_eq!(report.metrics.completed, 8);
    let seen = server.seen.lock().unwrap();
    assert_eq!(seen.len(), 11);
    let first = seen
        .iter()
        .find(|(_, headers, _)| headers["x-request-id"].to_str().unwrap().ends_with("-0"));
    let (_, _, first) = first.unwrap();
    assert!(seen[..3].iter().all(|(_, _, body)| body["prompt"] == first["prompt"]));
}

#[tokio::test]
async fn the_default_model_is_the_first_served() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let base_url = server.spec().base_url;
    let headers = HeaderMap::new();
    let model = bench::discover(&base_url, &headers, None).await.unwrap();
    assert_eq!(
        (model.id.as_str(), model.root.as_deref()),
        ("tiny", Some("/models/tiny"))
    );
    assert_eq!(bench::discover(&base_url, &headers, Some("tiny")).await.unwrap(), model);
    let error = bench::discover(&base_url, &headers, Some("big")).await.unwrap_err();
    assert!(
        matches!(&error, BenchError::UnknownModel { served, .. } if served[..] == ["tiny"]),
        "{error:?}"
    );
    let error = bench::discover(&format!("{base_url}/v1"), &headers, None)
        .await
        .unwrap_err();
    assert!(matches!(&error, BenchError::NoModelList { .. }), "{error:?}");
}

#[tokio::test]
async fn an_unreachable_server_is_one_clear_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = bench::discover(&base_url, &HeaderMap::new(), None).await.unwrap_err();
    assert_eq!(error.to_string(), format!("no answer from `{base_url}/v1/models`"));
}

#[tokio::test]
async fn invalid_settings_are_refused_before_any_request() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let refused = async |spec: Spec| {
        assert!(spec.check().is_err());
        bench::run(&spec, &|_| {}, CancellationToken::new()).await.unwrap_err()
    };
    server.spec().check().unwrap();
    for rate in [0.0, -1.0, f64::NAN] {
        let arrivals = Arrivals {
            request_rate: rate,
            burstiness: 1.0,
            ramp: None,
        };
        assert!(matches!(
            refused(Spec {
                arrivals,
                ..server.spec()
            })
            .await,
            BenchError::RequestRate(_)
        ));
        let arrivals = Arrivals {
            request_rate: 1.0,
            burstiness: rate,
            ramp: None,
        };
        assert!(matches!(
            refused(Spec {
                arrivals,
                ..server.spec()
            })
            .await,
            BenchError::Burstiness(_)
        ));
    }
    let arrivals = Arrivals {
        request_rate: 1e-300,
        burstiness: 1.0,
        ramp: None,
    };
    assert!(matches!(
        refused(Spec {
            arrivals,
            ..server.spec()
        })
        .await,
        BenchError::TooSlow { .. }
    ));
    let base_url = "localhost:9100".to_owned();
    assert!(matches!(
        refused(Spec {
            base_url,
            ..server.spec()
        })
        .await,
        BenchError::BaseUrl(_)
    ));
    assert!(server.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn lora_adapters_alternate_and_ids_have_the_given_prefix() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let mut spec = server.spec();
    spec.max_concurrency = NonZeroUsize::new(1);
    spec.options = bench::Options {
        lora: Some(bench::Lora {
            modules: vec!["a".to_owned(), "b".to_owned(), "c".to_owned()],
            assignment: bench::LoraAssignment::RoundRobin,
        }),
        logprobs: Some(2),
        ready_check: Duration::from_mins(1),
        request_id_prefix: Some("mine-".to_owned()),
        ..bench::Options::default()
    };
    spec.warmups = 1;
    run(&spec).await;
    let seen = server.seen.lock().unwrap();
    let models: Vec<&str> = seen
        .iter()
        .map(|(_, _, body)| body["model"].as_str().unwrap())
        .collect();
    // The ready check and the warm-up use the model itself.
    assert_eq!(models, ["tiny", "tiny", "a", "b", "c", "a", "b", "c", "a", "b"]);
    assert!(seen.iter().all(|(_, headers, body)| {
        headers["x-request-id"].as_bytes().starts_with(b"mine-") && body["logprobs"] == 2
    }));
}

#[tokio::test]
async fn probes_run_with_the_workload_and_count_separately() {
    let server = Server::start(|_| Behaviour::Answer).await;
    let mut spec = server.spec();
    spec.options.probe_rate = 1000.0;
    let report = run(&spec).await;
    assert_eq!(report.metrics.completed, 8);
    let probes = report.extras.probes.as_ref().unwrap();
    assert!(!probes.latencies.is_empty() && probes.failed == 0, "{probes:?}");
    let seen = server.seen.lock().unwrap();
    let asked = seen
        .iter()
        .filter(|(_, _, body)| body["prompt"] == "Hi" && body["max_tokens"] == 1)
        .count();
    assert_eq!(asked, probes.latencies.len());
    assert!(
        report
            .table()
            .contains("------------------Probe Requests------------------\nProbe requests completed:")
    );
}
