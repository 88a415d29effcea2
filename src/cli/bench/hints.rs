//! What went wrong with a benchmark, and what mends it: for a run that could not begin, and for requests that failed.

use tokio_rustls::rustls;

use crate::bench::{BenchError, FailureGroup, Spec};
use crate::report::{ExitStatus, Failure};

/// Letters that a name may be away from one that is there.
const NEAR: usize = 3;

/// The failure of a run that could not begin.
pub(super) fn failure(error: BenchError) -> Failure {
    let hints = hints_for_error(&error);
    let error = match error {
        // Between the sentence and the reason stand the layers of a library.
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
            vec!["something listens there, but says nothing: is it a model server, and is it well?".to_owned()]
        }
        BenchError::Unreachable { source, .. } if is_untrusted(source) => {
            vec!["`SSL_CERT_FILE=ca.pem` names who vouches for it, `--insecure` trusts anybody".to_owned()]
        }
        BenchError::Unreachable { url, source } if source.kind() == std::io::ErrorKind::InvalidData => {
            let scheme = if url.starts_with("https") { "http" } else { "https" };
            vec![format!(
                "what answers is no {} server: `--base-url {scheme}://…`?",
                url.split(':').next().unwrap_or_default()
            )]
        }
        BenchError::Unreachable { .. } => vec![
            "`xpyd up` or `xpyd demo` starts a fleet; `xpyd status` says whether one runs".to_owned(),
            "`--base-url http://host:port` names another server; `--ready-check-timeout-sec 300` waits for one that is \
             still starting"
                .to_owned(),
        ],
        BenchError::NoModelList { .. } => vec![
            "`--base-url` ends before the path: `http://host:port`".to_owned(),
            "a server without a list of its models is measured with `--model NAME`".to_owned(),
        ],
        BenchError::UnknownModel { served, .. } if served.is_empty() => Vec::new(),
        BenchError::UnknownModel { model, served } => vec![served_models(model, served)],
        BenchError::NotReady { .. } => {
            vec!["the server's log says how far it is; `--ready-check-timeout-sec` gives it more time".to_owned()]
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
            vec!["`SSL_CERT_FILE=ca.pem` names whom to trust, `--insecure` trusts anybody".to_owned()]
        }
    }
}

/// Whether a connection failed because of the server's certificate.
fn is_untrusted(error: &std::io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}

/// What the server has instead, the nearest name first.
fn served_models(model: &str, served: &[String]) -> String {
    let distance = |name: &str| strsim::damerau_levenshtein(name, model);
    // vLLM serves a model of a path by that path, so people often leave the owner out.
    let is_near = |name: &&String| name.rsplit('/').next() == Some(model) || distance(name) <= NEAR;
    if let Some(name) = served.iter().filter(is_near).min_by_key(|name| distance(name)) {
        return format!("did you mean `--model {name}`?");
    }
    let names: Vec<String> = served.iter().map(|name| format!("`{name}`")).collect();
    format!("it serves {}; without `--model` the first is taken", names.join(", "))
}

/// What mends requests that failed: a line per kind of failure, for the most frequent ones.
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
            "`--vocab-size N` keeps the prompts' token ids below the model's vocabulary size".to_owned()
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
            "prompt and answer must fit the model's context together: `--random-input-len`, `--random-output-len`"
                .to_owned()
        }
        "401" | "403" => "a key is sent from `OPENAI_API_KEY`, any header with `--header NAME=VALUE`".to_owned(),
        "404" if cause_contains(&["model"]) => format!(
            "`--model` names a model that the server has; it was asked for `{}`",
            spec.model
        ),
        "404" | "405" => format!(
            "nothing answers at `{}`: `--endpoint` is the path of completions, and `--base-url` ends before it",
            spec.endpoint
        ),
        "429" => "the server takes no more at once: `--max-concurrency N` or a lower `--request-rate` asks less of it"
            .to_owned(),
        "503" => "the server is not ready, or full: `xpyd status` for a fleet, `--ready-check-timeout-sec N` waits"
            .to_owned(),
        _ if status.starts_with('5') => "the reason is in the server's log; for a fleet, `xpyd logs`".to_owned(),
        _ if cause.starts_with("the answer was not complete within") => {
            "`--request-timeout` is how long one request may take".to_owned()
        }
        _ if cause.starts_with("no connection") => {
            "the server was there before the run: it went away, or takes no more connections".to_owned()
        }
        _ if cause.starts_with("the answer is encoded") => "leave `accept-encoding` out of `--header`".to_owned(),
        _ if cause.starts_with("the server ended the answer") => {
            "the reason is in the server's log; for a fleet, `xpyd logs`".to_owned()
        }
        _ if cause.starts_with("the answer is not an event stream") => {
            "requests ask for a stream: a proxy between may gather it, or `--backend` does not fit the endpoint"
                .to_owned()
        }
        _ if cause_contains(&["not a completion chunk", "without a token"]) => {
            "is the endpoint one of completions, and does `--backend` fit it?".to_owned()
        }
        _ if cause_contains(&[
            "broke off",
            "ended early",
            "closed the connection",
            "no answer to the request",
        ]) =>
        {
            "the server ended connections or answers before they were whole; its log may say why".to_owned()
        }
        _ => return None,
    };
    Some(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_nearly_right_is_offered() {
        let served = ["meta-llama/Llama-3.1-8B".to_owned(), "tiny".to_owned()];
        assert_eq!(served_models("tinny", &served), "did you mean `--model tiny`?");
        assert_eq!(
            served_models("Llama-3.1-8B", &served),
            "did you mean `--model meta-llama/Llama-3.1-8B`?"
        );
        assert!(served_models("gpt-9000", &served).starts_with("it serves `meta-llama/Llama-3.1-8B`, `tiny`;"));
    }
}
