//! The `plan.json` in a run's folder of logs, for commands that need the plan of a running or finished run.

use std::path::Path;

use serde_json::Value;

/// The content of a `plan.json`.
pub(super) struct RunPlan(Value);

impl RunPlan {
    /// The plan of the run with this folder of logs; `None` if it cannot be read.
    pub(super) fn read(logs_dir: &Path) -> Option<Self> {
        let text = fs_err::read(logs_dir.join("plan.json")).ok()?;
        serde_json::from_slice(&text).ok().map(Self)
    }

    /// The whole plan.
    pub(super) fn value(&self) -> &Value {
        &self.0
    }

    /// The engines, prefill first.
    pub(super) fn engines(&self) -> &[Value] {
        self.0["engines"].as_array().map_or(&[], Vec::as_slice)
    }

    /// The program that serves the model; `None` for simulated engines. `xpyd sidecar` can come before it in the command line.
    pub(super) fn vllm(&self) -> Option<&str> {
        if self.0["engine"] == "sim" {
            return None;
        }
        let words = self.engines().first()?["argv"].as_array()?;
        let serve = words.iter().position(|word| word == "serve")?;
        words.get(serve.checked_sub(1)?)?.as_str()
    }
}
