//! Converts a command line of `vllm bench serve` into one of `xpyd bench`, and expands recipes. Pure except for the
//! clock, which gives the seed of a recipe.

use std::ffi::OsString;
use std::time::{SystemTime, UNIX_EPOCH};

/// Converts a command line: the arguments after `bench` as in `bench_arguments`; others are unchanged.
pub fn compatible_argv(all: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut all: Vec<OsString> = all.into_iter().collect();
    // Global flags have no values, so the first argument that is not a flag is the command.
    let is_word = |word: &OsString| !word.as_encoded_bytes().starts_with(b"-");
    let verb = all.iter().skip(1).position(is_word).map(|place| place + 1);
    if let Some(verb) = verb.filter(|&place| all[place] == "bench") {
        let rest = all.split_off(verb + 1);
        all.extend(bench_arguments(rest));
    }
    all
}

/// Converts the arguments after `bench`.
///
/// As in vLLM, flags can have underscores. A leading `serve` selects vLLM's output and exit codes. The flags of a
/// recipe come first, because the last of two equal flags wins.
pub(super) fn bench_arguments(given: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut given: Vec<OsString> = given.into_iter().map(dashed).collect();
    let mut words = Vec::new();
    if given.first().is_some_and(|word| word == "serve") {
        given[0] = "--as-vllm".into();
    }
    if names_recipe(&given) {
        words.extend(recipe(&given));
    }
    words.append(&mut given);
    words
}

/// `--num_prompts=3` as `--num-prompts=3`. Non-UTF-8 arguments are unchanged.
fn dashed(word: OsString) -> OsString {
    let Some(text) = word.to_str().filter(|text| text.starts_with("--")) else {
        return word;
    };
    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
    format!("{}{value}", name.replace('_', "-")).into()
}

fn names_recipe(given: &[OsString]) -> bool {
    let is_apart = |pair: &[OsString]| pair[0] == "--recipe" && pair[1] == "lmcache-xpyd";
    given.windows(2).any(is_apart) || given.iter().any(|word| word == "--recipe=lmcache-xpyd")
}

/// The flags with which the README of LMCache's xPyD example calls vLLM's client. The seed is `date +%s`, which differs
/// between runs: equal seeds make equal prompts, whose KV a server can still have cached.
fn recipe(given: &[OsString]) -> Vec<OsString> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // numpy takes seeds of 32 bits; the clock wraps around in 2106.
    let seed = (seed.as_secs() % (1 << 32)).to_string();
    let flags =
        "--dataset-name random --random-input-len 7500 --random-output-len 200 --num-prompts 30 --burstiness 100";
    let mut words: Vec<OsString> = flags.split(' ').map(OsString::from).collect();
    words.extend(["--ignore-eos", "--seed", &seed].map(OsString::from));
    let has_ramp = given
        .iter()
        .any(|word| word.to_str().is_some_and(|text| text.starts_with("--ramp-up-strategy")));
    if !has_ramp {
        words.extend(["--request-rate", "1"].map(OsString::from));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(text: &str) -> String {
        let words = compatible_argv(text.split(' ').map(OsString::from));
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        words.join(" ")
    }

    #[test]
    fn vllm_command_lines_are_converted() {
        assert_eq!(
            converted("xpyd -q bench serve --num_prompts 3 --extra_body={\"a_b\":1} --label a_b"),
            "xpyd -q bench --as-vllm --num-prompts 3 --extra-body={\"a_b\":1} --label a_b"
        );
        for untouched in [
            "xpyd up --no_such bench",
            "xpyd",
            "xpyd --help",
            "xpyd bench --label serve",
        ] {
            assert_eq!(converted(untouched), untouched);
        }
    }

    #[test]
    fn given_flags_override_a_recipe() {
        let rate = "--request-rate 1 --recipe";
        let plain = converted("xpyd bench --recipe lmcache-xpyd --num-prompts 3");
        assert!(
            plain.starts_with("xpyd bench --dataset-name random --random-input-len 7500 "),
            "{plain}"
        );
        assert!(
            plain.contains(rate) && plain.ends_with(" --recipe lmcache-xpyd --num-prompts 3"),
            "{plain}"
        );
        let ramp = converted("xpyd bench --recipe=lmcache-xpyd --ramp-up-strategy linear");
        assert!(
            ramp.contains("--burstiness 100") && !ramp.contains("--request-rate"),
            "{ramp}"
        );
        let unknown = "xpyd bench --recipe no-such";
        assert_eq!(converted(unknown), unknown);
    }
}
