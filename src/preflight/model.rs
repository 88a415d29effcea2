//! Checks that the model is on this machine, or can be downloaded and fits on the disk.

use super::{Finding, Level, finding};
use crate::machine::huggingface::{CacheState, Hub, Identity, LeftoverKind, RepositoryAccess, is_repository};
use crate::machine::{HuggingFace, Machine};
use crate::plan::Plan;

/// Prefixes of repositories that need a token and an accepted licence, for when the hub cannot be asked.
const GATED: &[&str] = &["meta-llama/", "google/gemma", "mistralai/Mixtral-8x22B", "CohereForAI/"];

/// The page on which users create tokens.
const TOKENS: &str = "https://huggingface.co/settings/tokens";

/// A clock that is off by more than this can make certificates look invalid.
const CLOCK_SECONDS: i64 = 300;

pub(super) fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let facts = &machine.hugging_face;
    let model = &plan.model;
    let mut findings = match &facts.model.state {
        CacheState::Folder => vec![pass("model", format!("`{model}` is a folder on this machine"))],
        CacheState::Complete => vec![
            pass("model", format!("`{model}` is on this machine")),
            pass("hf_access", "not asked: the model is in the cache".to_owned()),
        ],
        CacheState::GgufFile => {
            let hint = "vLLM recommends the tokenizer of the original model: `-- --tokenizer ORG/NAME`";
            let message =
                format!("`{model}` is a GGUF file on this machine: only the engine can check whether it fits");
            vec![finding("model", Level::Warn, message, Some(hint))]
        }
        CacheState::Elsewhere { what } => {
            let hint = "each engine downloads it itself; the logs show the progress";
            let message = format!("`{model}` {what}: only the engine can check whether it exists and fits");
            vec![finding("model", Level::Warn, message, Some(hint))]
        }
        CacheState::BadFolder { problem } => {
            let message = format!("`{model}` {problem}");
            vec![finding("model", Level::Fail, message, Some(&suggestion(model)))]
        }
        CacheState::Partial { missing } => to_fetch(plan, facts, Some(missing)),
        CacheState::Absent | CacheState::None => to_fetch(plan, facts, None),
    };
    findings.extend(leftovers(facts));
    findings.extend(clock(&facts.hub));
    findings
}

/// A hint for a name that is neither a folder nor a repository.
fn suggestion(model: &str) -> String {
    match model.split_once('@') {
        Some((name, revision)) if is_repository(name) => {
            return format!(
                "give the revision as an argument: `--model {name}`, and `--revision {revision}` in \
                `vllm.args`"
            );
        }
        _ => {}
    }
    let page = model.split_once("://").and_then(|(_, rest)| rest.split_once('/'));
    if let Some((_, name)) = page.filter(|(_, name)| is_repository(name)) {
        return format!("name only the repository: `--model {name}`");
    }
    if model.starts_with('~') {
        return "a shell replaces `~` only at the beginning of a word: write the whole path".to_owned();
    }
    "check the path given as `model`, or name a repository of Hugging Face: `--model org/name`".to_owned()
}

/// The token, without a model.
pub(super) fn overview(machine: &Machine) -> Vec<Finding> {
    let facts = &machine.hugging_face;
    let mut findings = vec![pass("hf_cache", cache(facts))];
    findings.extend(match &facts.token {
        None => Some(pass(
            "hf_token",
            "no token; only gated and private models need one".to_owned(),
        )),
        Some(_) => token(facts, false),
    });
    findings.extend(clock(&facts.hub));
    findings
}

fn cache(facts: &HuggingFace) -> String {
    let free = facts.free_bytes.map(|free| format!(", {} free", gibibytes(free)));
    format!("{}{}", facts.cache.display(), free.unwrap_or_default())
}

fn pass(check: &'static str, message: String) -> Finding {
    finding(check, Level::Pass, message, None)
}

/// A number of bytes for people.
pub fn gibibytes(bytes: u64) -> String {
    const GIB: f64 = 1_073_741_824.0;
    const MIB: f64 = 1_048_576.0;
    let bytes = bytes as f64;
    if bytes >= GIB {
        format!("{:.1} GiB", bytes / GIB)
    } else if bytes >= MIB {
        format!("{:.1} MiB", bytes / MIB)
    } else {
        format!("{:.1} KiB", bytes / 1024.0)
    }
}

