//! Tests of profiles: layering, overrides, and what a wrong one prints.

use super::*;
use crate::connector::ConnectorKind;

fn user_file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("my.toml");
    fs_err::write(&path, text).expect("a file");
    let name = path.display().to_string();
    (folder, name)
}

fn failure(text: &str) -> (String, Option<String>) {
    let (_folder, name) = user_file(text);
    let error = load(&name, &[]).expect_err("a wrong profile");
    (error.to_string().replace(&name, "my.toml"), error.hint())
}

#[test]
fn every_shipped_profile_loads_and_describes_itself() {
    for name in shipped_names() {
        let profile = load(name, &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!profile.description.is_empty(), "{name}");
    }
}

#[test]
fn an_extending_file_changes_only_its_keys() {
    let (_folder, name) = user_file("extends = \"2p2d\"\nmodel = \"tiny\"\n[decode]\ncount = 3\n");
    let (changed, base) = (
        load(&name, &[]).expect("a profile"),
        load("2p2d", &[]).expect("a profile"),
    );
    assert_eq!((changed.model.as_str(), changed.decode.count), ("tiny", 3));
    assert_eq!(changed.decode.port, base.decode.port);
    assert_eq!(
        (changed.prefill, changed.vllm, changed.lmcache),
        (base.prefill, base.vllm, base.lmcache)
    );
}

#[test]
fn a_file_may_extend_a_file_beside_it() {
    let (folder, name) = user_file("extends = \"base.toml\"\nprefill.count = 2\n");
    fs_err::write(
        folder.path().join("base.toml"),
        "extends = \"1p3d\"\nmodel = \"tiny\"\n",
    )
    .expect("a file");
    let profile = load(&name, &[]).expect("a profile");
    assert_eq!(
        (profile.prefill.count, profile.decode.count, profile.model.as_str()),
        (2, 3, "tiny")
    );
}

#[test]
fn later_overrides_win() {
    let overrides = [
        Override::parse("decode.count=3").expect("an override"),
        Override::parse("decode.count=4").expect("an override"),
        Override::parse("model=org/name").expect("an override"),
        Override::parse("vllm.args=[\"--x\"]").expect("an override"),
        Override::flag("--port", "proxy.port", 9200),
    ];
    let profile = load("2p2d", &overrides).expect("a profile");
    assert_eq!(
        (profile.decode.count, profile.model.as_str(), profile.proxy.port),
        (4, "org/name", 9200)
    );
    assert_eq!(profile.vllm.args, ["--x"]);
    assert_eq!(profile.served_model_name, "org/name");
}

#[test]
fn an_unknown_key_has_a_line_and_a_suggestion() {
    let (message, hint) = failure("extends = \"2p2d\"\n\n[decode]\ncuont = 3\n");
    assert!(
        message.starts_with("my.toml: TOML parse error at line 4, column 1"),
        "{message}"
    );
    assert!(message.contains("4 | cuont = 3"), "{message}");
    assert_eq!(hint.as_deref(), Some("did you mean `count`?"));
}

#[test]
fn an_unknown_key_in_an_override_names_the_override() {
    let overrides = [Override::parse("decode.prot=1").expect("an override")];
    let error = load("2p2d", &overrides).expect_err("a wrong override");
    assert!(
        error
            .to_string()
            .starts_with("`--set decode.prot=1`: unknown field `prot`"),
        "{error}"
    );
    assert_eq!(error.hint().as_deref(), Some("did you mean `port`?"));
}

#[test]
fn wrong_values_are_errors_with_their_place() {
    for (text, place, problem) in [
        (
            "model = 3",
            "line 1, column 9",
            "invalid type: integer `3`, expected a string",
        ),
        (
            "model = \"m\"\nconnector = \"nixel\"",
            "line 2, column 13",
            "unknown variant `nixel`",
        ),
        (
            "model = \"m\"\n[deadlines]\nready = \"soon\"",
            "line 3, column 9",
            "invalid duration `soon`",
        ),
        (
            "model = \"m\"\nprefill.port = 70000",
            "line 2, column 16",
            "invalid value: integer `70000`",
        ),
        ("model = \"m\"\n[prefill\n", "line 2, column 9", "unclosed table"),
    ] {
        let (message, _) = failure(text);
        assert!(
            message.contains(place) && message.contains(problem),
            "{text}: {message}"
        );
    }
}

#[test]
fn an_unknown_profile_has_a_suggestion() {
    let error = load("2p2dd", &[]).expect_err("no such profile");
    assert_eq!(error.hint().as_deref(), Some("did you mean `2p2d`?"));
    for (name, meant) in [("1d3p", "3p1d"), ("4P4D-TP2", "4p4d-tp2"), ("1d2p-nixl", "2p1d-nixl")] {
        let error = load(name, &[]).expect_err("no such profile");
        assert_eq!(error.hint(), Some(format!("did you mean `{meant}`?")));
    }
    let error = load("nothing/like/it.toml", &[]).expect_err("no such file");
    assert!(matches!(error, ProfileError::Read { .. }), "{error:?}");
}

