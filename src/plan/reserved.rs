//! Options and variables that xpyd sets itself, found in a profile. The engine would get them twice and use the last one,
//! while the rest of xpyd follows the plan. PURE.

use serde::Serialize;

use crate::connector::Connector;
use crate::engine::arguments;
use crate::fleet::Role;
use crate::profile::{Profile, RoleProfile};

/// One argument or variable that a profile must not set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReservedOption {
    /// The option and its place: "`--port` in `prefill.args`".
    pub given: String,
    /// The reason, as the rest of the sentence.
    pub why: String,
    /// What to do instead.
    pub instead: String,
    /// Whether a run cannot work with it; otherwise the given value is used.
    pub is_fatal: bool,
}

/// Names, the reason, and the key of a profile that replaces them. `{role}` stands for the role if only one has it.
type ReservedNames = (&'static [&'static str], &'static str, &'static str);

const OPTIONS: &[ReservedNames] = &[
    (
        &["--port", "--grpc-port"],
        "xpyd gives every engine its own port",
        "`{role}.port`, the port of the first engine of the role; for clients: `--port` (`proxy.port`)",
    ),
    (
        &["--host", "--uds", "--grpc"],
        "engines listen on loopback only, for xpyd",
        "remove it; `--host` (`proxy.host`) is the address for clients",
    ),
    (
        &[
            "--ssl-keyfile",
            "--ssl-certfile",
            "--ssl-ca-certs",
            "--ssl-cert-reqs",
            "--ssl-ciphers",
            "--enable-ssl-refresh",
        ],
        "xpyd uses plain HTTP to engines, on loopback",
        "`--tls-cert` and `--tls-key` (`proxy.clients.tls_cert`, `tls_key`) for TLS to clients",
    ),
    (
        &["--headless", "--nnodes", "--node-rank", "--master-addr"],
        "every engine is one server on this machine",
        "remove it; `xpyd proxy` serves engines on other machines",
    ),
    (
        &[
            "--data-parallel-rank",
            "--data-parallel-start-rank",
            "--data-parallel-size-local",
            "--data-parallel-address",
            "--data-parallel-external-lb",
            "--data-parallel-hybrid-lb",
            "--data-parallel-multi-port-external-lb",
            "--data-parallel-supervisor-port",
        ],
        "all ranks of an engine run on this machine, behind one port",
        "`--data-parallel-size` alone, or more engines: `{role}.count`",
    ),
    (
        &["--served-model-name"],
        "all engines serve one model with one name",
        "`served_model_name = \"…\"`, a single name",
    ),
    (
        &["--model"],
        "all engines serve the same model",
        "`model = \"…\"`, or `--model`",
    ),
    (
        &["--max-model-len"],
        "both roles must accept prompts of the same length",
        "`vllm.max_model_len`, a whole number of tokens, for both roles",
    ),
    (
        &["--tensor-parallel-size"],
        "xpyd plans GPUs and ports with it",
        "`{role}.tensor_parallel`, a whole number",
    ),
    (
        &["--gpu-memory-utilization"],
        "xpyd plans GPUs with it",
        "`{role}.gpu_memory_utilization`, a number above 0 and up to 1",
    ),
    (
        &[
            "--kv-transfer-config",
            "--kv-offloading-size",
            "--kv-offloading-backend",
        ],
        "xpyd configures the KV transfer itself",
        "`connector`: \"nixl\", \"lmcache\", \"lmcache-mp\" (which also caches KV in host memory: \
         `lmcache_mp.l1_size`) or \"auto\"",
    ),
    (
        &["--device-ids"],
        "xpyd chooses the GPUs of every engine",
        "`{role}.gpus = [0, 1]`",
    ),
    (
        &["--shutdown-timeout"],
        "xpyd sets the time limit for the stop of an engine",
        "`deadlines.stop`",
    ),
    (
        &["--config"],
        "xpyd does not read that file, which can have options that xpyd sets itself",
        "write its options into `{role}.args`, and the model, names, ports and sizes into the profile's own keys",
    ),
    (
        &["--disable-log-stats"],
        "without metrics, xpyd can neither detect a hung engine nor verify KV transfers",
        "take it out",
    ),
];

/// As [`OPTIONS`], for variables. A name that ends in `*` is a prefix.
const VARIABLES: &[ReservedNames] = &[
    (
        &["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"],
        "xpyd chooses the GPUs of every engine",
        "`{role}.gpus = [0, 1]`; or set CUDA_VISIBLE_DEVICES for xpyd itself, which stays within it",
    ),
    (
        &["VLLM_PORT"],
        "xpyd gives each engine its own ports",
        "remove it; `port_offset` moves all ports",
    ),
    (
        &["VLLM_NIXL_SIDE_CHANNEL_*"],
        "xpyd gives each engine its own side channel",
        "`nixl.prefill_side_channel_port` and `nixl.decode_side_channel_port`",
    ),
    (
        &["VLLM_DP_*"],
        "all ranks of an engine run on this machine, and xpyd counts them",
        "`--data-parallel-size` in `{role}.args`",
    ),
    (
        &[
            "LMCACHE_CONFIG_FILE",
            "LMCACHE_ENABLE_PD",
            "LMCACHE_PD_*",
            "LMCACHE_TRANSFER_CHANNEL",
        ],
        "xpyd writes the configuration of LMCache",
        "the keys of `[lmcache]` and `[lmcache_mp]`",
    ),
];

