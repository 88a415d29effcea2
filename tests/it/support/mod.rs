//! The environment of a test: its own folder, ports and processes, and commands of xpyd in it.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::signal::unix::SignalKind;

/// The longest wait for anything. Only a defect reaches it: with a load of 10 per core, some steps take a minute.
pub(crate) const DEADLINE: Duration = Duration::from_mins(4);

/// The model of the simulated engines.
pub(crate) const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// The length in tokens of a completion whose length does not matter.
const TOKENS: usize = 12;

/// Every port base of the shipped profiles, except 8090, which tests move: it is a multiple of 1100 plus ten fleets below 9100.
const BASES: [u16; 10] = [5600, 5700, 6555, 7100, 7200, 7300, 7400, 7500, 8100, 9100];

/// The number of ports that a fleet uses from each base.
const WIDTH: u16 = 10;

/// A free port offset for the fleets of one test, unique among all tests on this machine. It is reserved as long as the
/// abstract socket lives, whose name contains it.
fn free_port_offset() -> (u16, UnixListener) {
    // The ports are below the ephemeral range of Linux, so that no outgoing connection uses them. Bases are 100 or 55 apart, so
    // ten fleets fit between them, and no two bases differ by about a multiple of 1100.
    for turn in 0..170 {
        let offset = (turn % 10) * WIDTH + (turn / 10) * 1100 + 4000;
        let name = SocketAddr::from_abstract_name(format!("xpyd-tests/{offset}")).expect("a name");
        let Ok(taken) = UnixListener::bind_addr(&name) else {
            continue;
        };
        let free = BASES.iter().all(|base| {
            (0..WIDTH).all(|index| TcpListener::bind((Ipv4Addr::LOCALHOST, base + offset + index)).is_ok())
        });
        if free {
            return (offset, taken);
        }
    }
    panic!("no free ports");
}

/// The signals that ask a program to end.
const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// The signals of [`ENDING`] that a process ignores.
pub(crate) fn ignored(pid: i32) -> Vec<Signal> {
    ignored_of(pid, &ENDING)
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
pub(crate) fn hear_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let _inside = runtime.as_ref().expect("a runtime").enter();
        let all = [&ENDING[..], &[Signal::SIGXFSZ]].concat();
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
        hear_signals();
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
    pub(crate) fn alone(&self, model: &str, prompt: &str) -> String {
        self.alone_of(model, prompt, TOKENS)
    }

    /// The same, with this number of tokens.
    pub(crate) fn alone_of(&self, model: &str, prompt: &str, tokens: usize) -> String {
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
        wait_for("an empty place", || {
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
        BASES
            .iter()
            .flat_map(|base| (0..WIDTH).map(move |index| base + self.offset + index))
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

/// Calls `ask` until it returns `Ok`, with pauses that grow to 100 ms. A call is often a whole `xpyd status`, and calls without
/// a pause would take CPU time from the process that is waited for.
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let (_never, pause) = mpsc::channel::<()>();
    let began = std::time::SystemTime::now();
    let mut wait = Duration::from_millis(5);
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(state) => assert!(
                began.elapsed().is_ok_and(|elapsed| elapsed < DEADLINE),
                "waited too long for {what}: {state}"
            ),
        }
        assert!(pause.recv_timeout(wait).is_err(), "nobody sends");
        wait = (wait * 2).min(Duration::from_millis(100));
    }
}

/// Waits until `condition` holds, on the test's runtime.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "waited too long until {what}");
        tokio::task::yield_now().await;
        tokio::time::timeout(Duration::from_millis(5), std::future::pending::<()>())
            .await
            .expect_err("it never ends");
    }
}

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
        self.0.stderr.take().expect("a pipe that nobody has taken")
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
        Self::of(env, env.command(arguments))
    }

    /// Starts this command of the test environment.
    pub(crate) fn of(env: &'env TestEnv, mut command: Command) -> Self {
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

/// Sends SIGKILL to one process.
pub(crate) fn kill_process(pid: impl Into<i64>) {
    kill(
        Pid::from_raw(i32::try_from(pid.into()).expect("a pid")),
        Signal::SIGKILL,
    )
    .expect("it is there");
}

/// The sum of the samples on `/metrics` whose lines start with `name` and contain `label`. There must be at least one.
pub(crate) fn metric(port: u16, name: &str, label: &str) -> f64 {
    let metrics = get(port, "/metrics");
    let lines = metrics
        .lines()
        .filter(|line| line.starts_with(name) && line.contains(label));
    let samples = lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()));
    let samples: Option<Vec<f64>> = samples.collect();
    let samples = samples.filter(|samples| !samples.is_empty());
    samples
        .unwrap_or_else(|| panic!("no `{name}` in {metrics}"))
        .iter()
        .sum()
}

/// Sends the same greedy completion while `work` runs. Each response must equal that of a decode engine alone.
pub(crate) fn asking_meanwhile(env: &TestEnv, model: &str, work: impl FnOnce()) {
    /// Ends the requests, also if `work` panics.
    struct Done<'flag>(&'flag AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (done, port) = (AtomicBool::new(false), env.proxy_port());
    let alone = env.alone(model, "once");
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(completion(port, model, "once"), alone);
            }
        });
        let ending = Done(&done);
        work();
        drop(ending);
        client.join().expect("every answer is right");
    });
}

/// Posts JSON, and returns status and body of the response.
pub(crate) fn post(port: u16, path: &str, body: &str) -> (u16, String) {
    post_with(port, path, body, &[])
}

/// Like [`post`], with headers.
pub(crate) fn post_with(port: u16, path: &str, body: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let client = client();
    let mut request = client
        .post(url(port, path))
        .header("content-type", "application/json")
        .body(body.to_owned());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    answer(request)
}

/// The response body of a GET.
pub(crate) fn get(port: u16, path: &str) -> String {
    answer(client().get(url(port, path))).1
}

fn url(port: u16, path: &str) -> String {
    format!("http://127.0.0.1:{port}{path}")
}

fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .timeout(DEADLINE)
        .build()
        .expect("a client")
}

fn answer(request: reqwest::RequestBuilder) -> (u16, String) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let answer = request.send().await.expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    })
}

/// The text of a greedy completion.
pub(crate) fn completion(port: u16, model: &str, prompt: &str) -> String {
    completion_of(port, model, prompt, TOKENS)
}

/// The text of a greedy completion of this number of tokens.
pub(crate) fn completion_of(port: u16, model: &str, prompt: &str, tokens: usize) -> String {
    completion_with(port, model, prompt, tokens, &[])
}

/// The same, with request headers.
pub(crate) fn completion_with(port: u16, model: &str, prompt: &str, tokens: usize, headers: &[(&str, &str)]) -> String {
    let body = serde_json::json!({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": tokens});
    let (status, text) = post_with(port, "/v1/completions", &body.to_string(), headers);
    assert_eq!(status, 200, "{text}");
    let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    answer["choices"][0]["text"].as_str().expect("a text").to_owned()
}
