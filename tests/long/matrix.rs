//! Every fault in every phase under every signal: whatever is killed or asked to stop, nothing of a run is left.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Place, Run, wait_for};

const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Fleets that are up at the same time in one test; they mostly wait.
const WORKERS: usize = 2;

/// What is wrong with the engines.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Nothing,
    IgnoreSigterm,
    Orphans,
    Stray,
}

const FAULTS: [Fault; 4] = [Fault::Nothing, Fault::IgnoreSigterm, Fault::Orphans, Fault::Stray];

impl Fault {
    fn knob(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::IgnoreSigterm => Some("ignore-sigterm"),
            Self::Orphans => Some("orphans"),
            Self::Stray => Some("stray"),
        }
    }
}

/// How far the run is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Starting,
    /// Engines are up, and a canary waits for KV that never comes.
    Verifying,
    Ready,
    Serving,
    Draining,
    /// One of the two engines has failed and waits for its next start.
    Backoff,
}

impl Phase {
    /// What can be wrong in it. What engines themselves do with signals does not change with every phase.
    fn faults(self) -> &'static [Fault] {
        match self {
            Self::Verifying | Self::Backoff => &[Fault::Nothing, Fault::Stray],
            Self::Starting | Self::Ready | Self::Serving | Self::Draining => &FAULTS,
        }
    }

    fn has(self, blow: Blow) -> bool {
        match self {
            // The simulated engine does not look at `EngineCore` before it serves.
            Self::Starting => blow != Blow::Kill(&[Victim::EngineCore]),
            // An engine that fails as well is no end: it waits for its next start, too.
            Self::Backoff => !matches!(blow, Blow::Kill([Victim::Leader | Victim::EngineCore])),
            _ => true,
        }
    }
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Blow {
    Interrupt,
    TwoInterrupts,
    Terminate,
    /// SIGKILL to all of these.
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

const BLOWS: [Blow; 11] = [
    Blow::Interrupt,
    Blow::TwoInterrupts,
    Blow::Terminate,
    Blow::Kill(&[Victim::Xpyd]),
    Blow::Kill(&[Victim::Shim]),
    Blow::Kill(&[Victim::Monitor]),
    Blow::Kill(&[Victim::Xpyd, Victim::Shim]),
    Blow::Kill(&[Victim::Xpyd, Victim::Monitor]),
    Blow::Kill(&[Victim::Shim, Victim::Monitor]),
    Blow::Kill(&[Victim::Leader]),
    Blow::Kill(&[Victim::EngineCore]),
];

/// The exit codes that are right, where xpyd lives to give one.
fn expected(phase: Phase, blow: Blow, fault: Fault) -> &'static [i32] {
    match blow {
        Blow::Kill(victims) if victims.contains(&Victim::Xpyd) => &[-1],
        // An engine that fails while the run is ending is no news.
        Blow::Kill([Victim::Leader | Victim::EngineCore]) if phase == Phase::Draining => &[0],
        Blow::Kill([Victim::Leader | Victim::EngineCore]) if phase == Phase::Starting => &[4],
        // The canary that waits for the engine may fail before the engine has ended.
        Blow::Kill([Victim::Leader | Victim::EngineCore]) if phase == Phase::Verifying => &[4, 5],
        // The run goes on without its monitor, until it is asked to end.
        Blow::Kill([Victim::Monitor]) => &[0],
        Blow::Kill(_) => &[1],
        Blow::Interrupt if phase == Phase::Draining => &[130],
        Blow::TwoInterrupts if phase == Phase::Draining => &[130],
        Blow::Interrupt | Blow::Terminate => &[0],
        Blow::TwoInterrupts if phase == Phase::Serving || fault == Fault::IgnoreSigterm => &[130],
        // The run may be over before the second one comes.
        Blow::TwoInterrupts => &[0, 130],
    }
}

/// Goes through all cells of a phase.
#[expect(clippy::print_stdout, reason = "tells which cell failed where the failure does not")]
fn all_of(phase: Phase) {
    let faults = phase.faults().iter();
    let mut cells: Vec<(Fault, Blow)> = faults
        .flat_map(|fault| BLOWS.iter().map(move |blow| (*fault, *blow)))
        .filter(|(_, blow)| phase.has(*blow))
        .collect();
    cells.reverse();
    let cells = Mutex::new(cells);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                // One place for many cells: that the next `up` works is part of what is asserted.
                let place = Place::new();
                loop {
                    let cell = cells.lock().expect("no cell failed").pop();
                    let Some((fault, blow)) = cell else { return };
                    println!("{phase:?} {fault:?} {blow:?}");
                    play(&place, fault, phase, blow);
                }
            });
        }
    });
}

#[test]
fn nothing_is_left_of_a_run_that_is_starting() {
    all_of(Phase::Starting);
}

#[test]
fn nothing_is_left_of_a_run_that_is_being_verified() {
    all_of(Phase::Verifying);
}

#[test]
fn nothing_is_left_of_a_run_with_an_engine_that_waits_for_its_next_start() {
    all_of(Phase::Backoff);
}

#[test]
fn nothing_is_left_of_a_run_that_is_ready() {
    all_of(Phase::Ready);
}

#[test]
fn nothing_is_left_of_a_run_that_serves_a_stream() {
    all_of(Phase::Serving);
}

#[test]
fn nothing_is_left_of_a_run_that_is_draining() {
    all_of(Phase::Draining);
}

