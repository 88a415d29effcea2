//! Aligns synthetic prompts with the server's tokenizer: cuts prompts for which it counts more tokens than the
//! client's.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::http::{MAX_BYTES, Server};
use crate::workload::{Prompt, WorkItem};
use crate::{BenchError, Spec};

/// Requests at the server at once; the same as in vLLM's client.
const AT_ONCE: usize = 64;
/// Timeout of one `/tokenize` or `/detokenize` request.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Cuts prompts that have more tokens on the server than in the client, by vLLM's rule: the first prompt decides
/// whether the two tokenizers differ, and nothing is ever added. A prompt for which the server fails stays as it is.
/// Returns vLLM's line about the result.
///
/// # Errors
/// When the base URL is invalid or TLS cannot be set up.
pub async fn align(
    spec: &Spec,
    items: &mut [WorkItem],
    progress: &dyn Fn(usize, usize),
) -> Result<Option<String>, BenchError> {
    let server = ServerTokenizer {
        server: Server::new(&spec.base_url, &spec.headers, spec.options.is_insecure)?,
        model: &spec.model,
    };
    let Some(WorkItem {
        prompt: Prompt::Text { text, token_count },
        ..
    }) = items.first()
    else {
        return Ok(None);
    };
    let ids = match server.ids(text).await {
        Ok(ids) => ids,
        Err(error) => return Ok(Some(error.warning(spec))),
    };
    let (counted, expected) = (ids.len() as u64, *token_count);
    if counted == expected {
        return Ok(None);
    }
    let total = items.len();
    let mut cut = stream::iter(items.iter_mut().map(|item| server.cut(item))).buffer_unordered(AT_ONCE);
    let mut done = 0;
    while cut.next().await.is_some() {
        done += 1;
        progress(done, total);
    }
    Ok(Some(format!(
        "WARNING: tokenizer mismatch (server={counted}, expected={expected}), re-aligning prompts."
    )))
}

/// Why the server did not tokenize a text.
enum TokenizeError {
    Unreachable(io::Error),
    Status(StatusCode),
    InvalidReply(String),
}

impl TokenizeError {
    /// The line that vLLM's client prints.
    fn warning(&self, spec: &Spec) -> String {
        match self {
            Self::Unreachable(error) => {
                format!("WARNING: {} unreachable ({error}), skipping alignment.", spec.base_url)
            }
            Self::Status(StatusCode::NOT_FOUND) => format!(
                "WARNING: /tokenize unavailable (404 Not Found: either this server has no /tokenize route, or it does not \
                 serve a model named `{}` (its served names are listed by GET /v1/models)), skipping alignment.",
                spec.model
            ),
            Self::Status(status) => {
                format!(
                    "WARNING: /tokenize unavailable (HTTP {}), skipping alignment.",
                    status.as_u16()
                )
            }
            Self::InvalidReply(error) => format!("WARNING: /tokenize probe failed ({error}), skipping alignment."),
        }
    }
}

/// The server's tokenizer.
struct ServerTokenizer<'a> {
    server: Server,
    model: &'a str,
}

impl ServerTokenizer<'_> {
    async fn ids(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        #[derive(Deserialize)]
        struct Ids {
            tokens: Vec<u32>,
        }
        let body = json!({"model": self.model, "prompt": text, "add_special_tokens": false});
        Ok(self.ask::<Ids>("/tokenize", &body).await?.tokens)
    }

    async fn cut(&self, item: &mut WorkItem) -> Option<()> {
        #[derive(Deserialize)]
        struct Text {
            prompt: String,
        }
        let Prompt::Text { text, token_count } = &mut item.prompt else {
            return None;
        };
        let ids = self.ids(text).await.ok()?;
        let kept = ids.get(..usize::try_from(*token_count).ok()?)?;
        if kept.len() < ids.len() {
            let body = json!({"model": self.model, "tokens": kept});
            *text = Arc::from(self.ask::<Text>("/detokenize", &body).await.ok()?.prompt);
        }
        Some(())
    }

    async fn ask<T: serde::de::DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, TokenizeError> {
        let body = body.to_string();
        let asked = self
            .server
            .ask(&Method::POST, path, Some(body.as_bytes()), MAX_BYTES, TIMEOUT);
        match asked.await {
            Ok(reply) if reply.status.is_success() => {
                serde_json::from_slice(&reply.body).map_err(|error| TokenizeError::InvalidReply(error.to_string()))
            }
            Ok(reply) => Err(TokenizeError::Status(reply.status)),
            // vLLM's client has no separate message for a timeout.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Err(TokenizeError::InvalidReply(error.to_string()))
            }
            Err(error) => Err(TokenizeError::Unreachable(error)),
        }
    }
}
