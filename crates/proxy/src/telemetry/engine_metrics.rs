//! The engines' metrics, merged with the proxy's own.
//!
//! The shell around `merge`. The route is open to everyone, so all requests at about the same time share one answer.
//! If an engine does not answer, its metrics are missing, and the proxy counts that.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Limited};

use super::merge::{EnginePage, merge};
use crate::Shared;
use crate::upstream::Call;
use xpyd_base::fleet::{EngineState, EngineView};

/// How long an engine has to answer. Prometheus itself gives up after 10 s by default.
const DEADLINE: Duration = Duration::from_secs(3);

/// Maximum size of an engine's metrics. vLLM with every metric writes about 200 KiB.
const MAX_PAGE_BYTES: usize = 8 << 20;

impl Shared {
    /// The proxy's own metrics and those of all serving engines, in Prometheus' text format.
    pub(crate) async fn merged_metrics(&self) -> Bytes {
        self.merged.get(self.merge_metrics()).await
    }

    async fn merge_metrics(&self) -> Bytes {
        let view = Arc::clone(&self.view.borrow());
        let serves = |engine: &&Arc<EngineView>| {
            matches!(
                engine.state,
                EngineState::Healthy | EngineState::Ready | EngineState::Draining
            )
        };
        let pages = join_all(view.engines.iter().filter(serves).map(|engine| self.page(engine))).await;
        let pages: Vec<EnginePage> = pages.into_iter().flatten().collect();
        merge(&self.metrics_text(false), &pages).into()
    }

    async fn page(&self, engine: &EngineView) -> Option<EnginePage> {
        let Ok(Some(text)) = tokio::time::timeout(DEADLINE, self.scrape(engine)).await else {
            tracing::debug!(engine = %engine.id, "the engine's metrics did not arrive");
            self.metrics.count_unread_page(engine);
            return None;
        };
        Some(EnginePage {
            engine: engine.id.to_string(),
            role: engine.role.to_string(),
            text,
        })
    }

    async fn scrape(&self, engine: &EngineView) -> Option<String> {
        let headers = self.own_headers();
        let answer = self.upstream.send(engine, Call::get("/metrics", &headers)).await.ok()?;
        let is_good = answer.status().is_success();
        let page = Limited::new(answer.into_body(), MAX_PAGE_BYTES).collect().await.ok()?;
        is_good.then(|| String::from_utf8_lossy(&page.to_bytes()).into_owned())
    }
}
