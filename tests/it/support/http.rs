//! HTTP requests of tests: completions, metrics, and plain GET and POST.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{DEADLINE, TestEnv};

/// The length in tokens of a completion whose length does not matter.
pub(super) const TOKENS: usize = 12;

/// The sum of the samples on `/metrics` whose lines start with `name` and contain `label`. There must be at least one.
pub(crate) fn metric(port: u16, name: &str, label: &str) -> f64 {
    let metrics = get(port, "/metrics");
    let lines = metrics
        .lines()
        .filter(|line| line.starts_with(name) && line.contains(label));
    let samples = lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()));
    let samples: Option<Vec<f64>> = samples.collect();
    let samples = samples.filter(|samples| !samples.is_empty());
    samples
        .unwrap_or_else(|| panic!("no `{name}` in {metrics}"))
        .iter()
        .sum()
}

/// Sends the same greedy completion while `work` runs. Each response must equal that of a decode engine alone.
pub(crate) fn with_requests_meanwhile(env: &TestEnv, model: &str, work: impl FnOnce()) {
    /// Ends the requests, also if `work` panics.
    struct Done<'flag>(&'flag AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (done, port) = (AtomicBool::new(false), env.proxy_port());
    let alone = env.decode_alone(model, "once");
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(completion(port, model, "once"), alone);
            }
        });
        let ending = Done(&done);
        work();
        drop(ending);
        client.join().expect("every answer is right");
    });
}

/// Posts JSON, and returns status and body of the response.
pub(crate) fn post(port: u16, path: &str, body: &str) -> (u16, String) {
    post_with(port, path, body, &[])
}

/// Like [`post`], with headers.
pub(crate) fn post_with(port: u16, path: &str, body: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let client = client();
    let mut request = client
        .post(url(port, path))
        .header("content-type", "application/json")
        .body(body.to_owned());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(request)
}

/// The response body of a GET.
pub(crate) fn get(port: u16, path: &str) -> String {
    send(client().get(url(port, path))).1
}

/// The status of a GET.
pub(crate) fn status_of(port: u16, path: &str) -> u16 {
    send(client().get(url(port, path))).0
}

fn url(port: u16, path: &str) -> String {
    format!("http://127.0.0.1:{port}{path}")
}

fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .timeout(DEADLINE)
        .build()
        .expect("a client")
}

fn send(request: reqwest::RequestBuilder) -> (u16, String) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let answer = request.send().await.expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    })
}

/// The text of a greedy completion.
pub(crate) fn completion(port: u16, model: &str, prompt: &str) -> String {
    completion_of(port, model, prompt, TOKENS)
}

/// The text of a greedy completion of this number of tokens.
pub(crate) fn completion_of(port: u16, model: &str, prompt: &str, tokens: usize) -> String {
    completion_with(port, model, prompt, tokens, &[])
}

/// The same, with request headers.
pub(crate) fn completion_with(port: u16, model: &str, prompt: &str, tokens: usize, headers: &[(&str, &str)]) -> String {
    let body = serde_json::json!({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": tokens});
    let (status, text) = post_with(port, "/v1/completions", &body.to_string(), headers);
    assert_eq!(status, 200, "{text}");
    let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    answer["choices"][0]["text"].as_str().expect("a text").to_owned()
}
