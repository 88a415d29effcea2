//! The socket on which clients connect: new, or taken over from an earlier xpyd through the shim, and left to the next one.

use std::io::ErrorKind;
use std::net::TcpListener as StdListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::fleet::{FleetStage, FleetView};
use crate::plan::ProxyPlan;
use crate::proxy::Proxy;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::HookFuture;

/// The socket for clients: the one that the shim held, if it has the planned address, or a new one.
pub(super) async fn listen(proxy: &ProxyPlan, held: Option<OwnedFd>) -> Result<TcpListener, Failure> {
    match held.map(StdListener::from) {
        Some(held) if listens_there(&held, proxy).await => {
            Ok(TcpListener::from_std(held).map_err(anyhow::Error::from)?)
        }
        _ => bind(proxy).await,
    }
}

async fn listens_there(held: &StdListener, proxy: &ProxyPlan) -> bool {
    let Ok(address) = held.local_addr() else { return false };
    let Ok(mut wanted) = tokio::net::lookup_host((proxy.config.host.as_str(), proxy.config.port)).await else {
        return false;
    };
    wanted.any(|wanted| wanted.ip() == address.ip() && (wanted.port() == 0 || wanted.port() == address.port()))
}

async fn bind(proxy: &ProxyPlan) -> Result<TcpListener, Failure> {
    TcpListener::bind((proxy.config.host.as_str(), proxy.config.port))
        .await
        .map_err(|error| {
            let context = format!(
                "the proxy cannot listen on {}:{}{}",
                proxy.config.host,
                proxy.config.port,
                super::port_holder(proxy.config.port)
            );
            let is_of_port = matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::PermissionDenied);
            let hint = if is_of_port {
                "choose another port with `--port`"
            } else {
                "choose an address of this machine with `--set proxy.config.host=…`"
            };
            Failure::new(ExitStatus::Preflight, anyhow::Error::new(error).context(context)).hint(hint)
        })
}

/// Accepts clients and serves them with the proxy.
pub(super) struct ClientService {
    /// Cancelled to accept no more connections.
    closing: CancellationToken,
    /// Cancelled once every accepted connection is served.
    served: CancellationToken,
}

impl ClientService {
    /// Serves clients until `stop` is cancelled.
    pub(super) fn start(
        parts: &mut JoinSet<()>,
        proxy: &Proxy,
        listener: TcpListener,
        view: &watch::Receiver<Arc<FleetView>>,
        stop: &CancellationToken,
        is_attached: bool,
    ) -> Self {
        let (proxy, closing, served) = (proxy.clone(), stop.child_token(), CancellationToken::new());
        let (until, end, mut view) = (closing.clone(), served.clone().drop_guard(), view.clone());
        parts.spawn(async move {
            if is_attached {
                // Clients that connected before this xpyd came wait for it, rather than get 503 at once.
                let open = view.wait_for(|view| !matches!(view.stage, FleetStage::Starting | FleetStage::Verifying));
                let _ = until.run_until_cancelled(timeout(proxy.queue_deadline(), open)).await;
            }
            if let Err(error) = proxy.serve(listener, until).await {
                tracing::error!(%error, "the proxy stopped serving");
            }
            drop(end);
        });
        Self { closing, served }
    }

    /// Accepts no more connections, and completes once the accepted ones are served. Others wait in the kernel's queue.
    pub(super) fn hand_over(&self) -> HookFuture<()> {
        self.closing.cancel();
        Box::pin(self.served.clone().cancelled_owned())
    }
}
