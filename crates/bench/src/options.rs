//! Optional settings of a run. Plain values.

use std::sync::Arc;
use std::time::Duration;

use crate::rng::python::Random;
use crate::tokenizer::Tokenizer;

/// Optional features of a run. All are off by default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Options {
    /// LoRA adapters that requests use instead of the model.
    pub lora: Option<Lora>,
    /// The field `logprobs` of completions.
    pub logprobs: Option<u32>,
    /// Time limit for the first answer, before anything else is sent; 0 skips the check.
    pub ready_check: Duration,
    /// How many probes are sent per second during the run, never two at once. A probe asks for one token. 0: none.
    pub probe_rate: f64,
    /// Prefix of request ids; by default a random one.
    pub request_id_prefix: Option<String>,
    /// Counts the tokens of answers for which the server reports no count.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Accepts any server certificate.
    pub is_insecure: bool,
    /// Leaves out of vLLM's table what its client cannot count without a tokenizer.
    pub is_without_tokenizer: bool,
}

/// LoRA adapters that requests use instead of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lora {
    /// Adapter names.
    pub modules: Vec<String>,
    /// How adapters are assigned to requests.
    pub assignment: LoraAssignment,
}

impl Lora {
    /// The adapter of each of `count` requests: Python's `random.choice` after `random.seed(seed)`. vLLM's client draws
    /// the same where its dataset does not use that generator, as with `random`. `modules` must not be empty.
    pub(super) fn assigned(&self, count: usize, seed: u32) -> Vec<Arc<str>> {
        let modules: Vec<Arc<str>> = self.modules.iter().map(|name| name.as_str().into()).collect();
        let mut generator = Random::new(seed.into());
        let place = |index: usize| match self.assignment {
            LoraAssignment::Random => generator.below(modules.len()),
            LoraAssignment::RoundRobin => index % modules.len(),
        };
        (0..count).map(place).map(|place| modules[place].clone()).collect()
    }
}

/// How adapters are assigned to requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraAssignment {
    /// At random, by the seed.
    Random,
    /// In turn.
    RoundRobin,
}

/// Names in the result file. None of them is sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Naming {
    /// The backend as the user named it, if it is not the first name.
    pub backend: Option<&'static str>,
    /// The model as the user or the server named it, if it differs from the name in requests.
    pub model_id: Option<String>,
    /// The tokenizer, if there was one.
    pub tokenizer_id: Option<String>,
    /// The user's label of the run.
    pub label: Option<String>,
    /// Additional keys of the result.
    pub metadata: Vec<(String, String)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `CPython` 3.11: `random.seed(7); [random.choice("abc") for _ in range(12)]`.
    #[test]
    fn modules_are_drawn_as_python_draws_them() {
        let lora = Lora {
            modules: ["a", "b", "c"].map(str::to_owned).to_vec(),
            assignment: LoraAssignment::Random,
        };
        assert_eq!(lora.assigned(12, 7).concat(), "babcaacabcac");
    }
}
