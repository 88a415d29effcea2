//! The participating clients, and the command line of each for one load.

use std::path::Path;
use std::process::Command;

use crate::tree::found;

/// The load: `requests` at `rate` with this many tokens each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Requests/s at nearly even intervals.
    pub(crate) rate: f64,
    pub(crate) requests: usize,
    pub(crate) tokens: u32,
}

/// A client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Participant {
    Xpyd,
    Vllm,
}

impl Participant {
    pub(crate) const ALL: [Self; 2] = [Self::Vllm, Self::Xpyd];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Xpyd => "xpyd bench",
            Self::Vllm => "vllm bench",
        }
    }

    /// The command that sends the load to `port` and writes its result to `result`, or why it is unavailable.
    pub(crate) fn command(self, load: Load, port: u16, result: &Path) -> Result<Command, String> {
        let mut command = match self {
            Self::Xpyd => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
                command.arg("bench");
                command
            }
            Self::Vllm => {
                let tokenizer =
                    std::env::var_os("XPYD_BENCH_TOKENIZER").ok_or("no tokenizer in $XPYD_BENCH_TOKENIZER")?;
                let mut command = found("vllm")?;
                command
                    .args(["bench", "serve", "--disable-tqdm", "--tokenizer"])
                    .arg(tokenizer);
                command
            }
        };
        let [rate, requests, tokens] = [
            load.rate.to_string(),
            load.requests.to_string(),
            load.tokens.to_string(),
        ];
        command.args(["--base-url", &format!("http://127.0.0.1:{port}"), "--model", "null"]);
        command.args([
            "--dataset-name",
            "random",
            "--random-input-len",
            "64",
            "--random-output-len",
            &tokens,
        ]);
        command.args([
            "--request-rate",
            &rate,
            "--burstiness",
            "100",
            "--num-prompts",
            &requests,
        ]);
        command
            .args(["--save-result", "--save-detailed", "--result-filename"])
            .arg(result);
        Ok(command)
    }
}