#[test]
fn a_cycle_of_profiles_is_an_error() {
    let (_folder, name) = user_file("extends = \"my.toml\"\n");
    assert!(matches!(load(&name, &[]), Err(ProfileError::TooDeep(_))));
}

#[test]
fn values_out_of_range_name_their_key() {
    for (set, key) in [
        ("decode.count=0", "decode.count"),
        ("prefill.tensor_parallel=65", "prefill.tensor_parallel"),
        ("prefill.gpus=[0]", "prefill.gpus"),
        ("proxy.max_in_flight=0", "proxy.max_in_flight"),
        ("nixl.lease=15m", "nixl.lease"),
        ("prefill.port=0", "prefill.port"),
        ("nixl.decode_side_channel_port=0", "nixl.decode_side_channel_port"),
        ("lmcache_mp.http_port=0", "lmcache_mp.http_port"),
        ("vllm.env={\"A=B\"=\"1\"}", "vllm.env.A=B"),
        ("decode.env={\"\"=\"1\"}", "decode.env."),
        ("decode.env={A=\"\\u0000\"}", "decode.env.A"),
        ("prefill.args=[\"a\\u0000\"]", "prefill.args"),
        ("decode.port=0", "decode.port"),
        ("nixl.prefill_side_channel_port=0", "nixl.prefill_side_channel_port"),
        ("lmcache.notify_port=0", "lmcache.notify_port"),
        ("lmcache_mp.port=0", "lmcache_mp.port"),
        ("deadlines.ready=0s", "deadlines.ready"),
        ("deadlines.handoff=0s", "deadlines.handoff"),
        ("proxy.max_body=0MiB", "proxy.max_body"),
        ("proxy.clients.head_deadline=0s", "proxy.clients.head_deadline"),
        ("proxy.clients.threads=100000", "proxy.clients.threads"),
    ] {
        let error = load("2p2d", &[Override::parse(set).expect("an override")]).expect_err(set);
        assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
    }
    // The kernel chooses the proxy's port, and what never ends is no number.
    for set in [
        "proxy.port=0",
        "deadlines.stop=0s",
        "deadlines.ready=never",
        "deadlines.keep=never",
    ] {
        load("2p2d", &[Override::parse(set).expect("an override")]).expect(set);
    }
    for set in [
        "deadlines.stop=18446744073709551000s",
        "deadlines.ready=87601h",
        "logs.age=18446744073709551615s",
    ] {
        let error = load("2p2d", &[Override::parse(set).expect("an override")]).expect_err(set);
        assert!(error.to_string().contains("never"), "{error}");
    }
    let (_folder, name) = user_file("[prefill]\ncount = 1\n");
    assert!(matches!(
        load(&name, &[]),
        Err(ProfileError::Missing { key: "model", .. })
    ));
}

#[test]
fn the_lease_on_kv_outlives_both_legs_and_two_hangs() {
    let minutes = |count| Duration::from_mins(count);
    let deadlines = |set: &[&str]| {
        let set: Vec<Override> = set
            .iter()
            .map(|text| Override::parse(text).expect("an override"))
            .collect();
        load("2p2d-nixl", &set).expect("a profile").deadlines
    };
    assert_eq!(deadlines(&[]).kv_lease(), minutes(5 + 10 + 1));
    let hangs_long = ["deadlines.stall=1h", "deadlines.prefill=1s", "deadlines.decode_idle=1s"];
    assert_eq!(deadlines(&hangs_long).kv_lease(), minutes(2 * 61));
    let in_parts = ["deadlines.prefill=1500ms"];
    assert_eq!(
        deadlines(&in_parts).kv_lease(),
        minutes(11) + Duration::from_secs(2),
        "vLLM counts whole seconds"
    );
}

#[test]
fn an_override_needs_a_key_and_a_value() {
    for wrong in ["decode.count", "decode..count=1", "=1"] {
        assert!(Override::parse(wrong).is_err(), "{wrong}");
    }
}

fn loaded(name: &str, set: &[&str]) -> Result<Profile, ProfileError> {
    let set: Result<Vec<Override>, _> = set.iter().map(|text| Override::parse(text)).collect();
    load(name, &set?)
}

#[test]
fn string_keys_accept_unquoted_values() {
    let profile = loaded(
        "2p2d",
        &[
            "model=2024",
            "served_model_name=true",
            "decode.env.OMP_NUM_THREADS=4",
            "decode.env.SHARE=1.50",
            "decode.env.ON=true",
            "decode.env.DAY=2026-01-01",
            "decode.count=3",
            "proxy.bind_sessions=true",
            "vllm.gpu_memory_utilization=0.5",
        ],
    )
    .expect("a profile");
    assert_eq!(
        (profile.model.as_str(), profile.served_model_name.as_str()),
        ("2024", "true")
    );
    let env = |name: &str| profile.decode.env[name].as_str();
    assert_eq!(
        (env("OMP_NUM_THREADS"), env("SHARE"), env("ON"), env("DAY")),
        ("4", "1.50", "true", "2026-01-01")
    );
    assert_eq!((profile.decode.count, profile.proxy.bind_sessions), (3, true));
    let (_folder, name) = user_file("extends = \"2p2d\"\n[vllm.env]\nA = 4\nB = true\nC = 0.5\nD = \"x\"\n");
    let env = load(&name, &[]).expect("a profile").vllm.env;
    let env: Vec<&str> = env.values().map(String::as_str).collect();
    assert_eq!(env, ["4", "true", "0.5", "x"]);
}

