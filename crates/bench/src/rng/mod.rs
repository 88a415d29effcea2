//! The random generators of numpy and of Python, bit for bit: the same seed gives the prompts and arrivals of vLLM's
//! client.

pub(super) mod numpy;
pub(super) mod python;
