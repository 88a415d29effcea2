//! Whole runs of the supervisor over engines that answer HTTP and leave worker processes behind.
//!
//! The engine is this test program itself, started again with the name of one test.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use xpyd::fleet::{Endpoint, EngineId, EngineState, FleetStage, FleetView, LogLimits, Role};
use xpyd::plan::{EngineSpec, Liveness, PortUse, RestartPolicy, RestartWhen};
use xpyd::report::ExitStatus;
use xpyd::signals::StopSignal;
use xpyd::supervisor::{
    self, CanaryResult, CanaryRound, Diagnose, EndReason, FailureCause, HookFuture, Hooks, Keep, Outcome, Request,
    Settings, Wiring,
};

use super::processes::{MARK, marked, read};
use crate::support::DEADLINE;

const PORT: &str = "XPYD_TEST_PORT";

/// Not a test: the engine of the tests below. It answers every request with 200, and exits with code 0 on `/die`, as vLLM
/// does after a crash.
#[test]
#[ignore = "run by other tests"]
fn fake_engine() {
    let Ok(port) = std::env::var(PORT) else { return };
    let listener = TcpListener::bind(("127.0.0.1", port.parse().unwrap())).unwrap();
    for connection in listener.incoming() {
        let mut connection = connection.unwrap();
        let mut request = [0; 4096];
        let count = connection.read(&mut request).unwrap_or(0);
        if request[..count].starts_with(b"GET /die") {
            return;
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        // A disconnected client does not end the engine.
        drop(connection.write_all(answer));
    }
}

/// Canaries all have the same result; no log is read and no GPU is checked.
struct TestHooks {
    canary: Result<(), String>,
}

impl Hooks for TestHooks {
    fn run_canaries(&self, round: CanaryRound) -> HookFuture<Vec<CanaryResult>> {
        let result = self.canary.clone();
        let result = result.map_or_else(CanaryResult::Failed, |()| CanaryResult::Worked);
        Box::pin(std::future::ready(vec![result; round.pairs.len()]))
    }

    fn hand_over_clients(&self) -> HookFuture<()> {
        Box::pin(std::future::ready(()))
    }

    fn diagnosis_of_start(&self, _: &EngineSpec) -> Diagnose {
        Arc::new(|_| FailureCause::default())
    }
}

/// A run in the background, and what a test needs to watch and end it.
struct Run {
    tasks: JoinSet<Outcome>,
    view: watch::Receiver<Arc<FleetView>>,
    signals: mpsc::Sender<StopSignal>,
    requests: mpsc::Sender<Request>,
    engines: Vec<EngineSpec>,
    folder: TempDir,
    mark: String,
}

impl Run {
    /// Starts these engines. The shell of each engine runs `prelude` before the server.
    fn start(names: &[&str], prelude: &str, canary: Result<(), String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().to_string_lossy().into_owned();
        // Another test can take a free port before it is reserved.
        let (engines, reservations) = (0..20)
            .find_map(|_| {
                let engines: Vec<EngineSpec> = names.iter().map(|name| engine(name, prelude, &mark)).collect();
                let reservations = supervisor::reserve(&engines).ok()?;
                Some((engines, reservations))
            })
            .expect("free ports");
        let (view_sender, view) = watch::channel(Arc::new(supervisor::initial_view(&engines)));
        let (signals, signal_receiver) = mpsc::channel(1);
        let (requests, request_receiver) = mpsc::channel(1);
        let settings = Settings {
            keep: Keep {
                socket: folder.path().join("attach.sock"),
                wait: Duration::ZERO,
                run_dir: folder.path().to_owned(),
            },
            attach: None,
            listener: None,
            reservations,
            engines: engines.clone(),
            run_dir: folder.path().to_owned(),
            drain_deadline: DEADLINE,
            verify_deadline: DEADLINE,
            restart: RestartPolicy {
                policy: RestartWhen::Never,
                max_restarts: 0,
                backoff: Duration::ZERO,
                max_backoff: Duration::ZERO,
                stable_after: DEADLINE,
            },
            run_name: "test".to_owned(),
            program: env!("CARGO_BIN_EXE_xpyd").into(),
        };
        let wiring = Wiring {
            signals: signal_receiver,
            requests: request_receiver,
            view: view_sender,
            hooks: TestHooks { canary },
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(supervisor::run(settings, wiring));
        Self {
            tasks,
            view,
            signals,
            requests,
            engines,
            folder,
            mark,
        }
    }

    async fn ready(names: &[&str], prelude: &str) -> Self {
        let mut run = Self::start(names, prelude, Ok(()));
        run.until(|view| view.stage == FleetStage::Ready).await;
        run
    }

    async fn until(&mut self, condition: impl FnMut(&Arc<FleetView>) -> bool) -> Arc<FleetView> {
        let view = timeout(DEADLINE, self.view.wait_for(condition)).await;
        Arc::clone(&view.expect("the view in time").expect("the run continues"))
    }

    /// Waits for the end of the run, and checks that no process and no listener is left.
    async fn outcome(mut self) -> Outcome {
        let outcome = timeout(DEADLINE, self.tasks.join_next()).await;
        let outcome = outcome.expect("an end in time").unwrap().unwrap();
        assert_eq!(marked(&self.mark), []);
        assert_eq!(outcome.left, []);
        for engine in &self.engines {
            assert!(TcpStream::connect(("127.0.0.1", engine.endpoint.port)).is_err());
        }
        assert_eq!(self.view.borrow().stage, FleetStage::Stopped);
        outcome
    }

    fn die(&self, name: &str) {
        let engine = self.engines.iter().find(|engine| engine.id.as_str() == name).unwrap();
        let mut connection = TcpStream::connect(("127.0.0.1", engine.endpoint.port)).unwrap();
        connection.write_all(b"GET /die HTTP/1.1\r\n\r\n").unwrap();
    }
}

fn engine(name: &str, prelude: &str, mark: &str) -> EngineSpec {
    // Dropping the listener frees the port, and the run reserves it right after.
    let port = TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let program = std::env::current_exe().unwrap();
    let server = "supervisor::fleet::fake_engine --exact --ignored --nocapture";
    // The worker survives its leader.
    let script = format!("{prelude}\nsleep 1000 &\nexec {} {server}", program.display());
    EngineSpec {
        node: None,
        id: EngineId::named(name),
        role: if name.starts_with("prefiller") {
            Role::Prefill
        } else {
            Role::Decode
        },
        argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
        env: BTreeMap::from([
            (PORT.to_owned(), port.to_string()),
            (MARK.to_owned(), mark.to_owned()),
            ("HF_TOKEN".to_owned(), "hf_swordfish".to_owned()),
        ]),
        gpus: Vec::new(),
        gpu_uuids: Vec::new(),
        endpoint: Endpoint {
            host: "127.0.0.1".to_owned(),
            port,
            tensor_parallel: 1,
            receiver: None,
        },
        ports: vec![PortUse {
            port,
            purpose: "http".to_owned(),
        }],
        ready_path: "/health".to_owned(),
        ready_deadline: DEADLINE,
        start_stall: DEADLINE,
        stop_grace: Duration::from_secs(30),
        log_file: format!("{name}.log").into(),
        liveness: Liveness {
            path: "/metrics".to_owned(),
            running: "running".to_owned(),
            counters: Vec::new(),
            stall: DEADLINE,
            expired_leases: String::new(),
            late_reads: String::new(),
        },
        file: None,
        log_limits: LogLimits::default(),
    }
}

#[tokio::test]
async fn a_fleet_starts_drains_and_leaves_nothing() {
    let mut run = Run::ready(&["prefiller1", "decoder1"], "").await;
    let load = Arc::clone(&run.view.borrow().engines[1].load);
    let in_flight = load.try_enter().expect("open while ready");
    let (reply, answer) = oneshot::channel();
    run.requests.send(Request::Stop { force: false, reply }).await.unwrap();
    let view = run.until(|view| view.stage == FleetStage::Draining).await;
    assert!(view.engines.iter().all(|engine| engine.state == EngineState::Draining));
    assert!(!load.is_closed(), "the request in flight continues");
    drop(in_flight);
    let answer = timeout(DEADLINE, answer).await.unwrap().unwrap();
    let record = read(&run.folder.path().join("decoder1.spawn.json"));
    assert!(record.contains("\"pid\"") && !record.contains("swordfish"), "{record}");
    let outcome = run.outcome().await;
    assert_eq!(outcome, answer);
    assert_eq!(outcome.exit_status(), ExitStatus::Success);
}

#[tokio::test]
async fn an_engine_exit_while_starting_ends_the_run() {
    let run = Run::start(&["prefiller1", "decoder1"], "sleep 1000 & exit 0", Ok(()));
    let outcome = run.outcome().await;
    assert!(
        outcome.reason.to_string().contains("exited with code 0 while starting"),
        "{outcome:?}"
    );
    assert_eq!(outcome.exit_status(), ExitStatus::EngineFailed);
}

#[tokio::test]
async fn a_canary_that_fails_ends_the_run() {
    let run = Run::start(&["prefiller1", "decoder1"], "", Err("no KV moved".to_owned()));
    let outcome = run.outcome().await;
    assert_eq!(outcome.reason.to_string(), "no KV moved");
    assert_eq!(outcome.exit_status(), ExitStatus::NotReady);
}

#[tokio::test]
async fn the_fleet_serves_until_a_role_is_lost() {
    let mut run = Run::ready(&["prefiller1", "decoder1", "decoder2"], "").await;
    run.die("decoder1");
    let failed = |view: &Arc<FleetView>| view.engines[1].state == EngineState::Failed;
    let view = run.until(failed).await;
    assert_eq!(view.stage, FleetStage::Ready);
    assert!(view.engines[1].load.is_closed());
    assert!(view.engines[1].reason.as_ref().unwrap().contains("exited with code 0"));
    run.die("decoder2");
    let outcome = run.outcome().await;
    assert!(
        matches!(outcome.reason, EndReason::LostRole { role: Role::Decode, .. }),
        "{outcome:?}"
    );
    assert_eq!(outcome.exit_status(), ExitStatus::Failure);
}

#[tokio::test]
async fn two_interrupts_kill_engines_that_ignore_sigterm() {
    let mut run = Run::ready(&["prefiller1", "decoder1"], "trap '' TERM").await;
    run.signals.send(StopSignal::Interrupt).await.unwrap();
    run.until(|view| view.stage == FleetStage::Stopping).await;
    run.signals.send(StopSignal::Interrupt).await.unwrap();
    assert_eq!(run.outcome().await.exit_status(), ExitStatus::Forced);
}

#[tokio::test]
async fn a_wrapper_that_forwards_no_signal_leaves_nothing() {
    let program = std::env::current_exe().unwrap();
    let wrapper = format!(
        "trap 'exit 0' TERM; {} supervisor::fleet::fake_engine --exact --ignored --nocapture & wait; exit 1",
        program.display()
    );
    let run = Run::ready(&["prefiller1", "decoder1"], &wrapper).await;
    run.signals.send(StopSignal::Terminate).await.unwrap();
    assert_eq!(run.outcome().await.exit_status(), ExitStatus::Success);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_starting_engines() {
    let mut run = Run::start(&["prefiller1", "decoder1"], "trap '' TERM; sleep 1000", Ok(()));
    run.until(|view| view.engines.iter().all(|engine| engine.pid.is_some()))
        .await;
    run.signals.send(StopSignal::Terminate).await.unwrap();
    assert_eq!(run.outcome().await.exit_status(), ExitStatus::Success);
}

#[tokio::test]
async fn a_killed_shim_ends_the_run_and_leaves_nothing() {
    let run = Run::ready(&["prefiller1", "decoder1"], "").await;
    let leader = run.view.borrow().engines[0].pid.unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{leader}/stat")).unwrap();
    let shim = stat.split_whitespace().nth(3).unwrap().parse().unwrap();
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    let outcome = run.outcome().await;
    assert!(
        matches!(outcome.reason, EndReason::SupervisionLost { .. }),
        "{outcome:?}"
    );
    assert_eq!(outcome.exit_status(), ExitStatus::Failure);
}
