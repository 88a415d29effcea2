//! Checks limits, shared memory, ports, PCIe and the clock against the needs of the plan.

use super::model::gibibytes;
use super::{Finding, Level, finding};
use crate::machine::{Limit, Listener, Machine, System};
use crate::plan::Plan;

/// vLLM raises its soft limit to this value, and warns if it is lower (`utils/system_utils.py`, `set_ulimit`, of vLLM
/// 0.32).
const OPEN_FILES: u64 = 65_535;

/// With fewer, a proxy and its engines run out of descriptors at once.
const FEW_OPEN_FILES: u64 = 4096;

/// Shared memory per tensor-parallel rank: NCCL's buffers and vLLM's own ring. 64 MB, the default of a container, is too
/// little for two ranks (llm-d issue 352).
const SHARED_BYTES_PER_RANK: u64 = 256 << 20;

/// This code is newer than that, so a clock with an earlier time is wrong. 2026-01-01, in seconds since 1970.
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

/// Limits that also affect simulated engines.
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

/// xpyd and vLLM raise the soft limit themselves. Only an administrator can raise the hard limit.
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
            let message = format!("{numbers}: vLLM needs {OPEN_FILES}, and many requests at once can fail");
            finding("nofile", Level::Warn, message, Some(hint))
        }
        OPEN_FILES.. => pass("nofile", numbers),
    }
}

/// The limit on file sizes applies to logs, a downloaded model, and compile caches of engines.
fn file_size(limit: Limit) -> Option<Finding> {
    (limit.soft != u64::MAX).then(|| {
        let message = format!(
            "a file can have at most {}: logs are split into smaller files, and larger writes of engines fail",
            size(limit.soft)
        );
        let hint = "`ulimit -f unlimited` before the start, or `LimitFSIZE=infinity` in a systemd unit";
        finding("fsize", Level::Warn, message, Some(hint))
    })
}

/// A size that can be far below 1 GiB.
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
        let message = "there is no /dev/shm, which engines need for shared memory".to_owned();
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
            "{numbers}, but {ranks} tensor-parallel ranks need about {}",
            gibibytes(needed)
        );
        return finding("shm", Level::Fail, message, Some(hint));
    }
    if space.free < needed.max(SHARED_BYTES_PER_RANK) {
        let hint = "`ls -l /dev/shm` shows what fills it; `xpyd doctor --fix` removes the files of engines that \
            have ended";
        return finding("shm", Level::Warn, numbers, Some(hint));
    }
    pass("shm", numbers)
}

fn ports(plan: &Plan, listeners: &[Listener]) -> Finding {
    let wanted = plan.ports_here();
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
    let message = format!("{} {noun} in use: {}", taken.len(), taken.join(", "));
    let hint =
        "`xpyd ps` shows your runs; stop the process, or move all ports of this fleet with `--set port_offset=100`";
    finding("ports", Level::Fail, message, Some(hint))
}

/// Only RDMA locks much memory. Within one node, UCX does not need it.
fn locked_memory(plan: &Plan, system: &System) -> Finding {
    let limit = system.locked_memory.soft;
    let words = if limit == u64::MAX {
        "no limit on locked memory".to_owned()
    } else {
        format!("{} of memory can be locked", gibibytes(limit))
    };
    let over_rdma = plan.engines.iter().any(|engine| {
        let transports = engine.env.get("UCX_TLS").map_or("all", String::as_str);
        transports
            .split(',')
            .any(|name| ["all", "ib", "rc", "rc_v", "rc_x", "ud", "dc"].contains(&name))
    });
    if system.has_rdma && over_rdma && limit != u64::MAX {
        let message = format!("{words}, but UCX can use this machine's RDMA devices, which need more");
        let hint = "`ulimit -l unlimited`, `LimitMEMLOCK=infinity`, or `--ulimit memlock=-1` for a container; or \
            turn RDMA off, with `UCX_TLS` in `vllm.env`";
        return finding("memlock", Level::Warn, message, Some(hint));
    }
    pass("memlock", format!("{words}; only RDMA needs more"))
}

/// Direct copies between GPUs stop or are slow if bridges redirect them through the root (vLLM issue 8058).
fn pcie(system: &System) -> Option<Finding> {
    let bridges = system.pcie.redirecting_bridges?;
    if bridges == 0 || !system.pcie.has_iommu {
        return Some(pass("acs", "no bridge redirects traffic between GPUs".to_owned()));
    }
    let message = format!("{bridges} PCIe bridges redirect traffic between GPUs (ACS), so direct copies can hang");
    let hint = "if the GPUs have no NVLink: `iommu=pt` on the kernel's command line and ACS off in the firmware; or \
        `--set vllm.env.NCCL_P2P_DISABLE=1` with `--disable-custom-all-reduce` in `vllm.args`";
    Some(finding("acs", Level::Warn, message, Some(hint)))
}

fn year(system: &System) -> Finding {
    if system.unix_seconds < WRITTEN {
        let message = "this machine's clock shows a time before 2026: certificates will look invalid".to_owned();
        return finding("time", Level::Warn, message, Some("`timedatectl set-ntp true`"));
    }
    pass("time", "the clock is plausible".to_owned())
}
