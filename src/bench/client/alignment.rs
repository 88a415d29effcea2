//! Made prompts against the server's own tokenizer: where it counts more ids than the client's, prompts are cut.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bench::client::http::{MAX_BYTES, Server};
use crate::bench::workload::{Order, Prompt};
use crate::bench::{BenchError, Spec};

/// Requests at the server at once, as in vLLM's client.
const AT_ONCE: usize = 64;
/// How long one text may take.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Cuts texts of which the server's tokenizer makes more ids than the client's, by vLLM's rule: the first one tells whether
/// the two differ, and nothing is ever added. A text for which the server fails stays as it is. Gives vLLM's lines about it.
///
/// # Errors
/// When no client can be made, or the base URL is none.
pub async fn align(
    spec: &Spec,
    orders: &mut [Order],
    progress: &dyn Fn(usize, usize),
) -> Result<Option<String>, BenchError> {
    let server = Tokens {
        server: Server::new(&spec.base_url, &spec.headers, spec.options.is_insecure)?,
        model: &spec.model,
    };
    let Some(Order {
        prompt: Prompt::Text { text, token_count },
        ..
    }) = orders.first()
    else {
        return Ok(None);
    };
    let ids = match server.ids(text).await {
        Ok(ids) => ids,
        Err(refusal) => return Ok(Some(refusal.warning(spec))),
    };
    let (counted, expected) = (ids.len() as u64, *token_count);
    if counted == expected {
        return Ok(None);
    }
    let total = orders.len();
    let mut cut = stream::iter(orders.iter_mut().map(|order| server.cut(order))).buffer_unordered(AT_ONCE);
    let mut done = 0;
    while cut.next().await.is_some() {
        done += 1;
        progress(done, total);
    }
    Ok(Some(format!(
        "WARNING: tokenizer mismatch (server={counted}, expected={expected}), re-aligning prompts."
    )))
}

/// Why the server makes no ids of a text.
enum Refusal {
    Unreachable(io::Error),
    Status(StatusCode),
    Nonsense(String),
}

impl Refusal {
    /// vLLM's line about it.
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
            Self::Nonsense(error) => format!("WARNING: /tokenize probe failed ({error}), skipping alignment."),
        }
    }
}

/// The server's tokenizer.
struct Tokens<'a> {
    server: Server,
    model: &'a str,
}

impl Tokens<'_> {
    async fn ids(&self, text: &str) -> Result<Vec<u32>, Refusal> {
        #[derive(Deserialize)]
        struct Ids {
            tokens: Vec<u32>,
        }
        let body = json!({"model": self.model, "prompt": text, "add_special_tokens": false});
        Ok(self.ask::<Ids>("/tokenize", &body).await?.tokens)
    }

    async fn cut(&self, order: &mut Order) -> Option<()> {
        #[derive(Deserialize)]
        struct Text {
            prompt: String,
        }
        let Prompt::Text { text, token_count } = &mut order.prompt else {
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

    async fn ask<T: serde::de::DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, Refusal> {
        let body = body.to_string();
        let asked = self
            .server
            .ask(&Method::POST, path, Some(body.as_bytes()), MAX_BYTES, TIMEOUT);
        match asked.await {
            Ok(reply) if reply.status.is_success() => {
                serde_json::from_slice(&reply.body).map_err(|error| Refusal::Nonsense(error.to_string()))
            }
            Ok(reply) => Err(Refusal::Status(reply.status)),
            // vLLM's client has no word for a time that is over.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(Refusal::Nonsense(error.to_string())),
            Err(error) => Err(Refusal::Unreachable(error)),
        }
    }
}