/// Variables that xpyd sets, but that can also have another value.
const TIMEOUTS: &[ReservedNames] = &[
    (
        &["VLLM_ENGINE_READY_TIMEOUT_S"],
        "vLLM gives up a start after this time, in addition to xpyd's own deadline",
        "`deadlines.ready`",
    ),
    (
        &["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"],
        "vLLM gives up a step after this time, in addition to xpyd's own deadline",
        "`deadlines.stall`",
    ),
    (
        &["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"],
        "vLLM ends its workers after this time, in addition to xpyd's own deadline",
        "`deadlines.stop`",
    ),
];

/// A reserved name in a profile, its place, and its entry.
struct ReservedUse<'profile> {
    name: &'profile str,
    role: Option<Role>,
    list: &'static str,
    owned: &'static ReservedNames,
    is_fatal: bool,
}

/// All reserved options and variables in the profile.
pub(super) fn objections(profile: &Profile, connector: &Connector) -> Vec<ReservedOption> {
    let tables = [
        (None, &profile.vllm.args, &profile.vllm.env),
        (Some(Role::Prefill), &profile.prefill.args, &profile.prefill.env),
        (Some(Role::Decode), &profile.decode.args, &profile.decode.env),
    ];
    let mut found: Vec<ReservedUse<'_>> = Vec::new();
    for (role, args, env) in tables {
        for given in arguments::read(args) {
            let fits = |(names, ..): &&ReservedNames| given.fits.iter().any(|name| names.contains(name));
            found.extend(OPTIONS.iter().find(fits).map(|owned| ReservedUse {
                name: given.spelled,
                role,
                list: "args",
                owned,
                is_fatal: true,
            }));
        }
        for name in env.keys() {
            let fits = |(names, ..): &&ReservedNames| names.iter().any(|known| is_named(name, known));
            let decided = VARIABLES.iter().find(fits).map(|owned| (owned, true));
            let decided = decided.or_else(|| TIMEOUTS.iter().find(fits).map(|owned| (owned, false)));
            found.extend(decided.map(|(owned, is_fatal)| ReservedUse {
                name,
                role,
                list: "env",
                owned,
                is_fatal,
            }));
        }
    }
    let mut objections: Vec<ReservedOption> = Vec::new();
    for one in &found {
        // What both roles set is reported once, like the arguments after `--`.
        let is_of = |role| {
            let is_it =
                |other: &ReservedUse<'_>| (other.name, other.list, other.role) == (one.name, one.list, Some(role));
            found.iter().any(is_it)
        };
        let is_of_both = one.role.is_some() && is_of(Role::Prefill) && is_of(Role::Decode);
        let objection = objection(one, is_of_both);
        if !objections.contains(&objection) {
            objections.push(objection);
        }
    }
    if connector.notifies() {
        objections.extend(in_one_step(profile));
    }
    objections
}

fn objection(found: &ReservedUse<'_>, is_of_both: bool) -> ReservedOption {
    let ReservedUse { name, list, .. } = found;
    let (_, why, instead) = found.owned;
    let (place, instead) = match found.role {
        _ if is_of_both => (format!("`prefill.{list}` and `decode.{list}`"), for_both(instead)),
        None => (format!("`vllm.{list}`"), for_both(instead)),
        Some(Role::Prefill) => (format!("`prefill.{list}`"), instead.replace("{role}", "prefill")),
        Some(Role::Decode) => (format!("`decode.{list}`"), instead.replace("{role}", "decode")),
    };
    ReservedOption {
        given: format!("`{name}` in {place}"),
        why: (*why).to_owned(),
        instead,
        is_fatal: found.is_fatal,
    }
}

/// A hint that names the keys of both roles.
fn for_both(instead: &str) -> String {
    let mut text = String::new();
    let mut rest = instead;
    while let Some((before, after)) = rest.split_once("`{role}") {
        let (key, after) = after.split_once('`').unwrap_or((after, ""));
        text += before;
        text += &["`prefill", key, "` and `decode", key, "`"].concat();
        rest = after;
    }
    text + rest
}

fn is_named(name: &str, known: &str) -> bool {
    match known.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == known,
    }
}

