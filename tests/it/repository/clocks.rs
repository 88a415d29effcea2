//! `docs/clocks.md`: its defaults equal those of the code, and each time limit is longer than what it must outlive.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// A row of the table: the default, and what it must outlive. Each is a sum of clocks.
struct Clock {
    default: Duration,
    outlives: Vec<Vec<String>>,
}

fn read(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file))
        .unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn table() -> BTreeMap<String, Clock> {
    let text = read("docs/clocks.md");
    let rows = text
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix('|'));
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let clocks = cells.skip(1).map(|cells| {
        let [name, default, _, outlives] = cells[..] else {
            panic!("four cells: {cells:?}")
        };
        let sums = outlives.split(", ").filter(|sum| !sum.is_empty());
        let clock = Clock {
            default: humantime::parse_duration(default).expect("a duration"),
            outlives: sums.map(|sum| sum.split(" + ").map(str::to_owned).collect()).collect(),
        };
        (name.to_owned(), clock)
    });
    clocks.collect()
}

/// The number after `marker` in a file. Other tests compare that file with the code.
fn number_after(file: &str, marker: &str) -> u64 {
    let text = read(file);
    let at = text.find(marker).unwrap_or_else(|| panic!("no {marker} in {file}"));
    let digits: String = text[at + marker.len()..]
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits
        .parse()
        .unwrap_or_else(|_| panic!("no number after {marker} in {file}"))
}

/// The value of `const NAME: Duration` in a source file.
fn constant(file: &str, name: &str) -> Duration {
    let number = |unit: &str| {
        let text = read(file);
        let rest = text
            .split_once(&format!("const {name}: Duration = Duration::from_{unit}("))?
            .1;
        rest.split_once(')')?.0.parse::<u64>().ok()
    };
    match (number("secs"), number("mins")) {
        (Some(seconds), _) => Duration::from_secs(seconds),
        (_, Some(minutes)) => Duration::from_mins(minutes),
        _ => panic!("no {name} in {file}"),
    }
}

/// The values of the code by the names of the table. Clocks that are not here belong to vLLM.
fn code() -> BTreeMap<&'static str, Duration> {
    let deadlines = xpyd::profile::load("2p2d-nixl", &[]).expect("a profile").deadlines;
    let planned = |profile: &str, marker: &str| {
        number_after(
            &format!("src/cli/snapshots/xpyd__cli__plan__tests__{profile}.snap"),
            marker,
        )
    };
    let seconds = |marker| Duration::from_secs(planned("2p2d-nixl", marker));
    let lease = seconds("\"kv_lease_duration\":");
    BTreeMap::from([
        ("stall", deadlines.stall),
        ("end of a hang", constant("src/profile/deadlines.rs", "TO_END_A_HANG")),
        ("engine step", seconds("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=")),
        ("prefill leg", deadlines.prefill),
        ("hand-off", deadlines.handoff),
        ("decode leg", deadlines.decode_idle),
        ("KV lease", lease),
        ("half of the KV lease", lease / 2),
        ("heartbeat of a KV lease", lease / 6),
        (
            "release by one engine",
            constant("crates/proxy/src/transfer/cleanup.rs", "RELEASE_DEADLINE"),
        ),
        (
            "abandoned prefill",
            constant("crates/proxy/src/transfer/abandoned.rs", "MOMENT"),
        ),
        (
            "LMCache allocation",
            Duration::from_secs(planned("1p1d", "pd_allocation_timeout_sec: ")),
        ),
        (
            "LMCache lookup",
            Duration::from_millis(planned("1p1d", "lookup_timeout_ms: ")),
        ),
        (
            "overdue notification",
            constant("crates/proxy/src/transfer/cleanup.rs", "OVERDUE"),
        ),
        (
            "notification handshake",
            constant("crates/proxy/src/transfer/notify.rs", "HANDSHAKE_DEADLINE"),
        ),
        (
            "notification frame",
            constant("crates/proxy/src/transfer/notify.rs", "FRAME_DEADLINE"),
        ),
        (
            "idle connection",
            constant("crates/base/src/http1/pool.rs", "IDLE_CONNECTION"),
        ),
        ("canary", constant("src/app/canaries.rs", "VERIFY_DEADLINE")),
        ("start stall", deadlines.start_stall),
        ("start", deadlines.ready),
        ("vLLM's own start limit", seconds("VLLM_ENGINE_READY_TIMEOUT_S=")),
        ("drain", deadlines.drain),
        ("workers' shutdown", seconds("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS=")),
        ("vLLM's shutdown", seconds("--shutdown-timeout ")),
        ("stop", deadlines.stop),
    ])
}

#[test]
fn the_clock_table_matches_the_code() {
    let table = table();
    for (name, value) in code() {
        let row = table.get(name).unwrap_or_else(|| panic!("no row for {name}"));
        assert_eq!(row.default, value, "{name}");
    }
    let not_ours: Vec<_> = table
        .keys()
        .filter(|name| !code().contains_key(name.as_str()))
        .collect();
    assert_eq!(not_ours, ["keep-alive"]);
}

#[test]
fn every_clock_respects_its_lower_bound() {
    let table = table();
    assert!(table.values().any(|clock| !clock.outlives.is_empty()));
    for (name, clock) in &table {
        for sum in &clock.outlives {
            let other: Duration = sum
                .iter()
                .map(|term| table.get(term).unwrap_or_else(|| panic!("{name}: no {term}")).default)
                .sum();
            assert!(clock.default >= other, "{name} is shorter than {}", sum.join(" + "));
        }
    }
}