#[test]
fn any_number_of_engines_is_a_profile() {
    let fleet = |name: &str| loaded(name, &[]).map(|profile| (profile.prefill.count, profile.decode.count));
    assert_eq!(fleet("3p1d").expect("a profile"), (3, 1));
    assert_eq!(fleet("16p48d").expect("a profile"), (16, 48));
    let profile = loaded("3p3d-tp2-nixl", &[]).expect("a profile");
    assert_eq!(
        (profile.decode.tensor_parallel, profile.connector),
        (2, ConnectorChoice::Named(ConnectorKind::Nixl))
    );
    assert_eq!(
        loaded("1p2d-lmcache-mp", &[]).expect("a profile").connector,
        ConnectorChoice::Named(ConnectorKind::LmCacheMp)
    );
    assert!(
        fleet("0p1d")
            .expect_err("no engine")
            .to_string()
            .contains("between 1 and 64")
    );
    for wrong in ["3p3", "p3d", "3p3d-fast", "3p3d-tp", "-1p1d"] {
        assert!(matches!(fleet(wrong), Err(ProfileError::Unknown { .. })), "{wrong}");
    }
}

#[test]
fn wrong_keys_and_values_have_plain_errors() {
    for (set, message, hint) in [
        (
            "decode.count=x",
            "expected a whole number up to 65535",
            "without quotes",
        ),
        ("vllm.args=--foo", "expected a list", "--max-num-seqs"),
        (
            "proxy.bind_sessions=maybe",
            "expected `true` or `false`",
            "without quotes",
        ),
        ("prefill.tensor_parallel_size=2", "unknown field", "`tensor_parallel`"),
        (
            "tensor_parallel_size=2",
            "unknown field",
            "`prefill.tensor_parallel` or `decode.tensor_parallel`",
        ),
        ("max_model_len=8192", "unknown field", "`vllm.max_model_len`"),
        ("host=\"0.0.0.0\"", "unknown field", "`proxy.host`"),
        ("strict=true", "unknown field", "`proxy.handoff.strict`"),
        ("decode.cuont=3", "unknown field", "`count`"),
    ] {
        let error = loaded("2p2d", &[set]).expect_err(set);
        assert!(error.to_string().contains(message), "{set}: {error}");
        let told = error.hint().unwrap_or_default();
        assert!(told.contains(hint), "{set}: {told}");
    }
    let (_folder, name) = user_file("extends = \"nope\"\n");
    let error = load(&name, &[]).expect_err("no such profile");
    assert_eq!(
        error.to_string(),
        format!("no profile `nope`, which `{name}` extends: it is neither a shipped profile nor a file")
    );
}

#[test]
fn ranks_are_read_from_every_spelling() {
    for (set, prefill, decode) in [
        ("vllm.args=[\"--pipeline-parallel-size\", \"2\"]", 2, 2),
        ("vllm.args=[\"-pp\", \"2\"]", 2, 2),
        ("vllm.args=[\"-pp=2\", \"-tp\", \"3\"]", 6, 6),
        ("vllm.args=[\"--pipeline-par=2\"]", 2, 2),
        ("vllm.args=[\"--tensor_parallel_size=2\"]", 2, 2),
        ("prefill.args=[\"--tensor-parallel-size\", \"2\"]", 2, 1),
        ("prefill.args=[\"--prefill_context_parallel_size\", \"4\"]", 4, 1),
        ("decode.args=[\"-pcp\", \"4\", \"-dp\", \"2\"]", 1, 8),
        ("decode.args=[\"-dp\", \"4\", \"--data-parallel-size=2\"]", 1, 2),
    ] {
        let profile = loaded("1p1d", &[set]).expect("a profile");
        let total = |role| profile.ranks(role).total();
        assert_eq!(
            (total(&profile.prefill), total(&profile.decode)),
            (prefill, decode),
            "{set}"
        );
    }
    let four = loaded("1p1d", &["decode.args=[\"-pp\", \"2\"]", "decode.gpus=[0, 1]"]).expect("a profile");
    assert_eq!(four.decode.gpus, [0, 1]);
    let error = loaded("1p1d", &["decode.args=[\"-pp\", \"2\"]", "decode.gpus=[0]"]).expect_err("one too few");
    assert!(
        error
            .to_string()
            .contains("lists 1 GPUs, but 1 engine over 2 each need 2"),
        "{error}"
    );
}
