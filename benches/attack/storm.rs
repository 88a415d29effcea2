//! Faults under load: a seeded storm against a fleet of simulated engines. Every answer is compared with the correct
//! one.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::Findings;
use crate::aftermath;
use crate::client::{ClientBehaviour, RequestOutcome, TestRequest, answer_of, ask};
use crate::commands;
use crate::faults::{FAULTS, Fault, FaultError, Needs};
use crate::fleet::{Fleet, MODEL, Reference};
use crate::options::Options;
use crate::outcomes::{CutCause, OutcomeCounts};
use crate::private;

/// Tokens of every answer. At 5 ms each, an engine can die in between.
const TOKENS: usize = 60;

/// A request that takes longer hangs.
const HANG: Duration = Duration::from_mins(1);

/// Sizes of the private file systems, in MiB.
const SHARED_MEMORY: u32 = 64;
const LOGS: u32 = 24;

/// Most bytes of the diary.
const DIARY: usize = 4 << 20;

/// The state that the faults and clients of a storm share.
pub(crate) struct StormContext {
    pub(crate) fleet: Fleet,
    begun: Instant,
    is_over: AtomicBool,
    last_fault: Mutex<&'static str>,
    /// Number of times that xpyd was killed or left its engines. Counted at the start and at the end of its absence.
    kills: AtomicU64,
    leaves: AtomicU64,
    /// Objects to drop at a given time, such as a held connection.
    holds: Mutex<Vec<(Instant, Box<dyn Any + Send>)>>,
    no_long_freeze_before: Mutex<Instant>,
    outcomes: Mutex<OutcomeCounts>,
    /// The event log, one event per line.
    diary: Mutex<String>,
}

/// Counts the end of an absence of xpyd when it is dropped.
pub(crate) struct Absence<'context>(&'context AtomicU64);

impl Drop for Absence<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StormContext {
    fn new(fleet: Fleet) -> Self {
        Self {
            fleet,
            begun: Instant::now(),
            is_over: AtomicBool::new(false),
            last_fault: Mutex::new("no fault yet"),
            kills: AtomicU64::new(0),
            leaves: AtomicU64::new(0),
            holds: Mutex::default(),
            no_long_freeze_before: Mutex::new(Instant::now()),
            outcomes: Mutex::default(),
            diary: Mutex::default(),
        }
    }

    /// Keeps an object until its time.
    pub(crate) fn hold(&self, what: impl Any + Send, time: Duration) {
        lock(&self.holds).push((Instant::now() + time, Box::new(what)));
    }

    fn release(&self, is_due: impl Fn(Instant) -> bool) {
        lock(&self.holds).retain(|(end, _)| !is_due(*end));
    }

    /// Whether a long freeze is allowed now. The next one is allowed after this time.
    pub(crate) fn may_freeze_long(&self, time: Duration) -> bool {
        let mut before = lock(&self.no_long_freeze_before);
        let is_allowed = Instant::now() >= *before;
        if is_allowed {
            *before = Instant::now() + time;
        }
        is_allowed
    }

    pub(crate) fn xpyd_is_killed(&self) -> Absence<'_> {
        self.kills.fetch_add(1, Ordering::SeqCst);
        Absence(&self.kills)
    }

    pub(crate) fn xpyd_leaves(&self) -> Absence<'_> {
        self.leaves.fetch_add(1, Ordering::SeqCst);
        Absence(&self.leaves)
    }

    /// Starts the next xpyd. A first failure is an error even if a later attempt succeeds.
    pub(crate) fn up(&self) -> Result<(), String> {
        let Err(reason) = self.fleet.up() else {
            return Ok(());
        };
        for _ in 0..3 {
            commands::pause(Duration::from_secs(1));
            if self.fleet.up().is_ok() {
                return Err(format!("{reason} (a later `xpyd up` succeeded)"));
            }
        }
        self.fleet.run(&["down", "--force"]);
        match self.fleet.up() {
            Ok(()) => Err(format!("fleet lost: {reason}")),
            Err(again) => Err(format!("fleet lost: {reason}; and after `xpyd down`: {again}")),
        }
    }

    fn write_down(&self, what: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        // Thousands of lines about refused connections would hide the rest.
        let mut diary = lock(&self.diary);
        if diary.len() < DIARY {
            *diary += &format!("{seconds:8.2} s  {what}\n");
        }
    }

    /// Copies the logs of all runs, and the diary.
    pub(crate) fn keep(&self, folder: &Path) -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("storm.log"), &*lock(&self.diary))?;
        for run in fs::read_dir(self.fleet.folder().join("logs"))?.flatten() {
            // `latest` is a link to one of them.
            if !run.file_type()?.is_dir() {
                continue;
            }
            let to = folder.join(run.file_name());
            fs::create_dir_all(&to)?;
            for file in fs::read_dir(run.path())?.flatten() {
                fs::copy(file.path(), to.join(file.file_name()))?;
            }
        }
        Ok(())
    }

    /// Prints the outcomes of requests and returns the forbidden ones.
    pub(crate) fn report(&self) -> Findings {
        let outcomes = lock(&self.outcomes);
        outcomes.print();
        outcomes.findings()
    }

    fn absences(&self) -> (u64, u64) {
        (self.kills.load(Ordering::SeqCst), self.leaves.load(Ordering::SeqCst))
    }

    /// The possible cause of a broken request that started at `before`.
    fn cause(&self, before: (u64, u64)) -> CutCause {
        let now = self.absences();
        // An odd number means that xpyd is not running.
        let happened = |before: u64, now: u64| now != before || now % 2 == 1;
        if happened(before.0, now.0) {
            CutCause::KillOfXpyd
        } else if happened(before.1, now.1) {
            CutCause::LeavingXpyd
        } else {
            CutCause::Other(*lock(&self.last_fault))
        }
    }
}

