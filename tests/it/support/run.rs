//! Programs that a test has started: runs of xpyd, and engines and proxies without a supervisor.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::{DEADLINE, TestEnv, wait_for};

/// An engine or a proxy that a test has started without a supervisor, in its own process group. Dropping it kills the group,
/// because children of an engine survive their leader.
pub(crate) struct Unsupervised(Child);

impl Unsupervised {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.process_group(0).spawn().expect("it starts"))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"))
    }

    /// Its standard error, which must be a pipe.
    pub(crate) fn stderr(&mut self) -> std::process::ChildStderr {
        self.0.stderr.take().expect("a pipe that is not taken yet")
    }
}

impl Drop for Unsupervised {
    fn drop(&mut self) {
        // A group that has already ended is no error.
        let _ = killpg(self.pid(), Signal::SIGKILL);
        drop(self.0.wait());
    }
}

/// A running `xpyd`, whose output is read as it is printed.
pub(crate) struct Run<'env> {
    env: &'env TestEnv,
    child: Child,
    lines: Receiver<String>,
    pub(crate) seen: Vec<String>,
}

impl<'env> Run<'env> {
    pub(crate) fn start(env: &'env TestEnv, arguments: &[&str]) -> Self {
        Self::start_command(env, env.command(arguments))
    }

    /// Starts this command of the test environment.
    pub(crate) fn start_command(env: &'env TestEnv, mut command: Command) -> Self {
        let (output, input) = std::io::pipe().expect("a pipe");
        let child = command
            .stdout(input.try_clone().expect("a pipe"))
            .stderr(input)
            .spawn()
            .expect("xpyd starts");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            env,
            child,
            lines,
            seen: Vec::new(),
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// Reads lines until one contains `text`, and returns it.
    pub(crate) fn wait_for_line(&mut self, text: &str) -> String {
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(error) => panic!("no line with `{text}` ({error}):\n{}", self.seen.join("\n")),
            }
        }
    }

    /// Waits until every engine serves clients. On a busy machine, some engines of an attached fleet serve later than others.
    pub(crate) fn wait_until_ready(&mut self) {
        let line = self.wait_for_line("ready: every pair");
        let later = line.split_once("not serving yet: ").map_or("", |(_, names)| names);
        for name in later.split(", ").filter(|name| !name.is_empty()) {
            let serves = format!("{name} serves");
            while !self.seen.iter().any(|line| line.contains(&serves)) {
                self.wait_for_line("");
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("xpyd is there");
    }

    /// Kills xpyd, and waits until it has ended: its socket can be closed before its lock is released.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("it ends");
    }

    /// Waits for the end, and returns the exit code and the whole output.
    pub(crate) fn end(mut self) -> (i32, String) {
        let status = wait_for("the end of xpyd", || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err(format!("{:#?}", self.env.processes())),
            Err(error) => panic!("{error}"),
        });
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(5)) {
            self.seen.push(line);
        }
        (status.code().unwrap_or(-1), self.seen.join("\n"))
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The entry of one engine in `xpyd status --json`.
pub(crate) fn engine(env: &TestEnv, name: &str) -> serde_json::Value {
    let output = env.run(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let engines = status["engines"].as_array().expect("a list").clone();
    let mut engines = engines.into_iter();
    engines.find(|engine| engine["id"] == name).expect("an engine")
}

/// Sends SIGKILL to the leader of an engine.
pub(crate) fn kill_engine(env: &TestEnv, name: &str) {
    kill_process(engine(env, name)["pid"].as_i64().expect("a pid"));
}

/// Sends SIGKILL to one process, and waits until it has let go of its locks and sockets.
pub(crate) fn kill_process(pid: impl Into<i64>) {
    let pid = i32::try_from(pid.into()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("the process exists");
    wait_for("its end", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if matches!(state, None | Some('Z' | 'X')) {
            Ok(())
        } else {
            Err(stat)
        }
    });
}
