//! The routes of vLLM's server (0.32 and 0.33), and the action of each: hand over, pass to a decode engine, or
//! refuse.
//!
//! Pure. Every route has a rule, so that nothing reaches an engine by accident.

use crate::body::serving_mode::GenerationKind;

/// A route and its action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// The path in axum's syntax: `{name}` is one segment, `{*rest}` all that follow. Also the metrics' label.
    pub(crate) path: &'static str,
    pub(crate) methods: RouteMethods,
    pub(crate) action: RouteAction,
}

/// The methods of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouteMethods {
    Get,
    Post,
    Both,
}

/// The action for a route's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouteAction {
    /// Prefill and decode a generation, by the rules of its fields.
    Generate(GenerationKind),
    /// Answer whether the fleet is healthy.
    Health,
    /// Answer 200: the proxy works, whatever its engines do.
    Live,
    /// Answer with the proxy's own metrics.
    Metrics,
    /// Answer with the engines' version.
    Version,
    /// Let a decode engine answer alone, and stream its answer back.
    Pass,
    /// Refuse, for this reason. No engine sees the request.
    Refuse(&'static str),
}

const STEERS: &str = "it would change a single engine behind the proxy; use xpyd's control socket";
const TELLS: &str = "it describes a single engine, not the fleet; see `xpyd status`";
const HIDES: &str = "its body can hide KV transfer parameters from the proxy";
const NO_HTTP: &str = "the proxy supports HTTP only";

const fn route(methods: RouteMethods, path: &'static str, action: RouteAction) -> Route {
    Route { path, methods, action }
}

const fn get(path: &'static str, action: RouteAction) -> Route {
    route(RouteMethods::Get, path, action)
}

const fn post(path: &'static str, action: RouteAction) -> Route {
    route(RouteMethods::Post, path, action)
}

const fn both(path: &'static str, action: RouteAction) -> Route {
    route(RouteMethods::Both, path, action)
}

