//! Serves clients: threads that accept connections and serve HTTP/1.1 on them, with or without TLS, until they are
//! stopped.
//!
//! A request stays on the thread that accepted its connection, and so do its engine connections, so that no step of
//! it wakes another thread. This module knows sockets and limits, but no route and no engine.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::TcpListener;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connections::{Activity, Capacity, ConnectionClass, ConnectionSlot, Connections, InFlight};
use super::strict_heads::StrictStream;
use super::tls::Tls;
use crate::overload::{Limit, Overload};
use crate::upstream::Upstream;
use xpyd_base::http1::descriptors;
use xpyd_base::proxy_config::Clients;
use xpyd_base::report::lacks_descriptors;

/// How long to wait if the system has no room for another connection.
const NO_ROOM: Duration = Duration::from_millis(100);

/// Maximum time of a TLS handshake, which is a few small messages.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a new client has for its first request after the proxy stops accepting.
const FIRST_REQUEST: Duration = Duration::from_secs(2);

/// Maximum size of a request header, and of what is read or held for a client at once.
const BUFFER_BYTES: usize = 64 << 10;

/// Send buffer of the kernel for a client. Linux doubles it for its own bookkeeping.
const KERNEL_BYTES: usize = 64 << 10;

/// Cores for each proxy thread: the engines' share of the machine is far larger than the proxy's.
const CORES_PER_THREAD: usize = 8;

/// Maximum number of threads if none is configured.
const MOST_THREADS: usize = 8;

/// Descriptors to request if the usual limit of 1,024 is too low. vLLM requests as many for itself.
const DESCRIPTORS: u64 = 65_535;

/// Descriptors for everything but connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// Maximum connections beyond the limit, for health checks and metrics only.
const MOST_RESERVE: u64 = 64;

/// The limits of client connections.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) clients: Clients,
    /// The certificate, if the proxy serves TLS.
    pub(crate) tls: Option<Tls>,
    /// How long a client can read none of the bytes that wait for it.
    pub(crate) stall: Duration,
    /// Its idle connections give their descriptors to new clients.
    pub(crate) upstream: Upstream,
    /// Counts the limits that are reached.
    pub(crate) overload: Overload,
}

impl Limits {
    fn threads(&self) -> usize {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let fitting = (cores / CORES_PER_THREAD).clamp(1, MOST_THREADS);
        self.clients.threads.map_or(fitting, |threads| threads.max(1))
    }

    /// Maximum number of connections. Each can need a second descriptor for its engine. Idle engine connections do
    /// not count: they give their descriptors back if one is lacking.
    fn capacity(&self) -> Capacity {
        let descriptors = descriptors(DESCRIPTORS);
        let reserve = (descriptors / 16).clamp(1, MOST_RESERVE);
        // As many connections as the reserve has slots can be ending.
        let fitting = descriptors.saturating_sub(OTHER_DESCRIPTORS + 2 * reserve) / 2;
        let count = |descriptors: u64| usize::try_from(descriptors).unwrap_or(usize::MAX);
        Capacity {
            regular: self.clients.max_connections.clamp(1, count(fitting).max(1)),
            reserve: count(reserve),
            per_address: self.clients.max_per_address,
        }
    }
}

/// Serves on all threads until `stop` is cancelled and the last answer is sent. The threads continue with clean-ups
/// that requests have left on them, until they are dropped.
///
/// # Errors
/// When the threads cannot share the listener, or a thread cannot start or breaks off.
pub(crate) async fn serve(
    listener: tokio::net::TcpListener,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
) -> io::Result<Threads> {
    let listener = listener.into_std()?;
    // A burst of clients waits; the standard library's short queue would drop some for seconds.
    listen(&listener, Backlog::MAXCONN)?;
    let connections = Connections::new(limits.capacity(), limits.overload.clone());
    let mut threads = Threads::default();
    let mut ends = Vec::new();
    for number in 1..=limits.threads() {
        let server = Server {
            router: router.clone(),
            limits: limits.clone(),
            connections: connections.clone(),
            stop: stop.clone(),
        };
        let (listener, abandon) = (listener.try_clone()?, threads.abandon.clone());
        let (ended, end) = oneshot::channel();
        let run = move || server.run(listener, ended, &abandon);
        let thread = thread::Builder::new().name(format!("proxy-{number}")).spawn(run)?;
        threads.started.push(thread);
        ends.push(end);
    }
    // Only the threads hold it now, so that clients are refused once they stop accepting.
    drop(listener);
    for end in ends {
        end.await
            .map_err(|_| io::Error::other("a proxy thread stopped unexpectedly"))??;
    }
    Ok(threads)
}

