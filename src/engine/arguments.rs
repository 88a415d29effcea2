//! Reads arguments of `vllm serve` as its parser does. PURE.
//!
//! The parser is Python's argparse with vLLM's changes (`utils/argparse_utils.py`): `_` equals `-`, `--name=value` is one
//! word, a unique prefix is enough, `--a.b` is a part of the JSON of `--a`, and the last value wins. From 0.33 on,
//! `--disable-x` and `--enable-x` switch each other off, as `--no-x` does `--x`.

use std::ops::Range;
use std::sync::LazyLock;

/// An option on a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenOption<'args> {
    /// Its full name: `--tensor-parallel-size` for `-tp`. The word itself if no option or more than one fits.
    pub name: String,
    /// The full names of the options that it can mean: one, or several for an ambiguous prefix. Empty if this xpyd does
    /// not know the option.
    pub fits: Vec<&'static str>,
    /// The option as it was written, without a value.
    pub spelled: &'args str,
    /// The part of its JSON that is set: `model` of `--speculative-config.model`.
    pub part: Option<&'args str>,
    /// Its values.
    pub values: Vec<&'args str>,
    /// The positions of its words on the command line.
    pub words: Range<usize>,
}

impl<'args> GivenOption<'args> {
    /// Its last value.
    pub fn value(&self) -> Option<&'args str> {
        self.values.last().copied()
    }

    /// Whether the spelling of a switch turns off what its full name turns on.
    pub fn is_off(&self) -> bool {
        let written = self.spelled.replace('_', "-");
        written.starts_with("--no-") || opposite(&self.name).is_some_and(|other| other.starts_with(&written))
    }
}

/// How many values an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ValueCount {
    Nothing,
    One,
    OneOrNothing,
    Several,
}

/// An option of `vllm serve`.
#[derive(Debug)]
struct KnownOption {
    /// All names; the first one is the full name.
    names: Vec<&'static str>,
    takes: ValueCount,
}

/// All options of `vllm serve` 0.32 and 0.33: one per line, with the number of values and the names.
static KNOWN_OPTIONS: LazyLock<Vec<KnownOption>> = LazyLock::new(|| {
    let lines = include_str!("vllm_options.txt").lines();
    let known = |line: &'static str| {
        let mut words = line.split_ascii_whitespace();
        let takes = match words.next()? {
            "switch" => ValueCount::Nothing,
            "value" => ValueCount::One,
            "optional" => ValueCount::OneOrNothing,
            "values" => ValueCount::Several,
            _ => return None,
        };
        Some(KnownOption {
            names: words.collect(),
            takes,
        })
    };
    lines.filter_map(known).collect()
});

/// The options in `args`, in order. Words that are neither an option nor an option's value are left out.
pub fn read(args: &[String]) -> Vec<GivenOption<'_>> {
    let mut found = Vec::new();
    let mut index = 0;
    while let Some(word) = args.get(index) {
        if word == "--" {
            break;
        }
        let Some((mut given, takes)) = begun(word) else {
            index += 1;
            continue;
        };
        let start = index;
        index += 1;
        let most = if given.values.is_empty() {
            takes
        } else {
            ValueCount::Nothing
        };
        let most = match most {
            ValueCount::Nothing => 0,
            ValueCount::One | ValueCount::OneOrNothing => 1,
            ValueCount::Several => usize::MAX,
        };
        while given.values.len() < most && args.get(index).is_some_and(|word| !is_option(word)) {
            given.values.push(&args[index]);
            index += 1;
        }
        given.words = start..index;
        found.push(given);
    }
    found
}

/// The last value of the option with this full name.
pub fn value<'args>(args: &'args [String], name: &str) -> Option<&'args str> {
    let is_meant = |given: &GivenOption<'_>| given.name == name && given.part.is_none();
    read(args).into_iter().rfind(is_meant).and_then(|given| given.value())
}

/// Whether a word is an option. A `-` with a digit after it begins a value.
fn is_option(word: &str) -> bool {
    let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
    name.and_then(|name| name.chars().next())
        .is_some_and(char::is_alphabetic)
}

/// The option of a word, and the number of values that follow it, without one after `=`.
fn begun(word: &str) -> Option<(GivenOption<'_>, ValueCount)> {
    if !is_option(word) {
        return None;
    }
    let (spelled, value) = word
        .split_once('=')
        .map_or((word, None), |(name, value)| (name, Some(value)));
    let (name, part) = spelled
        .split_once('.')
        .map_or((spelled, None), |(name, part)| (name, Some(part)));
    let mut given = GivenOption {
        name: String::new(),
        fits: Vec::new(),
        spelled,
        part,
        values: value.into_iter().collect(),
        words: 0..0,
    };
    // `-O3` is `-O 3`.
    let (dashed, level) = match word.strip_prefix("-O") {
        Some(level) => ("--optimization-level".to_owned(), Some(level.trim_start_matches('='))),
        None if name.starts_with("--") => (name.replace('_', "-"), None),
        None => (name.to_owned(), None),
    };
    if let Some(level) = level.filter(|level| !level.is_empty()) {
        given.values = vec![level];
    }
    let fits = fitting(&dashed);
    given.fits = fits.iter().map(|known| known.names[0]).collect();
    // The number of values of an unknown option is unknown, so it takes all that follow.
    let mut takes = ValueCount::Several;
    given.name = dashed;
    if let [known] = fits[..] {
        known.names[0].clone_into(&mut given.name);
        takes = if part.is_some() { ValueCount::One } else { known.takes };
    }
    Some((given, takes))
}

