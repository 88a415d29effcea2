//! Whether the memory that engines had is back. PURE.
//!
//! A driver takes a process's memory apart after the process itself has gone, and a context of a few hundred MiB more or
//! less may stay with others. Processes of strangers come and go meanwhile, and engines beside it keep theirs.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{GpuProcess, Usage};

/// How much more may be in use than before.
const SLACK_BYTES: u64 = 256 << 20;

/// A GPU before engines came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// Memory that was in use, in bytes.
    pub used: u64,
    /// Processes that were there, by the id that NVML tells, and what each held, as far as NVML tells.
    pub processes: BTreeMap<u32, Option<u64>>,
}

/// What has become of the memory of engines that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Release {
    /// It is back.
    Back,
    /// It is not.
    Held {
        /// More than before, in bytes.
        bytes: u64,
        /// Processes that have it, as far as NVML lists them.
        by: Vec<GpuProcess>,
    },
    /// Nobody can tell, and why.
    Unknown(&'static str),
}

impl Baseline {
    /// The GPU as it is now.
    pub fn of(usage: &Usage) -> Self {
        let processes = usage.processes.iter().flatten();
        Self {
            used: usage.memory.used,
            processes: processes.map(|process| (process.pid, process.bytes)).collect(),
        }
    }

    /// What `now` tells of the memory of engines whose processes NVML listed as `ours`. `others` says whether engines of the
    /// fleet go on running on it.
    pub fn compare(&self, now: &Usage, ours: &BTreeSet<u32>, others: bool) -> Release {
        let Some(processes) = &now.processes else {
            if others {
                return Release::Unknown("NVML does not list the processes of its GPU, and another engine runs on it");
            }
            return self.judge(now.memory.used, 0, Vec::new());
        };
        let is_stranger = |process: &&GpuProcess| {
            !ours.contains(&process.pid) && (process.local.is_some() || self.processes.contains_key(&process.pid))
        };
        let (strangers, suspects): (Vec<&GpuProcess>, Vec<&GpuProcess>) = processes.iter().partition(is_stranger);
        if others
            && strangers
                .iter()
                .all(|process| self.processes.contains_key(&process.pid))
            && suspects.is_empty()
        {
            return Release::Unknown("NVML lists no processes of its GPU, on which another engine runs");
        }
        if others && suspects.iter().any(|process| !ours.contains(&process.pid)) {
            return Release::Unknown("NVML tells process ids of the host, and another engine runs on its GPU");
        }
        let sizes: Option<u64> = strangers.iter().map(|process| process.bytes).sum();
        let Some(theirs) = sizes else {
            return Release::Unknown("NVML does not tell what other processes on its GPU hold");
        };
        self.judge(now.memory.used, theirs, suspects.into_iter().cloned().collect())
    }

    /// Judges by what no stranger has, then and now.
    fn judge(&self, used: u64, theirs: u64, suspects: Vec<GpuProcess>) -> Release {
        let before: u64 = self.processes.values().flatten().sum();
        let before = self.used.saturating_sub(before);
        let bytes = used.saturating_sub(theirs).saturating_sub(before);
        if bytes <= SLACK_BYTES && suspects.is_empty() {
            Release::Back
        } else {
            Release::Held { bytes, by: suspects }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GpuMemory, LocalProcess};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn process(pid: u32, mib: u64, is_seen: bool) -> GpuProcess {
        GpuProcess {
            pid,
            bytes: Some(mib * MIB),
            local: is_seen.then(|| LocalProcess {
                pid,
                user: "bob".to_owned(),
                command: "python".to_owned(),
            }),
        }
    }

    fn usage(used_mib: u64, processes: Vec<GpuProcess>) -> Usage {
        Usage {
            memory: GpuMemory {
                total: 80_000 * MIB,
                free: (80_000 - used_mib) * MIB,
                used: used_mib * MIB,
            },
            processes: Some(processes),
        }
    }

    fn held(release: &Release) -> u64 {
        match release {
            Release::Held { bytes, .. } => bytes / MIB,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn memory_is_back_when_little_more_is_used_and_nobody_of_ours_is_listed() {
        let before = Baseline::of(&usage(500, Vec::new()));
        let ours = BTreeSet::from([7]);
        assert_eq!(before.compare(&usage(700, Vec::new()), &ours, false), Release::Back);
        assert_eq!(held(&before.compare(&usage(70_500, Vec::new()), &ours, false)), 70_000);
        // The driver still lists it, with nothing.
        assert_eq!(
            held(&before.compare(&usage(500, vec![process(7, 0, false)]), &ours, false)),
            0
        );
    }

    #[test]
    fn strangers_that_come_and_go_make_no_difference() {
        let before = Baseline::of(&usage(10_500, vec![process(100, 10_000, true)]));
        let ours = BTreeSet::from([7]);
        assert_eq!(
            before.compare(&usage(500, Vec::new()), &ours, false),
            Release::Back,
            "one went"
        );
        let came = usage(30_500, vec![process(100, 10_000, true), process(200, 20_000, true)]);
        assert_eq!(before.compare(&came, &ours, false), Release::Back);
        let held_by_ours = usage(30_500, vec![process(100, 10_000, true), process(7, 20_000, true)]);
        assert_eq!(held(&before.compare(&held_by_ours, &ours, false)), 20_000);
    }

    #[test]
    fn host_pids_count_as_ours_unless_they_were_there_before() {
        let before = Baseline::of(&usage(10_500, vec![process(81_000, 10_000, false)]));
        let none = BTreeSet::new();
        let leaving = usage(
            30_500,
            vec![process(81_000, 10_000, false), process(82_000, 20_000, false)],
        );
        assert_eq!(held(&before.compare(&leaving, &none, false)), 20_000);
        assert!(matches!(before.compare(&leaving, &none, true), Release::Unknown(_)));
        let left = usage(10_500, vec![process(81_000, 10_000, false)]);
        assert_eq!(before.compare(&left, &none, false), Release::Back);
    }

    #[test]
    fn an_engine_beside_it_keeps_what_it_has() {
        let before = Baseline::of(&usage(500, Vec::new()));
        let beside = |mib| usage(mib, vec![process(9, 35_000, true)]);
        assert_eq!(
            before.compare(&beside(35_500), &BTreeSet::from([7]), true),
            Release::Back
        );
        assert_eq!(
            held(&before.compare(&beside(70_500), &BTreeSet::from([7]), true)),
            35_000
        );
        let unlisted = Usage {
            processes: None,
            ..usage(35_500, Vec::new())
        };
        assert!(matches!(
            before.compare(&unlisted, &BTreeSet::new(), true),
            Release::Unknown(_)
        ));
        assert_eq!(held(&before.compare(&unlisted, &BTreeSet::new(), false)), 35_000);
        // As in most containers.
        let empty = usage(35_500, Vec::new());
        assert!(matches!(
            before.compare(&empty, &BTreeSet::new(), true),
            Release::Unknown(_)
        ));
    }
}
