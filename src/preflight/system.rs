//! Limits, shared memory, ports, the bus and the clock, against what the plan's engines need.

use super::model::gibibytes;
use super::{Finding, Level, finding};
use crate::machine::{Limit, Listener, Machine, System};
use crate::plan::Plan;

/// What vLLM raises its soft limit to, and warns below (`utils/system_utils.py`, `set_ulimit`, of vLLM 0.32).
const OPEN_FILES: u64 = 65_535;

/// Below this a proxy and its engines run out of descriptors at once.
const FEW_OPEN_FILES: u64 = 4096;

/// Shared memory for one rank of a tensor-parallel group: NCCL's buffers and vLLM's own ring. 64 MB, a container's default,
/// is too little for two (llm-d issue 352).
const SHARED_BYTES_PER_RANK: u64 = 256 << 20;

/// This code was written after that time: no clock is right that shows an earlier one. 2026-01-01.
const WRITTEN: i64 = 1_767_225_600;

pub(super) fn check(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let system = &machine.system;
    let ranks: u64 = plan.engines.iter().map(|engine| engine.gpus.len() as u64).sum();
    let several = plan.engines.iter().any(|engine| engine.gpus.len() > 1);
    let mut findings = vec![
        open_files(system.open_files),
        shared_memory(system, if several { ranks.max(2) } else { 0 }),
        ports(plan, &system.listeners),
        locked_memory(plan, system),
    ];
    findings.extend(file_size(system.file_size));
    findings.extend((ranks > 1).then(|| pcie(system)).flatten());
    findings.push(year(system));
    findings
}

pub(super) fn of_simulated(plan: &Plan, machine: &Machine) -> Vec<Finding> {
    let mut findings = vec![
        open_files(machine.system.open_files),
        ports(plan, &machine.system.listeners),
    ];
    findings.extend(file_size(machine.system.file_size));
    findings
}

/// Limits that even simulated engines feel.
pub(super) fn limits(machine: &Machine) -> Vec<Finding> {
    file_size(machine.system.file_size).into_iter().collect()
}

pub(super) fn overview(machine: &Machine) -> Vec<Finding> {
    let system = &machine.system;
    let mut findings = vec![open_files(system.open_files), shared_memory(system, 0), year(system)];
    findings.extend(file_size(system.file_size));
    findings
}

fn pass(check: &'static str, message: String) -> Finding {
    finding(check, Level::Pass, message, None)
}

fn shown(limit: u64) -> String {
    if limit == u64::MAX {
        "unlimited".to_owned()
    } else {
        limit.to_string()
    }
}

/// xpyd and vLLM raise the soft limit themselves; the hard one is the administrator's.
fn open_files(limit: Limit) -> Finding {
    let numbers = format!(
        "{} open files per process, at most {}",
        shown(limit.soft),
        shown(limit.hard)
    );
    let hint = "as root, `ulimit -Hn 65535` before the start, `LimitNOFILE=65535` in a systemd unit, `--ulimit nofile=65535` \
        for a container, or `* hard nofile 65535` in /etc/security/limits.conf";
    match limit.hard {
        ..FEW_OPEN_FILES => finding("nofile", Level::Fail, numbers, Some(hint)),
        FEW_OPEN_FILES..OPEN_FILES => {
            let message = format!("{numbers}: vLLM wants {OPEN_FILES}, and many requests at once may fail");
            finding("nofile", Level::Warn, message, Some(hint))
        }
        OPEN_FILES.. => pass("nofile", numbers),
    }
}

/// A limit of files' sizes holds for logs, for a model that is fetched, and for what engines compile and cache.
fn file_size(limit: Limit) -> Option<Finding> {
    (limit.soft != u64::MAX).then(|| {
        let message = format!(
            "a file may have {} at most: logs are cut into smaller files, and larger writes of engines fail",
            size(limit.soft)
        );
        let hint = "`ulimit -f unlimited` before the start, or `LimitFSIZE=infinity` in a systemd unit";
        finding("fsize", Level::Warn, message, Some(hint))
    })
}

/// A size that may be far below a gibibyte.
fn size(bytes: u64) -> String {
    if bytes < 1 << 30 {
        format!("{} KiB", bytes >> 10)
    } else {
        gibibytes(bytes)
    }
}

