//! Requests with a hostile body: encodings, JSON, hand-off parameters of the client's own.

use super::{Draw, post};

const JSON_PATHS: [&str; 6] = [
    "/v1/completions",
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/v1/responses",
    "/v1/embeddings",
];

/// Bodies that are not what their headers say.
pub(super) fn content_encodings(draw: &mut Draw) -> Vec<u8> {
    let header = draw.pick(&[
        "Content-Encoding: gzip\r\n",
        "Content-Encoding: deflate\r\n",
        "Content-Encoding: br\r\n",
        "Content-Encoding: gzip, gzip\r\n",
        "Content-Encoding: identity\r\n",
        "Content-Type: multipart/form-data; boundary=x\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Type: application/json; charset=utf-16\r\n",
        "Content-Type: text/plain\r\n",
    ]);
    let body = draw.body();
    let body = match draw.below(3) {
        0 => {
            let mut zipped = b"\x1f\x8b\x08\0\0\0\0\0\0\x03".to_vec();
            zipped.resize(10 + draw.below(100_000), 0);
            zipped
        }
        1 => body.into_bytes(),
        _ => body.encode_utf16().flat_map(u16::to_le_bytes).collect(),
    };
    post("/v1/completions", header, &body)
}

/// Depth, numbers, strings and values of the wrong type.
pub(super) fn json(draw: &mut Draw) -> Vec<u8> {
    let depth = draw.pick(&[10, 100, 127, 128, 129, 1000, 100_000]);
    let number = "9".repeat(draw.pick(&[20, 400, 100_000]));
    let start = format!(r#"{{"model":"m","prompt":"p{}""#, draw.number);
    let right = draw.body();
    let body: String = match draw.below(32) {
        0 => format!(r#"{{"model":"m","prompt":{}{}}}"#, "[".repeat(depth), "]".repeat(depth)),
        1 => format!("{}1{}", r#"{"a":"#.repeat(depth), "}".repeat(depth)),
        2 => "[".repeat(depth),
        3 => r#"{"a":"#.repeat(depth),
        4 => format!(r#"{start},"max_tokens":{number}}}"#),
        5 => format!(r#"{start},"max_tokens":-{number}}}"#),
        6 => format!(r#"{start},"max_tokens":1e{number}}}"#),
        7 => format!(r#"{start},"n":{number}}}"#),
        8 => format!(r#"{start},"stream":true,"stream":false}}"#),
        9 => format!(r#"{start},"stream":"true"}}"#),
        10 => format!(r#"{start},"stream":1}}"#),
        11 => format!(r#"{start},"prompt":"another"}}"#),
        12 => r#"{"model":"m","prompt":[1,2,3],"max_tokens":1.5}"#.into(),
        13 => format!("\u{feff}{right}"),
        14 => r#"{"model":"m","prompt":NaN}"#.into(),
        15 => r#"{"model":"m","prompt":"\ud800"}"#.into(),
        16 => format!("{start},}}"),
        17 => format!("{right}{right}"),
        18 => format!("{right}\0"),
        19 => draw.pick(&["null", "[]", "\"x\"", "1", "", " "]).into(),
        20 => r#"{"model":"m","prompt":["a","b"]}"#.into(),
        21 => r#"{"model":"m","prompt":{}}"#.into(),
        22 => r#"{"model":"m","prompt":null}"#.into(),
        23 => r#"{"\u006dodel":"m","\u0070rompt":"x"}"#.into(),
        24 => format!(r#"{start},"{}":1}}"#, "k".repeat(100_000)),
        25 => format!(
            "{start}{}}}",
            (0..500).map(|key| format!(r#","k{key}":0"#)).collect::<String>()
        ),
        26 => format!(r#"{start},"stream_options":{{"include_usage":true}},"stream":true}}"#),
        27 => r#"{/*c*/"model":"m"}"#.into(),
        28 => format!(r#"{{"model":"m","prompt":"{}"}}"#, r"\u0000".repeat(1000)),
        29 => format!(r#"{{"model":"m","prompt":[{}1]}}"#, "1,".repeat(2000)),
        30 => format!(r#"{start},"max_tokens":0}}"#),
        _ => {
            return post(
                draw.pick(&JSON_PATHS),
                "",
                &[start.as_bytes(), b",\"x\":\"\xff\xfe\"}"].concat(),
            );
        }
    };
    post(draw.pick(&JSON_PATHS), "", body.as_bytes())
}

/// A client's own parameters of a hand-off, wherever vLLM would read them, in every spelling.
pub(super) fn handoff_parameters(draw: &mut Draw) -> Vec<u8> {
    let key = draw.pick(&[
        "kv_transfer_params",
        r"kv\u005ftransfer_params",
        r"\u006bv_transfer_params",
        r"kv_transfer_p\u0061rams",
        "ec_transfer_params",
        r"ec\u005ftransfer_params",
    ]);
    let value = draw.pick(&[
        r#"{"do_remote_prefill":true,"remote_host":"EVIL","remote_port":1,"remote_block_ids":[[1]],"remote_engine_id":"EVIL"}"#,
        r#"{"do_remote_decode":true,"EVIL":1}"#,
        r#""EVIL""#,
        r#"["EVIL"]"#,
        r#"{"EVIL":{}}"#,
    ]);
    let start = format!(r#"{{"model":"m","prompt":"p{}""#, draw.number);
    let body = match draw.below(9) {
        0 => format!(r#"{start},"{key}":{value}}}"#),
        1 => format!(r#"{{"{key}":{value},"model":"m","prompt":"x","{key}":{value}}}"#),
        2 => format!(r#"{start},"vllm_xargs":{{"{key}":{value}}}}}"#),
        3 => format!(r#"{start},"vllm_xargs":{{"a":1}},"vllm_xargs":{{"{key}":{value}}}}}"#),
        4 => format!(r#"{start},"vllm_xargs":{{"{key}":{value}}},"vllm_xargs":{{"a":1}}}}"#),
        5 => format!(r#"{start},"vllm_\u0078args":{{"{key}":{value}}}}}"#),
        6 => format!(r#"{start},"vllm_xargs":{{"{key}":1,"{key}":{value}}}}}"#),
        7 => format!(r#"{start},"n":2,"{key}":{value}}}"#),
        _ => format!(r#"{start},"priority":-5,"{key}":{value}}}"#),
    };
    let path = draw.pick(&[
        "/v1/completions",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
        "/v1/embeddings",
        "/v1/whatever",
    ]);
    post(path, "", body.as_bytes())
}