/// LMCache transfers only what one scheduler step prefills, so its prefill engines need one step for the whole prompt.
fn in_one_step(profile: &Profile) -> Vec<ReservedOption> {
    let of = |role: &RoleProfile| [profile.vllm.args.clone(), role.args.clone()].concat();
    let args = of(&profile.prefill);
    let given = arguments::read(&args);
    let last = |name: &str| given.iter().rfind(|given| given.name == name);
    let chunked = last("--enable-chunked-prefill").filter(|given| !given.is_off());
    let batch = last("--max-num-batched-tokens").filter(|given| {
        let tokens = given.value().and_then(arguments::number);
        tokens.is_none_or(|tokens| {
            profile
                .vllm
                .max_model_len
                .is_none_or(|longest| tokens < u64::from(longest))
        })
    });
    let objection = |given: &arguments::GivenOption<'_>| ReservedOption {
        given: format!("`{}` for prefill engines", given.spelled),
        why: "LMCache only transfers the KV of one step, so prefill engines need one step for a whole \
            prompt"
            .to_owned(),
        instead: "set it only in `decode.args`, or set `vllm.max_model_len`, which is the size of a step; or use \
            `--connector nixl`"
            .to_owned(),
        is_fatal: true,
    };
    [chunked, batch].into_iter().flatten().map(objection).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::machine::Machine;
    use crate::plan::build;
    use crate::profile::{Override, load};

    fn objections_to(set: &str) -> Vec<ReservedOption> {
        let set = Override::parse(set).expect("an override");
        let profile = load("1p1d", &[set]).expect("a profile");
        let machine = Machine::fixture(8, "0.32.0", None);
        build(&profile, &machine, Path::new("/run")).expect("a plan").objections
    }

    #[test]
    fn reserved_options_are_refused_in_any_spelling() {
        for args in [
            r#""--port", "1""#,
            r#""--port=1""#,
            r#""--host", "0.0.0.0""#,
            r#""--uds", "/s""#,
            r#""--ssl_keyfile=/k""#,
            r#""--ssl-cert", "/c""#,
            r#""--served_model", "a", "b""#,
            r#""--kv-transfer-config", "{}""#,
            r#""--kv_transfer_config.kv_role", "kv_both""#,
            r#""--kv-offloading-size", "4""#,
            r#""--headless""#,
            r#""--grpc""#,
            r#""--config", "/c.yaml""#,
            r#""--device-ids", "0""#,
            r#""--shutdown-timeout", "600""#,
            r#""--max-model-len", "auto""#,
            r#""-tp", "two""#,
            r#""-dpn", "1""#,
            r#""-n", "2""#,
            r#""--disable-log-stats""#,
            r#""--disable-log-st""#,
        ] {
            for table in ["vllm", "prefill", "decode"] {
                let found = objections_to(&format!("{table}.args=[{args}]"));
                assert!(found.iter().any(|found| found.is_fatal), "{table} {args}: {found:?}");
                assert!(!found[0].instead.contains("{role}"), "{found:?}");
            }
        }
        for variable in [
            "VLLM_PORT",
            "VLLM_DP_SIZE",
            "VLLM_NIXL_SIDE_CHANNEL_PORT",
            "CUDA_VISIBLE_DEVICES",
            "LMCACHE_CONFIG_FILE",
        ] {
            let found = objections_to(&format!("decode.env.{variable}=1"));
            assert!(found[0].is_fatal && found[0].given.contains(variable), "{found:?}");
        }
        assert!(!objections_to("vllm.env.VLLM_ENGINE_READY_TIMEOUT_S=1")[0].is_fatal);
    }

    #[test]
    fn other_options_are_accepted() {
        for set in [
            r#"vllm.args=["--max-num-seqs", "128", "--data-parallel-size", "2", "--api-key", "k", "--enable-log-requests"]"#,
            r#"vllm.args=["-tp", "2", "--max-model-len", "8k", "--gpu-memory-utilization=0.5", "--served-model-name", "x"]"#,
            r#"vllm.env={HF_HUB_OFFLINE="0", UCX_TLS="all", VLLM_API_KEY="k", PYTHONHASHSEED="1"}"#,
        ] {
            assert_eq!(objections_to(set), [], "{set}");
        }
    }

    #[test]
    fn an_option_of_both_roles_is_reported_once() {
        let args: Vec<String> = ["--host", "0.0.0.0"].map(str::to_owned).into();
        let profile = crate::profile::load_with("1p1d", &[], &args).expect("a profile");
        let plan = build(&profile, &Machine::fixture(8, "0.32.0", None), Path::new("/run")).expect("a plan");
        let [found] = &plan.objections[..] else {
            panic!("{:?}", plan.objections);
        };
        assert_eq!(found.given, "`--host` in `prefill.args` and `decode.args`");
    }

    #[test]
    fn hints_name_the_key_of_the_role() {
        let hint = |table: &str| {
            objections_to(&format!("{table}.args=[\"--port\", \"1\"]"))[0]
                .instead
                .clone()
        };
        assert!(
            hint("decode").starts_with("`decode.port`, the port of"),
            "{}",
            hint("decode")
        );
        assert!(
            hint("vllm").starts_with("`prefill.port` and `decode.port`, the port of"),
            "{}",
            hint("vllm")
        );
    }
}
