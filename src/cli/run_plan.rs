//! The plan that a run has written into its folder of logs, for commands that ask what it began with.

use std::path::Path;

use serde_json::Value;

/// What `plan.json` says.
pub(super) struct RunPlan(Value);

impl RunPlan {
    /// Of the run with this folder of logs; `None` where it cannot be read.
    pub(super) fn read(logs_dir: &Path) -> Option<Self> {
        let text = fs_err::read(logs_dir.join("plan.json")).ok()?;
        serde_json::from_slice(&text).ok().map(Self)
    }

    /// Everything.
    pub(super) fn value(&self) -> &Value {
        &self.0
    }

    /// The engines, prefill first.
    pub(super) fn engines(&self) -> &[Value] {
        self.0["engines"].as_array().map_or(&[], Vec::as_slice)
    }

    /// The program that serves the model; `None` where engines are simulated. A wrapper of xpyd's own may stand before it.
    pub(super) fn vllm(&self) -> Option<&str> {
        if self.0["engine"] == "sim" {
            return None;
        }
        let words = self.engines().first()?["argv"].as_array()?;
        let serve = words.iter().position(|word| word == "serve")?;
        words.get(serve.checked_sub(1)?)?.as_str()
    }
}
