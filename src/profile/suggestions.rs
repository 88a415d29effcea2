//! Suggestions for a wrong key or value in a profile: the key that was probably meant, and the right form of the value.
//! PURE.

use super::schema::{schema, tables};

/// The known key that is most similar to the unknown one of a message.
///
/// serde's message is ``unknown field `cuont`, expected one of `count`, `port` ``: only the names between backticks matter.
pub(super) fn nearest_key(message: &str) -> Option<String> {
    let is_field = message.contains("unknown field");
    if !is_field && !message.contains("unknown variant") {
        return None;
    }
    let (unknown, known) = quoted(message)?;
    let meant = key_for_vllm_option(unknown);
    if known.contains(&meant) {
        return Some(meant.to_owned());
    }
    let elsewhere = if is_field { in_other_tables(unknown) } else { Vec::new() };
    if elsewhere.is_empty() {
        return nearest(unknown, known.into_iter());
    }
    Some(elsewhere.join("` or `"))
}

/// The key with the meaning of a vLLM option.
fn key_for_vllm_option(name: &str) -> &str {
    match name {
        "tensor_parallel_size" | "tp" => "tensor_parallel",
        "api_key" => "api_key_file",
        "max_num_seqs" | "enforce_eager" | "dtype" | "kv_cache_dtype" => "args",
        name => name,
    }
}

/// Keys with this name, or with the meaning of this vLLM option, in all tables: `prefill.args` for `args`.
fn in_other_tables(unknown: &str) -> Vec<String> {
    let vllms = key_for_vllm_option(unknown);
    let schema = schema();
    let tables = tables(&schema);
    let inner = tables.iter().filter(|(name, _)| !name.is_empty());
    let with_key = inner.filter(|(_, table)| table["properties"].get(vllms).is_some());
    with_key.map(|(name, _)| format!("{name}.{vllms}")).collect()
}

/// The unknown name in serde's message, and the known ones.
fn quoted(message: &str) -> Option<(&str, Vec<&str>)> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    Some((quoted.next()?, quoted.collect()))
}

/// The candidate most similar to `name`, if one is similar enough.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate.to_owned())
}

/// Replaces Rust's type names in serde's message.
pub(super) fn readable(message: &str) -> String {
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
pub(super) fn form_hint(message: &str) -> Option<&'static str> {
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
    // `invalid value`, as for a number that is too large, is about a value of the right form.
    let found = forms.into_iter().find(|(expected, _)| message.contains(expected));
    found.map(|(_, hint)| hint).filter(|_| message.contains("invalid type"))
}
