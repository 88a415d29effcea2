//! Whether the model is here, or may be fetched.

use super::{Finding, Level, finding};
use crate::machine::{Machine, TokenSource};
use crate::plan::Plan;

/// Repositories whose files need a token and an accepted licence, by prefix.
const GATED: &[&str] = &["meta-llama/", "google/gemma", "mistralai/Mixtral-8x22B", "CohereForAI/"];

pub(super) fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let model = &plan.model;
    if machine.hugging_face.model_is_local {
        return vec![finding(
            "model",
            Level::Pass,
            format!("`{model}` is on this machine"),
            None,
        )];
    }
    if model.starts_with('/') || model.starts_with('.') {
        let message = format!("the model folder `{model}` has no config.json");
        return vec![finding(
            "model",
            Level::Fail,
            message,
            Some("check the path given as `model`"),
        )];
    }
    let gated = GATED.iter().any(|prefix| model.starts_with(prefix));
    let licence = format!(
        "accept the licence at https://huggingface.co/{model}, then `export HF_TOKEN=hf_…` (or `hf auth login`)"
    );
    match &machine.hugging_face.token {
        None if gated => {
            let message = format!("`{model}` is gated and not cached, and there is no Hugging Face token");
            vec![finding("hf_token", Level::Fail, message, Some(&licence))]
        }
        Some(token) if gated && !token.well_formed => {
            let place = match &token.source {
                TokenSource::Environment(name) => (*name).to_owned(),
                TokenSource::File(path) => path.display().to_string(),
            };
            let message = format!("the token in {place} does not have the form `hf_…`, and `{model}` is gated");
            vec![finding("hf_token", Level::Fail, message, Some(&licence))]
        }
        None | Some(_) => {
            let message = format!("`{model}` is not cached: the engines will download it first");
            vec![finding("model", Level::Warn, message, None)]
        }
    }
}
