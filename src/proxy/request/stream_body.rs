//! The body of a streamed answer: passes events on as they come and holds everything that the request occupies.
//!
//! When it ends or is dropped, the engines' seats, the admission permit and the timers end with it. It never ends
//! silently: a stream that breaks, stalls, loses its engine or says that its generation failed ends with an error event.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};

use super::answer::{Seen, look};
use super::first_token::Rewriter;
use crate::fleet::EngineView;
use crate::proxy::Shared;
use crate::proxy::body::sse::{self, Events};
use crate::proxy::body::usage::{PrefillUsage, Proof};
use crate::proxy::error::{Cause, Stage};
use crate::proxy::schedule::lease::Seat;
use crate::proxy::telemetry::metrics::{Ending, Outcome};
use crate::proxy::telemetry::record::Record;
use crate::proxy::transfer::{Entry, Unproven};
use crate::proxy::upstream::AnswerBody;

/// What belongs to a request as long as it is in the proxy, and measures its stream.
#[derive(Debug)]
pub(crate) struct Clock {
    pub(crate) record: Arc<Record>,
    /// When the stream was last read.
    pub(crate) last_read: Option<Instant>,
    pub(crate) _permit: Arc<OwnedSemaphorePermit>,
}

impl Clock {
    fn read(&mut self, now: Instant) {
        if let Some(before) = self.last_read.replace(now) {
            self.record.gap(now - before);
        }
    }
}

/// Counts how a hand-off ended, once: when it is dropped, which is when the answer is over.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) record: Arc<Record>,
    pub(crate) outcome: Outcome,
    /// The engines of a client's hand-off, for the judgement of pairs.
    pub(crate) pair: Option<(Arc<Shared>, Vec<Arc<EngineView>>)>,
    /// Whether the first event came late.
    pub(crate) crawled: bool,
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.record.handed(self.outcome);
        let is_bad = match self.outcome {
            Outcome::Recomputed => true,
            Outcome::Transferred | Outcome::Sent => self.crawled,
            Outcome::Bypassed | Outcome::Failed | Outcome::Refused => return,
        };
        if let Some((shared, engines)) = &self.pair {
            shared.note_handoff(engines, is_bad);
        }
    }
}

/// How a stream that is complete ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// With OpenAI's end marker.
    Marker,
    /// With any event: only the connection tells whether it is complete.
    AnyEvent,
}

/// What a stream needs besides the engine's bytes.
#[derive(Debug)]
pub(crate) struct Guarded {
    /// The decode engine's seat.
    pub(crate) seat: Arc<Seat>,
    /// What fails when it breaks off.
    pub(crate) stage: Stage,
    /// Longest time between two reads.
    pub(crate) idle: Duration,
    pub(crate) end: End,
    /// Cuts the bytes into events; `None` where the answer is no event stream.
    pub(crate) events: Option<Events>,
    /// Rewrites events.
    pub(crate) rewriter: Option<Rewriter>,
    /// The hand-off that the first byte proves.
    pub(crate) entry: Option<Entry>,
    /// The hand-off once the first byte has come, until the usage tells whether its KV was used.
    pub(crate) unproven: Option<Unproven>,
    /// What the prefill engine used, where one did; the client is told of that.
    pub(crate) usage: Option<PrefillUsage>,
    pub(crate) tally: Option<Tally>,
    pub(crate) clock: Clock,
}

impl Guarded {
    /// What every stream needs.
    pub(crate) fn new(seat: Arc<Seat>, idle: Duration, clock: Clock) -> Self {
        Self {
            seat,
            stage: Stage::Decode,
            idle,
            end: End::Marker,
            events: None,
            rewriter: None,
            entry: None,
            unproven: None,
            usage: None,
            tally: None,
            clock,
        }
    }

    /// The answer went on. Only events tell of the time between tokens.
    fn went_on(&mut self, now: Instant) {
        if self.events.is_some() {
            self.clock.read(now);
        }
        if let Some(mut entry) = self.entry.take() {
            self.unproven = Some(entry.answered());
        }
    }

    fn count(&mut self, outcome: Outcome) {
        if let Some(tally) = &mut self.tally {
            tally.outcome = outcome;
        }
    }

    /// The usage tells what became of the hand-off, unless the generation has failed.
    fn prove(&mut self, proof: Proof) {
        if let Some(unproven) = &mut self.unproven {
            unproven.prove(proof);
        }
        if let Some(tally) = self.tally.as_mut().filter(|tally| tally.outcome == Outcome::Sent) {
            match proof {
                Proof::Received => tally.outcome = Outcome::Transferred,
                Proof::Computed => tally.outcome = Outcome::Recomputed,
                Proof::None => {}
            }
        }
    }

    /// The client is given a piece, perhaps the last one. Whoever has the end marker leaves without waiting for the connection's end.
    fn given(&mut self, is_last: bool) {
        if is_last && self.events.as_ref().is_some_and(Events::is_done) {
            self.clock.record.stream_ended(Ending::Answered);
        }
    }

    fn is_complete(&self) -> bool {
        self.end == End::AnyEvent || self.events.as_ref().is_none_or(Events::is_done)
    }
}

