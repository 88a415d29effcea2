//! xpyd's own log: what the program reports through `tracing`, limited by kind, and written by a thread of its own.
//!
//! Whoever reports never waits for a disk or a terminal: lines for which there is no place are dropped and counted.
//! `XPYD_LOG` chooses what is written, in the syntax of `tracing_subscriber::EnvFilter`.

mod limit;
mod line;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use self::limit::Limiter;
use self::line::Values;
use crate::fleet::LogLimits;
use crate::log_file::LogFile;

/// Lines that may wait for the disk. Each is a few kilobytes at most.
const MOST_WAITING: usize = 1024;

/// How often suppressed and lost lines are reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// How long the end of the program may wait for its last lines.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// What the log of the proxy is told from the rest by.
const PROXY: &str = "xpyd::proxy";

/// The running log. Dropping it waits, for a bounded time, until what was reported is written.
pub(crate) struct OwnLog(Arc<Shared>);

impl fmt::Debug for OwnLog {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OwnLog").finish_non_exhaustive()
    }
}

/// Where lines go.
enum Sink {
    /// Of the proxy, and of everything else.
    Files { proxy: Box<LogFile>, xpyd: Box<LogFile> },
    /// All of them.
    StandardError,
}

/// What lines are limited by.
#[derive(Clone)]
struct Kind {
    /// The place in the program.
    place: &'static Metadata<'static>,
    /// What the place itself tells apart.
    of: String,
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.place.callsite() == other.place.callsite() && self.of == other.of
    }
}

impl Eq for Kind {}

impl Hash for Kind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.place.callsite().hash(state);
        self.of.hash(state);
    }
}

struct Waiting {
    is_of_proxy: bool,
    line: String,
}

struct Shared {
    queue: SyncSender<Waiting>,
    limiter: Mutex<Limiter<Kind>>,
    /// Lines that the queue did not take.
    lost: AtomicU64,
    /// Lines that are queued and not yet written.
    unwritten: Mutex<u64>,
    written: Condvar,
}

impl OwnLog {
    /// Writes `proxy.log` and `xpyd.log` in `folder`.
    ///
    /// # Errors
    /// When a file cannot be opened, or the program has a log already.
    pub(crate) fn to_files(folder: &Path, limits: LogLimits) -> io::Result<Self> {
        let open = |name| LogFile::open(&folder.join(name), limits).map(Box::new);
        Self::start(Sink::Files {
            proxy: open("proxy.log")?,
            xpyd: open("xpyd.log")?,
        })
    }

    /// Writes to standard error.
    ///
    /// # Errors
    /// When the program has a log already.
    pub(crate) fn to_standard_error() -> io::Result<Self> {
        Self::start(Sink::StandardError)
    }

    fn start(sink: Sink) -> io::Result<Self> {
        let (queue, lines) = sync_channel(MOST_WAITING);
        let shared = Arc::new(Shared {
            queue,
            limiter: Mutex::default(),
            lost: AtomicU64::new(0),
            unwritten: Mutex::new(0),
            written: Condvar::new(),
        });
        let level = EnvFilter::try_from_env("XPYD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
        let reporter = Reporter(Arc::clone(&shared)).with_filter(level);
        tracing_subscriber::registry()
            .with(reporter)
            .try_init()
            .map_err(io::Error::other)?;
        let writer = Arc::clone(&shared);
        // It ends with the program: the subscriber, which is global, keeps the queue open.
        std::thread::Builder::new()
            .name("own-log".to_owned())
            .spawn(move || writer.write_all(&lines, sink))?;
        Ok(Self(shared))
    }
}

impl Drop for OwnLog {
    fn drop(&mut self) {
        let unwritten = lock(&self.0.unwritten);
        let wait = self
            .0
            .written
            .wait_timeout_while(unwritten, FLUSH_DEADLINE, |unwritten| *unwritten > 0);
        // A disk that takes nothing must not keep the program.
        drop(wait);
    }
}

/// Turns events into lines.
struct Reporter(Arc<Shared>);

impl<S: Subscriber> Layer<S> for Reporter {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let (metadata, mut values) = (event.metadata(), Values::of(event));
        let kind = Kind {
            place: metadata,
            of: std::mem::take(&mut values.kind),
        };
        if lock(&self.0.limiter).admits(&kind, Instant::now()) {
            self.0.queue(metadata, values.line(metadata));
        }
    }
}

impl Shared {
    fn queue(&self, metadata: &Metadata<'_>, line: String) {
        let is_of_proxy = metadata.target().starts_with(PROXY);
        // Counted first, because the writer may be quicker.
        *lock(&self.unwritten) += 1;
        if self.queue.try_send(Waiting { is_of_proxy, line }).is_err() {
            *lock(&self.unwritten) -= 1;
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write_all(&self, lines: &Receiver<Waiting>, mut sink: Sink) {
        let mut report_at = Instant::now() + REPORT_EVERY;
        loop {
            match lines.recv_timeout(report_at.saturating_duration_since(Instant::now())) {
                Ok(waiting) => {
                    sink.write(&waiting);
                    *lock(&self.unwritten) -= 1;
                    self.written.notify_all();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= report_at {
                self.report(&mut sink);
                report_at = Instant::now() + REPORT_EVERY;
            }
        }
    }

    /// Writes what is missing, and how much of it.
    fn report(&self, sink: &mut Sink) {
        let suppressed = lock(&self.limiter).take_suppressed();
        for (Kind { place, of }, count) in suppressed {
            let is_of_proxy = place.target().starts_with(PROXY);
            let (name, of) = (place.name(), if of.is_empty() { of } else { format!(" kind={of}") });
            let line = line::line(
                place,
                &format!("{count} more lines of this kind were left out{of} place=\"{name}\""),
            );
            sink.write(&Waiting { is_of_proxy, line });
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let now = jiff::Timestamp::now();
            let line =
                format!("{now:.6}  WARN xpyd::own_log: {lost} lines are lost: they were not written fast enough\n");
            sink.write(&Waiting {
                is_of_proxy: false,
                line,
            });
        }
    }
}

impl Sink {
    fn write(&mut self, waiting: &Waiting) {
        let line = waiting.line.as_bytes();
        match self {
            Self::Files { proxy, .. } if waiting.is_of_proxy => proxy.take(line),
            Self::Files { xpyd, .. } => xpyd.take(line),
            // There is no other place to say that it is closed.
            Self::StandardError => drop(io::stderr().write_all(line)),
        }
    }
}

/// A panic while it was held has left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
