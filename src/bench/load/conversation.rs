//! Sessions while they run: what was said so far, which turn follows which, and how long each turn took.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::bench::record::Answer;
use crate::bench::report::Report;
use crate::bench::stats::Distribution;
use crate::bench::workload::{Message, Order, Prompt, Workload};

/// A request that another one's end releases, and how long after it.
pub(in crate::bench) type Successor = Option<(usize, Duration)>;

/// For each request of a workload, the next turn of its session.
pub(in crate::bench) fn successors(orders: &[Order]) -> Arc<[Successor]> {
    let sessions = orders.iter().filter_map(|order| Some(order.turn?.session + 1)).max();
    let mut last: Vec<Option<usize>> = vec![None; sessions.unwrap_or(0)];
    let mut successors = vec![None; orders.len()];
    for (index, order) in orders.iter().enumerate() {
        let Some(turn) = order.turn else { continue };
        if let Some(before) = last[turn.session].replace(index) {
            successors[before] = Some((index, turn.think_time));
        }
    }
    successors.into()
}

/// What was said in each session.
#[derive(Debug)]
pub(in crate::bench) struct Conversations {
    sessions: Vec<Mutex<Said>>,
}

#[derive(Debug, Default)]
struct Said {
    messages: Vec<Message>,
    is_broken: bool,
}

impl Conversations {
    pub(in crate::bench) fn new(orders: &[Order]) -> Self {
        let count = orders.iter().filter_map(|order| Some(order.turn?.session + 1)).max();
        Self {
            sessions: (0..count.unwrap_or(0)).map(|_| Mutex::default()).collect(),
        }
    }

    /// The request with what was said before it; fails where the turn before has failed. None if it is of no session.
    pub(in crate::bench) fn next(&self, order: &Order) -> Option<Result<Order, String>> {
        let session = self.sessions.get(order.turn?.session)?;
        let mut said = session.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_broken {
            return Some(Err("a turn before it in its session failed".to_owned()));
        }
        let Prompt::Messages { messages, token_count } = &order.prompt else {
            return None;
        };
        said.messages.extend(messages.iter().cloned());
        let mut order = order.clone();
        order.prompt = Prompt::Messages {
            messages: said.messages.clone().into(),
            token_count: *token_count,
        };
        Some(Ok(order))
    }

    /// Keeps what came of a turn.
    pub(in crate::bench) fn answered(&self, order: &Order, result: &Result<Answer, String>) {
        let session = order.turn.and_then(|turn| self.sessions.get(turn.session));
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

/// How the turns of all sessions went, by their number; null where there are no sessions.
pub(in crate::bench) fn turns_to_json(report: &Report) -> Value {
    let Workload::Made(made) = &report.spec.workload else {
        return Value::Null;
    };
    let turn = |index: usize| Some(made.orders.get(index)?.turn?.number);
    let Some(last) = (0..made.orders.len()).filter_map(turn).max() else {
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
    use crate::bench::workload::Turn;

    fn order(session: usize, number: usize, text: &str) -> Order {
        let message = Message {
            role: "user".to_owned(),
            content: text.to_owned(),
        };
        let prompt = Prompt::Messages {
            messages: [message].into(),
            token_count: 1,
        };
        let mut order = Order::new(prompt, 3);
        order.turn = Some(Turn {
            session,
            number,
            think_time: Duration::from_secs(2),
        });
        order
    }

    #[test]
    fn a_turn_holds_what_was_said_before_it_and_follows_it() {
        let orders = [order(0, 0, "a"), order(1, 0, "b"), order(0, 1, "c"), order(1, 1, "d")];
        let think = Duration::from_secs(2);
        assert_eq!(*successors(&orders), [Some((2, think)), Some((3, think)), None, None]);
        let conversations = Conversations::new(&orders);
        let first = conversations.next(&orders[0]).unwrap().unwrap();
        assert_eq!(first.prompt, orders[0].prompt);
        let answer = Answer {
            text: " yes".to_owned(),
            ..Answer::default()
        };
        conversations.answered(&first, &Ok(answer));
        let second = conversations.next(&orders[2]).unwrap().unwrap();
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
        conversations.next(&orders[1]).unwrap().unwrap();
        conversations.answered(&orders[1], &Err("no".to_owned()));
        assert!(conversations.next(&orders[3]).unwrap().is_err());
        assert!(conversations.next(&Order::new(Prompt::text("x", 1), 1)).is_none());
    }
}
