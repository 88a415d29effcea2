//! Requests of browsers and general HTTP clients: CORS, forms, encodings, large bodies, and other spellings of a path.

use std::io::{Read, Write};
use std::net::TcpStream;

use axum::http::Method;
use serde_json::json;
use xpyd::connector::{Connector, Nixl};
use xpyd::proxy::{ClientKeys, Settings};

use super::harness::{
    self, COMPLETION, ProxyHarness, ScriptedEngine, code, decode_engine, json_response, prefill_engine,
};

fn settings() -> Settings {
    harness::settings(Connector::Nixl(Nixl {}))
}

async fn harness(settings: Settings) -> (ScriptedEngine, ScriptedEngine, ProxyHarness) {
    let (prefill, decode) = (prefill_engine().await, decode_engine().await);
    let harness = ProxyHarness::start(settings, &[prefill.port], &[decode.port], 1, None).await;
    (prefill, decode, harness)
}

fn client() -> reqwest::Client {
    let none = reqwest::redirect::Policy::none();
    reqwest::Client::builder().redirect(none).build().unwrap()
}

#[tokio::test]
async fn allowed_origins_can_use_the_fleet() {
    let mut settings = settings();
    settings.config.cors.allowed_origins = vec!["http://app.example".to_owned()];
    settings.parts.client_keys = ClientKeys::read("key").unwrap();
    let (_prefill, decode, harness) = harness(settings).await;
    let ask = |origin: &'static str| {
        let request = client().request(Method::OPTIONS, format!("{}/v1/chat/completions", harness.url));
        let request = request
            .header("origin", origin)
            .header("access-control-request-method", "POST");
        request
            .header("access-control-request-headers", "authorization,content-type")
            .send()
    };
    let response = ask("http://app.example").await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["access-control-allow-origin"], "http://app.example");
    assert_eq!(
        response.headers()["access-control-allow-headers"],
        "authorization,content-type"
    );
    assert_eq!(response.text().await.unwrap(), "OK");
    let response = ask("http://evil.example").await.unwrap();
    assert_eq!(response.status(), 400);
    assert!(!response.headers().contains_key("access-control-allow-origin"));
    assert_eq!(response.text().await.unwrap(), "Disallowed CORS origin");
    // A response, an error of an engine, and errors of xpyd itself.
    for (path, key, status) in [
        ("/v1/completions", "key", 200),
        ("/v1/embeddings", "key", 200),
        ("/nowhere", "key", 404),
        ("/sleep", "key", 403),
        ("/v1/completions", "none", 401),
    ] {
        let request = harness
            .post(path, r#"{"prompt":"x"}"#)
            .header("origin", "http://app.example");
        let response = request.bearer_auth(key).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(
            response.headers()["access-control-allow-origin"],
            "http://app.example",
            "{path}"
        );
        assert_eq!(response.headers()["vary"], "Origin");
    }
    assert!(!decode.requests().is_empty());
    harness.finish().await;
}

