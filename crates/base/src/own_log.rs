//! xpyd's own log: events of `tracing`, rate-limited by kind, and written by a separate thread.
//!
//! Logging never waits for a disk or a terminal: lines that the queue does not take are dropped and counted. `XPYD_LOG` filters
//! events, in the syntax of `tracing_subscriber::EnvFilter`.

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

/// The capacity of the queue, in lines. Each is a few kilobytes at most.
const MOST_WAITING: usize = 1024;

/// Time between two reports of suppressed and lost lines.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// How long the end of the program waits for the last lines.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// The prefix of targets that go to the proxy's log.
const PROXY: &str = "xpyd_proxy";

/// The running log. Dropping it waits, for a bounded time, until all queued lines are written.
pub struct OwnLog(Arc<Shared>);

impl fmt::Debug for OwnLog {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OwnLog").finish_non_exhaustive()
    }
}

/// The destination of the lines.
enum Sink {
    /// One file for the proxy, and one for everything else.
    Files { proxy: Box<LogFile>, xpyd: Box<LogFile> },
    /// Standard error, for all lines.
    StandardError,
}

/// The key of the rate limit.
#[derive(Clone)]
struct Kind {
    /// The call site.
    place: &'static Metadata<'static>,
    /// A further distinction by the call site.
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

struct QueuedLine {
    is_of_proxy: bool,
    line: String,
}

struct Shared {
    queue: SyncSender<QueuedLine>,
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
    pub fn to_files(folder: &Path, limits: LogLimits) -> io::Result<Self> {
        let open = |name| LogFile::open(&folder.join(name), limits).map(Box::new);
        Self::start(Sink::Files {
            proxy: open("proxy.log")?,
            xpyd: open("xpyd.log")?,
        })
    }

    /// Writes to standard error.
    ///
    /// # Errors
    /// When the program already has a log.
    pub fn to_standard_error() -> io::Result<Self> {
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
        // The thread ends with the program, because the global subscriber keeps the queue open.
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
        // A disk that does not respond must not delay the end of the program.
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
        // Counted first, because the writer can be quicker.
        *lock(&self.unwritten) += 1;
        if self.queue.try_send(QueuedLine { is_of_proxy, line }).is_err() {
            *lock(&self.unwritten) -= 1;
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write_all(&self, lines: &Receiver<QueuedLine>, mut sink: Sink) {
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

    /// Writes which lines are missing, and how many.
    fn report(&self, sink: &mut Sink) {
        let suppressed = lock(&self.limiter).take_suppressed();
        for (Kind { place, of }, count) in suppressed {
            let is_of_proxy = place.target().starts_with(PROXY);
            let (name, of) = (place.name(), if of.is_empty() { of } else { format!(" kind={of}") });
            let line = line::line(
                place,
                &format!("{count} more lines of this kind were left out{of} place=\"{name}\""),
            );
            sink.write(&QueuedLine { is_of_proxy, line });
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let now = jiff::Timestamp::now();
            let line = format!(
                "{now:.6}  WARN xpyd_base::own_log: {lost} lines are lost: they were not written fast enough\n"
            );
            sink.write(&QueuedLine {
                is_of_proxy: false,
                line,
            });
        }
    }
}

impl Sink {
    fn write(&mut self, waiting: &QueuedLine) {
        let line = waiting.line.as_bytes();
        match self {
            Self::Files { proxy, .. } if waiting.is_of_proxy => proxy.take(line),
            Self::Files { xpyd, .. } => xpyd.take(line),
            // If standard error is closed, the error cannot be reported.
            Self::StandardError => drop(io::stderr().write_all(line)),
        }
    }
}

/// Locks even after a panic, which leaves no inconsistent state here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
