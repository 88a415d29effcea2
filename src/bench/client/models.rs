//! Asks a server which models it serves: the check, before a run, that there is a server and that it has the model.

use std::time::Duration;

use reqwest::Method;
use reqwest::header::HeaderMap;
use serde::Deserialize;

use crate::bench::client::http::{MAX_BYTES, Server};
use crate::bench::{BenchError, Spec};

/// How long the list of models may take. It costs a server nothing, so longer means that it is not well.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The same of its version, which nothing waits for.
const VERSION_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest version.
const MAX_VERSION_BYTES: usize = 4 << 10;

/// A model that a server serves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Model {
    /// Its name in requests.
    pub id: String,
    /// The path or repository it was loaded from, as vLLM says.
    pub root: Option<String>,
}

/// The model to ask for: `wanted`, or the first that the server serves.
///
/// # Errors
/// When there is no server, it lists no models, or the wanted one is not among them.
pub async fn discover(base_url: &str, headers: &HeaderMap, wanted: Option<&str>) -> Result<Model, BenchError> {
    discover_trusting(base_url, headers, false, wanted).await
}

/// The same; where `is_insecure`, any certificate is trusted.
///
/// # Errors
/// Those of [`discover`].
pub async fn discover_trusting(
    base_url: &str,
    headers: &HeaderMap,
    is_insecure: bool,
    wanted: Option<&str>,
) -> Result<Model, BenchError> {
    #[derive(Deserialize)]
    struct ModelList {
        data: Vec<Model>,
    }
    const PATH: &str = "/v1/models";
    let server = Server::new(base_url, headers, is_insecure)?;
    let not_a_list = |reason: String| BenchError::NoModelList {
        url: server.url(PATH),
        reason,
    };
    let reply = server.ask(&Method::GET, PATH, None, MAX_BYTES, TIMEOUT).await;
    let reply = reply.map_err(|source| BenchError::Unreachable {
        url: server.url(PATH),
        source,
    })?;
    if !reply.status.is_success() {
        return Err(not_a_list(format!("HTTP {}", reply.status)));
    }
    if reply.body.len() > MAX_BYTES {
        return Err(not_a_list(format!(
            "it has more than {} MiB, the most that this client reads",
            MAX_BYTES >> 20
        )));
    }
    let list: ModelList = serde_json::from_slice(&reply.body).map_err(|error| not_a_list(error.to_string()))?;
    let mut served = list.data.into_iter();
    match wanted {
        None => served.next().ok_or_else(|| not_a_list("it is empty".to_owned())),
        Some(wanted) => {
            let mut names = Vec::new();
            for model in served {
                if model.id == wanted {
                    return Ok(model);
                }
                names.push(model.id);
            }
            Err(BenchError::UnknownModel {
                model: wanted.to_owned(),
                served: names,
            })
        }
    }
}

/// What the server says of its version: vLLM's page `/version`. `None` where it has none.
pub async fn version(spec: &Spec) -> Option<serde_json::Value> {
    let server = Server::new(&spec.base_url, &spec.headers, spec.options.is_insecure).ok()?;
    let reply = server
        .ask(&Method::GET, "/version", None, MAX_VERSION_BYTES, VERSION_TIMEOUT)
        .await;
    let reply = reply.ok().filter(|reply| reply.status.is_success())?;
    serde_json::from_slice(&reply.body).ok()
}
