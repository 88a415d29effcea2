//! Moves engine arguments that are also keys of a profile to those keys, so that the plan reads one place. PURE.

use toml::{Table, Value};

use crate::engine::arguments;

/// An option of `vllm serve` and the key of a profile with the same meaning.
#[derive(Debug, Clone, Copy)]
struct ArgumentKey {
    option: &'static str,
    /// The key in a role's table.
    of_role: Option<&'static str>,
    /// Table and key for the engines of both roles; `None` if only roles have the key.
    of_all: Option<(&'static str, &'static str)>,
    read: fn(&str) -> Option<Value>,
}

const ARGUMENT_KEYS: [ArgumentKey; 5] = [
    ArgumentKey {
        option: "--tensor-parallel-size",
        of_role: Some("tensor_parallel"),
        of_all: None,
        read: integer,
    },
    ArgumentKey {
        option: "--gpu-memory-utilization",
        of_role: Some("gpu_memory_utilization"),
        of_all: Some(("vllm", "gpu_memory_utilization")),
        read: fraction,
    },
    ArgumentKey {
        option: "--max-model-len",
        of_role: None,
        of_all: Some(("vllm", "max_model_len")),
        read: integer,
    },
    ArgumentKey {
        option: "--served-model-name",
        of_role: None,
        of_all: Some(("", "served_model_name")),
        read: string,
    },
    ArgumentKey {
        option: "--model",
        of_role: None,
        of_all: Some(("", "model")),
        read: string,
    },
];

const ROLES: [&str; 2] = ["prefill", "decode"];

fn integer(value: &str) -> Option<Value> {
    Some(Value::Integer(i64::try_from(arguments::number(value)?).ok()?))
}

fn fraction(value: &str) -> Option<Value> {
    value.trim().parse().ok().map(Value::Float)
}

#[expect(clippy::unnecessary_wraps, reason = "as the others that read a value")]
fn string(value: &str) -> Option<Value> {
    Some(Value::String(value.to_owned()))
}

/// Moves the arguments in a merged profile. `passed` are arguments for all engines, after those of the profile.
///
/// vLLM uses the last of two values. So an argument wins over the key, an argument of a role over one of all engines, and
/// a passed argument over both. A value that the key cannot hold stays an argument.
pub(super) fn apply(profile: &mut Table, passed: &[String]) {
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
    // The first argument of `vllm serve` is the model.
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

/// Sets the keys for the `args` of this role, or of all engines, and returns the other arguments.
fn take(profile: &mut Table, args: Vec<String>, role: Option<&str>) -> Vec<String> {
    let mut taken = vec![false; args.len()];
    for given in arguments::read(&args) {
        let key = ARGUMENT_KEYS
            .iter()
            .find(|key| key.option == given.name && given.part.is_none());
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
                        // A role's own key would win over the key of all engines.
                        Some(key) => drop(table(profile, role).and_then(|table| table.remove(key))),
                        None => {}
                    }
                }
                if let Some((name, key)) = of_all {
                    set(profile, name, key, value);
                }
            }
            // The plan has one value for all engines.
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

/// The arguments in this table, if all of them are strings.
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
        apply(&mut table, &passed);
        table
    }

    #[test]
    fn options_with_a_key_set_the_key() {
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
    fn roles_win_over_all_and_passed_over_both() {
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
    fn invalid_values_stay_arguments() {
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
