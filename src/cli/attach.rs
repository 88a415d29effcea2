//! Engines that outlived their xpyd: found, and compared with what is asked for now.

use crate::control::rundir;
use crate::fleet::{EngineId, Role};
use crate::plan::{EngineSpec, Plan};
use crate::profile::Profile;
use crate::report::{ExitStatus, Failure};
use crate::supervisor::guardian::client::GuardianError;
use crate::supervisor::{KeptRun, KeptState};

/// The engines that the last xpyd of the run `name` left, if they are still there.
pub(super) fn find(name: &str) -> Result<Option<KeptRun>, Failure> {
    let socket = rundir::attach_path(name).map_err(|error| Failure::new(ExitStatus::Usage, error))?;
    KeptRun::find(&socket).map_err(|error| unusable(error, name))
}

fn unusable(error: GuardianError, name: &str) -> Failure {
    let is_other_version = matches!(error, GuardianError::Version { .. } | GuardianError::Protocol(_));
    let error = anyhow::Error::new(error).context(format!("engines of run `{name}` are kept, but out of reach"));
    let failure = Failure::new(ExitStatus::RunState, error);
    if is_other_version {
        failure.hint("the xpyd that started them can still end them: `xpyd down` with that version")
    } else {
        failure.hint("try again in a moment; `pkill -KILL -f 'xpyd guardian'` ends the engines of all runs")
    }
}

/// The profile with the GPUs on which the engines are: these hold the memory of their own GPUs, so the plan would place them
/// elsewhere.
pub(super) fn where_they_run(profile: &Profile, kept: &KeptRun, name: &str) -> Result<Profile, Failure> {
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
pub(super) fn resume(mut plan: Plan, kept: &KeptRun, name: &str) -> Result<Plan, Failure> {
    let specs = kept.specs().map_err(|error| unusable(error, name))?;
    let other = |engine: &EngineId, why: &str| {
        let text = format!("engines of run `{name}` are kept, but {engine} {why}");
        Failure::message(ExitStatus::RunState, text).hint(format!("{} ends them first", down_command(name)))
    };
    let scaled = kept.scaled();
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
            None if scaled.joined.contains(&running.id) => plan.engines.push(running.clone()),
            None if is_gone && scaled.stopped.contains(&running.id) => {}
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
pub(super) fn who(kept: &KeptRun) -> String {
    let engines = kept.engines().into_iter().map(|(engine, _, state)| match state {
        KeptState::Running { pid, .. } => format!("{engine} (pid {pid})"),
        KeptState::Leaving { .. } | KeptState::Gone { .. } => format!("{engine} (ended)"),
    });
    engines.collect::<Vec<_>>().join(", ")
}

/// The command that takes the run `name` down.
pub(super) fn down_command(name: &str) -> String {
    if name == rundir::DEFAULT_NAME {
        "`xpyd down`".to_owned()
    } else {
        format!("`xpyd down --name {name}`")
    }
}
