//! A fleet of simulated engines under `xpyd up --detach`, with its own folder and ports.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::commands::{self, CommandResult};
use crate::tree::{free_port, is_running};

pub(crate) const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Port bases of the shipped profiles, and the number of ports that a fleet can use from each.
const BASES: [u16; 10] = [5600, 5700, 6555, 7100, 7200, 7300, 7400, 7500, 8100, 9100];
const WIDTH: u16 = 10;

/// Longest time for a command. `up` waits for engines, `scale` for idle ones.
const COMMAND: Duration = Duration::from_mins(3);

/// Stops the fleet when its input ends, which happens however this program ends. `$0` is xpyd, `$1` the folder.
const REAPER: &str = r#"
read line
cd "$1" && XDG_RUNTIME_DIR="$1" timeout 60 "$0" down --force
cd /
for process in /proc/[0-9]*; do
    [ "$(readlink "$process/cwd")" = "$1" ] && kill -CONT "${process#/proc/}" && kill -KILL "${process#/proc/}"
done
umount "$1/logs"
rm -rf "$1"
"#;

/// One engine in `xpyd status`.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    pub(crate) name: String,
    pub(crate) state: String,
    /// The leader. `None` between two incarnations.
    pub(crate) leader: Option<i32>,
}

/// A fleet of two prefill and two decode engines. Dropping it kills every process in its folder.
pub(crate) struct Fleet {
    folder: PathBuf,
    offset: u16,
    settings: Vec<String>,
    reaper: Child,
    _ports_are_taken: UnixListener,
}

impl Fleet {
    /// Makes the folder and finds the ports. [`Fleet::up`] starts the fleet.
    pub(crate) fn new(connector: &str, settings: &[String]) -> std::io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("xpyd-attack-").tempdir()?.keep();
        let folder = folder.canonicalize()?;
        fs::create_dir(folder.join("logs"))?;
        let reaper = Command::new("sh")
            .args(["-c", REAPER, env!("CARGO_BIN_EXE_xpyd")])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        let (offset, taken) = free_port_offset()?;
        let own = [
            format!("port_offset={offset}"),
            format!("connector={connector}"),
            "sim.preset=brisk".to_owned(),
            "restart.backoff=100ms".to_owned(),
            "restart.max_restarts=10000".to_owned(),
            "deadlines.drain=10s".to_owned(),
            "logs.file_size=1MiB".to_owned(),
            "logs.files=2".to_owned(),
            "proxy.routing.attempts=10".to_owned(),
        ];
        Ok(Self {
            folder,
            offset,
            settings: own.into_iter().chain(settings.iter().cloned()).collect(),
            reaper,
            _ports_are_taken: taken,
        })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A port of the fleet, by the profile's number for it.
    pub(crate) fn port(&self, base: u16) -> u16 {
        base + self.offset
    }

    pub(crate) fn proxy_port(&self) -> u16 {
        self.port(9100)
    }

    /// Starts xpyd, which attaches to running engines.
    pub(crate) fn up(&self) -> Result<(), String> {
        let mut words = vec!["up", "--detach", "--engine", "sim"];
        words.extend(self.settings.iter().flat_map(|setting| ["--set", setting.as_str()]));
        let ran = self.run(&words);
        if ran.code == Some(0) {
            Ok(())
        } else {
            Err(format!("xpyd up: {}", ran.last_words()))
        }
    }

    /// Runs `xpyd WORDS` in the fleet's folder.
    pub(crate) fn run(&self, words: &[&str]) -> CommandResult {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
        command.args(words).current_dir(&self.folder).env_clear();
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        for (name, folder) in [
            ("XDG_RUNTIME_DIR", self.folder.clone()),
            ("XDG_STATE_HOME", self.folder.join("state")),
            ("HF_HOME", self.folder.join("huggingface")),
            ("HOME", self.folder.clone()),
        ] {
            command.env(name, folder);
        }
        commands::run(command, &self.folder, COMMAND)
    }

    /// `xpyd status --json`, or its output if that fails.
    pub(crate) fn status(&self) -> Result<Value, String> {
        let ran = self.run(&["status", "--json"]);
        serde_json::from_str(&ran.output).map_err(|_| ran.last_words())
    }

    /// All engines of the plan, including stopped ones.
    pub(crate) fn engines(&self) -> Vec<Engine> {
        let status = self.status().unwrap_or_default();
        let engines = status["engines"].as_array().cloned().unwrap_or_default();
        engines
            .iter()
            .map(|engine| Engine {
                name: engine["id"].as_str().unwrap_or_default().to_owned(),
                state: engine["state"].as_str().unwrap_or_default().to_owned(),
                leader: engine["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()),
            })
            .collect()
    }

    /// The process of xpyd.
    pub(crate) fn xpyd(&self) -> Option<u32> {
        u32::try_from(self.status().ok()?["run"]["pid"].as_u64()?).ok()
    }

    /// Waits until all engines that are not stopped serve.
    pub(crate) fn wait_until_whole(&self, deadline: Duration) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            let engines = self.engines();
            let is_whole = |engine: &Engine| matches!(engine.state.as_str(), "ready" | "stopped");
            if !engines.is_empty() && engines.iter().all(is_whole) {
                return Ok(());
            }
            if begun.elapsed() > deadline {
                return Err(format!("the fleet is not whole after {deadline:?}: {engines:?}"));
            }
            commands::pause(Duration::from_millis(100));
        }
    }

    /// The folder of the newest run's logs.
    pub(crate) fn logs(&self) -> PathBuf {
        self.folder.join("logs/latest")
    }

    /// Processes whose working directory is the fleet's folder: xpyd and everything that it started.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        all.filter(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == self.folder))
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| is_running(*pid))
            .collect()
    }

    /// Ports of the fleet that are in use.
    pub(crate) fn listeners(&self) -> Vec<u16> {
        let ports = BASES.iter().flat_map(|base| (0..WIDTH).map(move |index| base + index));
        ports
            .map(|port| self.port(port))
            .filter(|port| TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).is_ok())
            .collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        drop(self.reaper.stdin.take());
        drop(self.reaper.wait());
    }
}

/// A port offset, reserved while the socket is open. Tests use the same socket names, so fleets of tests and attacks do
/// not collide.
fn free_port_offset() -> std::io::Result<(u16, UnixListener)> {
    for turn in 0..170 {
        let offset = (turn % 10) * WIDTH + (turn / 10) * 1100 + 4000;
        let name = SocketAddr::from_abstract_name(format!("xpyd-tests/{offset}"))?;
        let Ok(taken) = UnixListener::bind_addr(&name) else {
            continue;
        };
        let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        if BASES
            .iter()
            .all(|base| (0..WIDTH).all(|index| is_free(base + offset + index)))
        {
            return Ok((offset, taken));
        }
    }
    Err(std::io::Error::other("no free ports"))
}

/// A single simulated engine as the reference for correct answers: its KV never moves.
pub(crate) struct Reference {
    pub(crate) port: u16,
    _tree: crate::tree::Tree,
}

impl Reference {
    pub(crate) async fn start(folder: &Path) -> Result<Self, String> {
        let port = free_port().map_err(|error| error.to_string())?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
        command.args(["sim", MODEL, "--port", &port.to_string(), "--preset", "instant"]);
        let log = folder.join("reference.log");
        let tree = crate::tree::Tree::start(command, &log).map_err(|error| error.to_string())?;
        if crate::tree::serves(port).await {
            Ok(Self { port, _tree: tree })
        } else {
            Err("the reference engine does not serve".to_owned())
        }
    }
}
