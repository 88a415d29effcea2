//! `xpyd bench` against failing servers and with impossible arguments: the errors and hints that a user sees.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Run, TestEnv};

/// After this number of requests the server no longer answers `/metrics`.
const REQUESTS_WITH_METRICS: usize = 1000;

/// The first segment of a request's path selects the server's behaviour.
struct Server {
    port: u16,
}

impl Server {
    /// Starts a server of the model `tiny`. It runs until the test process ends.
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(AtomicUsize::new(0));
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let requests = Arc::clone(&requests);
                // A client that disconnected gets no response.
                std::thread::spawn(move || serve(connection, &requests).ok());
            }
        });
        Self { port }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// Sends twelve concurrent requests to the path of this behaviour.
    fn bench(&self, env: &TestEnv, behaviour: &str, more: &[&str]) -> CommandOutput {
        let (base_url, endpoint) = (self.url(""), format!("/{behaviour}/v1/completions"));
        let fixed = [
            "bench",
            "--num-prompts",
            "12",
            "--random-input-len",
            "8",
            "--random-output-len",
            "4",
        ];
        let target = ["--base-url", &base_url, "--endpoint", &endpoint];
        CommandOutput::of(env, &[&fixed[..], &target, more].concat())
    }
}

fn serve(connection: TcpStream, requests: &AtomicUsize) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let (mut path, mut length) = (String::new(), 0);
    for (number, line) in reader.by_ref().lines().enumerate() {
        let line = line?.to_lowercase();
        if number == 0 {
            line.split(' ').nth(1).unwrap_or_default().clone_into(&mut path);
        } else if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        } else if line.is_empty() {
            break;
        }
    }
    reader.read_exact(&mut vec![0; length])?;
    if path == "/v1/models" {
        return respond(
            connection,
            "200 OK",
            "application/json",
            r#"{"data": [{"id": "tiny"}]}"#,
        );
    }
    if path == "/metrics" && requests.load(Ordering::Relaxed) >= REQUESTS_WITH_METRICS {
        reader.read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    if !path.ends_with("/completions") {
        return respond(connection, "404 Not Found", "text/plain", "");
    }
    let number = requests.fetch_add(1, Ordering::Relaxed);
    let error = |message: &str| format!(r#"{{"error": {{"message": "{message}"}}}}"#);
    let json = "application/json";
    match path.split('/').nth(1).unwrap_or_default() {
        "half" if number.is_multiple_of(4) => {
            let long = format!("request cmpl-{number:08x} was lost: {}", "because ".repeat(300));
            respond(connection, "500 Internal Server Error", json, &error(&long))
        }
        "half" if number % 4 == 1 => respond(
            connection,
            "503 Service Unavailable",
            json,
            &error("no engine is ready"),
        ),
        "busy" => respond(connection, "429 Too Many Requests", json, &error("slow down")),
        "guarded" => respond(connection, "401 Unauthorized", json, &error("who are you?")),
        "plain" => respond(connection, "200 OK", json, r#"{"choices": [{"text": "hello"}]}"#),
        "cut" => respond(
            connection,
            "200 OK",
            "text/event-stream",
            "data: {\"choices\":[{\"text\":\"a\"}]}\n\n",
        ),
        "mute" => {
            requests.fetch_add(REQUESTS_WITH_METRICS, Ordering::Relaxed);
            reader.read_to_end(&mut Vec::new())?;
            Ok(())
        }
        "hang" => {
            // The connection stays open until the client closes it.
            reader.read_to_end(&mut Vec::new())?;
            Ok(())
        }
        "late" if number > 2 => {
            reader.read_to_end(&mut Vec::new())?;
            Ok(())
        }
        "half" | "late" | "v1" => {
            let token = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n".repeat(4);
            let usage =
                "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":4}}\n\ndata: [DONE]\n\n";
            respond(connection, "200 OK", "text/event-stream", &(token + usage))
        }
        _ => respond(connection, "404 Not Found", json, r#"{"detail": "Not Found"}"#),
    }
}

fn respond(mut connection: TcpStream, status: &str, kind: &str, body: &str) -> std::io::Result<()> {
    let length = body.len();
    write!(
        connection,
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

/// Exit code, standard output and standard error of a finished command.
struct CommandOutput {
    code: i32,
    data: String,
    text: String,
}

impl CommandOutput {
    fn of(env: &TestEnv, arguments: &[&str]) -> Self {
        let output = env.run(arguments);
        Self {
            code: output.status.code().unwrap_or(-1),
            data: String::from_utf8(output.stdout).unwrap(),
            text: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    fn assert_output(&self, code: i32, texts: &[&str]) {
        assert_eq!(self.code, code, "{}", self.text);
        for text in texts {
            assert!(self.text.contains(text), "no `{text}` in:\n{}", self.text);
        }
    }

    /// The number in a row of the result table.
    #[track_caller]
    fn row(&self, label: &str) -> &str {
        let row = self.data.lines().find_map(|line| line.strip_prefix(label));
        row.unwrap_or_else(|| panic!("no `{label}` in:\n{}", self.data)).trim()
    }
}

#[test]
fn a_run_that_cannot_start_is_one_error_with_a_hint() {
    let (env, server) = (TestEnv::new(), Server::start());
    let bench = |arguments: &[&str]| CommandOutput::of(&env, &[&["bench", "--num-prompts", "2"], arguments].concat());
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    bench(&["--base-url", &nobody]).assert_output(
        2,
        &[
            "error: no answer from `http://127.0.0.1:",
            "\n  caused by: Connection refused",
            "\nhint: `xpyd up`",
        ],
    );
    let seen = bench(&["--base-url", &nobody]);
    assert_eq!(
        seen.text.matches("caused by").count(),
        1,
        "no layers of libraries: {}",
        seen.text
    );
    let url = server.url("");
    // A server can serve models that it does not list.
    bench(&["--base-url", &url, "--model", "tinny"]).assert_output(
        0,
        &[
            "warning: the server does not serve the model `tinny`",
            "hint: did you mean `--model tiny`?",
        ],
    );
    bench(&["--base-url", &url, "--model", "gpt-9"]).assert_output(0, &["hint: the server has `tiny`"]);
    bench(&["--base-url", &server.url("/nothing")]).assert_output(
        2,
        &["does not list the models", "hint: set `--base-url` without a path"],
    );
    bench(&["--base-url", url.trim_start_matches("http://")])
        .assert_output(2, &["hint: `--base-url http://127.0.0.1:"]);
    bench(&["--goodput", "tfft:500"]).assert_output(2, &["did you mean `ttft`?"]);
    bench(&["--base-url", &url, "--num-prompts", "0"]).assert_output(2, &["the number of prompts must be at least 1"]);
}

#[test]
fn a_base_url_can_end_in_v1() {
    let (env, server) = (TestEnv::new(), Server::start());
    let url = server.url("/v1/");
    let seen = CommandOutput::of(
        &env,
        &[
            "bench",
            "--base-url",
            &url,
            "--num-prompts",
            "3",
            "--random-input-len",
            "8",
        ],
    );
    seen.assert_output(0, &[]);
    assert_eq!(seen.row("Successful requests:"), "3");
}

#[test]
fn failures_are_grouped_by_cause_and_sorted_by_count() {
    let (env, server) = (TestEnv::new(), Server::start());
    let seen = server.bench(&env, "half", &[]);
    seen.assert_output(
        1,
        &[
            "3 of 12 requests failed: HTTP 500 Internal Server Error: request cmpl-",
            "3 of 12 requests failed: HTTP 503 Service Unavailable: no engine is ready",
            "hint: see the server's log",
        ],
    );
    assert!(seen.text.lines().all(|line| line.len() < 500), "{}", seen.text);
    assert_eq!(
        (seen.row("Successful requests:"), seen.row("Failed requests:")),
        ("6", "6")
    );
    let seen = server.bench(&env, "half", &["--allow-failures"]);
    seen.assert_output(0, &["3 of 12 requests failed: "]);
}

#[test]
fn each_failure_kind_has_its_own_hint() {
    let (env, server) = (TestEnv::new(), Server::start());
    let all_within = |timeout, behaviour, cause: &str, hint: &str| {
        let seen = server.bench(&env, behaviour, &["--request-timeout", timeout]);
        let cause = format!("12 of 12 requests failed: {cause}\n");
        seen.assert_output(1, &[&cause, hint, "no request was answered"]);
        assert_eq!(seen.row("Failed requests:"), "12");
    };
    let all = |behaviour, cause, hint| all_within("2m", behaviour, cause, hint);
    all(
        "busy",
        "HTTP 429 Too Many Requests: slow down",
        "hint: the server is overloaded (429): lower `--request-rate` or set `--max-concurrency",
    );
    all(
        "guarded",
        "HTTP 401 Unauthorized: who are you?",
        "hint: set the key in `OPENAI_API_KEY`",
    );
    all(
        "wrong",
        "HTTP 404 Not Found",
        "hint: the server has no route `/wrong/v1/completions`: set `--endpoint`",
    );
    all(
        "plain",
        "the answer is not an event stream, but application/json",
        "hint: requests ask for a stream",
    );
    all(
        "cut",
        "the stream ended early, without `[DONE]`",
        "hint: the server closed connections",
    );
    let cause = "the answer was not complete within 0.4 s";
    all_within("400ms", "hang", cause, "hint: increase `--request-timeout`");
}

#[test]
fn the_deadline_ends_a_run_on_a_hung_server() {
    let (env, server) = (TestEnv::new(), Server::start());
    let seen = server.bench(&env, "late", &["--deadline", "6s"]);
    seen.assert_output(
        1,
        &[
            "stopped: 3 requests ended, 9 were dropped in flight, 0 were never sent",
            "the run did not finish within `--deadline`",
        ],
    );
    assert_eq!(seen.row("Successful requests:"), "3");
}

/// A run whose server answers three requests and holds the others. Returns when the three have finished.
fn run_with_held_requests<'env>(env: &'env TestEnv, server: &Server) -> Run<'env> {
    let (base_url, page) = (server.url(""), env.path().join("page.html"));
    let mut run = Run::start(
        env,
        &[
            "bench",
            "--num-prompts",
            "12",
            "--random-input-len",
            "8",
            "--base-url",
            &base_url,
            "--endpoint",
            "/late/v1/completions",
            "--report",
            page.to_str().unwrap(),
        ],
    );
    run.wait_for_line("benchmark: 3/12 requests");
    run
}

#[test]
fn ctrl_c_prints_partial_results_and_says_so() {
    let (env, server) = (TestEnv::new(), Server::start());
    let run = run_with_held_requests(&env, &server);
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 130, "{text}");
    assert!(text.contains("Successful requests:                     3 "), "{text}");
    assert!(
        text.contains("stopped: 3 requests ended, 9 were dropped in flight, 0 were never sent"),
        "{text}"
    );
    let page = std::fs::read_to_string(env.path().join("page.html")).unwrap();
    assert!(
        page.contains("Stopped early") && page.contains("Every request"),
        "the page says so, too"
    );
}

#[test]
fn a_second_ctrl_c_exits_at_once() {
    let (env, server) = (TestEnv::new(), Server::start());
    let base_url = server.url("");
    let target = ["--base-url", &base_url, "--endpoint", "/mute/v1/completions"];
    let mut run = Run::start(
        &env,
        &[&["bench", "--num-prompts", "3", "--random-input-len", "8"][..], &target].concat(),
    );
    run.wait_for_line("benchmark: 0/3 requests");
    run.signal(Signal::SIGINT);
    // The run still asks for the server's metrics, which never arrive.
    run.wait_for_line("press Ctrl+C again to exit at once");
    run.signal(Signal::SIGINT);
    let (code, text) = run.end();
    assert_eq!(code, 130, "{text}");
    assert!(text.contains("exited without a result"), "{text}");
}

#[test]
fn a_report_from_a_saved_result_equals_the_runs() {
    let (env, server) = (TestEnv::new(), Server::start());
    let path = |name: &str| env.path().join(name).to_str().unwrap().to_owned();
    let saving = [
        "--save-result",
        "--save-detailed",
        "--result-filename",
        "saved.json",
        "--report",
    ];
    let seen = server.bench(&env, "half", &[&saving[..], &[&path("live.html")]].concat());
    seen.assert_output(1, &["report written to "]);
    let seen = CommandOutput::of(
        &env,
        &["bench", "--from", &path("saved.json"), "--report", &path("saved.html")],
    );
    seen.assert_output(0, &["report written to "]);
    let requests = |name: &str| -> Vec<(Value, Value, bool)> {
        let page = std::fs::read_to_string(path(name)).unwrap();
        let (_, data) = page.split_once("type=\"application/json\">").unwrap();
        let data: Value = serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap();
        let timeline = data.as_array().unwrap().iter().find(|chart| chart["rows"].is_array());
        let rows = timeline.unwrap()["rows"].as_array().unwrap().iter();
        rows.map(|row| (row["request"].clone(), row["output"].clone(), row["error"].is_string()))
            .collect()
    };
    let live = requests("live.html");
    assert_eq!(live.len(), 12);
    assert_eq!(live.iter().filter(|(_, _, failed)| *failed).count(), 6);
    assert_eq!(live, requests("saved.html"));
    CommandOutput::of(
        &env,
        &["bench", "--from", &path("live.html"), "--report", &path("x.html")],
    )
    .assert_output(
        2,
        &[
            "error: cannot make a report of `",
            "is not a result of",
            "hint: `xpyd bench --save-result --save-detailed`",
        ],
    );
    CommandOutput::of(
        &env,
        &["bench", "--from", &path("nothing.json"), "--report", &path("x.html")],
    )
    .assert_output(2, &["nothing.json"]);
    CommandOutput::of(&env, &["bench", "--from", &path("saved.json")]).assert_output(2, &["--report"]);
}