/// The threads of a server. Dropping it ends them and everything that runs on them.
#[derive(Default)]
pub(crate) struct Threads {
    started: Vec<JoinHandle<()>>,
    abandon: CancellationToken,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.abandon.cancel();
        for thread in self.started.drain(..) {
            // A thread that panicked has reported it itself.
            drop(thread.join());
        }
    }
}

/// Everything that one thread serves.
struct Server {
    router: Router,
    limits: Limits,
    connections: Connections,
    stop: CancellationToken,
}

impl Server {
    fn run(&self, listener: TcpListener, ended: oneshot::Sender<io::Result<()>>, abandon: &CancellationToken) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(ended.send(Err(error))),
        };
        let serve = async {
            // Nothing waits for threads that are being dropped.
            drop(ended.send(self.serve(listener).await));
            std::future::pending::<()>().await;
        };
        runtime.block_on(abandon.run_until_cancelled(serve));
    }

    async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let serving = TaskTracker::new();
        while let Some((stream, slot)) = self.stop.run_until_cancelled(self.accept(&listener)).await {
            let (stream, session) = self.begin(stream, slot);
            match &self.limits.tls {
                None => serving.spawn(session.serve_http1(stream)),
                Some(tls) => serving.spawn(session.accept_tls(tls.acceptor(), stream)),
            };
        }
        drop(listener);
        serving.close();
        serving.wait().await;
        Ok(())
    }

    /// Accepts the next client once there is room. Others wait in the kernel's queue.
    async fn accept(&self, listener: &tokio::net::TcpListener) -> (TcpStream, ConnectionSlot) {
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    if let Some(slot) = self.connections.admit(address.ip(), &self.stop).await {
                        return (stream, slot);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if lacks_descriptors(&error) => {
                    if self.limits.upstream.close_all_idle() {
                        continue;
                    }
                    self.limits.overload.reached(Limit::AcceptDescriptors);
                    self.connections.make_room();
                    tokio::time::sleep(NO_ROOM).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client's connection");
                    tokio::time::sleep(NO_ROOM).await;
                }
            }
        }
    }

    /// Prepares one client's connection for serving.
    fn begin(&self, stream: TcpStream, slot: ConnectionSlot) -> (WriteTimeoutStream, ClientSession) {
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%error, "cannot set the options of a client's connection");
        }
        let stream = WriteTimeoutStream {
            stream,
            stall: self.limits.stall,
            stalled: None,
            activity: Arc::clone(&slot.activity),
        };
        let clients = &self.limits.clients;
        let session = ClientSession {
            router: self.router.clone(),
            head_deadline: clients.head_deadline.min(clients.idle_deadline),
            idle_deadline: clients.idle_deadline,
            accepted: Instant::now(),
            stop: self.stop.clone(),
            slot,
        };
        (stream, session)
    }
}

/// Serves one client.
struct ClientSession {
    router: Router,
    head_deadline: Duration,
    idle_deadline: Duration,
    accepted: Instant,
    stop: CancellationToken,
    slot: ConnectionSlot,
}

impl ClientSession {
    /// Serves over TLS after the handshake.
    async fn accept_tls(mut self, tls: TlsAcceptor, stream: WriteTimeoutStream) {
        self.slot.report_activity();
        let deadline = self.idle_deadline.min(HANDSHAKE_DEADLINE);
        let handshake = timeout(deadline, tls.accept(stream));
        tokio::select! {
            biased;
            shaken = handshake => match shaken {
                Ok(Ok(stream)) => self.serve_http1(stream).await,
                Ok(Err(error)) => tracing::debug!(%error, "a client's TLS handshake failed"),
                Err(_) => self.slot.reached(Limit::FirstHead),
            },
            // No request has come yet, so the end does not wait for one.
            () = closable(&self.slot.end, &self.stop, self.accepted, || false) => {}
        }
    }

