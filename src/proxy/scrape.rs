//! What engines say of themselves to anyone who asks the fleet: their metrics, merged with the proxy's own, and their version.
//!
//! The shell around `merge`. These routes are open to everyone, so all who ask at about the same time share one answer.
//! An engine that does not answer is missing from the page, and counted.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use tokio::time::Instant;

use super::Shared;
use super::error::{ProxyError, Stage};
use super::merge::{Page, merge};
use super::upstream::{Call, Seat};
use crate::fleet::{EngineId, EngineState, EngineView, Role};

/// How long an engine may take. Prometheus itself gives up after 10 s by default.
const DEADLINE: Duration = Duration::from_secs(3);

/// The longest page of an engine. One of vLLM with every metric takes some 200 KiB.
const MAX_PAGE_BYTES: usize = 8 << 20;

/// How often engines are asked at most, however many clients ask.
const SPACING: Duration = Duration::from_millis(200);

/// An answer that is shared by everyone who asked before it was begun. It is never older than the question, because a
/// benchmark compares what engines count before and after its requests.
#[derive(Debug)]
pub(super) struct Spaced<T>(tokio::sync::Mutex<Option<(Instant, T)>>);

impl<T> Default for Spaced<T> {
    fn default() -> Self {
        Self(tokio::sync::Mutex::new(None))
    }
}

impl<T: Clone> Spaced<T> {
    async fn get(&self, make: impl Future<Output = T>) -> T {
        let asked = Instant::now();
        let mut last = self.0.lock().await;
        if let Some((begun, answer)) = &*last {
            if *begun >= asked {
                return answer.clone();
            }
            tokio::time::sleep_until(*begun + SPACING).await;
        }
        let begun = Instant::now();
        let answer = make.await;
        *last = Some((begun, answer.clone()));
        answer
    }

    /// The same, but the answer may be as old as the spacing: who asks in a row does not wait each time.
    async fn recent(&self, make: impl Future<Output = T>) -> T {
        let mut last = self.0.lock().await;
        if let Some((ended, answer)) = &*last
            && ended.elapsed() < SPACING
        {
            return answer.clone();
        }
        let answer = make.await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

/// What a decode engine answered about its version.
#[derive(Debug, Clone)]
pub(super) struct Version {
    status: StatusCode,
    content_type: Option<HeaderValue>,
    body: Bytes,
}

impl Version {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = self.status;
        let content_type = self.content_type.map(|value| (header::CONTENT_TYPE, value));
        response.headers_mut().extend(content_type);
        response
    }
}

impl Shared {
    /// The proxy's own metrics and those of all engines that serve, in Prometheus' text format.
    pub(super) async fn merged_metrics(&self) -> Bytes {
        self.merged.get(self.merge_metrics()).await
    }

    /// The version of the engines, which are all the same.
    ///
    /// # Errors
    /// When no decode engine serves, or the one that was asked does not answer.
    pub(super) async fn engine_version(&self) -> Result<Response<Body>, ProxyError> {
        let mut failed = None;
        let ask = async {
            let version = self.ask_for_version().await;
            version.map_err(|error| failed = Some(error)).ok()
        };
        match self.version.get(ask).await {
            Some(version) => Ok(version.into_response()),
            None => Err(failed.unwrap_or(ProxyError::NoEngine(Role::Decode))),
        }
    }

    /// How many tokens the engines' model reads and makes of one request, as a decode engine says with these headers.
    pub(super) async fn model_length(&self, headers: &HeaderMap) -> Option<u64> {
        if let Some(length) = self.model_length.get() {
            return Some(*length);
        }
        let length = self.asked_length.get(self.ask_for_length(headers)).await?;
        Some(*self.model_length.get_or_init(|| length))
    }

    /// The engines that say of themselves that they are well, where nobody else watches them.
    pub(super) async fn well_engines(&self) -> Arc<[EngineId]> {
        self.well.recent(self.ask_whether_well()).await
    }

    async fn ask_whether_well(&self) -> Arc<[EngineId]> {
        let view = Arc::clone(&self.view.borrow());
        let asked = view.engines.iter().map(|engine| self.is_well(engine));
        let well = join_all(asked).await;
        let engines = view.engines.iter().zip(well).filter(|(_, is_well)| *is_well);
        engines.map(|(engine, _)| engine.id.clone()).collect()
    }

    async fn is_well(&self, engine: &EngineView) -> bool {
        let headers = self.own_headers();
        let step = self.upstream.fetch(engine, get("/health", &headers));
        let answer = tokio::time::timeout(DEADLINE, step).await;
        matches!(answer, Ok(Ok((head, _))) if head.status.is_success())
    }

    async fn ask_for_length(&self, headers: &HeaderMap) -> Option<u64> {
        let view = Arc::clone(&self.view.borrow());
        self.length_of(view.serving(Role::Decode).next()?, headers).await
    }

    /// How many tokens this engine's model reads and makes of one request, if it says so with these headers.
    pub(super) async fn length_of(&self, engine: &EngineView, headers: &HeaderMap) -> Option<u64> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Model>,
        }
        #[derive(Deserialize)]
        struct Model {
            max_model_len: Option<u64>,
        }
        let step = self.upstream.fetch(engine, get("/v1/models", headers));
        let (_, body) = tokio::time::timeout(DEADLINE, step).await.ok()?.ok()?;
        let models: Models = serde_json::from_slice(&body).ok()?;
        models.data.iter().filter_map(|model| model.max_model_len).max()
    }

    async fn ask_for_version(&self) -> Result<Version, ProxyError> {
        let view = Arc::clone(&self.view.borrow());
        let mut seats = view
            .serving(Role::Decode)
            .filter_map(|engine| Seat::take(engine, &self.view));
        let seat = seats.next().ok_or(ProxyError::NoEngine(Role::Decode))?;
        let headers = self.own_headers();
        let step = self.upstream.fetch(&seat.engine, get("/version", &headers));
        let (head, body) = seat.run(Stage::Pass, DEADLINE, step).await?;
        Ok(Version {
            status: head.status,
            content_type: head.headers.get(header::CONTENT_TYPE).cloned(),
            body,
        })
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
        let answer = self.upstream.send(engine, get("/metrics", &headers)).await.ok()?;
        let is_good = answer.status().is_success();
        let page = Limited::new(answer.into_body(), MAX_PAGE_BYTES).collect().await.ok()?;
        is_good.then(|| String::from_utf8_lossy(&page.to_bytes()).into_owned())
    }
}

fn get<'call>(path: &'call str, headers: &'call HeaderMap) -> Call<'call> {
    Call {
        method: Method::GET,
        path,
        headers,
        request_id: None,
        body: Bytes::new(),
    }
}
