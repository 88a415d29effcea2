//! The engines' context length, as they report it.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use serde::Deserialize;

use crate::Shared;
use crate::upstream::Call;
use xpyd_base::fleet::{EngineView, Role};

/// How long an engine has to answer.
const DEADLINE: Duration = Duration::from_secs(3);

impl Shared {
    /// The context length of the engines' model in tokens, as a decode engine reports it to a request with these
    /// headers.
    pub(crate) async fn model_length(&self, headers: &HeaderMap) -> Option<u64> {
        if let Some(length) = self.model_length.get() {
            return Some(*length);
        }
        let length = self.length_answer.get(self.ask_for_length(headers)).await?;
        Some(*self.model_length.get_or_init(|| length))
    }

    async fn ask_for_length(&self, headers: &HeaderMap) -> Option<u64> {
        let view = Arc::clone(&self.view.borrow());
        self.length_of(view.serving(Role::Decode).next()?, headers).await
    }

    /// The context length of this engine's model in tokens, if it reports one to a request with these headers.
    pub(crate) async fn length_of(&self, engine: &EngineView, headers: &HeaderMap) -> Option<u64> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        #[derive(Deserialize)]
        struct Model {
            max_model_len: Option<u64>,
        }
        let step = self.upstream.fetch(engine, Call::get("/v1/models", headers));
        let (_, body) = tokio::time::timeout(DEADLINE, step).await.ok()?.ok()?;
        let models: Models = serde_json::from_slice(&body).ok()?;
        models.data.iter().filter_map(|model| model.max_model_len).max()
    }
}
