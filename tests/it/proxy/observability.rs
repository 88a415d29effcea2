//! Access log, merged engine metrics, dashboard and traces of a whole fleet.

use std::sync::mpsc::{Receiver, channel};

use axum::Router;
use axum::body::Bytes;
use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};

use crate::support::{MODEL, TestEnv, get, post_with, wait_for};

/// The objects of a log in JSON lines.
fn lines(env: &TestEnv, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(env.path().join(name)).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

/// Checks a line of the access log for a generation with hand-off.
fn assert_generation_is_logged(line: &Value) {
    for (key, value) in [
        ("method", json!("POST")),
        ("route", json!("/v1/completions")),
        ("outcome", json!("answered")),
        ("prefill", json!("prefiller1")),
        ("decode", json!("decoder1")),
        ("handoff", json!("transferred")),
        ("attempts", json!(1)),
        ("completion_tokens", json!(4)),
        ("request_id", json!("client-7")),
    ] {
        assert_eq!(line[key], value, "{key} of {line}");
    }
    for key in ["prefill_ms", "handoff_ms", "first_token_ms", "total_ms"] {
        assert!(line[key].as_f64().is_some_and(|time| time >= 0.0), "{key} of {line}");
    }
    assert!(line["prompt_tokens"].as_u64() > Some(0), "{line}");
    assert!(line["time"].as_str().expect("a time").ends_with('Z'), "{line}");
    assert_ne!(line["engine_request_id"], line["request_id"]);
    assert_eq!(line["session"].as_str().map(str::len), Some(16), "a hash");
}

#[test]
fn the_access_log_has_every_request_and_no_content() {
    let env = TestEnv::new();
    std::fs::write(env.path().join("keys"), "swordfish").expect("a file");
    let arguments = [
        "--profile",
        "1p1d",
        "--api-key-file",
        "keys",
        "--access-log",
        "access.jsonl",
        "--client-bound",
    ];
    let mut run = env.up(&arguments);
    run.wait_until_ready();
    let port = env.proxy_port();
    let ask = |path: &str, body: &Value, key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [
            ("authorization", bearer.as_str()),
            ("x-request-id", "client-7"),
            ("session-id", "alice"),
        ];
        post_with(port, path, &body.to_string(), &headers).0
    };
    let body = |stream: bool| {
        json!({"model": MODEL, "prompt": "confidential words", "max_tokens": 4, "temperature": 0, "stream": stream,
            "stream_options": if stream { json!({"include_usage": true}) } else { Value::Null }})
    };
    assert_eq!(ask("/v1/completions", &body(false), "swordfish"), 200);
    assert_eq!(ask("/v1/completions", &body(true), "swordfish"), 200);
    assert_eq!(ask("/v1/completions", &body(false), "wrong-key"), 401);
    assert_eq!(ask("/confidential", &json!({}), "swordfish"), 404);
    assert_eq!(get(port, "/health"), "");
    let found = wait_for("four lines", || {
        let found = lines(&env, "access.jsonl");
        if found.len() == 4 {
            Ok(found)
        } else {
            Err(format!("{found:#?}"))
        }
    });
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
    assert_eq!(
        lines(&env, "access.jsonl").len(),
        4,
        "canaries and health checks are not logged"
    );

    // A line is written when its request is over, so the order varies.
    let of = |status: u16| found.iter().filter(move |line| line["status"] == status);
    let generations: Vec<&Value> = of(200).collect();
    assert_eq!(generations.len(), 2);
    generations.into_iter().for_each(assert_generation_is_logged);
    let refused = of(401).next().expect("a line");
    assert_eq!(
        (&refused["code"], &refused["outcome"]),
        (&json!("invalid_api_key"), &json!("refused"))
    );
    let unknown = of(404).next().expect("a line");
    assert_eq!(unknown["route"], "other");
    let text = found.iter().map(Value::to_string).collect::<String>();
    for secret in ["confidential", "swordfish", "wrong-key", "alice"] {
        assert!(!text.contains(secret), "{secret}: {text}");
    }
}

#[test]
fn an_unwritable_access_log_is_refused_before_the_start() {
    let env = TestEnv::new();
    for verb in [&["up", "--engine", "sim"][..], &["proxy", "--connector", "nixl"]] {
        let output = env.run(&[verb, &["--access-log", "no/such/folder"]].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains("no/such/folder") && error.contains("hint:"), "{error}");
    }
}

