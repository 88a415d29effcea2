//! Tells a start that stands still from one that takes long: for a while its log does not grow, and its processes neither
//! compute nor read.
//!
//! The judge is pure. One tick of CPU time is progress, so that nobody who only waits for another's download is judged.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::shim::tree::Table;

/// How often it is looked at; more often where the deadline is short.
const INTERVAL: Duration = Duration::from_secs(5);

/// How many looks fit into the deadline at least.
const LOOKS: u32 = 5;

/// What a start has done so far. Any difference is progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sample {
    /// Inode and size of its log.
    log: Option<(u64, u64)>,
    processes: usize,
    /// CPU time of its processes, in clock ticks.
    cpu_ticks: u64,
    /// Read by its processes, from files and devices.
    bytes: u64,
}

/// Watches one start.
#[derive(Debug)]
struct Judge {
    stall: Duration,
    last: Option<Sample>,
    /// When it was last seen to have done something.
    moved: Instant,
}

impl Judge {
    fn new(stall: Duration, now: Instant) -> Self {
        Self {
            stall,
            last: None,
            moved: now,
        }
    }

    /// Takes in a look; for how long it has stood still, if that is too long.
    fn observe(&mut self, sample: Sample, now: Instant) -> Option<Duration> {
        if self.last.replace(sample) != Some(sample) {
            self.moved = now;
        }
        let still = now - self.moved;
        (still >= self.stall).then_some(still)
    }
}

/// Returns once the start has stood still for `stall`, and says for how long.
pub(super) async fn until_still(log: PathBuf, leader: Option<u32>, stall: Duration) -> Duration {
    let Some(leader) = leader.and_then(|pid| i32::try_from(pid).ok()) else {
        return std::future::pending().await;
    };
    let mut judge = Judge::new(stall, Instant::now());
    loop {
        let log = log.clone();
        let look = tokio::task::spawn_blocking(move || look(&log, leader)).await;
        if let Some(still) = look.ok().and_then(|sample| judge.observe(sample, Instant::now())) {
            return still;
        }
        sleep(INTERVAL.min(stall / LOOKS)).await;
    }
}

fn look(log: &Path, leader: i32) -> Sample {
    let processes = Table::read().engine_led_by(leader);
    Sample {
        log: std::fs::metadata(log).ok().map(|log| (log.ino(), log.len())),
        processes: processes.len(),
        cpu_ticks: processes.iter().map(|process| process.cpu_ticks).sum(),
        bytes: processes.iter().map(|process| bytes_read(process.pid)).sum(),
    }
}

/// What a process has read: `rchar` counts calls, `read_bytes` also pages that it touched in a mapped file, as weights are
/// (`proc_pid_io(5)`). 0 if nobody may know.
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

/// Why the start is given up, in one line.
pub(super) fn reason(still: Duration, phase: Option<&str>, log: &Path) -> String {
    let time = humantime::format_duration(Duration::from_secs(still.as_secs().max(1)));
    let phase = phase.unwrap_or("its very beginning");
    format!(
        "stands still while starting, at: {phase}; for {time} it logged nothing, computed nothing and read nothing; see its \
         log `{}`",
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
        let mut judge = Judge::new(STALL, start);
        samples.into_iter().zip(0..).find_map(|(sample, second)| {
            let still = judge.observe(sample, start + Duration::from_secs(second))?;
            Some((second, still))
        })
    }

    #[test]
    fn a_start_that_does_nothing_is_given_up_at_the_deadline_and_not_before() {
        assert_eq!(judge([NOTHING; 10]), None);
        assert_eq!(judge([NOTHING; 11]), Some((10, STALL)));
    }

    #[test]
    fn any_sign_of_life_begins_the_time_anew() {
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
    fn a_slow_start_is_well_for_ever() {
        // One tick in nine seconds.
        let slow = (0..200).map(|second| Sample {
            cpu_ticks: second / 9,
            ..NOTHING
        });
        assert_eq!(judge(slow), None);
    }

    #[test]
    fn a_look_at_this_very_process_sees_it_compute_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "x").unwrap();
        let sample = look(&log, own);
        assert!(sample.processes >= 1 && sample.bytes > 0, "{sample:?}");
        assert_eq!(sample.log.unwrap().1, 1);
    }

    #[test]
    fn the_reason_says_where_and_for_how_long() {
        let reason = reason(STALL, Some("loading weights"), Path::new("decoder1.log"));
        assert_eq!(
            reason,
            "stands still while starting, at: loading weights; for 10s it logged nothing, computed nothing and read \
             nothing; see its log `decoder1.log`"
        );
    }
}
