//! Requests with a hostile head: line ends, headers, methods, targets, versions.

use super::{Draw, SMUGGLED, post, request};

/// Lines that do not end in CR LF.
pub(super) fn bare_line_feeds(draw: &mut Draw) -> Vec<u8> {
    let (path, body) = (draw.path(), draw.body());
    let text = String::from_utf8(post(path, "", body.as_bytes())).unwrap_or_default();
    let text = match draw.below(5) {
        0 => text.replace("\r\n", "\n"),
        1 => text.replace("\r\n", "\r"),
        2 => text.replacen("\r\n", "\n", 2),
        3 => text.replacen("Host: x\r\n", "Host: x\nX-Request-Id: EVIL\r\n", 1),
        _ => text.replacen("Host: x", "Host: x\rX-Request-Id: EVIL", 1),
    };
    text.into_bytes()
}

/// Headers that continue in the next line, which RFC 9112 forbids.
pub(super) fn folded_headers(draw: &mut Draw) -> Vec<u8> {
    let folded = draw.pick(&[
        "X-A: b\r\n c\r\n",
        "X-A: b\r\n\tc\r\n",
        "X-A:\r\n b\r\n",
        " X-A: b\r\n",
        "X-Request-Id: a\r\n Content-Length: 0\r\n",
        "Transfer-Encoding:\r\n chunked\r\n",
        "Content-Length: 1\r\n 2\r\n",
    ]);
    let (path, body) = (draw.path(), draw.body());
    [post(path, folded, body.as_bytes()), SMUGGLED.into()].concat()
}

pub(super) fn many_headers(draw: &mut Draw) -> Vec<u8> {
    let count = draw.pick(&[80, 89, 90, 91, 99, 100, 101, 128, 500, 3000]);
    let is_same = draw.below(2) == 0;
    let line = |index: usize| {
        if is_same {
            "a: b\r\n".to_owned()
        } else {
            format!("h{index}: {index}\r\n")
        }
    };
    let headers: String = (0..count).map(line).collect();
    request(&format!("GET {}", draw.path()), &headers, b"")
}

pub(super) fn large_heads(draw: &mut Draw) -> Vec<u8> {
    let size = draw.pick(&[
        8000, 16_000, 32_000, 33_000, 60_000, 65_000, 65_536, 70_000, 131_072, 400_000,
    ]);
    let (path, fill) = (draw.path(), "a".repeat(size));
    match draw.below(4) {
        0 => request(&format!("GET {path}"), &format!("X-A: {fill}\r\n"), b""),
        1 => request(&format!("GET {path}?{fill}"), "", b""),
        2 => request(&format!("{fill} {path}"), "", b""),
        _ => request(&format!("GET {path}"), &format!("{fill}: a\r\n"), b""),
    }
}

pub(super) fn methods(draw: &mut Draw) -> Vec<u8> {
    let method = draw.pick(&[
        "CONNECT", "TRACE", "OPTIONS", "PATCH", "PUT", "DELETE", "HEAD", "get", "PoST", "PRI", "", "GET GET", "\u{1}",
        "PROPFIND", "GET\t", "X-Y", "G@T", "POST\0",
    ]);
    if draw.below(2) == 0 {
        let body = draw.body();
        let headers = format!("Content-Length: {}\r\n", body.len());
        return request(&format!("{method} {}", draw.path()), &headers, body.as_bytes());
    }
    let target = draw.pick(&[
        "127.0.0.1:22",
        "*",
        "http://169.254.169.254/",
        "/health",
        "/v1/models",
        "/metrics",
    ]);
    request(&format!("{method} {target}"), "", b"")
}

/// Targets that try to get around the rules for routes.
pub(super) fn targets(draw: &mut Draw) -> Vec<u8> {
    let target = draw.pick(&[
        "http://evil.example/v1/models",
        "https://x/v1/completions",
        "//v1/models",
        "/v1//models",
        "/v1/../sleep",
        "/v1/%2e%2e/sleep",
        "/v1/..%2fsleep",
        "/v1/x%2fy",
        "/v1/load_lora_adapter",
        "/v1/load%5flora_adapter",
        "/V1/load_lora_adapter",
        "/v1/load_lora_adapter/",
        "/v1/load_lora_adapter?x",
        "/v1/load_lora_adapter;a",
        "/v1/load_lora_adapter%00",
        "/v1/load_lora_adapter#f",
        "/v1/unload_lora_adapter%20",
        "/v1/models\0",
        "/v1/models%0d%0aX-Request-Id:EVIL",
        "/v1/models\\..\\sleep",
        "/v1/\u{ff}",
        "*",
        "",
        "/v1/models HTTP/1.1\r\nX-Request-Id: EVIL",
        "/v1/completions/",
        "/v1/completions?kv_transfer_params=1",
        "/v1/models?a=\"<>^`{|}",
        "/v1/models?%00%0d%0a",
        "/v1/.",
        "/v1/..",
        "/%76%31/models",
        "/v1/\u{7f}",
        "/sleep?level=1",
        "/v1/sleep",
        "/v1/responses/%2e%2e%2f%2e%2e%2fsleep",
        "/v1/responses/../../sleep/cancel",
        "/v1/responses/a b",
        "/health/../sleep",
        "/..",
        "/etc/passwd",
        "?",
        "#",
        "/v1/models?\u{1}",
    ]);
    if draw.below(2) == 0 {
        return request(&format!("GET {target}"), "", b"");
    }
    let body = draw.body();
    post(target, "", body.as_bytes())
}