/// Every route, grouped by action. Any other path is answered 404.
pub(crate) const ROUTES: &[Route] = &[
    post("/v1/completions", RouteAction::Generate(GenerationKind::Completions)),
    post("/v1/chat/completions", RouteAction::Generate(GenerationKind::Chat)),
    get("/health", RouteAction::Health),
    both("/ping", RouteAction::Health),
    // For probes of Kubernetes and load balancers, which must not confuse the two.
    get("/ready", RouteAction::Health),
    get("/live", RouteAction::Live),
    get("/metrics", RouteAction::Metrics),
    // Generations in other formats. Which of their fields a hand-off can serve was not tested on real engines.
    post("/v1/responses", RouteAction::Pass),
    get("/v1/responses/{id}", RouteAction::Pass),
    post("/v1/responses/{id}/cancel", RouteAction::Pass),
    post("/v1/messages", RouteAction::Pass),
    post("/v1/messages/count_tokens", RouteAction::Pass),
    post("/v1/chat/completions/batch", RouteAction::Pass),
    post("/v1/systemone", RouteAction::Pass),
    post("/v1/decisions", RouteAction::Pass),
    post("/cohere/v2/chat", RouteAction::Pass),
    post("/cohere/v2/chat/render", RouteAction::Pass),
    post("/invocations", RouteAction::Pass),
    post("/generative_scoring", RouteAction::Pass),
    // Routes that need no KV from another engine.
    get("/v1/models", RouteAction::Pass),
    get("/version", RouteAction::Version),
    get("/docs", RouteAction::Pass),
    get("/redoc", RouteAction::Pass),
    get("/openapi.json", RouteAction::Pass),
    post("/tokenize", RouteAction::Pass),
    post("/detokenize", RouteAction::Pass),
    get("/tokenizer_info", RouteAction::Pass),
    post("/v1/embeddings", RouteAction::Pass),
    post("/v2/embed", RouteAction::Pass),
    post("/pooling", RouteAction::Pass),
    post("/classify", RouteAction::Pass),
    post("/score", RouteAction::Pass),
    post("/v1/score", RouteAction::Pass),
    post("/rerank", RouteAction::Pass),
    post("/v1/rerank", RouteAction::Pass),
    post("/v2/rerank", RouteAction::Pass),
    // Routes that could stop, change or confuse engines.
    post("/sleep", RouteAction::Refuse(STEERS)),
    post("/wake_up", RouteAction::Refuse(STEERS)),
    post("/release_kv_cache_memory", RouteAction::Refuse(STEERS)),
    post("/pause", RouteAction::Refuse(STEERS)),
    post("/resume", RouteAction::Refuse(STEERS)),
    post("/abort_requests", RouteAction::Refuse(STEERS)),
    post("/inference/v1/abort_requests", RouteAction::Refuse(STEERS)),
    post("/reset_prefix_cache", RouteAction::Refuse(STEERS)),
    post("/reset_mm_cache", RouteAction::Refuse(STEERS)),
    post("/reset_encoder_cache", RouteAction::Refuse(STEERS)),
    post("/collective_rpc", RouteAction::Refuse(STEERS)),
    post("/scale_elastic_ep", RouteAction::Refuse(STEERS)),
    post("/fault_tolerance/apply", RouteAction::Refuse(STEERS)),
    post("/v1/load_lora_adapter", RouteAction::Refuse(STEERS)),
    post("/v1/unload_lora_adapter", RouteAction::Refuse(STEERS)),
    post("/start_profile", RouteAction::Refuse(STEERS)),
    post("/stop_profile", RouteAction::Refuse(STEERS)),
    post("/init_weight_transfer_engine", RouteAction::Refuse(STEERS)),
    post("/shutdown_weight_transfer_engine", RouteAction::Refuse(STEERS)),
    post("/start_weight_update", RouteAction::Refuse(STEERS)),
    post("/start_draft_weight_update", RouteAction::Refuse(STEERS)),
    post("/update_weights", RouteAction::Refuse(STEERS)),
    post("/finish_weight_update", RouteAction::Refuse(STEERS)),
    post("/update_weight_version", RouteAction::Refuse(STEERS)),
    post("/weight_checker", RouteAction::Refuse(STEERS)),
    get("/load", RouteAction::Refuse(TELLS)),
    get("/server_info", RouteAction::Refuse(TELLS)),
    get("/is_sleeping", RouteAction::Refuse(TELLS)),
    get("/is_paused", RouteAction::Refuse(TELLS)),
    post("/is_scaling_elastic_ep", RouteAction::Refuse(TELLS)),
    get("/weight_info", RouteAction::Refuse(TELLS)),
    get("/get_world_size", RouteAction::Refuse(TELLS)),
    get("/kv_event_sources", RouteAction::Refuse(TELLS)),
    get("/fault_tolerance/status", RouteAction::Refuse(TELLS)),
    // KV transfer parameters can hide in `sampling_params.extra_args`, and in a form field.
    post("/inference/v1/generate", RouteAction::Refuse(HIDES)),
    post("/v1/audio/transcriptions", RouteAction::Refuse(HIDES)),
    post("/v1/audio/translations", RouteAction::Refuse(HIDES)),
    get("/v1/realtime", RouteAction::Refuse(NO_HTTP)),
    // Routes of a later vLLM. vLLM keeps routes that steer engines outside of `/v1`, except those of LoRA adapters.
    both(REST, RouteAction::Pass),
];

/// Any other path below `/v1`.
pub(crate) const REST: &str = "/v1/{*rest}";

/// The route of a path, unless only `REST` matches.
pub(crate) fn find(path: &str) -> Option<&'static Route> {
    let fits = |route: &Route| {
        let parts = route.path.split('/').zip(path.split('/'));
        let are_alike = parts
            .into_iter()
            .all(|(route, part)| route == part || route.starts_with('{'));
        route.path != REST && route.path.split('/').count() == path.split('/').count() && are_alike
    };
    ROUTES.iter().find(|route| is_plain(path) && fits(route))
}

/// Whether an engine reads a path as it is written. Escapes could smuggle a refused route through, and an engine
/// redirects a trailing slash to its own address.
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
    fn every_route_is_listed_once() {
        let paths: BTreeSet<_> = ROUTES.iter().map(|route| route.path).collect();
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
