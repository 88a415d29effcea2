//! Asks a server which models it serves: the check, before a run, that there is a server and that it has the model.

use std::time::Duration;

use reqwest::header::HeaderMap;
use serde::Deserialize;

use super::BenchError;
use super::client;

/// How long the list of models may take. It costs a server nothing, so longer means that it is not well.
const TIMEOUT: Duration = Duration::from_secs(10);

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
    #[derive(Deserialize)]
    struct ModelList {
        data: Vec<Model>,
    }
    let url = client::url(base_url, "/v1/models")?;
    let unreachable = |source: reqwest::Error| BenchError::Unreachable {
        url: url.to_string(),
        source: source.without_url(),
    };
    let not_a_list = |reason: String| BenchError::NoModelList {
        url: url.to_string(),
        reason,
    };
    let request = client::http(headers)?.get(url.clone()).timeout(TIMEOUT);
    let response = request.send().await.map_err(unreachable)?;
    if !response.status().is_success() {
        return Err(not_a_list(format!("HTTP {}", response.status())));
    }
    let body = client::bounded_body(response, client::MAX_BODY_BYTES)
        .await
        .map_err(unreachable)?;
    let list: ModelList = serde_json::from_slice(&body).map_err(|error| not_a_list(error.to_string()))?;
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
