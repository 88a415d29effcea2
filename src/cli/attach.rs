//! Engines of a detached run that has lost its xpyd: finding them, and comparing them with the plan.

use std::path::PathBuf;

use super::command;
use crate::control::rundir;
use crate::fleet::{EngineId, Role};
use crate::plan::{EngineSpec, Plan};
use crate::profile::Profile;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::shim::client::ShimError;
use crate::supervisor::{AttachableRun, KeptState};

/// The engines that the last xpyd of the run `name` left running, if there are any.
pub(super) fn find(name: &str) -> Result<Option<AttachableRun>, Failure> {
    for socket in sockets(name)? {
        if let Some(kept) = AttachableRun::find(&socket).map_err(|error| unreachable_engines(error, name))? {
            return Ok(Some(kept));
        }
    }
    Ok(None)
}

/// The sockets at which its shim can wait.
fn sockets(name: &str) -> Result<Vec<PathBuf>, Failure> {
    rundir::kept_sockets(name).map_err(|error| Failure::new(ExitStatus::Usage, error))
}

/// The hint names the shim, whose end stops this run's engines and nothing else: the kernel then kills the leaders of its
/// engines, and the shim monitor kills their children.
fn unreachable_engines(error: ShimError, name: &str) -> Failure {
    let is_other_version = matches!(error, ShimError::Version { .. } | ShimError::Protocol(_));
    let error = anyhow::Error::new(error).context(format!(
        "engines of run `{name}` are still running, but their shim cannot be reached"
    ));
    let failure = Failure::new(ExitStatus::RunState, error);
    if is_other_version {
        let down = command("down", name);
        return failure.hint(format!("use the version of xpyd that started them: `{down}`"));
    }
    let failure = failure.hint("try again in a moment");
    let sockets = sockets(name).unwrap_or_default();
    match sockets.iter().find_map(|socket| AttachableRun::shim_pid(socket)) {
        Some(pid) => failure.hint(format!(
            "to kill the engines of this run: `kill -KILL {pid}`; `xpyd doctor` then shows whether any process is left"
        )),
        None => failure.hint("`xpyd doctor --reap` kills orphaned engines"),
    }
}

/// The profile with the GPUs of the running engines. The engines use the memory of these GPUs, so a new plan would choose
/// others.
pub(super) fn with_running_gpus(profile: &Profile, kept: &AttachableRun, name: &str) -> Result<Profile, Failure> {
    let mut specs = kept.specs().map_err(|error| unreachable_engines(error, name))?;
    specs.sort_by_key(|spec| (spec.id.as_str().len(), spec.id.to_string()));
    let mut profile = profile.clone();
    for (role, of_role) in [
        (Role::Prefill, &mut profile.prefill),
        (Role::Decode, &mut profile.decode),
    ] {
        // Engines that were added later have higher numbers.
        let count = usize::from(of_role.count);
        let running: Vec<_> = specs.iter().filter(|spec| spec.role == role).take(count).collect();
        if running.len() == count {
            of_role.gpus = running.iter().flat_map(|spec| spec.gpus.iter().copied()).collect();
        }
    }
    Ok(profile)
}

/// Puts the engines that still run into the plan. Fails if the plan would start others. Engines that were added since the start
/// become part of it. An engine without any process is ignored.
pub(super) fn resume(mut plan: Plan, kept: &AttachableRun, name: &str) -> Result<Plan, Failure> {
    let specs = kept.specs().map_err(|error| unreachable_engines(error, name))?;
    let other = |engine: &EngineId, why: &str| {
        let text = format!("engines of run `{name}` are still running, but {engine} {why}");
        Failure::message(ExitStatus::RunState, text).hint(format!("stop them first: `{}`", command("down", name)))
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

/// The first difference between a running engine and the plan. Values are not shown, because they can be secrets.
fn difference(planned: &EngineSpec, running: &EngineSpec) -> String {
    let variables = planned.env.keys().chain(running.env.keys());
    let mut changed = variables.filter(|name| planned.env.get(*name) != running.env.get(*name));
    if planned.argv != running.argv {
        "a command line that differs from the plan".to_owned()
    } else if let Some(name) = changed.next() {
        format!("a value of {name} that differs from the plan")
    } else {
        "GPUs or an address that differ from the plan".to_owned()
    }
}

/// The engines of a detached run, in a few words.
pub(super) fn describe(kept: &AttachableRun) -> String {
    let engines = kept.engines().into_iter().map(|(engine, _, state)| match state {
        KeptState::Running { pid, .. } => format!("{engine} (pid {pid})"),
        KeptState::Leaving { .. } | KeptState::Gone { .. } => format!("{engine} (ended)"),
    });
    engines.collect::<Vec<_>>().join(", ")
}
