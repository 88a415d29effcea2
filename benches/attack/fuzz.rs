//! Hostile input over raw sockets: xpyd answers, stays small, and forwards nothing malformed or forbidden.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::Findings;
use crate::client::{ClientBehaviour, RequestOutcome, TestRequest, ask};
use crate::engine::{self, ENGINE};
use crate::http::{Response, connect};
use crate::inputs::{CLASSES, input};
use crate::options::Options;
use crate::proxy_fixture::ProxyFixture;
use crate::{aftermath, usage};

/// Number of inputs between two honest requests.
const CANARY: u64 = 50;

/// Far longer than an honest client waits on a busy machine.
const DEADLINE: Duration = Duration::from_mins(1);

/// Time after which an input counts as waiting or slow. Both are only numbers in the table.
const SILENCE: Duration = Duration::from_secs(1);

/// Time to wait for further answers, such as one to a request hidden in another.
const MORE: Duration = Duration::from_millis(100);

/// Allowed remains after the attack: memory in MiB, which the allocator keeps, and idle connections to engines.
const MEMORY: f64 = 64.0;
const DESCRIPTORS: usize = 600;

/// First answers by class.
type AnswerTable = BTreeMap<&'static str, BTreeMap<String, u64>>;

#[derive(Default)]
struct Shared {
    next: AtomicU64,
    bytes: AtomicU64,
    table: Mutex<AnswerTable>,
    failed_canaries: Mutex<Vec<String>>,
}

/// The command of a recording engine.
pub(crate) fn recording_engine(port: u16, events: usize, interval: Duration) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args([
        ENGINE,
        &port.to_string(),
        &events.to_string(),
        &interval.as_millis().to_string(),
    ]);
    command
}

pub(crate) async fn run(options: &Options) -> Findings {
    let folder = TempDir::new().expect("a folder");
    let proxy_fixture = ProxyFixture::start(folder.path(), |port| recording_engine(port, 8, Duration::ZERO)).await;
    let proxy_fixture = match proxy_fixture {
        Ok(proxy_fixture) => proxy_fixture,
        Err(reason) => return vec![reason],
    };
    let before = (
        usage::memory(proxy_fixture.pid()),
        usage::descriptors(proxy_fixture.pid()),
    );
    let shared = Arc::new(Shared::default());
    let mut workers = JoinSet::new();
    for _ in 0..options.clients {
        workers.spawn(work(Arc::clone(&shared), proxy_fixture.port, options.clone()));
    }
    while workers.join_next().await.is_some() {}
    let mut findings = lock(&shared.failed_canaries).clone();
    print(
        &lock(&shared.table),
        options.count,
        shared.bytes.load(Ordering::Relaxed),
    );
    findings.extend(aftermath::idle(proxy_fixture.port).await);
    findings.extend(what_is_left(&proxy_fixture, before));
    for (role, port) in [("prefill", proxy_fixture.prefill), ("decode", proxy_fixture.decode)] {
        match engine::seen(port).await {
            Ok(seen) => {
                println!("requests at the {role} engine: {}", seen.requests);
                findings.extend(seen.violations.into_iter().map(|(what, (count, example))| {
                    format!("{count} requests at the {role} engine have {what}, such as {example}")
                }));
            }
            Err(reason) => findings.push(reason),
        }
    }
    findings
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn work(shared: Arc<Shared>, port: u16, options: Options) {
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        if number >= options.count {
            return;
        }
        let (class, bytes) = input(options.seed, number);
        shared.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let result = shoot(port, &bytes, number.is_multiple_of(4)).await;
        *lock(&shared.table).entry(class).or_default().entry(result).or_default() += 1;
        if number.is_multiple_of(CANARY)
            && let Some(outcome) = canary(port, number).await
        {
            let text = format!(
                "after input {number} of seed {}, an honest client got {outcome:?}",
                options.seed
            );
            lock(&shared.failed_canaries).push(text);
        }
    }
}

/// The outcome of an honest client, unless it is correct.
async fn canary(port: u16, number: u64) -> Option<RequestOutcome> {
    let prompt = format!("canary {number}");
    let test_request = TestRequest {
        model: "m".to_owned(),
        answer: engine::answer(&prompt, 4),
        prompt,
        tokens: 4,
    };
    let outcome = ask(port, &test_request, ClientBehaviour::Stream, DEADLINE).await;
    (outcome != RequestOutcome::Right).then_some(outcome)
}

/// Sends the bytes, optionally in two parts. Returns the first status and the state of the connection.
async fn shoot(port: u16, bytes: &[u8], in_two: bool) -> String {
    let Ok(Ok(mut stream)) = timeout(DEADLINE, connect(port)).await else {
        return "no connection".to_owned();
    };
    let (mut reader, mut writer) = stream.split();
    let send = async {
        let (first, second) = bytes.split_at(if in_two { bytes.len() / 2 } else { bytes.len() });
        let _ = writer.write_all(first).await;
        if !second.is_empty() {
            sleep(Duration::from_millis(2)).await;
            let _ = writer.write_all(second).await;
        }
        std::future::pending::<()>().await;
    };
    let mut received = Vec::new();
    let read = async {
        loop {
            let silence = if received.is_empty() { SILENCE } else { MORE };
            match timeout(silence, reader.read_buf(&mut received)).await {
                Err(_) => return "open",
                Ok(Ok(0)) => return "closed",
                Ok(Ok(_)) => {}
                Ok(Err(_)) => return "reset",
            }
        }
    };
    let end = tokio::select! {
        () = send => unreachable!("sending never ends"),
        end = read => end,
    };
    match Response::parse(&received) {
        Some((response, _)) => response.status.to_string(),
        None if received.is_empty() && end == "open" => "waits".to_owned(),
        None => format!("{end} without an answer"),
    }
}

fn print(table: &AnswerTable, count: u64, bytes: u64) {
    println!("{count} inputs, {:.1} MB; first answers by class:", bytes as f64 / 1e6);
    for (class, _) in CLASSES {
        let mut results: Vec<(&String, &u64)> = table.get(class).into_iter().flatten().collect();
        results.sort_by_key(|(_, times)| std::cmp::Reverse(**times));
        let words: Vec<String> = results
            .iter()
            .map(|(result, times)| format!("{result} {times}"))
            .collect();
        println!("  {class:<26}{}", words.join(", "));
    }
}

/// Memory and descriptors that xpyd has not released.
fn what_is_left(proxy_fixture: &ProxyFixture, before: (u64, usize)) -> Findings {
    let (memory, descriptors) = (
        usage::memory(proxy_fixture.pid()),
        usage::descriptors(proxy_fixture.pid()),
    );
    let mebibytes = |kibibytes: u64| kibibytes as f64 / 1024.0;
    println!(
        "RSS of xpyd {:.1} -> {:.1} MiB, peak {:.1} MiB; descriptors {} -> {descriptors}",
        mebibytes(before.0),
        mebibytes(memory),
        mebibytes(usage::peak_memory(proxy_fixture.pid())),
        before.1
    );
    let mut findings = Findings::new();
    if memory == 0 {
        findings.push("xpyd has ended".to_owned());
    }
    if mebibytes(memory) - mebibytes(before.0) > MEMORY {
        findings.push(format!(
            "xpyd keeps {:.1} MiB more than before",
            mebibytes(memory - before.0)
        ));
    }
    if descriptors > before.1 + DESCRIPTORS {
        findings.push(format!(
            "xpyd keeps {} descriptors more than before",
            descriptors - before.1
        ));
    }
    findings
}
