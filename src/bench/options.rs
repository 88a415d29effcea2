//! Settings of a run that most runs leave alone. Plain values.

use std::sync::Arc;
use std::time::Duration;

use crate::bench::rng::python::Random;
use crate::bench::tokenizer::Tokenizer;

/// What a run does beside sending its workload. By default nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Options {
    /// Modules that requests ask for in place of the model.
    pub lora: Option<Lora>,
    /// The field `logprobs` of completions.
    pub logprobs: Option<u32>,
    /// How long the server may take until it answers the first prompt, before anything else is sent; 0 does not ask.
    pub ready_check: Duration,
    /// Requests of one token per second beside the workload, one at a time; 0 is none.
    pub probe_rate: f64,
    /// What the ids of requests begin with, instead of a random text.
    pub request_id_prefix: Option<String>,
    /// Counts the tokens of answers of which the server does not.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Whether a server's certificate is not checked.
    pub is_insecure: bool,
    /// Whether vLLM's layout leaves out what its client cannot count without a tokenizer.
    pub is_without_tokenizer: bool,
}

/// Modules that requests ask for in place of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lora {
    /// Their names.
    pub modules: Vec<String>,
    /// Which request asks for which.
    pub assignment: LoraAssignment,
}

impl Lora {
    /// The module of each of `count` requests: Python's `random.choice` after `random.seed(seed)`, which is what vLLM's client
    /// draws where its dataset draws nothing of that generator, as the random one. There is at least one module.
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

/// Which request asks for which module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraAssignment {
    /// Any one, by the seed.
    Random,
    /// One after the other.
    RoundRobin,
}

/// What the result calls the run. None of it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Naming {
    /// The backend as the user named it, if that is not its first name.
    pub backend: Option<&'static str>,
    /// The model as the user or the server named it, if that is not its name in requests.
    pub model_id: Option<String>,
    /// Where the tokenizer came from, if there was one.
    pub tokenizer_id: Option<String>,
    /// The user's name of the run.
    pub label: Option<String>,
    /// More keys of the result.
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
