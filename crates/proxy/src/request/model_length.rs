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

/// What the proxy reads of an engine's list of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ModelList {
    /// The largest context length, in tokens. `None` if the engine reports none.
    max_model_len: Option<u64>,
}

impl Shared {
    /// The context length of the engines' model in tokens, as a decode engine reports it to a request with these
    /// headers.
    pub(crate) async fn model_length(&self, headers: &HeaderMap) -> Option<u64> {
        if let Some(list) = self.model_list.get() {
            return list.max_model_len;
        }
        let list = self.model_list_answer.recent(self.ask_for_models(headers)).await?;
        self.model_list.get_or_init(|| list).max_model_len
    }

    async fn ask_for_models(&self, headers: &HeaderMap) -> Option<ModelList> {
        let view = Arc::clone(&self.view.borrow());
        self.models_of(view.serving(Role::Decode).next()?, headers).await
    }

    /// The context length of this engine's model in tokens, if it reports one to a request with these headers.
    pub(crate) async fn length_of(&self, engine: &EngineView, headers: &HeaderMap) -> Option<u64> {
        self.models_of(engine, headers).await?.max_model_len
    }

    async fn models_of(&self, engine: &EngineView, headers: &HeaderMap) -> Option<ModelList> {
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
        Some(ModelList {
            max_model_len: models.data.iter().filter_map(|model| model.max_model_len).max(),
        })
    }
}
