//! Checks after a storm: the fleet answers, nothing is in flight, and `xpyd down` leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use crate::Findings;
use crate::client::{ClientBehaviour, RequestOutcome, TestRequest, ask};
use crate::http;
use crate::storm::{StormContext, shared_memory};
use crate::tree::is_running;

/// Far longer than a fleet takes to recover, and longer than the 90 s after which lost hand-offs are cleaned up.
const RECOVERY: Duration = Duration::from_mins(3);
const DEADLINE: Duration = Duration::from_mins(1);

/// Concurrent requests after the storm.
const REQUESTS: usize = 60;

/// Gauges that must be 0 without clients.
const GAUGES: [&str; 3] = ["xpyd_requests_in_flight", "xpyd_requests_queued", "xpyd_handoffs_open"];

pub(crate) async fn check(context: &Arc<StormContext>, test_requests: &[TestRequest], keep: Option<&Path>) -> Findings {
    let mut findings = Findings::new();
    let blocking = Arc::clone(context);
    let recovery = tokio::task::spawn_blocking(move || recover(&blocking)).await;
    findings.extend(recovery.unwrap_or_else(|error| vec![error.to_string()]));
    findings.extend(ask_all(context.fleet.proxy_port(), test_requests).await);
    findings.extend(idle(context.fleet.proxy_port()).await);
    if let Some(folder) = keep {
        findings.extend(context.keep(folder).err().map(|error| format!("no logs kept: {error}")));
    }
    let blocking = Arc::clone(context);
    let end = tokio::task::spawn_blocking(move || take_down(&blocking)).await;
    findings.extend(end.unwrap_or_else(|error| vec![error.to_string()]));
    findings
}

/// Restores the fleet to its initial size.
fn recover(context: &StormContext) -> Findings {
    let mut findings = Findings::new();
    let ran = context.fleet.run(&["scale", "prefill=2", "decode=2"]);
    if ran.code != Some(0) {
        findings.push(format!("xpyd scale after the storm: {}", ran.last_words()));
    }
    findings.extend(context.fleet.wait_until_whole(RECOVERY).err());
    findings
}

async fn ask_all(port: u16, test_requests: &[TestRequest]) -> Findings {
    let mut findings = Findings::new();
    let mut right = 0;
    let asked = test_requests.iter().cycle().take(REQUESTS);
    let outcomes = asked.map(|test_request| ask(port, test_request, ClientBehaviour::Stream, DEADLINE));
    for outcome in join_all(outcomes).await {
        match outcome {
            RequestOutcome::Right => right += 1,
            outcome => findings.push(format!("after the storm: {outcome:?}")),
        }
    }
    println!("{:<44}{right}/{REQUESTS} right", "after the storm");
    findings
}

/// Waits until every gauge is 0.
pub(crate) async fn idle(port: u16) -> Findings {
    let begun = Instant::now();
    loop {
        let mut values = Vec::new();
        for name in GAUGES {
            values.push((name, http::metric(port, name, DEADLINE).await));
        }
        let is_idle = values.iter().all(|(_, value)| *value == Some(0.0));
        if is_idle || begun.elapsed() > RECOVERY {
            let words: Vec<String> = values
                .iter()
                .map(|(name, value)| {
                    format!(
                        "{name} {}",
                        value.map_or("missing".to_owned(), |value| value.to_string())
                    )
                })
                .collect();
            println!("{:<44}{}", "nobody asks any more", words.join(", "));
            return if is_idle {
                Vec::new()
            } else {
                vec![format!("not idle: {}", words.join(", "))]
            };
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Runs `xpyd down` and reports everything that it left behind.
fn take_down(context: &StormContext) -> Findings {
    let mut findings = Findings::new();
    let before: Vec<u32> = context.fleet.processes();
    let ran = context.fleet.run(&["down"]);
    if ran.code != Some(0) {
        findings.push(format!("xpyd down: {}", ran.last_words()));
    }
    let left = [
        ("processes", words(&context.fleet.processes())),
        ("listeners", words(&context.fleet.listeners())),
        ("files in /dev/shm", shared_memory()),
        ("cgroups", cgroups(&before)),
    ];
    let row: Vec<String> = left
        .iter()
        .map(|(what, left)| format!("{} {what}", left.len()))
        .collect();
    println!("{:<44}{}", "after `xpyd down`", row.join(", "));
    for (what, left) in left.iter().filter(|(_, left)| !left.is_empty()) {
        findings.push(format!("{what} left after `xpyd down`: {}", left.join(", ")));
    }
    findings
}

fn words<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

/// The remaining cgroups of these processes' shims, and of shims that no longer exist.
fn cgroups(processes: &[u32]) -> Vec<String> {
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = membership.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let entries = fs::read_dir(PathBuf::from("/sys/fs/cgroup").join(own))
        .into_iter()
        .flatten()
        .flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| {
            let shim = name
                .strip_prefix("xpyd-")
                .and_then(|rest| rest.split(['.', '-']).next());
            let shim = shim.and_then(|pid| pid.parse::<u32>().ok());
            shim.is_some_and(|pid| processes.contains(&pid) && !is_running(pid))
        })
        .collect()
}
