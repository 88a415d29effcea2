//! Engines that outlived their xpyd: found, and compared with what is asked for now.

use std::path::PathBuf;

use super::command;
use crate::control::rundir;
use crate::fleet::{EngineId, Role};
use crate::plan::{EngineSpec, Plan};
use crate::profile::Profile;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::shim::client::ShimError;
use crate::supervisor::{AttachableRun, KeptState};

/// The engines that the last xpyd of the run `name` left, if they are still there.
pub(super) fn find(name: &str) -> Result<Option<AttachableRun>, Failure> {
    for socket in sockets(name)? {
        if let Some(kept) = AttachableRun::find(&socket).map_err(|error| unusable(error, name))? {
            return Ok(Some(kept));
        }
    }
    Ok(None)
}

/// Where its shim may wait.
fn sockets(name: &str) -> Result<Vec<PathBuf>, Failure> {
    rundir::kept_sockets(name).map_err(|error| Failure::new(ExitStatus::Usage, error))
}

/// The hint names the process whose end is the end of this run's engines and of nothing else: when a shim dies, the
/// kernel ends the leaders of its engines, and its monitor ends what they have started.
fn unusable(error: ShimError, name: &str) -> Failure {
    let is_other_version = matches!(error, ShimError::Version { .. } | ShimError::Protocol(_));
    let error = anyhow::Error::new(error).context(format!("engines of run `{name}` are kept, but out of reach"));
    let failure = Failure::new(ExitStatus::RunState, error);
    if is_other_version {
        let down = command("down", name);
        return failure.hint(format!(
            "the version of xpyd that started them can still end them: `{down}`"
        ));
    }
    let failure = failure.hint("try again in a moment");
    let sockets = sockets(name).unwrap_or_default();
    match sockets.iter().find_map(|socket| AttachableRun::shim_pid(socket)) {
        Some(pid) => failure.hint(format!(
            "to end the engines of this run without it: `kill -KILL {pid}`; `xpyd doctor` shows whether any process is left"
        )),
        None => failure.hint("`xpyd doctor --reap` ends engines that no shim watches"),
    }
}

/// The profile with the GPUs on which the engines are: these hold the memory of their own GPUs, so the plan would place them
/// elsewhere.
pub(super) fn where_they_run(profile: &Profile, kept: &AttachableRun, name: &str) -> Result<Profile, Failure> {
    let mut specs = kept.specs().map_err(|error| unusable(error, name))?;
    specs.sort_by_key(|spec| (spec.id.as_str().len(), spec.id.to_string()));
    let mut profile = profile.clone();
    for (role, of_role) in [
        (Role::Prefill, &mut profile.prefill),
        (Role::Decode, &mut profile.decode),
    ] {
        // Those that joined later have higher numbers.
        let count = usize::from(of_role.count);
        let running: Vec<_> = specs.iter().filter(|spec| spec.role == role).take(count).collect();
        if running.len() == count {
            of_role.gpus = running.iter().flat_map(|spec| spec.gpus.iter().copied()).collect();
        }
    }
    Ok(profile)
}

/// The plan with the engines as they run, if they are the ones that it would start. Those that joined since the start are
/// part of it; one of which nothing is left hinders nobody.
pub(super) fn resume(mut plan: Plan, kept: &AttachableRun, name: &str) -> Result<Plan, Failure> {
    let specs = kept.specs().map_err(|error| unusable(error, name))?;
    let other = |engine: &EngineId, why: &str| {
        let text = format!("engines of run `{name}` are kept, but {engine} {why}");
        Failure::message(ExitStatus::RunState, text).hint(format!("`{}` ends them first", command("down", name)))
    };
    let changes = kept.fleet_changes();
    for (running, (_, _, state)) in specs.iter().zip(kept.engines()) {
        let is_gone = matches!(state, KeptState::Gone { .. });
        match plan.engines.iter_mut().find(|planned| planned.id == running.id) {
            Some(planned) => match planned.resume(running) {
                Some(resumed) => *planned = resumed,
                None if is_gone => {}
                None => {
                    return Err(other(
                        &running.id,
                        &format!("runs with {}", difference(planned, running)),
                    ));
                }
            },
            None if changes.added.contains(&running.id) => plan.engines.push(running.clone()),
            None if is_gone && changes.stopped.contains(&running.id) => {}
            None => return Err(other(&running.id, "is not part of this plan")),
        }
    }
    plan.engines
        .sort_by_key(|engine| (engine.role, engine.id.as_str().len(), engine.id.to_string()));
    Ok(plan)
}

/// What an engine runs with, where that is not what is planned. Values are not shown: they may be secrets.
fn difference(planned: &EngineSpec, running: &EngineSpec) -> String {
    let variables = planned.env.keys().chain(running.env.keys());
    let mut changed = variables.filter(|name| planned.env.get(*name) != running.env.get(*name));
    if planned.argv != running.argv {
        "another command line than this plan's".to_owned()
    } else if let Some(name) = changed.next() {
        format!("another value of {name} than this plan's")
    } else {
        "other GPUs or another address than this plan's".to_owned()
    }
}

/// Who is there of a kept run, in a few words.
pub(super) fn who(kept: &AttachableRun) -> String {
    let engines = kept.engines().into_iter().map(|(engine, _, state)| match state {
        KeptState::Running { pid, .. } => format!("{engine} (pid {pid})"),
        KeptState::Leaving { .. } | KeptState::Gone { .. } => format!("{engine} (ended)"),
    });
    engines.collect::<Vec<_>>().join(", ")
}
