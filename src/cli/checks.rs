//! The checks of `up` and `doctor`: the preflight, and remains of earlier runs on this machine.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;

use jiff::{SignedDuration, Timestamp};
use nix::unistd::{AccessFlags, access};

use super::attach;
use super::other_runs::OtherRuns;
use crate::control::rundir::{self, RunDir};
use crate::engine::EngineKind;
use crate::machine::Machine;
use crate::machine::huggingface::{Leftover, LeftoverKind};
use crate::plan::Plan;
use crate::preflight::{self, Finding, Level, Topic, gibibytes};
use crate::private;
use crate::proxy;
use crate::proxy_config::ProxyConfig;
use crate::supervisor::shim;
use crate::supervisor::shim::orphans::{self, LeakedMemory, Orphan};

/// A certificate that expires within this time gets a warning.
const EXPIRES_SOON: SignedDuration = SignedDuration::from_hours(14 * 24);

/// Remains of earlier runs.
#[derive(Debug)]
pub(super) struct Leftovers {
    /// Orphaned engine processes.
    pub(super) orphans: Vec<Orphan>,
    /// Names of runs that were killed.
    stale_runs: Vec<String>,
    /// Shared memory that no process uses.
    memory: Vec<LeakedMemory>,
}

/// A remedy of `doctor --fix`. It only removes unused files of this user.
#[derive(Debug)]
pub(super) enum Remedy {
    /// The files of a run that was killed.
    StaleRun(String),
    /// A file of an interrupted download.
    Download(Leftover),
    /// Shared memory that no process uses.
    Memory(LeakedMemory),
}

/// The hint of a warning about orphans.
pub(super) const REAP_HINT: &str = "`xpyd doctor --reap` lists and kills them";

/// A sentence about orphaned engines, with the memory of each; `None` if there are none.
pub(super) fn orphans_message(orphans: &[Orphan]) -> Option<String> {
    let shown = orphans.iter().take(3).map(|orphan| {
        let memory = gibibytes(orphan.resident_bytes);
        format!("{} (pid {}, {memory})", orphan.title, orphan.pid)
    });
    let shown: Vec<String> = shown.collect();
    let more = match orphans.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let message = format!("orphaned engine processes use memory: {}{more}", shown.join(", "));
    (!shown.is_empty()).then_some(message)
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
    /// Applies the remedy, unless the file is in use meanwhile.
    pub(super) fn apply(&self) -> anyhow::Result<()> {
        match self {
            // Taking the lock of a run removes the files of a killed one. Dropping the lock removes the rest.
            Self::StaleRun(name) => RunDir::acquire(name)?.remove_engine_key(),
            Self::Download(leftover) => leftover.remove()?,
            Self::Memory(memory) => memory.remove(),
        }
        Ok(())
    }
}

/// All findings about a plan on this machine, before its start.
pub(super) fn of_plan(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let mut findings = of_machine(plan, machine);
    if plan.engine == EngineKind::Vllm {
        findings.extend(Leftovers::find().findings());
    }
    findings
}

/// Whether the plan can work on this machine, beside the runs that are up.
pub(super) fn of_machine(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let mut findings = preflight::check(plan, machine);
    if let Some(finding) = OtherRuns::find().finding(plan) {
        // It says more than the finding about the port.
        findings.retain(|other| other.check != finding.check);
        findings.push(finding);
    }
    findings.extend(logs_folder(&plan.run_dir));
    findings.extend(of_proxy(&plan.proxy.config));
    findings
}

/// Findings about the files of a proxy.
pub(super) fn of_proxy(config: &ProxyConfig) -> Vec<Finding> {
    let mut findings = secret_files(config);
    let valid = config.clients.tls_cert.as_deref().and_then(|path| {
        let valid = proxy::validity(path)?;
        certificate(path, &valid, Timestamp::now())
    });
    findings.extend(valid);
    findings
}

/// A finding about a certificate that clients refuse, or will refuse soon.
fn certificate(path: &Path, valid: &RangeInclusive<u64>, now: Timestamp) -> Option<Finding> {
    let [from, until] = [valid.start(), valid.end()].map(|seconds| {
        let seconds = i64::try_from(*seconds).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
    });
    let problem = if now > until {
        format!("expired on {}", until.strftime("%F"))
    } else if now < from {
        format!("is not valid before {}", from.strftime("%F"))
    } else if now.duration_until(until) < EXPIRES_SOON {
        format!("expires on {}", until.strftime("%F"))
    } else {
        return None;
    };
    Some(Finding {
        topic: Topic::System,
        ..finding(
            "certificate",
            Level::Warn,
            format!("`tls_cert`: the certificate in `{}` {problem}", path.display()),
            Some("clients refuse an invalid certificate: replace the file, then restart xpyd"),
        )
    })
}

