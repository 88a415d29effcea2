//! What engines say of themselves to anyone who asks the fleet: their metrics, merged with the proxy's own, and their version.
//!
//! The shell around `merge`. These routes are open to everyone, so all who ask at about the same time share one answer.
//! An engine that does not answer is missing from the page, and counted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Limited};

use super::merge::{Page, merge};
use crate::fleet::{EngineState, EngineView};
use crate::proxy::Shared;
use crate::proxy::upstream::Call;

/// How long an engine may take. Prometheus itself gives up after 10 s by default.
const DEADLINE: Duration = Duration::from_secs(3);

/// The longest page of an engine. One of vLLM with every metric takes some 200 KiB.
const MAX_PAGE_BYTES: usize = 8 << 20;

impl Shared {
    /// The proxy's own metrics and those of all engines that serve, in Prometheus' text format.
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
        let pages: Vec<Page> = pages.into_iter().flatten().collect();
        merge(&self.metrics_text(false), &pages).into()
    }

    async fn page(&self, engine: &EngineView) -> Option<Page> {
        let Ok(Some(text)) = tokio::time::timeout(DEADLINE, self.scrape(engine)).await else {
            tracing::debug!(engine = %engine.id, "its metrics did not come");
            self.metrics.unread(engine);
            return None;
        };
        Some(Page {
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
