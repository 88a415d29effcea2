//! A steady load over a long time: memory and descriptors of xpyd and its engines must not keep growing.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::options::Options;
use crate::storm::{Clients, StormContext, start};
use crate::{Findings, aftermath, usage};

/// Rows of the table.
const ROWS: u32 = 20;

/// Growth between two quarters that is still noise: 10 % plus 4 MiB, and the descriptors of idle connections.
const MEMORY_PERCENT: u64 = 10;
const MEMORY_KIB: u64 = 4096;
const DESCRIPTORS: usize = 64;

/// The resources of one process at one time.
#[derive(Debug, Clone)]
struct Sample {
    name: String,
    memory: u64,
    descriptors: usize,
}

pub(crate) async fn run(options: &Options) -> Findings {
    let (context, questions, _reference) = match start(options).await {
        Ok(started) => started,
        Err(reason) => return vec![reason],
    };
    let clients = Clients::start(&context, &questions, options);
    let rows = sample(&context, options.duration).await;
    clients.stop(&context).await;
    let mut findings = context.report();
    findings.extend(growth(&rows));
    findings.extend(aftermath::check(&context, &questions, options.keep.as_deref()).await);
    findings
}

/// A row of samples for every twentieth of the time, printed as it comes.
async fn sample(context: &Arc<StormContext>, duration: Duration) -> Vec<Vec<Sample>> {
    let begun = Instant::now();
    let mut rows = Vec::new();
    for number in 1..=ROWS {
        sleep((duration * number / ROWS).saturating_sub(begun.elapsed())).await;
        let blocking = Arc::clone(context);
        let row = tokio::task::spawn_blocking(move || processes(&blocking))
            .await
            .unwrap_or_default();
        let words: Vec<String> = row
            .iter()
            .map(|sample| {
                format!(
                    "{} {:.1} MiB {} fds",
                    sample.name,
                    sample.memory as f64 / 1024.0,
                    sample.descriptors
                )
            })
            .collect();
        println!("{:>7.1} s  {}", begun.elapsed().as_secs_f64(), words.join("  "));
        rows.push(row);
    }
    rows
}

fn processes(context: &StormContext) -> Vec<Sample> {
    let xpyd = context.fleet.xpyd().map(|pid| ("xpyd".to_owned(), pid));
    let engines = context.fleet.engines().into_iter().filter_map(|engine| {
        let pid = u32::try_from(engine.leader?).ok()?;
        Some((engine.name, pid))
    });
    xpyd.into_iter()
        .chain(engines)
        .map(|(name, pid)| Sample {
            name,
            memory: usage::memory(pid),
            descriptors: usage::descriptors(pid),
        })
        .collect()
}

/// Compares the second quarter with the last one. The first quarter warms caches up.
fn growth(rows: &[Vec<Sample>]) -> Findings {
    let quarter = rows.len() / 4;
    let (Some(early), Some(late)) = (rows.get(quarter..2 * quarter), rows.get(3 * quarter..)) else {
        return Findings::new();
    };
    let names = late.first().into_iter().flatten().map(|sample| sample.name.clone());
    let most = |rows: &[Vec<Sample>], name: &str| {
        let samples = rows.iter().flatten().filter(|sample| sample.name == name);
        samples.fold((0, 0), |(memory, descriptors), sample| {
            (sample.memory.max(memory), sample.descriptors.max(descriptors))
        })
    };
    let mut findings = Findings::new();
    for name in names {
        let (before, after) = (most(early, &name), most(late, &name));
        if after.0 > before.0 + (before.0 * MEMORY_PERCENT / 100).max(MEMORY_KIB) {
            findings.push(format!("{name} grows: {} -> {} KiB", before.0, after.0));
        }
        if after.1 > before.1 + DESCRIPTORS {
            findings.push(format!("{name} grows: {} -> {} descriptors", before.1, after.1));
        }
    }
    findings
}
