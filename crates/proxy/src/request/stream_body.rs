//! The body of a streamed answer: forwards events as they come and holds everything that the request occupies.
//!
//! When it ends or is dropped, the engine leases, the admission permit and the timers end with it. It never ends
//! silently: if the stream breaks, stalls, loses its engine or reports a failed generation, it ends with an error
//! event.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};

use super::answer::{EventScan, scan_events};
use super::first_token::EventRewriter;
use crate::Shared;
use crate::body::sse::{self, Events};
use crate::body::usage::{PrefillUsage, Proof};
use crate::error::{Cause, RequestStage};
use crate::schedule::lease::EngineLease;
use crate::telemetry::metrics::{ClientOutcome, HandoffOutcome};
use crate::telemetry::record::Record;
use crate::transfer::{Transfer, UnprovenTransfer};
use crate::upstream::AnswerBody;
use xpyd_base::fleet::EngineView;

/// Holds the request's admission permit and measures the time between reads.
#[derive(Debug)]
pub(crate) struct TokenTimer {
    pub(crate) record: Arc<Record>,
    /// When the stream was last read.
    pub(crate) last_read: Option<Instant>,
    pub(crate) _permit: Arc<OwnedSemaphorePermit>,
}

impl TokenTimer {
    fn read(&mut self, now: Instant) {
        if let Some(before) = self.last_read.replace(now) {
            self.record.observe_token_gap(now - before);
        }
    }
}

/// Records how a hand-off ended, once: when it is dropped, which is when the answer ends.
#[derive(Debug)]
pub(crate) struct OutcomeOnDrop {
    pub(crate) record: Arc<Record>,
    pub(crate) outcome: HandoffOutcome,
    /// The engines of a client's hand-off, for the check of pairs.
    pub(crate) pair: Option<(Arc<Shared>, Vec<Arc<EngineView>>)>,
    /// Whether the first event came late.
    pub(crate) crawled: bool,
}

impl Drop for OutcomeOnDrop {
    fn drop(&mut self) {
        self.record.observe_outcome(self.outcome);
        let is_bad = match self.outcome {
            HandoffOutcome::Recomputed => true,
            HandoffOutcome::Transferred | HandoffOutcome::Sent => self.crawled,
            HandoffOutcome::Bypassed | HandoffOutcome::Failed | HandoffOutcome::Refused => return,
        };
        if let Some((shared, engines)) = &self.pair {
            shared.note_handoff(engines, is_bad);
        }
    }
}

/// How a complete stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// With OpenAI's end marker.
    Marker,
    /// With any event: only the connection's end shows that it is complete.
    AnyEvent,
}

/// Everything that a stream needs besides the engine's bytes.
#[derive(Debug)]
pub(crate) struct StreamContext {
    /// The lease on the decode engine.
    pub(crate) lease: Arc<EngineLease>,
    /// The stage that fails if the stream breaks off.
    pub(crate) stage: RequestStage,
    /// Maximum time between two reads.
    pub(crate) idle: Duration,
    pub(crate) end: StreamEnd,
    /// Cuts the bytes into events. `None` if the answer is not an event stream.
    pub(crate) events: Option<Events>,
    /// Rewrites events for the client, if the first token came from the prefill engine.
    pub(crate) rewriter: Option<EventRewriter>,
    /// The transfer that the first byte proves.
    pub(crate) transfer: Option<Transfer>,
    /// The transfer after the first byte, until the usage shows whether its KV was used.
    pub(crate) unproven: Option<UnprovenTransfer>,
    /// The prefill engine's usage, which the client gets.
    pub(crate) usage: Option<PrefillUsage>,
    pub(crate) on_drop: Option<OutcomeOnDrop>,
    pub(crate) timer: TokenTimer,
}

impl StreamContext {
    /// The members that every stream needs.
    pub(crate) fn new(lease: Arc<EngineLease>, idle: Duration, timer: TokenTimer) -> Self {
        Self {
            lease,
            stage: RequestStage::Decode,
            idle,
            end: StreamEnd::Marker,
            events: None,
            rewriter: None,
            transfer: None,
            unproven: None,
            usage: None,
            on_drop: None,
            timer,
        }
    }

    /// Records that data arrived. Only events show the time between tokens.
    fn record_progress(&mut self, now: Instant) {
        if self.events.is_some() {
            self.timer.read(now);
        }
        if let Some(mut transfer) = self.transfer.take() {
            self.unproven = Some(transfer.answered());
        }
    }

    fn set_outcome(&mut self, outcome: HandoffOutcome) {
        if let Some(on_drop) = &mut self.on_drop {
            on_drop.outcome = outcome;
        }
    }

    /// Applies what the usage proves about the hand-off, unless the generation has failed.
    fn prove(&mut self, proof: Proof) {
        if let Some(unproven) = &mut self.unproven {
            unproven.prove(proof);
        }
        if let Some(on_drop) = self
            .on_drop
            .as_mut()
            .filter(|on_drop| on_drop.outcome == HandoffOutcome::Sent)
        {
            match proof {
                Proof::Received => on_drop.outcome = HandoffOutcome::Transferred,
                Proof::Computed => on_drop.outcome = HandoffOutcome::Recomputed,
                Proof::None => {}
            }
        }
    }

    /// Called when the client gets a piece. A client that has the end marker can leave without waiting for the
    /// connection's end.
    fn sent(&mut self, is_last: bool) {
        if is_last && self.events.as_ref().is_some_and(Events::is_done) {
            self.timer.record.stream_ended(ClientOutcome::Answered);
        }
    }

    fn is_complete(&self) -> bool {
        self.end == StreamEnd::AnyEvent || self.events.as_ref().is_none_or(Events::is_done)
    }
}

