//! Decides whether the memory of engines that ended is free again. PURE.
//!
//! A driver frees a process's memory after the process itself has ended, and other processes can keep a few hundred MiB
//! more or less for contexts. Meanwhile other users' processes start and end, and other engines keep their memory.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{GpuProcess, Usage};

/// Tolerance over the memory that was in use before.
const SLACK_BYTES: u64 = 256 << 20;

/// The state of a GPU before the engines started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// Memory in use, in bytes.
    pub used: u64,
    /// The processes on it, by the id that NVML reports, with the memory of each if NVML reports it.
    pub processes: BTreeMap<u32, Option<u64>>,
}

/// The state of the memory of engines that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Release {
    /// The memory is free again.
    Back,
    /// The memory is still in use.
    Held {
        /// Bytes in use beyond those before the start.
        bytes: u64,
        /// The processes that use it, if NVML lists them.
        by: Vec<GpuProcess>,
    },
    /// Unknown, with the reason.
    Unknown(&'static str),
}

impl Baseline {
    /// The baseline of the GPU in its current state.
    pub fn of(usage: &Usage) -> Self {
        let processes = usage.processes.iter().flatten();
        Self {
            used: usage.memory.used,
            processes: processes.map(|process| (process.pid, process.bytes)).collect(),
        }
    }

    /// Compares `now` with the baseline. NVML listed the engines' processes as `ours`; `others` says whether other engines
    /// of the fleet still run on the GPU.
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
            return Release::Unknown("NVML reports process ids of the host, and another engine runs on its GPU");
        }
        let sizes: Option<u64> = strangers.iter().map(|process| process.bytes).sum();
        let Some(theirs) = sizes else {
            return Release::Unknown("NVML does not report the memory of other processes on its GPU");
        };
        self.judge(now.memory.used, theirs, suspects.into_iter().cloned().collect())
    }

    /// Decides by memory that no other user's process accounts for, before and now.
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
    fn memory_is_back_within_tolerance() {
        let before = Baseline::of(&usage(500, Vec::new()));
        let ours = BTreeSet::from([7]);
        assert_eq!(before.compare(&usage(700, Vec::new()), &ours, false), Release::Back);
        assert_eq!(held(&before.compare(&usage(70_500, Vec::new()), &ours, false)), 70_000);
        // The driver still lists the process, without memory.
        assert_eq!(
            held(&before.compare(&usage(500, vec![process(7, 0, false)]), &ours, false)),
            0
        );
    }

    #[test]
    fn other_users_processes_do_not_count() {
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
    fn new_host_pids_count_as_ours() {
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
    fn another_engine_keeps_its_memory() {
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
