//! Tests of engines connected within one process: correct transfers, failed transfers, and fatal requests.

use std::future::Future;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use zeromq::{PullSocket, Socket as _, SocketRecv as _};

use super::*;
use crate::kv::messages::LmcacheMessage;

/// Time limit of each wait; these engines take no time.
const DEADLINE: Duration = Duration::from_secs(20);

/// A running engine. Dropping it stops it.
struct Running {
    addresses: Addresses,
    task: JoinSet<Result<ExitStatus, SimError>>,
    client: reqwest::Client,
}

impl Running {
    async fn start(options: Options) -> Self {
        let (ready, addresses) = oneshot::channel();
        let mut task = JoinSet::new();
        task.spawn(Box::pin(run_telling(options, ready)));
        let addresses = within(addresses).await.expect("starts");
        Self {
            addresses,
            task,
            client: reqwest::Client::new(),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addresses.http)
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.client.post(self.url(path)).json(body).send();
        let answer = within(answer).await.expect("answers");
        let status = answer.status().as_u16();
        (status, within(answer.json()).await.expect("JSON"))
    }

    /// Sends a completion that must succeed.
    async fn complete(&self, body: &Value) -> Value {
        let (status, answer) = self.post("/v1/completions", body).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    async fn metric(&self, name: &str) -> f64 {
        let page = within(self.client.get(self.url("/metrics")).send()).await.unwrap();
        let page = within(page.text()).await.unwrap();
        page.lines()
            .find(|line| line.starts_with(&format!("vllm:{name}{{")))
            .and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("{name} in {page}"))
    }

    /// Waits until a metric has a value.
    async fn until(&self, name: &str, value: f64) {
        let reached = async {
            while (self.metric(name).await - value).abs() > 1e-9 {
                tokio::task::yield_now().await;
            }
        };
        within(reached).await;
    }

