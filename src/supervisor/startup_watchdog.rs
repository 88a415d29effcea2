//! Detects a start that makes no progress, as opposed to a slow one: its log does not grow, and its processes neither compute nor
//! read.
//!
//! `StallDetector` is pure. One tick of CPU time is progress, so an engine that waits for another's download is not affected.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::shim::tree::ProcessTable;

/// Time between two samples; shorter where the deadline is short.
const INTERVAL: Duration = Duration::from_secs(5);

/// The least number of samples within the deadline.
const MIN_SAMPLES: u32 = 5;

/// The work of a start so far. Any difference between two samples is progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sample {
    /// Inode of its log, and size in bytes.
    log: Option<(u64, u64)>,
    processes: usize,
    /// CPU time of its processes, in clock ticks.
    cpu_ticks: u64,
    /// Bytes that its processes have read from files and devices.
    bytes: u64,
}

/// Watches one start.
#[derive(Debug)]
struct StallDetector {
    stall: Duration,
    last: Option<Sample>,
    /// When it last made progress.
    last_progress: Instant,
}

impl StallDetector {
    fn new(stall: Duration, now: Instant) -> Self {
        Self {
            stall,
            last: None,
            last_progress: now,
        }
    }

    /// Takes a sample. Returns how long the start has made no progress, if that is too long.
    fn observe(&mut self, sample: Sample, now: Instant) -> Option<Duration> {
        if self.last.replace(sample) != Some(sample) {
            self.last_progress = now;
        }
        let stalled_for = now - self.last_progress;
        (stalled_for >= self.stall).then_some(stalled_for)
    }
}

/// Completes once the start has made no progress for `stall`. Returns for how long.
pub(super) async fn until_stalled(log: PathBuf, leader: Option<u32>, stall: Duration) -> Duration {
    let Some(leader) = leader.and_then(|pid| i32::try_from(pid).ok()) else {
        return std::future::pending().await;
    };
    let mut judge = StallDetector::new(stall, Instant::now());
    loop {
        let log = log.clone();
        let sample = tokio::task::spawn_blocking(move || take_sample(&log, leader)).await;
        if let Some(stalled_for) = sample.ok().and_then(|sample| judge.observe(sample, Instant::now())) {
            return stalled_for;
        }
        sleep(INTERVAL.min(stall / MIN_SAMPLES)).await;
    }
}

fn take_sample(log: &Path, leader: i32) -> Sample {
    let processes = ProcessTable::read().engine_led_by(leader);
    Sample {
        log: std::fs::metadata(log).ok().map(|log| (log.ino(), log.len())),
        processes: processes.len(),
        cpu_ticks: processes.iter().map(|process| process.cpu_ticks).sum(),
        bytes: processes.iter().map(|process| bytes_read(process.pid)).sum(),
    }
}

/// Bytes that a process has read: `rchar` counts calls, `read_bytes` also pages of mapped files, such as weights
/// (`proc_pid_io(5)`). 0 if this user is not allowed to read it.
fn bytes_read(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let value = |line: &str| {
        let (name, value) = line.split_once(": ")?;
        ["rchar", "read_bytes"]
            .contains(&name)
            .then(|| value.trim().parse::<u64>().ok())?
    };
    text.lines().filter_map(value).sum()
}

/// The reason for ending the start, in one line.
pub(super) fn reason(stalled_for: Duration, phase: Option<&str>, log: &Path) -> String {
    let time = humantime::format_duration(Duration::from_secs(stalled_for.as_secs().max(1)));
    let phase = phase.unwrap_or("none reached");
    format!(
        "stalled while starting, in phase: {phase}; no output, CPU time or reads for {time}; see its log `{}`",
        log.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(10);
    const NOTHING: Sample = Sample {
        log: Some((1, 100)),
        processes: 3,
        cpu_ticks: 50,
        bytes: 1000,
    };

    /// What the judge says about one look a second, and after how many seconds.
    fn judge(samples: impl IntoIterator<Item = Sample>) -> Option<(u64, Duration)> {
        let start = Instant::now();
        let mut judge = StallDetector::new(STALL, start);
        samples.into_iter().zip(0..).find_map(|(sample, second)| {
            let stalled_for = judge.observe(sample, start + Duration::from_secs(second))?;
            Some((second, stalled_for))
        })
    }

    #[test]
    fn a_start_without_progress_stalls_exactly_at_the_deadline() {
        assert_eq!(judge([NOTHING; 10]), None);
        assert_eq!(judge([NOTHING; 11]), Some((10, STALL)));
    }

    #[test]
    fn any_progress_resets_the_deadline() {
        let signs: [fn(&mut Sample); 5] = [
            |sample| sample.log = Some((1, 101)),
            // As after a rotation.
            |sample| sample.log = Some((2, 100)),
            |sample| sample.processes = 2,
            |sample| sample.cpu_ticks += 1,
            |sample| sample.bytes += 1,
        ];
        for (number, sign) in signs.into_iter().enumerate() {
            let mut after = NOTHING;
            sign(&mut after);
            let looks = [[NOTHING; 10], [after; 10]].concat();
            assert_eq!(judge(looks), None, "sign {number}");
            let looks = [[NOTHING; 10].as_slice(), &[after; 11]].concat();
            assert_eq!(judge(looks), Some((20, STALL)), "sign {number}");
        }
    }

    #[test]
    fn a_slow_start_never_stalls() {
        // One tick in nine seconds.
        let slow = (0..200).map(|second| Sample {
            cpu_ticks: second / 9,
            ..NOTHING
        });
        assert_eq!(judge(slow), None);
    }

    #[test]
    fn a_sample_of_this_process_shows_cpu_time_and_reads() {
        let folder = tempfile::tempdir().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "x").unwrap();
        let sample = take_sample(&log, own);
        assert!(sample.processes >= 1 && sample.bytes > 0, "{sample:?}");
        assert_eq!(sample.log.unwrap().1, 1);
    }

    #[test]
    fn the_reason_names_phase_and_duration() {
        let reason = reason(STALL, Some("loading weights"), Path::new("decoder1.log"));
        assert_eq!(
            reason,
            "stalled while starting, in phase: loading weights; no output, CPU time or reads for 10s; see its log \
             `decoder1.log`"
        );
    }
}