fn play(place: &Place, fault: Fault, phase: Phase, blow: Blow) {
    let cell = format!("{phase:?} {fault:?} {blow:?}");
    let (mut run, stream) = reach(place, fault, phase, blow);
    let segments = shared_memory(place);
    assert_eq!(segments.is_empty(), fault != Fault::Stray, "{cell}: {segments:?}");
    strike(place, &mut run, blow);
    if phase != Phase::Draining && blow == Blow::Kill(&[Victim::Monitor]) {
        let is_up = |(_, command): &(i32, String)| command.contains(" up ");
        assert!(place.processes().iter().any(is_up), "{cell}");
        run.signal(Signal::SIGINT);
    }
    if phase == Phase::Draining {
        // Its client leaves; otherwise a run that lost the other engine would rightly wait for this request.
        drop(stream);
    }
    let (code, text) = run.end();
    assert!(expected(phase, blow, fault).contains(&code), "{cell}: {code}\n{text}");
    // What xpyd says must be true when it has said it; only without it the rest may take its time.
    if code < 0 {
        place.wait_until_empty();
        // The kernel closes sockets last.
        wait_for("no listener", || {
            place.listener().map_or(Ok(()), |port| Err(port.to_string()))
        });
    }
    assert_eq!(place.processes(), [], "{cell}");
    place.assert_no_listener();
    for segment in segments {
        assert!(!segment.exists(), "{cell}: {} is left\n{text}", segment.display());
    }
    assert_eq!(place.run(&["status"]).status.code(), Some(8), "{cell}");
}

/// Starts a fleet and brings it to the phase.
fn reach(place: &Place, fault: Fault, phase: Phase, blow: Blow) -> (Run<'_>, Option<TcpStream>) {
    let mut faults: Vec<&str> = fault.knob().into_iter().collect();
    faults.push(match phase {
        Phase::Starting => "slow-start=60s",
        Phase::Verifying => "drop-notification",
        Phase::Ready | Phase::Serving | Phase::Draining | Phase::Backoff => "stall-decode=9",
    });
    let faults = format!("sim.faults={faults:?}");
    // Who waits for a second signal must have the time for it.
    let drain = match (phase, blow) {
        (Phase::Draining, _) | (_, Blow::TwoInterrupts) => "deadlines.drain=60s",
        _ => "deadlines.drain=100ms",
    };
    let stop = match (phase, blow) {
        (Phase::Ready, Blow::TwoInterrupts) => "deadlines.stop=60s",
        _ => "deadlines.stop=300ms",
    };
    // A killed engine would come back, and the run with it; tests of restarts are elsewhere.
    let policy = match phase {
        Phase::Backoff => "restart.backoff=60s",
        _ => "restart.policy=never",
    };
    let mut run = place.up(&[
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
        wait_for("all processes", || match place.processes().len() {
            count if count == 3 + 2 * per_engine => Ok(()),
            _ => Err(format!("{:#?}", place.processes())),
        });
        return (run, None);
    }
    if phase == Phase::Verifying {
        wait_for("the canary", || {
            let output = place.run(&["status", "--json"]);
            let status = String::from_utf8_lossy(&output.stdout).into_owned();
            let is_verifying =
                status.contains("\"stage\": \"verifying\"") || status.contains("\"stage\":\"verifying\"");
            if is_verifying { Ok(()) } else { Err(status) }
        });
        return (run, None);
    }
    run.wait_until_ready();
    if phase == Phase::Backoff {
        strike(place, &mut run, Blow::Kill(&[Victim::Leader]));
        run.wait_for_line(" failed");
        return (run, None);
    }
    if phase == Phase::Ready {
        return (run, None);
    }
    let stream = open_stream(place.proxy_port());
    if phase == Phase::Draining {
        run.signal(Signal::SIGTERM);
        run.wait_for_line("draining: 1");
    }
    (run, Some(stream))
}

/// A completion that has begun to stream and does not end.
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

fn strike(place: &Place, run: &mut Run<'_>, blow: Blow) {
    match blow {
        Blow::Interrupt => run.signal(Signal::SIGINT),
        Blow::Terminate => run.signal(Signal::SIGTERM),
        Blow::TwoInterrupts => {
            run.signal(Signal::SIGINT);
            run.wait_for_line("press Ctrl+C again to force");
            // It has not been waited for, so its id is its own even if it has ended.
            run.signal(Signal::SIGINT);
        }
        Blow::Kill(victims) => {
            let processes = place.processes();
            let pids: Vec<i32> = victims.iter().map(|victim| victim.find(&processes)).collect();
            for pid in pids {
                // The death of the one before may have ended this one already.
                let killed = kill(Pid::from_raw(pid), Signal::SIGKILL);
                assert!(matches!(killed, Ok(()) | Err(Errno::ESRCH)), "{killed:?}");
            }
        }
    }
}

impl Victim {
    /// Its process id among these of a place.
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

/// The files in `/dev/shm` that processes of the place hold.
fn shared_memory(place: &Place) -> Vec<PathBuf> {
    let held_by = |pid: i32| {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        entries.filter_map(|entry| std::fs::read_link(entry.path()).ok())
    };
    let all = place.processes().into_iter().flat_map(|(pid, _)| held_by(pid));
    all.filter(|path| path.starts_with("/dev/shm")).collect()
}