/// Every metric in an expression of the dashboard.
fn dashboard_metrics() -> Vec<String> {
    fn expressions(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    match field {
                        Value::String(text) if ["expr", "definition"].contains(&name.as_str()) => {
                            found.push(text.clone());
                        }
                        field => expressions(field, found),
                    }
                }
            }
            Value::Array(fields) => fields.iter().for_each(|field| expressions(field, found)),
            _ => {}
        }
    }
    let dashboard = include_str!("../../../configs/grafana-dashboard.json");
    let mut found = Vec::new();
    expressions(&serde_json::from_str(dashboard).expect("JSON"), &mut found);
    assert!(found.len() > 20, "{found:?}");
    let is_part = |character: char| character.is_ascii_alphanumeric() || "_:".contains(character);
    let words = found
        .iter()
        .flat_map(|expression| expression.split(|character| !is_part(character)));
    let mut names: Vec<String> = words
        .filter(|word| word.starts_with("xpyd_") || word.starts_with("vllm:"))
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn every_dashboard_metric_is_exported() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d", "--set", "proxy.metrics.merge=true"]);
    run.wait_until_ready();
    let port = env.proxy_port();
    let body = json!({"model": MODEL, "prompt": "one two", "max_tokens": 4, "stream": true}).to_string();
    assert_eq!(post_with(port, "/v1/completions", &body, &[]).0, 200);
    let named = dashboard_metrics();
    assert!(named.len() > 15, "{named:?}");
    let missing = wait_for("the end of the request", || {
        let text = get(port, "/metrics");
        let is_exported = |name: &String| {
            text.lines().any(|line| {
                line.strip_prefix(name.as_str())
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
            })
        };
        if !text.contains("xpyd_request_seconds_count{outcome=\"answered\"} 1\n") {
            return Err(text);
        }
        Ok(named
            .iter()
            .filter(|name| !is_exported(name))
            .cloned()
            .collect::<Vec<_>>())
    });
    // No request was abandoned here, so the cleanup metrics do not exist yet.
    assert_eq!(missing, ["xpyd_handoff_cleanups_total"]);
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn metrics_of_simulated_engines_are_merged() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d", "--set", "proxy.metrics.merge=true"]);
    run.wait_until_ready();
    let text = get(env.proxy_port(), "/metrics");
    for engine in [
        "engine=\"prefiller1\",role=\"prefill\"",
        "engine=\"decoder1\",role=\"decode\"",
    ] {
        assert!(text.contains(&format!("vllm:kv_cache_usage_perc{{{engine}")), "{text}");
    }
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

/// A trace collector: its URL and the spans it receives.
fn collector() -> (String, Receiver<ExportTraceServiceRequest>) {
    let (exported, exports) = channel();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/v1/traces", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async move {
            listener.set_nonblocking(true).expect("a socket");
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            let router = Router::new().fallback(move |body: Bytes| {
                let export = ExportTraceServiceRequest::decode(body).expect("an export");
                drop(exported.send(export));
                std::future::ready(())
            });
            axum::serve(listener, router).await.expect("served");
        });
    });
    (url, exports)
}

/// An attribute of a span, as text.
fn attribute(span: &Span, name: &str) -> Option<String> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.clone()?.value? {
        AnyValue::StringValue(text) => Some(text),
        AnyValue::IntValue(number) => Some(number.to_string()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_and_its_legs_are_spans_of_one_trace() {
    let (url, exports) = collector();
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d", "--otlp-traces-endpoint", &url]);
    run.wait_until_ready();
    let body = json!({"model": MODEL, "prompt": "confidential words", "max_tokens": 4, "stream": true,
        "stream_options": {"include_usage": true}});
    let context = [("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")];
    assert_eq!(
        post_with(env.proxy_port(), "/v1/completions", &body.to_string(), &context).0,
        200
    );
    assert_eq!(post_with(env.proxy_port(), "/v1/completions", "[1]", &context).0, 400);
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0, "pending spans are exported before the exit");

    let exported: Vec<ExportTraceServiceRequest> = exports.try_iter().collect();
    assert!(!format!("{exported:?}").contains("confidential"));
    let resources = exported.iter().flat_map(|export| &export.resource_spans);
    let spans: Vec<&Span> = resources
        .flat_map(|resource| &resource.scope_spans)
        .flat_map(|scope| &scope.spans)
        .collect();
    assert!(
        spans
            .iter()
            .all(|span| span.trace_id == 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes())
    );
    let roots: Vec<&&Span> = spans
        .iter()
        .filter(|span| span.name == "POST /v1/completions")
        .collect();
    let of = |status: &str| {
        let mut found = roots
            .iter()
            .filter(|span| attribute(span, "http.response.status_code").as_deref() == Some(status));
        found.next().expect("a span")
    };
    assert_eq!(attribute(of("400"), "error.type").as_deref(), Some("invalid_body"));
    let root = of("200");
    assert_eq!(root.parent_span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
    for (name, value) in [
        ("xpyd.outcome", "answered"),
        ("xpyd.handoff", "transferred"),
        ("xpyd.attempts", "1"),
        ("gen_ai.usage.output_tokens", "4"),
    ] {
        assert_eq!(attribute(root, name).as_deref(), Some(value), "{name}");
    }
    let children: Vec<&&Span> = spans
        .iter()
        .filter(|span| span.parent_span_id == root.span_id)
        .collect();
    let mut names: Vec<&str> = children.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["decode", "handoff", "prefill"]);
    for child in children {
        let lies_within = |time: u64| (root.start_time_unix_nano..=root.end_time_unix_nano).contains(&time);
        assert!(
            lies_within(child.start_time_unix_nano) && lies_within(child.end_time_unix_nano),
            "{child:?} {root:?}"
        );
        if child.name != "handoff" {
            let engine = if child.name == "prefill" {
                "prefiller1"
            } else {
                "decoder1"
            };
            assert_eq!(attribute(child, "xpyd.engine").as_deref(), Some(engine));
        }
    }
}

#[test]
fn an_invalid_collector_url_is_refused() {
    let env = TestEnv::new();
    for url in [
        "not a url",
        "localhost:4317",
        "https://collector:4318/v1/traces",
        "http://[broken",
    ] {
        let output = env.run(&["up", "--engine", "sim", "--otlp-traces-endpoint", url]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(url) && error.contains("hint:"), "{error}");
    }
}