    /// The exit status of an engine that ends by itself.
    async fn ended(mut self) -> ExitStatus {
        within(self.task.join_next())
            .await
            .expect("runs")
            .expect("no panic")
            .expect("started")
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.expect("in time")
}

fn options() -> Options {
    Options::instant("meta-llama/Llama-3.1-8B-Instruct")
}

fn nixl(role: &str, more: &Value) -> Options {
    let mut config = json!({"kv_connector": "NixlConnector", "kv_role": role});
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    Options {
        kv_transfer: Some(KvTransferConfig::parse(&config.to_string()).unwrap()),
        ..options()
    }
}

/// A prompt of this many tokens.
fn prompt(words: usize) -> String {
    (0..words)
        .map(|word| [" the", " time", " people", " water", " say"][word * word % 5])
        .collect()
}

fn remote_decode(body: &Value) -> Value {
    let mut prefill = body.clone();
    prefill["max_tokens"] = json!(1);
    prefill["kv_transfer_params"] = json!({"do_remote_decode": true, "do_remote_prefill": false,
        "remote_engine_id": null, "remote_block_ids": null, "remote_host": null, "remote_port": null});
    prefill
}

fn with_params(body: &Value, params: &Value) -> Value {
    let mut decode = body.clone();
    decode["kv_transfer_params"] = params.clone();
    decode
}

/// The part of an answer that must be equal: everything except ids and times.
fn content(answer: &Value) -> (Value, Value) {
    (answer["choices"].clone(), answer["usage"].clone())
}

#[tokio::test]
async fn nixl_decode_equals_a_single_engine() {
    let alone = Running::start(options()).await;
    let prefiller = Running::start(nixl("kv_producer", &json!({}))).await;
    let decoder = Running::start(nixl("kv_consumer", &json!({}))).await;
    for words in [1, 16, 17, 700] {
        let body = json!({"prompt": prompt(words), "max_tokens": 40, "logprobs": 2, "temperature": 0});
        let handed = prefiller.complete(&remote_decode(&body)).await;
        let params = &handed["kv_transfer_params"];
        assert_eq!(params["remote_num_tokens"], handed["usage"]["prompt_tokens"]);
        let decoded = decoder.complete(&with_params(&body, params)).await;
        assert_eq!(
            content(&decoded),
            content(&alone.complete(&body).await),
            "{words} words"
        );
    }
    assert!((decoder.metric("nixl_bytes_transferred_count").await - 4.0).abs() < 1e-9);
    assert!((decoder.metric("external_prefix_cache_hits_total").await - 734.0).abs() < 1e-9);
    prefiller.until("kv_cache_usage_perc", 0.0).await;
}

#[tokio::test]
async fn parameters_used_twice_or_for_another_prompt_give_wrong_text_and_status_200() {
    let alone = Running::start(options()).await;
    let prefiller = Running::start(nixl("kv_producer", &json!({}))).await;
    let decoder = Running::start(nixl("kv_consumer", &json!({}))).await;
    let body = json!({"prompt": prompt(100), "max_tokens": 20});
    let right = alone.complete(&body).await;
    let params = prefiller.complete(&remote_decode(&body)).await["kv_transfer_params"].take();
    let other = json!({"prompt": prompt(100).replacen(" the", " say", 1), "max_tokens": 20});
    let crossed = decoder.complete(&with_params(&other, &params)).await;
    assert_ne!(content(&crossed), content(&alone.complete(&other).await));
    let again = decoder.complete(&with_params(&body, &params)).await;
    assert_ne!(content(&again), content(&right));
    prefiller.until("nixl_num_notifications_after_expiry_total", 1.0).await;
}

#[tokio::test]
async fn kv_that_is_read_after_its_lease_gives_wrong_text_and_status_200_whatever_the_policy() {
    let lease = json!({"kv_connector_extra_config": {"kv_lease_duration": 0.01}});
    let alone = Running::start(options()).await;
    let prefiller = Running::start(nixl("kv_producer", &lease)).await;
    let recomputes = Running::start(nixl("kv_consumer", &json!({"kv_load_failure_policy": "recompute"}))).await;
    let fails = Running::start(nixl("kv_consumer", &json!({}))).await;
    let body = json!({"prompt": prompt(300), "max_tokens": 20});
    let params = prefiller.complete(&remote_decode(&body)).await["kv_transfer_params"].take();
    prefiller.until("nixl_num_kv_expired_reqs_total", 1.0).await;
    let right = alone.complete(&body).await;
    for decoder in [&recomputes, &fails] {
        let decoded = decoder.complete(&with_params(&body, &params)).await;
        assert_ne!(content(&decoded), content(&right));
    }
    prefiller.until("nixl_num_notifications_after_expiry_total", 2.0).await;
}

#[tokio::test]
async fn a_rejected_decode_frees_the_prefill_blocks() {
    let prefiller = Running::start(nixl("kv_producer", &json!({}))).await;
    let decoder = Running::start(nixl("kv_consumer", &json!({}))).await;
    let body = json!({"prompt": prompt(50), "max_tokens": 5});
    let met = prefiller.complete(&remote_decode(&body)).await;
    decoder.complete(&with_params(&body, &met["kv_transfer_params"])).await;
    let given_up = prefiller.complete(&remote_decode(&body)).await;
    assert!(prefiller.metric("kv_cache_usage_perc").await > 0.0);
    let wrong = json!({"model": "no-such-model", "prompt": "x", "kv_transfer_params": given_up["kv_transfer_params"]});
    let (status, error) = decoder.post("/v1/completions", &wrong).await;
    assert_eq!((status, &error["error"]["type"]), (404, &json!("NotFoundError")));
    prefiller.until("kv_cache_usage_perc", 0.0).await;
}

#[tokio::test]
async fn a_bare_order_to_fetch_kills_the_engine_which_exits_with_0() {
    let decoder = Running::start(nixl("kv_consumer", &json!({}))).await;
    let body = json!({"prompt": "x", "kv_transfer_params": {"do_remote_prefill": true}});
    let (status, error) = decoder.post("/v1/completions", &body).await;
    assert_eq!(status, 500);
    let message = error["error"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("The server had an error while processing your request"),
        "{message}"
    );
    assert_eq!(decoder.ended().await, ExitStatus::Success);
}

/// One prefill and one decode engine with LMCache, and the proxy's notification socket.
struct Lmcache {
    prefiller: Running,
    decoder: Running,
    notifications: PullSocket,
    ranks: usize,
    /// The files exist as long as the engines.
    _files: tempfile::TempDir,
}

impl Lmcache {
    async fn start(ranks: u16, buffer_tokens: u64, change: impl Fn(&mut Options)) -> Self {
        let files = tempfile::tempdir().unwrap();
        let mut notifications = PullSocket::new();
        let bound = notifications.bind("tcp://127.0.0.1:0").await.unwrap();
        let zeromq::Endpoint::Tcp(_, port) = bound else {
            panic!("TCP")
        };
        let ports = vec!["0"; usize::from(ranks)].join(", ");
        // The buffer of a rank has the KV of its share of the heads.
        let buffer = buffer_tokens * INSTANT.kv_bytes_per_token / u64::from(ranks);
        let decode = include_str!("../../../configs/lmcache-decode.yaml")
            .replace("{{host}}", "127.0.0.1")
            .replace("{{init_ports}}", &format!("[{ports}]"))
            .replace("{{alloc_ports}}", &format!("[{ports}]"))
            .replace("{{buffer_bytes}}", &buffer.to_string())
            .replace("{{lookup_timeout_ms}}", "3000")
            .replace("{{device}}", "cuda");
        let prefill = include_str!("../../../configs/lmcache-prefill.yaml")
            .replace("{{notify_host}}", "127.0.0.1")
            .replace("{{notify_port}}", &port.to_string())
            .replace("{{buffer_bytes}}", &buffer.to_string())
            .replace("{{device}}", "cuda");
        let engine = |role: &str, yaml: &str| {
            let file = files.path().join(format!("{role}.yaml"));
            std::fs::write(&file, yaml).unwrap();
            let config = json!({"kv_connector": "LMCacheConnectorV1", "kv_role": role,
                "kv_connector_extra_config": {"discard_partial_chunks": false, "lmcache_rpc_port": role}});
            let mut options = Options {
                kv_transfer: Some(KvTransferConfig::parse(&config.to_string()).unwrap()),
                lmcache_config_file: Some(file),
                tensor_parallel_size: ranks,
                chunked_prefill: false,
                prompt_tokens_details: true,
                ..options()
            };
            change(&mut options);
            options
        };
        Self {
            prefiller: Running::start(engine("kv_producer", &prefill)).await,
            decoder: Running::start(engine("kv_consumer", &decode)).await,
            notifications,
            ranks: usize::from(ranks),
            _files: files,
        }
    }

