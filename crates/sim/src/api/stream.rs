//! Event streams in vLLM's order: chunks as tokens are generated, the usage if requested, then `[DONE]`.

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream::unfold;
use tokio::sync::mpsc;

use super::ApiError;
use crate::engine_core::sequence::{Output, SequenceEnd};

/// Converts the outputs of a request into the events of a route.
pub(super) trait Render: Send + 'static {
    /// The events of one output, as JSON texts.
    fn chunks(&mut self, output: Output) -> Vec<String>;

    /// The last event before `[DONE]`, if the client asked for it.
    fn usage(&mut self) -> Option<String>;
}

struct State<R> {
    render: R,
    news: mpsc::Receiver<Output>,
    /// Number of running sequences.
    open: usize,
    over: bool,
}

/// The body of a stream. `first` was already received from `news`.
pub(super) fn body<R: Render>(render: R, news: mpsc::Receiver<Output>, sequences: usize) -> Body {
    let state = State {
        render,
        news,
        open: sequences,
        over: false,
    };
    Body::from_stream(unfold(state, async |mut state| {
        if state.over {
            return None;
        }
        let mut events = String::new();
        match state.news.recv().await {
            None => {
                push_error(&mut events, &ApiError::dead());
                state.over = true;
            }
            Some(output) if matches!(output.end, Some(SequenceEnd::Failed)) => {
                push_error(&mut events, &ApiError::failed());
                state.over = true;
            }
            Some(output) => {
                state.open -= usize::from(output.end.is_some());
                for chunk in state.render.chunks(output) {
                    push(&mut events, &chunk);
                }
                if state.open == 0 {
                    if let Some(usage) = state.render.usage() {
                        push(&mut events, &usage);
                    }
                    state.over = true;
                }
            }
        }
        if state.over {
            push(&mut events, "[DONE]");
        }
        Some((Ok::<Bytes, std::convert::Infallible>(events.into()), state))
    }))
}

fn push(events: &mut String, data: &str) {
    events.push_str("data: ");
    events.push_str(data);
    events.push_str("\n\n");
}

fn push_error(events: &mut String, error: &ApiError) {
    push(events, &error.body().to_string());
}