fn shared_memory(system: &System, ranks: u64) -> Finding {
    let hint = "start the container with `--shm-size=16g` or `--ipc=host`; elsewhere, as root, `mount -o remount,size=50% /dev/shm`";
    let Some(space) = system.shared_memory else {
        let message = "there is no /dev/shm, and engines share memory between their processes there".to_owned();
        return finding(
            "shm",
            Level::Fail,
            message,
            Some("mount it: `mount -t tmpfs tmpfs /dev/shm`"),
        );
    };
    let numbers = format!(
        "/dev/shm has {} of {} free",
        gibibytes(space.free),
        gibibytes(space.total)
    );
    let needed = ranks * SHARED_BYTES_PER_RANK;
    if space.total < needed {
        let message = format!(
            "{numbers}, and {ranks} ranks of tensor parallelism want about {}",
            gibibytes(needed)
        );
        return finding("shm", Level::Fail, message, Some(hint));
    }
    if space.free < needed.max(SHARED_BYTES_PER_RANK) {
        let hint = "`ls -l /dev/shm` shows what fills it; `xpyd doctor --fix` removes what dead engines have left";
        return finding("shm", Level::Warn, numbers, Some(hint));
    }
    pass("shm", numbers)
}

fn ports(plan: &Plan, listeners: &[Listener]) -> Finding {
    let wanted = plan.ports();
    let taken: Vec<String> = wanted
        .iter()
        .filter_map(|(port, purpose)| {
            let listener = listeners.iter().find(|listener| listener.port == *port)?;
            let who = match &listener.process {
                Some((pid, name)) => format!("process {pid} ({name})"),
                None => "a process of another user".to_owned(),
            };
            Some(format!("{port} ({purpose}) by {who}"))
        })
        .collect();
    if taken.is_empty() {
        return pass("ports", format!("all {} are free", wanted.len()));
    }
    let noun = if taken.len() == 1 { "port is" } else { "ports are" };
    let message = format!("{} {noun} taken: {}", taken.len(), taken.join(", "));
    let hint = "`xpyd status` shows your runs; end the process, or move this fleet to other ports with another `port_offset`, for example `--set port_offset=1000`";
    finding("ports", Level::Fail, message, Some(hint))
}

/// Only RDMA locks much memory; on one machine, UCX needs none of it.
fn locked_memory(plan: &Plan, system: &System) -> Finding {
    let limit = system.locked_memory.soft;
    let words = if limit == u64::MAX {
        "no limit of locked memory".to_owned()
    } else {
        format!("{} of memory may be locked", gibibytes(limit))
    };
    let over_rdma = plan.engines.iter().any(|engine| {
        let transports = engine.env.get("UCX_TLS").map_or("all", String::as_str);
        transports
            .split(',')
            .any(|name| ["all", "ib", "rc", "rc_v", "rc_x", "ud", "dc"].contains(&name))
    });
    if system.has_rdma && over_rdma && limit != u64::MAX {
        let message = format!("{words}, and UCX may use this machine's RDMA devices, which want it all");
        let hint = "`ulimit -l unlimited`, `LimitMEMLOCK=infinity`, or `--ulimit memlock=-1` for a container; or leave RDMA alone, \
            with `UCX_TLS` in `vllm.env`";
        return finding("memlock", Level::Warn, message, Some(hint));
    }
    pass("memlock", format!("{words}; only RDMA needs more"))
}

/// Direct copies between GPUs stop or crawl where bridges send them through the root (vLLM issue 8058).
fn pcie(system: &System) -> Option<Finding> {
    let bridges = system.pcie.redirecting_bridges?;
    if bridges == 0 || !system.pcie.has_iommu {
        return Some(pass("acs", "no bridge redirects what goes from GPU to GPU".to_owned()));
    }
    let message =
        format!("{bridges} PCIe bridges redirect what goes from GPU to GPU (ACS), and direct copies may hang");
    let hint = "where GPUs have no NVLink: `iommu=pt` on the kernel's command line and ACS off in the firmware; or \
        `--set vllm.env.NCCL_P2P_DISABLE=1` with `--disable-custom-all-reduce` in `vllm.args`";
    Some(finding("acs", Level::Warn, message, Some(hint)))
}

fn year(system: &System) -> Finding {
    if system.unix_seconds < WRITTEN {
        let message = "this machine's clock shows a time before 2026: no certificate will seem valid".to_owned();
        return finding("time", Level::Warn, message, Some("`timedatectl set-ntp true`"));
    }
    pass("time", "the clock is plausible".to_owned())
}
