//! What a wrong key or value of a profile is told: the key that was meant, and the value's form in words. PURE.

use super::file::File;

/// Every table of a profile.
const TABLES: [&str; 19] = [
    "prefill",
    "decode",
    "vllm",
    "sim",
    "nixl",
    "lmcache",
    "lmcache_mp",
    "proxy",
    "proxy.routing",
    "proxy.admission",
    "proxy.clients",
    "proxy.handoff",
    "proxy.guard",
    "proxy.access_log",
    "proxy.metrics",
    "proxy.traces",
    "deadlines",
    "restart",
    "logs",
];

/// The key that an unknown one is most like.
///
/// serde says ``unknown field `cuont`, expected one of `count`, `port` ``: the names between backticks are all we need.
pub(super) fn nearest_key(message: &str) -> Option<String> {
    let is_field = message.contains("unknown field");
    if !is_field && !message.contains("unknown variant") {
        return None;
    }
    let (unknown, known) = quoted(message)?;
    let meant = of_vllm(unknown);
    if known.contains(&meant) {
        return Some(meant.to_owned());
    }
    let elsewhere = if is_field { in_other_tables(unknown) } else { Vec::new() };
    if elsewhere.is_empty() {
        return nearest(unknown, known.into_iter());
    }
    Some(elsewhere.join("` or `"))
}

/// The key that says what an option of vLLM's says.
fn of_vllm(name: &str) -> &str {
    match name {
        "tensor_parallel_size" | "tp" => "tensor_parallel",
        "api_key" => "api_key_file",
        "max_num_seqs" | "enforce_eager" | "dtype" | "kv_cache_dtype" => "args",
        name => name,
    }
}

/// Keys of this name, or of vLLM's name for them, in all tables: `prefill.args` for `args` where there is no such key.
fn in_other_tables(unknown: &str) -> Vec<String> {
    let vllms = of_vllm(unknown);
    let mut found = Vec::new();
    for table in TABLES {
        let message = match toml::from_str::<File>(&format!("{table}.no-such-key = 0")) {
            Ok(_) => continue,
            Err(error) => error.message().to_owned(),
        };
        let known = quoted(&message).map(|(_, known)| known).unwrap_or_default();
        if known.contains(&vllms) {
            found.push(format!("{table}.{vllms}"));
        }
    }
    found
}

/// The unknown name of serde's message, and those that it knows.
fn quoted(message: &str) -> Option<(&str, Vec<&str>)> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    Some((quoted.next()?, quoted.collect()))
}

/// The candidate most like `name`, if one is like it at all.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate.to_owned())
}

/// What serde expects, in words.
pub(super) fn in_words(message: &str) -> String {
    let mut text = message.to_owned();
    for (expected, words) in [
        ("expected u16", "expected a whole number up to 65535"),
        ("expected u32", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected usize", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a sequence", "expected a list"),
        ("expected a boolean", "expected `true` or `false`"),
    ] {
        text = text.replace(expected, words);
    }
    text
}

/// How to write a value that has the wrong form.
pub(super) fn correction(message: &str) -> Option<&'static str> {
    let forms = [
        (
            "expected a list",
            "write a list in brackets: `args = [\"--max-num-seqs\", \"128\"]`, `gpus = [0, 1]`",
        ),
        (
            "expected a whole number",
            "write the number without quotes: `count = 3`",
        ),
        ("expected a string", "write text in quotes: `model = \"org/name\"`"),
        ("expected `true` or `false`", "write it without quotes"),
    ];
    // The message `invalid value`, as for a number that is too large, is about a value of the right form.
    let found = forms.into_iter().find(|(expected, _)| message.contains(expected));
    found.map(|(_, hint)| hint).filter(|_| message.contains("invalid type"))
}