/// Whether the folder of the run can be created.
fn logs_folder(run_dir: &Path) -> Option<Finding> {
    let folder = std::path::absolute(run_dir).ok()?;
    let there = folder
        .ancestors()
        .skip(1)
        .find(|folder| folder.symlink_metadata().is_ok())?;
    let problem = if !there.is_dir() {
        "it is not a folder".to_owned()
    } else if let Err(errno) = access(there, AccessFlags::W_OK | AccessFlags::X_OK) {
        errno.desc().to_lowercase()
    } else {
        return None;
    };
    Some(Finding {
        topic: Topic::System,
        ..finding(
            "logs",
            Level::Fail,
            format!(
                "the logs of a run cannot be written below `{}`: {problem}",
                there.display()
            ),
            Some("name another folder with `--logs DIR`"),
        )
    })
}

/// Files with secrets of the proxy that other users can read.
fn secret_files(config: &ProxyConfig) -> Vec<Finding> {
    let files = [
        ("api_key_file", &config.guard.api_key_file),
        ("tls_key", &config.clients.tls_key),
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
    /// Finds all remains.
    pub(super) fn find() -> Self {
        let is_kept = |name: &str| attach::find(name).is_ok_and(|kept| kept.is_some());
        Self {
            orphans: orphans::find(),
            stale_runs: rundir::stale().into_iter().filter(|name| !is_kept(name)).collect(),
            memory: orphans::leaked_memory(),
        }
    }

    /// The remains as findings.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut findings = vec![self.orphans(), self.runs()];
        findings.extend(self.memory());
        findings.push(cgroups());
        findings
    }

    /// The remains that can be removed, those of the model's downloads included.
    pub(super) fn remedies(self, machine: &Machine) -> Vec<Remedy> {
        let downloads = machine.hugging_face.leftovers.iter();
        let downloads = downloads.filter(|leftover| leftover.kind != LeftoverKind::HeldLock);
        let mut remedies: Vec<Remedy> = self.stale_runs.into_iter().map(Remedy::StaleRun).collect();
        remedies.extend(downloads.cloned().map(Remedy::Download));
        remedies.extend(self.memory.into_iter().map(Remedy::Memory));
        remedies
    }

    fn orphans(&self) -> Finding {
        match orphans_message(&self.orphans) {
            None => finding("orphans", Level::Pass, "no orphaned engine process".to_owned(), None),
            Some(message) => finding("orphans", Level::Warn, message, Some(REAP_HINT)),
        }
    }

    fn runs(&self) -> Finding {
        if self.stale_runs.is_empty() {
            return finding("runs", Level::Pass, "no files of killed runs".to_owned(), None);
        }
        let message = format!("files of killed runs are left: {}", self.stale_runs.join(", "));
        let hint = "harmless; the next run of that name removes them, or `xpyd doctor --fix`";
        finding("runs", Level::Warn, message, Some(hint))
    }

    fn memory(&self) -> Option<Finding> {
        let bytes: u64 = self.memory.iter().map(|memory| memory.bytes).sum();
        let message = format!(
            "engines that have ended left {} files in /dev/shm ({})",
            self.memory.len(),
            gibibytes(bytes)
        );
        let hint = "`xpyd doctor --fix` lists and removes them";
        (!self.memory.is_empty()).then(|| finding("shm_left", Level::Warn, message, Some(hint)))
    }
}

fn cgroups() -> Finding {
    let message = if shim::cgroup_folder().is_some() {
        "every engine gets its own cgroup"
    } else {
        "this user cannot create cgroups; xpyd finds the processes of engines by their process trees instead"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_and_expiring_certificates_are_reported() {
        const DAY: i64 = 24 * 60 * 60;
        let told = |day: i64| {
            let now = Timestamp::from_second(day * DAY).expect("a time");
            let valid = 100 * DAY.unsigned_abs()..=200 * DAY.unsigned_abs();
            certificate(Path::new("cert.pem"), &valid, now).map(|finding| finding.message)
        };
        let says = |what: &str| Some(format!("`tls_cert`: the certificate in `cert.pem` {what}"));
        assert_eq!(told(99), says("is not valid before 1970-04-11"));
        assert_eq!(told(101), None);
        assert_eq!(told(185), None);
        assert_eq!(told(187), says("expires on 1970-07-20"));
        assert_eq!(told(201), says("expired on 1970-07-20"));
    }
}
