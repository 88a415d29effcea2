//! The forms of a prompt, and how each is written in the JSON of a request.

use std::sync::Arc;

use serde::ser::{SerializeSeq as _, Serializer};
use serde::{Deserialize, Serialize};

/// A prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Consecutive token ids, stored by their parameters.
    Running(Running),
    /// Token ids.
    Ids(Arc<[u32]>),
    /// Text.
    Text {
        /// The text.
        text: Arc<str>,
        /// Token count by the client's tokenizer.
        token_count: u64,
    },
    /// The messages of a chat.
    Messages {
        /// The messages in order.
        messages: Arc<[Message]>,
        /// Token count by the client's tokenizer; 0 without one.
        token_count: u64,
    },
}

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The role: `user`, `assistant` or `system`.
    pub role: String,
    /// The text.
    pub content: String,
}

/// Consecutive token ids. A thousand prompts of 7500 tokens take no memory until they are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    pub(super) prefix: Arc<[u32]>,
    pub(super) first: u32,
    pub(super) length: u32,
    pub(super) vocabulary_size: u32,
}

/// The value of `prompt` in a completion's body.
#[derive(Debug, Clone, Copy)]
pub struct AsCompletion<'a>(&'a Prompt);

/// The value of `messages` in a chat's body.
#[derive(Debug, Clone, Copy)]
pub struct AsChat<'a>(&'a Prompt);

impl Prompt {
    /// A text with its token count.
    pub fn text(text: impl Into<Arc<str>>, token_count: usize) -> Self {
        Self::Text {
            text: text.into(),
            token_count: token_count as u64,
        }
    }

    /// The token count, as far as the client knows it.
    pub fn token_count(&self) -> u64 {
        match self {
            Self::Running(running) => running.prefix.len() as u64 + u64::from(running.length),
            Self::Ids(ids) => ids.len() as u64,
            Self::Text { token_count, .. } | Self::Messages { token_count, .. } => *token_count,
        }
    }

    /// The prompt as text. Ids become words.
    pub(super) fn words(&self) -> String {
        match self {
            Self::Running(running) => words(running.ids()),
            Self::Ids(ids) => words(ids.iter().copied()),
            Self::Text { text, .. } => text.to_string(),
            Self::Messages { messages, .. } => {
                let mut text = String::new();
                for (index, message) in messages.iter().enumerate() {
                    // An answer follows its prompt as the server generated it, so that the server finds its KV in the
                    // cache.
                    if index > 0 && message.role != "assistant" {
                        text.push('\n');
                    }
                    text.push_str(&message.content);
                }
                text
            }
        }
    }

    /// The `prompt` of `/v1/completions`: token ids, which vLLM accepts instead of text, or text. Messages become their
    /// concatenated texts.
    pub fn as_completion(&self) -> AsCompletion<'_> {
        AsCompletion(self)
    }

    /// The `messages` of `/v1/chat/completions`. Token ids become words, because a chat accepts no ids.
    pub fn as_chat(&self) -> AsChat<'_> {
        AsChat(self)
    }
}

impl Running {
    /// The ids.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        let running =
            (0..self.length).map(|index| wrap(u64::from(self.first) + u64::from(index), self.vocabulary_size));
        self.prefix.iter().copied().chain(running)
    }
}

/// `value % size`.
#[expect(clippy::cast_possible_truncation, reason = "a remainder is smaller than its divisor")]
pub(super) fn wrap(value: u64, size: u32) -> u32 {
    (value % u64::from(size)) as u32
}

/// Ids as text: one word per id, about one token each. Only the server knows the exact count.
///
/// The words are few and short, so that every tokenizer has each as one token. The word of an id is scrambled, so that
/// prompts with different first ids share no prefix.
fn words(ids: impl Iterator<Item = u32>) -> String {
    let words: Vec<&str> = ids.map(|id| WORDS[scramble(id) as usize % WORDS.len()]).collect();
    words.join(" ")
}

/// The final mix of `MurmurHash3`: each input bit changes about half of the output bits.
pub(crate) fn scramble(number: u32) -> u32 {
    let mixed = (number ^ number >> 16).wrapping_mul(0x85eb_ca6b);
    let mixed = (mixed ^ mixed >> 13).wrapping_mul(0xc2b2_ae35);
    mixed ^ mixed >> 16
}

impl Serialize for AsCompletion<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Prompt::Running(running) => serializer.collect_seq(running.ids()),
            Prompt::Ids(ids) => serializer.collect_seq(ids.iter()),
            Prompt::Text { text, .. } => serializer.serialize_str(text),
            Prompt::Messages { .. } => serializer.serialize_str(&self.0.words()),
        }
    }
}

impl Serialize for AsChat<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let one = |serializer: S, text: &str| {
            let mut messages = serializer.serialize_seq(Some(1))?;
            messages.serialize_element(&TextMessage::user(text))?;
            messages.end()
        };
        match self.0 {
            Prompt::Messages { messages, .. } => messages.serialize(serializer),
            Prompt::Text { text, .. } => one(serializer, text),
            ids => one(serializer, &ids.words()),
        }
    }
}

/// A text message as vLLM's client writes it: its content is a list of one part.
#[derive(Serialize)]
struct TextMessage<'a> {
    role: &'static str,
    content: [ContentPart<'a>; 1],
}

#[derive(Serialize)]
struct ContentPart<'a> {
    r#type: &'static str,
    text: &'a str,
}

impl<'a> TextMessage<'a> {
    fn user(text: &'a str) -> Self {
        Self {
            role: "user",
            content: [ContentPart { r#type: "text", text }],
        }
    }
}

const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "all",
    "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more", "if",
    "out", "so", "up", "said", "what", "its", "about", "than", "into", "them", "can", "only", "other", "time", "new",
    "some",
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(prompt: &Prompt) -> [serde_json::Value; 2] {
        [
            serde_json::to_value(prompt.as_completion()).unwrap(),
            serde_json::to_value(prompt.as_chat()).unwrap(),
        ]
    }

    #[test]
    fn each_form_is_valid_for_both_routes() {
        let text = |text: &str| json!([{"role": "user", "content": [{"type": "text", "text": text}]}]);
        let running = Prompt::Running(Running {
            prefix: [7, 9].into(),
            first: 2,
            length: 3,
            vocabulary_size: 4,
        });
        assert_eq!(written(&running)[0], json!([7, 9, 2, 3, 0]));
        assert_eq!(running.token_count(), 5);
        let ids = Prompt::Ids([7, 9, 2, 3, 0].into());
        assert_eq!(written(&ids), written(&running));
        let hello = Prompt::Text {
            text: "hello".into(),
            token_count: 1,
        };
        assert_eq!(written(&hello), [json!("hello"), text("hello")]);
        let message = |role: &str, content: &str| Message {
            role: role.to_owned(),
            content: content.to_owned(),
        };
        let messages = Prompt::Messages {
            messages: [message("system", "be brief"), message("user", "hello")].into(),
            token_count: 3,
        };
        let chat = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]);
        assert_eq!(written(&messages), [json!("be brief\nhello"), chat]);
    }
}
