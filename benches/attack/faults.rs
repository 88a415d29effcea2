//! The faults of a storm, one line each in [`FAULTS`].

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::RngExt as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use tokio::time::Instant;

use crate::commands::pause;
use crate::fleet::{Engine, MODEL};
use crate::http::post;
use crate::packets;
use crate::storm::StormContext;
use crate::tree::is_running;

/// The requirement of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    /// A mount namespace of its own.
    Namespace,
    Connector(&'static str),
}

/// Why a fault had no effect, or what it broke.
#[derive(Debug)]
pub(crate) enum FaultError {
    /// The state of the fleet does not allow it: for example, the engine is already gone.
    Impossible(String),
    /// xpyd failed at something that must always work.
    Broken(String),
}

type Act = fn(&StormContext, &mut StdRng) -> Result<(), FaultError>;

pub(crate) struct Fault {
    pub(crate) name: &'static str,
    pub(crate) needs: Needs,
    /// Its relative frequency.
    pub(crate) weight: u32,
    pub(crate) act: Act,
}

/// Every fault. A new one is one more line.
#[rustfmt::skip]
pub(crate) const FAULTS: &[Fault] = &[
    fault("SIGKILL of a leader", Needs::Nothing, 2, |context, random| signal(&leader(context, random)?, Signal::SIGKILL)),
    fault("SIGKILL of a child", Needs::Nothing, 1, |context, random| signal(&child(context, random)?, Signal::SIGKILL)),
    fault("SIGKILL of the monitor", Needs::Nothing, 1, |context, _| signal(&monitor(context)?, Signal::SIGKILL)),
    fault("leader frozen", Needs::Nothing, 1, |context, random| freeze(context, &leader(context, random)?, moment(random))),
    fault("child frozen", Needs::Nothing, 1, |context, random| freeze(context, &child(context, random)?, moment(random))),
    fault("leader frozen for longer than a lease", Needs::Nothing, 1, |context, random| freeze_long(context, random, leader)),
    fault("child frozen for longer than a lease", Needs::Nothing, 1, |context, random| freeze_long(context, random, child)),
    fault("restart", Needs::Nothing, 1, |context, random| { let name = engine(context, random)?.name; command(context, &["restart", &name]) }),
    fault("drain", Needs::Nothing, 1, |context, random| { let name = engine(context, random)?.name; command(context, &["drain", &name]) }),
    fault("scale", Needs::Nothing, 3, scale),
    fault("SIGKILL of xpyd, up", Needs::Nothing, 1, |context, _| kill_xpyd(context, |_| Ok(()))),
    fault("SIGKILL of xpyd, a stranger attaches, up", Needs::Nothing, 1, |context, _| kill_xpyd(context, stranger_attaches)),
    fault("SIGKILL of xpyd and a leader, up", Needs::Nothing, 1, |context, random| { let leader = leader(context, random)?; kill_xpyd(context, move |_| signal(&leader, Signal::SIGKILL)) }),
    fault("down --keep-engines, up", Needs::Nothing, 1, keep_engines),
    fault("disk of the logs full", Needs::Namespace, 1, |context, random| fill(context, random, context.fleet.folder().join("logs/filler"))),
    fault("/dev/shm full", Needs::Namespace, 1, |context, random| fill(context, random, PathBuf::from("/dev/shm/filler"))),
    fault("log files removed", Needs::Nothing, 1, remove_logs),
    fault("40 half-open connections", Needs::Nothing, 1, |context, random| half_open(context, random, 40)),
    fault("200 silent connections", Needs::Nothing, 1, |context, _| hold_connections(context, 200, b"")),
    fault("60 clients that vanish", Needs::Nothing, 1, |context, _| vanish(context, 60)),
    fault("20 clients that do not read", Needs::Nothing, 1, |context, _| hold_connections(context, 20, &stream_request(2000))),
    fault("bodies of 20,000 keys", Needs::Nothing, 1, |context, _| hold_connections(context, 4, &many_keys(20_000))),
    fault("side channel wedged", Needs::Connector("nixl"), 1, wedge),
    fault("hostile notifications", Needs::Connector("lmcache"), 3, |context, random| { let streams = packets::attack_notifications(context.fleet.port(7500), random); context.hold(streams.map_err(impossible)?, Duration::from_secs(5)); Ok(()) }),
];

const fn fault(name: &'static str, needs: Needs, weight: u32, act: Act) -> Fault {
    Fault {
        name,
        needs,
        weight,
        act,
    }
}

fn impossible(error: impl std::fmt::Display) -> FaultError {
    FaultError::Impossible(error.to_string())
}

