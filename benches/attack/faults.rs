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
use crate::storm::Arena;
use crate::tree::is_running;

/// What a fault takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    /// A mount namespace of its own.
    Namespace,
    Connector(&'static str),
}

/// Why a fault had no effect, or which harm it did.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The state of the fleet does not allow it, as when an engine to stop is already gone.
    Impossible(String),
    /// xpyd did not do what it must be able to do at any time.
    Broken(String),
}

type Act = fn(&Arena, &mut StdRng) -> Result<(), Trouble>;

pub(crate) struct Fault {
    pub(crate) name: &'static str,
    pub(crate) needs: Needs,
    /// How often it is drawn, beside the others.
    pub(crate) weight: u32,
    pub(crate) act: Act,
}

/// Every fault. A new one is one more line.
#[rustfmt::skip]
pub(crate) const FAULTS: &[Fault] = &[
    fault("SIGKILL of a leader", Needs::Nothing, 2, |arena, random| signal(&leader(arena, random)?, Signal::SIGKILL)),
    fault("SIGKILL of a child", Needs::Nothing, 1, |arena, random| signal(&child(arena, random)?, Signal::SIGKILL)),
    fault("SIGKILL of the monitor", Needs::Nothing, 1, |arena, _| signal(&monitor(arena)?, Signal::SIGKILL)),
    fault("leader frozen", Needs::Nothing, 1, |arena, random| freeze(arena, &leader(arena, random)?, moment(random))),
    fault("child frozen", Needs::Nothing, 1, |arena, random| freeze(arena, &child(arena, random)?, moment(random))),
    fault("leader frozen for longer than a lease", Needs::Nothing, 1, |arena, random| freeze_long(arena, random, leader)),
    fault("child frozen for longer than a lease", Needs::Nothing, 1, |arena, random| freeze_long(arena, random, child)),
    fault("restart", Needs::Nothing, 1, |arena, random| { let name = engine(arena, random)?.name; command(arena, &["restart", &name]) }),
    fault("drain", Needs::Nothing, 1, |arena, random| { let name = engine(arena, random)?.name; command(arena, &["drain", &name]) }),
    fault("scale", Needs::Nothing, 3, scale),
    fault("SIGKILL of xpyd, up", Needs::Nothing, 1, |arena, _| kill_xpyd(arena, |_| Ok(()))),
    fault("SIGKILL of xpyd, a stranger attaches, up", Needs::Nothing, 1, |arena, _| kill_xpyd(arena, stranger_attaches)),
    fault("SIGKILL of xpyd and a leader, up", Needs::Nothing, 1, |arena, random| { let leader = leader(arena, random)?; kill_xpyd(arena, move |_| signal(&leader, Signal::SIGKILL)) }),
    fault("down --keep-engines, up", Needs::Nothing, 1, keep_engines),
    fault("disk of the logs full", Needs::Namespace, 1, |arena, random| fill(arena, random, arena.fleet.folder().join("logs/filler"))),
    fault("/dev/shm full", Needs::Namespace, 1, |arena, random| fill(arena, random, PathBuf::from("/dev/shm/filler"))),
    fault("log files removed", Needs::Nothing, 1, remove_logs),
    fault("40 half-open connections", Needs::Nothing, 1, |arena, random| half_open(arena, random, 40)),
    fault("200 silent connections", Needs::Nothing, 1, |arena, _| hold_connections(arena, 200, b"")),
    fault("60 clients that vanish", Needs::Nothing, 1, |arena, _| vanish(arena, 60)),
    fault("20 clients that do not read", Needs::Nothing, 1, |arena, _| hold_connections(arena, 20, &stream_request(2000))),
    fault("bodies of 20,000 keys", Needs::Nothing, 1, |arena, _| hold_connections(arena, 4, &many_keys(20_000))),
    fault("side channel wedged", Needs::Connector("nixl"), 1, wedge),
    fault("hostile notifications", Needs::Connector("lmcache"), 3, |arena, random| { let streams = packets::attack_notifications(arena.fleet.port(7500), random); arena.hold(streams.map_err(impossible)?, Duration::from_secs(5)); Ok(()) }),
];