    /// Serves until the client leaves, breaks a limit, gives way to another one, or has its answer after the stop.
    fn serve_http1<Stream>(self, stream: Stream) -> impl Future<Output = ()> + use<Stream>
    where
        Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut slot, head_deadline) = (self.slot, self.head_deadline);
        let is_regular = slot.class == ConnectionClass::Regular;
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.idle_deadline)
            .max_buf_size(BUFFER_BYTES)
            .keep_alive(is_regular)
            .serve_connection(TokioIo::new(StrictStream::new(stream)), service(self.router, &slot));
        let (stop, accepted) = (self.stop, self.accepted);
        async move {
            let (activity, end) = (Arc::clone(&slot.activity), slot.end.clone());
            let overdue = async {
                tokio::time::sleep(head_deadline).await;
                // In the reserve, this deadline covers the whole connection.
                if is_regular && activity.has_begun() {
                    std::future::pending::<()>().await;
                }
            };
            let mut connection = pin!(connection);
            let served = tokio::select! {
                biased;
                served = drive(connection.as_mut(), &mut slot) => served,
                () = closable(&end, &stop, accepted, || activity.has_begun()) => {
                    connection.as_mut().graceful_shutdown();
                    if activity.is_quiet() {
                        return;
                    }
                    drive(connection.as_mut(), &mut slot).await
                }
                () = overdue => return slot.reached(Limit::FirstHead),
            };
            if let Err(error) = served {
                tracing::debug!(
                    error = xpyd_base::report::one_line(&error),
                    "a client's connection broke off"
                );
            }
        }
    }
}

/// Returns once the connection can close: when it gives way to another one, or after the stop, once the client's
/// first request has come or its time for one is over.
async fn closable(end: &CancellationToken, stop: &CancellationToken, accepted: Instant, has_asked: impl Fn() -> bool) {
    end.cancelled().await;
    if !stop.is_cancelled() {
        return;
    }
    let mut late = pin!(sleep_until(accepted + FIRST_REQUEST));
    // Checked whenever the connection's task wakes, so a request needs no wake-up of its own.
    poll_fn(|context| {
        if has_asked() {
            Poll::Ready(())
        } else {
            late.as_mut().poll(context)
        }
    })
    .await;
}

/// The service that answers the requests of one connection.
fn service(
    router: Router,
    slot: &ConnectionSlot,
) -> impl hyper::service::Service<Request<Incoming>, Response = Response<InFlightBody>, Error = Infallible, Future: Send>
+ use<> {
    let (activity, class) = (Arc::clone(&slot.activity), slot.class);
    service_fn(move |mut request: Request<Incoming>| {
        let in_flight = activity.begin();
        if let ConnectionClass::Reserve(limit) = class {
            request.extensions_mut().insert(limit);
        }
        let answer = TowerToHyperService::new(router.clone()).call(request);
        async move {
            let answer = answer.await?;
            Ok(answer.map(|body| InFlightBody {
                body,
                _in_flight: in_flight,
            }))
        }
    })
}

/// The body of an answer. Its request is in flight until it is dropped.
struct InFlightBody {
    body: Body,
    _in_flight: InFlight,
}

impl hyper::body::Body for InFlightBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Drives a connection, and reports to the connection table what each step has changed.
async fn drive<Connection: Future>(
    mut connection: Pin<&mut Connection>,
    slot: &mut ConnectionSlot,
) -> Connection::Output {
    poll_fn(|context| {
        let step = connection.as_mut().poll(context);
        slot.report_activity();
        step
    })
    .await
}
/// Events are small and urgent, so they leave at once. A small kernel buffer lets the proxy notice a client that
/// stops reading.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    Ok(setsockopt(stream, sockopt::SndBuf, &KERNEL_BYTES)?)
}

/// A client's connection that breaks if the client takes none of the waiting bytes for too long: it has stopped
/// reading or vanished. The kernel's own deadline (`TCP_USER_TIMEOUT`) does not work: it also cuts off clients that
/// read slowly.
struct WriteTimeoutStream {
    stream: TcpStream,
    stall: Duration,
    /// Runs while the kernel takes no more bytes.
    stalled: Option<Pin<Box<Sleep>>>,
    activity: Arc<Activity>,
}

impl WriteTimeoutStream {
    fn watch_stall(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.activity.set_blocked(written.is_pending());
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stall = self.stall;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall)));
        stalled
            .as_mut()
            .poll(context)
            .map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for WriteTimeoutStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for WriteTimeoutStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch_stall(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.watch_stall(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
