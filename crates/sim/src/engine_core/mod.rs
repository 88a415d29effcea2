//! The engine core: the scheduler, the sequences that it runs, the timing model and the tokenizer.

pub(super) mod scheduler;
pub(super) mod sequence;
pub(super) mod timing;
pub(super) mod tokens;
