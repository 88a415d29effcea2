//! One client: a completion over its own connection, and its outcome.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, timeout};

use crate::http::{Failure, Response, connect, exchange, post};

/// A prompt and its only correct answer.
#[derive(Debug, Clone)]
pub(crate) struct TestRequest {
    pub(crate) model: String,
    pub(crate) prompt: String,
    pub(crate) tokens: usize,
    pub(crate) answer: String,
}

/// The behaviour of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientBehaviour {
    Stream,
    Whole,
    /// Disconnects after this time.
    Leave(Duration),
    /// Reads a few bytes at a time.
    Slow,
}

/// The outcome of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RequestOutcome {
    Right,
    Wrong(String),
    /// An error event in a stream with correct text so far.
    ErrorEvent(String),
    /// An error response.
    Status {
        status: u16,
        code: String,
        retry_after: bool,
    },
    /// The connection ended in the middle of an answer.
    Cut,
    /// The connection ended before the response headers.
    NoAnswer,
    Refused,
    /// The client disconnected as intended.
    Left,
    /// No end within the deadline.
    Hang,
}

/// The answer of a server, as a reference for others.
pub(crate) async fn answer_of(port: u16, test_request: &TestRequest, deadline: Duration) -> Result<String, String> {
    let response = exchange(port, &request(test_request, false), deadline).await;
    let response = response.map_err(|failure| format!("no answer to compare with: {failure:?}"))?;
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let text = body["choices"][0]["text"].as_str();
    text.map(str::to_owned)
        .ok_or_else(|| format!("no answer to compare with: {}", response.text()))
}

fn request(test_request: &TestRequest, is_stream: bool) -> Vec<u8> {
    let body = json!({"model": test_request.model, "prompt": test_request.prompt, "max_tokens": test_request.tokens,
        "temperature": 0, "ignore_eos": true, "stream": is_stream});
    post("/v1/completions", body.to_string().as_bytes())
}

/// Sends a request, with a deadline for the complete answer.
pub(crate) async fn ask(
    port: u16,
    test_request: &TestRequest,
    behaviour: ClientBehaviour,
    deadline: Duration,
) -> RequestOutcome {
    timeout(deadline, ask_without_deadline(port, test_request, behaviour))
        .await
        .unwrap_or(RequestOutcome::Hang)
}

async fn ask_without_deadline(port: u16, test_request: &TestRequest, behaviour: ClientBehaviour) -> RequestOutcome {
    let is_stream = behaviour != ClientBehaviour::Whole;
    let request = request(test_request, is_stream);
    let begun = Instant::now();
    let mut stream = match connect(port).await {
        Ok(stream) => stream,
        Err(Failure::Refused) => return RequestOutcome::Refused,
        Err(_) => return RequestOutcome::NoAnswer,
    };
    // If this fails, the response can have arrived before the request was sent completely.
    let _ = stream.write_all(&request).await;
    let mut received = Vec::new();
    let mut buffer = vec![
        0;
        if behaviour == ClientBehaviour::Slow {
            256
        } else {
            16 << 10
        }
    ];
    loop {
        if behaviour == ClientBehaviour::Slow {
            sleep(Duration::from_millis(20)).await;
        }
        let read = stream.read(&mut buffer);
        let read = match behaviour {
            ClientBehaviour::Leave(after) => match timeout(after.saturating_sub(begun.elapsed()), read).await {
                Ok(read) => read,
                Err(_) => return RequestOutcome::Left,
            },
            ClientBehaviour::Stream | ClientBehaviour::Whole | ClientBehaviour::Slow => read.await,
        };
        match read {
            Ok(0) | Err(_) => return judge(&received, test_request, is_stream),
            Ok(length) => received.extend_from_slice(&buffer[..length]),
        }
    }
}

/// The outcome according to all bytes of the connection.
fn judge(received: &[u8], test_request: &TestRequest, is_stream: bool) -> RequestOutcome {
    let Some((response, _)) = Response::parse(received) else {
        return RequestOutcome::NoAnswer;
    };
    if response.status != 200 {
        return error_response(&response);
    }
    if is_stream {
        return judge_stream(&response, &test_request.answer);
    }
    if !response.is_complete {
        return RequestOutcome::Cut;
    }
    let answer: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    compare(
        answer["choices"][0]["text"].as_str().unwrap_or_default(),
        &test_request.answer,
    )
}

fn error_response(response: &Response) -> RequestOutcome {
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    RequestOutcome::Status {
        status: response.status,
        code: code_of(&body),
        retry_after: response.has_header("retry-after"),
    }
}

/// The code of an error, which is a word or a number.
fn code_of(body: &Value) -> String {
    match &body["error"]["code"] {
        Value::String(code) => code.clone(),
        Value::Null => format!("without a code: {}", body["error"]),
        code => code.to_string(),
    }
}

fn judge_stream(response: &Response, answer: &str) -> RequestOutcome {
    let body = response.text();
    let events = body.split_terminator("\n\n");
    let (mut text, mut error, mut is_done) = (String::new(), None, false);
    for data in events.filter_map(|event| event.trim_start().strip_prefix("data: ")) {
        if data == "[DONE]" {
            is_done = true;
            continue;
        }
        let Ok(event) = serde_json::from_str::<Value>(data) else {
            // The last event of a cut stream is incomplete.
            continue;
        };
        if event["error"].is_null() {
            text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
        } else {
            error = Some(code_of(&event));
        }
    }
    if !answer.starts_with(&text) {
        return compare(&text, answer);
    }
    match error {
        Some(code) => RequestOutcome::ErrorEvent(code),
        None if is_done && response.is_complete => compare(&text, answer),
        None => RequestOutcome::Cut,
    }
}

fn compare(given: &str, answer: &str) -> RequestOutcome {
    if given == answer {
        return RequestOutcome::Right;
    }
    let start = |text: &str| text.chars().take(60).collect::<String>();
    let common = given.bytes().zip(answer.bytes()).take_while(|(a, b)| a == b).count();
    RequestOutcome::Wrong(format!(
        "{:?} instead of {:?}, different from byte {common} on, of {} and {}",
        start(given),
        start(answer),
        given.len(),
        answer.len()
    ))
}
