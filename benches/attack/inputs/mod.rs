//! Hostile requests by class. The same seed and number make the same bytes.

mod bodies;
mod framing;
mod heads;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

/// Text that must not reach an engine anywhere in a request.
pub(crate) const FORBIDDEN: &str = "EVIL";

/// A request behind a malformed one, so that it must not be treated as a request.
const SMUGGLED: &str = "GET /v1/EVIL HTTP/1.1\r\nhost: EVIL\r\n\r\n";

/// A request behind one that can be valid, and then is the next one.
const NEXT: &str = "GET /v1/next HTTP/1.1\r\nhost: x\r\n\r\n";

const PATHS: [&str; 7] = [
    "/v1/completions",
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/v1/models",
    "/v1/anything",
    "/health",
];

type Make = fn(&mut Draw) -> Vec<u8>;

/// Every class with what makes an input of it. A new one is one more line.
#[rustfmt::skip]
pub(crate) const CLASSES: &[(&str, Make)] = &[
    ("bare line feeds", heads::bare_line_feeds),
    ("folded headers", heads::folded_headers),
    ("many headers", heads::many_headers),
    ("large heads", heads::large_heads),
    ("methods", heads::methods),
    ("targets", heads::targets),
    ("versions", heads::versions),
    ("header names and values", heads::names_and_values),
    ("connection headers", heads::connection_headers),
    ("hosts", heads::hosts),
    ("length and encoding", framing::length_and_encoding),
    ("lengths", framing::lengths),
    ("transfer encodings", framing::transfer_encodings),
    ("chunks", framing::chunks),
    ("expectations", framing::expectations),
    ("pipelines", framing::pipelines),
    ("halves", framing::halves),
    ("garbage", framing::garbage),
    ("content encodings", bodies::content_encodings),
    ("JSON", bodies::json),
    ("hand-off parameters", bodies::handoff_parameters),
    ("mutations", mutated),
];

/// The random choices of one input.
pub(crate) struct Draw {
    random: StdRng,
    pub(crate) number: u64,
}

/// The class and the bytes of an input.
pub(crate) fn input(seed: u64, number: u64) -> (&'static str, Vec<u8>) {
    let mut draw = Draw {
        random: StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number),
        number,
    };
    let (name, make) = CLASSES[usize::try_from(number).unwrap_or(0) % CLASSES.len()];
    (name, make(&mut draw))
}

impl Draw {
    fn below(&mut self, end: usize) -> usize {
        self.random.random_range(0..end)
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        *choices.choose(&mut self.random).expect("choices")
    }

    fn path(&mut self) -> &'static str {
        self.pick(&PATHS)
    }

    /// A body that is right.
    fn body(&mut self) -> String {
        let option = self.pick(&[
            r#""stream":true"#,
            r#""stream":false"#,
            r#""max_tokens":3"#,
            r#""n":2"#,
            r#""echo":true"#,
        ]);
        format!(
            r#"{{"model":"m","prompt":"p{}","temperature":0,{option}}}"#,
            self.number
        )
    }

    fn random_bytes(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; 1 + self.below(most)];
        self.random.fill_bytes(&mut bytes);
        bytes
    }
}

/// A complete request with these header lines, each with its line end.
fn request(start: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("{start} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

/// A complete request with its length and these header lines more.
fn post(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let headers = format!("{headers}Content-Length: {}\r\n", body.len());
    request(&format!("POST {path}"), &headers, body)
}

/// An input of another class with a few bytes changed, lost, repeated or added.
fn mutated(draw: &mut Draw) -> Vec<u8> {
    const SPECIAL: [u8; 11] = [b'\r', b'\n', 0, b' ', b':', b'\t', b'"', b'{', b'}', b',', 0xff];
    let (_, make) = CLASSES[draw.below(CLASSES.len() - 1)];
    let mut bytes = make(draw);
    bytes.truncate(20_000);
    for _ in 0..=draw.below(8) {
        if bytes.is_empty() {
            break;
        }
        let at = draw.below(bytes.len());
        match draw.below(6) {
            0 => bytes[at] = draw.below(256).to_le_bytes()[0],
            1 => bytes.insert(at, draw.below(256).to_le_bytes()[0]),
            2 => drop(bytes.remove(at)),
            3 => {
                let end = (at + draw.below(40)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = draw.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            4 => bytes[at] = draw.pick(&SPECIAL),
            _ => bytes.truncate(at.max(1)),
        }
    }
    bytes
}
