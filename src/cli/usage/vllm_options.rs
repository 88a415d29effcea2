//! Options of other programs that users give to xpyd. Those of `vllm serve` go to the engines; those of docker compose have an
//! equivalent, or none.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::engine::arguments;

/// Keys of the profile that users look for among the flags, with an example value. `--logs DIR` is a flag.
const KEYS: [(&str, &str); 3] = [
    ("--port-offset", "port_offset=1000"),
    ("--max-in-flight", "proxy.max_in_flight=4096"),
    ("--restart-policy", "restart.policy=never"),
];

/// Flags of docker compose, with the commands that have them there.
const COMPOSE: &[(&[&str], &[&str], &str)] = &[
    (
        &["up"],
        &["--wait"],
        "leave it out: `xpyd up -d` returns when the fleet is ready",
    ),
    (
        &["up"],
        &["--build", "--pull", "--force-recreate", "--no-deps"],
        "leave it out: xpyd has no images or containers; `xpyd restart all` starts engines again",
    ),
    (
        &["up", "down"],
        &["--remove-orphans"],
        "leave it out: `xpyd doctor --reap` stops engine processes that a killed run left behind",
    ),
    (
        &["down"],
        &["-v", "--volumes", "--rmi"],
        "leave it out: xpyd keeps no data but logs and the cache of Hugging Face",
    ),
    (
        &["up", "plan", "doctor"],
        &["-f", "--file"],
        "`--profile FILE` names a profile",
    ),
    (
        &[""],
        &["-f", "--file"],
        "name the profile after the command: `xpyd up --profile FILE`",
    ),
    (
        &[""],
        &["--profile", "-p", "--model", "--engine", "--set", "--name"],
        "options come after the command: `xpyd up --profile 1p1d`",
    ),
];

/// Replaces clap's suggestion for an option of vLLM, because clap only knows xpyd's options.
pub(super) fn point_to_their_place(error: &mut clap::Error) {
    let unknown = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if error.kind() == ErrorKind::UnknownArgument => Some(word.clone()),
        _ => None,
    };
    let tip = unknown.and_then(|word| {
        // The command, if the option comes after it.
        let mut before = std::env::args().skip(1).take_while(|given| !given.starts_with(&word));
        let verb = before.find(|given| !given.starts_with('-'));
        tip(&word, verb.as_deref().unwrap_or_default())
    });
    if let Some(tip) = tip {
        for kind in [
            ContextKind::SuggestedArg,
            ContextKind::SuggestedSubcommand,
            ContextKind::SuggestedValue,
        ] {
            error.remove(kind);
        }
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
}

/// The replacement for an option of vLLM, or for a key of a profile. Commands other than these start no engines.
fn tip(word: &str, verb: &str) -> Option<String> {
    let flag = word.split('=').next().unwrap_or_default();
    let compose = COMPOSE
        .iter()
        .find(|(verbs, flags, _)| verbs.contains(&verb) && flags.contains(&flag));
    if let Some((_, _, tip)) = compose {
        return Some((*tip).to_owned());
    }
    if !["", "up", "plan", "doctor", "bench"].contains(&verb) {
        return None;
    }
    if word == "-t" {
        return Some("set the GPUs of each engine with `--tp 2`".to_owned());
    }
    let name = word.split('=').next().unwrap_or_default().replace('_', "-");
    if name == "--config" {
        return Some(
            "`--profile FILE` names a profile of xpyd. The options of a vLLM config file go into `vllm.args` of a profile, or \
             after `--`"
                .to_owned(),
        );
    }
    if name == "--gpus" {
        return Some("choose GPUs for each role: `--set prefill.gpus=[0] --set decode.gpus=[1]`".to_owned());
    }
    if let Some((_, key)) = KEYS.iter().find(|(flag, _)| *flag == name) {
        return Some(format!("it is a key of the profile: `--set {key}`"));
    }
    let args = [name];
    let given = arguments::read(&args);
    let is_vllms = given
        .first()
        .is_some_and(|given| given.name == args[0] && !given.fits.is_empty());
    is_vllms.then(|| {
        format!(
            "`{}` is an option of vLLM: pass it to all engines after `--`, as in `xpyd up 2p2d -- {} …`; or in \
             `vllm.args`, `prefill.args` or `decode.args` of a profile",
            args[0], args[0]
        )
    })
}

#[cfg(test)]
mod tests {
    use super::tip;

    #[test]
    fn only_vllm_options_get_a_hint() {
        for option in ["--max-model-len", "--max_num_seqs", "--enforce-eager", "--dtype=half"] {
            assert!(
                tip(option, "up").is_some_and(|tip| tip.contains("after `--`")),
                "{option}"
            );
        }
        assert_eq!(tip("--enigne", "up"), None);
        assert!(tip("--gpus", "up").is_some_and(|tip| tip.contains("prefill.gpus")));
        assert!(tip("--port-offset", "up").is_some_and(|tip| tip.contains("`--set port_offset=1000`")));
        for (_, set) in super::KEYS {
            let set = crate::profile::Override::parse(set).expect("an override");
            assert!(
                crate::profile::load("1p1d", std::slice::from_ref(&set)).is_ok(),
                "{set:?}"
            );
        }
        assert!(tip("-t", "plan").is_some_and(|tip| tip.contains("--tp 2")));
        for (option, verb, words) in [
            ("--config", "up", "`vllm.args`"),
            ("--wait", "up", "`xpyd up -d`"),
            ("--volumes", "down", "leave it out"),
            ("-f", "up", "`--profile FILE`"),
            ("-f", "", "after the command"),
            ("--profile", "", "`xpyd up --profile 1p1d`"),
        ] {
            assert!(
                tip(option, verb).is_some_and(|tip| tip.contains(words)),
                "{option} {verb}"
            );
        }
        // `--all` is a prefix of vLLM options, and `-a` is a prefix of all.
        for (option, verb) in [("-a", "ps"), ("-p", "logs"), ("--all", "down")] {
            assert_eq!(tip(option, verb), None, "{option} {verb}");
        }
    }
}