const fn fault(name: &'static str, needs: Needs, weight: u32, act: Act) -> Fault {
    Fault {
        name,
        needs,
        weight,
        act,
    }
}

fn impossible(error: impl std::fmt::Display) -> Trouble {
    Trouble::Impossible(error.to_string())
}

/// From 50 ms to 5 s, short ones as likely as long ones.
fn moment(random: &mut StdRng) -> Duration {
    Duration::from_secs_f64(0.05 * 100_f64.powf(random.random_range(0.0..1.0)))
}

/// An engine that runs.
fn engine(arena: &Arena, random: &mut StdRng) -> Result<Engine, Trouble> {
    let mut engines = arena.fleet.engines();
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

fn leader(arena: &Arena, random: &mut StdRng) -> Result<Target, Trouble> {
    let engine = engine(arena, random)?;
    Ok(Target {
        pid: engine.leader.ok_or_else(|| impossible("no leader"))?,
        engine: engine.name,
    })
}

/// A descendant of a leader.
fn child(arena: &Arena, random: &mut StdRng) -> Result<Target, Trouble> {
    let Target { engine, pid } = leader(arena, random)?;
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

/// The parent of the shim, which runs the same command; gone once it was killed.
fn monitor(arena: &Arena) -> Result<Target, Trouble> {
    let guards = |pid: i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|word| word == b"shim")
    };
    let mut processes = arena
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

fn signal(target: &Target, signal: Signal) -> Result<(), Trouble> {
    kill(Pid::from_raw(target.pid), signal).map_err(|error| impossible(format!("{}: {error}", target.engine)))
}

/// Continues a frozen process when it is dropped.
struct Frozen(Pid);

impl Drop for Frozen {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

fn freeze(arena: &Arena, target: &Target, time: Duration) -> Result<(), Trouble> {
    signal(target, Signal::SIGSTOP)?;
    arena.hold(Frozen(Pid::from_raw(target.pid)), time);
    Ok(())
}

/// Longer than vLLM's lease of 30 s for KV that waits, so that a late pull finds other blocks. One at a time, because two in
/// a row are longer than any client waits.
fn freeze_long(
    arena: &Arena,
    random: &mut StdRng,
    target: fn(&Arena, &mut StdRng) -> Result<Target, Trouble>,
) -> Result<(), Trouble> {
    let time = Duration::from_secs_f64(random.random_range(31.0..40.0));
    if !arena.may_freeze_long(time + Duration::from_secs(15)) {
        return Err(impossible("another engine has just been frozen for long"));
    }
    freeze(arena, &target(arena, random)?, time)
}

/// A command that may be refused because of the fleet's state.
fn command(arena: &Arena, words: &[&str]) -> Result<(), Trouble> {
    let ran = arena.fleet.run(words);
    match ran.code {
        Some(0) => Ok(()),
        Some(_) => Err(impossible(ran.last_words())),
        None => Err(Trouble::Broken(format!(
            "xpyd {}: {}",
            words.join(" "),
            ran.last_words()
        ))),
    }
}

fn scale(arena: &Arena, random: &mut StdRng) -> Result<(), Trouble> {
    let role = ["prefill", "decode"][random.random_range(0..2)];
    // Two are half of the cases, so that the fleet comes back to what it was.
    let count = [1, 2, 2, 3][random.random_range(0..4)];
    command(arena, &["scale", &format!("{role}={count}")])
}

/// SIGKILL to xpyd, something while it is away, and the next xpyd.
fn kill_xpyd(arena: &Arena, meanwhile: impl FnOnce(&Arena) -> Result<(), Trouble>) -> Result<(), Trouble> {
    let xpyd = arena.fleet.xpyd().ok_or_else(|| impossible("no xpyd"))?;
    let absence = arena.xpyd_is_killed();
    kill(Pid::from_raw(xpyd.cast_signed()), Signal::SIGKILL).map_err(impossible)?;
    let begun = Instant::now();
    while is_running(xpyd) && begun.elapsed() < Duration::from_secs(10) {
        pause(Duration::from_millis(10));
    }
    let result = meanwhile(arena);
    arena.up().map_err(Trouble::Broken)?;
    drop(absence);
    result
}

/// A line that is not a command, at the socket where the next xpyd attaches.
fn stranger_attaches(arena: &Arena) -> Result<(), Trouble> {
    let socket = arena.fleet.folder().join("xpyd/default/attach.sock");
    let begun = Instant::now();
    while !socket.exists() && begun.elapsed() < Duration::from_secs(5) {
        pause(Duration::from_millis(10));
    }
    let mut stream = UnixStream::connect(socket).map_err(impossible)?;
    stream.write_all(b"{}\n").map_err(impossible)
}

fn keep_engines(arena: &Arena, _: &mut StdRng) -> Result<(), Trouble> {
    let absence = arena.xpyd_leaves();
    let ran = arena.fleet.run(&["down", "--keep-engines"]);
    if ran.code != Some(0) {
        return Err(Trouble::Broken(format!(
            "xpyd down --keep-engines: {}",
            ran.last_words()
        )));
    }
    arena.up().map_err(Trouble::Broken)?;
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

/// Fills a file system, and kills an engine, which must come back meanwhile or afterwards.
fn fill(arena: &Arena, random: &mut StdRng, path: PathBuf) -> Result<(), Trouble> {
    let mut file = fs::File::create(&path).map_err(impossible)?;
    arena.hold(Filler(path), Duration::from_secs_f64(random.random_range(1.0..6.0)));
    let block = vec![0; 64 << 10];
    // Bounded, should the file system be another than the small one in memory.
    for _ in 0..2048 {
        if file.write_all(&block).is_err() {
            break;
        }
    }
    signal(&leader(arena, random)?, Signal::SIGKILL)
}

fn remove_logs(arena: &Arena, _: &mut StdRng) -> Result<(), Trouble> {
    let logs = fs::read_dir(arena.fleet.logs()).map_err(impossible)?.flatten();
    for file in logs.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "log")) {
        let _ = fs::remove_file(file.path());
    }
    Ok(())
}

fn connect(arena: &Arena) -> Result<TcpStream, Trouble> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, arena.fleet.proxy_port())).map_err(impossible)?;
    stream
        .set_write_timeout(Some(Duration::from_secs(2)))
        .map_err(impossible)?;
    Ok(stream)
}

