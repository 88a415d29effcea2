//! Serves clients: threads that accept connections and speak HTTP/1.1 on them, over TLS or not, until they are told to stop.
//!
//! A request stays on the thread that accepted its connection, engines' connections included, so that no step of it
//! wakes another thread. Knows sockets and limits; knows no route and no engine.

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

use super::connections::{Activity, Capacity, Class, Connections, InFlight, Place};
use super::strict_heads::Strict;
use super::tls::Tls;
use crate::proxy::overload::{Limit, Overload};
use crate::proxy::upstream::Upstream;
use crate::report::lacks_descriptors;
use crate::service::Clients;
use crate::wire::descriptors;

/// How long to wait for room when the system has none for another connection.
const NO_ROOM: Duration = Duration::from_millis(100);

/// Longest that a TLS handshake may take, which is a few small messages.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a client that has just connected gets to ask something, once no more are accepted.
const FIRST_REQUEST: Duration = Duration::from_secs(2);

/// Largest head of a request, and most that is read or held for a client at once.
const BUFFER_BYTES: usize = 64 << 10;

/// What the kernel may hold for a client. Linux doubles it, for its own bookkeeping.
const KERNEL_BYTES: usize = 64 << 10;

/// Cores that one thread keeps up with: the engines' share of the machine is far larger than the proxy's.
const CORES_PER_THREAD: usize = 8;

/// Most threads that are started where no number is given.
const MOST_THREADS: usize = 8;

/// Descriptors that are asked for where the usual limit of 1,024 is in the way. vLLM asks for as many for itself.
const DESCRIPTORS: u64 = 65_535;

/// Descriptors for everything that is no connection.
const OTHER_DESCRIPTORS: u64 = 64;

/// Most connections beyond the limit, which are for health checks and metrics alone.
const MOST_RESERVE: u64 = 64;

/// What clients are held to.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) clients: Clients,
    /// What they are shown, if TLS is spoken.
    pub(crate) tls: Option<Tls>,
    /// How long a client may take no byte of what there is for it.
    pub(crate) stall: Duration,
    /// Whose idle connections give their descriptors to clients that have none.
    pub(crate) upstream: Upstream,
    /// Where limits that are reached are counted.
    pub(crate) overload: Overload,
}

impl Limits {
    fn threads(&self) -> usize {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let fitting = (cores / CORES_PER_THREAD).clamp(1, MOST_THREADS);
        self.clients.threads.map_or(fitting, |threads| threads.max(1))
    }

    /// Connections at once. Each may need a second descriptor for its engine. Idle connections to engines are not counted: they
    /// give theirs back where one is lacking.
    fn capacity(&self) -> Capacity {
        let descriptors = descriptors(DESCRIPTORS);
        let reserve = (descriptors / 16).clamp(1, MOST_RESERVE);
        // As many as the reserve has may be on their way out.
        let fitting = descriptors.saturating_sub(OTHER_DESCRIPTORS + 2 * reserve) / 2;
        let count = |descriptors: u64| usize::try_from(descriptors).unwrap_or(usize::MAX);
        Capacity {
            regular: self.clients.max_connections.clamp(1, count(fitting).max(1)),
            reserve: count(reserve),
            per_address: self.clients.max_per_address,
        }
    }
}

/// Serves on all threads until `stop` is cancelled and the last answer is sent. The threads go on with what requests have
/// left behind on them, until they are dropped.
///
/// # Errors
/// When the listener cannot be shared among threads, or a thread cannot be started or breaks off.
pub(crate) async fn serve(
    listener: tokio::net::TcpListener,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
) -> io::Result<Threads> {
    let listener = listener.into_std()?;
    // A burst of clients waits; the short queue of the standard library would lose some for seconds.
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
    // Only the threads hold it now, so that clients are refused once they have stopped accepting.
    drop(listener);
    for end in ends {
        end.await
            .map_err(|_| io::Error::other("a thread of the proxy broke off"))??;
    }
    Ok(threads)
}

/// The threads of a server. Dropping it ends them, with everything that runs on them.
#[derive(Default)]
pub(crate) struct Threads {
    started: Vec<JoinHandle<()>>,
    abandon: CancellationToken,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.abandon.cancel();
        for thread in self.started.drain(..) {
            // It panicked, which it has said itself.
            drop(thread.join());
        }
    }
}

