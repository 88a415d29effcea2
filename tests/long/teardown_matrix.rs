//! The teardown matrix: every engine fault, in every phase of a run, under every disruption. Nothing of a run is left.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{MODEL, Run, TestEnv, wait_for};

/// The number of concurrent fleets in one test. They mostly wait.
const WORKERS: usize = 2;

/// A fault of the engines.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Nothing,
    IgnoreSigterm,
    Orphans,
    Stray,
}

const FAULTS: [Fault; 4] = [Fault::Nothing, Fault::IgnoreSigterm, Fault::Orphans, Fault::Stray];

impl Fault {
    fn setting(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::IgnoreSigterm => Some("ignore-sigterm"),
            Self::Orphans => Some("orphans"),
            Self::Stray => Some("stray"),
        }
    }
}

/// The phase of the run at the disruption.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Starting,
    /// The engines are up, and a canary waits for KV that never arrives.
    Verifying,
    Ready,
    Serving,
    Draining,
    /// One of the two engines has failed and is in backoff.
    Backoff,
}

impl Phase {
    /// The faults to test in this phase. How engines handle signals does not depend on the phase.
    fn faults(self) -> &'static [Fault] {
        match self {
            Self::Verifying | Self::Backoff => &[Fault::Nothing, Fault::Stray],
            Self::Starting | Self::Ready | Self::Serving | Self::Draining => &FAULTS,
        }
    }

    fn allows(self, disruption: Disruption) -> bool {
        match self {
            // The simulated engine does not watch `EngineCore` before it serves.
            Self::Starting => disruption != Disruption::Kill(&[Victim::EngineCore]),
            // A second failed engine does not end the run: it is in backoff, too.
            Self::Backoff => !matches!(disruption, Disruption::Kill([Victim::Leader | Victim::EngineCore])),
            _ => true,
        }
    }
}

/// A signal to the run, or the death of some of its processes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Disruption {
    Interrupt,
    TwoInterrupts,
    Terminate,
    /// SIGKILL to all of these processes.
    Kill(&'static [Victim]),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Victim {
    Xpyd,
    Shim,
    Monitor,
    Leader,
    EngineCore,
}

const DISRUPTIONS: [Disruption; 11] = [
    Disruption::Interrupt,
    Disruption::TwoInterrupts,
    Disruption::Terminate,
    Disruption::Kill(&[Victim::Xpyd]),
    Disruption::Kill(&[Victim::Shim]),
    Disruption::Kill(&[Victim::Monitor]),
    Disruption::Kill(&[Victim::Xpyd, Victim::Shim]),
    Disruption::Kill(&[Victim::Xpyd, Victim::Monitor]),
    Disruption::Kill(&[Victim::Shim, Victim::Monitor]),
    Disruption::Kill(&[Victim::Leader]),
    Disruption::Kill(&[Victim::EngineCore]),
];

/// The allowed exit codes of xpyd; -1 if xpyd itself is killed.
fn expected_exit_codes(phase: Phase, disruption: Disruption, fault: Fault) -> &'static [i32] {
    match disruption {
        Disruption::Kill(victims) if victims.contains(&Victim::Xpyd) => &[-1],
        // An engine failure during the stop does not count.
        Disruption::Kill([Victim::Leader | Victim::EngineCore]) if phase == Phase::Draining => &[0],
        Disruption::Kill([Victim::Leader | Victim::EngineCore]) if phase == Phase::Starting => &[4],
        // The waiting canary can fail before the engine has ended.
        Disruption::Kill([Victim::Leader | Victim::EngineCore]) if phase == Phase::Verifying => &[4, 5],
        // The run continues without its shim monitor until it is stopped.
        Disruption::Kill([Victim::Monitor]) => &[0],
        Disruption::Kill(_) => &[1],
        Disruption::Interrupt if phase == Phase::Draining => &[130],
        Disruption::TwoInterrupts if phase == Phase::Draining => &[130],
        Disruption::Interrupt | Disruption::Terminate => &[0],
        Disruption::TwoInterrupts if phase == Phase::Serving || fault == Fault::IgnoreSigterm => &[130],
        // The run can be over before the second signal arrives.
        Disruption::TwoInterrupts => &[0, 130],
    }
}

