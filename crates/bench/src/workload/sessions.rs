//! The dataset `sessions`: conversations of several turns. Each turn is sent after the previous answer.
//!
//! The work item of a turn has the user's message. When it is sent, the earlier messages, with the server's real
//! answers, are put in front. vLLM's client has no such dataset, only a separate script.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use super::dataset::{Entry, json_lines, read};
use super::{Dataset, DatasetError, MadeRequests, Message, Prompt, Random, RangeRatio, Turn, WorkItem};
use crate::tokenizer::Tokenizer;

/// Conversations from a file, or synthetic ones.
#[derive(Debug, Clone, PartialEq)]
pub struct Sessions {
    /// The source of the turns.
    pub turns: Turns,
    /// Length of every answer in tokens; by default as in the file.
    pub output_length: Option<u32>,
    /// Pause between an answer and the next turn.
    pub think_time: Duration,
    /// The header that names the session.
    pub header: HeaderName,
}

/// The source of the turns.
#[derive(Debug, Clone, PartialEq)]
pub enum Turns {
    /// A JSONL file: `{"messages": [{"role", "content"}, …]}` or `{"conversations": [{"from", "value"}, …]}` a line.
    File(PathBuf),
    /// Synthetic turns of words.
    Synthetic {
        /// Number of sessions.
        sessions: usize,
        /// Turns of each session.
        turns: usize,
        /// Tokens of the first turn.
        first_length: u32,
        /// Tokens of every later turn.
        later_length: u32,
    },
}

/// Default answer length.
const DEFAULT_OUTPUT: u32 = 128;

/// One conversation: the messages before the first turn, then each user message with the length of its answer.
struct Session {
    before: Vec<Message>,
    turns: Vec<(String, u32)>,
}

impl Sessions {
    pub(super) fn make(&self, dataset: &Dataset, tokenizer: Option<&Tokenizer>) -> Result<MadeRequests, DatasetError> {
        let mut sessions = match &self.turns {
            Turns::File(path) => {
                let text = read(path)?;
                let entries = json_lines(path, &text)?;
                let parsed: Result<Vec<Session>, DatasetError> =
                    entries.iter().map(|entry| self.session(entry, tokenizer)).collect();
                dataset.shuffled(parsed?)
            }
            Turns::Synthetic {
                sessions,
                turns,
                first_length,
                later_length,
            } => self.synthetic(dataset.seed, *sessions, *turns, [*first_length, *later_length])?,
        };
        if dataset.prompt_count > 0 {
            sessions.truncate(dataset.prompt_count);
        }
        // The first turns come first, because the schedule releases them. The order of the others does not matter.
        let mut items = Vec::new();
        let most = sessions.iter().map(|session| session.turns.len()).max().unwrap_or(0);
        for number in 0..most {
            for (index, session) in sessions.iter().enumerate() {
                if let Some((text, output_length)) = session.turns.get(number) {
                    let before = if number == 0 { session.before.as_slice() } else { &[] };
                    items.push(self.item(dataset.seed, index, number, before, text, *output_length, tokenizer)?);
                }
            }
        }
        Ok(MadeRequests {
            items,
            ..MadeRequests::default()
        })
    }

    #[expect(clippy::too_many_arguments, reason = "each is one part of the order")]
    fn item(
        &self,
        seed: u32,
        session: usize,
        number: usize,
        before: &[Message],
        text: &str,
        output_length: u32,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<WorkItem, DatasetError> {
        let mut messages = before.to_vec();
        messages.push(Message {
            role: "user".to_owned(),
            content: text.to_owned(),
        });
        let mut token_count = 0;
        if let Some(tokenizer) = tokenizer {
            for message in &messages {
                token_count += tokenizer.count(&message.content)?;
            }
        }
        let prompt = Prompt::Messages {
            messages: messages.into(),
            token_count,
        };
        let mut item = WorkItem::new(prompt, output_length);
        // The seed keeps the sessions of two runs apart in a proxy with session affinity.
        let name = format!("bench-{seed}-{session}");
        let value = HeaderValue::try_from(name).unwrap_or(HeaderValue::from_static("bench"));
        item.headers = HeaderMap::from_iter([(self.header.clone(), value)]);
        item.turn = Some(Turn {
            session,
            number,
            think_time: self.think_time,
        });
        Ok(item)
    }

    /// Synthetic sessions of words, about one token each. No two sessions share a prefix.
    fn synthetic(
        &self,
        seed: u32,
        sessions: usize,
        turns: usize,
        [first, later]: [u32; 2],
    ) -> Result<Vec<Session>, DatasetError> {
        let texts = |length: u32, prompt_count: usize, seed: u32| -> Result<Vec<String>, DatasetError> {
            let random = Random {
                input_length: length,
                output_length: 1,
                range_ratio: RangeRatio::default(),
                prefix_length: 0,
                vocabulary_size: 100_000,
                prompt_count,
                seed,
            };
            Ok(random.items()?.iter().map(|item| item.prompt.words()).collect())
        };
        let firsts = texts(first, sessions, seed)?;
        let laters = if turns > 1 {
            texts(later, sessions * (turns - 1), seed.wrapping_add(1))?
        } else {
            Vec::new()
        };
        let output = self.output_length.unwrap_or(DEFAULT_OUTPUT);
        let mut laters = laters.into_iter();
        Ok(firsts
            .into_iter()
            .map(|first| Session {
                before: Vec::new(),
                turns: [first]
                    .into_iter()
                    .chain(laters.by_ref().take(turns.saturating_sub(1)))
                    .map(|text| (text, output))
                    .collect(),
            })
            .collect())
    }

    /// One line of the file.
    fn session(&self, entry: &Entry<'_>, tokenizer: Option<&Tokenizer>) -> Result<Session, DatasetError> {
        let (list, role, content) = match entry.fields.get("conversations") {
            Some(list) => (list, "from", "value"),
            None => (entry.field("messages", None)?, "role", "content"),
        };
        let list = list
            .as_array()
            .ok_or_else(|| entry.error("its messages are not a list"))?;
        let mut session = Session {
            before: Vec::new(),
            turns: Vec::new(),
        };
        for (index, message) in list.iter().enumerate() {
            let text = |name: &str| {
                let text = message.get(name).and_then(Value::as_str);
                text.ok_or_else(|| entry.error(format_args!("message {} has no text `{name}`", index + 1)))
            };
            match (text(role)?, text(content)?) {
                ("user" | "human", content) => {
                    let length = self.output_length.unwrap_or(DEFAULT_OUTPUT);
                    session.turns.push((content.to_owned(), length));
                }
                ("assistant" | "gpt", content) => {
                    if let (None, Some(turn), Some(tokenizer)) =
                        (self.output_length, session.turns.last_mut(), tokenizer)
                    {
                        turn.1 = u32::try_from(tokenizer.encode(content)?.len())
                            .unwrap_or(u32::MAX)
                            .max(1);
                    }
                }
                ("system", content) if session.turns.is_empty() => session.before.push(Message {
                    role: "system".to_owned(),
                    content: content.to_owned(),
                }),
                (other, _) => {
                    return Err(entry.error(format_args!("message {} has the unknown role `{other}`", index + 1)));
                }
            }
        }
        if session.turns.is_empty() {
            return Err(entry.error("it has no user message"));
        }
        Ok(session)
    }
}
