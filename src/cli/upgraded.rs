//! Whether the vLLM that a run began with is still the one that is installed: NIXL hands over between engines of one version only.

use std::path::Path;

use super::run_plan::RunPlan;
use crate::control::rundir::RunInfo;
use crate::machine;
use crate::report::{ExitStatus, Failure};

/// Fails where an engine that starts now would be of another version than those that run. What cannot be read says nothing.
pub(super) fn check(run: &RunInfo) -> Result<(), Failure> {
    let Some((began, program)) = began(&run.logs_dir) else {
        return Ok(());
    };
    let Some(now) = machine::vllm_version(&program).filter(|now| *now != began) else {
        return Ok(());
    };
    let text = format!(
        "vLLM {now} is installed, and the engines of this run are {began}: engines of different versions cannot hand over"
    );
    let (down, up) = (super::command("down", &run.name), super::command("up", &run.name));
    Err(Failure::message(ExitStatus::RunState, text).hint(format!("start all of them anew: `{down}`, then `{up}`")))
}

/// The version and the program of the run's engines. The version is not there where it was not known.
fn began(logs_dir: &Path) -> Option<(String, String)> {
    let plan = RunPlan::read(logs_dir)?;
    Some((plan.value()["vllm"].as_str()?.to_owned(), plan.vllm()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_of_a_run_tells_version_and_program_unless_engines_are_simulated() {
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
