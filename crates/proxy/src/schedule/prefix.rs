//! Finds common beginnings of prompts: chained hashes of a prompt's chunks, and a bounded memory of what an engine
//! has read.
//!
//! Pure. A chunk's hash covers everything before it, so a map of hashes works like a radix tree. Prompts are JSON
//! text; a wrong guess costs time, but never changes an answer.

use std::num::NonZeroUsize;

use lru::LruCache;

use crate::body::serving_mode::is_token_list;
use crate::hash::hash_of;

/// Tokens of a chunk. Text has about four bytes a token.
pub(crate) const CHUNK_TOKENS: usize = 64;
const CHUNK_BYTES: usize = 4 * CHUNK_TOKENS;

/// Maximum chunks of a prompt: 128 Ki tokens.
const MAX_CHUNKS: usize = 2048;

/// Maximum chunks remembered for each engine: 4 Mi tokens, about the KV cache of a large GPU.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

/// The chained hashes of the whole chunks of `prompt`, a JSON string or list. `seed` is the hash of the text before
/// it.
pub(crate) fn chunks(seed: u64, prompt: &str) -> Vec<u64> {
    let inside = prompt.get(1..prompt.len().saturating_sub(1)).unwrap_or_default();
    let link = |chain: &mut u64, chunk: &[u8]| {
        *chain = hash_of((*chain, chunk));
        Some(*chain)
    };
    if !is_token_list(prompt) {
        let whole = inside.as_bytes().chunks_exact(CHUNK_BYTES).take(MAX_CHUNKS);
        return whole.scan(seed, link).collect();
    }
    let commas = memchr::memchr_iter(b',', inside.as_bytes()).chain([inside.len()]);
    let ends = commas.skip(CHUNK_TOKENS - 1).step_by(CHUNK_TOKENS).take(MAX_CHUNKS);
    let pieces = ends.scan(0, |start, end| {
        let piece = &inside.as_bytes()[*start..end];
        *start = end;
        Some(piece)
    });
    pieces.scan(seed, link).collect()
}

/// A hash of the beginning of `prompt`, of any length.
pub(crate) fn beginning(seed: u64, prompt: &str) -> u64 {
    hash_of((seed, &prompt.as_bytes()[..prompt.len().min(CHUNK_BYTES)]))
}

/// The most recently used chunks that one incarnation of an engine has read.
#[derive(Debug, Default)]
pub(crate) struct PrefixMemory {
    /// Created by the first prompt, because other policies need none.
    chunks: Option<LruCache<u64, ()>>,
}

impl PrefixMemory {
    /// Tokens at the beginning of a prompt that the engine has read before.
    pub(crate) fn known_tokens(&self, chunks: &[u64]) -> u64 {
        let known = self.chunks.as_ref().map_or(0, |memory| {
            chunks.iter().take_while(|chunk| memory.contains(chunk)).count()
        });
        (known * CHUNK_TOKENS) as u64
    }

    /// Records that the engine reads this prompt. The end of a prompt is forgotten before its beginning.
    pub(crate) fn read(&mut self, chunks: &[u64]) {
        if chunks.is_empty() {
            return;
        }
        let memory = self.chunks.get_or_insert_with(|| LruCache::new(REMEMBERED));
        for chunk in chunks.iter().rev() {
            memory.put(*chunk, ());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(text: &str) -> String {
        format!("\"{text}\"")
    }

    #[test]
    fn prompts_share_only_their_common_chunks() {
        let shared = "x".repeat(2 * CHUNK_BYTES);
        let (one, other) = (
            json(&format!("{shared}{}", "a".repeat(600))),
            json(&format!("{shared}{}", "b".repeat(600))),
        );
        let (one, other) = (chunks(1, &one), chunks(1, &other));
        assert_eq!((one.len(), other.len()), (4, 4));
        assert_eq!(one[..2], other[..2]);
        assert!(one[2] != other[2] && one[3] != other[3]);
        assert_ne!(
            chunks(2, &json(&shared))[0],
            one[0],
            "another model reads another prompt"
        );
        assert!(chunks(1, "\"short\"").is_empty() && chunks(1, "").is_empty() && chunks(1, "\"").is_empty());
    }

    #[test]
    fn a_list_of_tokens_is_cut_after_as_many_tokens() {
        let ids = |count: usize| serde_json::to_string(&(0..count).collect::<Vec<_>>()).expect("JSON");
        for (count, expected) in [(1, 0), (63, 0), (64, 1), (65, 1), (127, 1), (128, 2), (130, 2)] {
            assert_eq!(chunks(0, &ids(count)).len(), expected, "{count} tokens");
        }
        assert_eq!(chunks(0, &ids(130))[..1], chunks(0, &ids(65))[..1]);
    }

    #[test]
    fn memory_is_bounded_and_forgets_prompt_ends_first() {
        let mut memory = PrefixMemory::default();
        let first: Vec<u64> = (0..1000).collect();
        memory.read(&first);
        assert_eq!(memory.known_tokens(&first), 64_000);
        let rest: Vec<u64> = (1_000_000..1_000_000 + REMEMBERED.get() as u64 - 500).collect();
        memory.read(&rest);
        assert_eq!(memory.known_tokens(&first), 500 * 64);
        assert_eq!(memory.chunks.as_ref().map(LruCache::len), Some(REMEMBERED.get()));
    }

    proptest! {
        #[test]
        fn any_text_is_cut_without_a_panic(seed: u64, text: String) {
            let cut = chunks(seed, &text);
            prop_assert!(cut.len() <= text.len() / CHUNK_TOKENS);
            beginning(seed, &text);
        }
    }
}
