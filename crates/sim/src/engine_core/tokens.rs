//! The simulated tokenizer and sampler: pure functions between text, token ids and a hash of the KV cache.
//!
//! Encoding is lossless for every text. There are 128256 ids as in Llama 3, so that ids for a real Llama are valid
//! here. Sampled text looks like words.

/// Number of ids: Llama 3's vocabulary.
pub(crate) const VOCABULARY: u32 = 128_256;

/// The end of an answer: Llama 3.1's `<|eot_id|>`, without text.
pub(crate) const END_OF_TURN: u32 = 128_009;

/// Ids: single bytes, then pairs of bytes, then words, then hyphenated pairs of words.
const PAIRS: u32 = 256;
const SINGLE_WORDS: u32 = PAIRS + 65_536;
const DOUBLE_WORDS: u32 = SINGLE_WORDS + 256;
const SPECIAL: u32 = 128_000;

const COMMA: u32 = b',' as u32;
const PERIOD: u32 = b'.' as u32;

/// Sorted for binary search.
#[rustfmt::skip]
const WORDS: [&str; 256] = [
    "about", "above", "add", "after", "again", "air", "all", "also", "an", "and", "animal", "another", "answer",
    "any", "are", "around", "as", "ask", "at", "away", "back", "base", "be", "because", "been", "before", "began",
    "begin", "being", "best", "big", "boy", "but", "by", "call", "came", "can", "care", "change", "come", "could",
    "course", "cut", "dark", "day", "did", "do", "does", "down", "during", "each", "early", "end", "even",
    "every", "find", "first", "fish", "follow", "for", "form", "found", "free", "from", "front", "get", "give",
    "go", "good", "great", "group", "had", "hand", "happen", "has", "have", "he", "head", "hear", "help", "her",
    "here", "him", "his", "hold", "home", "horse", "hot", "house", "how", "if", "in", "is", "island", "it",
    "just", "kind", "know", "land", "large", "late", "learn", "less", "letter", "like", "line", "little", "live",
    "long", "look", "machine", "made", "make", "man", "many", "may", "me", "mean", "measure", "men", "mind",
    "moon", "more", "most", "mother", "move", "much", "must", "my", "name", "need", "new", "night", "no", "not",
    "now", "number", "of", "off", "old", "on", "once", "one", "only", "or", "other", "our", "out", "over", "page",
    "part", "pattern", "people", "picture", "place", "play", "point", "power", "product", "put", "quick", "rain",
    "read", "real", "red", "right", "rock", "said", "same", "say", "school", "science", "see", "seem", "sentence",
    "set", "she", "ship", "should", "show", "simple", "size", "slow", "small", "so", "some", "sound", "special",
    "spell", "step", "still", "street", "study", "such", "surface", "take", "teach", "tell", "test", "than",
    "that", "the", "their", "them", "then", "there", "these", "they", "thing", "think", "this", "those",
    "thousand", "three", "through", "time", "to", "together", "too", "try", "turn", "two", "until", "up", "us",
    "use", "very", "want", "war", "was", "water", "way", "we", "week", "well", "went", "were", "what", "when",
    "where", "which", "while", "white", "who", "why", "will", "with", "word", "work", "world", "would", "write",
    "year", "you", "young", "your",
];

/// Encodes a text. A listed word with its leading space is one token; other text is encoded as pairs of bytes.
pub(crate) fn encode(text: &str) -> Vec<u32> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::with_capacity(bytes.len() / 4 + 1);
    let mut other = 0;
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] != b' ' {
            at += 1;
            continue;
        }
        let length = bytes[at + 1..]
            .iter()
            .take_while(|byte| byte.is_ascii_lowercase() || **byte == b'-')
            .count();
        let end = at + 1 + length;
        if let Some(token) = word_token(&text[at + 1..end]) {
            encode_bytes(&bytes[other..at], &mut tokens);
            tokens.push(token);
            other = end;
        }
        at = end;
    }
    encode_bytes(&bytes[other..], &mut tokens);
    tokens
}

fn encode_bytes(bytes: &[u8], tokens: &mut Vec<u32>) {
    tokens.extend(bytes.chunks(2).map(|piece| match piece {
        [first, second] => PAIRS + u32::from(*first) * 256 + u32::from(*second),
        [single] => u32::from(*single),
        _ => unreachable!("chunks of two hold one or two"),
    }));
}

fn word_token(piece: &str) -> Option<u32> {
    let index = |word: &str| WORDS.binary_search(&word).ok().and_then(|at| u32::try_from(at).ok());
    if let Some(word) = index(piece) {
        return Some(SINGLE_WORDS + word);
    }
    let (first, second) = piece.split_once('-')?;
    let token = DOUBLE_WORDS + index(first)? * 256 + index(second)?;
    (token < SPECIAL).then_some(token)
}

