//! Answers cargo-nextest's request for the list of tests. Cargo's harness does this itself; the benches have no
//! harness.

/// The test that makes a small run of the bench.
const TEST: &str = "small_form";

/// Prints the test if `words` ask for a list; returns whether they do.
pub(crate) fn printed(words: &[String]) -> bool {
    let has = |flag: &str| words.iter().any(|word| word == flag);
    if has("--list") && !has("--ignored") {
        println!("{TEST}: test");
    }
    has("--list")
}
