//! Checks that the installed vLLM is still the one that the run began with: NIXL only works between engines of one version.

use std::path::Path;

use super::run_plan::RunPlan;
use crate::control::rundir::RunInfo;
use crate::machine;
use crate::report::{ExitStatus, Failure};

/// Fails if a new engine would have another version than the running ones. An unknown version is not an error.
pub(super) fn check(run: &RunInfo) -> Result<(), Failure> {
    let Some((began, program)) = began(&run.logs_dir) else {
        return Ok(());
    };
    let Some(now) = machine::vllm_version(&program).filter(|now| *now != began) else {
        return Ok(());
    };
    let text = format!(
        "vLLM {now} is installed, but the engines of this run are {began}: KV transfers between different versions fail"
    );
    let (down, up) = (super::command("down", &run.name), super::command("up", &run.name));
    Err(Failure::message(ExitStatus::RunState, text).hint(format!("restart the whole fleet: `{down}`, then `{up}`")))
}

/// The version and the program of the run's engines; `None` if the version is unknown.
fn began(logs_dir: &Path) -> Option<(String, String)> {
    let plan = RunPlan::read(logs_dir)?;
    Some((plan.value()["vllm"].as_str()?.to_owned(), plan.vllm()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_plan_has_vllm_version_and_program() {
        let folder = tempfile::tempdir().expect("a folder");
        let read = |text: &str| {
            fs_err::write(folder.path().join("plan.json"), text).expect("a file");
            began(folder.path())
        };
        let sidecar = r#"["xpyd", "sidecar", "--", "lmcache", "server", "--", "/opt/vllm", "serve", "m"]"#;
        assert_eq!(
            read(&format!(r#"{{"vllm": "0.33.0", "engines": [{{"argv": {sidecar}}}]}}"#)),
            Some(("0.33.0".to_owned(), "/opt/vllm".to_owned()))
        );
        assert_eq!(read(r#"{"engines": [{"argv": ["xpyd", "sim", "m"]}]}"#), None);
        assert_eq!(read("{"), None);
    }
}
