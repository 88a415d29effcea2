//! Slurm: the allocation in which xpyd runs, and the commands that use it.
//!
//! Slurm's own variables and commands are the source (seen with Slurm 22.05).

use std::ffi::{OsStr, OsString};
use std::io;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// A node, and the address at which other nodes reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name in Slurm.
    pub name: String,
    /// A host name or an IP address.
    pub address: String,
}

/// The allocation in which this process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// The job's id.
    pub job: String,
    /// The names of its nodes, the first one first.
    pub nodes: Vec<String>,
    /// The position of this node in it; `None` on a login node, as after `salloc`.
    pub here: Option<usize>,
}

/// Why a command of Slurm gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum SlurmError {
    /// The command could not be started.
    #[error("cannot run `{command}`")]
    Command {
        /// Its name.
        command: &'static str,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The command failed.
    #[error("`{command}` failed: {message}")]
    Failed {
        /// Its command line.
        command: String,
        /// Its last line of output.
        message: String,
    },
    /// A copy of xpyd runs on each node.
    #[error("`srun` started {0} copies of xpyd, but one copy serves all nodes")]
    SeveralCopies(u32),
}

impl SlurmError {
    /// What the user can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Command { .. } | Self::Failed { .. } => "check that `scontrol ping` works on this node",
            Self::SeveralCopies(_) => "start it once, as `sbatch` does, or with `srun --ntasks=1`",
        }
    }
}

/// The variable that `slurmd` sets to the name of its node.
const NODE_NAME: &str = "SLURMD_NODENAME";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether `slurmd` has started this process, which it does on the nodes of an allocation.
pub fn is_on_a_node() -> bool {
    variable(NODE_NAME).is_some()
}

impl Allocation {
    /// The allocation that Slurm's variables describe. `None` if it has no other node than this one, and where Slurm's programs
    /// are not installed: a container inherits the variables.
    ///
    /// # Errors
    /// When `scontrol` does not list its nodes, or xpyd runs several times in it.
    pub fn read() -> Result<Option<Self>, SlurmError> {
        let (Some(job), Some(list)) = (variable("SLURM_JOB_ID"), variable("SLURM_JOB_NODELIST")) else {
            return Ok(None);
        };
        let own = variable(NODE_NAME);
        if own.as_ref() == Some(&list) {
            return Ok(None);
        }
        let copies = variable("SLURM_STEP_NUM_TASKS").and_then(|count| count.parse().ok());
        if let Some(copies) = copies.filter(|count| *count > 1) {
            return Err(SlurmError::SeveralCopies(copies));
        }
        let nodes = match host_names(&list) {
            Err(SlurmError::Command { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            nodes => nodes?,
        };
        let here = nodes.iter().position(|node| Some(node) == own.as_ref());
        Ok(Some(Self { job, nodes, here }))
    }

    /// Its nodes with their addresses, in the same order.
    ///
    /// # Errors
    /// When `scontrol` does not list them.
    pub fn addresses(&self) -> Result<Vec<Node>, SlurmError> {
        let shown = output("scontrol", &["show", "node", "-o", &self.nodes.join(",")])?;
        let address = |name: &String| Node {
            name: name.clone(),
            address: address_of(&shown, name).unwrap_or(name).to_owned(),
        };
        Ok(self.nodes.iter().map(address).collect())
    }
}

/// The value of `NodeAddr` in the node's line of `scontrol show node -o`.
fn address_of<'shown>(shown: &'shown str, name: &str) -> Option<&'shown str> {
    let field = |line: &'shown str, key: &str| line.split(' ').find_map(|word| word.strip_prefix(key));
    let line = shown.lines().find(|line| field(line, "NodeName=") == Some(name))?;
    field(line, "NodeAddr=")
}

/// The first node of a job.
///
/// # Errors
/// When the job does not run.
pub fn first_node(job: &str) -> Result<String, SlurmError> {
    let list = output("squeue", &["--noheader", "--jobs", job, "--format=%N"])?;
    let first = host_names(list.trim())?.into_iter().next();
    first.ok_or_else(|| SlurmError::Failed {
        command: format!("squeue --jobs {job}"),
        message: "the job has no node yet".to_owned(),
    })
}

/// How a job ended: its state and the exit code of its script. `None` while it runs.
///
/// # Errors
/// When Slurm does not know the job.
pub fn end_of(job: &str) -> Result<Option<(String, String)>, SlurmError> {
    let shown = output("scontrol", &["show", "job", "-o", job])?;
    let field = |key: &str| shown.split_whitespace().find_map(|word| word.strip_prefix(key));
    let state = field("JobState=").unwrap_or_default();
    let is_alive = [
        "PENDING",
        "RUNNING",
        "CONFIGURING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
    ]
    .contains(&state);
    Ok((!is_alive).then(|| (state.to_owned(), field("ExitCode=").unwrap_or_default().to_owned())))
}

/// `n1, n2` of `n[1-2]`.
fn host_names(list: &str) -> Result<Vec<String>, SlurmError> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let names = output("scontrol", &["show", "hostnames", list])?;
    Ok(names.lines().map(str::to_owned).collect())
}

fn output(command: &'static str, arguments: &[&str]) -> Result<String, SlurmError> {
    let run = Command::new(command).args(arguments).output();
    let run = run.map_err(|source| SlurmError::Command { command, source })?;
    if run.status.success() {
        return Ok(String::from_utf8_lossy(&run.stdout).into_owned());
    }
    Err(SlurmError::Failed {
        command: format!("{command} {}", arguments.join(" ")),
        message: last_line(&run.stderr),
    })
}

/// The last line of what a command printed: its reason to fail.
pub fn last_line(printed: &[u8]) -> String {
    let printed = String::from_utf8_lossy(printed);
    printed.trim().lines().last().unwrap_or("no message").to_owned()
}

/// The command that runs `command` as a step of its own on a node of this allocation.
///
/// The step shares all resources with others, so that it starts at once, is bound to no core, and has the variables of this
/// process even where the job was submitted without them.
pub fn step(node: &str, command: &[&OsStr]) -> Vec<OsString> {
    let options = [
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        "--cpu-bind=none",
        "--mpi=none",
        "--export=ALL",
        "--quiet",
    ];
    let mut step: Vec<OsString> = vec!["srun".into()];
    step.extend(options.map(OsString::from));
    step.push(format!("--nodelist={node}").into());
    step.push("--".into());
    step.extend(command.iter().map(OsString::from));
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_the_node() {
        let shown = "NodeName=n1 Arch=x86_64 NodeAddr=10.77.0.11 NodeHostName=n1 Version=22.05.8\n\
                     NodeName=n10 Arch=x86_64 NodeAddr=n10.cluster NodeHostName=n10\nNodeName=n2 State=DOWN\n";
        assert_eq!(address_of(shown, "n1"), Some("10.77.0.11"));
        assert_eq!(address_of(shown, "n10"), Some("n10.cluster"));
        assert_eq!(address_of(shown, "n2"), None);
        assert_eq!(address_of(shown, "n3"), None);
    }
}
