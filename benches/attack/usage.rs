//! The resources of a process: memory, descriptors, CPU time.

use std::fs;
use std::time::Duration;

/// Descriptors that a process has open.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Resident memory in KiB.
pub(crate) fn memory(pid: u32) -> u64 {
    status_field(pid, "VmRSS:")
}

/// The most resident memory since [`reset_peak_memory`], in KiB.
pub(crate) fn peak_memory(pid: u32) -> u64 {
    status_field(pid, "VmHWM:")
}

/// If the kernel rejects it, the peak covers the whole life of the process.
pub(crate) fn reset_peak_memory(pid: u32) {
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// CPU time of all running threads in nanoseconds, not in ticks of 10 ms.
pub(crate) fn cpu(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let nanoseconds = threads.filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

fn status_field(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = status.lines().find_map(|line| line.strip_prefix(field));
    value
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