/// The body of a streamed answer.
pub(crate) struct GuardedBody {
    /// `None` once the stream has ended.
    inner: Option<AnswerBody>,
    ready: VecDeque<Bytes>,
    idle: Pin<Box<Sleep>>,
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    guarded: Guarded,
}

impl GuardedBody {
    /// A body that sends `first`, then what comes from `inner`.
    pub(crate) fn new(first: Bytes, inner: AnswerBody, mut guarded: Guarded) -> Self {
        guarded.clock.record.streams();
        if guarded.events.is_some() {
            guarded.clock.read(Instant::now());
        }
        let mut body = Self {
            inner: Some(inner),
            ready: VecDeque::from_iter((!first.is_empty()).then_some(first)),
            idle: Box::pin(tokio::time::sleep(guarded.idle)),
            gone: Box::pin({
                let seat = Arc::clone(&guarded.seat);
                async move { seat.gone().await }
            }),
            guarded,
        };
        body.end_if_over();
        body
    }

    /// A body that sends the whole events that were read ahead from `inner`, and goes on from there.
    pub(crate) fn after(read: Bytes, inner: AnswerBody, guarded: Guarded) -> Self {
        let mut body = Self::new(Bytes::new(), inner, guarded);
        if let Err(cause) = body.pass_on(read) {
            body.fail(cause).expect("only what is no stream of events fails so");
        }
        body.end_if_over();
        body
    }

    fn take(&mut self, bytes: Bytes) -> Result<(), Cause> {
        let (bytes, went_on) = match &mut self.guarded.events {
            Some(events) => {
                let whole = events.push(bytes);
                let went_on = events.is_within_data() || sse::given(&whole).next().is_some();
                (whole, went_on)
            }
            None => (bytes, true),
        };
        if went_on {
            let now = Instant::now();
            self.idle.as_mut().reset(now + self.guarded.idle);
            self.guarded.went_on(now);
        }
        self.pass_on(bytes)?;
        self.end_if_over();
        Ok(())
    }

    /// Ends the stream, if nothing more comes and it is complete.
    fn end_if_over(&mut self) {
        let is_over = self.inner.as_ref().is_some_and(AnswerBody::is_end_stream);
        if is_over && self.guarded.is_complete() {
            self.inner = None;
            self.guarded.clock.record.stream_ended(Ending::Answered);
        }
    }

    /// Queues whole events for the client, up to one that says that the generation failed.
    fn pass_on(&mut self, mut events: Bytes) -> Result<(), Cause> {
        let guarded = &mut self.guarded;
        let mut failure = None;
        if guarded.end == End::Marker && guarded.events.is_some() {
            match look(&events) {
                Seen::Good => {}
                // The engine tells its client itself.
                Seen::Told => guarded.count(Outcome::Failed),
                Seen::Failed(at, cause) => {
                    events.truncate(at);
                    failure = Some(cause);
                }
            }
        }
        if let Some(usage) = &guarded.usage
            && let Some((corrected, proof)) = usage.correct_events(&events)
        {
            events = corrected;
            guarded.prove(proof);
        }
        let events = match &mut guarded.rewriter {
            Some(rewriter) => rewriter.rewrite(&events),
            None => events,
        };
        guarded.clock.record.decoded(&events);
        if failure.is_none() && guarded.events.as_ref().is_some_and(Events::is_done) {
            // Before the client sees the end, so that who looks at the metrics then finds it counted.
            guarded.tally = None;
        }
        if !events.is_empty() {
            self.ready.push_back(events);
        }
        failure.map_or(Ok(()), Err)
    }

    /// Ends the stream before its time. The engine notices because its connection closes.
    fn fail(&mut self, cause: Cause) -> Result<(), std::io::Error> {
        self.inner = None;
        self.guarded.clock.record.stream_ended(Ending::Broken);
        let error = self.guarded.seat.failed(self.guarded.stage, cause);
        self.guarded.count(Outcome::Failed);
        self.guarded.tally = None;
        if let Some(mut entry) = self.guarded.entry.take() {
            entry.failed(&error);
        }
        tracing::warn!(error = crate::report::one_line(&error), "a stream broke off");
        if self.guarded.events.is_none() {
            return Err(std::io::Error::other(error.to_string()));
        }
        if self.guarded.end == End::AnyEvent {
            // Clients of routes whose events have names look for this one.
            self.ready.push_back(Bytes::from_static(b"event: error\n"));
        }
        self.ready.push_back(error.to_events());
        Ok(())
    }
}

impl Body for GuardedBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn is_end_stream(&self) -> bool {
        self.inner.is_none() && self.ready.is_empty()
    }

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        loop {
            if let Some(bytes) = this.ready.pop_front() {
                this.guarded.given(this.ready.is_empty());
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            let Some(inner) = &mut this.inner else {
                return Poll::Ready(None);
            };
            let failure = match Pin::new(inner).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data().map(|bytes| this.take(bytes)) {
                    Ok(Err(cause)) => cause,
                    _ => continue,
                },
                Poll::Ready(None) if this.guarded.is_complete() => {
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
