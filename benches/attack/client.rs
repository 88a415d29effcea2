//! One client: a completion over a connection of its own, and how it ended.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, timeout};

use crate::http::{Failure, Response, connect, exchange, post};

/// A prompt and its only right answer.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    pub(crate) model: String,
    pub(crate) prompt: String,
    pub(crate) tokens: usize,
    pub(crate) answer: String,
}

/// What a client does with its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    Stream,
    Whole,
    /// Leaves after this time.
    Leave(Duration),
    /// Reads a few bytes at a time.
    Slow,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    Right,
    Wrong(String),
    /// An error event in a stream whose text was right up to there.
    ErrorEvent(String),
    /// An error response.
    Status {
        status: u16,
        code: String,
        retry_after: bool,
    },
    /// The connection ended in the middle of an answer.
    Cut,
    /// The connection ended before the head of an answer.
    NoAnswer,
    Refused,
    /// The client left, as it meant to.
    Left,
    /// No end within the deadline.
    Hang,
}

/// What a server answers, for comparison with other answers.
pub(crate) async fn answer_of(port: u16, question: &Question, deadline: Duration) -> Result<String, String> {
    let response = exchange(port, &request(question, false), deadline).await;
    let response = response.map_err(|failure| format!("no answer to compare with: {failure:?}"))?;
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let text = body["choices"][0]["text"].as_str();
    text.map(str::to_owned)
        .ok_or_else(|| format!("no answer to compare with: {}", response.text()))
}

fn request(question: &Question, is_stream: bool) -> Vec<u8> {
    let body = json!({"model": question.model, "prompt": question.prompt, "max_tokens": question.tokens,
        "temperature": 0, "ignore_eos": true, "stream": is_stream});
    post("/v1/completions", body.to_string().as_bytes())
}

/// Asks, with a deadline for the whole answer.
pub(crate) async fn ask(port: u16, question: &Question, manner: Manner, deadline: Duration) -> Ending {
    timeout(deadline, ask_without_deadline(port, question, manner))
        .await
        .unwrap_or(Ending::Hang)
}

async fn ask_without_deadline(port: u16, question: &Question, manner: Manner) -> Ending {
    let is_stream = manner != Manner::Whole;
    let request = request(question, is_stream);
    let begun = Instant::now();
    let mut stream = match connect(port).await {
        Ok(stream) => stream,
        Err(Failure::Refused) => return Ending::Refused,
        Err(_) => return Ending::NoAnswer,
    };
    // Where this fails, the response may have come before the request was sent completely.
    let _ = stream.write_all(&request).await;
    let mut received = Vec::new();
    let mut buffer = vec![0; if manner == Manner::Slow { 256 } else { 16 << 10 }];
    loop {
        if manner == Manner::Slow {
            sleep(Duration::from_millis(20)).await;
        }
        let read = stream.read(&mut buffer);
        let read = match manner {
            Manner::Leave(after) => match timeout(after.saturating_sub(begun.elapsed()), read).await {
                Ok(read) => read,
                Err(_) => return Ending::Left,
            },
            Manner::Stream | Manner::Whole | Manner::Slow => read.await,
        };
        match read {
            Ok(0) | Err(_) => return judge(&received, question, is_stream),
            Ok(length) => received.extend_from_slice(&buffer[..length]),
        }
    }
}

/// The ending that these bytes say, which are all until the connection's end.
fn judge(received: &[u8], question: &Question, is_stream: bool) -> Ending {
    let Some((response, _)) = Response::parse(received) else {
        return Ending::NoAnswer;
    };
    if response.status != 200 {
        return error_response(&response);
    }
    if is_stream {
        return judge_stream(&response, &question.answer);
    }
    if !response.is_complete {
        return Ending::Cut;
    }
    let answer: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    compare(
        answer["choices"][0]["text"].as_str().unwrap_or_default(),
        &question.answer,
    )
}

fn error_response(response: &Response) -> Ending {
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    Ending::Status {
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

fn judge_stream(response: &Response, answer: &str) -> Ending {
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
        Some(code) => Ending::ErrorEvent(code),
        None if is_done && response.is_complete => compare(&text, answer),
        None => Ending::Cut,
    }
}

fn compare(given: &str, answer: &str) -> Ending {
    if given == answer {
        return Ending::Right;
    }
    let start = |text: &str| text.chars().take(60).collect::<String>();
    let common = given.bytes().zip(answer.bytes()).take_while(|(a, b)| a == b).count();
    Ending::Wrong(format!(
        "{:?} instead of {:?}, different from byte {common} on, of {} and {}",
        start(given),
        start(answer),
        given.len(),
        answer.len()
    ))
}
