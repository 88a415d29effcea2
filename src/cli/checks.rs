//! The checks of `up` and `doctor`: what the preflight finds, and what earlier runs have left on this machine.

use std::fmt;

use super::attach;
use crate::control::rundir::{self, RunDir};
use crate::engine::EngineKind;
use crate::machine::Machine;
use crate::machine::huggingface::{Leftover, LeftoverKind};
use crate::plan::Plan;
use crate::preflight::{self, Finding, Level, Topic, gibibytes};
use crate::private;
use crate::supervisor::guardian;
use crate::supervisor::guardian::orphans::{self, LeakedMemory, Orphan};

/// What earlier runs have left.
#[derive(Debug)]
pub(super) struct Leftovers {
    /// Processes that nobody watches.
    pub(super) orphans: Vec<Orphan>,
    /// Names of runs that were killed.
    stale_runs: Vec<String>,
    /// Shared memory that no process uses.
    memory: Vec<LeakedMemory>,
}

/// Something that `doctor --fix` removes: it is this user's own, and nobody uses it.
#[derive(Debug)]
pub(super) enum Remedy {
    /// The files of a run that was killed.
    StaleRun(String),
    /// A file of a download that was cut off.
    Download(Leftover),
    /// Shared memory that no process uses.
    Memory(LeakedMemory),
}

impl fmt::Display for Remedy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StaleRun(name) => write!(formatter, "the files of run `{name}`, whose xpyd was killed"),
            Self::Download(leftover) => {
                write!(formatter, "{} ({})", leftover.path.display(), gibibytes(leftover.bytes))
            }
            Self::Memory(memory) => {
                write!(
                    formatter,
                    "{} ({}), which no process uses",
                    memory.path.display(),
                    gibibytes(memory.bytes)
                )
            }
        }
    }
}

impl Remedy {
    /// Does it; looks once more whether nobody uses it.
    pub(super) fn apply(&self) -> anyhow::Result<()> {
        match self {
            // Taking the lock of a run removes what a killed one has left; giving it back leaves nothing.
            Self::StaleRun(name) => RunDir::acquire(name)?.remove_engine_key(),
            Self::Download(leftover) => leftover.remove()?,
            Self::Memory(memory) => memory.remove(),
        }
        Ok(())
    }
}

/// Everything that is to be said of a plan on this machine before it starts.
pub(super) fn of_plan(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let mut findings = preflight::check(plan, machine);
    findings.extend(secret_files(plan));
    if plan.engine == EngineKind::Vllm {
        findings.extend(Leftovers::find().findings());
    }
    findings
}

/// Files with secrets of the proxy that others than the user can read.
fn secret_files(plan: &Plan) -> Vec<Finding> {
    let service = &plan.proxy.service;
    let files = [
        ("api_key_file", &service.guard.api_key_file),
        ("tls_key", &service.clients.tls_key),
    ];
    let open = files.into_iter().filter_map(|(key, path)| {
        let path = path.as_ref().filter(|path| private::is_open_to_others(path))?;
        Some(Finding {
            topic: Topic::System,
            ..finding(
                "secret_files",
                Level::Warn,
                format!("`{key}`: others can read or change `{}`", path.display()),
                Some(&format!("`chmod 600 {}`", path.display())),
            )
        })
    });
    open.collect()
}

impl Leftovers {
    /// Looks.
    pub(super) fn find() -> Self {
        let is_kept = |name: &str| attach::find(name).is_ok_and(|kept| kept.is_some());
        Self {
            orphans: orphans::find(),
            stale_runs: rundir::stale().into_iter().filter(|name| !is_kept(name)).collect(),
            memory: orphans::leaked_memory(),
        }
    }

    /// As findings.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut findings = vec![self.orphans(), self.runs()];
        findings.extend(self.memory());
        findings.push(cgroups());
        findings
    }

    /// What can be removed, and what of the model's downloads.
    pub(super) fn remedies(self, machine: &Machine) -> Vec<Remedy> {
        let downloads = machine.hugging_face.leftovers.iter();
        let downloads = downloads.filter(|leftover| leftover.kind != LeftoverKind::HeldLock);
        let mut remedies: Vec<Remedy> = self.stale_runs.into_iter().map(Remedy::StaleRun).collect();
        remedies.extend(downloads.cloned().map(Remedy::Download));
        remedies.extend(self.memory.into_iter().map(Remedy::Memory));
        remedies
    }

    fn orphans(&self) -> Finding {
        if self.orphans.is_empty() {
            return finding("orphans", Level::Pass, "no engine without a run".to_owned(), None);
        }
        let shown: Vec<String> = self
            .orphans
            .iter()
            .take(3)
            .map(|orphan| {
                format!(
                    "{} (pid {}, {})",
                    orphan.title,
                    orphan.pid,
                    gibibytes(orphan.resident_bytes)
                )
            })
            .collect();
        let more = self.orphans.len() - shown.len();
        let more = if more == 0 {
            String::new()
        } else {
            format!(" and {more} more")
        };
        let message = format!("engines that nobody watches hold memory: {}{more}", shown.join(", "));
        finding(
            "orphans",
            Level::Warn,
            message,
            Some("`xpyd doctor --reap` shows and ends them"),
        )
    }

    fn runs(&self) -> Finding {
        if self.stale_runs.is_empty() {
            return finding("runs", Level::Pass, "no run was killed".to_owned(), None);
        }
        let message = format!(
            "the files of killed runs are still there: {}",
            self.stale_runs.join(", ")
        );
        let hint = "harmless: the next run of that name removes them, and so does `xpyd doctor --fix`";
        finding("runs", Level::Warn, message, Some(hint))
    }

    fn memory(&self) -> Option<Finding> {
        let bytes: u64 = self.memory.iter().map(|memory| memory.bytes).sum();
        let message = format!(
            "dead engines have left {} files in /dev/shm ({})",
            self.memory.len(),
            gibibytes(bytes)
        );
        let hint = "`xpyd doctor --fix` lists and removes them";
        (!self.memory.is_empty()).then(|| finding("shm_left", Level::Warn, message, Some(hint)))
    }
}

fn cgroups() -> Finding {
    let message = if guardian::cgroup_folder().is_some() {
        "every engine gets a cgroup of its own"
    } else {
        "this user may make none; engines are found by their process trees, which is as good unless something escapes on purpose"
    };
    Finding {
        topic: Topic::System,
        ..finding("cgroup", Level::Pass, message.to_owned(), None)
    }
}

fn finding(check: &'static str, level: Level, message: String, hint: Option<&str>) -> Finding {
    Finding {
        topic: Topic::Leftovers,
        check,
        level,
        message,
        hint: hint.map(str::to_owned),
    }
}
