//! The routes of vLLM's server (0.32 and 0.33), and what becomes of each: handed over, passed to a decode engine, or refused.
//!
//! Pure. One rule for every route, so that nothing reaches an engine that was not thought about.

use crate::proxy::body::serving_mode::Kind;

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    /// As axum spells paths: `{name}` is one part, `{*rest}` all that follow. Also the metrics' label.
    pub(crate) path: &'static str,
    pub(crate) methods: Methods,
    pub(crate) course: Course,
}

/// The methods that a route takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Methods {
    Get,
    Post,
    Both,
}

/// What becomes of a route's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Course {
    /// A generation: prefill and decode, by the rules of its fields.
    Generate(Kind),
    /// The proxy answers.
    Health,
    /// The proxy's own metrics.
    Metrics,
    /// The engines' version.
    Version,
    /// A decode engine answers alone, and its answer is passed on as it comes.
    Pass,
    /// No engine sees it, and why.
    Refuse(&'static str),
}

const STEERS: &str = "it steers a single engine behind the proxy's back; use xpyd's control socket";
const TELLS: &str = "it tells of a single engine and not of the fleet; see `xpyd status`";
const HIDES: &str = "its body can hide KV transfer parameters from the proxy";
const NO_HTTP: &str = "the proxy speaks HTTP only";

const fn rule(methods: Methods, path: &'static str, course: Course) -> Rule {
    Rule { path, methods, course }
}

const fn get(path: &'static str, course: Course) -> Rule {
    rule(Methods::Get, path, course)
}

const fn post(path: &'static str, course: Course) -> Rule {
    rule(Methods::Post, path, course)
}

const fn both(path: &'static str, course: Course) -> Rule {
    rule(Methods::Both, path, course)
}

/// Every route, grouped by what becomes of it. What is not here is unknown, and answered 404.
pub(crate) const ROUTES: &[Rule] = &[
    post("/v1/completions", Course::Generate(Kind::Completions)),
    post("/v1/chat/completions", Course::Generate(Kind::Chat)),
    get("/health", Course::Health),
    both("/ping", Course::Health),
    get("/metrics", Course::Metrics),
    // Generations in other words. Which of their fields a hand-off can serve was not seen on real engines.
    post("/v1/responses", Course::Pass),
    get("/v1/responses/{id}", Course::Pass),
    post("/v1/responses/{id}/cancel", Course::Pass),
    post("/v1/messages", Course::Pass),
    post("/v1/messages/count_tokens", Course::Pass),
    post("/v1/chat/completions/batch", Course::Pass),
    post("/v1/systemone", Course::Pass),
    post("/v1/decisions", Course::Pass),
    post("/cohere/v2/chat", Course::Pass),
    post("/cohere/v2/chat/render", Course::Pass),
    post("/invocations", Course::Pass),
    post("/generative_scoring", Course::Pass),
    // What needs no KV from elsewhere.
    get("/v1/models", Course::Pass),
    get("/version", Course::Version),
    get("/docs", Course::Pass),
    get("/redoc", Course::Pass),
    get("/openapi.json", Course::Pass),
    post("/tokenize", Course::Pass),
    post("/detokenize", Course::Pass),
    get("/tokenizer_info", Course::Pass),
    post("/v1/embeddings", Course::Pass),
    post("/v2/embed", Course::Pass),
    post("/pooling", Course::Pass),
    post("/classify", Course::Pass),
    post("/score", Course::Pass),
    post("/v1/score", Course::Pass),
    post("/rerank", Course::Pass),
    post("/v1/rerank", Course::Pass),
    post("/v2/rerank", Course::Pass),
    // What could stop, change or confuse engines.
    post("/sleep", Course::Refuse(STEERS)),
    post("/wake_up", Course::Refuse(STEERS)),
    post("/release_kv_cache_memory", Course::Refuse(STEERS)),
    post("/pause", Course::Refuse(STEERS)),
    post("/resume", Course::Refuse(STEERS)),
    post("/abort_requests", Course::Refuse(STEERS)),
    post("/inference/v1/abort_requests", Course::Refuse(STEERS)),
    post("/reset_prefix_cache", Course::Refuse(STEERS)),
    post("/reset_mm_cache", Course::Refuse(STEERS)),
    post("/reset_encoder_cache", Course::Refuse(STEERS)),
    post("/collective_rpc", Course::Refuse(STEERS)),
    post("/scale_elastic_ep", Course::Refuse(STEERS)),
    post("/fault_tolerance/apply", Course::Refuse(STEERS)),
    post("/v1/load_lora_adapter", Course::Refuse(STEERS)),
    post("/v1/unload_lora_adapter", Course::Refuse(STEERS)),
    post("/start_profile", Course::Refuse(STEERS)),
    post("/stop_profile", Course::Refuse(STEERS)),
    post("/init_weight_transfer_engine", Course::Refuse(STEERS)),
    post("/shutdown_weight_transfer_engine", Course::Refuse(STEERS)),
    post("/start_weight_update", Course::Refuse(STEERS)),
    post("/start_draft_weight_update", Course::Refuse(STEERS)),
    post("/update_weights", Course::Refuse(STEERS)),
    post("/finish_weight_update", Course::Refuse(STEERS)),
    post("/update_weight_version", Course::Refuse(STEERS)),
    post("/weight_checker", Course::Refuse(STEERS)),
    get("/load", Course::Refuse(TELLS)),
    get("/server_info", Course::Refuse(TELLS)),
    get("/is_sleeping", Course::Refuse(TELLS)),
    get("/is_paused", Course::Refuse(TELLS)),
    post("/is_scaling_elastic_ep", Course::Refuse(TELLS)),
    get("/weight_info", Course::Refuse(TELLS)),
    get("/get_world_size", Course::Refuse(TELLS)),
    get("/kv_event_sources", Course::Refuse(TELLS)),
    get("/fault_tolerance/status", Course::Refuse(TELLS)),
    // In `sampling_params.extra_args`, and in a field of a form.
    post("/inference/v1/generate", Course::Refuse(HIDES)),
    post("/v1/audio/transcriptions", Course::Refuse(HIDES)),
    post("/v1/audio/translations", Course::Refuse(HIDES)),
    get("/v1/realtime", Course::Refuse(NO_HTTP)),
    // What a later vLLM may serve. It keeps what steers engines outside of `/v1`, but for LoRA adapters.
    both(REST, Course::Pass),
];

