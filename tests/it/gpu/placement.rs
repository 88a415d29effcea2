//! Running engines: whether NVML shows them on their planned GPUs, start one at a time, and release their memory.

use nix::sys::signal::Signal;

use super::machine::{Machine, cards};
use crate::support::{Run, engine, kill_engine, wait_for};

/// GPUs on which every worker of an engine uses 30 GiB.
fn with_engines(count: usize, more: &str) -> String {
    format!("{}[engines]\nmib = 30000\n{more}\n", cards(count, ""))
}

fn up<'machine>(machine: &'machine Machine, more: &[&str]) -> Run<'machine> {
    let profile = ["-p", "1p1d", "--set", "restart.backoff=10ms"];
    Run::start_command(&machine.env, machine.prepared("up", &[&profile, more].concat()))
}

fn log(machine: &Machine) -> String {
    machine.env.log("xpyd.log")
}

/// The position in the log where the memory of `whose` is reported as free.
fn assert_memory_is_back(log: &str, whose: &str) -> usize {
    let whose = format!(" whose=\"{whose}\"");
    let line = log
        .lines()
        .find(|line| line.contains("GPU memory is back after") && line.ends_with(&whose));
    let line = line.unwrap_or_else(|| panic!("no memory is back{whose}:\n{log}"));
    log.find(line).expect("a line of it")
}

#[test]
fn nvml_confirms_placement_and_stop_waits_for_memory() {
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
fn unreleased_memory_is_reported_with_its_process() {
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
fn a_restart_waits_for_the_old_processes_memory() {
    let machine = Machine::new(&with_engines(2, "lag_ms = 700"));
    let mut run = up(&machine, &[]);
    run.wait_until_ready();
    kill_engine(&machine.env, "decoder1");
    wait_for("decoder1", || {
        let engine = engine(&machine.env, "decoder1");
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
fn an_engine_on_the_wrong_gpu_fails_its_start() {
    let machine = Machine::new(&with_engines(3, "shift = 1"));
    let (code, text) = up(&machine, &[]).end();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("and was planned on GPU-0000000"), "{text}");
}

#[test]
fn with_host_pids_only_memory_is_checked() {
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
fn engines_on_one_gpu_start_one_at_a_time() {
    let machine = Machine::new(&with_engines(1, "lag_ms = 300"));
    let mut run = up(&machine, &["--set", "vllm.gpu_memory_utilization=0.4"]);
    run.wait_until_ready();
    let shown = log(&machine);
    // Both lines are the driver's, so they are in order.
    let healthy = shown.find("engine is up engine=prefiller1").expect("the first is up");
    let spawned = shown.rfind("engine spawned engine=decoder1").expect("the second");
    assert!(healthy < spawned, "{shown}");
    kill_engine(&machine.env, "prefiller1");
    wait_for("prefiller1", || {
        let engine = engine(&machine.env, "prefiller1");
        let is_back = engine["state"] == "ready" && engine["incarnation"] == 2;
        if is_back { Ok(()) } else { Err(engine.to_string()) }
    });
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
}

#[test]
fn attached_engines_keep_their_gpus_and_memory_baseline() {
    let machine = Machine::new(&with_engines(4, "lag_ms = 300"));
    let keep = ["--set", "deadlines.keep=10m"];
    let mut first = up(&machine, &keep);
    first.wait_until_ready();
    first.signal(Signal::SIGKILL);
    first.end();
    // The plan must not avoid GPUs because of the engines' own memory.
    let mut second = up(&machine, &keep);
    second.wait_for_line("attaching to the engines");
    second.wait_until_ready();
    second.signal(Signal::SIGINT);
    let (code, text) = second.end();
    assert_eq!(code, 0, "{text}");
    assert_memory_is_back(&log(&machine), "the fleet");
}

#[test]
fn without_gpus_a_stop_loads_no_nvml() {
    let machine = Machine::new("fail = \"nvmlInit_v2\"\n");
    let mut command = machine.prepared("up", &["-p", "1p1d", "--engine", "sim", "--set", "sim.preset=instant"]);
    command.env("XPYD_NVML", "/nowhere");
    let mut run = Run::start_command(&machine.env, command);
    run.wait_until_ready();
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    let log = log(&machine);
    assert!(!log.is_empty() && !log.to_lowercase().contains("gpu"), "{log}");
}
