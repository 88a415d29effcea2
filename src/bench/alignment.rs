//! Made prompts against the server's own tokenizer: where it counts more ids than the client's, prompts are cut.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use reqwest::Url;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client;
use super::workload::{Order, Prompt};
use super::{BenchError, Spec};

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
    let server = Server {
        http: client::http(&spec.headers)?,
        tokenize: client::url(&spec.base_url, "/tokenize")?,
        detokenize: client::url(&spec.base_url, "/detokenize")?,
        model: &spec.model,
    };
    let Some(Order {
        prompt: Prompt::Text { text, token_count },
        ..
    }) = orders.first()
    else {
        return Ok(None);
    };
    let Some(ids) = server.ids(text).await else {
        return Ok(Some("WARNING: /tokenize unavailable, skipping alignment.".to_owned()));
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

struct Server<'a> {
    http: reqwest::Client,
    tokenize: Url,
    detokenize: Url,
    model: &'a str,
}

impl Server<'_> {
    async fn ids(&self, text: &str) -> Option<Vec<u32>> {
        #[derive(Deserialize)]
        struct Tokens {
            tokens: Vec<u32>,
        }
        let body = json!({"model": self.model, "prompt": text, "add_special_tokens": false});
        Some(self.ask::<Tokens>(&self.tokenize, &body).await?.tokens)
    }

    async fn cut(&self, order: &mut Order) -> Option<()> {
        #[derive(Deserialize)]
        struct Text {
            prompt: String,
        }
        let Prompt::Text { text, token_count } = &mut order.prompt else {
            return None;
        };
        let ids = self.ids(text).await?;
        let kept = ids.get(..usize::try_from(*token_count).ok()?)?;
        if kept.len() < ids.len() {
            let body = json!({"model": self.model, "tokens": kept});
            *text = Arc::from(self.ask::<Text>(&self.detokenize, &body).await?.prompt);
        }
        Some(())
    }

    /// The answer; none if the server has no such route, fails, or answers something else.
    async fn ask<T: serde::de::DeserializeOwned>(&self, url: &Url, body: &Value) -> Option<T> {
        let request = self.http.post(url.clone()).timeout(TIMEOUT).json(body);
        let response = request.send().await.ok()?.error_for_status().ok()?;
        response.json().await.ok()
    }
}
