//! What a fleet tells of its requests beyond their answers: the access log, and engines' metrics merged into its own.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Place, get, post_with, wait_for};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// The lines of a log of JSON.
fn lines(place: &Place, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(place.path().join(name)).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn the_access_log_has_a_line_for_every_request_and_nothing_of_what_it_says() {
    let place = Place::new();
    std::fs::write(place.path().join("keys"), "swordfish").expect("a file");
    let arguments = [
        "--profile",
        "1p1d",
        "--api-key-file",
        "keys",
        "--access-log",
        "access.jsonl",
        "--client-bound",
    ];
    let mut run = place.up(&arguments);
    run.wait_until_ready();
    let port = place.proxy_port();
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
    assert_eq!(ask("/v1/confidential", &json!({}), "swordfish"), 404);
    assert_eq!(get(port, "/health"), "");
    let found = wait_for("four lines", || {
        let found = lines(&place, "access.jsonl");
        if found.len() == 4 {
            Ok(found)
        } else {
            Err(format!("{found:#?}"))
        }
    });
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
    assert_eq!(
        lines(&place, "access.jsonl").len(),
        4,
        "canaries and the question for its health are no clients'"
    );

    // Lines come when requests are over, in whatever order that is.
    let of = |status: u16| found.iter().filter(move |line| line["status"] == status);
    let generations: Vec<&Value> = of(200).collect();
    assert_eq!(generations.len(), 2);
    for line in generations {
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
fn an_access_log_that_cannot_be_written_is_refused_before_anything_starts() {
    let place = Place::new();
    for verb in [&["up", "--engine", "sim"][..], &["proxy", "--connector", "nixl"]] {
        let output = place.run(&[verb, &["--access-log", "no/such/folder"]].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains("no/such/folder") && error.contains("hint:"), "{error}");
    }
}

/// Every metric that an expression of the dashboard names.
fn named_by_the_dashboard() -> Vec<String> {
    fn expressions(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    match field {
                        Value::String(text) if ["expr", "definition"].contains(&name.as_str()) => {
                            found.push(text.clone())
                        }
                        field => expressions(field, found),
                    }
                }
            }
            Value::Array(fields) => fields.iter().for_each(|field| expressions(field, found)),
            _ => {}
        }
    }
    let dashboard = include_str!("../../configs/grafana-dashboard.json");
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
fn every_metric_of_the_dashboard_is_one_that_a_fleet_tells() {
    let place = Place::new();
    let mut run = place.up(&["--profile", "1p1d", "--set", "proxy.metrics.merge=true"]);
    run.wait_until_ready();
    let port = place.proxy_port();
    let body = json!({"model": MODEL, "prompt": "one two", "max_tokens": 4, "stream": true}).to_string();
    assert_eq!(post_with(port, "/v1/completions", &body, &[]).0, 200);
    let named = named_by_the_dashboard();
    assert!(named.len() > 15, "{named:?}");
    let missing = wait_for("the end of the request", || {
        let text = get(port, "/metrics");
        let is_told = |name: &String| {
            text.lines().any(|line| {
                line.strip_prefix(name.as_str())
                    .is_some_and(|rest| rest.starts_with(['{', ' ']))
            })
        };
        if !text.contains("xpyd_request_seconds_count{outcome=\"answered\"} 1") {
            return Err(text);
        }
        Ok(named.iter().filter(|name| !is_told(name)).cloned().collect::<Vec<_>>())
    });
    // Nothing was abandoned here, so that nothing had to be cleaned up.
    assert_eq!(missing, ["xpyd_handoff_cleanups_total"]);
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn metrics_of_simulated_engines_are_merged() {
    let place = Place::new();
    let mut run = place.up(&["--profile", "1p1d", "--set", "proxy.metrics.merge=true"]);
    run.wait_until_ready();
    let text = get(place.proxy_port(), "/metrics");
    for engine in [
        "engine=\"prefiller1\",role=\"prefill\"",
        "engine=\"decoder1\",role=\"decode\"",
    ] {
        assert!(text.contains(&format!("vllm:kv_cache_usage_perc{{{engine}")), "{text}");
    }
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}
