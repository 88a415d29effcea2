//! The Slurm allocation in which a command runs: its other nodes, and the way to its first one.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, IsTerminal as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{PollTimeout, poll};
use tokio::time::Instant;

use crate::engine::EngineKind;
use crate::machine::{self, Gpus, Machine, NodeQuestion};
use crate::profile::Profile;
use crate::report::{ExitStatus, Failure};
use crate::slurm::{self, Allocation, SlurmError};
use crate::ui::Printer;

/// How long Slurm can take to end a job after its script has ended.
const JOB_END: Duration = Duration::from_mins(1);

fn failure(error: SlurmError) -> Failure {
    let hint = error.hint();
    Failure::new(ExitStatus::Failure, error).hint(hint)
}

/// How a command runs as a step of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StepKind {
    /// The step ends with the command, and the job goes on.
    Plain,
    /// It can end the job, and so its own step.
    CanEndTheJob,
    /// Its processes would have to outlive the step, and Slurm ends them.
    OutlivesTheStep,
}

/// Adds the other nodes of the allocation, with their facts.
pub(super) fn with_other_nodes(machine: Machine, profile: &Profile, logs: &Path) -> Result<Machine, Failure> {
    let Some(allocation) = Allocation::read().map_err(failure)? else {
        return Ok(machine);
    };
    let Some(here) = allocation.here.filter(|_| allocation.nodes.len() > 1) else {
        return Ok(machine);
    };
    let mut nodes = allocation.addresses().map_err(failure)?;
    let this = nodes.remove(here);
    let simulated = profile.engine == EngineKind::Sim;
    let shared_file = SharedFile::create(logs)?;
    let question = NodeQuestion {
        gpus: machine.gpus != Gpus::NotAsked,
        program: (!simulated).then(|| profile.vllm.program.clone()),
        shared_file: shared_file.0.clone(),
    };
    let nodes = machine::survey_nodes(&machine.xpyd, this, nodes, &question);
    Ok(machine.with_nodes(nodes))
}

/// A file that shows whether the other nodes share a folder with this one. Removed on drop.
struct SharedFile(PathBuf);

impl SharedFile {
    /// Creates it in the folder, or in the nearest one above that exists.
    fn create(folder: &Path) -> Result<Self, Failure> {
        let folder = std::path::absolute(folder).map_err(anyhow::Error::from)?;
        let existing = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(&folder);
        let path = existing.join(format!(".xpyd-shared-{:016x}", rand::random::<u64>()));
        fs_err::write(&path, "").map_err(|error| {
            Failure::new(ExitStatus::Failure, error).hint("name a folder that you can write to: `--logs DIR`")
        })?;
        Ok(Self(path))
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // Another user's cleanup can have been faster.
        let _ = fs_err::remove_file(&self.0);
    }
}

/// Replaces this process by the same command on the first node of the job, if it runs elsewhere: with `--job`, or on a login
/// node after `salloc`.
///
/// A command that can end the job (`xpyd down`) is a child instead, which Slurm kills with the job. Returns its exit code.
pub(super) fn move_to_first_node(job: Option<&str>, kind: StepKind) -> Result<Option<u8>, Failure> {
    let target = match job {
        Some(job) => {
            let node = slurm::first_node(job).map_err(|error| failure(error).hint("`squeue --me` lists your jobs"))?;
            Some((job.to_owned(), node))
        }
        None if slurm::is_on_a_node() => None,
        None => Allocation::read()
            .map_err(failure)?
            .and_then(|allocation| Some((allocation.job, allocation.nodes.into_iter().next()?))),
    };
    let Some((job, node)) = target else { return Ok(None) };
    let program = std::env::current_exe().map_err(anyhow::Error::from)?;
    let arguments = without_options(std::env::args_os().skip(1), &["--job"]);
    if kind == StepKind::OutlivesTheStep {
        let problem = "`--detach` ends with the Slurm step in which this command runs".to_owned();
        let hint = "`xpyd slurm submit` runs a fleet in the background";
        return Err(Failure::message(ExitStatus::Usage, problem).hint(hint));
    }
    let words: Vec<&OsStr> = [program.as_os_str()]
        .into_iter()
        .chain(arguments.iter().map(OsString::as_os_str))
        .collect();
    let mut step = slurm::step(&node, &words);
    let is_on_terminal = std::io::stdin().is_terminal() && Printer::default().data_width().is_some();
    let options = [format!("--jobid={job}")]
        .into_iter()
        .chain(is_on_terminal.then(|| "--pty".to_owned()));
    step.splice(1..1, options.map(OsString::from));
    let mut command = Command::new(&step[0]);
    command.args(&step[1..]);
    if kind == StepKind::CanEndTheJob {
        return follow_to_the_end(command, &job).map(Some);
    }
    Err(no_srun(command.exec()))
}

fn no_srun(source: std::io::Error) -> Failure {
    let command = "srun";
    failure(SlurmError::Command { command, source })
}

/// Runs a command in a job that it may end.
fn follow_to_the_end(mut command: Command, job: &str) -> Result<u8, Failure> {
    let mut step = command.stderr(Stdio::piped()).spawn().map_err(no_srun)?;
    let printer = Printer::default();
    let mut of_slurm = Vec::new();
    for line in step
        .stderr
        .take()
        .map(BufReader::new)
        .into_iter()
        .flat_map(BufRead::lines)
    {
        let line = line.map_err(no_srun)?;
        // How Slurm ends the step is of interest only if that was not the aim.
        if line.starts_with("srun: ") || line.starts_with("slurmstepd") {
            of_slurm.push(line);
        } else {
            printer.status(line);
        }
    }
    let code = step
        .wait()
        .map_err(no_srun)?
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1);
    if code > 128 {
        // Slurm killed the step, with the job.
        let deadline = Instant::now() + JOB_END;
        while Instant::now() < deadline {
            if let Some((state, code)) = slurm::end_of(job).map_err(failure)? {
                printer.status(format!(
                    "job {job} has ended: {}, exit code {code}",
                    state.to_lowercase()
                ));
                return Ok(u8::from(state != "COMPLETED"));
            }
            pause();
        }
    }
    for line in of_slurm {
        printer.status(line);
    }
    Ok(code)
}

/// Waits before Slurm is asked again.
fn pause() {
    // There is nothing to wait for but time.
    let _ = poll(&mut [], PollTimeout::from(200u8));
}

/// The arguments without these options, which all have a value: `--job ID` and `--job=ID`. What follows `--` stays.
pub(super) fn without_options(mut arguments: impl Iterator<Item = OsString>, options: &[&str]) -> Vec<OsString> {
    let mut kept = Vec::new();
    while let Some(word) = arguments.next() {
        let text = word.to_string_lossy();
        if text == "--" {
            kept.push(word);
            kept.extend(arguments);
            break;
        }
        let (name, value) = text
            .split_once('=')
            .map_or((&*text, None), |(name, value)| (name, Some(value)));
        if !options.contains(&name) {
            kept.push(word);
        } else if value.is_none() {
            arguments.next();
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_is_not_passed_on() {
        let kept = |line: &str| without_options(line.split(' ').map(OsString::from), &["--job"]).join(OsStr::new(" "));
        assert_eq!(kept("--job 7 status --json"), "status --json");
        assert_eq!(kept("logs decoder1 -f --job=7"), "logs decoder1 -f");
        assert_eq!(kept("status --name jobs"), "status --name jobs");
        assert_eq!(kept("up 1p1d -- --job 7"), "up 1p1d -- --job 7");
    }
}
