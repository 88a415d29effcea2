//! The body of a streamed answer: passes events on as they come and holds everything that the request occupies.
//!
//! When it ends or is dropped, the engines' seats, the admission permit and the timers end with it. It never ends
//! silently: a stream that breaks, stalls or loses its engine ends with an error event.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};

use super::error::{Cause, Stage};
use super::ledger::Entry;
use super::metrics::Ending;
use super::record::Record;
use super::splice::Rewriter;
use super::sse::Events;
use super::upstream::Seat;

/// What belongs to a request as long as it is in the proxy, and measures its stream.
#[derive(Debug)]
pub(super) struct Clock {
    pub(super) record: Arc<Record>,
    /// When the stream was last read.
    pub(super) last_read: Option<Instant>,
    pub(super) _permit: Arc<OwnedSemaphorePermit>,
}

impl Clock {
    /// The stream was read; before the first read, it begins.
    fn read(&mut self, now: Instant) {
        match self.last_read.replace(now) {
            Some(before) => self.record.gap(now - before),
            None => self.record.streams(),
        }
    }
}

/// What a stream needs besides the engine's bytes.
#[derive(Debug)]
pub(super) struct Guarded {
    /// The decode engine's seat.
    pub(super) seat: Arc<Seat>,
    /// Longest time between two reads.
    pub(super) idle: Duration,
    /// Cuts the bytes into events; `None` where the answer is no event stream.
    pub(super) events: Option<Events>,
    /// Rewrites events.
    pub(super) rewriter: Option<Rewriter>,
    /// The hand-off that the first byte proves.
    pub(super) entry: Option<Entry>,
    pub(super) clock: Clock,
}

/// The body of a streamed answer.
pub(super) struct GuardedBody {
    /// `None` once the stream has ended.
    inner: Option<Incoming>,
    ready: VecDeque<Bytes>,
    idle: Pin<Box<Sleep>>,
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    guarded: Guarded,
}

impl GuardedBody {
    /// A body that sends `first`, then what comes from `inner`.
    pub(super) fn new(first: Bytes, inner: Incoming, mut guarded: Guarded) -> Self {
        guarded.clock.read(Instant::now());
        guarded.clock.record.decoded(&first);
        Self {
            inner: Some(inner),
            ready: VecDeque::from_iter((!first.is_empty()).then_some(first)),
            idle: Box::pin(tokio::time::sleep(guarded.idle)),
            gone: Box::pin({
                let seat = Arc::clone(&guarded.seat);
                async move { seat.gone().await }
            }),
            guarded,
        }
    }

    fn take(&mut self, bytes: Bytes) {
        if let Some(mut entry) = self.guarded.entry.take() {
            entry.consumed();
        }
        let bytes = match &mut self.guarded.events {
            Some(events) => events.push(bytes),
            None => bytes,
        };
        let bytes = match &mut self.guarded.rewriter {
            Some(rewriter) => rewriter.rewrite(&bytes),
            None => bytes,
        };
        self.guarded.clock.record.decoded(&bytes);
        if !bytes.is_empty() {
            self.ready.push_back(bytes);
        }
    }

    /// Ends the stream before its time. The engine notices because its connection closes.
    fn fail(&mut self, cause: Cause) -> Result<(), std::io::Error> {
        self.inner = None;
        self.guarded.clock.record.stream_ended(Ending::Broken);
        let error = self.guarded.seat.failed(Stage::Decode, cause);
        if let Some(mut entry) = self.guarded.entry.take() {
            entry.failed(&error);
        }
        tracing::warn!(error = crate::report::one_line(&error), "a stream broke off");
        if self.guarded.events.is_none() {
            return Err(std::io::Error::other(error.to_string()));
        }
        self.ready.push_back(error.to_events());
        Ok(())
    }
}

impl Body for GuardedBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        loop {
            if let Some(bytes) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            let Some(inner) = &mut this.inner else {
                return Poll::Ready(None);
            };
            let failure = match Pin::new(inner).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => {
                    let now = Instant::now();
                    this.idle.as_mut().reset(now + this.guarded.idle);
                    if let Ok(bytes) = frame.into_data() {
                        this.guarded.clock.read(now);
                        this.take(bytes);
                    }
                    continue;
                }
                Poll::Ready(None) if this.guarded.events.as_ref().is_none_or(Events::is_done) => {
                    this.inner = None;
                    this.guarded.clock.record.stream_ended(Ending::Answered);
                    continue;
                }
                Poll::Ready(None) => Cause::Truncated,
                Poll::Ready(Some(Err(error))) => Cause::Broken(crate::report::one_line(&error)),
                Poll::Pending if this.gone.as_mut().poll(context).is_ready() => Cause::Gone,
                Poll::Pending if this.idle.as_mut().poll(context).is_ready() => Cause::Timeout(this.guarded.idle),
                Poll::Pending => return Poll::Pending,
            };
            if let Err(error) = this.fail(failure) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}
