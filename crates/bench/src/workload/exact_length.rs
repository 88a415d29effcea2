//! Prompts of an exact token count: ids are decoded and encoded again until the count is right.
//!
//! Same rule as vLLM's client 0.32: at most ten times; surplus ids are cut, and missing ids are drawn.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::{available_parallelism, scope};

use super::{DatasetError, Progress};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Most corrections of one prompt.
const ATTEMPTS: u32 = 10;

/// A text with its ids.
#[derive(Debug)]
pub(super) struct ExactPrompt {
    pub(super) text: String,
    pub(super) ids: Vec<u32>,
    attempts_left: u32,
    target: usize,
}

impl ExactPrompt {
    /// Starts a prompt: the text of `ids`, cut to at most `target` ids, without drawing new ones.
    fn start(tokenizer: &Tokenizer, ids: &[u32], target: usize) -> Result<Self, TokenizerError> {
        let text = tokenizer.decode(ids)?;
        let mut prompt = Self {
            ids: tokenizer.encode(&text)?,
            text,
            attempts_left: ATTEMPTS,
            target,
        };
        while prompt.attempts_left > 0 && prompt.ids.len() > target {
            prompt.reencode(tokenizer)?;
        }
        Ok(prompt)
    }

    fn reencode(&mut self, tokenizer: &Tokenizer) -> Result<(), TokenizerError> {
        self.ids.truncate(self.target);
        self.attempts_left -= 1;
        self.text = tokenizer.decode(&self.ids)?;
        self.ids = tokenizer.encode(&self.text)?;
        Ok(())
    }

    /// Completes the prompt; `draw` gives missing ids.
    fn finish(mut self, tokenizer: &Tokenizer, mut draw: impl FnMut() -> u32) -> Result<Self, TokenizerError> {
        while self.attempts_left > 0 && self.ids.len() != self.target {
            while self.ids.len() < self.target {
                self.ids.push(draw());
            }
            self.reencode(tokenizer)?;
        }
        Ok(self)
    }

    /// The number of ids above the target.
    #[expect(clippy::cast_possible_wrap, reason = "lengths of prompts are far inside 63 bits")]
    pub(super) fn excess(&self) -> i64 {
        self.ids.len() as i64 - self.target as i64
    }
}

/// A prompt of `target` ids that starts with `ids`.
pub(super) fn exact_prompt(
    tokenizer: &Tokenizer,
    ids: &[u32],
    target: usize,
    draw: impl FnMut() -> u32,
) -> Result<ExactPrompt, TokenizerError> {
    ExactPrompt::start(tokenizer, ids, target)?.finish(tokenizer, draw)
}

/// `count` prompts; `ids` gives their beginnings and `target` their lengths.
///
/// All cores start prompts. Missing ids are drawn in the order of the prompts, because all draw from one generator.
pub(super) fn exact_prompts(
    tokenizer: &Tokenizer,
    count: usize,
    ids: impl Fn(usize) -> Vec<u32> + Sync,
    target: impl Fn(usize) -> usize + Sync,
    mut draw: impl FnMut() -> u32,
    progress: Progress<'_>,
) -> Result<Vec<ExactPrompt>, DatasetError> {
    let workers = available_parallelism().map_or(1, usize::from).min(count.max(1));
    let next = AtomicUsize::new(0);
    let (begun, taken) = sync_channel(workers * 64);
    scope(|threads| {
        for _ in 0..workers {
            let (begun, next, ids, target) = (begun.clone(), &next, &ids, &target);
            threads.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let prompt = ExactPrompt::start(tokenizer, &ids(index), target(index));
                    // The receiver is gone after the first error.
                    if begun.send((index, prompt)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(begun);
        let mut waiting: Vec<Option<ExactPrompt>> = (0..count).map(|_| None).collect();
        let mut done = Vec::with_capacity(count);
        for (index, prompt) in taken {
            waiting[index] = Some(prompt?);
            while let Some(prompt) = waiting.get_mut(done.len()).and_then(Option::take) {
                done.push(prompt.finish(tokenizer, &mut draw)?);
                progress(done.len(), count)?;
            }
        }
        Ok(done)
    })
}

/// vLLM's remark on prompts with a wrong length; `None` if all are right.
pub(super) fn length_remark(excess: i64) -> Option<String> {
    (excess != 0).then(|| {
        format!(
            "the prompts have {} {} tokens in total than requested: some token sequences change when they are decoded and encoded",
            excess.unsigned_abs(),
            if excess > 0 { "more" } else { "fewer" }
        )
    })
}
