//! Hostile input over raw sockets: xpyd answers, stays small, and passes on nothing that is malformed or forbidden.

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
use crate::client::{Ending, Manner, Question, ask};
use crate::engine::{self, ENGINE};
use crate::http::{Response, connect};
use crate::inputs::{CLASSES, input};
use crate::options::Options;
use crate::stand::Stand;
use crate::{aftermath, usage};

/// Every so many inputs, an honest client asks.
const CANARY: u64 = 50;

/// Far longer than an honest client waits on a busy machine.
const DEADLINE: Duration = Duration::from_mins(1);

/// An input without an answer for so long waits for more bytes, or is answered slowly. Both are only numbers of the table.
const SILENCE: Duration = Duration::from_secs(1);

/// How long further answers are waited for, such as one to a request that is hidden in another.
const MORE: Duration = Duration::from_millis(100);

/// What may stay after the attack: memory in MiB, which the allocator keeps, and idle connections to engines.
const MEMORY: f64 = 64.0;
const DESCRIPTORS: usize = 600;

/// First answers by class.
type Table = BTreeMap<&'static str, BTreeMap<String, u64>>;

#[derive(Default)]
struct Shared {
    next: AtomicU64,
    bytes: AtomicU64,
    table: Mutex<Table>,
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
    let stand = Stand::start(folder.path(), |port| recording_engine(port, 8, Duration::ZERO)).await;
    let stand = match stand {
        Ok(stand) => stand,
        Err(reason) => return vec![reason],
    };
    let before = (usage::memory(stand.pid()), usage::descriptors(stand.pid()));
    let shared = Arc::new(Shared::default());
    let mut workers = JoinSet::new();
    for _ in 0..options.clients {
        workers.spawn(work(Arc::clone(&shared), stand.port, options.clone()));
    }
    while workers.join_next().await.is_some() {}
    let mut findings = lock(&shared.failed_canaries).clone();
    print(
        &lock(&shared.table),
        options.count,
        shared.bytes.load(Ordering::Relaxed),
    );
    findings.extend(aftermath::idle(stand.port).await);
    findings.extend(what_is_left(&stand, before));
    for (role, port) in [("prefill", stand.prefill), ("decode", stand.decode)] {
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
            && let Some(ending) = canary(port, number).await
        {
            let text = format!(
                "after input {number} of seed {}, an honest client got {ending:?}",
                options.seed
            );
            lock(&shared.failed_canaries).push(text);
        }
    }
}

/// The ending of an honest client, unless it is right.
async fn canary(port: u16, number: u64) -> Option<Ending> {
    let prompt = format!("canary {number}");
    let question = Question {
        model: "m".to_owned(),
        answer: engine::answer(&prompt, 4),
        prompt,
        tokens: 4,
    };
    let ending = ask(port, &question, Manner::Stream, DEADLINE).await;
    (ending != Ending::Right).then_some(ending)
}

/// Sends the bytes, in two pieces on request, and returns the first status and what became of the connection.
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

fn print(table: &Table, count: u64, bytes: u64) {
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

/// Memory and descriptors that xpyd has not given back.
fn what_is_left(stand: &Stand, before: (u64, usize)) -> Findings {
    let (memory, descriptors) = (usage::memory(stand.pid()), usage::descriptors(stand.pid()));
    let mebibytes = |kibibytes: u64| kibibytes as f64 / 1024.0;
    println!(
        "RSS of xpyd {:.1} -> {:.1} MiB, peak {:.1} MiB; descriptors {} -> {descriptors}",
        mebibytes(before.0),
        mebibytes(memory),
        mebibytes(usage::peak_memory(stand.pid())),
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
