//! A key that identifies an engine's start across runs. PURE.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::{EngineSpec, Plan};

/// Two starts with the same key take equally long: same engine name, program, model, arguments and number of GPUs. Ports
/// and the run's folder do not matter.
///
/// The key can change between versions of xpyd: only the measured times are lost then.
pub fn start_key(plan: &Plan, spec: &EngineSpec) -> String {
    let ports: Vec<u16> = plan.ports().into_iter().map(|(port, _)| port).collect();
    let folder = plan.run_dir.display().to_string();
    let mut hasher = DefaultHasher::new();
    (spec.id.as_str(), plan.engine, &plan.model, spec.gpus.len()).hash(&mut hasher);
    for argument in &spec.argv {
        without_ports(&argument.replace(&folder, "RUN"), &ports).hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

/// `text` with a placeholder for every number in `ports`.
fn without_ports(text: &str, ports: &[u16]) -> String {
    let is_digit = |letter: char| letter.is_ascii_digit();
    let mut rest = text;
    let mut result = String::new();
    while let Some(begin) = rest.find(is_digit) {
        let (before, from) = rest.split_at(begin);
        let (number, after) = from.split_at(from.find(|letter| !is_digit(letter)).unwrap_or(from.len()));
        let is_port = number.parse().is_ok_and(|number| ports.contains(&number));
        result.push_str(before);
        result.push_str(if is_port { "PORT" } else { number });
        rest = after;
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::machine::Machine;
    use crate::plan::build;
    use crate::profile::{Override, load};

    /// The start keys of a plan's engines.
    fn keys(profile: &str, overrides: &[Override], folder: &str) -> Vec<String> {
        let profile = load(profile, overrides).expect("a profile");
        let machine = Machine::fixture(4, "0.25.1", Some("0.3.9"));
        let plan = build(&profile, &machine, Path::new(folder)).expect("a plan");
        plan.engines.iter().map(|spec| start_key(&plan, spec)).collect()
    }

    #[test]
    fn start_keys_ignore_ports_and_folders() {
        let keys_of = |overrides: &[Override]| keys("2p2d", overrides, "/logs/a");
        let known = keys_of(&[]);
        let moved = [Override::flag("--port-offset", "port_offset", 40)];
        assert_eq!(keys("2p2d", &moved, "/logs/b"), known);
        let mut unique = known.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), 4, "each engine has its own");
        for other in [
            Override::flag("--model", "model", "other"),
            Override::flag("--set", "vllm.max_model_len", 4096),
            Override::flag("--engine", "engine", "sim"),
        ] {
            assert!(keys_of(&[other]).iter().all(|key| !known.contains(key)));
        }
    }

    #[test]
    fn only_whole_numbers_are_ports() {
        assert_eq!(
            without_ports("a:7100/71001 {\"b\":7100} ü7", &[7100]),
            "a:PORT/71001 {\"b\":PORT} ü7"
        );
    }
}
