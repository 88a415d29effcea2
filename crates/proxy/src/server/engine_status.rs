//! Whether engines are healthy and which version they run. Both routes are open to everyone.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::future::join_all;

use crate::Shared;
use crate::error::{ProxyError, RequestStage};
use crate::schedule::lease::EngineLease;
use crate::upstream::Call;
use xpyd_base::fleet::{EngineId, EngineView, Role};
use xpyd_base::proxy_config::WithoutPrefill;

/// How long an engine has to answer.
const DEADLINE: Duration = Duration::from_secs(3);

/// A decode engine's answer to `/version`.
#[derive(Debug, Clone)]
pub(crate) struct Version {
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
    /// The version of the engines, which all run the same.
    ///
    /// # Errors
    /// When no decode engine serves, or the one that was asked does not answer.
    pub(crate) async fn engine_version(&self) -> Result<Response<Body>, ProxyError> {
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

    async fn ask_for_version(&self) -> Result<Version, ProxyError> {
        let view = Arc::clone(&self.view.borrow());
        let mut leases = view
            .serving(Role::Decode)
            .filter_map(|engine| EngineLease::acquire(engine, &self.view));
        let lease = leases.next().ok_or(ProxyError::NoEngine(Role::Decode))?;
        let headers = self.own_headers();
        let step = self.upstream.fetch(&lease.engine, Call::get("/version", &headers));
        let (head, body) = lease.run(RequestStage::Pass, DEADLINE, step).await?;
        Ok(Version {
            status: head.status,
            content_type: head.headers.get(header::CONTENT_TYPE).cloned(),
            body,
        })
    }

    /// The engines that report to be healthy, for a proxy without a supervisor.
    pub(crate) async fn healthy_engines(&self) -> Arc<[EngineId]> {
        self.healthy.recent(self.ask_for_health()).await
    }

    async fn ask_for_health(&self) -> Arc<[EngineId]> {
        let view = Arc::clone(&self.view.borrow());
        let asked = view.engines.iter().map(|engine| self.reports_healthy(engine));
        let healthy = join_all(asked).await;
        let engines = view
            .engines
            .iter()
            .zip(healthy)
            .filter(|(_, is_healthy_engine)| *is_healthy_engine);
        engines.map(|(engine, _)| engine.id.clone()).collect()
    }

    async fn reports_healthy(&self, engine: &EngineView) -> bool {
        let headers = self.own_headers();
        let step = self.upstream.fetch(engine, Call::get("/health", &headers));
        let answer = tokio::time::timeout(DEADLINE, step).await;
        matches!(answer, Ok(Ok((head, _))) if head.status.is_success())
    }

    /// Whether the fleet's stage serves clients. It does not check the engines of a request.
    pub(super) fn check_serving(&self) -> Result<(), ProxyError> {
        match self.view.borrow().stage {
            stage if stage.serves() => Ok(()),
            stage => Err(ProxyError::NotServing(stage)),
        }
    }

    /// Whether a request that needs both roles would be served.
    pub(super) async fn is_healthy(&self) -> Result<(), ProxyError> {
        self.check_serving()?;
        let view = Arc::clone(&self.view.borrow());
        let needs_prefill = self.settings.config.routing.without_prefill == WithoutPrefill::Fail;
        let healthy = if self.settings.asks_engines {
            Some(self.healthy_engines().await)
        } else {
            None
        };
        let is_healthy_engine =
            |engine: &Arc<EngineView>| healthy.as_ref().is_none_or(|healthy| healthy.contains(&engine.id));
        let missing = [Role::Prefill, Role::Decode]
            .into_iter()
            .filter(|role| needs_prefill || *role == Role::Decode)
            .find(|role| !view.serving(*role).any(is_healthy_engine));
        missing.map_or(Ok(()), |role| Err(ProxyError::NoEngine(role)))
    }
}
