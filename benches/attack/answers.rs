//! Large engine answers of different kinds. A recording engine sends the one that the prompt names.

use crate::http::post;
use crate::shapes::filled;

/// A family of answers.
pub(crate) struct Answer {
    pub(crate) name: &'static str,
    /// The leg that gets it. The other leg gets a normal answer.
    leg: Leg,
    /// A complete response of about this many bytes.
    make: fn(usize) -> Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leg {
    Prefill,
    Decode,
}

/// A new answer is one more line.
#[rustfmt::skip]
pub(crate) const ANSWERS: &[Answer] = &[
    decode("answer: long text", |size| whole(size, r#"{"choices":[{"index":0,"text":""#, r#""}]}"#, |_| "word ".into())),
    decode("answer: many keys", |size| whole(size, r#"{"choices":[]"#, "}", |n| format!(r#","k{n}":0"#))),
    decode("answer: many choices", |size| whole(size, r#"{"choices":[{"index":0,"text":"a"}"#, "]}", |n| format!(r#",{{"index":{n},"text":"a"}}"#))),
    decode("answer: many headers", |size| filled(size, "HTTP/1.1 200 OK\r\n", "content-length: 2\r\n\r\n{}", |n| format!("h{n}: a\r\n"))),
    decode("answer: long header", |size| filled(size, "HTTP/1.1 200 OK\r\nh: ", "\r\ncontent-length: 2\r\n\r\n{}", |_| "value".into())),
    decode("answer: many 100 Continue", |size| filled(size, "", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", |_| "HTTP/1.1 100 Continue\r\n\r\n".into())),
    decode("answer: one long event", |size| stream(&filled(size, r#"data: {"choices":[{"index":0,"text":""#, "\"}]}\n\n", |_| "word ".into()), 60_000)),
    decode("answer: event in small chunks", |size| stream(&filled(size / 3, r#"data: {"choices":[{"index":0,"text":""#, "\"}]}\n\n", |_| "word ".into()), 4)),
    decode("answer: many events", |size| stream(&filled(size, "", "", |_| "data: {\"choices\":[{\"index\":0,\"text\":\"a\"}]}\n\n".into()), 60_000)),
    decode("answer: many comments", |size| stream(&filled(size, "", "", |_| ": a\n\n".into()), 60_000)),
    decode("answer: many empty lines", |size| stream(&filled(size, "", "", |_| "\n".into()), 60_000)),
    decode("answer: bytes one by one", |size| stream(&filled(size / 6, "", "", |_| "data: {\"choices\":[]}\n\n".into()), 1)),
    prefill("prefill: many blocks", |size| whole(size, PREFILLED, "]]}}", |n| format!(",{n}"))),
    prefill("prefill: many parameters", |size| whole(size, PREFILLED, "}}", |n| format!(r#"{}"k{n}":0"#, if n == 0 { "]]," } else { "," }))),
    prefill("prefill: many keys", |size| whole(size, r#"{"choices":[]"#, "}", |n| format!(r#","k{n}":0"#))),
];

/// The hand-off of a NIXL prefill engine, up to the first of its blocks.
const PREFILLED: &str = concat!(
    r#"{"choices":[{"index":0,"text":"a","finish_reason":"length"}],"kv_transfer_params":{"do_remote_prefill":true,"#,
    r#""do_remote_decode":false,"remote_engine_id":"r","remote_request_id":"r","remote_host":"127.0.0.1","#,
    r#""remote_port":5600,"tp_size":1,"remote_block_ids":[[0"#
);

const fn decode(name: &'static str, make: fn(usize) -> Vec<u8>) -> Answer {
    let leg = Leg::Decode;
    Answer { name, leg, make }
}

const fn prefill(name: &'static str, make: fn(usize) -> Vec<u8>) -> Answer {
    let leg = Leg::Prefill;
    Answer { name, leg, make }
}

/// The request whose answer is this one.
pub(crate) fn request(name: &str, size: usize) -> Vec<u8> {
    let is_stream = !name.starts_with("prefill");
    let body = format!(r#"{{"model":"m","prompt":"{name}@{size}","max_tokens":1,"stream":{is_stream}}}"#);
    post("/v1/completions", body.as_bytes())
}

/// The response that a prompt names for this leg.
pub(crate) fn response(prompt: &str, leg: Leg) -> Option<Vec<u8>> {
    let (name, size) = prompt.rsplit_once('@')?;
    let answer = ANSWERS.iter().find(|answer| answer.name == name && answer.leg == leg)?;
    Some((answer.make)(size.parse().ok()?))
}

fn whole(size: usize, start: &str, end: &str, item: impl Fn(usize) -> String) -> Vec<u8> {
    let body = filled(size, start, end, item);
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), &body].concat()
}

/// Events in chunks of this size, and the end of the stream.
fn stream(events: &[u8], chunk: usize) -> Vec<u8> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut response = head.as_bytes().to_vec();
    for chunk in events.chunks(chunk) {
        response.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        response.extend_from_slice(chunk);
        response.extend_from_slice(b"\r\n");
    }
    response.extend_from_slice(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    response
}
