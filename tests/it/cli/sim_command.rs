//! `xpyd sim` as a process: process tree, signals and exit codes.

#![expect(
    clippy::unwrap_used,
    reason = "a failure to start or signal a process must fail the test"
)]

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use crate::support::DEADLINE;

/// A simulated engine in its own process. Dropping it kills its process tree.
struct Engine {
    leader: Child,
    /// Base URL of its API.
    address: String,
    /// Process ids of `EngineCore` and of the worker.
    children: [i32; 2],
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
    command
        .args(["sim", "llama", "--port", "0"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// Reads the process id 17 from `(EngineCore pid=17) ...`.
fn pid_of(process: &str, line: &str) -> Option<i32> {
    line.strip_prefix(&format!("({process} pid="))?
        .split_once(')')?
        .0
        .parse()
        .ok()
}

impl Engine {
    fn start(arguments: &[&str]) -> Self {
        let mut leader = command(arguments).spawn().unwrap();
        let mut log = BufReader::new(leader.stderr.take().unwrap());
        let (mut address, mut core, mut worker) = (None, None, None);
        let mut line = String::new();
        while log.read_line(&mut line).unwrap() > 0 {
            core = core.or(pid_of("EngineCore", &line));
            worker = worker.or(pid_of("Worker", &line));
            if let Some((_, found)) = line.trim_end().split_once("Starting vLLM server on http://") {
                address = Some(found.to_owned());
            }
            if line.contains("Application startup complete.") {
                break;
            }
            line.clear();
        }
        // The engine must not block when the reader stops.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self {
            leader,
            address: address.expect("it serves"),
            children: [core.expect("a core"), worker.expect("a worker")],
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.leader.id()).unwrap()), signal).unwrap();
    }

    async fn exit(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.leader.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < DEADLINE, "it stays");
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn until_children_left(&self) {
        let began = Instant::now();
        while self.children.iter().any(|pid| lives(*pid)) {
            assert!(began.elapsed() < DEADLINE, "children stay");
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

/// Whether a process runs. A zombie does not.
fn lives(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

impl Drop for Engine {
    fn drop(&mut self) {
        drop(self.leader.kill());
        drop(self.leader.wait());
        for pid in self.children {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
    }
}

#[tokio::test]
async fn an_idle_engine_and_its_tree_exit_on_sigterm() {
    let mut engine = Engine::start(&[]);
    assert!(engine.children.iter().all(|pid| lives(*pid)));
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.exit().await.code(), Some(0));
    engine.until_children_left().await;
}

#[tokio::test]
async fn children_survive_the_api_servers_sigkill() {
    let mut engine = Engine::start(&[]);
    engine.signal(Signal::SIGKILL);
    assert_eq!(engine.exit().await.code(), None);
    assert!(engine.children.iter().all(|pid| lives(*pid)));
    kill(Pid::from_raw(engine.children[0]), Signal::SIGTERM).unwrap();
    engine.until_children_left().await;
}

#[tokio::test]
async fn a_killed_engine_core_ends_the_engine_with_code_0() {
    let mut engine = Engine::start(&[]);
    kill(Pid::from_raw(engine.children[0]), Signal::SIGKILL).unwrap();
    assert_eq!(engine.exit().await.code(), Some(0));
    engine.until_children_left().await;
}

#[tokio::test]
async fn a_draining_engine_is_healthy_and_refuses_requests() {
    let mut engine = Engine::start(&["--shutdown-timeout=1", "--fault=stall-decode=3"]);
    let client = reqwest::Client::new();
    let body = serde_json::json!({"prompt": "x", "max_tokens": 50, "ignore_eos": true, "stream": true});
    let mut stream = client
        .post(engine.url("/v1/completions"))
        .json(&body)
        .send()
        .await
        .unwrap();
    let mut text = stream.chunk().await.unwrap().unwrap().to_vec();
    engine.signal(Signal::SIGTERM);
    let began = Instant::now();
    let refused = loop {
        assert!(began.elapsed() < DEADLINE, "it takes requests");
        let body = serde_json::json!({"prompt": "x", "max_tokens": 1});
        let answer = client
            .post(engine.url("/v1/completions"))
            .json(&body)
            .send()
            .await
            .unwrap();
        if answer.status() == 500 {
            break answer.text().await.unwrap();
        }
    };
    assert!(
        refused.contains("cannot schedule new futures after shutdown"),
        "{refused}"
    );
    assert_eq!(client.get(engine.url("/health")).send().await.unwrap().status(), 200);
    engine.signal(Signal::SIGTERM);
    while let Some(chunk) = stream.chunk().await.unwrap() {
        text.extend(chunk);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.contains("data: {\"error\":") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    assert_eq!(engine.exit().await.code(), Some(0));
}

#[tokio::test]
async fn shutdown_mode_abort_ends_streams_with_that_reason() {
    let mut engine = Engine::start(&["--fault=stall-decode=3"]);
    let body = serde_json::json!({"prompt": "x", "max_tokens": 50, "ignore_eos": true, "stream": true});
    let stream = reqwest::Client::new()
        .post(engine.url("/v1/completions"))
        .json(&body)
        .send();
    let mut stream = stream.await.unwrap();
    let mut text = stream.chunk().await.unwrap().unwrap().to_vec();
    engine.signal(Signal::SIGTERM);
    while let Some(chunk) = stream.chunk().await.unwrap() {
        text.extend(chunk);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.contains("\"finish_reason\":\"abort\"") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    assert_eq!(engine.exit().await.code(), Some(0));
}

#[tokio::test]
async fn process_faults_work_as_named() {
    let mut stubborn = Engine::start(&["--fault=ignore-sigterm"]);
    stubborn.signal(Signal::SIGTERM);
    let health = reqwest::get(stubborn.url("/health")).await.unwrap();
    assert_eq!(health.status(), 200);
    assert!(stubborn.leader.try_wait().unwrap().is_none());

    let mut abandoned = Engine::start(&["--fault=orphans"]);
    abandoned.signal(Signal::SIGTERM);
    assert_eq!(abandoned.exit().await.code(), Some(0));
    for pid in abandoned.children {
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    }
    assert!(abandoned.children.iter().all(|pid| lives(*pid)));
}

#[test]
fn a_failed_start_has_vllms_exit_code_and_message() {
    let cases = [
        (&["--fault=die-at=weights"][..], 1, "Engine core initialization failed"),
        (
            &["--kv-transfer-config={\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_both\",\"kv_rank\":0}"][..],
            2,
            "kv_rank",
        ),
        (
            &["--kv-transfer-config={\"kv_connector\":\"P2pNcclConnector\",\"kv_role\":\"kv_both\"}"][..],
            1,
            "P2pNcclConnector",
        ),
        (
            &["--no-enable-chunked-prefill", "--max-num-batched-tokens=2048"][..],
            1,
            "max_num_batched_tokens",
        ),
    ];
    for (arguments, code, words) in cases {
        let output = command(arguments).output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(code) && log.contains(words),
            "{arguments:?}: {:?} {log}",
            output.status
        );
    }
}