#[tokio::test]
async fn by_default_cross_origin_requests_are_refused() {
    let (_prefill, _decode, harness) = harness(settings()).await;
    let request = client().request(Method::OPTIONS, format!("{}/v1/completions", harness.url));
    let request = request
        .header("origin", "http://a")
        .header("access-control-request-method", "POST");
    assert_eq!(request.send().await.unwrap().status(), 400);
    let response = harness
        .post("/v1/completions", r#"{"prompt":"x"}"#)
        .header("origin", "http://a");
    let response = response.send().await.unwrap();
    assert!(!response.headers().contains_key("access-control-allow-origin"));
    let request = client().request(Method::OPTIONS, format!("{}/v1/completions", harness.url));
    assert_eq!(request.send().await.unwrap().status(), 405, "no browser asks so");
    harness.finish().await;
}

/// A web page can send text and forms to any address without a preflight request.
#[tokio::test]
async fn only_json_content_types_are_accepted() {
    let (prefill, decode, harness) = harness(settings()).await;
    let post = |path: &str| client().post(format!("{}{path}", harness.url));
    for path in ["/v1/completions", "/v1/embeddings", "/tokenize"] {
        for kind in [
            Some("text/plain"),
            Some("application/x-www-form-urlencoded"),
            Some("multipart/form-data; boundary=b"),
            Some("application/jsonx"),
            None,
        ] {
            let request = kind
                .into_iter()
                .fold(post(path), |request, kind| request.header("content-type", kind));
            let response = request.body(r#"{"prompt":"x"}"#).send().await.unwrap();
            let (status, body) = (response.status(), response.text().await.unwrap());
            assert_eq!(
                (status.as_u16(), code(&body).as_str()),
                (400, "unsupported_media_type"),
                "{path} {kind:?}"
            );
            assert!(body.contains("Only 'application/json' is allowed"), "{body}");
        }
        for kind in [
            "application/json; charset=utf-8",
            "Application/JSON",
            "application/json ;x=y",
        ] {
            let request = post(path).header("content-type", kind).body(r#"{"prompt":"x"}"#);
            assert_eq!(request.send().await.unwrap().status(), 200, "{kind}");
        }
        for encoding in ["gzip", "zstd", "identity, br"] {
            let request = harness.post(path, "x").header("content-encoding", encoding);
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 415);
            let body = response.text().await.unwrap();
            assert!(
                code(&body) == "unsupported_encoding" && body.contains(&format!("`{encoding}`")),
                "{body}"
            );
        }
        let plain = harness
            .post(path, r#"{"prompt":"x"}"#)
            .header("content-encoding", "identity");
        assert_eq!(plain.send().await.unwrap().status(), 200);
    }
    let before = prefill.requests().len() + decode.requests().len();
    // vLLM has no such route, so a form gets the response for an unknown route.
    let files = post("/v1/files").header("content-type", "multipart/form-data; boundary=b");
    assert_eq!(files.body("--b--").send().await.unwrap().status(), 404);
    for (method, path) in [(Method::DELETE, "/v1/models/m"), (Method::PUT, "/v1/files/f")] {
        let response = client()
            .request(method, format!("{}{path}", harness.url))
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 404, "{path}");
    }
    let wrong = client()
        .get(format!("{}/v1/chat/completions", harness.url))
        .send()
        .await
        .unwrap();
    assert_eq!(wrong.status(), 405);
    assert_eq!(
        prefill.requests().len() + decode.requests().len(),
        before,
        "no engine was asked"
    );
    // A route without a body receives none.
    assert_eq!(post("/v1/responses/resp_1/cancel").send().await.unwrap().status(), 200);
    harness.finish().await;
}

#[tokio::test]
async fn extra_slashes_in_a_path_are_accepted() {
    let (_prefill, decode, harness) = harness(settings()).await;
    for (path, location) in [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/models/?a=b&c", "/v1/models?a=b&c"),
        ("/health/", "/health"),
        ("/metrics/", "/metrics"),
    ] {
        for request in [
            client().get(format!("{}{path}", harness.url)),
            client().post(format!("{}{path}", harness.url)).body("{}"),
        ] {
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 307, "{path}");
            assert_eq!(response.headers()["location"], location);
        }
    }
    for path in ["/v1/files/", "/v1/models//", "/", "//v1/models/"] {
        let response = client().get(format!("{}{path}", harness.url)).send().await.unwrap();
        assert_eq!(response.status(), 404, "{path}");
    }
    assert_eq!(decode.requests().len(), 0);
    // Clients follow the redirect and send their body again.
    let body = json!({"prompt": "x"}).to_string();
    let response = harness.post("/v1/completions/", body).send().await.unwrap();
    assert_eq!(
        (response.status().as_u16(), response.text().await.unwrap().as_str()),
        (200, COMPLETION)
    );
    harness.finish().await;
}

/// Many clients send a whole body before they read the response.
#[tokio::test]
async fn a_client_with_a_too_large_body_sees_the_error() {
    let (_prefill, _decode, harness) = harness(settings()).await;
    let address = harness.url.trim_start_matches("http://").to_owned();
    for (path, kind, status) in [
        ("/v1/completions", "application/json", "413"),
        ("/v1/embeddings", "application/json", "413"),
        ("/v1/completions", "text/plain", "413"),
        ("/v1/files/", "application/json", "404"),
    ] {
        let address = address.clone();
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: 8000000\r\n\r\n");
        let answer = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(&vec![b' '; 8_000_000]).expect("all of it is taken");
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).unwrap();
            String::from_utf8(answer.to_vec()).unwrap()
        });
        assert_eq!(answer.await.unwrap(), format!("HTTP/1.1 {status}"), "{path}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn api_documentation_pages_come_from_the_engine() {
    let decode = ScriptedEngine::start(|seen| async move { json_response(200, seen.path) }).await;
    let harness = ProxyHarness::nixl(&[1], &[decode.port]).await;
    for path in ["/docs", "/openapi.json"] {
        assert_eq!(harness.get(path).await.text().await.unwrap(), path);
    }
    harness.finish().await;
}
