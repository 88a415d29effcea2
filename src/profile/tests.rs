//! Tests of profiles: layering, overrides, and what a wrong one prints.

use super::*;

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
fn a_file_that_extends_a_shipped_profile_changes_only_its_own_keys() {
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
fn overrides_win_over_files_and_later_ones_over_earlier_ones() {
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
fn an_unknown_key_is_shown_where_it_stands_with_the_nearest_name() {
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
fn a_profile_that_is_nowhere_names_the_nearest() {
    let error = load("2p2dd", &[]).expect_err("no such profile");
    assert_eq!(error.hint().as_deref(), Some("did you mean `2p2d`?"));
    let error = load("nothing/like/it.toml", &[]).expect_err("no such file");
    assert!(matches!(error, ProfileError::Read(_)), "{error:?}");
}

#[test]
fn a_circle_of_profiles_ends() {
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
    ] {
        let error = load("2p2d", &[Override::parse(set).expect("an override")]).expect_err(set);
        assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
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