pub(super) fn versions(draw: &mut Draw) -> Vec<u8> {
    let version = draw.pick(&[
        "HTTP/1.0",
        "HTTP/0.9",
        "",
        "HTTP/2.0",
        "HTTP/1.2",
        "HTTP/1.1 ",
        "http/1.1",
        "HTTP/1.",
        "HTTP/11",
        "HTTP/1.1.1",
        "HTTP/3",
        "ICAP/1.0",
        "HTTP/1.10",
    ]);
    let (path, body) = (draw.path(), draw.body());
    let text = match draw.below(4) {
        0 => return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
        1 => format!(
            "POST {path} {version}\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ),
        2 => format!("GET {path} {version}\r\n\r\n"),
        _ => format!(
            "POST {path} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ),
    };
    text.into_bytes()
}

/// Names and values that split headers, imitate xpyd's own, or are no header at all.
pub(super) fn names_and_values(draw: &mut Draw) -> Vec<u8> {
    let long = format!("X-Request-Id: EVIL{}", "r".repeat(30_000));
    let lines: [&str; 31] = [
        "X-Request-Id: a\r\nX-Data-Parallel-Rank: EVIL",
        "X-Request-Id: EVIL%0d%0aX-A: 1",
        "X-Request-Id: EVIL\\r\\nX-A: 1",
        "X-Request-Id: EVIL\u{e9}\u{7f}",
        "X-Request-Id: EVIL\u{1}",
        "X-Request-Id: EVIL\r\nX-Request-Id: EVIL",
        "X-Request-Id: EVIL\0b",
        "X-Request-Id:",
        "X-Request-Id : EVIL",
        ": a",
        "a b: c",
        "a\0: c",
        "\u{e9}: c",
        "a(: c",
        "nocolon",
        "Authorization: Bearer \u{1}",
        "traceparent: 00-00000000000000000000000000000000-0000000000000000-00",
        "traceparent: 00-zz-zz-zz",
        "X-Data-Parallel-Rank: EVIL",
        "X-Data-Parallel-Host: EVIL",
        "X-Vllm-Priority: EVIL",
        "X-KV-Engine: EVIL",
        "X-Request-Id: EVIL$(id)`id`",
        "session-id: ../../x",
        "X-Session-Id: s",
        "Content-Type: \u{1}",
        "Cookie: a\x0bb",
        "X-Request-Id: EVIL\x1b[31mred",
        "Content-Type: text/plain",
        "Accept-Encoding: gzip",
        &long,
    ];
    let mut headers = format!("{}\r\n", draw.pick(&lines));
    if draw.below(2) == 0 {
        headers += &format!("{}\r\n", draw.pick(&lines));
    }
    let body = draw.body();
    post("/v1/completions", &headers, body.as_bytes())
}

/// Headers that end at the next hop.
pub(super) fn connection_headers(draw: &mut Draw) -> Vec<u8> {
    let header = draw.pick(&[
        "Connection: close, authorization",
        "Connection: content-type",
        "Connection: content-length",
        "Connection: host",
        "Connection: transfer-encoding",
        "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        "Keep-Alive: timeout=999999",
        "Proxy-Connection: keep-alive",
        "TE: trailers, deflate",
        "Connection: x-a\r\nX-A: EVIL",
        "Connection: \u{1}",
        "Proxy-Authorization: Basic EVIL",
        "Connection: keep-alive, close",
        "Connection: ,,,,",
        "Upgrade: TLS/1.3",
    ]);
    let body = draw.body();
    post("/v1/completions", &format!("{header}\r\n"), body.as_bytes())
}

/// None, several or malformed hosts.
pub(super) fn hosts(draw: &mut Draw) -> Vec<u8> {
    let hosts = draw.pick(&[
        "",
        "Host: a\r\nHost: b\r\n",
        "Host: a\r\nHost: a\r\n",
        "Host:\r\n",
        "Host: a b\r\n",
        "Host: a/b\r\n",
        "Host: u@b:99999\r\n",
        "Host: [::1\r\n",
        "Host: \u{7f}\r\n",
    ]);
    let body = draw.body();
    let head = format!("POST {} HTTP/1.1\r\n{hosts}", draw.path());
    format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}
