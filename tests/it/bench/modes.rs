//! Modes of `xpyd bench`: compare, sweep, rate search, two servers, own fleet. Measured values are not asserted.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::process::Output;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Run, TestEnv};

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A detailed result whose times to first token are `first` seconds, plus or minus 10 %.
fn write_result(env: &TestEnv, name: &str, first: f64, rate: f64) {
    let spread = |index: usize| first * (1.0 + (index * 37 % 20) as f64 / 100.0);
    let first_tokens: Vec<f64> = (0..120).map(spread).collect();
    let latencies: Vec<f64> = first_tokens.iter().map(|first| first + 0.1).collect();
    let result = json!({
        "backend": "vllm", "model_id": "m", "request_rate": rate, "duration": 2.0, "completed": 120, "failed": 0,
        "request_throughput": 60.0, "ttfts": first_tokens, "latencies": latencies, "output_lens": vec![11; 120],
        "itls": vec![vec![0.01; 10]; 120], "errors": vec![""; 120],
    });
    std::fs::write(env.path().join(name), result.to_string()).unwrap();
}

#[test]
fn two_saved_results_are_compared_without_a_server() {
    let env = TestEnv::new();
    write_result(&env, "a.json", 0.2, 1.0);
    write_result(&env, "b.json", 0.1, 2.0);
    let output = env.run(&["bench", "--compare", "a.json", "b.json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let table = stdout(&output);
    let line = table.lines().find(|line| line.starts_with("Mean TTFT (ms)")).unwrap();
    assert!(line.contains("-50.0%") && line.ends_with("faster"), "{table}");
    assert!(table.contains("no difference seen"), "{table}");
    assert!(stderr(&output).contains("`request_rate` is 1.0 in the first and 2.0 in the second"));

    let output = env.run(&["bench", "--compare", "b.json", "a.json", "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["measures"]["p99_ttft_ms"]["verdict"], "slower");
    assert_eq!(document["a"]["file"], "b.json");
}

#[test]
fn incomparable_results_are_refused_with_file_and_hint() {
    let env = TestEnv::new();
    write_result(&env, "a.json", 0.2, 1.0);
    std::fs::write(env.path().join("text.json"), "no JSON").unwrap();
    for (file, reason) in [("text.json", "the file is not JSON"), ("none.json", "No such file")] {
        let output = env.run(&["bench", "--compare", "a.json", file]);
        let printed = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{printed}");
        assert!(
            printed.contains(&format!("cannot compare `{file}`"))
                && printed.contains(reason)
                && printed.contains("hint:"),
            "{printed}"
        );
    }
    assert_eq!(env.run(&["bench", "--compare", "a.json"]).status.code(), Some(2));
}

/// Runs a benchmark of short requests on the fleet of the test environment.
fn bench(env: &TestEnv, more: &[&str]) -> Output {
    let fixed = [
        "bench",
        "--random-input-len",
        "16",
        "--random-output-len",
        "4",
        "--vocab-size",
        "1000",
    ];
    env.run(&fixed.iter().chain(more).copied().collect::<Vec<_>>())
}

#[test]
fn a_sweep_runs_and_reports_every_point() {
    let env = TestEnv::new();
    let mut fleet = env.up(&[]);
    fleet.wait_until_ready();
    let output = bench(
        &env,
        &[
            "--sweep",
            "concurrency=1,2..4x2",
            "--num-prompts",
            "6",
            "--seed",
            "5",
            "--json",
        ],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let points = document["points"].as_array().unwrap();
    let asked: Vec<_> = points
        .iter()
        .map(|point| point["result"]["max_concurrency"].clone())
        .collect();
    assert_eq!(asked, [1, 2, 4]);
    assert!(points.iter().all(|point| point["result"]["completed"] == 6));
    let mut seeds: Vec<_> = points.iter().map(|point| point["seed"].as_u64().unwrap()).collect();
    seeds.dedup();
    assert_eq!((seeds[0], seeds.len()), (5, 3));

    let output = bench(
        &env,
        &[
            "--sweep",
            "rate=20,40",
            "--num-prompts",
            "5",
            "--goodput",
            "ttft:60000",
            "--save-result",
        ],
    );
    let table = stdout(&output);
    assert_eq!(table.lines().count(), 3, "{table}{}", stderr(&output));
    let saved = std::fs::read_dir(env.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let saved: Vec<String> = saved.filter(|name| name.starts_with("sweep-")).collect();
    assert_eq!(saved.len(), 1);
    let refused = env.run(&["bench", "--compare", &saved[0], &saved[0]]);
    assert!(
        stderr(&refused).contains("the result of `--sweep`"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn a_search_reports_its_probes_and_best_bound_at_timeout() {
    let env = TestEnv::new();
    let mut fleet = env.up(&[]);
    fleet.wait_until_ready();
    let search = ["--find-max", "--request-rate", "100", "--max-time", "3s", "--seed", "5"];
    let output = bench(&env, &[&search[..], &["--goodput", "e2el:60000", "--json"]].concat());
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["objectives"], json!({"e2el": 60000.0}));
    let probes = document["probes"].as_array().unwrap();
    // The rate and the number of probes depend on the machine.
    assert!(
        probes
            .iter()
            .all(|probe| probe["good"] == 1.0 && probe["verdict"] != "fail"),
        "{document}"
    );
    assert_eq!(document["rate"].is_number(), output.status.success(), "{document}");

    let output = bench(&env, &[&search[..], &["--goodput", "e2el:0"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stdout(&output).contains("even a single request at an idle server misses e2el:0"));
}

#[test]
fn compared_servers_get_the_same_requests() {
    let env = TestEnv::new();
    let mut fleet = env.up(&[]);
    fleet.wait_until_ready();
    let url = format!("http://127.0.0.1:{}", env.proxy_port());
    let output = bench(
        &env,
        &["--against", &url, "--num-prompts", "10", "--json", "--save-detailed"],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["pairs"], 10);
    let blocks = document["blocks"].as_array().unwrap();
    assert!(!blocks.is_empty(), "{document}");
    for block in blocks {
        assert_eq!(block["a"]["input_lens"], block["b"]["input_lens"]);
        assert_eq!(block["a"]["xpyd"]["seed"], block["b"]["xpyd"]["seed"]);
        // Both URLs are the same server, so equal prompts have equal answers.
        assert_eq!(block["a"]["output_lens"], block["b"]["output_lens"]);
    }
    assert!(document["measures"]["mean_ttft_ms"]["interval"].is_array());
}

#[test]
fn conflicting_flags_are_refused() {
    let env = TestEnv::new();
    let url = ["--base-url", "http://127.0.0.1:1"];
    for (flags, reason) in [
        (&["--sweep", "rate=1", "--find-max"][..], "cannot be used with"),
        (&["--sweep", "qps=1"], "a sweep is written"),
        (&["--sweep", "rate=1", "--request-rate", "2"], "both decide the rate"),
        (&["--sweep", "rate=1", "--append-result"], "`--append-result`"),
        (&["--find-max"], "needs objectives"),
        (
            &["--find-max", "--goodput", "ttft:1", "--max-concurrency", "1"],
            "`--max-concurrency`",
        ),
        (&["--attainment", "0.9"], "--find-max"),
        (
            &["--find-max", "--goodput", "ttft:1", "--attainment", "99"],
            "between 0 and 1",
        ),
        (&["--set", "a=b"], "cannot be used with"),
    ] {
        let output = bench(&env, &[&url[..], flags].concat());
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(reason), "{flags:?}: {}", stderr(&output));
    }
    let output = bench(&env, &["--profile", "--num-prompts", "3"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("needs the name of a profile"),
        "{}",
        stderr(&output)
    );
}

/// The flags with which the bench starts its own fleet on the ports of the test environment.
fn own_fleet(env: &TestEnv) -> Vec<String> {
    let offset = format!("port_offset={}", env.offset);
    let flags = [
        "--profile",
        "2p2d",
        "--engine",
        "sim",
        "--preset",
        "instant",
        "--set",
        &offset,
    ];
    flags.map(str::to_owned).to_vec()
}

#[test]
fn bench_can_start_and_stop_its_own_fleet() {
    let env = TestEnv::new();
    let fleet = own_fleet(&env);
    let fleet: Vec<&str> = fleet.iter().map(String::as_str).collect();
    let output = bench(&env, &[&fleet[..], &["--num-prompts", "5", "--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["completed"], 5);
    env.wait_until_empty();
    env.assert_no_listener();

    // Impossible arguments start no fleet.
    let output = bench(&env, &[&fleet[..], &["--find-max"]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(!stderr(&output).contains("starting"), "{}", stderr(&output));
    let output = bench(&env, &["--profile", "nothing"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn an_interrupted_or_killed_bench_leaves_no_fleet() {
    let env = TestEnv::new();
    for end in [Signal::SIGINT, Signal::SIGKILL] {
        let fleet = own_fleet(&env);
        let mut arguments: Vec<&str> = vec!["bench", "--num-prompts", "100000", "--request-rate", "10"];
        arguments.extend([
            "--sweep",
            "concurrency=1,2",
            "--random-input-len",
            "16",
            "--vocab-size",
            "1000",
        ]);
        arguments.extend(fleet.iter().map(String::as_str));
        let mut bench = Run::start(&env, &arguments);
        bench.wait_for_line("point 1 of 2:");
        bench.signal(end);
        let (code, printed) = bench.end();
        if end == Signal::SIGINT {
            assert_eq!(code, 130, "{printed}");
            assert!(printed.contains("stopped: interrupted"), "{printed}");
        }
        env.wait_until_empty();
        env.assert_no_listener();
    }
}