/// Checks all cells of a phase.
#[expect(clippy::print_stdout, reason = "shows which cell failed if the failure does not")]
fn check_phase(phase: Phase) {
    let faults = phase.faults().iter();
    let mut cells: Vec<(Fault, Disruption)> = faults
        .flat_map(|fault| DISRUPTIONS.iter().map(move |disruption| (*fault, *disruption)))
        .filter(|(_, disruption)| phase.allows(*disruption))
        .collect();
    cells.reverse();
    let cells = Mutex::new(cells);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                // Cells share a test environment, which also asserts that the next `up` works.
                let env = TestEnv::new();
                loop {
                    let cell = cells.lock().expect("no cell failed").pop();
                    let Some((fault, disruption)) = cell else { return };
                    println!("{phase:?} {fault:?} {disruption:?}");
                    check_cell(&env, fault, phase, disruption);
                }
            });
        }
    });
}

#[test]
fn nothing_is_left_of_a_starting_run() {
    check_phase(Phase::Starting);
}

#[test]
fn nothing_is_left_of_a_verifying_run() {
    check_phase(Phase::Verifying);
}

#[test]
fn nothing_is_left_of_a_run_with_an_engine_in_backoff() {
    check_phase(Phase::Backoff);
}

#[test]
fn nothing_is_left_of_a_ready_run() {
    check_phase(Phase::Ready);
}

#[test]
fn nothing_is_left_of_a_serving_run() {
    check_phase(Phase::Serving);
}

#[test]
fn nothing_is_left_of_a_draining_run() {
    check_phase(Phase::Draining);
}

fn check_cell(env: &TestEnv, fault: Fault, phase: Phase, disruption: Disruption) {
    let cell = format!("{phase:?} {fault:?} {disruption:?}");
    let (mut run, stream) = start_in_phase(env, fault, phase, disruption);
    let segments = shared_memory(env);
    assert_eq!(segments.is_empty(), fault != Fault::Stray, "{cell}: {segments:?}");
    disrupt(env, &mut run, disruption);
    if phase != Phase::Draining && disruption == Disruption::Kill(&[Victim::Monitor]) {
        let is_up = |(_, command): &(i32, String)| command.contains(" up ");
        assert!(env.processes().iter().any(is_up), "{cell}");
        run.signal(Signal::SIGINT);
    }
    if phase == Phase::Draining {
        // The client disconnects. Otherwise a run that lost the other engine would rightly wait for this request.
        drop(stream);
    }
    let (code, text) = run.end();
    assert!(
        expected_exit_codes(phase, disruption, fault).contains(&code),
        "{cell}: {code}\n{text}"
    );
    // When xpyd reports that nothing is left, that must be true. Only if xpyd was killed can the cleanup take longer.
    if code < 0 {
        env.wait_until_empty();
        // The kernel closes the sockets of a process last.
        wait_for("no listener", || {
            env.listener().map_or(Ok(()), |port| Err(port.to_string()))
        });
    }
    assert_eq!(env.processes(), [], "{cell}");
    env.assert_no_listener();
    for segment in segments {
        assert!(!segment.exists(), "{cell}: {} is left\n{text}", segment.display());
    }
    assert_eq!(env.run(&["status"]).status.code(), Some(8), "{cell}");
}

