//! API keys of a fleet and of its engines: which requests are accepted, and that no file contains a key.

use nix::sys::signal::Signal;

use crate::support::{MODEL, Run, TestEnv, get, post, post_with};

/// A key of the engines and two keys of clients.
const ENGINE: &str = "swordfish-engine";
const FILED: &str = "swordfish-filed";
const VARIABLE: &str = "swordfish-variable";

/// The engines of both roles require [`ENGINE`], each configured in another way.
const ENGINES_REQUIRE_KEY: [&str; 4] = [
    "--set",
    "prefill.env={VLLM_API_KEY=\"swordfish-engine\"}",
    "--set",
    "decode.args=[\"--api-key\", \"another\", \"swordfish-engine\"]",
];

fn complete(port: u16, key: Option<&str>) -> (u16, String) {
    let body = serde_json::json!({"model": MODEL, "prompt": "one two", "max_tokens": 3}).to_string();
    let bearer = key.map(|key| format!("Bearer {key}"));
    let headers: Vec<(&str, &str)> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
    post_with(port, "/v1/completions", &body, &headers)
}

/// Checks that no file in the test environment contains a key of these tests.
fn assert_no_file_contains_a_key(env: &TestEnv, printed: &str) {
    let mut folders = vec![env.path().to_owned()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_none_or(|name| name != "keys")
                && let Ok(content) = std::fs::read(&path)
            {
                files += 1;
                let text = String::from_utf8_lossy(&content);
                assert!(!text.contains("swordfish"), "{} holds a key", path.display());
            }
        }
    }
    assert!(files > 5, "only {files} files were looked at");
    assert!(!printed.contains("swordfish"), "{printed}");
}

#[test]
fn engines_with_a_key_check_the_clients_key() {
    let env = TestEnv::new();
    let mut more = vec!["--profile", "1p1d"];
    more.extend(ENGINES_REQUIRE_KEY);
    let mut run = env.up(&more);
    run.wait_until_ready();
    let port = env.proxy_port();
    assert_eq!(complete(port, Some(ENGINE)).0, 200);
    let (status, body) = complete(port, None);
    assert_eq!(
        (status, body.as_str()),
        (401, r#"{"error":"Unauthorized"}"#),
        "the engine's own answer"
    );
    assert_eq!(complete(port, Some("wrong")).0, 401);
    let mut shown = String::from_utf8_lossy(&env.run(&["status", "--json"]).stdout).into_owned();
    for json in [&["--json"][..], &[]] {
        let arguments = [
            &["plan", "--engine", "sim", "--profile", "1p1d"],
            &ENGINES_REQUIRE_KEY[..],
            json,
        ]
        .concat();
        shown += &String::from_utf8_lossy(&env.run(&arguments).stdout);
    }
    assert!(shown.contains("<redacted>"), "{shown}");
    run.signal(Signal::SIGINT);
    let (_, printed) = run.end();
    assert_no_file_contains_a_key(&env, &(printed + &shown));
}

#[test]
fn proxy_keys_are_required_and_not_forwarded() {
    let env = TestEnv::new();
    std::fs::write(env.path().join("keys"), format!("# team a\n{FILED}\n")).expect("a file");
    let mut more = vec!["--profile", "1p1d", "--api-key-file", "keys"];
    more.extend(ENGINES_REQUIRE_KEY);
    let arguments = env.up_arguments(&more);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = env.command(&arguments);
    command.env("XPYD_API_KEY", VARIABLE);
    let mut run = Run::start_command(&env, command);
    run.wait_until_ready();
    let port = env.proxy_port();
    for key in [FILED, VARIABLE] {
        // The engines never see the clients' keys: the proxy sends their own.
        let (status, body) = complete(port, Some(key));
        assert_eq!(status, 200, "{body}");
    }
    for key in [None, Some(ENGINE), Some("wrong")] {
        let (status, body) = complete(port, key);
        let error: serde_json::Value = serde_json::from_str(&body).expect("an error is JSON");
        assert_eq!(
            (status, &error["error"]["code"], &error["error"]["type"]),
            (401, &"invalid_api_key".into(), &"invalid_request_error".into()),
            "{body}"
        );
    }
    assert_eq!(post(port, "/tokenize", "{}").0, 401);
    let metrics = get(port, "/metrics");
    assert!(metrics.contains("xpyd_requests_total"), "{metrics}");
    assert_eq!(get(port, "/health"), "");
    run.signal(Signal::SIGINT);
    let (_, printed) = run.end();
    assert_no_file_contains_a_key(&env, &printed);
}

#[test]
fn unusable_keys_are_refused_before_the_start() {
    let env = TestEnv::new();
    let file = |content: &str| std::fs::write(env.path().join("keys"), content).expect("a file");
    let refused = |arguments: &[&str], printed: &str| {
        let output = env.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(
            error.contains(printed) && error.contains("hint:") && !error.contains("swordfish"),
            "{error}"
        );
    };
    for verb in ["up", "proxy"] {
        let verb: &[&str] = if verb == "up" {
            &["up", "--engine", "sim"]
        } else {
            &["proxy", "--connector", "nixl"]
        };
        let arguments = [verb, &["--api-key-file", "keys"]].concat();
        refused(&[verb, &["--api-key-file", "nowhere"]].concat(), "nowhere");
        file("\n# none\n");
        refused(&arguments, "`keys` has no API key");
        file("sword fish swordfish");
        refused(&arguments, "line 1 is not a valid API key");
        file("\u{feff}# with a byte order mark\nsword-fish\nsword\u{a0}fish");
        refused(&arguments, "line 3 is not a valid API key");
    }
    let differ = [
        "up",
        "--engine",
        "sim",
        "--set",
        "prefill.args=[\"--api-key\", \"swordfish-a\"]",
        "--set",
        "decode.args=[\"--api-key\", \"swordfish-b\"]",
    ];
    refused(&differ, "prefiller1 and decoder1 have no API key in common");
}