/// Findings about a model that is missing or incomplete.
fn to_fetch(plan: &Plan, facts: &HuggingFace, missing: Option<&Vec<String>>) -> Vec<Finding> {
    let model = &plan.model;
    let part = missing.map(|missing| {
        let shown: Vec<&str> = missing.iter().take(3).map(String::as_str).collect();
        let more = missing.len().saturating_sub(shown.len());
        let more = if more == 0 {
            String::new()
        } else {
            format!(" and {more} more")
        };
        format!("the cached copy of `{model}` lacks {}{more}", shown.join(", "))
    });
    let absent = part.unwrap_or_else(|| format!("`{model}` is not cached"));
    let mut findings = Vec::new();
    match &facts.hub {
        Hub::NotAsked(reason) => {
            let hint = format!(
                "`HF_HUB_OFFLINE=0 xpyd up …` downloads it; or copy its folder into {}",
                facts.cache.display()
            );
            let message = format!("{absent}, and downloads are off: {reason}");
            findings.push(finding("model", Level::Fail, message, Some(&hint)));
        }
        Hub::Unreachable(reason) => {
            findings.extend(gated_by_name(plan, facts, &absent));
            let message = format!("{absent}, and the hub cannot be reached: {reason}");
            let hint = "check the network, HTTPS_PROXY and HF_ENDPOINT; a cached model needs no hub";
            findings.push(finding("hf_access", Level::Warn, message, Some(hint)));
        }
        Hub::Answered(answered) => {
            findings.extend(token(facts, true));
            let answer = answered.model.as_ref();
            findings.extend(answer.map(|answer| access(plan, facts, answer, &absent)));
        }
    }
    findings
}

/// The hub's answer about the token.
fn token(facts: &HuggingFace, is_needed: bool) -> Option<Finding> {
    let token = facts.token.as_ref()?;
    let source = &token.source;
    let Hub::Answered(answered) = &facts.hub else {
        let message = match &facts.hub {
            Hub::NotAsked(reason) => format!("found in {source}; not checked: {reason}"),
            Hub::Unreachable(reason) => format!("found in {source}; not checked: {reason}"),
            Hub::Answered(_) => return None,
        };
        return Some(pass("hf_token", message));
    };
    match &answered.identity {
        Some(Identity::User(name)) => Some(pass("hf_token", format!("the token in {source} is of account {name}"))),
        Some(Identity::Invalid) => {
            let form = if token.well_formed {
                ""
            } else {
                ", and it does not have the form `hf_…`"
            };
            let message =
                format!("Hugging Face does not accept the token in {source}: it is wrong, expired or revoked{form}");
            let hint =
                format!("create one at {TOKENS}, then `export HF_TOKEN=hf_…` or `hf auth login`; or `unset HF_TOKEN`");
            let level = if is_needed { Level::Fail } else { Level::Warn };
            Some(finding("hf_token", level, message, Some(&hint)))
        }
        None => None,
    }
}

/// Whether the repository can be downloaded, and fits on the disk.
fn access(plan: &Plan, facts: &HuggingFace, answer: &RepositoryAccess, absent: &str) -> Finding {
    let model = &plan.model;
    let page = format!("{}/{model}", facts.endpoint);
    match answer {
        RepositoryAccess::Open { bytes } => room(plan, facts, *bytes, absent),
        RepositoryAccess::Gated { with_token: true } => {
            let message = format!("{absent}, and its licence is not accepted by this token's account");
            let hint = format!(
                "accept it at {page}; a fine-grained token also needs the right to read public gated repositories, at {TOKENS}"
            );
            finding("hf_access", Level::Fail, message, Some(&hint))
        }
        RepositoryAccess::Gated { with_token: false } => {
            let message = format!("{absent} and is gated, and there is no Hugging Face token");
            let hint = format!("accept the licence at {page}, then `export HF_TOKEN=hf_…` (or `hf auth login`)");
            finding("hf_access", Level::Fail, message, Some(&hint))
        }
        RepositoryAccess::BadToken => {
            let message = format!("{absent}, and Hugging Face does not accept the token");
            let hint = format!(
                "create one at {TOKENS}, then `export HF_TOKEN=hf_…`; a public model needs none: `unset HF_TOKEN`"
            );
            finding("hf_access", Level::Fail, message, Some(&hint))
        }
        RepositoryAccess::NotFound { with_token } => {
            let or = if *with_token {
                "or this token cannot see it"
            } else {
                "or it is private and there is no token"
            };
            let message = format!("there is no model `{model}` on {}, {or}", facts.endpoint);
            let hint = match facts.similar.first() {
                Some(close) => format!(
                    "did you mean `{}`, which is cached? `--model {close}`",
                    facts.similar.join("` or `")
                ),
                None => format!("check the name at {page}; for a private model, `export HF_TOKEN=hf_…`"),
            };
            finding("hf_access", Level::Fail, message, Some(&hint))
        }
        RepositoryAccess::NoRevision => {
            let message = format!("`{model}` has no such branch, tag or commit");
            let hint = format!("{page}/tree/main shows them; `--revision` is in `vllm.args`");
            finding("hf_access", Level::Fail, message, Some(&hint))
        }
        RepositoryAccess::RateLimited => {
            let message = format!("{absent}, and Hugging Face limits the requests from this address");
            let hint = "wait some minutes; with a token (`hf auth login`) the limit is higher";
            finding("hf_access", Level::Warn, message, Some(hint))
        }
        RepositoryAccess::Failed(reason) => {
            let message = format!("{absent}, and the hub answers with {reason}");
            let hint = "https://status.huggingface.co shows the state of the hub";
            finding("hf_access", Level::Warn, message, Some(hint))
        }
    }
}