/// From 50 ms to 5 s, evenly distributed on a logarithmic scale.
fn moment(random: &mut StdRng) -> Duration {
    Duration::from_secs_f64(0.05 * 100_f64.powf(random.random_range(0.0..1.0)))
}

/// A running engine.
fn engine(context: &StormContext, random: &mut StdRng) -> Result<Engine, FaultError> {
    let mut engines = context.fleet.engines();
    engines.retain(|engine| engine.leader.is_some() && engine.state == "ready");
    engines
        .choose(random)
        .cloned()
        .ok_or_else(|| impossible("no engine is ready"))
}

/// A process and its name.
struct Target {
    engine: String,
    pid: i32,
}

fn leader(context: &StormContext, random: &mut StdRng) -> Result<Target, FaultError> {
    let engine = engine(context, random)?;
    Ok(Target {
        pid: engine.leader.ok_or_else(|| impossible("no leader"))?,
        engine: engine.name,
    })
}

/// A descendant of a leader.
fn child(context: &StormContext, random: &mut StdRng) -> Result<Target, FaultError> {
    let Target { engine, pid } = leader(context, random)?;
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(parent) = all.get(next) {
        all.extend(children(*parent));
        next += 1;
    }
    let pid = *all[1..]
        .choose(random)
        .ok_or_else(|| impossible(format!("{engine} has no child")))?;
    Ok(Target { engine, pid })
}

fn children(parent: i32) -> Vec<i32> {
    let file = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(file).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// The parent of the shim, which runs the same command; `None` after it was killed.
fn monitor(context: &StormContext) -> Result<Target, FaultError> {
    let guards = |pid: i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|word| word == b"shim")
    };
    let mut processes = context
        .fleet
        .processes()
        .into_iter()
        .filter_map(|pid| i32::try_from(pid).ok());
    let pid = processes.find(|pid| guards(*pid) && children(*pid).into_iter().any(guards));
    Ok(Target {
        engine: "the monitor".to_owned(),
        pid: pid.ok_or_else(|| impossible("no monitor"))?,
    })
}

fn signal(target: &Target, signal: Signal) -> Result<(), FaultError> {
    kill(Pid::from_raw(target.pid), signal).map_err(|error| impossible(format!("{}: {error}", target.engine)))
}

/// Continues a frozen process when it is dropped.
struct Frozen(Pid);

impl Drop for Frozen {
    fn drop(&mut self) {
        // It can have been killed in the meantime.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

fn freeze(context: &StormContext, target: &Target, time: Duration) -> Result<(), FaultError> {
    signal(target, Signal::SIGSTOP)?;
    context.hold(Frozen(Pid::from_raw(target.pid)), time);
    Ok(())
}

/// Longer than vLLM's lease of 30 s for KV that waits, so that a late pull finds other blocks.
/// Only one at a time: two in a row exceed the deadline of every client.
fn freeze_long(
    context: &StormContext,
    random: &mut StdRng,
    target: fn(&StormContext, &mut StdRng) -> Result<Target, FaultError>,
) -> Result<(), FaultError> {
    let time = Duration::from_secs_f64(random.random_range(31.0..40.0));
    if !context.may_freeze_long(time + Duration::from_secs(15)) {
        return Err(impossible("another engine has just been frozen for long"));
    }
    freeze(context, &target(context, random)?, time)
}

/// A command that can be rejected because of the state of the fleet.
fn command(context: &StormContext, words: &[&str]) -> Result<(), FaultError> {
    let ran = context.fleet.run(words);
    match ran.code {
        Some(0) => Ok(()),
        Some(_) => Err(impossible(ran.last_words())),
        None => Err(FaultError::Broken(format!(
            "xpyd {}: {}",
            words.join(" "),
            ran.last_words()
        ))),
    }
}

fn scale(context: &StormContext, random: &mut StdRng) -> Result<(), FaultError> {
    let role = ["prefill", "decode"][random.random_range(0..2)];
    // Two engines in half of the cases, so that the fleet returns to its size.
    let count = [1, 2, 2, 3][random.random_range(0..4)];
    command(context, &["scale", &format!("{role}={count}")])
}

/// Kills xpyd, does something while it is gone, and starts the next xpyd.
fn kill_xpyd(
    context: &StormContext,
    meanwhile: impl FnOnce(&StormContext) -> Result<(), FaultError>,
) -> Result<(), FaultError> {
    let xpyd = context.fleet.xpyd().ok_or_else(|| impossible("no xpyd"))?;
    let absence = context.xpyd_is_killed();
    kill(Pid::from_raw(xpyd.cast_signed()), Signal::SIGKILL).map_err(impossible)?;
    let begun = Instant::now();
    while is_running(xpyd) && begun.elapsed() < Duration::from_secs(10) {
        pause(Duration::from_millis(10));
    }
    let result = meanwhile(context);
    context.up().map_err(FaultError::Broken)?;
    drop(absence);
    result
}

/// Sends a line that is not a command to the attach socket.
fn stranger_attaches(context: &StormContext) -> Result<(), FaultError> {
    let socket = context.fleet.folder().join("xpyd/default/attach.sock");
    let begun = Instant::now();
    while !socket.exists() && begun.elapsed() < Duration::from_secs(5) {
        pause(Duration::from_millis(10));
    }
    let mut stream = UnixStream::connect(socket).map_err(impossible)?;
    stream.write_all(b"{}\n").map_err(impossible)
}

fn keep_engines(context: &StormContext, _: &mut StdRng) -> Result<(), FaultError> {
    let absence = context.xpyd_leaves();
    let ran = context.fleet.run(&["down", "--keep-engines"]);
    if ran.code != Some(0) {
        return Err(FaultError::Broken(format!(
            "xpyd down --keep-engines: {}",
            ran.last_words()
        )));
    }
    context.up().map_err(FaultError::Broken)?;
    drop(absence);
    Ok(())
}

/// Removes a file when it is dropped.
struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Fills a file system and kills an engine, which must restart.
fn fill(context: &StormContext, random: &mut StdRng, path: PathBuf) -> Result<(), FaultError> {
    let mut file = fs::File::create(&path).map_err(impossible)?;
    context.hold(Filler(path), Duration::from_secs_f64(random.random_range(1.0..6.0)));
    let block = vec![0; 64 << 10];
    // Limited, in case the file system is not the small one in memory.
    for _ in 0..2048 {
        if file.write_all(&block).is_err() {
            break;
        }
    }
    signal(&leader(context, random)?, Signal::SIGKILL)
}

fn remove_logs(context: &StormContext, _: &mut StdRng) -> Result<(), FaultError> {
    let logs = fs::read_dir(context.fleet.logs()).map_err(impossible)?.flatten();
    for file in logs.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "log")) {
        let _ = fs::remove_file(file.path());
    }
    Ok(())
}

