//! `xpyd bench` beyond one run, through the binary, against simulated servers. What is measured is not asserted.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::process::Output;

use serde_json::{Value, json};

use crate::support::Place;

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A detailed result whose requests take `first` seconds to their first token, give or take a tenth.
fn write_result(place: &Place, name: &str, first: f64, rate: f64) {
    let spread = |index: usize| first * (1.0 + (index * 37 % 20) as f64 / 100.0);
    let first_tokens: Vec<f64> = (0..120).map(spread).collect();
    let latencies: Vec<f64> = first_tokens.iter().map(|first| first + 0.1).collect();
    let result = json!({
        "backend": "vllm", "model_id": "m", "request_rate": rate, "duration": 2.0, "completed": 120, "failed": 0,
        "request_throughput": 60.0, "ttfts": first_tokens, "latencies": latencies, "output_lens": vec![11; 120],
        "itls": vec![vec![0.01; 10]; 120], "errors": vec![""; 120],
    });
    std::fs::write(place.path().join(name), result.to_string()).unwrap();
}

#[test]
fn two_saved_results_are_compared_without_a_server() {
    let place = Place::new();
    write_result(&place, "a.json", 0.2, 1.0);
    write_result(&place, "b.json", 0.1, 2.0);
    let output = place.run(&["bench", "--compare", "a.json", "b.json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let table = stdout(&output);
    let line = table.lines().find(|line| line.starts_with("Mean TTFT (ms)")).unwrap();
    assert!(line.contains("-50.0%") && line.ends_with("faster"), "{table}");
    assert!(table.contains("no difference seen"), "{table}");
    assert!(stderr(&output).contains("`request_rate` is 1.0 in the first and 2.0 in the second"));

    let output = place.run(&["bench", "--compare", "b.json", "a.json", "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["measures"]["p99_ttft_ms"]["verdict"], "slower");
    assert_eq!(document["a"]["file"], "b.json");
}

#[test]
fn what_cannot_be_compared_is_refused_with_the_file_and_a_hint() {
    let place = Place::new();
    write_result(&place, "a.json", 0.2, 1.0);
    std::fs::write(place.path().join("text.json"), "no JSON").unwrap();
    for (file, reason) in [("text.json", "it is not JSON"), ("none.json", "No such file")] {
        let output = place.run(&["bench", "--compare", "a.json", file]);
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(
            told.contains(&format!("cannot compare `{file}`")) && told.contains(reason) && told.contains("hint:"),
            "{told}"
        );
    }
    assert_eq!(place.run(&["bench", "--compare", "a.json"]).status.code(), Some(2));
}
