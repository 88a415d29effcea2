//! `xpyd bench` on simulated fleets: the stages of the time to first token, and whether KV was transferred. Durations are not
//! asserted, only that the stages add up.
#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use serde_json::Value;

use crate::support::TestEnv;

/// The JSON result of a run, and what it printed to standard error.
fn bench(env: &TestEnv, more: &[&str]) -> (Value, String) {
    let recipe = [
        "bench",
        "--json",
        "--random-input-len",
        "320",
        "--random-output-len",
        "4",
        "--request-rate",
        "inf",
        "--max-concurrency",
        "1",
    ];
    let output = env.run(&[&recipe[..], more].concat());
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{printed}");
    (serde_json::from_slice(&output.stdout).unwrap(), printed)
}

fn stage<'run>(report: &'run Value, name: &str) -> Option<&'run Value> {
    let stages = report["xpyd"]["where"]["stages"].as_array().unwrap();
    stages.iter().find(|stage| stage["stage"] == name)
}

/// The top-level stages, without the total.
fn sum_of_stages(report: &Value) -> f64 {
    let stages = report["xpyd"]["where"]["stages"].as_array().unwrap();
    let top = stages
        .iter()
        .filter(|stage| stage["is_part"] == false && stage["stage"] != "ttft");
    top.map(|stage| stage["mean_ms"].as_f64().unwrap()).sum()
}

#[test]
fn stages_add_up_to_the_clients_time_to_first_token() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "2p2d", "--connector", "nixl", "--set", "sim.preset=brisk"]);
    run.wait_until_ready();
    let (report, printed) = bench(&env, &["--num-prompts", "8"]);
    let seen = report["mean_ttft_ms"].as_f64().unwrap();
    let sum = sum_of_stages(&report);
    assert!((sum - seen).abs() < 0.01 * seen, "{sum} against {seen}: {report}");
    for part in [
        "prefill_queue",
        "prefill_compute",
        "kv_transfer",
        "decode_queue",
        "first_step",
    ] {
        let stage = stage(&report, part).unwrap_or_else(|| panic!("{part} in {report}"));
        assert_eq!(
            (&stage["is_part"], &stage["p50_ms"]),
            (&Value::Bool(true), &Value::Null)
        );
    }
    let place_of_time = &report["xpyd"]["where"];
    let pairs = place_of_time["pairs"].as_array().unwrap();
    let requests: u64 = pairs.iter().map(|pair| pair["requests"].as_u64().unwrap()).sum();
    assert_eq!(
        (requests, place_of_time["cold"]["requests"].as_u64().unwrap()),
        (8, pairs.len() as u64)
    );
    let remote = &place_of_time["remote_kv"];
    assert_eq!(
        (&remote["used"], &remote["is_counted_by_engines"]),
        (&8.into(), &true.into()),
        "{remote}"
    );
    assert!(report["xpyd"]["gpus"].is_null() || !report["xpyd"]["gpus"]["each"].as_array().unwrap().is_empty());
    for line in [
        "STAGE",
        "prefill compute",
        "prefiller1 → ",
        "without the first request of each pair",
        "8 of 8 requests used remote KV",
    ] {
        assert!(printed.contains(line), "{line} in {printed}");
    }
    assert!(
        !printed.contains("used remote KV, according to the decode engines:"),
        "{printed}"
    );
}

#[test]
fn engines_with_request_traces_give_stage_percentiles() {
    let env = TestEnv::new();
    let settings = ["--profile", "1p1d", "--connector", "nixl", "--set", "sim.preset=brisk"];
    let mut run = env.up(&[
        &settings[..],
        &["--set", r#"vllm.args=["--enable-per-request-metrics"]"#],
    ]
    .concat());
    run.wait_until_ready();
    let (report, _) = bench(&env, &["--num-prompts", "4"]);
    for part in ["prefill_queue", "prefill_compute", "first_step"] {
        assert!(
            stage(&report, part).unwrap()["p99_ms"].is_number(),
            "{part} in {report}"
        );
    }
}

#[test]
fn recomputed_prompts_are_reported() {
    let env = TestEnv::new();
    let faults = r#"sim.faults=["fail-transfer=3"]"#;
    let mut run = env.up(&["--profile", "1p1d", "--connector", "nixl", "--set", faults]);
    run.wait_until_ready();
    let (report, printed) = bench(&env, &["--num-prompts", "6"]);
    let remote = &report["xpyd"]["where"]["remote_kv"];
    // Every third transfer fails. Two transfers belong to the canary, and requests that free unused KV count as well.
    let (used, recomputed) = (remote["used"].as_u64().unwrap(), remote["recomputed"].as_u64().unwrap());
    assert!(recomputed >= 2 && used + recomputed == 6, "{remote}");
    let warning = format!("warning: only {used} of 6 requests used remote KV");
    assert!(printed.contains(&warning), "{printed}");
}

#[test]
fn bypassed_handoffs_are_reported_with_the_reason() {
    let env = TestEnv::new();
    let mut run = env.up(&[
        "--profile",
        "1p1d",
        "--connector",
        "nixl",
        "--set",
        "proxy.routing.prefill_threshold=100000",
    ]);
    run.wait_until_ready();
    let (report, printed) = bench(&env, &["--num-prompts", "3"]);
    assert_eq!(report["xpyd"]["where"]["remote_kv"]["used"], 0);
    assert!(
        printed.contains("only 0 of 3 requests used remote KV") && printed.contains("3 bypassed (prefill_threshold)"),
        "{printed}"
    );
    assert!(
        stage(&report, "prefill").is_none() && stage(&report, "decode").is_some(),
        "{report}"
    );
}