fn room(plan: &Plan, facts: &HuggingFace, bytes: Option<u64>, absent: &str) -> Finding {
    let who = if plan.fetch.is_some() {
        "xpyd downloads"
    } else {
        "each engine downloads"
    };
    let size = bytes
        .map(|bytes| format!(" ({})", gibibytes(bytes)))
        .unwrap_or_default();
    match (bytes, facts.free_bytes) {
        (Some(bytes), Some(free)) if free < bytes => {
            let message = format!(
                "{absent}; it needs {}, but {} are free in {}",
                gibibytes(bytes),
                gibibytes(free),
                facts.cache.display()
            );
            let hint =
                "`hf cache ls` shows what is there and `hf cache rm` removes it; or `export HF_HOME=/a/larger/disk`";
            finding("disk", Level::Fail, message, Some(hint))
        }
        _ => pass("hf_access", format!("{absent}; {who} it before the start{size}")),
    }
}

/// Findings without the hub.
fn gated_by_name(plan: &Plan, facts: &HuggingFace, absent: &str) -> Option<Finding> {
    let model = &plan.model;
    let is_gated = GATED.iter().any(|prefix| model.starts_with(prefix));
    let message = match &facts.token {
        None if is_gated => format!("{absent} and is gated, and there is no Hugging Face token"),
        Some(token) if is_gated && !token.well_formed => {
            format!(
                "the token in {} does not have the form `hf_…`, and `{model}` is gated",
                token.source
            )
        }
        None | Some(_) => return None,
    };
    let hint = format!(
        "accept the licence at {}/{model}, then `export HF_TOKEN=hf_…` (or `hf auth login`)",
        facts.endpoint
    );
    Some(finding("hf_token", Level::Fail, message, Some(&hint)))
}

/// Remains of downloads of this model.
fn leftovers(facts: &HuggingFace) -> Vec<Finding> {
    let of = |kind: LeftoverKind| facts.leftovers.iter().filter(move |leftover| leftover.kind == kind);
    let bytes: u64 = of(LeftoverKind::DeadPart).map(|leftover| leftover.bytes).sum();
    let (parts, stale) = (of(LeftoverKind::DeadPart).count(), of(LeftoverKind::StaleLock).count());
    let mut findings = Vec::new();
    if let Some(held) = of(LeftoverKind::HeldLock).next() {
        let message = format!(
            "another process is downloading this model; it has locked {}",
            held.path.display()
        );
        let hint = "`up` waits for it; `fuser` on that file names the process";
        findings.push(finding("hf_locks", Level::Warn, message, Some(hint)));
    }
    if parts + stale > 0 {
        let message = format!(
            "interrupted downloads left {stale} locks and {parts} unusable parts ({})",
            gibibytes(bytes)
        );
        findings.push(finding(
            "hf_locks",
            Level::Warn,
            message,
            Some("`xpyd doctor --profile … --fix` removes them"),
        ));
    }
    findings
}

fn clock(hub: &Hub) -> Option<Finding> {
    let Hub::Answered(answered) = hub else {
        return None;
    };
    let ahead = answered.clock_ahead_seconds?;
    if ahead.abs() <= CLOCK_SECONDS {
        return Some(pass("clock", "agrees with the hub's".to_owned()));
    }
    let way = if ahead > 0 { "ahead of" } else { "behind" };
    let message = format!(
        "this clock is {} s {way} the hub's: tokens and certificates can be refused",
        ahead.abs()
    );
    Some(finding(
        "clock",
        Level::Warn,
        message,
        Some("`timedatectl set-ntp true`"),
    ))
}
