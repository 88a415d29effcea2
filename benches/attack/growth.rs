//! Time and memory of one request by its size. Superlinear cost lets clients stop a server.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::Findings;
use crate::answers::{self, ANSWERS};
use crate::fuzz::recording_engine;
use crate::http::{Failure, exchange, get};
use crate::options::Options;
use crate::proxy_fixture::{ProxyFixture, null_engine};
use crate::shapes::SHAPES;
use crate::usage;

/// The smallest request. Each further one is 16 times as large, up to `--max`.
const SMALLEST: usize = 1 << 10;
const STEP: usize = 16;

/// Time after which a request counts as stopping the server.
const DEADLINE: Duration = Duration::from_mins(1);

/// Shortest CPU time for an estimate of growth.
const NOISE: Duration = Duration::from_millis(5);

/// Linear work has an exponent of 1, a square has 2. Caches, the allocator and a sort add a little to 1.
const WORST_EXPONENT: f64 = 1.35;

/// The cost of one request.
#[derive(Debug)]
pub(crate) struct GrowthRow {
    pub(crate) bytes: usize,
    pub(crate) result: Result<u16, Failure>,
    time: Duration,
    /// The same request to the engine itself.
    direct: Duration,
    cpu: Duration,
    /// The slowest answer of `/health` during the request.
    health: Duration,
    /// Peak resident memory of xpyd in KiB during the request.
    memory: u64,
}

/// The rows of one shape, by size.
pub(crate) struct Growth {
    pub(crate) name: &'static str,
    pub(crate) rows: Vec<GrowthRow>,
}

pub(crate) async fn run(options: &Options) -> Findings {
    let mut findings = Findings::new();
    for growth in measure(options).await {
        if let Some(exponent) = growth.exponent().filter(|exponent| *exponent > WORST_EXPONENT) {
            findings.push(format!(
                "{}: time grows with the {exponent:.1}th power of the size",
                growth.name
            ));
        }
        for row in &growth.rows {
            if let Err(failure) = row.result {
                findings.push(format!("{} of {} bytes: {failure:?}", growth.name, row.bytes));
            }
        }
    }
    findings
}

/// A family of requests, by size.
struct Case {
    name: &'static str,
    make: Box<dyn Fn(usize) -> Vec<u8>>,
}

/// Measures all selected shapes and prints each row when it is ready.
pub(crate) async fn measure(options: &Options) -> Vec<Growth> {
    println!("`direct` is the engine alone; CPU is that of xpyd; `health` is the slowest answer of /health meanwhile");
    println!(
        "{:<30}{:>10}{:>12}{:>12}{:>12}{:>12}{:>12}{:>10}",
        "shape", "bytes", "status", "ms", "direct ms", "CPU ms", "health ms", "RSS MiB"
    );
    let requests = SHAPES.iter().map(|shape| Case {
        name: shape.name,
        make: Box::new(shape.make),
    });
    let answers = ANSWERS.iter().map(|answer| Case {
        name: answer.name,
        make: Box::new(|size| answers::request(answer.name, size)),
    });
    let mut all = measure_cases(options, requests, null_engine).await;
    let recording = |port| recording_engine(port, 1, Duration::ZERO);
    all.extend(measure_cases(options, answers, recording).await);
    all
}

async fn measure_cases(
    options: &Options,
    cases: impl Iterator<Item = Case>,
    engine: impl Fn(u16) -> Command,
) -> Vec<Growth> {
    let folder = TempDir::new().expect("a folder");
    let mut proxy_fixture = ProxyFixture::start(folder.path(), &engine).await.expect("a proxy");
    let mut all = Vec::new();
    for case in cases.filter(|case| options.wants(case.name)) {
        let mut growth = Growth {
            name: case.name,
            rows: Vec::new(),
        };
        let sizes = std::iter::successors(Some(SMALLEST), |size| Some(size * STEP));
        for size in sizes.map(|size| size.min(options.max)) {
            let row = one(&proxy_fixture, &case, size).await;
            row.print(case.name);
            let is_hung = row.result == Err(Failure::Deadline) || row.health >= DEADLINE;
            growth.rows.push(row);
            if is_hung {
                // The proxy can be busy for hours. Larger requests would show nothing more.
                proxy_fixture = ProxyFixture::start(folder.path(), &engine).await.expect("a proxy");
            }
            if is_hung || size >= options.max {
                break;
            }
        }
        if let Some(exponent) = growth.exponent() {
            println!("{:<30}{:>10} {exponent:.2}", case.name, "exponent");
        }
        all.push(growth);
    }
    all
}

async fn one(proxy_fixture: &ProxyFixture, case: &Case, size: usize) -> GrowthRow {
    let request = (case.make)(size);
    let begun = Instant::now();
    // Only the time matters: the engine's own limits are not xpyd's.
    let _ = exchange(proxy_fixture.decode, &request, DEADLINE).await;
    let direct = begun.elapsed();

    usage::reset_peak_memory(proxy_fixture.pid());
    let cpu = usage::cpu(proxy_fixture.pid());
    let slowest = AtomicU64::new(0);
    let begun = Instant::now();
    let result = tokio::select! {
        result = exchange(proxy_fixture.port, &request, DEADLINE) => result,
        () = ask_health(proxy_fixture.port, &slowest) => unreachable!("it asks forever"),
    };
    let time = begun.elapsed();
    // This is slow if the server is still busy with a request.
    let last = Instant::now();
    let _ = get(proxy_fixture.port, "/health", DEADLINE).await;
    GrowthRow {
        // Either the request or its answer is large.
        bytes: request.len().max(if request.len() < SMALLEST { size } else { 0 }),
        result: result.map(|response| response.status),
        time,
        direct,
        cpu: usage::cpu(proxy_fixture.pid()).saturating_sub(cpu),
        health: Duration::from_micros(slowest.load(Ordering::Relaxed)).max(last.elapsed()),
        memory: usage::peak_memory(proxy_fixture.pid()),
    }
}

/// Polls `/health` and keeps the longest time in microseconds.
async fn ask_health(port: u16, slowest: &AtomicU64) {
    loop {
        let begun = Instant::now();
        let _ = get(port, "/health", DEADLINE).await;
        let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        slowest.fetch_max(micros, Ordering::Relaxed);
        sleep(Duration::from_millis(5)).await;
    }
}

impl Growth {
    /// The exponent of CPU time over size, at its highest between two sizes.
    fn exponent(&self) -> Option<f64> {
        let rows: Vec<&GrowthRow> = self.rows.iter().filter(|row| row.cpu > NOISE).collect();
        let exponents = rows.windows(2).filter_map(|pair| {
            let [small, large] = pair else { return None };
            let time = large.cpu.as_secs_f64() / small.cpu.as_secs_f64();
            Some(time.ln() / (large.bytes as f64 / small.bytes as f64).ln())
        });
        exponents.max_by(f64::total_cmp)
    }
}

impl GrowthRow {
    fn print(&self, name: &str) {
        let status = match self.result {
            Ok(status) => status.to_string(),
            Err(Failure::Deadline) => format!("> {} s", DEADLINE.as_secs()),
            Err(Failure::Refused) => "refused".to_owned(),
            Err(Failure::NoAnswer(_)) => "no answer".to_owned(),
        };
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        println!(
            "{name:<30}{:>10}{status:>12}{:>12.1}{:>12.1}{:>12.1}{:>12.1}{:>10.1}",
            self.bytes,
            millis(self.time),
            millis(self.direct),
            millis(self.cpu),
            millis(self.health),
            self.memory as f64 / 1024.0
        );
    }
}
