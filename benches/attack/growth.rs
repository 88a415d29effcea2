//! Time and memory that one request costs xpyd, over its size. What grows faster than the request is a way to stop a server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::Findings;
use crate::http::{Failure, exchange, get};
use crate::options::Options;
use crate::shapes::{SHAPES, Shape};
use crate::stand::{Stand, null_engine};
use crate::usage;

/// The smallest request. Each further one is 16 times as large, up to `--max`.
const SMALLEST: usize = 1 << 10;
const STEP: usize = 16;

/// A request that takes longer stops the server.
const DEADLINE: Duration = Duration::from_mins(1);

/// Less processor time than this says nothing about growth.
const NOISE: Duration = Duration::from_millis(5);

/// Linear work has an exponent of 1. Caches and the allocator add a little, a sort adds more; a square has 2.
const WORST_EXPONENT: f64 = 1.35;

/// What one request cost.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) bytes: usize,
    pub(crate) result: Result<u16, Failure>,
    time: Duration,
    /// The same request to the engine itself.
    direct: Duration,
    cpu: Duration,
    /// The slowest answer of `/health` meanwhile.
    health: Duration,
    /// Resident memory of xpyd in KiB, the most during the request.
    memory: u64,
}

/// The rows of one shape, by size.
pub(crate) struct Growth {
    pub(crate) name: &'static str,
    pub(crate) rows: Vec<Row>,
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

/// Measures every wanted shape, and prints each row as soon as it is known.
pub(crate) async fn measure(options: &Options) -> Vec<Growth> {
    println!("`direct` is the engine alone; CPU is that of xpyd; `health` is the slowest answer of /health meanwhile");
    println!(
        "{:<28}{:>10}{:>14}{:>12}{:>12}{:>12}{:>12}{:>10}",
        "shape", "bytes", "status", "ms", "direct ms", "CPU ms", "health ms", "RSS MiB"
    );
    let folder = TempDir::new().expect("a folder");
    let mut stand = Stand::start(folder.path(), null_engine).await.expect("a proxy");
    let mut all = Vec::new();
    for shape in SHAPES.iter().filter(|shape| options.wants(shape.name)) {
        let mut growth = Growth {
            name: shape.name,
            rows: Vec::new(),
        };
        let sizes = std::iter::successors(Some(SMALLEST), |size| Some(size * STEP));
        for size in sizes.map(|size| size.min(options.max)) {
            let row = one(&stand, shape, size).await;
            row.print(shape.name);
            let is_hung = row.result == Err(Failure::Deadline) || row.health >= DEADLINE;
            growth.rows.push(row);
            if is_hung {
                // The proxy may be busy for hours. Larger requests would tell nothing more.
                stand = Stand::start(folder.path(), null_engine).await.expect("a proxy");
            }
            if is_hung || size >= options.max {
                break;
            }
        }
        if let Some(exponent) = growth.exponent() {
            println!("{:<28}{:>10} {exponent:.2}", shape.name, "exponent");
        }
        all.push(growth);
    }
    all
}

async fn one(stand: &Stand, shape: &Shape, size: usize) -> Row {
    let request = (shape.make)(size);
    let begun = Instant::now();
    // Only the time counts: the engine's own limits are not xpyd's.
    let _ = exchange(stand.decode, &request, DEADLINE).await;
    let direct = begun.elapsed();

    usage::reset_peak_memory(stand.pid());
    let cpu = usage::cpu(stand.pid());
    let slowest = AtomicU64::new(0);
    let begun = Instant::now();
    let result = tokio::select! {
        result = exchange(stand.port, &request, DEADLINE) => result,
        () = ask_health(stand.port, &slowest) => unreachable!("it asks forever"),
    };
    let time = begun.elapsed();
    // A request that the server is still busy with makes this one slow.
    let last = Instant::now();
    let _ = get(stand.port, "/health", DEADLINE).await;
    Row {
        bytes: request.len(),
        result: result.map(|response| response.status),
        time,
        direct,
        cpu: usage::cpu(stand.pid()).saturating_sub(cpu),
        health: Duration::from_micros(slowest.load(Ordering::Relaxed)).max(last.elapsed()),
        memory: usage::peak_memory(stand.pid()),
    }
}

/// Asks `/health` again and again, and keeps the longest time in microseconds.
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
    /// The power of the size with which processor time grows: the slope of both logarithms, by least squares.
    fn exponent(&self) -> Option<f64> {
        let points: Vec<(f64, f64)> = self
            .rows
            .iter()
            .filter(|row| row.cpu > NOISE)
            .map(|row| ((row.bytes as f64).ln(), row.cpu.as_secs_f64().ln()))
            .collect();
        if points.len() < 2 {
            return None;
        }
        let count = points.len() as f64;
        let (x, y) = points
            .iter()
            .fold((0.0, 0.0), |(x, y), point| (x + point.0, y + point.1));
        let (x, y) = (x / count, y / count);
        let above: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
        let below: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
        Some(above / below)
    }
}

impl Row {
    fn print(&self, name: &str) {
        let status = match self.result {
            Ok(status) => status.to_string(),
            Err(Failure::Deadline) => format!("> {} s", DEADLINE.as_secs()),
            Err(Failure::Refused) => "refused".to_owned(),
            Err(Failure::NoAnswer(_)) => "no answer".to_owned(),
        };
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        println!(
            "{name:<28}{:>10}{status:>14}{:>12.1}{:>12.1}{:>12.1}{:>12.1}{:>10.1}",
            self.bytes,
            millis(self.time),
            millis(self.direct),
            millis(self.cpu),
            millis(self.health),
            self.memory as f64 / 1024.0
        );
    }
}
