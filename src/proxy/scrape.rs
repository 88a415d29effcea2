//! Asks engines for their metrics, all at once and each not for long, and merges what comes with the proxy's own.
//!
//! The shell around `merge`. An engine that does not answer is missing from the page, and counted.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Limited};

use super::Shared;
use super::merge::{Page, merge};
use super::upstream::Call;
use crate::fleet::{EngineState, EngineView};

/// How long an engine may take. Prometheus itself gives up after 10 s by default.
const DEADLINE: Duration = Duration::from_secs(3);

/// The longest page of an engine. One of vLLM with every metric takes some 200 KiB.
const MAX_PAGE_BYTES: usize = 8 << 20;

impl Shared {
    /// The proxy's own metrics and those of all engines that serve, in Prometheus' text format.
    pub(super) async fn merged_metrics(&self) -> String {
        let _one_at_a_time = self.scraping.lock().await;
        let view = Arc::clone(&self.view.borrow());
        let serves = |engine: &&Arc<EngineView>| {
            matches!(
                engine.state,
                EngineState::Healthy | EngineState::Ready | EngineState::Draining
            )
        };
        let pages = join_all(view.engines.iter().filter(serves).map(|engine| self.page(engine))).await;
        let pages: Vec<Page> = pages.into_iter().flatten().collect();
        merge(&self.metrics_text(false), &pages)
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
        let call = Call {
            method: Method::GET,
            path: "/metrics",
            headers: &self.own_headers(),
            request_id: None,
            body: Bytes::new(),
        };
        let answer = self.upstream.send(engine, call).await.ok()?;
        let is_good = answer.status().is_success();
        let page = Limited::new(answer.into_body(), MAX_PAGE_BYTES).collect().await.ok()?;
        is_good.then(|| String::from_utf8_lossy(&page.to_bytes()).into_owned())
    }
}
