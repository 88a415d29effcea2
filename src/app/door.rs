//! Where clients come in: the socket that they connect to, taken over from an earlier xpyd where it held one, and left to
//! the next one.

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
use crate::plan::ProxySpec;
use crate::proxy::Proxy;
use crate::report::{ExitStatus, Failure};
use crate::supervisor;

/// The socket for clients: the one that the shim held, if it listens where the plan says, or a new one.
pub(super) async fn listen(proxy: &ProxySpec, held: Option<OwnedFd>) -> Result<TcpListener, Failure> {
    match held.map(StdListener::from) {
        Some(held) if listens_there(&held, proxy).await => {
            Ok(TcpListener::from_std(held).map_err(anyhow::Error::from)?)
        }
        _ => bind(proxy).await,
    }
}

async fn listens_there(held: &StdListener, proxy: &ProxySpec) -> bool {
    let Ok(address) = held.local_addr() else { return false };
    let Ok(mut wanted) = tokio::net::lookup_host((proxy.host.as_str(), proxy.port)).await else {
        return false;
    };
    wanted.any(|wanted| wanted.ip() == address.ip() && (wanted.port() == 0 || wanted.port() == address.port()))
}

async fn bind(proxy: &ProxySpec) -> Result<TcpListener, Failure> {
    TcpListener::bind((proxy.host.as_str(), proxy.port))
        .await
        .map_err(|error| {
            let context = format!(
                "the proxy cannot listen on {}:{}{}",
                proxy.host,
                proxy.port,
                super::had_by(proxy.port)
            );
            let is_of_port = matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::PermissionDenied);
            let hint = if is_of_port {
                "choose another port with `--port`"
            } else {
                "choose an address of this machine with `--set proxy.host=…`"
            };
            Failure::new(ExitStatus::Preflight, anyhow::Error::new(error).context(context)).hint(hint)
        })
}

/// The service of clients, as long as it lasts.
pub(super) struct Door {
    /// Cancelled when no more connections are to be accepted.
    closing: CancellationToken,
    /// Cancelled when every connection that was accepted is served.
    served: CancellationToken,
}

impl Door {
    /// Begins to serve clients, to the end of `stop`.
    pub(super) fn open(
        parts: &mut JoinSet<()>,
        proxy: Proxy,
        listener: TcpListener,
        view: &watch::Receiver<Arc<FleetView>>,
        stop: &CancellationToken,
        is_attached: bool,
    ) -> Self {
        let (closing, served) = (stop.child_token(), CancellationToken::new());
        let (until, end, mut view) = (closing.clone(), served.clone().drop_guard(), view.clone());
        parts.spawn(async move {
            if is_attached {
                // Clients that connected to the last xpyd, or to none, wait for an answer rather than get 503 at once.
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

    /// Closes the door, and waits until those inside are served. Others wait in the queue of the socket.
    pub(super) fn hand_over(self) -> supervisor::HandOver {
        Box::new(move || {
            self.closing.cancel();
            Box::pin(self.served.clone().cancelled_owned())
        })
    }
}
