//! Reads `tests/fixtures/bench`. Tests only.

use std::fmt::Debug;
use std::str::FromStr;

/// The text of a file in `tests/fixtures/bench`.
macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/fixtures/bench/",
            $name
        ))
    };
}
pub(super) use fixture;

/// The rows of a table that numpy wrote, without its comments, each split at `|`.
pub(super) fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
    let data = table.lines().filter(|line| !line.starts_with('#'));
    data.map(|line| line.split('|').collect())
}

/// The numbers of one cell.
pub(super) fn numbers<T: FromStr<Err: Debug>>(cell: &str) -> Vec<T> {
    cell.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

/// A tokenizer of `tests/fixtures/bench/tokenizers`.
pub(super) fn tokenizer(name: &str) -> std::sync::Arc<super::tokenizer::Tokenizer> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/bench/tokenizers");
    super::tokenizer::Tokenizer::load(name, &folder.join(name))
        .unwrap()
        .into()
}