/// Starts a fleet, and waits until it is in the phase.
fn start_in_phase(env: &TestEnv, fault: Fault, phase: Phase, disruption: Disruption) -> (Run<'_>, Option<TcpStream>) {
    let mut faults: Vec<&str> = fault.setting().into_iter().collect();
    faults.push(match phase {
        Phase::Starting => "slow-start=60s",
        Phase::Verifying => "drop-notification",
        Phase::Ready | Phase::Serving | Phase::Draining | Phase::Backoff => "stall-decode=9",
    });
    let faults = format!("sim.faults={faults:?}");
    // A run that waits for a second signal needs time for it.
    let drain = match (phase, disruption) {
        (Phase::Draining, _) | (_, Disruption::TwoInterrupts) => "deadlines.drain=60s",
        _ => "deadlines.drain=100ms",
    };
    let stop = match (phase, disruption) {
        (Phase::Ready, Disruption::TwoInterrupts) => "deadlines.stop=60s",
        _ => "deadlines.stop=300ms",
    };
    // Without this, a killed engine restarts and the run continues. Other tests check restarts.
    let policy = match phase {
        Phase::Backoff => "restart.backoff=60s",
        _ => "restart.policy=never",
    };
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--set",
        &faults,
        "--set",
        drain,
        "--set",
        stop,
        "--set",
        policy,
        "--set",
        "deadlines.handoff=60s",
    ]);
    if phase == Phase::Starting {
        let per_engine = if fault == Fault::Stray { 4 } else { 3 };
        wait_for("all processes", || match env.processes().len() {
            count if count == 3 + 2 * per_engine => Ok(()),
            _ => Err(format!("{:#?}", env.processes())),
        });
        return (run, None);
    }
    if phase == Phase::Verifying {
        wait_for("the canary", || {
            let output = env.run(&["status", "--json"]);
            let status = String::from_utf8_lossy(&output.stdout).into_owned();
            let is_verifying =
                status.contains("\"stage\": \"verifying\"") || status.contains("\"stage\":\"verifying\"");
            if is_verifying { Ok(()) } else { Err(status) }
        });
        return (run, None);
    }
    run.wait_until_ready();
    if phase == Phase::Backoff {
        disrupt(env, &mut run, Disruption::Kill(&[Victim::Leader]));
        run.wait_for_line(" failed");
        return (run, None);
    }
    if phase == Phase::Ready {
        return (run, None);
    }
    let stream = open_stream(env.proxy_port());
    if phase == Phase::Draining {
        run.signal(Signal::SIGTERM);
        run.wait_for_line("draining: 1");
    }
    (run, Some(stream))
}

/// Starts an endless streamed completion.
fn open_stream(port: u16) -> TcpStream {
    let body = format!(
        "{{\"model\":\"{MODEL}\",\"prompt\":\"a b c\",\"max_tokens\":500,\"ignore_eos\":true,\"stream\":true}}"
    );
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the proxy listens");
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("the proxy reads");
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    while !String::from_utf8_lossy(&seen).contains("data:") {
        let count = stream.read(&mut buffer).expect("an answer");
        assert!(count > 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
    stream
}

fn disrupt(env: &TestEnv, run: &mut Run<'_>, disruption: Disruption) {
    match disruption {
        Disruption::Interrupt => run.signal(Signal::SIGINT),
        Disruption::Terminate => run.signal(Signal::SIGTERM),
        Disruption::TwoInterrupts => {
            run.signal(Signal::SIGINT);
            run.wait_for_line("press Ctrl+C again to force");
            // The test has not reaped the process, so its id is not reused even if it has ended.
            run.signal(Signal::SIGINT);
        }
        Disruption::Kill(victims) => {
            let processes = env.processes();
            let pids: Vec<i32> = victims.iter().map(|victim| victim.find(&processes)).collect();
            for pid in pids {
                // The death of an earlier victim can have ended this one already.
                let killed = kill(Pid::from_raw(pid), Signal::SIGKILL);
                assert!(matches!(killed, Ok(()) | Err(Errno::ESRCH)), "{killed:?}");
            }
        }
    }
}

impl Victim {
    /// The process id of the victim among the processes of a test environment.
    pub(crate) fn find(self, processes: &[(i32, String)]) -> i32 {
        let is_monitor = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "xpyd-monitor")
        };
        let found = processes.iter().find(|(pid, command)| match self {
            Self::Xpyd => command.contains(" up "),
            Self::Shim => command.contains(" shim") && !is_monitor(pid),
            Self::Monitor => is_monitor(pid),
            Self::Leader => command.contains(" sim ") && command.contains("--port"),
            Self::EngineCore => command.contains("VLLM::EngineCore"),
        });
        found.unwrap_or_else(|| panic!("no {self:?} in {processes:#?}")).0
    }
}

/// The files in `/dev/shm` that processes of the test environment hold open.
fn shared_memory(env: &TestEnv) -> Vec<PathBuf> {
    let held_by = |pid: i32| {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        entries.filter_map(|entry| std::fs::read_link(entry.path()).ok())
    };
    let all = env.processes().into_iter().flat_map(|(pid, _)| held_by(pid));
    all.filter(|path| path.starts_with("/dev/shm")).collect()
}
