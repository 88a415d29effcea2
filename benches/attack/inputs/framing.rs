//! Requests whose end is unclear: lengths, transfer encodings, chunks, pipelines, halves.

use super::{Draw, NEXT, SMUGGLED, post, request};

/// `Content-Length` and `Transfer-Encoding` together.
pub(super) fn length_and_encoding(draw: &mut Draw) -> Vec<u8> {
    let encoding = draw.pick(&[
        "Transfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding:\tchunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    ]);
    let body = draw.body();
    let body = match draw.below(4) {
        0 => format!("0\r\n\r\n{SMUGGLED}"),
        1 => format!("{}{SMUGGLED}", chunked(&body)),
        2 => chunked(&body),
        _ => format!("{body}{SMUGGLED}"),
    };
    let length = draw.pick(&[0, 4, body.len(), body.len() + 5]);
    let length = format!("Content-Length: {length}");
    let headers = if draw.below(2) == 0 {
        format!("{length}\r\n{encoding}\r\n")
    } else {
        format!("{encoding}\r\n{length}\r\n")
    };
    request(&format!("POST {}", draw.path()), &headers, body.as_bytes())
}

/// Lengths that are no numbers, too large, or given twice.
pub(super) fn lengths(draw: &mut Draw) -> Vec<u8> {
    let body = draw.body();
    let length = body.len();
    let values = [
        format!("{length}"),
        format!("{length}, {length}"),
        format!("{length},{}", length + 1),
        format!("+{length}"),
        format!("-{length}"),
        format!("0x{length:x}"),
        format!("{length} {length}"),
        format!("{length}.0"),
        format!("{length}e0"),
        format!("{length:030}"),
        format!("{length}\x0b"),
        format!("\u{a0}{length}"),
        "18446744073709551615".into(),
        "18446744073709551616".into(),
        "9223372036854775807".into(),
        "99999999999999999999999999".into(),
        "100000000000".into(),
        "67108865".into(),
        String::new(),
        "abc".into(),
        "-1".into(),
    ];
    let mut headers = format!("Content-Length: {}\r\n", values[draw.below(values.len())]);
    if draw.below(2) == 0 {
        headers += &format!("Content-Length: {}\r\n", values[draw.below(values.len())]);
    }
    let body = format!("{body}{NEXT}");
    request(&format!("POST {}", draw.path()), &headers, body.as_bytes())
}

/// Transfer encodings that are not exactly `chunked`.
pub(super) fn transfer_encodings(draw: &mut Draw) -> Vec<u8> {
    let encoding = draw.pick(&[
        " chunked, identity",
        " identity",
        " xchunked",
        " Chunked",
        " CHUNKED",
        "  chunked",
        " chunked\x0b",
        "\tchunked",
        " chunked, chunked",
        " gzip, chunked",
        " chunked;q=1",
        " chunked\r\nTransfer-Encoding: chunked",
        " gzip",
        " \"chunked\"",
        " chunked,",
        " chun ked",
        "",
        " ,chunked",
        " chunked\0",
        " cow\r\nTransfer-Encoding: chunked",
        " chunked\r\nContent-Length: 3",
    ]);
    let version = draw.pick(&["1.1", "1.1", "1.0"]);
    let (path, body) = (draw.path(), draw.body());
    let head = format!("POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n");
    format!("{head}Transfer-Encoding:{encoding}\r\n\r\n{}{NEXT}", chunked(&body)).into_bytes()
}

/// Chunk sizes, extensions, ends and trailers of every sort.
pub(super) fn chunks(draw: &mut Draw) -> Vec<u8> {
    let body = draw.body();
    let size = body.len();
    let (extension, zeros) = ("a".repeat(1 << draw.below(18)), "0".repeat(1 << draw.below(14)));
    let trailers = "t: t\r\n".repeat(draw.below(5000));
    let end = "0\r\n\r\n";
    let framed = match draw.below(22) {
        0 => format!("{size:x};ext=1\r\n{body}\r\n{end}"),
        1 => format!("{size:x};{extension}\r\n{body}\r\n{end}"),
        2 => format!("{zeros}{size:x}\r\n{body}\r\n{end}"),
        3 => format!("-{size:x}\r\n{body}\r\n{end}"),
        4 => format!("0x{size:x}\r\n{body}\r\n{end}"),
        5 => format!("ffffffffffffffff\r\n{body}\r\n{end}"),
        6 => format!("10000000000000000\r\n{body}"),
        7 => format!("{size:x} \r\n{body}\r\n{end}"),
        8 => format!("{size:x}\n{body}\n0\n\n{SMUGGLED}"),
        9 => format!("{size:x}\r\n{body}{end}{SMUGGLED}"),
        10 => format!(
            "{size:x}\r\n{body}\r\n0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nx-request-id: EVIL\r\n\r\n"
        ),
        11 => format!("{size:x}\r\n{body}\r\n0\r\n{trailers}\r\n"),
        12 => body.chars().map(|byte| format!("1\r\n{byte}\r\n")).collect::<String>() + end,
        13 => format!("{:x}\r\n{body}\r\n{end}", size + 7),
        14 => format!("{:x}\r\n{body}\r\n{end}", size - 3),
        15 => format!("\r\n{size:x}\r\n{body}\r\n{end}"),
        16 => format!("{size:x};a=\"\r\n\"\r\n{body}\r\n{end}{SMUGGLED}"),
        17 => format!("{size:x};\n{body}\r\n{end}{SMUGGLED}"),
        18 => format!("{size:x}\r\n{body}\r\n00000000\r\n\r\n"),
        19 => format!("{size:X}\r\n{body}\r\n0;x\r\n\r\n{NEXT}"),
        20 => format!("{size:x}\r\r\n{body}\r\n{end}"),
        _ => format!("{size:x}\r\n{body}\r\n0\r\n{SMUGGLED}"),
    };
    let start = format!("POST {}", draw.path());
    request(&start, "Transfer-Encoding: chunked\r\n", framed.as_bytes())
}

/// `Expect` with and without a body that follows.
pub(super) fn expectations(draw: &mut Draw) -> Vec<u8> {
    let header = draw.pick(&[
        "Expect: 100-continue\r\n",
        "expect: 100-Continue\r\n",
        "Expect: foo\r\n",
        "Expect: 100-continue, 100-continue\r\n",
        "Expect:\r\n",
        "Expect: 100-continue\r\nExpect: x\r\n",
    ]);
    let (path, body) = (draw.path(), draw.body());
    let mut bytes = post(path, header, body.as_bytes());
    if draw.below(3) == 0 {
        bytes.truncate(bytes.len() - body.len());
    }
    bytes
}

/// Several requests on one connection, right and wrong ones.
pub(super) fn pipelines(draw: &mut Draw) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..2 + draw.below(30) {
        bytes.extend(match draw.below(6) {
            0 => request("GET /health", "", b""),
            1 => {
                let body = draw.body();
                post("/v1/completions", "", body.as_bytes())
            }
            2 => request("GET /v1/models", "", b""),
            3 => request("GET /missing", "", b""),
            4 => b"BAD\r\n\r\n".to_vec(),
            _ => post("/v1/completions", "", b"{"),
        });
    }
    bytes
}

/// A right request that ends somewhere.
pub(super) fn halves(draw: &mut Draw) -> Vec<u8> {
    let body = draw.body();
    let mut bytes = post("/v1/completions", "", body.as_bytes());
    bytes.truncate(1 + draw.below(bytes.len() - 1));
    bytes
}

/// Bytes that are not HTTP.
pub(super) fn garbage(draw: &mut Draw) -> Vec<u8> {
    match draw.below(5) {
        0 => draw.random_bytes(3000),
        // The beginning of a TLS handshake.
        1 => [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &draw.random_bytes(500)].concat(),
        2 => vec![b'\n'; 1 + draw.below(5000)],
        3 => b"\r\n".repeat(1 + draw.below(5000)),
        _ => vec![b'A'; 1 + draw.below(70_000)],
    }
}

fn chunked(body: &str) -> String {
    format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
}
