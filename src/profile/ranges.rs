//! The ranges of a profile's values. PURE.

use super::{Profile, ProfileError};
use crate::fleet::MAX_ENGINES_PER_ROLE;

/// Tensor-parallel ranks of one engine.
pub(super) const MOST_RANKS: u16 = 64;

/// More threads than the proxy can use on any machine.
const MOST_THREADS: usize = 1024;

/// Checks the values that their types cannot check.
pub(super) fn check(profile: &Profile) -> Result<(), ProfileError> {
    let fail = |key: String, problem: &str| {
        Err(ProfileError::OutOfRange {
            name: profile.name.clone(),
            key,
            problem: problem.to_owned(),
        })
    };
    for (table, role) in [("prefill", &profile.prefill), ("decode", &profile.decode)] {
        for (key, value, most) in [
            ("count", role.count, MAX_ENGINES_PER_ROLE),
            ("tensor_parallel", role.tensor_parallel, MOST_RANKS),
        ] {
            if !(1..=most).contains(&value) {
                return fail(format!("{table}.{key}"), &format!("must be between 1 and {most}"));
            }
        }
        let ranks = profile.ranks(role).total();
        let needed = usize::from(role.count) * ranks;
        if !role.gpus.is_empty() && role.gpus.len() != needed {
            let (count, gpus) = (role.count, role.gpus.len());
            let engines = if count == 1 { "engine" } else { "engines" };
            let problem = format!("lists {gpus} GPUs, but {count} {engines} over {ranks} each need {needed}");
            return fail(format!("{table}.gpus"), &problem);
        }
    }
    if let Some((key, problem)) = unusable_port(profile).or_else(|| unusable_text(profile)) {
        return fail(key, problem);
    }
    if profile.model.trim().is_empty() {
        return fail("model".to_owned(), "is empty");
    }
    if profile.proxy.max_in_flight == 0 {
        return fail("proxy.max_in_flight".to_owned(), "must be at least 1");
    }
    if let Some(key) = zero(profile) {
        return fail(key.to_owned(), "must be more than 0");
    }
    let threads = profile.proxy.clients.threads;
    if threads.is_some_and(|threads| threads > MOST_THREADS) {
        let problem = format!("must be at most {MOST_THREADS}");
        return fail("proxy.clients.threads".to_owned(), &problem);
    }
    let shortest = profile.deadlines.kv_lease();
    if profile.nixl.lease.is_some_and(|lease| lease < shortest) {
        let problem = format!(
            "must be at least {} with these deadlines, or a request can read KV of another request; remove it, or \
             shorten `deadlines.prefill`, `deadlines.decode_idle` or `deadlines.stall`",
            humantime::format_duration(shortest)
        );
        return fail("nixl.lease".to_owned(), &problem);
    }
    Ok(())
}

/// The first duration or number that is 0 but must not be.
fn zero(profile: &Profile) -> Option<&'static str> {
    let (deadlines, clients) = (&profile.deadlines, &profile.proxy.clients);
    let spans = [
        ("deadlines.ready", deadlines.ready),
        ("deadlines.start_stall", deadlines.start_stall),
        ("deadlines.prefill", deadlines.prefill),
        ("deadlines.handoff", deadlines.handoff),
        ("deadlines.decode_idle", deadlines.decode_idle),
        ("deadlines.stall", deadlines.stall),
        ("proxy.clients.head_deadline", clients.head_deadline),
    ];
    let counts = [
        ("proxy.max_body", profile.proxy.max_body),
        ("proxy.clients.max_connections", clients.max_connections),
        ("proxy.clients.threads", clients.threads.unwrap_or(1)),
        ("proxy.clients.max_per_address", clients.max_per_address.unwrap_or(1)),
    ];
    let spans = spans.into_iter().filter(|(_, span)| span.is_zero()).map(|(key, _)| key);
    let counts = counts.into_iter().filter(|(_, count)| *count == 0).map(|(key, _)| key);
    spans.chain(counts).next()
}

/// A port that is 0 but is the first of a range. The proxy's port can be 0: the kernel then chooses one.
fn unusable_port(profile: &Profile) -> Option<(String, &'static str)> {
    let ports = [
        ("prefill.port", profile.prefill.port),
        ("decode.port", profile.decode.port),
        ("nixl.prefill_side_channel_port", profile.nixl.prefill_side_channel_port),
        ("nixl.decode_side_channel_port", profile.nixl.decode_side_channel_port),
        ("lmcache.init_port", profile.lmcache.init_port),
        ("lmcache.alloc_port", profile.lmcache.alloc_port),
        ("lmcache.notify_port", profile.lmcache.notify_port),
        ("lmcache_mp.port", profile.lmcache_mp.port),
        ("lmcache_mp.http_port", profile.lmcache_mp.http_port),
    ];
    let found = ports.into_iter().find(|(_, port)| *port == 0);
    found.map(|(key, _)| {
        (
            key.to_owned(),
            "must not be 0: other processes must know the port before it is opened",
        )
    })
}

/// A string that cannot be passed to a process.
fn unusable_text(profile: &Profile) -> Option<(String, &'static str)> {
    const NUL: &str = "contains a NUL character, which cannot be passed to a process";
    let tables = [
        ("vllm", &profile.vllm.args, &profile.vllm.env),
        ("prefill", &profile.prefill.args, &profile.prefill.env),
        ("decode", &profile.decode.args, &profile.decode.env),
    ];
    for (table, args, env) in tables {
        if args.iter().any(|word| word.contains('\0')) {
            return Some((format!("{table}.args"), NUL));
        }
        for (name, value) in env {
            let key = || format!("{table}.env.{}", name.escape_debug());
            if name.is_empty() || name.contains('=') {
                return Some((key(), "is not a variable name: it is empty or contains `=`"));
            }
            if name.contains('\0') || value.contains('\0') {
                return Some((key(), NUL));
            }
        }
    }
    let texts = [
        ("model", &profile.model),
        ("served_model_name", &profile.served_model_name),
        ("vllm.program", &profile.vllm.program),
        ("sim.preset", &profile.sim.preset),
        ("proxy.host", &profile.proxy.host),
    ];
    let found = texts.into_iter().find(|(_, text)| text.contains('\0'));
    found.map(|(key, _)| (key.to_owned(), NUL))
}