/// Connections that send this and then neither read nor write.
fn hold_connections(arena: &Arena, count: usize, request: &[u8]) -> Result<(), Trouble> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = connect(arena)?;
        // A server that has closed it in between has done nothing wrong.
        let _ = stream.write_all(request);
        streams.push(stream);
    }
    arena.hold(streams, Duration::from_secs(5));
    Ok(())
}

/// Connections that stop somewhere in the middle of a request.
fn half_open(arena: &Arena, random: &mut StdRng, count: usize) -> Result<(), Trouble> {
    let request = stream_request(40);
    for _ in 0..count {
        let length = random.random_range(1..request.len());
        hold_connections(arena, 1, &request[..length])?;
    }
    Ok(())
}

/// Clients that close their connection while they are answered.
fn vanish(arena: &Arena, count: usize) -> Result<(), Trouble> {
    for _ in 0..count {
        let mut stream = connect(arena)?;
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

/// A prefill engine whose HTTP side works and whose KV cannot be read.
fn wedge(arena: &Arena, random: &mut StdRng) -> Result<(), Trouble> {
    let port = arena.fleet.port(5600 + random.random_range(0..2));
    let stream = packets::wedge(port).map_err(impossible)?;
    arena.hold(stream, Duration::from_secs_f64(random.random_range(5.0..15.0)));
    Ok(())
}