/// The route of everything else below `/v1`.
pub(crate) const REST: &str = "/v1/{*rest}";

/// The rule of a path that is one of these routes, and not only one of what a later vLLM may serve.
pub(crate) fn find(path: &str) -> Option<&'static Rule> {
    let fits = |rule: &Rule| {
        let parts = rule.path.split('/').zip(path.split('/'));
        let are_alike = parts
            .into_iter()
            .all(|(rule, part)| rule == part || rule.starts_with('{'));
        rule.path != REST && rule.path.split('/').count() == path.split('/').count() && are_alike
    };
    ROUTES.iter().find(|rule| is_plain(path) && fits(rule))
}

/// Whether an engine reads a path as it is written. Escapes would let a refused route through, and a trailing slash is
/// answered with a redirection to the engine's own address.
pub(crate) fn is_plain(path: &str) -> bool {
    let is_plain = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_-.~:@".contains(&byte))
    };
    path.strip_prefix('/').is_some_and(|path| path.split('/').all(is_plain))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_route_stands_once() {
        let paths: BTreeSet<_> = ROUTES.iter().map(|rule| rule.path).collect();
        assert_eq!(paths.len(), ROUTES.len());
    }

    #[test]
    fn a_route_is_known_by_its_parts() {
        for path in [
            "/v1/models",
            "/health",
            "/v1/responses/resp_1",
            "/v1/responses/a/cancel",
            "/sleep",
        ] {
            assert!(find(path).is_some(), "{path}");
        }
        for path in [
            "/v1/files",
            "/v1/models/m",
            "/v1/models/",
            "/v1",
            "/",
            "",
            "/v1/responses//cancel",
        ] {
            assert!(find(path).is_none(), "{path}");
        }
    }

    #[test]
    fn only_plain_paths_are_passed() {
        for path in ["/v1/models", "/v1/responses/resp_0a-1.x", "/v1/a:b@c~d"] {
            assert!(is_plain(path), "{path}");
        }
        for path in [
            "/v1/load%5Flora_adapter",
            "/v1/load_lora_adapter/",
            "/v1//load_lora_adapter",
            "/v1/../sleep",
            "/v1/./x",
            "/v1/a;b",
            "/v1/a b",
            "v1",
            "/",
        ] {
            assert!(!is_plain(path), "{path}");
        }
    }
}
