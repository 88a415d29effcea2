//! Arguments of engines that are keys of a profile, too: moved to their keys, so that everything is said once. PURE.

use toml::{Table, Value};

use crate::engine::arguments;

/// What an option of `vllm serve` is in a profile.
#[derive(Debug, Clone, Copy)]
struct Key {
    option: &'static str,
    /// The key of a role's table.
    of_role: Option<&'static str>,
    /// Table and key for the engines of both roles; none where each role has the key.
    of_all: Option<(&'static str, &'static str)>,
    read: fn(&str) -> Option<Value>,
}

const KEYS: [Key; 5] = [
    Key {
        option: "--tensor-parallel-size",
        of_role: Some("tensor_parallel"),
        of_all: None,
        read: whole,
    },
    Key {
        option: "--gpu-memory-utilization",
        of_role: Some("gpu_memory_utilization"),
        of_all: Some(("vllm", "gpu_memory_utilization")),
        read: part,
    },
    Key {
        option: "--max-model-len",
        of_role: None,
        of_all: Some(("vllm", "max_model_len")),
        read: whole,
    },
    Key {
        option: "--served-model-name",
        of_role: None,
        of_all: Some(("", "served_model_name")),
        read: text,
    },
    Key {
        option: "--model",
        of_role: None,
        of_all: Some(("", "model")),
        read: text,
    },
];

const ROLES: [&str; 2] = ["prefill", "decode"];

fn whole(value: &str) -> Option<Value> {
    Some(Value::Integer(i64::try_from(arguments::number(value)?).ok()?))
}

fn part(value: &str) -> Option<Value> {
    value.trim().parse().ok().map(Value::Float)
}

#[expect(clippy::unnecessary_wraps, reason = "as the others that read a value")]
fn text(value: &str) -> Option<Value> {
    Some(Value::String(value.to_owned()))
}

/// Moves them in a merged profile. `passed` are arguments for all engines that come after those of the profile.
///
/// vLLM takes the last of what comes twice, so an argument wins over the key, one of a role over one of all engines, and one
/// that is passed over both. What cannot be read as the key's value stays where it is.
pub(super) fn adopt(profile: &mut Table, passed: &[String]) {
    if let Some(args) = args_of(profile, "vllm") {
        let rest = take(profile, args, None);
        set_args(profile, "vllm", rest);
    }
    for role in ROLES {
        if let Some(args) = args_of(profile, role) {
            let rest = take(profile, args, Some(role));
            set_args(profile, role, rest);
        }
    }
    // `vllm serve` begins with the model.
    let passed = match passed.split_first() {
        Some((model, rest)) if !model.starts_with('-') => {
            set(profile, "", "model", Value::String(model.clone()));
            rest
        }
        _ => passed,
    };
    let rest = take(profile, passed.to_vec(), None);
    for role in ROLES.iter().filter(|_| !rest.is_empty()) {
        let mut args = args_of(profile, role).unwrap_or_default();
        args.extend(rest.iter().cloned());
        set_args(profile, role, args);
    }
}

/// Sets the keys that `args` of this role, or of all engines, name, and returns the other ones.
fn take(profile: &mut Table, args: Vec<String>, role: Option<&str>) -> Vec<String> {
    let mut taken = vec![false; args.len()];
    for given in arguments::read(&args) {
        let key = KEYS.iter().find(|key| key.option == given.name && given.part.is_none());
        let ([value], Some(key)) = (&given.values[..], key) else {
            continue;
        };
        let Some(value) = (key.read)(value) else { continue };
        match (role, key.of_role, key.of_all) {
            (Some(role), Some(key), _) => set(profile, role, key, value),
            (None, of_role, of_all) => {
                for role in ROLES {
                    match of_role {
                        Some(key) if of_all.is_none() => set(profile, role, key, value.clone()),
                        // A role's own one would win over that of all.
                        Some(key) => drop(table(profile, role).and_then(|table| table.remove(key))),
                        None => {}
                    }
                }
                if let Some((name, key)) = of_all {
                    set(profile, name, key, value);
                }
            }
            // The plan has one for all engines.
            (Some(_), None, _) => continue,
        }
        taken[given.words].fill(true);
    }
    let rest = args.into_iter().zip(taken).filter(|(_, is_taken)| !is_taken);
    rest.map(|(word, _)| word).collect()
}