/// The body of a streamed answer.
pub(crate) struct StreamBody {
    /// `None` once the stream has ended.
    inner: Option<AnswerBody>,
    ready: VecDeque<Bytes>,
    idle: Pin<Box<Sleep>>,
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    stream: StreamContext,
}

impl StreamBody {
    /// A body that sends `first`, then the bytes of `inner`.
    pub(crate) fn new(first: Bytes, inner: AnswerBody, mut stream: StreamContext) -> Self {
        stream.timer.record.begin_stream();
        if stream.events.is_some() {
            stream.timer.read(Instant::now());
        }
        let mut body = Self {
            inner: Some(inner),
            ready: VecDeque::from_iter((!first.is_empty()).then_some(first)),
            idle: Box::pin(tokio::time::sleep(stream.idle)),
            gone: Box::pin({
                let lease = Arc::clone(&stream.lease);
                async move { lease.gone().await }
            }),
            stream,
        };
        body.finish_if_complete();
        body
    }

    /// A body that sends the whole events already read from `inner`, then the rest of it.
    pub(crate) fn after(read: Bytes, inner: AnswerBody, stream: StreamContext) -> Self {
        let mut body = Self::new(Bytes::new(), inner, stream);
        if let Err(cause) = body.pass_on(read) {
            body.fail(cause).expect("only what is no stream of events fails so");
        }
        body.finish_if_complete();
        body
    }

    fn receive(&mut self, bytes: Bytes) -> Result<(), Cause> {
        let (bytes, has_data) = match &mut self.stream.events {
            Some(events) => {
                let whole = events.push(bytes);
                let has_data = events.is_within_data() || sse::given(&whole).next().is_some();
                (whole, has_data)
            }
            None => (bytes, true),
        };
        if has_data {
            let now = Instant::now();
            self.idle.as_mut().reset(now + self.stream.idle);
            self.stream.record_progress(now);
        }
        self.pass_on(bytes)?;
        self.finish_if_complete();
        Ok(())
    }

    /// Ends the stream if it is complete and nothing more comes.
    fn finish_if_complete(&mut self) {
        let is_over = self.inner.as_ref().is_some_and(AnswerBody::is_end_stream);
        if is_over && self.stream.is_complete() {
            self.inner = None;
            self.stream.timer.record.stream_ended(ClientOutcome::Answered);
        }
    }

    /// Queues whole events for the client, up to one that reports a failed generation.
    fn pass_on(&mut self, mut events: Bytes) -> Result<(), Cause> {
        let stream = &mut self.stream;
        let mut failure = None;
        if stream.end == StreamEnd::Marker && stream.events.is_some() {
            match scan_events(&events) {
                EventScan::Good => {}
                // The engine sends the error to the client itself.
                EventScan::ErrorEvent => stream.set_outcome(HandoffOutcome::Failed),
                EventScan::Failed(at, cause) => {
                    events.truncate(at);
                    failure = Some(cause);
                }
            }
        }
        if let Some(usage) = &stream.usage
            && let Some((corrected, proof)) = usage.correct_events(&events)
        {
            events = corrected;
            stream.prove(proof);
        }
        let events = match &mut stream.rewriter {
            Some(rewriter) => rewriter.rewrite(&events),
            None => events,
        };
        stream.timer.record.decode_answered(&events);
        if failure.is_none() && stream.events.as_ref().is_some_and(Events::is_done) {
            // Before the client sees the end, so that a client that reads the metrics next finds it counted.
            stream.on_drop = None;
        }
        if !events.is_empty() {
            self.ready.push_back(events);
        }
        failure.map_or(Ok(()), Err)
    }

    /// Ends the stream early. The engine notices because its connection closes.
    fn fail(&mut self, cause: Cause) -> Result<(), std::io::Error> {
        self.inner = None;
        self.stream.timer.record.stream_ended(ClientOutcome::Broken);
        let error = self.stream.lease.failed(self.stream.stage, cause);
        self.stream.set_outcome(HandoffOutcome::Failed);
        self.stream.on_drop = None;
        if let Some(mut transfer) = self.stream.transfer.take() {
            transfer.failed(&error);
        }
        tracing::warn!(error = xpyd_base::report::one_line(&error), "a stream broke off");
        if self.stream.events.is_none() {
            return Err(std::io::Error::other(error.to_string()));
        }
        if self.stream.end == StreamEnd::AnyEvent {
            // Clients of routes with named events look for this name.
            self.ready.push_back(Bytes::from_static(b"event: error\n"));
        }
        self.ready.push_back(error.to_events());
        Ok(())
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn is_end_stream(&self) -> bool {
        self.inner.is_none() && self.ready.is_empty()
    }

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        loop {
            if let Some(bytes) = this.ready.pop_front() {
                this.stream.sent(this.ready.is_empty());
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            let Some(inner) = &mut this.inner else {
                return Poll::Ready(None);
            };
            let failure = match Pin::new(inner).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data().map(|bytes| this.receive(bytes)) {
                    Ok(Err(cause)) => cause,
                    _ => continue,
                },
                Poll::Ready(None) if this.stream.is_complete() => {
                    this.inner = None;
                    this.stream.timer.record.stream_ended(ClientOutcome::Answered);
                    continue;
                }
                Poll::Ready(None) => Cause::Truncated,
                Poll::Ready(Some(Err(error))) => Cause::Broken(xpyd_base::report::one_line(&error)),
                Poll::Pending if this.gone.as_mut().poll(context).is_ready() => Cause::Gone,
                Poll::Pending if this.idle.as_mut().poll(context).is_ready() => Cause::Timeout(this.stream.idle),
                Poll::Pending => return Poll::Pending,
            };
            if let Err(error) = this.fail(failure) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}