pub(crate) async fn run(options: &Options) -> Findings {
    if options.private && !private::is_entered() {
        private::enter();
        println!("no private mount namespace, which takes root: no full disk, no full /dev/shm");
    }
    match start(options).await {
        Ok((context, test_requests, reference)) => {
            let findings = rage(options, &context, &test_requests).await;
            drop(reference);
            findings
        }
        Err(reason) => vec![reason],
    }
}

/// Starts the fleet, and gets the correct answers from a single engine.
pub(crate) async fn start(options: &Options) -> Result<(Arc<StormContext>, Arc<Vec<TestRequest>>, Reference), String> {
    let fleet = Fleet::new(&options.connector, &options.settings).map_err(|error| error.to_string())?;
    if private::is_entered() {
        private::mount("/dev/shm".as_ref(), SHARED_MEMORY)?;
        private::mount(&fleet.folder().join("logs"), LOGS)?;
    }
    let reference = Reference::start(fleet.folder()).await?;
    let mut test_requests = Vec::new();
    for (number, words) in [1, 40, 400, 900, 1500, 4000].into_iter().enumerate() {
        let mut test_request = TestRequest {
            model: MODEL.to_owned(),
            prompt: format!("{} {number} {}", options.seed, "word ".repeat(words)),
            tokens: TOKENS,
            answer: String::new(),
        };
        test_request.answer = answer_of(reference.port, &test_request, HANG).await?;
        test_requests.push(test_request);
    }
    let fleet = tokio::task::spawn_blocking(move || fleet.up().map(|()| fleet))
        .await
        .map_err(|error| error.to_string())??;
    Ok((Arc::new(StormContext::new(fleet)), Arc::new(test_requests), reference))
}

/// Runs clients and faults for the given time, and then the checks.
async fn rage(options: &Options, context: &Arc<StormContext>, test_requests: &Arc<Vec<TestRequest>>) -> Findings {
    let clients = Clients::start(context, test_requests, options);
    let (striker, strike_options) = (Arc::clone(context), options.clone());
    let strikes = tokio::task::spawn_blocking(move || strike(&striker, &strike_options)).await;
    clients.stop(context).await;
    let mut findings = strikes.unwrap_or_else(|error| vec![error.to_string()]);
    findings.extend(context.report());
    let aftermath = aftermath::check(context, test_requests, options.keep.as_deref());
    findings.extend(aftermath.await);
    findings
}

/// Clients that send one request after the other.
pub(crate) struct Clients(JoinSet<()>);

impl Clients {
    pub(crate) fn start(context: &Arc<StormContext>, test_requests: &Arc<Vec<TestRequest>>, options: &Options) -> Self {
        let mut clients = JoinSet::new();
        for number in 0..options.clients as u64 {
            let random = StdRng::seed_from_u64(options.seed.wrapping_mul(1_000_003) + number);
            clients.spawn(client(Arc::clone(context), Arc::clone(test_requests), random));
        }
        clients.spawn(release_in_time(Arc::clone(context)));
        Self(clients)
    }

    /// Waits for the last answers and drops held objects.
    pub(crate) async fn stop(mut self, context: &StormContext) {
        context.is_over.store(true, Ordering::Relaxed);
        while self.0.join_next().await.is_some() {}
        context.release(|_| true);
    }
}

