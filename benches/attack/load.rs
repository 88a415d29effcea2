//! Many concurrent streams through `xpyd proxy`: every text is correct, memory per stream is small, descriptors are
//! released.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::client::{ClientBehaviour, TestRequest, ask};
use crate::engine::{self, answer};
use crate::fuzz::recording_engine;
use crate::options::Options;
use crate::outcomes::{CutCause, OutcomeCounts};
use crate::proxy_fixture::ProxyFixture;
use crate::{Findings, aftermath, usage};

/// Time that a client waits beyond the length of a stream.
const PATIENCE: Duration = Duration::from_mins(2);

/// Connections to engines that are allowed to stay open and idle.
const IDLE_CONNECTIONS: usize = 600;

/// Streams that are started every second, fewer than a listener's queue holds.
const STARTS: usize = 1000;

pub(crate) async fn run(options: &Options) -> Findings {
    let folder = TempDir::new().expect("a folder");
    let proxy_fixture = ProxyFixture::start(folder.path(), |port| {
        recording_engine(port, options.events, options.interval)
    })
    .await;
    let proxy_fixture = match proxy_fixture {
        Ok(proxy_fixture) => proxy_fixture,
        Err(reason) => return vec![reason],
    };
    let before = (
        usage::memory(proxy_fixture.pid()),
        usage::descriptors(proxy_fixture.pid()),
        usage::cpu(proxy_fixture.pid()),
    );
    let begun = Instant::now();
    let outcomes = Arc::new(Mutex::new(OutcomeCounts::default()));
    let open = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for number in 0..options.clients {
        clients.spawn(client(
            Arc::clone(&outcomes),
            Arc::clone(&open),
            proxy_fixture.port,
            number,
            options.clone(),
        ));
    }
    let mut peak = (0, before.0, before.1);
    while !clients.is_empty() {
        sleep(Duration::from_millis(200)).await;
        while clients.try_join_next().is_some() {}
        peak.0 = peak.0.max(open.load(Ordering::Relaxed));
        peak.1 = peak.1.max(usage::memory(proxy_fixture.pid()));
        peak.2 = peak.2.max(usage::descriptors(proxy_fixture.pid()));
    }
    let outcomes = std::mem::take(&mut *outcomes.lock().unwrap_or_else(PoisonError::into_inner));
    outcomes.print();
    let mut findings = outcomes.findings();
    let sent = options.clients as u64;
    if outcomes.right != sent {
        findings.push(format!("{} of {sent} answers are right", outcomes.right));
    }
    findings.extend(aftermath::idle(proxy_fixture.port).await);
    println!(
        "at once {}; RSS of xpyd {:.1} -> {:.1} MiB, {:.1} KiB a stream; CPU {:.1} s of {:.1} s",
        peak.0,
        before.0 as f64 / 1024.0,
        peak.1 as f64 / 1024.0,
        peak.1.saturating_sub(before.0) as f64 / peak.0.max(1) as f64,
        usage::cpu(proxy_fixture.pid()).saturating_sub(before.2).as_secs_f64(),
        begun.elapsed().as_secs_f64(),
    );
    let descriptors = usage::descriptors(proxy_fixture.pid());
    println!("descriptors {} -> {} -> {descriptors}", before.1, peak.2);
    if descriptors > before.1 + IDLE_CONNECTIONS {
        findings.push(format!("xpyd keeps {} descriptors", descriptors - before.1));
    }
    match engine::seen(proxy_fixture.decode).await {
        Ok(seen) if seen.crossed > 0 => findings.push(format!("{} hand-offs of another prompt", seen.crossed)),
        Ok(_) => {}
        Err(reason) => findings.push(reason),
    }
    findings
}

async fn client(
    outcomes: Arc<Mutex<OutcomeCounts>>,
    open: Arc<AtomicUsize>,
    port: u16,
    number: usize,
    options: Options,
) {
    // All at once would overflow the listener's queue, which is the kernel's.
    sleep(Duration::from_secs_f64(number as f64 / STARTS as f64)).await;
    let prompt = format!("{} {number} {}", options.seed, "word ".repeat(number % 50));
    let test_request = TestRequest {
        model: "m".to_owned(),
        answer: answer(&prompt, options.events),
        prompt,
        tokens: options.events,
    };
    let life = options.interval * u32::try_from(options.events).unwrap_or(u32::MAX);
    let begun = Instant::now();
    open.fetch_add(1, Ordering::Relaxed);
    let outcome = ask(port, &test_request, ClientBehaviour::Stream, life + PATIENCE).await;
    open.fetch_sub(1, Ordering::Relaxed);
    let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
    outcomes.add(&outcome, CutCause::Other("load"), begun.elapsed().as_secs_f64());
}
