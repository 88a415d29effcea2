//! Reads the test vectors in `vectors/`, which numpy and transformers wrote.

use std::fmt::Debug;
use std::str::FromStr;

/// The rows of a table, without its comments, each split at `|`.
pub(super) fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
    let data = table.lines().filter(|line| !line.starts_with('#'));
    data.map(|line| line.split('|').collect())
}

/// The numbers of one cell.
pub(super) fn numbers<T: FromStr<Err: Debug>>(cell: &str) -> Vec<T> {
    cell.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

/// A tokenizer of `vectors/tokenizers`.
pub(super) fn tokenizer(name: &str) -> std::sync::Arc<crate::bench::tokenizer::Tokenizer> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bench/vectors/tokenizers");
    crate::bench::tokenizer::Tokenizer::load(name, &folder.join(name))
        .unwrap()
        .into()
}
