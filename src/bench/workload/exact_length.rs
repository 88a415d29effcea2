//! Prompts of an exact length: ids become text and ids again until both agree on how many they are.
//!
//! The rule of vLLM's client 0.32: at most ten times, ids that are too many are cut, and missing ones are drawn.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::{available_parallelism, scope};

use super::{DatasetError, Progress};
use crate::bench::tokenizer::{Tokenizer, TokenizerError};

/// How often a prompt may be put right.
const ATTEMPTS: u32 = 10;

/// A text with the ids that the tokenizer makes of it.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) text: String,
    pub(super) ids: Vec<u32>,
    attempts_left: u32,
    target: usize,
}

impl Settled {
    /// The text of `ids`, cut to at most `target` ids, as far as that goes without drawing any.
    fn begin(tokenizer: &Tokenizer, ids: &[u32], target: usize) -> Result<Self, TokenizerError> {
        let text = tokenizer.decode(ids)?;
        let mut settled = Self {
            ids: tokenizer.encode(&text)?,
            text,
            attempts_left: ATTEMPTS,
            target,
        };
        while settled.attempts_left > 0 && settled.ids.len() > target {
            settled.again(tokenizer)?;
        }
        Ok(settled)
    }

    fn again(&mut self, tokenizer: &Tokenizer) -> Result<(), TokenizerError> {
        self.ids.truncate(self.target);
        self.attempts_left -= 1;
        self.text = tokenizer.decode(&self.ids)?;
        self.ids = tokenizer.encode(&self.text)?;
        Ok(())
    }

    /// Goes on to the end; `draw` gives ids that are missing.
    fn finish(mut self, tokenizer: &Tokenizer, mut draw: impl FnMut() -> u32) -> Result<Self, TokenizerError> {
        while self.attempts_left > 0 && self.ids.len() != self.target {
            while self.ids.len() < self.target {
                self.ids.push(draw());
            }
            self.again(tokenizer)?;
        }
        Ok(self)
    }

    /// How many ids more than wanted it has.
    #[expect(clippy::cast_possible_wrap, reason = "lengths of prompts are far inside 63 bits")]
    pub(super) fn excess(&self) -> i64 {
        self.ids.len() as i64 - self.target as i64
    }
}

/// One prompt of `target` ids that begins as `ids`.
pub(super) fn settle(
    tokenizer: &Tokenizer,
    ids: &[u32],
    target: usize,
    draw: impl FnMut() -> u32,
) -> Result<Settled, TokenizerError> {
    Settled::begin(tokenizer, ids, target)?.finish(tokenizer, draw)
}

/// `count` prompts, of which `ids` gives the beginnings and `target` the lengths, in their order.
///
/// All processors begin prompts; what has to be drawn is drawn in the prompts' order, because it is one generator that all of
/// them draw from.
pub(super) fn settle_all(
    tokenizer: &Tokenizer,
    count: usize,
    ids: impl Fn(usize) -> Vec<u32> + Sync,
    target: impl Fn(usize) -> usize + Sync,
    mut draw: impl FnMut() -> u32,
    progress: Progress<'_>,
) -> Result<Vec<Settled>, DatasetError> {
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
                    let prompt = Settled::begin(tokenizer, &ids(index), target(index));
                    // The other side hangs up at the first failure.
                    if begun.send((index, prompt)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(begun);
        let mut waiting: Vec<Option<Settled>> = (0..count).map(|_| None).collect();
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

/// vLLM's remark on prompts that did not come out as long as they should be; `None` if all did.
pub(super) fn remark(excess: i64) -> Option<String> {
    (excess != 0).then(|| {
        format!(
            "the prompts have {} {} tokens in all than asked for: not every row of tokens survives as text",
            excess.unsigned_abs(),
            if excess > 0 { "more" } else { "fewer" }
        )
    })
}
