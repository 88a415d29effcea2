//! Hints for benchmarks that cannot start, and for failed requests.

use tokio_rustls::rustls;

use crate::bench::{BenchError, FailureGroup, Spec};
use crate::report::{ExitStatus, Failure};

/// Largest edit distance of a suggested name.
const NEAR: usize = 3;

/// The failure of a run that could not start.
pub(super) fn failure(error: BenchError) -> Failure {
    let hints = hints_for_error(&error);
    let error = match error {
        // Skips the intermediate errors of libraries.
        BenchError::Unreachable { url, source } => {
            let mut reason: &dyn std::error::Error = &source;
            while let Some(next) = reason.source() {
                reason = next;
            }
            anyhow::Error::msg(reason.to_string()).context(format!("no answer from `{url}`"))
        }
        error => anyhow::Error::new(error),
    };
    let mut failure = Failure::new(ExitStatus::Usage, error);
    failure.hints = hints;
    failure
}

fn hints_for_error(error: &BenchError) -> Vec<String> {
    match error {
        BenchError::Unreachable { source, .. } if source.kind() == std::io::ErrorKind::TimedOut => {
            vec!["a process listens there but does not answer: check that it is a model server and that it is healthy".to_owned()]
        }
        BenchError::Unreachable { source, .. } if is_untrusted(source) => {
            vec!["set `SSL_CERT_FILE=ca.pem` to trust its certificate, or `--insecure` to trust any".to_owned()]
        }
        BenchError::Unreachable { url, source } if source.kind() == std::io::ErrorKind::InvalidData => {
            let scheme = if url.starts_with("https") { "http" } else { "https" };
            vec![format!(
                "the server does not speak {}: try `--base-url {scheme}://…`",
                url.split(':').next().unwrap_or_default()
            )]
        }
        BenchError::Unreachable { .. } => vec![
            "`xpyd up` or `xpyd demo` starts a fleet; `xpyd status` shows whether one is running".to_owned(),
            "set `--base-url http://host:port` for another server, or `--ready-check-timeout-sec 300` to wait for one that is \
             still starting"
                .to_owned(),
        ],
        BenchError::NoModelList { .. } => vec![
            "set `--base-url` without a path: `http://host:port`".to_owned(),
            "set `--model NAME` for a server without a model list".to_owned(),
        ],
        BenchError::UnknownModel { served, .. } if served.is_empty() => Vec::new(),
        BenchError::UnknownModel { model, served } => vec![served_models(model, served)],
        BenchError::NotReady { .. } => {
            vec!["see the server's log, or increase `--ready-check-timeout-sec`".to_owned()]
        }
        BenchError::BaseUrl(url) if !url.contains("://") => vec![format!("`--base-url http://{url}`")],
        BenchError::Workload(_)
        | BenchError::RequestRate(_)
        | BenchError::Burstiness(_)
        | BenchError::TooSlow { .. }
        | BenchError::Ramp(_)
        | BenchError::BaseUrl(_)
        | BenchError::Threads(_) => Vec::new(),
        BenchError::Trust(_) => {
            vec!["set `SSL_CERT_FILE=ca.pem` to the certificates to trust, or `--insecure` to trust any".to_owned()]
        }
    }
}

/// Whether a connection failed because of the server's certificate.
fn is_untrusted(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}

/// The models that the server has, the nearest name first.
fn served_models(model: &str, served: &[String]) -> String {
    let distance = |name: &str| strsim::damerau_levenshtein(name, model);
    // vLLM serves a model from a path under that path, so users often omit the owner.
    let is_near = |name: &&String| name.rsplit('/').next() == Some(model) || distance(name) <= NEAR;
    if let Some(name) = served.iter().filter(is_near).min_by_key(|name| distance(name)) {
        return format!("did you mean `--model {name}`?");
    }
    let names: Vec<String> = served.iter().map(|name| format!("`{name}`")).collect();
    format!(
        "the server has {}; without `--model` the first is used",
        names.join(", ")
    )
}