fn connect(context: &StormContext) -> Result<TcpStream, FaultError> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, context.fleet.proxy_port())).map_err(impossible)?;
    stream
        .set_write_timeout(Some(Duration::from_secs(2)))
        .map_err(impossible)?;
    Ok(stream)
}

/// Connections that send these bytes and then neither read nor write.
fn hold_connections(context: &StormContext, count: usize, request: &[u8]) -> Result<(), FaultError> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = connect(context)?;
        // The server is allowed to have closed it.
        let _ = stream.write_all(request);
        streams.push(stream);
    }
    context.hold(streams, Duration::from_secs(5));
    Ok(())
}

/// Connections that stop somewhere in the middle of a request.
fn half_open(context: &StormContext, random: &mut StdRng, count: usize) -> Result<(), FaultError> {
    let request = stream_request(40);
    for _ in 0..count {
        let length = random.random_range(1..request.len());
        hold_connections(context, 1, &request[..length])?;
    }
    Ok(())
}

/// Clients that disconnect during their answer.
fn vanish(context: &StormContext, count: usize) -> Result<(), FaultError> {
    for _ in 0..count {
        let mut stream = connect(context)?;
        let _ = stream.write_all(&stream_request(200));
        let _ = stream.shutdown(Shutdown::Both);
    }
    Ok(())
}

fn stream_request(tokens: usize) -> Vec<u8> {
    let body = format!(
        r#"{{"model":"{MODEL}","prompt":"{}","max_tokens":{tokens},"stream":true,"ignore_eos":true}}"#,
        "word ".repeat(100)
    );
    post("/v1/completions", body.as_bytes())
}

fn many_keys(count: usize) -> Vec<u8> {
    let keys: String = (0..count).map(|number| format!(r#","k{number}":0"#)).collect();
    post(
        "/v1/completions",
        format!(r#"{{"model":"{MODEL}","prompt":"x","max_tokens":1{keys}}}"#).as_bytes(),
    )
}

/// A prefill engine with working HTTP whose KV cannot be read.
fn wedge(context: &StormContext, random: &mut StdRng) -> Result<(), FaultError> {
    let port = context.fleet.port(5600 + random.random_range(0..2));
    let stream = packets::wedge(port).map_err(impossible)?;
    context.hold(stream, Duration::from_secs_f64(random.random_range(5.0..15.0)));
    Ok(())
}
