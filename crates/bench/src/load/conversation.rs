//! Conversation state of running sessions: the messages so far, the order of turns, and statistics by turn.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::record::Answer;
use crate::report::Report;
use crate::stats::Distribution;
use crate::workload::{Message, Prompt, WorkItem, Workload};

/// The request to release when another one ends, and how long after that end.
pub(crate) type Successor = Option<(usize, Duration)>;

/// The successor of each request: the next turn of the same session.
pub(crate) fn successors(items: &[WorkItem]) -> Arc<[Successor]> {
    let sessions = items.iter().filter_map(|item| Some(item.turn?.session + 1)).max();
    let mut last: Vec<Option<usize>> = vec![None; sessions.unwrap_or(0)];
    let mut successors = vec![None; items.len()];
    for (index, item) in items.iter().enumerate() {
        let Some(turn) = item.turn else { continue };
        if let Some(before) = last[turn.session].replace(index) {
            successors[before] = Some((index, turn.think_time));
        }
    }
    successors.into()
}

/// The messages of each session.
#[derive(Debug)]
pub(crate) struct Conversations {
    sessions: Vec<Mutex<Conversation>>,
}

#[derive(Debug, Default)]
struct Conversation {
    messages: Vec<Message>,
    is_broken: bool,
}

impl Conversations {
    pub(crate) fn new(items: &[WorkItem]) -> Self {
        let count = items.iter().filter_map(|item| Some(item.turn?.session + 1)).max();
        Self {
            sessions: (0..count.unwrap_or(0)).map(|_| Mutex::default()).collect(),
        }
    }

    /// The request with the earlier messages of its session in front. An error if an earlier turn failed, `None` if the
    /// request belongs to no session.
    pub(crate) fn next(&self, item: &WorkItem) -> Option<Result<WorkItem, String>> {
        let session = self.sessions.get(item.turn?.session)?;
        let mut said = session.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_broken {
            return Some(Err("an earlier turn of its session failed".to_owned()));
        }
        let Prompt::Messages { messages, token_count } = &item.prompt else {
            return None;
        };
        said.messages.extend(messages.iter().cloned());
        let mut item = item.clone();
        item.prompt = Prompt::Messages {
            messages: said.messages.clone().into(),
            token_count: *token_count,
        };
        Some(Ok(item))
    }

    /// Appends the answer to the session, or marks the session as broken.
    pub(crate) fn answered(&self, item: &WorkItem, result: &Result<Answer, String>) {
        let session = item.turn.and_then(|turn| self.sessions.get(turn.session));
        let Some(session) = session else { return };
        let mut said = session.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(answer) => said.messages.push(Message {
                role: "assistant".to_owned(),
                content: answer.text.clone(),
            }),
            Err(_) => said.is_broken = true,
        }
    }
}

/// Statistics of the turns of all sessions, by their number in the session. Null where there are no sessions.
pub(crate) fn turns_to_json(report: &Report) -> Value {
    let Workload::Prepared(made) = &report.spec.workload else {
        return Value::Null;
    };
    let turn = |index: usize| Some(made.items.get(index)?.turn?.number);
    let Some(last) = (0..made.items.len()).filter_map(turn).max() else {
        return Value::Null;
    };
    let rows = (0..=last).map(|number| {
        let of_turn = || report.records.iter().filter(|record| turn(record.index) == Some(number));
        let answers: Vec<&Answer> = of_turn().filter_map(|record| record.result.as_ref().ok()).collect();
        let milliseconds = |value: &dyn Fn(&Answer) -> Option<f64>| {
            let values = answers.iter().filter_map(|answer| value(answer));
            let spread = Distribution::of_seconds(values.collect(), &[99.0]);
            json!({"mean": spread.mean, "median": spread.median, "p99": spread.percentiles.first().map(|(_, value)| value)})
        };
        json!({
            "turn": number + 1,
            "completed": answers.len(),
            "failed": of_turn().count() - answers.len(),
            "prompt_tokens": answers.iter().filter_map(|answer| answer.prompt_tokens).sum::<u64>(),
            "output_tokens": answers.iter().map(|answer| answer.output_tokens()).sum::<u64>(),
            "ttft_ms": milliseconds(&|answer| Some(answer.first_token.as_secs_f64())),
            "tpot_ms": milliseconds(&Answer::time_per_output_token),
            "e2el_ms": milliseconds(&|answer| Some(answer.latency.as_secs_f64())),
        })
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Turn;

    fn item(session: usize, number: usize, text: &str) -> WorkItem {
        let message = Message {
            role: "user".to_owned(),
            content: text.to_owned(),
        };
        let prompt = Prompt::Messages {
            messages: [message].into(),
            token_count: 1,
        };
        let mut item = WorkItem::new(prompt, 3);
        item.turn = Some(Turn {
            session,
            number,
            think_time: Duration::from_secs(2),
        });
        item
    }

    #[test]
    fn a_turn_follows_the_one_before_with_its_messages() {
        let items = [item(0, 0, "a"), item(1, 0, "b"), item(0, 1, "c"), item(1, 1, "d")];
        let think = Duration::from_secs(2);
        assert_eq!(*successors(&items), [Some((2, think)), Some((3, think)), None, None]);
        let conversations = Conversations::new(&items);
        let first = conversations.next(&items[0]).unwrap().unwrap();
        assert_eq!(first.prompt, items[0].prompt);
        let answer = Answer {
            text: " yes".to_owned(),
            ..Answer::default()
        };
        conversations.answered(&first, &Ok(answer));
        let second = conversations.next(&items[2]).unwrap().unwrap();
        let messages = serde_json::to_value(second.prompt.as_chat()).unwrap();
        assert_eq!(
            messages,
            json!([
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": " yes"},
                {"role": "user", "content": "c"},
            ])
        );
        assert_eq!(serde_json::to_value(second.prompt.as_completion()).unwrap(), "a yes\nc");
        conversations.next(&items[1]).unwrap().unwrap();
        conversations.answered(&items[1], &Err("no".to_owned()));
        assert!(conversations.next(&items[3]).unwrap().is_err());
        assert!(conversations.next(&WorkItem::new(Prompt::text("x", 1), 1)).is_none());
    }
}