/// Hints for failed requests: one line per kind of failure, for the most frequent ones.
pub(super) fn failure_hints(groups: &[FailureGroup], spec: &Spec) -> Vec<String> {
    const MOST: usize = 3;
    let mut lines: Vec<String> = Vec::new();
    for group in groups {
        if let Some(line) = hint_for(&group.cause, spec)
            && !lines.contains(&line)
        {
            lines.push(line);
        }
    }
    lines.truncate(MOST);
    lines
}

fn hint_for(cause: &str, spec: &Spec) -> Option<String> {
    let cause_contains = |words: &[&str]| {
        let cause = cause.to_lowercase();
        words.iter().any(|word| cause.contains(word))
    };
    let status = cause
        .strip_prefix("HTTP ")
        .and_then(|rest| rest.get(..3))
        .unwrap_or_default();
    let hint = match status {
        _ if cause_contains(&["vocabulary"]) => {
            "set `--vocab-size N` to the size of the model's vocabulary".to_owned()
        }
        "400" | "413" | "422"
            if cause_contains(&[
                "context length",
                "model length",
                "max_model_len",
                "maximum length",
                "too long",
            ]) =>
        {
            "prompt and answer together exceed the model's context: lower `--random-input-len` or `--random-output-len`"
                .to_owned()
        }
        "401" | "403" => "set the key in `OPENAI_API_KEY`, or another header with `--header NAME=VALUE`".to_owned(),
        "404" if cause_contains(&["model"]) => format!(
            "set `--model` to a model that the server has; the requests used `{}`",
            spec.model
        ),
        "404" | "405" => format!(
            "the server has no route `{}`: set `--endpoint` to the path of completions, and `--base-url` without a path",
            spec.endpoint
        ),
        "429" => "the server is overloaded (429): lower `--request-rate` or set `--max-concurrency N`"
            .to_owned(),
        "503" => "the server is not ready or is full: see `xpyd status` for a fleet, or wait with `--ready-check-timeout-sec N`"
            .to_owned(),
        _ if status.starts_with('5') => "see the server's log for the reason; for a fleet, `xpyd logs`".to_owned(),
        _ if cause.starts_with("the answer was not complete within") => {
            "increase `--request-timeout`, the time limit of one request".to_owned()
        }
        _ if cause.starts_with("no connection") => {
            "the server answered before the run: it has stopped, or accepts no more connections".to_owned()
        }
        _ if cause.starts_with("the answer is encoded") => "remove `accept-encoding` from `--header`".to_owned(),
        _ if cause.starts_with("the server ended the answer") => {
            "see the server's log for the reason; for a fleet, `xpyd logs`".to_owned()
        }
        _ if cause.starts_with("the answer is not an event stream") => {
            "requests ask for a stream: a proxy in between can buffer it, or `--backend` does not match the endpoint"
                .to_owned()
        }
        _ if cause_contains(&["not a completion chunk", "without a token"]) => {
            "check that `--endpoint` is a completions route and that `--backend` matches it".to_owned()
        }
        _ if cause_contains(&[
            "broke off",
            "ended early",
            "closed the connection",
            "no answer to the request",
        ]) =>
        {
            "the server closed connections before the answers were complete: see its log".to_owned()
        }
        _ => return None,
    };
    Some(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similar_model_names_are_suggested() {
        let served = ["meta-llama/Llama-3.1-8B".to_owned(), "tiny".to_owned()];
        assert_eq!(served_models("tinny", &served), "did you mean `--model tiny`?");
        assert_eq!(
            served_models("Llama-3.1-8B", &served),
            "did you mean `--model meta-llama/Llama-3.1-8B`?"
        );
        assert!(served_models("gpt-9000", &served).starts_with("the server has `meta-llama/Llama-3.1-8B`, `tiny`;"));
    }
}
