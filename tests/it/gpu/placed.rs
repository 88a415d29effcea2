//! After the start: whether engines are where they were planned, one after the other, and whether they give memory back.

use nix::sys::signal::Signal;

use super::{Machine, cards};
use crate::support::{Run, engine, kill_engine, wait_for};

/// Cards on which every worker of an engine holds 30 GiB.
fn with_engines(count: usize, more: &str) -> String {
    format!("{}[engines]\nmib = 30000\n{more}\n", cards(count, ""))
}

fn up<'machine>(machine: &'machine Machine, more: &[&str]) -> Run<'machine> {
    let profile = ["-p", "1p1d", "--set", "restart.backoff=10ms"];
    Run::of(&machine.place, machine.prepared("up", &[&profile, more].concat()))
}

fn log(machine: &Machine) -> String {
    machine.place.log("xpyd.log")
}

/// Where the log says that `whose` memory is back.
fn assert_memory_is_back(log: &str, whose: &str) -> usize {
    let whose = format!(" whose=\"{whose}\"");
    let line = log
        .lines()
        .find(|line| line.contains("GPU memory is back after") && line.ends_with(&whose));
    let line = line.unwrap_or_else(|| panic!("no memory is back{whose}:\n{log}"));
    log.find(line).expect("a line of it")
}

#[test]
fn engines_are_seen_on_their_gpus_and_the_stop_waits_for_their_memory() {
    let machine = Machine::new(&with_engines(2, "lag_ms = 700"));
    let mut run = up(&machine, &[]);
    run.wait_until_ready();
    let shown = log(&machine);
    assert_eq!(shown.matches("NVML shows the engine on its GPUs").count(), 2, "{shown}");
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(!text.contains("warn  gpu"), "{text}");
    let waited = log(&machine);
    assert_memory_is_back(&waited, "the fleet");
}

#[test]
fn memory_that_stays_taken_is_told_with_its_holder_and_a_second_interrupt_ends_the_wait() {
    let machine = Machine::new(&with_engines(2, "lag_ms = 600000"));
    let mut run = up(&machine, &[]);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    let line = run.wait_for_line("waiting for the GPU memory of the fleet");
    assert!(line.contains("30000 MiB of GPU 0, held by pid "), "{line}");
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 7, "{text}");
    assert!(
        text.contains("the teardown is incomplete") && text.contains("30000 MiB of GPU 1"),
        "{text}"
    );
}

#[test]
fn a_restart_waits_for_the_memory_of_the_start_before() {
    let machine = Machine::new(&with_engines(2, "lag_ms = 700"));
    let mut run = up(&machine, &[]);
    run.wait_until_ready();
    kill_engine(&machine.place, "decoder1");
    wait_for("decoder1", || {
        let engine = engine(&machine.place, "decoder1");
        let is_back = engine["state"] == "ready" && engine["incarnation"] == 2;
        if is_back { Ok(()) } else { Err(engine.to_string()) }
    });
    let log = log(&machine);
    let back = assert_memory_is_back(&log, "decoder1");
    let spawned = log.rfind("engine spawned").expect("the start");
    assert!(back < spawned, "{log}");
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}

#[test]
fn an_engine_on_another_gpu_than_planned_fails_its_start() {
    let machine = Machine::new(&with_engines(3, "shift = 1"));
    let (code, text) = up(&machine, &[]).end();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("and was planned on GPU-0000000"), "{text}");
}

#[test]
fn host_pids_leave_the_place_unknown_and_memory_proves_the_end() {
    let machine = Machine::new(&with_engines(2, "pid_offset = 4194305\nlag_ms = 300"));
    let mut run = up(&machine, &[]);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("cannot tell on which GPUs engines run: NVML reports process ids of the host"),
        "{text}"
    );
    assert!(log(&machine).contains("GPU memory is back"), "{}", log(&machine));
}

#[test]
fn engines_that_share_a_gpu_start_one_after_the_other_and_restart_alone() {
    let machine = Machine::new(&with_engines(1, "lag_ms = 300"));
    let mut run = up(&machine, &["--set", "vllm.gpu_memory_utilization=0.4"]);
    run.wait_until_ready();
    let shown = log(&machine);
    let healthy = shown
        .find("engine=prefiller1 incarnation=1 state=healthy")
        .expect("the first is up");
    let spawned = shown.rfind("engine spawned engine=decoder1").expect("the second");
    assert!(healthy < spawned, "{shown}");
    kill_engine(&machine.place, "prefiller1");
    wait_for("prefiller1", || {
        let engine = engine(&machine.place, "prefiller1");
        let is_back = engine["state"] == "ready" && engine["incarnation"] == 2;
        if is_back { Ok(()) } else { Err(engine.to_string()) }
    });
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
}

#[test]
fn engines_that_outlive_xpyd_stay_where_they_are_and_are_measured_by_what_was_before_them() {
    let machine = Machine::new(&with_engines(4, "lag_ms = 300"));
    let keep = ["--set", "deadlines.keep=10m"];
    let mut first = up(&machine, &keep);
    first.wait_until_ready();
    first.signal(Signal::SIGKILL);
    first.end();
    // Their own memory must not make the plan place them elsewhere.
    let mut second = up(&machine, &keep);
    second.wait_for_line("attaching to the engines");
    second.wait_until_ready();
    second.signal(Signal::SIGINT);
    let (code, text) = second.end();
    assert_eq!(code, 0, "{text}");
    assert_memory_is_back(&log(&machine), "the fleet");
}

#[test]
fn without_gpus_no_library_is_loaded_for_a_stop() {
    let machine = Machine::new("fail = \"nvmlInit_v2\"\n");
    let mut command = machine.prepared("up", &["-p", "1p1d", "--engine", "sim", "--set", "sim.preset=instant"]);
    command.env("XPYD_NVML", "/nowhere");
    let mut run = Run::of(&machine.place, command);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(!log(&machine).to_lowercase().contains("gpu"), "{}", log(&machine));
}