/// The option with this name, or all options with this prefix.
fn fitting(name: &str) -> Vec<&'static KnownOption> {
    let exact = KNOWN_OPTIONS.iter().find(|known| known.names.contains(&name));
    let begins = |known: &&KnownOption| known.names.iter().any(|other| other.starts_with(name));
    match exact {
        Some(known) => vec![known],
        None => KNOWN_OPTIONS.iter().filter(begins).collect(),
    }
}

/// The other name of a paired switch of vLLM 0.33: `--disable-x` for `--enable-x`, and the reverse.
pub fn opposite(name: &str) -> Option<String> {
    let other = |from: &str, to: &str| name.strip_prefix(from).map(|rest| format!("{to}{rest}"));
    other("--enable-", "--disable-").or_else(|| other("--disable-", "--enable-"))
}

/// A number in vLLM's syntax: `4096`, `4k` (4000), `4K` (4096).
pub fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    let (digits, factor) = match text.char_indices().last()? {
        (end, unit) if unit.is_ascii_alphabetic() => (&text[..end], factor(unit)?),
        _ => (text, 1),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(factor);
    }
    // Fractions only with a decimal unit: `25.6k`.
    let (whole, part) = digits.split_once('.').filter(|_| factor % 1000 == 0)?;
    let scale = 10_u64.checked_pow(u32::try_from(part.len()).ok()?)?;
    let part = part.parse::<u64>().ok()?.checked_mul(factor)? / scale;
    whole.parse::<u64>().ok()?.checked_mul(factor)?.checked_add(part)
}

fn factor(unit: char) -> Option<u64> {
    let power = match unit.to_ascii_lowercase() {
        'k' => 1,
        'm' => 2,
        'g' => 3,
        't' => 4,
        _ => return None,
    };
    let base: u64 = if unit.is_ascii_lowercase() { 1000 } else { 1024 };
    Some(base.pow(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn shown(text: &str) -> Vec<(String, Option<String>, String)> {
        let args = words(text);
        let shown = |given: GivenOption<'_>| {
            (
                given.name.clone(),
                given.part.map(str::to_owned),
                given.values.join(","),
            )
        };
        read(&args).into_iter().map(shown).collect()
    }

    #[test]
    fn every_spelling_is_recognised() {
        for spelled in [
            "--tensor-parallel-size 2",
            "--tensor_parallel_size 2",
            "--tensor-parallel-size=2",
            "--tensor_parallel_size=2",
            "--tensor-par 2",
            "-tp 2",
            "-tp=2",
        ] {
            let wanted = ("--tensor-parallel-size".to_owned(), None, "2".to_owned());
            assert_eq!(shown(spelled), [wanted], "{spelled}");
        }
        for (spelled, part, value) in [
            ("-sc {\"model\":\"a/b\"}", None, "{\"model\":\"a/b\"}"),
            ("--speculative_config.model a/b", Some("model"), "a/b"),
            ("--speculative-config.model=a/b", Some("model"), "a/b"),
        ] {
            let wanted = (
                "--speculative-config".to_owned(),
                part.map(str::to_owned),
                value.to_owned(),
            );
            assert_eq!(shown(spelled), [wanted], "{spelled}");
        }
    }

    #[test]
    fn values_end_at_the_next_option() {
        let read = shown("--enforce-eager x --api-key a b -O3 --seed -1 --no-enable-prefix-caching --new-thing 1 2");
        let read: Vec<(&str, &str)> = read
            .iter()
            .map(|(name, _, values)| (name.as_str(), values.as_str()))
            .collect();
        assert_eq!(
            read,
            [
                ("--enforce-eager", ""),
                ("--api-key", "a,b"),
                ("--optimization-level", "3"),
                ("--seed", "-1"),
                ("--enable-prefix-caching", ""),
                ("--new-thing", "1,2"),
            ]
        );
    }

    #[test]
    fn an_ambiguous_prefix_matches_no_option() {
        let args = words("--max-num 3");
        let read = read(&args);
        assert_eq!(read[0].name, "--max-num");
        assert!(read[0].fits.contains(&"--max-num-seqs") && read[0].fits.len() > 1);
    }

    #[test]
    fn the_last_one_wins() {
        let args = words("--max-model-len 1 --max_model_len=2");
        assert_eq!(value(&args, "--max-model-len"), Some("2"));
        assert_eq!(value(&args, "--port"), None);
    }

    #[test]
    fn numbers_have_vllms_units() {
        for (text, wanted) in [
            ("4096", 4096),
            ("4k", 4000),
            ("4K", 4096),
            ("25.6k", 25_600),
            ("1M", 1 << 20),
        ] {
            assert_eq!(number(text), Some(wanted), "{text}");
        }
        for wrong in ["", "auto", "-1", "1.5K", "k", "1q"] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_table_can_be_read() {
        assert!(KNOWN_OPTIONS.len() > 150, "{}", KNOWN_OPTIONS.len());
        let lines = include_str!("vllm_options.txt")
            .lines()
            .filter(|line| !line.starts_with('#'));
        assert_eq!(lines.count(), KNOWN_OPTIONS.len());
        assert_eq!(opposite("--enable-x").as_deref(), Some("--disable-x"));
        assert_eq!(opposite("--disable-x").as_deref(), Some("--enable-x"));
        assert_eq!(opposite("--x"), None);
    }
}
