//! A run of xpyd in a folder of its own: its commands, its ports, its processes.

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

/// Longest wait for anything. Only a defect waits it out: a machine with a load of 10 per core needs a minute for some steps.
pub(crate) const DEADLINE: Duration = Duration::from_mins(4);

/// The model of the simulated engines.
pub(crate) const MODEL: &str = "meta-llama/Llama-3.1-8B-Instruct";

/// Tokens of a completion whose length does not matter.
const TOKENS: usize = 12;

/// Every port base of the shipped profiles, but that tests move 8090, which is a multiple of 1100 and ten fleets below 9100.
const BASES: [u16; 10] = [5600, 5700, 6555, 7100, 7200, 7300, 7400, 7500, 8100, 9100];

/// Ports that a fleet takes from each base.
const WIDTH: u16 = 10;

/// A number to add to every port of a profile, so that fleets of tests that run at once do not meet, in this process or
/// another. It is taken as long as the socket lives, whose name says so to everyone on the machine.
fn free_port_offset() -> (u16, UnixListener) {
    // Below the ephemeral range of Linux, so that no outgoing connection is in the way. Bases are 100 apart, or 55,
    // so ten fleets fit between them, and no two bases are about a multiple of 1100 apart.
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

/// The signals that end a program on request.
const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Which of the signals that end a program a process ignores.
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

/// A signal that is ignored here, as in `nohup cargo test &`, in what scripts do in the background, and by Python (SIGXFSZ), would
/// be ignored by every program that the tests start. What is heard here instead is theirs to hear again.
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

/// A folder with everything of one test's runs in it.
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

    /// `xpyd ARGUMENTS` in this place, untouched by the environment of whoever runs the tests.
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

    /// Runs a command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("xpyd runs")
    }

    /// The arguments of `xpyd up` for simulated engines that take no time.
    pub(crate) fn up_arguments(&self, more: &[&str]) -> Vec<String> {
        let offset = format!("port_offset={}", self.offset);
        let fixed = ["up", "--engine", "sim", "--set", "sim.preset=instant", "--set", &offset];
        fixed
            .iter()
            .chain(more)
            .map(|argument| (*argument).to_owned())
            .collect()
    }

    /// Starts `xpyd up` with these arguments more.
    pub(crate) fn up(&self, more: &[&str]) -> Run<'_> {
        let arguments = self.up_arguments(more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Run::start(self, &arguments)
    }

    pub(crate) fn proxy_port(&self) -> u16 {
        9100 + self.offset
    }

    /// The key that xpyd made for the engines of the run `default`.
    pub(crate) fn engine_key(&self) -> String {
        let file = self.path().join("xpyd/default/engine-key");
        std::fs::read_to_string(file).expect("a key").trim_end().to_owned()
    }

    /// The text of a greedy completion by the first decode engine alone.
    pub(crate) fn alone(&self, model: &str, prompt: &str) -> String {
        self.alone_of(model, prompt, TOKENS)
    }

    /// The same of so many tokens.
    pub(crate) fn alone_of(&self, model: &str, prompt: &str, tokens: usize) -> String {
        let bearer = format!("Bearer {}", self.engine_key());
        completion_with(7200 + self.offset, model, prompt, tokens, &[("authorization", &bearer)])
    }

    /// Processes whose current folder is this place: xpyd, its shim, and everything that they started.
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

    /// Waits until no process of this place is left.
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

    /// A port of the place's fleet that somebody listens on.
    pub(crate) fn listener(&self) -> Option<u16> {
        BASES
            .iter()
            .flat_map(|base| (0..WIDTH).map(move |index| base + self.offset + index))
            .find(|port| std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).is_ok())
    }

    /// Nothing listens on any port of the place's fleet.
    pub(crate) fn assert_no_listener(&self) {
        assert_eq!(self.listener(), None, "something listens on this port");
    }

    /// A file of the newest run.
    pub(crate) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join("logs/latest").join(name)).unwrap_or_default()
    }
}

/// Asks again until the answer is `Ok`, with pauses that grow to a moment: a question is often a whole `xpyd status`, and asking
/// without a pause takes the CPU time from what is waited for.
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

/// An engine or a proxy that a test has started by itself, in a process group of its own. Dropping it ends the group: what an
/// engine has started outlives its leader otherwise, as with real ones.
pub(crate) struct Unsupervised(Child);

impl Unsupervised {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.process_group(0).spawn().expect("it starts"))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"))
    }

    /// What it prints to its standard error, which must be a pipe.
    pub(crate) fn stderr(&mut self) -> std::process::ChildStderr {
        self.0.stderr.take().expect("a pipe that nobody has taken")
    }
}

impl Drop for Unsupervised {
    fn drop(&mut self) {
        // A group that has ended is what was wanted.
        let _ = killpg(self.pid(), Signal::SIGKILL);
        drop(self.0.wait());
    }
}

/// A running `xpyd`, of which everything that it prints is read as it comes.
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

    /// A run of this command of the place's.
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

    /// Reads on until a line contains `text`.
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

    /// Waits until clients are served, by every engine: some of an attached fleet may join later on a busy machine.
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

    /// Kills xpyd, and waits until it has let everything go: its socket may be closed before its lock is.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("it ends");
    }

    /// Waits for the end and returns the exit code, and everything that was printed.
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

/// What `xpyd status --json` says about one engine.
pub(crate) fn engine(env: &TestEnv, name: &str) -> serde_json::Value {
    let output = env.run(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let engines = status["engines"].as_array().expect("a list").clone();
    let mut engines = engines.into_iter();
    engines.find(|engine| engine["id"] == name).expect("an engine")
}

/// SIGKILL to its leader.
pub(crate) fn kill_engine(env: &TestEnv, name: &str) {
    kill_process(engine(env, name)["pid"].as_i64().expect("a pid"));
}

/// SIGKILL to one process.
pub(crate) fn kill_process(pid: impl Into<i64>) {
    kill(
        Pid::from_raw(i32::try_from(pid.into()).expect("a pid")),
        Signal::SIGKILL,
    )
    .expect("it is there");
}

/// The sum of an engine's or the proxy's samples whose lines begin with `name` and contain `label`; there must be one.
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

/// Asks for the same greedy completion for as long as `work` goes on. Each answer must be that of a decode engine alone.
pub(crate) fn asking_meanwhile(env: &TestEnv, model: &str, work: impl FnOnce()) {
    /// Ends the asking also where the work fails.
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

/// An answer over HTTP: status and body.
pub(crate) fn post(port: u16, path: &str, body: &str) -> (u16, String) {
    post_with(port, path, body, &[])
}

/// As [`post`], with headers.
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

/// The body that a path answers.
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

/// The text of a greedy completion of so many tokens.
pub(crate) fn completion_of(port: u16, model: &str, prompt: &str, tokens: usize) -> String {
    completion_with(port, model, prompt, tokens, &[])
}

/// The same, asked for with headers.
pub(crate) fn completion_with(port: u16, model: &str, prompt: &str, tokens: usize, headers: &[(&str, &str)]) -> String {
    let body = serde_json::json!({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": tokens});
    let (status, text) = post_with(port, "/v1/completions", &body.to_string(), headers);
    assert_eq!(status, 200, "{text}");
    let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    answer["choices"][0]["text"].as_str().expect("a text").to_owned()
}
