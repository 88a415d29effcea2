//! Queries the models that a server serves: checks before a run that the server answers and has the model.

use std::time::Duration;

use reqwest::Method;
use reqwest::header::HeaderMap;
use serde::Deserialize;

use crate::client::http::{MAX_BYTES, Server};
use crate::{BenchError, Spec};

/// Timeout of the model list. The list is cheap, so a slower server is not healthy.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout of the version, which is optional.
const VERSION_TIMEOUT: Duration = Duration::from_secs(2);

/// Largest version page in bytes.
const MAX_VERSION_BYTES: usize = 4 << 10;

/// A model that a server serves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Model {
    /// Its name in requests.
    pub id: String,
    /// The path or repository it was loaded from, as vLLM reports it.
    pub root: Option<String>,
}

/// The model to use: `wanted`, or the first that the server serves.
///
/// # Errors
/// When the server does not answer, lists no models, or does not serve the wanted one.
pub async fn discover(base_url: &str, headers: &HeaderMap, wanted: Option<&str>) -> Result<Model, BenchError> {
    discover_with(base_url, headers, false, wanted).await
}

/// As [`discover`]. `is_insecure` accepts any certificate.
///
/// # Errors
/// Those of [`discover`].
pub async fn discover_with(
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
            "the list exceeds the limit of {} MiB",
            MAX_BYTES >> 20
        )));
    }
    let list: ModelList = serde_json::from_slice(&reply.body).map_err(|error| not_a_list(error.to_string()))?;
    let mut served = list.data.into_iter();
    match wanted {
        None => served.next().ok_or_else(|| not_a_list("the list is empty".to_owned())),
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

/// The content of vLLM's `/version`. `None` where the server has no such page.
pub async fn version(spec: &Spec) -> Option<serde_json::Value> {
    let server = Server::new(&spec.base_url, &spec.headers, spec.options.is_insecure).ok()?;
    let reply = server
        .ask(&Method::GET, "/version", None, MAX_VERSION_BYTES, VERSION_TIMEOUT)
        .await;
    let reply = reply.ok().filter(|reply| reply.status.is_success())?;
    serde_json::from_slice(&reply.body).ok()
}