fn table<'profile>(profile: &'profile mut Table, name: &str) -> Option<&'profile mut Table> {
    profile.get_mut(name).and_then(Value::as_table_mut)
}

fn set(profile: &mut Table, name: &str, key: &str, value: Value) {
    if name.is_empty() {
        profile.insert(key.to_owned(), value);
        return;
    }
    let table = profile.entry(name).or_insert_with(|| Value::Table(Table::new()));
    if let Some(table) = table.as_table_mut() {
        table.insert(key.to_owned(), value);
    }
}

/// The arguments of this table, if they are there and all of them are text.
fn args_of(profile: &Table, name: &str) -> Option<Vec<String>> {
    let args = profile.get(name)?.get("args")?.as_array()?;
    args.iter().map(|word| word.as_str().map(str::to_owned)).collect()
}

fn set_args(profile: &mut Table, name: &str, args: Vec<String>) {
    let args = args.into_iter().map(Value::String).collect();
    set(profile, name, "args", Value::Array(args));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adopted(profile: &str, passed: &[&str]) -> Table {
        let mut table: Table = profile.parse().expect("TOML");
        let passed: Vec<String> = passed.iter().map(|&word| word.to_owned()).collect();
        adopt(&mut table, &passed);
        table
    }

    #[test]
    fn an_option_that_is_a_key_becomes_the_key_in_every_spelling() {
        for spelled in [
            r#""--tensor-parallel-size", "2""#,
            r#""-tp", "2""#,
            r#""-tp=2""#,
            r#""--tensor_parallel_size=2""#,
            r#""--tensor-parallel", "2""#,
            r#""-tp", "1", "--tensor-parallel-size=2""#,
        ] {
            let table = adopted(&format!("[vllm]\nargs = [{spelled}, \"--seed\", \"1\"]"), &[]);
            let wanted =
                "[vllm]\nargs = [\"--seed\", \"1\"]\n[prefill]\ntensor_parallel = 2\n[decode]\ntensor_parallel = 2";
            assert_eq!(table, wanted.parse::<Table>().expect("TOML"), "{spelled}");
        }
    }

    #[test]
    fn a_role_wins_over_all_engines_and_what_is_passed_over_both() {
        let profile =
            "[vllm]\nargs = [\"-tp\", \"2\"]\n[decode]\ngpu_memory_utilization = 0.9\nargs = [\"-tp\", \"4\"]";
        let roles = |table: &Table| ROLES.map(|role| table[role]["tensor_parallel"].as_integer());
        assert_eq!(roles(&adopted(profile, &[])), [Some(2), Some(4)]);
        let table = adopted(
            profile,
            &["-tp", "8", "--gpu-memory-utilization=0.5", "--max-num-seqs", "3"],
        );
        assert_eq!(roles(&table), [Some(8), Some(8)]);
        assert_eq!(table["vllm"]["gpu_memory_utilization"].as_float(), Some(0.5));
        assert!(
            !table["decode"]
                .as_table()
                .expect("a table")
                .contains_key("gpu_memory_utilization")
        );
        for role in ROLES {
            assert_eq!(args_of(&table, role).expect("arguments"), ["--max-num-seqs", "3"]);
        }
    }

    #[test]
    fn the_words_of_vllm_serve_begin_with_the_model() {
        let table = adopted("", &["org/model", "--max-num-seqs", "3"]);
        assert_eq!(table["model"].as_str(), Some("org/model"));
        assert_eq!(args_of(&table, "decode").expect("arguments").len(), 2);
    }

    #[test]
    fn what_is_no_value_of_the_key_stays() {
        let table = adopted(
            "[vllm]\nargs = [\"--max-model-len\", \"auto\", \"--served-model-name\", \"a\", \"b\"]",
            &[],
        );
        assert_eq!(args_of(&table, "vllm").expect("arguments").len(), 5);
        let table = adopted(
            "[prefill]\nargs = [\"--max-model-len\", \"8k\"]",
            &["--max-model-len", "8k"],
        );
        assert_eq!(args_of(&table, "prefill").expect("arguments").len(), 2);
        assert_eq!(table["vllm"]["max_model_len"].as_integer(), Some(8000));
    }
}
