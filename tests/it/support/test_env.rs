//! The environment of a test: its own folder, ports and processes, and commands of xpyd in it.

use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Once;

use nix::sys::signal::Signal;
use tokio::signal::unix::SignalKind;

use super::http::{TOKENS, completion_with};
use super::{Run, wait_for};

/// Every port base of the shipped profiles, except 8090, which tests move: it is a multiple of 1100 plus ten fleets below 9100.
const PORT_BASES: [u16; 10] = [5600, 5700, 6555, 7100, 7200, 7300, 7400, 7500, 8100, 9100];

/// The number of ports that a fleet uses from each base.
const PORTS_PER_BASE: u16 = 10;

/// A free port offset for the fleets of one test, unique among all tests on this machine. It is reserved as long as the
/// abstract socket lives, whose name contains it.
fn free_port_offset() -> (u16, UnixListener) {
    // The ports are below the ephemeral range of Linux, so that no outgoing connection uses them. Bases are 100 or 55 apart, so
    // ten fleets fit between them, and no two bases differ by about a multiple of 1100.
    for turn in 0..170 {
        let offset = (turn % 10) * PORTS_PER_BASE + (turn / 10) * 1100 + 4000;
        let name = SocketAddr::from_abstract_name(format!("xpyd-tests/{offset}")).expect("a name");
        let Ok(taken) = UnixListener::bind_addr(&name) else {
            continue;
        };
        let free = PORT_BASES.iter().all(|base| {
            (0..PORTS_PER_BASE).all(|index| TcpListener::bind((Ipv4Addr::LOCALHOST, base + offset + index)).is_ok())
        });
        if free {
            return (offset, taken);
        }
    }
    panic!("no free ports");
}

/// The signals that ask a program to end.
const STOP_SIGNALS: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// The signals of [`STOP_SIGNALS`] that a process ignores.
pub(crate) fn ignored_signals(pid: i32) -> Vec<Signal> {
    ignored_of(pid, &STOP_SIGNALS)
}

fn ignored_of(pid: i32, signals: &[Signal]) -> Vec<Signal> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = u64::from_str_radix(mask.expect("a mask").trim(), 16).expect("a number");
    let is_set = |signal: &Signal| mask >> (*signal as i32 - 1) & 1 == 1;
    signals.iter().copied().filter(is_set).collect()
}

/// Installs handlers for signals that this process ignores. `nohup`, background jobs of scripts, and Python (SIGXFSZ) leave
/// signals ignored, and every program that the tests start would inherit that. A handler is reset at `exec`.
pub(crate) fn reset_ignored_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let _inside = runtime.as_ref().expect("a runtime").enter();
        let all = [&STOP_SIGNALS[..], &[Signal::SIGXFSZ]].concat();
        for signal in ignored_of(i32::try_from(std::process::id()).expect("a pid"), &all) {
            let _heard =
                tokio::signal::unix::signal(SignalKind::from_raw(signal as i32)).expect("a signal that can be heard");
        }
    });
}

/// The folder and the ports of one test's runs. Dropping it removes the folder.
pub(crate) struct TestEnv {
    folder: tempfile::TempDir,
    pub(crate) offset: u16,
    _offset_is_taken: UnixListener,
}

impl TestEnv {
    pub(crate) fn new() -> Self {
        reset_ignored_signals();
        let (offset, taken) = free_port_offset();
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            offset,
            _offset_is_taken: taken,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// `xpyd ARGUMENTS` in this folder, without variables of the environment in which the tests run.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
        command
            .args(arguments)
            .current_dir(self.path())
            .env("XDG_RUNTIME_DIR", self.path())
            .stdin(Stdio::null());
        for name in [
            "CLIENT_BOUND",
            "CLIENT_BOUND_KEY",
            "XPYD_LOG",
            "XPYD_API_KEY",
            "VLLM_API_KEY",
            "OPENAI_API_KEY",
            "XPYD_NVML",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_TOKEN_PATH",
            "HF_ENDPOINT",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
            "CUDA_VISIBLE_DEVICES",
            "SLURM_JOB_ID",
        ] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.path().join("huggingface"));
        command.env("XDG_STATE_HOME", self.path().join("state"));
        command
    }

    /// Runs `xpyd ARGUMENTS` to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("xpyd runs")
    }

    /// The arguments of `xpyd up` with simulated engines that answer at once.
    pub(crate) fn up_arguments(&self, more: &[&str]) -> Vec<String> {
        let offset = format!("port_offset={}", self.offset);
        let fixed = ["up", "--engine", "sim", "--set", "sim.preset=instant", "--set", &offset];
        fixed
            .iter()
            .chain(more)
            .map(|argument| (*argument).to_owned())
            .collect()
    }

    /// Starts `xpyd up` with these additional arguments.
    pub(crate) fn up(&self, more: &[&str]) -> Run<'_> {
        let arguments = self.up_arguments(more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Run::start(self, &arguments)
    }

    pub(crate) fn proxy_port(&self) -> u16 {
        9100 + self.offset
    }

    /// The key that xpyd generated for the engines of the run `default`.
    pub(crate) fn engine_key(&self) -> String {
        let file = self.path().join("xpyd/default/engine-key");
        std::fs::read_to_string(file).expect("a key").trim_end().to_owned()
    }

    /// The text of a greedy completion by the first decode engine alone, without hand-off.
    pub(crate) fn decode_alone(&self, model: &str, prompt: &str) -> String {
        self.decode_alone_of(model, prompt, TOKENS)
    }

    /// The same, with this number of tokens.
    pub(crate) fn decode_alone_of(&self, model: &str, prompt: &str, tokens: usize) -> String {
        let bearer = format!("Bearer {}", self.engine_key());
        completion_with(7200 + self.offset, model, prompt, tokens, &[("authorization", &bearer)])
    }

    /// The processes whose working directory is this folder: xpyd, its shim, and everything that they started.
    pub(crate) fn processes(&self) -> Vec<(i32, String)> {
        let here = self.path().canonicalize().expect("the folder");
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            if std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == here) {
                let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                found.push((pid, String::from_utf8_lossy(&command).replace('\0', " ")));
            }
        }
        found
    }

    /// Waits until no process of this test environment is left.
    pub(crate) fn wait_until_empty(&self) {
        wait_for("the end of all processes", || {
            let left = self.processes();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:#?}"))
            }
        });
    }

    /// A port of the fleet that has a listener.
    pub(crate) fn listener(&self) -> Option<u16> {
        PORT_BASES
            .iter()
            .flat_map(|base| (0..PORTS_PER_BASE).map(move |index| base + self.offset + index))
            .find(|port| std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).is_ok())
    }

    /// Checks that no port of the fleet has a listener.
    pub(crate) fn assert_no_listener(&self) {
        assert_eq!(self.listener(), None, "something listens on this port");
    }

    /// The text of a log file of the newest run; empty if there is none.
    pub(crate) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join("logs/latest").join(name)).unwrap_or_default()
    }
}
