//! Hugging Face: refusals, slow and broken responses, and one download of a model for all engines.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::fake_hub::{FakeHub, Reply, SeenRequest};
use crate::support::{Run, TestEnv};

const TOKEN: &str = "hf_abcdefghijklmnopqrstuvwx";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MODEL: &str = "org/model";

/// Git's hash of `{}`, as printed by `git hash-object`.
const CONFIG_HASH: &str = "9e26dfeeb6e641a33dae4961196235bdb965b21b";

/// Git's hash of an empty file.
const EMPTY_HASH: &str = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391";

/// A weights file of 300 kB with varying bytes.
fn weights() -> Vec<u8> {
    (0..300_000_u32)
        .map(|number| u8::try_from(number % 251).expect("a byte"))
        .collect()
}

/// The hash that the hub uses for a large file.
fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().fold(String::new(), |mut text, byte| {
        use std::fmt::Write;
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The hub's responses about a public repository. The caller serves the files.
fn open_hub(request: &SeenRequest) -> Option<Reply> {
    let path = request.path.split('?').next().unwrap_or_default();
    let listing = serde_json::json!([
        {"type": "file", "path": "config.json", "oid": CONFIG_HASH, "size": 2},
        {"type": "file", "path": "tokenizer.json", "oid": EMPTY_HASH, "size": 0},
        {"type": "file", "path": "pytorch_model.bin", "oid": EMPTY_HASH, "size": 0},
        {"type": "directory", "path": "original", "oid": EMPTY_HASH, "size": 0},
        {"type": "file", "path": "model.safetensors", "oid": EMPTY_HASH, "size": 135,
         "lfs": {"oid": sha256(&weights()), "size": 300_000, "pointerSize": 135}},
    ]);
    Some(match path {
        "/api/whoami-v2" => Reply::json(r#"{"name": "ada"}"#),
        "/api/models/org/model/revision/main" => Reply::json(&format!(r#"{{"sha": "{COMMIT}"}}"#)),
        _ if path == format!("/api/models/org/model/tree/{COMMIT}") => Reply::json(&listing.to_string()),
        "/org/model/resolve/main/config.json" => Reply::status(200),
        _ if path == format!("/org/model/resolve/{COMMIT}/config.json") => Reply::file(b"{}", request),
        _ => return None,
    })
}

fn is_weights(request: &SeenRequest) -> bool {
    request.path == format!("/org/model/resolve/{COMMIT}/model.safetensors")
}

/// A folder that looks like an environment with vLLM: `vllm serve` runs the simulated engine, and `python` reports packages.
fn environment(env: &TestEnv) -> PathBuf {
    let bin = env.path().join("env/bin");
    std::fs::create_dir_all(&bin).expect("a folder");
    let found = serde_json::json!({
        "python": "3.12.3",
        "packages": {"vllm": "0.32.0", "nixl": "1.5.1", "torch": "2.13.0"},
        "options": [], "connectors": ["NixlConnector"],
    });
    let xpyd = env!("CARGO_BIN_EXE_xpyd");
    script(&bin.join("python"), &format!("cat <<'END'\n{found}\nEND"));
    script(&bin.join("vllm"), &format!("shift\nexec {xpyd} sim \"$@\""));
    bin.join("vllm")
}

fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a file");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a mode");
}

/// `xpyd ARGUMENTS` for the model of this hub, in an environment without a GPU.
fn command(env: &TestEnv, hub: &FakeHub, verb: &[&str]) -> Command {
    let program = format!("vllm.program={}", environment(env).display());
    let offset = format!("port_offset={}", env.offset);
    let fixed = [
        "--profile",
        "cpu-1p1d",
        "--model",
        MODEL,
        "--set",
        &program,
        "--set",
        &offset,
    ];
    let arguments: Vec<&str> = verb.iter().copied().chain(fixed).collect();
    let mut command = env.command(&arguments);
    command.env("HF_ENDPOINT", hub.url()).env("HF_TOKEN", TOKEN);
    command
}

/// The exit code of `xpyd doctor`, and its finding of this check.
fn finding(command: &mut Command, check: &str) -> (i32, Value) {
    let output = command.arg("--json").output().expect("xpyd runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        !text.contains(TOKEN) && !String::from_utf8_lossy(&output.stderr).contains(TOKEN),
        "{text}"
    );
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text} {output:?}"));
    let findings = report["findings"].as_array().expect("a list").clone();
    let found = findings.iter().find(|finding| finding["check"] == check).cloned();
    let found = found.unwrap_or_else(|| panic!("no {check} in {text}"));
    (output.status.code().unwrap_or(-1), found)
}

fn doctor(env: &TestEnv, hub: &FakeHub, check: &str) -> (i32, Value) {
    finding(&mut command(env, hub, &["doctor"]), check)
}

fn refusing_hub(status: u16, code: &'static str) -> FakeHub {
    FakeHub::start(move |request| match request.path.as_str() {
        "/api/whoami-v2" => Reply::json(r#"{"name": "ada"}"#),
        _ => Reply::status(status).header("x-error-code", code),
    })
}

#[test]
fn an_unaccepted_licence_is_reported_with_its_page() {
    let (env, hub) = (TestEnv::new(), refusing_hub(403, "GatedRepo"));
    let (code, found) = doctor(&env, &hub, "hf_access");
    assert_eq!((code, &found["level"]), (3, &"fail".into()), "{found}");
    let hint = found["hint"].as_str().expect("a hint");
    assert!(hint.contains(&format!("{}/{MODEL}", hub.url())), "{hint}");
}

#[test]
fn a_gated_model_without_a_token_asks_for_one() {
    let (env, hub) = (TestEnv::new(), refusing_hub(401, "GatedRepo"));
    let mut doctor = command(&env, &hub, &["doctor"]);
    let (code, found) = finding(doctor.env_remove("HF_TOKEN"), "hf_access");
    assert_eq!(code, 3, "{found}");
    assert!(
        found["message"]
            .as_str()
            .is_some_and(|text| text.contains("there is no Hugging Face token")),
        "{found}"
    );
}

#[test]
fn a_rejected_token_is_named_by_its_source() {
    let hub =
        FakeHub::start(|_| Reply::status(401).header("x-error-message", "Invalid credentials in Authorization header"));
    let env = TestEnv::new();
    let (code, found) = doctor(&env, &hub, "hf_token");
    assert_eq!(code, 3, "{found}");
    assert_eq!(
        found["message"],
        "Hugging Face does not accept the token in HF_TOKEN: it is wrong, expired or revoked"
    );
    let mut from_file = command(&env, &hub, &["doctor"]);
    std::fs::create_dir_all(env.path().join("huggingface")).expect("a folder");
    std::fs::write(env.path().join("huggingface/token"), TOKEN).expect("a file");
    let (_, found) = finding(from_file.env_remove("HF_TOKEN"), "hf_token");
    assert!(
        found["message"]
            .as_str()
            .is_some_and(|text| text.contains("huggingface/token")),
        "{found}"
    );
}

#[test]
fn an_unknown_model_suggests_cached_ones() {
    let (env, hub) = (TestEnv::new(), refusing_hub(404, "RepoNotFound"));
    std::fs::create_dir_all(env.path().join("huggingface/hub/models--org--models")).expect("a folder");
    let (code, found) = doctor(&env, &hub, "hf_access");
    assert_eq!(code, 3, "{found}");
    assert_eq!(
        found["hint"],
        "did you mean `org/models`, which is cached? `--model org/models`"
    );
}

#[test]
fn an_unavailable_hub_does_not_fail_the_check() {
    let env = TestEnv::new();
    for (hub, words) in [
        (refusing_hub(429, ""), "limits the requests"),
        (refusing_hub(503, ""), "status 503"),
        (
            FakeHub::start(|_| Reply::status(200).after(Duration::from_mins(1))),
            "timeout",
        ),
    ] {
        let (code, found) = doctor(&env, &hub, "hf_access");
        assert_eq!((code, &found["level"]), (0, &"warn".into()), "{found}");
        assert!(
            found["message"].as_str().is_some_and(|text| text.contains(words)),
            "{words}: {found}"
        );
    }
    let away = FakeHub::start(|_| Reply::status(200)).stopped();
    let (code, found) = doctor(&env, &away, "hf_access");
    assert_eq!(code, 0);
    assert!(
        found["message"].as_str().is_some_and(|text| text.contains("refused")),
        "{found}"
    );
}

#[test]
fn offline_mode_sends_no_request() {
    let (env, hub) = (TestEnv::new(), refusing_hub(500, ""));
    let (code, found) = finding(command(&env, &hub, &["doctor"]).env("HF_HUB_OFFLINE", "1"), "model");
    assert_eq!(code, 3, "{found}");
    assert!(
        found["message"]
            .as_str()
            .is_some_and(|text| text.contains("HF_HUB_OFFLINE is set")),
        "{found}"
    );
    assert_eq!(hub.requests().len(), 0);
}

#[test]
fn a_full_disk_is_reported_before_the_download() {
    let hub = FakeHub::start(|request| {
        let huge = format!(
            r#"[{{"type": "file", "path": "model.safetensors", "oid": "{EMPTY_HASH}", "size": {}}}]"#,
            1_u64 << 60
        );
        if request.path.contains("/tree/") {
            Reply::json(&huge)
        } else {
            open_hub(request).unwrap_or(Reply::status(500))
        }
    });
    let env = TestEnv::new();
    let (code, found) = doctor(&env, &hub, "disk");
    assert_eq!(code, 3, "{found}");
    assert!(
        found["message"].as_str().is_some_and(|text| text.contains("GiB, but")),
        "{found}"
    );
}

/// Starts and stops the fleet, and returns the output.
fn up_and_down(mut command: Command, env: &TestEnv) -> String {
    command.arg("--set").arg("deadlines.ready=60s");
    let mut run = Run::start_command(env, command);
    run.wait_until_ready();
    run.signal(Signal::SIGTERM);
    let (code, text) = run.end();
    assert_eq!(code, 0, "{text}");
    assert!(!text.contains(TOKEN), "{text}");
    text
}

fn cache(env: &TestEnv) -> PathBuf {
    env.path().join("huggingface/hub/models--org--model")
}

#[test]
fn a_download_resumes_and_keeps_the_token_with_the_hub() {
    // Large files are on another host, as on the real hub. The first connection breaks.
    let elsewhere = FakeHub::start(|request| {
        let reply = Reply::file(&weights(), request);
        if request.number == 0 {
            reply.cut_after(100_000)
        } else {
            reply
        }
    });
    let url = format!("{}/signed?X-Amz-Signature=swordfish", elsewhere.url());
    let hub = FakeHub::start(move |request| {
        if is_weights(request) {
            return Reply::status(302).header("location", &url);
        }
        let empty = format!("/org/model/resolve/{COMMIT}/tokenizer.json");
        let other = if request.path == empty {
            Reply::file(b"", request)
        } else {
            Reply::status(404)
        };
        open_hub(request).unwrap_or(other)
    });
    let env = TestEnv::new();
    let text = up_and_down(command(&env, &hub, &["up"]), &env);
    assert!(
        text.contains("downloading org/model into") && text.contains("downloaded org/model in"),
        "{text}"
    );
    assert!(text.contains("resuming in") && !text.contains("swordfish"), "{text}");

    let seen = elsewhere.requests();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(
        seen.iter().all(|request| request.header("authorization").is_none()),
        "{seen:?}"
    );
    let range = seen[1].header("range").expect("a range");
    assert!(range.starts_with("bytes=") && range != "bytes=0-", "{range}");
    let bearer = format!("Bearer {TOKEN}");
    let asked = hub.requests();
    assert!(
        !asked.is_empty()
            && asked
                .iter()
                .all(|request| request.header("authorization") == Some(&bearer)),
        "{asked:?}"
    );

    // The cache has the layout of huggingface_hub and no other files.
    let snapshot = cache(&env).join("snapshots").join(COMMIT);
    assert_eq!(
        std::fs::read(snapshot.join("model.safetensors")).expect("a file"),
        weights()
    );
    let link = std::fs::read_link(snapshot.join("config.json")).expect("a link");
    assert_eq!(link, Path::new("../../blobs").join(CONFIG_HASH));
    assert!(!snapshot.join("pytorch_model.bin").exists() && !snapshot.join("original").exists());
    assert_eq!(
        std::fs::read_to_string(cache(&env).join("refs/main")).expect("a file"),
        COMMIT
    );
    let blobs = std::fs::read_dir(cache(&env).join("blobs")).expect("a folder");
    let blobs: Vec<PathBuf> = blobs.map(|entry| entry.expect("an entry").path()).collect();
    assert!(
        !blobs.is_empty()
            && blobs
                .iter()
                .all(|path| path.extension().is_none_or(|end| end != "incomplete")),
        "{blobs:?}"
    );

    // Engines only read the cache, and the next start sends no request.
    let spawned = env.log("prefiller1.spawn.json");
    assert!(spawned.contains("\"HF_HUB_OFFLINE\": \"1\""), "{spawned}");
    let asked = hub.requests().len();
    let text = up_and_down(command(&env, &hub, &["up"]), &env);
    assert!(!text.contains("downloading org/model into"), "{text}");
    assert_eq!(hub.requests().len(), asked);
}

#[test]
fn a_cached_model_is_not_downloaded_again() {
    let hub = FakeHub::start(|request| {
        if is_weights(request) {
            return Reply::file(&weights(), request);
        }
        open_hub(request).unwrap_or_else(|| Reply::file(b"", request))
    });
    let env = TestEnv::new();
    let blobs = cache(&env).join("blobs");
    std::fs::create_dir_all(&blobs).expect("a folder");
    let part = blobs.join(format!("{}.incomplete", sha256(&weights())));
    std::fs::write(&part, &weights()[..200_000]).expect("a file");
    up_and_down(command(&env, &hub, &["up"]), &env);
    let seen = hub.requests();
    let asked: Vec<&SeenRequest> = seen.iter().filter(|request| is_weights(request)).collect();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].header("range").map(String::as_str), Some("bytes=200000-"));
}

#[test]
fn a_corrupt_download_never_enters_the_cache() {
    let hub = FakeHub::start(|request| {
        if is_weights(request) {
            let mut damaged = weights();
            damaged[1000] ^= 1;
            return Reply::file(&damaged, request);
        }
        open_hub(request).unwrap_or_else(|| Reply::file(b"", request))
    });
    let env = TestEnv::new();
    let output = command(&env, &hub, &["up"]).output().expect("xpyd runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("model.safetensors arrived damaged 3 times"), "{text}");
    assert!(text.contains("hint: a proxy or a mirror"), "{text}");
    assert!(!cache(&env).join("blobs").join(sha256(&weights())).exists());
    assert!(!cache(&env).join("refs/main").exists());
    assert_eq!(env.processes(), []);
}

#[test]
fn a_path_outside_the_cache_is_rejected() {
    let hub = FakeHub::start(|request| {
        let outside =
            format!(r#"[{{"type": "file", "path": "../../../../../evil", "oid": "{EMPTY_HASH}", "size": 0}}]"#);
        if request.path.contains("/tree/") {
            Reply::json(&outside)
        } else {
            open_hub(request).unwrap_or(Reply::status(404))
        }
    });
    let env = TestEnv::new();
    let output = command(&env, &hub, &["up"]).output().expect("xpyd runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("an invalid file name or hash"), "{text}");
}

#[test]
fn a_failed_hub_request_is_retried() {
    let hub = FakeHub::start(|request| {
        let is_listing = request.path.contains("/revision/");
        if is_listing && request.number < 3 {
            return Reply::status(503);
        }
        if is_weights(request) {
            return Reply::file(&weights(), request);
        }
        open_hub(request).unwrap_or_else(|| Reply::file(b"", request))
    });
    let env = TestEnv::new();
    up_and_down(command(&env, &hub, &["up"]), &env);
}
