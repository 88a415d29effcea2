//! Adding and draining engines of a serving fleet.

use nix::sys::signal::Signal;

use crate::support::{MODEL, TestEnv, metric, wait_for, with_requests_meanwhile};

fn scale(env: &TestEnv, counts: &[&str], expected: i32) -> String {
    let output = env.run(&[&["scale"], counts].concat());
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(expected), "{printed}");
    printed
}

fn states(env: &TestEnv) -> Vec<(String, String)> {
    let output = env.run(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let engines = status["engines"].as_array().expect("a list").iter();
    let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
    engines
        .map(|engine| (text(&engine["id"]), text(&engine["state"])))
        .collect()
}

/// The number of requests that an engine has finished.
fn finished(port: u16) -> f64 {
    metric(port, "vllm:request_success_total", "")
}

#[test]
fn engines_are_added_and_drained_without_losing_requests() {
    for connector in ["connector=nixl", "connector=lmcache"] {
        let env = TestEnv::new();
        let mut run = env.up(&["--profile", "1p1d", "--set", connector]);
        run.wait_until_ready();
        with_requests_meanwhile(&env, MODEL, || {
            scale(&env, &["decode=3", "prefill=2"], 0);
            let ready = |id: &str| (id.to_owned(), "ready".to_owned());
            let all = ["prefiller1", "prefiller2", "decoder1", "decoder2", "decoder3"];
            assert_eq!(states(&env), all.map(ready), "{connector}");
            wait_for("work for every engine", || {
                let ports = [7100, 7101, 7200, 7201, 7202].map(|base| base + env.offset);
                let counts = ports.map(finished);
                // Each added engine gets at most two canaries per peer.
                if counts.iter().all(|count| *count > 12.0) {
                    Ok(())
                } else {
                    Err(format!("{counts:?}"))
                }
            });
            let logs = env.run(&["logs", "decoder3"]);
            assert!(!logs.stdout.is_empty(), "its log is found by its name");

            scale(&env, &["decode=1"], 0);
            let stopped: Vec<String> = states(&env)
                .into_iter()
                .filter_map(|(id, state)| (state == "stopped").then_some(id))
                .collect();
            assert_eq!(stopped, ["decoder2", "decoder3"], "{connector}");
            // Drained engines are started again before new ones are added.
            scale(&env, &["decode=2"], 0);
            assert!(states(&env).contains(&ready("decoder2")));
        });
        run.signal(Signal::SIGINT);
        let (code, text) = run.end();
        assert_eq!(code, 0, "{text}");
        assert!(
            text.contains("decoder3 starts\n") && text.contains("decoder2 serves again"),
            "{text}"
        );
        assert_eq!(env.processes(), []);
        env.assert_no_listener();
    }
}

#[test]
fn impossible_scaling_is_refused_with_a_reason() {
    let env = TestEnv::new();
    let mut run = env.up(&["--profile", "1p1d"]);
    run.wait_until_ready();
    for (count, expected) in [
        ("decode=0", "needs at least 1 engine"),
        ("decode=65", "at most 64 engines"),
        ("decoder=2", "`decoder` is not a role"),
        ("decode", "expected ROLE=COUNT"),
    ] {
        assert!(scale(&env, &[count], 2).contains(expected), "{count}");
    }
    assert!(scale(&env, &["decode=1"], 0).contains("already"));
    // Another process has the port of the next decode engine.
    let taken = std::net::TcpListener::bind(("127.0.0.1", 7201 + env.offset)).expect("a free port");
    let printed = scale(&env, &["decode=2"], 1);
    assert!(printed.contains("is taken by process"), "{printed}");
    drop(taken);
    scale(&env, &["decode=2"], 0);
    run.signal(Signal::SIGINT);
    assert_eq!(run.end().0, 0);
}