/// Drops held objects whose time is over, also while a fault waits for a command.
async fn release_in_time(context: Arc<StormContext>) {
    while !context.is_over.load(Ordering::Relaxed) {
        let now = Instant::now();
        context.release(|end| now >= end);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Sends requests until the storm is over.
async fn client(context: Arc<StormContext>, test_requests: Arc<Vec<TestRequest>>, mut random: StdRng) {
    while !context.is_over.load(Ordering::Relaxed) {
        let test_request = test_requests.choose(&mut random).expect("test requests");
        let behaviour = match random.random_range(0..100) {
            0..20 => ClientBehaviour::Whole,
            20..30 => ClientBehaviour::Leave(Duration::from_millis(random.random_range(0..800))),
            30..35 => ClientBehaviour::Slow,
            _ => ClientBehaviour::Stream,
        };
        let before = context.absences();
        let outcome = ask(context.fleet.proxy_port(), test_request, behaviour, HANG).await;
        let cause = context.cause(before);
        lock(&context.outcomes).add(&outcome, cause, context.begun.elapsed().as_secs_f64());
        if !matches!(
            outcome,
            RequestOutcome::Right | RequestOutcome::Left | RequestOutcome::Refused | RequestOutcome::Status { .. }
        ) {
            context.write_down(&format!(
                "{behaviour:?} of {} bytes: {outcome:?}",
                test_request.prompt.len()
            ));
        }
        if !matches!(outcome, RequestOutcome::Right | RequestOutcome::Left) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Runs one fault after the other, and prints how often each occurred.
fn strike(context: &StormContext, options: &Options) -> Findings {
    let mut random = StdRng::seed_from_u64(options.seed);
    let faults: Vec<&Fault> = FAULTS.iter().filter(|fault| is_possible(fault, options)).collect();
    let mut counts: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    let mut findings = Findings::new();
    let mut refusals = BTreeMap::new();
    while context.begun.elapsed() < options.duration
        && counts.values().map(|(times, _)| times).sum::<u32>() < options.most
    {
        let Ok(fault) = faults.choose_weighted(&mut random, |fault| fault.weight) else {
            return vec!["no fault is chosen".to_owned()];
        };
        *lock(&context.last_fault) = fault.name;
        let at = context.begun.elapsed().as_secs();
        let count = counts.entry(fault.name).or_default();
        count.0 += 1;
        context.write_down(&format!("fault: {}", fault.name));
        let result = (fault.act)(context, &mut random);
        context.write_down(&format!("       {}: {result:?}", fault.name));
        match result {
            Ok(()) => {}
            Err(FaultError::Impossible(reason)) => {
                count.1 += 1;
                refusals.insert(fault.name, reason);
            }
            Err(FaultError::Broken(reason)) => findings.push(format!("at {at} s, {}: {reason}", fault.name)),
        }
        // Sometimes the next fault hits a fleet that has not recovered.
        let is_patient = random.random_range(0..3) > 0;
        pause(
            context,
            Duration::from_secs_f64(random.random_range(0.5..3.0)),
            is_patient,
        );
        if let Err(reason) = context.fleet.status() {
            findings.push(format!("at {at} s, no run after {}: {reason}", fault.name));
            if let Err(reason) = context.up() {
                findings.push(reason);
            }
        }
    }
    print_faults(&counts, &refusals);
    findings
}

fn is_possible(fault: &Fault, options: &Options) -> bool {
    let is_possible = match fault.needs {
        Needs::Nothing => true,
        Needs::Namespace => private::is_entered(),
        Needs::Connector(name) => name == options.connector,
    };
    is_possible && options.wants(fault.name)
}

/// A patient pause lasts until the fleet has recovered, within a limit.
fn pause(context: &StormContext, time: Duration, is_patient: bool) {
    const PATIENCE: Duration = Duration::from_secs(20);
    let begun = Instant::now();
    loop {
        let is_whole = || context.fleet.wait_until_whole(Duration::ZERO).is_ok();
        if begun.elapsed() >= time && (!is_patient || begun.elapsed() >= PATIENCE || is_whole()) {
            return;
        }
        commands::pause(Duration::from_millis(100));
    }
}

fn print_faults(counts: &BTreeMap<&str, (u32, u32)>, refusals: &BTreeMap<&str, String>) {
    let all: u32 = counts.values().map(|(times, _)| times).sum();
    println!("{:<44}{all}", "faults");
    for (name, (times, impossible)) in counts {
        let note = match refusals.get(name) {
            Some(reason) => format!(", {impossible} times impossible, such as: {reason}"),
            None => String::new(),
        };
        println!("  {times:>8}  {name}{note}");
    }
}

/// Files in `/dev/shm`, where only this storm's are there.
pub(crate) fn shared_memory() -> Vec<String> {
    if !private::is_entered() {
        return Vec::new();
    }
    let files = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    files
        .map(|file| file.file_name().to_string_lossy().into_owned())
        .collect()
}