/// What one thread serves.
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
            // Nobody waits any more for threads that are being dropped.
            drop(ended.send(self.serve(listener).await));
            std::future::pending::<()>().await;
        };
        runtime.block_on(abandon.run_until_cancelled(serve));
    }

    async fn serve(&self, listener: TcpListener) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let serving = TaskTracker::new();
        while let Some((stream, place)) = self.stop.run_until_cancelled(self.accept(&listener)).await {
            let (stream, session) = self.begin(stream, place);
            match &self.limits.tls {
                None => serving.spawn(session.speak(stream)),
                Some(tls) => serving.spawn(session.shake_hands(tls.acceptor(), stream)),
            };
        }
        drop(listener);
        serving.close();
        serving.wait().await;
        Ok(())
    }

    /// The next client, once there is room for it. Others wait in the kernel's queue meanwhile.
    async fn accept(&self, listener: &tokio::net::TcpListener) -> (TcpStream, Place) {
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    if let Some(place) = self.connections.admit(address.ip(), &self.stop).await {
                        return (stream, place);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if lacks_descriptors(&error) => {
                    if self.limits.upstream.give_back() {
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

    /// One client's connection, about to be served.
    fn begin(&self, stream: TcpStream, place: Place) -> (Patient, Session) {
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%error, "cannot set the options of a client's connection");
        }
        let stream = Patient {
            stream,
            stall: self.limits.stall,
            stalled: None,
            activity: Arc::clone(&place.activity),
        };
        let clients = &self.limits.clients;
        let session = Session {
            router: self.router.clone(),
            head_deadline: clients.head_deadline.min(clients.idle_deadline),
            idle_deadline: clients.idle_deadline,
            accepted: Instant::now(),
            stop: self.stop.clone(),
            place,
        };
        (stream, session)
    }
}

/// What serves one client.
struct Session {
    router: Router,
    head_deadline: Duration,
    idle_deadline: Duration,
    accepted: Instant,
    stop: CancellationToken,
    place: Place,
}

impl Session {
    /// Serves over TLS, once client and proxy have agreed on it.
    async fn shake_hands(mut self, tls: TlsAcceptor, stream: Patient) {
        self.place.settle();
        let deadline = self.idle_deadline.min(HANDSHAKE_DEADLINE);
        let handshake = timeout(deadline, tls.accept(stream));
        tokio::select! {
            biased;
            shaken = handshake => match shaken {
                Ok(Ok(stream)) => self.speak(stream).await,
                Ok(Err(error)) => tracing::debug!(%error, "a client's TLS handshake failed"),
                Err(_) => self.place.reached(Limit::FirstHead),
            },
            // Nothing has been asked for yet, so an end does not wait for it.
            () = may_close(&self.place.end, &self.stop, self.accepted, || false) => {}
        }
    }

    /// Serves until the client leaves, breaks a limit, gives way to another one, or has its answer after the stop.
    fn speak<Stream>(self, stream: Stream) -> impl Future<Output = ()> + use<Stream>
    where
        Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut place, head_deadline) = (self.place, self.head_deadline);
        let is_regular = place.class == Class::Regular;
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.idle_deadline)
            .max_buf_size(BUFFER_BYTES)
            .keep_alive(is_regular)
            .serve_connection(TokioIo::new(Strict::new(stream)), service(self.router, &place));
        let (stop, accepted) = (self.stop, self.accepted);
        async move {
            let (activity, end) = (Arc::clone(&place.activity), place.end.clone());
            let overdue = async {
                tokio::time::sleep(head_deadline).await;
                // In the reserve, this is the deadline of everything.
                if is_regular && activity.has_begun() {
                    std::future::pending::<()>().await;
                }
            };
            let mut connection = pin!(connection);
            let served = tokio::select! {
                biased;
                served = settling(connection.as_mut(), &mut place) => served,
                () = may_close(&end, &stop, accepted, || activity.has_begun()) => {
                    connection.as_mut().graceful_shutdown();
                    if activity.is_quiet() {
                        return;
                    }
                    settling(connection.as_mut(), &mut place).await
                }
                () = overdue => return place.reached(Limit::FirstHead),
            };
            if let Err(error) = served {
                tracing::debug!(
                    error = crate::report::one_line(&error),
                    "a client's connection ended early"
                );
            }
        }
    }
}

/// Returns once a connection need not be kept for what its client may still ask: when it gives way to another one, or after
/// the stop, and after the client's first request or the time that it gets for one.
async fn may_close(end: &CancellationToken, stop: &CancellationToken, accepted: Instant, has_asked: impl Fn() -> bool) {
    end.cancelled().await;
    if !stop.is_cancelled() {
        return;
    }
    let mut late = pin!(sleep_until(accepted + FIRST_REQUEST));
    // Looked at whenever the connection's task wakes, so a request is seen without a wake-up of its own.
    poll_fn(|context| {
        if has_asked() {
            Poll::Ready(())
        } else {
            late.as_mut().poll(context)
        }
    })
    .await;
}

/// What answers the requests of one connection.
fn service(
    router: Router,
    place: &Place,
) -> impl hyper::service::Service<Request<Incoming>, Response = Response<Answer>, Error = Infallible, Future: Send> + use<>
{
    let (activity, class) = (Arc::clone(&place.activity), place.class);
    service_fn(move |mut request: Request<Incoming>| {
        let in_flight = activity.begin();
        if let Class::Reserve(limit) = class {
            request.extensions_mut().insert(limit);
        }
        let answer = TowerToHyperService::new(router.clone()).call(request);
        async move {
            let answer = answer.await?;
            Ok(answer.map(|body| Answer {
                body,
                _in_flight: in_flight,
            }))
        }
    })
}

/// The body of an answer. Its request is in flight until it is dropped.
struct Answer {
    body: Body,
    _in_flight: InFlight,
}

impl hyper::body::Body for Answer {
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

/// Drives a connection, and tells the table of connections what every step of it has changed.
async fn settling<Connection: Future>(mut connection: Pin<&mut Connection>, place: &mut Place) -> Connection::Output {
    poll_fn(|context| {
        let step = connection.as_mut().poll(context);
        place.settle();
        step
    })
    .await
}
/// Events are small and each one matters, so they leave at once. What the kernel holds for a client is kept small, so that
/// a client that stops reading is noticed.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    Ok(setsockopt(stream, sockopt::SndBuf, &KERNEL_BYTES)?)
}

/// A client's connection, which breaks once the client has taken nothing for too long of what there is for it: it has
/// stopped reading, or is gone without a word. The kernel's own deadline (`TCP_USER_TIMEOUT`) does not do: it also cuts off
/// clients that take a little at a time.
struct Patient {
    stream: TcpStream,
    stall: Duration,
    /// Runs while the kernel takes no more bytes.
    stalled: Option<Pin<Box<Sleep>>>,
    activity: Arc<Activity>,
}

impl Patient {
    fn noting(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
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

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.noting(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.noting(context, written)
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
