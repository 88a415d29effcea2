//! Requests of a given size, each of which loads a different part of the server.

use crate::http::post;

/// A family of requests.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    /// A complete request of about this many bytes.
    pub(crate) make: fn(usize) -> Vec<u8>,
}

/// A new shape is one more line.
pub(crate) const SHAPES: &[Shape] = &[
    shape("long prompt", |size| {
        completion(size, r#""prompt":""#, r#"""#, |_| "word ".into())
    }),
    shape("token ids", |size| {
        completion(size, r#""prompt":[0"#, "]", |n| format!(",{}", n % 100_000))
    }),
    shape("list of prompts", |size| {
        completion(size, r#""prompt":["a""#, "]", |n| format!(r#","p{n}""#))
    }),
    shape("top-level keys", |size| {
        completion(size, r#""prompt":"x""#, "", |n| format!(r#","k{n}":0"#))
    }),
    shape("escaped top-level keys", |size| {
        completion(size, r#""prompt":"x""#, "", |n| format!(r#","\u006b{n}":0"#))
    }),
    shape("one key repeated", |size| {
        completion(size, r#""prompt":"x""#, "", |_| r#","k":0"#.into())
    }),
    shape("known keys repeated", |size| {
        completion(size, r#""prompt":"x""#, "", |_| {
            r#","max_tokens":1,"stream":false,"n":1"#.into()
        })
    }),
    shape("kv_transfer_params repeated", |size| {
        completion(size, r#""prompt":"x""#, "", |n| {
            format!(r#","kv_transfer_params":{{"a":{n}}}"#)
        })
    }),
    shape("long key", |size| {
        completion(size, r#""prompt":"x",""#, r#"":0"#, |_| "key".into())
    }),
    shape("nested keys", |size| {
        completion(size, r#""prompt":"x","vllm_xargs":{"k":0"#, "}", |n| {
            format!(r#","k{n}":0"#)
        })
    }),
    shape("nested key repeated", |size| {
        completion(size, r#""prompt":"x","vllm_xargs":{"k":0"#, "}", |_| r#","k":0"#.into())
    }),
    shape("vllm_xargs repeated", |size| {
        completion(size, r#""prompt":"x""#, "", |n| {
            format!(r#","vllm_xargs":{{"k{n}":0}}"#)
        })
    }),
    shape("list of objects", |size| {
        completion(size, r#""prompt":"x","x":[0"#, "]", |n| {
            format!(r#",{{"k{n}":[{{}}]}}"#)
        })
    }),
    shape("deep lists", |size| deep(size, "[", "]")),
    shape("deep objects", |size| deep(size, r#"{"a":"#, "}")),
    shape("open brackets", |size| {
        completion(size, r#""prompt":"x","x":"#, "", |_| "[".into())
    }),
    shape("stop strings", |size| {
        completion(size, r#""prompt":"x","stop":["s""#, "]", |n| format!(r#","s{n}""#))
    }),
    shape("logit_bias", |size| {
        completion(size, r#""prompt":"x","logit_bias":{"1":1"#, "}", |n| {
            format!(r#","{n}":-1"#)
        })
    }),
    shape("escapes", |size| {
        completion(size, r#""prompt":""#, r#"""#, |_| r"\u0041".into())
    }),
    shape("escaped quotes", |size| {
        completion(size, r#""prompt":""#, r#"""#, |_| r#"\""#.into())
    }),
    shape("backslashes", |size| {
        completion(size, r#""prompt":""#, r#"""#, |_| r"\\".into())
    }),
    shape("whitespace", |size| {
        completion(size, r#""prompt":"x","#, r#""n":1"#, |_| " \n\t".into())
    }),
    shape("long number", |size| {
        completion(size, r#""prompt":"x","max_tokens":1"#, "", |_| "7".into())
    }),
    shape("messages", |size| {
        chat(size, r#"{"role":"user","content":"a"}"#, "", |n| {
            format!(r#",{{"role":"user","content":"m{n}"}}"#)
        })
    }),
    shape("parts of a message", |size| {
        chat(
            size,
            r#"{"role":"user","content":[{"type":"text","text":"a"}"#,
            "]}",
            |n| format!(r#",{{"type":"text","text":"p{n}"}}"#),
        )
    }),
    shape("tool definitions", |size| {
        chat(
            size,
            r#"{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"f"}}"#,
            "",
            |n| format!(r#",{{"type":"function","function":{{"name":"f{n}"}}}}"#),
        )
    }),
    shape("chunks of one byte", |size| {
        chunked(size / 6, |byte| format!("1\r\n{}\r\n", char::from(byte)))
    }),
    shape("chunk extensions", |size| {
        chunked(size / 22, |byte| format!("1;extension=a\r\n{}\r\n", char::from(byte)))
    }),
    shape("trailers", |size| {
        let (head, body) = (CHUNKED, r#"{"model":"null","prompt":"x"}"#);
        let start = format!("{head}{:x}\r\n{body}\r\n0\r\n", body.len());
        filled(size, &start, "\r\n", |n| format!("t{n}: a\r\n"))
    }),
    shape("headers", |size| {
        filled(
            size,
            "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n",
            "\r\n",
            |n| format!("h{n}: a\r\n"),
        )
    }),
    shape("long header", |size| {
        filled(
            size,
            "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nh: ",
            "\r\n\r\n",
            |_| "value".into(),
        )
    }),
    shape("long target", |size| {
        filled(
            size,
            "GET /v1/models?",
            " HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            |n| format!("q{n}&"),
        )
    }),
    shape("empty lines", |size| {
        filled(
            size,
            "",
            "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            |_| "\r\n".into(),
        )
    }),
];

const CHUNKED: &str = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
    content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";

/// Bytes reserved for the request head.
const HEAD: usize = 160;

const fn shape(name: &'static str, make: fn(usize) -> Vec<u8>) -> Shape {
    Shape { name, make }
}

/// `start`, as many numbered items as fit, `end`.
pub(crate) fn filled(size: usize, start: &str, end: &str, item: impl Fn(usize) -> String) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size + 64);
    bytes.extend_from_slice(start.as_bytes());
    for number in 0.. {
        let item = item(number);
        if bytes.len() + item.len() + end.len() > size {
            break;
        }
        bytes.extend_from_slice(item.as_bytes());
    }
    bytes.extend_from_slice(end.as_bytes());
    bytes
}

fn completion(size: usize, start: &str, end: &str, item: impl Fn(usize) -> String) -> Vec<u8> {
    let start = format!(r#"{{"model":"null",{start}"#);
    let body = filled(size.saturating_sub(HEAD), &start, &format!("{end}}}"), item);
    post("/v1/completions", &body)
}

fn chat(size: usize, start: &str, end: &str, item: impl Fn(usize) -> String) -> Vec<u8> {
    let start = format!(r#"{{"model":"null","messages":[{start}"#);
    let body = filled(size.saturating_sub(HEAD), &start, &format!("{end}]}}"), item);
    post("/v1/chat/completions", &body)
}

/// A value nested as deep as the size allows.
fn deep(size: usize, open: &str, close: &str) -> Vec<u8> {
    let depth = size.saturating_sub(HEAD + 40) / (open.len() + close.len());
    let body = format!(
        r#"{{"model":"null","prompt":"x","x":{}0{}}}"#,
        open.repeat(depth),
        close.repeat(depth)
    );
    post("/v1/completions", body.as_bytes())
}

/// A prompt of this many bytes, each in its own chunk.
fn chunked(bytes: usize, chunk: impl Fn(u8) -> String) -> Vec<u8> {
    let (start, end) = (r#"{"model":"null","prompt":""#, r#""}"#);
    let prompt = "a".repeat(bytes.saturating_sub(start.len() + end.len()));
    let body = format!("{start}{prompt}{end}");
    let mut request = CHUNKED.as_bytes().to_vec();
    for byte in body.bytes() {
        request.extend_from_slice(chunk(byte).as_bytes());
    }
    request.extend_from_slice(b"0\r\n\r\n");
    request
}