/// Appends the bytes of one token. Special and invalid ids have none.
pub(crate) fn decode_into(token: u32, bytes: &mut Vec<u8>) {
    let word = |index: u32| WORDS[index as usize % 256].as_bytes();
    match token {
        0..PAIRS => bytes.push(token.to_le_bytes()[0]),
        PAIRS..SINGLE_WORDS => {
            let [second, first, ..] = (token - PAIRS).to_le_bytes();
            bytes.extend([first, second]);
        }
        SINGLE_WORDS..DOUBLE_WORDS => {
            bytes.push(b' ');
            bytes.extend(word(token - SINGLE_WORDS));
        }
        DOUBLE_WORDS..SPECIAL => {
            let pair = token - DOUBLE_WORDS;
            bytes.push(b' ');
            bytes.extend(word(pair / 256));
            bytes.push(b'-');
            bytes.extend(word(pair));
        }
        SPECIAL.. => {}
    }
}

/// Decodes tokens. Invalid UTF-8 becomes U+FFFD.
pub(crate) fn decode(tokens: &[u32]) -> String {
    let mut bytes = Vec::with_capacity(tokens.len() * 5);
    for token in tokens {
        decode_into(*token, &mut bytes);
    }
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// A 64-bit hash of two numbers: the finalizer of `SplitMix64`.
pub(crate) fn mix(left: u64, right: u64) -> u64 {
    let mut hash = left.rotate_left(23) ^ right.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    hash ^ (hash >> 31)
}

/// A summary of the KV cache of one sequence. Every token adds a record that depends on the previous one, and the next
/// token depends on all records. So a lost, swapped or corrupted record changes the output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct KvState {
    last: u64,
    folded: u64,
    length: usize,
}

impl KvState {
    /// Bytes of one record in a transfer.
    pub(crate) const RECORD_BYTES: usize = 8;

    /// Adds a record from another engine.
    pub(crate) fn absorb(&mut self, record: u64) {
        self.last = record;
        self.folded = mix(self.folded, record);
        self.length += 1;
    }

    /// Computes and adds the record of the next token.
    pub(crate) fn compute(&mut self, token: u32) -> u64 {
        let record = mix(self.last, u64::from(token));
        self.absorb(record);
        record
    }

    /// Number of tokens so far.
    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// The input of the sampler: all records, and a salt for seeded or repeated sampling.
    pub(crate) fn draw(&self, salt: u64) -> Draw {
        Draw(mix(self.folded, salt))
    }
}

/// One draw of the sampler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draw(u64);

impl Draw {
    /// The token. `previous` avoids repeated punctuation; `may_end` allows the end of the answer.
    pub(crate) fn token(self, previous: Option<u32>, may_end: bool) -> u32 {
        let [word, choice, ending, ..] = self.0.to_le_bytes();
        let after_word = previous.is_some_and(|token| token >= SINGLE_WORDS);
        if previous == Some(PERIOD) && may_end && ending < 64 {
            return END_OF_TURN;
        }
        match choice {
            0..24 if after_word => PERIOD,
            24..36 if after_word => COMMA,
            _ => SINGLE_WORDS + u32::from(word),
        }
    }

    /// One of `of` choices.
    pub(crate) fn choice(self, of: usize) -> usize {
        usize::try_from(self.0 >> 33).unwrap_or(0) % of.max(1)
    }

    /// Its log probability, between -2 and 0.
    pub(crate) fn logprob(self) -> f64 {
        -(((self.0 >> 40) % 2000) as f64) / 1000.0
    }

    /// The alternative of this rank, from 1, with its log probability.
    pub(crate) fn alternative(self, rank: u32) -> (u32, f64) {
        let [word, ..] = mix(self.0, u64::from(rank)).to_le_bytes();
        (SINGLE_WORDS + u32::from(word), self.logprob() - f64::from(rank))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_are_sorted_and_differ() {
        assert!(WORDS.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn generated_text_encodes_to_its_tokens() {
        let mut state = KvState::default();
        for token in encode("Once upon a time") {
            state.compute(token);
        }
        let mut made = Vec::new();
        while made.len() < 300 {
            let token = state.draw(0).token(made.last().copied(), false);
            state.compute(token);
            made.push(token);
        }
        let text = decode(&made);
        assert_eq!(encode(&text), made, "{text}");
        assert!(made.contains(&PERIOD));
    }

    #[test]
    fn one_corrupted_record_changes_the_draw() {
        let records = [1_u64, 2, 3, 4];
        let fold = |records: &[u64]| {
            let mut state = KvState::default();
            for record in records {
                state.absorb(*record);
            }
            state.draw(0).0
        };
        for position in 0..records.len() {
            let mut garbled = records;
            garbled[position] ^= 1;
            assert_ne!(fold(&records), fold(&garbled));
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_encoding(text in "\\PC*( (the|time-people|of|Time|x)){0,4}\\PC*") {
            prop_assert_eq!(decode(&encode(&text)), text);
        }

        #[test]
        fn words_made_of_any_word_id_are_read_back(ids in proptest::collection::vec(SINGLE_WORDS..SPECIAL, 0..50)) {
            prop_assert_eq!(encode(&decode(&ids)), ids);
        }
    }
}
