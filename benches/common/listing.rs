//! The question of cargo-nextest which tests a program has. Cargo's own harness answers it; the benches have none.

/// The bench in its small form, as a test.
const TEST: &str = "small_form";

/// Prints the test if `words` ask for a list, and returns whether they do.
pub(crate) fn printed(words: &[String]) -> bool {
    let has = |flag: &str| words.iter().any(|word| word == flag);
    if has("--list") && !has("--ignored") {
        println!("{TEST}: test");
    }
    has("--list")
}