    fn spec(&self, req_id: &str) -> Value {
        json!({"disagg_spec": {"req_id": req_id, "receiver_host": "127.0.0.1",
            "receiver_init_port": self.decoder.addresses.lmcache_init_ports,
            "receiver_alloc_port": self.decoder.addresses.lmcache_alloc_ports}})
    }

    async fn prefill(&self, body: &Value, params: &Value) -> Value {
        let mut prefill = with_params(body, params);
        prefill["max_tokens"] = json!(1);
        self.prefiller.complete(&prefill).await
    }

    /// Expects the next notifications, one per rank, to be for this request.
    async fn notified(&mut self, req_id: &str) {
        for _ in 0..self.ranks {
            let message = within(self.notifications.recv()).await.unwrap();
            let expected = LmcacheMessage::ProxyNotif { req_id: req_id.into() };
            assert_eq!(LmcacheMessage::from_bytes(message.get(0).unwrap()), Some(expected));
        }
    }
}

#[tokio::test]
async fn lmcache_decode_equals_a_single_engine() {
    let alone = Running::start(Options {
        prompt_tokens_details: true,
        ..options()
    })
    .await;
    for ranks in [1, 2] {
        let mut fleet = Lmcache::start(ranks, 4096, |_| {}).await;
        for tokens in [1, 2, 255, 256, 257, 700] {
            let body = json!({"prompt": prompt(tokens), "max_tokens": 30});
            let answer = fleet.prefill(&body, &fleet.spec("r1")).await;
            assert_eq!(answer["kv_transfer_params"], Value::Null);
            fleet.notified("r1").await;
            let decoded = fleet.decoder.complete(&body).await;
            assert_eq!(
                decoded["choices"],
                alone.complete(&body).await["choices"],
                "{tokens} tokens, {ranks} ranks"
            );
            let cached = &decoded["usage"]["prompt_tokens_details"]["cached_tokens"];
            assert_eq!(
                cached,
                &json!(tokens - 1),
                "all but the last token came from the prefiller"
            );
        }
    }
}

#[tokio::test]
async fn the_first_token_can_be_streamed_by_the_proxy() {
    let mut fleet = Lmcache::start(1, 4096, |options| {
        if let Some(config) = &mut options.kv_transfer {
            config.kv_connector_extra_config.skip_last_n_tokens = 1;
        }
    })
    .await;
    let ids: Vec<u32> = (0..300).map(|index| 70_000 + index % 90).collect();
    let body = json!({"prompt": ids, "max_tokens": 10});
    let mut params = fleet.spec("r2");
    params["ret_first_tok"] = json!(true);
    let first = fleet.prefill(&body, &params).await["kv_transfer_params"]["first_tok"].take();
    fleet.notified("r2").await;
    let mut spliced = ids.clone();
    spliced.push(u32::try_from(first.as_u64().unwrap()).unwrap());
    let decoded = fleet
        .decoder
        .complete(&json!({"prompt": spliced, "max_tokens": 9}))
        .await;
    assert_eq!(decoded["usage"]["prompt_tokens_details"]["cached_tokens"], json!(300));
}

#[tokio::test]
async fn a_full_receive_buffer_delays_the_notification() {
    let mut fleet = Lmcache::start(1, 512, |_| {}).await;
    let large = json!({"prompt": prompt(500), "max_tokens": 3});
    let small = json!({"prompt": prompt(40), "max_tokens": 3});
    fleet.prefill(&large, &fleet.spec("large")).await;
    fleet.notified("large").await;
    fleet.prefill(&small, &fleet.spec("small")).await;
    // Its notification waits for the buffer, so the decode of the small one finds nothing.
    let early = timeout(Duration::from_millis(200), fleet.notifications.recv()).await;
    assert!(early.is_err(), "{early:?}");
    fleet.decoder.complete(&large).await;
    fleet.notified("small").await;
}

#[tokio::test]
async fn a_plain_request_kills_an_lmcache_sender_and_a_probe_does_not() {
    let fleet = Lmcache::start(1, 4096, |_| {}).await;
    let models = fleet.prefiller.client.get(fleet.prefiller.url("/v1/models")).send();
    assert_eq!(within(models).await.unwrap().status(), 200);
    let (status, _) = fleet.prefiller.post("/v1/completions", &json!({"prompt": "x"})).await;
    assert_eq!(status, 500);
    assert_eq!(fleet.prefiller.ended().await, ExitStatus::Success);
}

#[tokio::test]
async fn a_chunked_prefill_answers_200_and_never_notifies() {
    let mut fleet = Lmcache::start(1, 8192, |options| {
        options.chunked_prefill = true;
        options.max_num_batched_tokens = Some(256);
    })
    .await;
    let cut = json!({"prompt": prompt(257), "max_tokens": 1});
    let whole = json!({"prompt": prompt(256), "max_tokens": 1});
    fleet.prefill(&cut, &fleet.spec("cut")).await;
    fleet.prefill(&whole, &fleet.spec("whole")).await;
    // Transfers are sent in order: the first notification would belong to the first prompt.
    fleet.notified("whole").await;
}

#[tokio::test]
async fn a_stream_has_vllms_events_in_order() {
    let engine = Running::start(options()).await;
    let mut body = json!({"messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 12,
        "ignore_eos": true});
    let (status, whole) = engine.post("/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{whole}");
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let answer = engine
        .client
        .post(engine.url("/v1/chat/completions"))
        .json(&body)
        .send();
    let answer = within(answer).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream; charset=utf-8");
    let text = within(answer.text()).await.unwrap();
    let mut events: Vec<&str> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect();
    assert_eq!(events.pop(), Some("[DONE]"));
    let events: Vec<Value> = events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    let (usage, chunks) = events.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    // As in vLLM, a stream omits fields without a value.
    let mut expected = whole["usage"].clone();
    expected.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    assert_eq!(usage["usage"], expected);
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(chunks.len(), 13);
    assert_eq!(chunks[12]["choices"][0]["finish_reason"], "length");
    let streamed: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(whole["choices"][0]["message"]["content"], json!(streamed));
}

#[tokio::test]
async fn invalid_requests_get_vllms_errors() {
    let engine = Running::start(options()).await;
    let refused = [
        (
            json!({"prompt": "x", "model": "other"}),
            404,
            "The model `other` does not exist.",
        ),
        (
            json!({"prompt": "x", "stream_options": {"include_usage": true}}),
            400,
            "Stream options can only be",
        ),
        (
            json!({"prompt": "x", "max_tokens": 1, "min_tokens": 5}),
            400,
            "min_tokens must be less than or equal to max_tokens=1",
        ),
        (
            json!({"prompt": "x", "n": 2, "temperature": 0}),
            400,
            "n must be 1 when using greedy sampling",
        ),
        (
            json!({"prompt": "x", "max_tokens": -1}),
            400,
            "max_tokens must be at least 1",
        ),
        (
            json!({"prompt": prompt(9000)}),
            400,
            "This model's maximum context length is 8192 tokens",
        ),
        (json!({"prompt": [200_000]}), 400, "out of vocabulary"),
        (json!({"prompt": "x", "kv_transfer_params": "x"}), 400, "invalid type"),
        (json!({"max_tokens": 5}), 400, "prompt: Field required"),
    ];
    for (body, status, message) in refused {
        let (got, error) = engine.post("/v1/completions", &body).await;
        let text = error["error"]["message"].as_str().unwrap_or_default();
        assert!(got == status && text.contains(message), "{body}: {got} {error}");
        assert_eq!(error["error"]["code"], json!(status));
    }
}

#[tokio::test]
async fn structured_output_follows_the_grammar() {
    let engine = Running::start(options()).await;
    let mut seen = std::collections::BTreeSet::new();
    for subject in ["rivers", "winter", "bread", "maps", "salt", "rain"] {
        let body = json!({"prompt": subject, "structured_outputs": {"choice": ["yes", "no"]}});
        let choice = engine.complete(&body).await["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "stop");
        seen.insert(choice["text"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["no", "yes"]);
    let schema = json!({"type": "object", "properties": {"city": {"enum": ["Rome"]}, "size": {"type": "integer"}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let body = json!({"messages": [{"role": "user", "content": "x"}], "response_format": format});
    let (_, answer) = engine.post("/v1/chat/completions", &body).await;
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let value: Value = serde_json::from_str(text).unwrap();
    assert!(value["city"] == "Rome" && value["size"].is_u64(), "{text}");
}

#[tokio::test]
async fn choices_are_in_index_order() {
    let engine = Running::start(options()).await;
    let body = json!({"prompt": ["one day", "two ships"], "n": 2, "temperature": 1, "seed": 7, "max_tokens": 8,
        "ignore_eos": true, "echo": true});
    let answer = engine.complete(&body).await;
    let choices = answer["choices"].as_array().unwrap();
    let starts: Vec<bool> = choices
        .iter()
        .map(|choice| choice["text"].as_str().unwrap().starts_with("one"))
        .collect();
    assert_eq!(starts, [true, true, false, false]);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    assert_eq!(answer["usage"]["completion_tokens"], json!(32));
    assert_eq!(engine.complete(&body).await["choices"], answer["choices"]);
}

#[tokio::test]
async fn a_taken_port_fails_the_start_with_vllms_error() {
    let first = Running::start(options()).await;
    let error = run(Options {
        port: first.addresses.http.port(),
        ..options()
    })
    .await
    .expect_err("taken");
    assert!(xpyd_base::report::one_line(&error).contains("Address already in use"));
}
