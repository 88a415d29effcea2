//! Tests of the preflight: each problem has its finding, and a good machine has none.

use std::path::Path;

use super::*;
use crate::machine::huggingface::{CacheState, Hub, HubReport, Identity, RepositoryAccess};
use crate::machine::{FilesystemSpace, Gpus, Installation, Limit, Listener, Pcie, System, Token, TokenSource};
use crate::profile::{self, Override};

fn findings(profile: &str, machine: &Machine) -> Vec<Finding> {
    let profile = profile::load(profile, &[]).expect("a profile");
    let plan = crate::plan::build(&profile, machine, Path::new("/run")).expect("a plan");
    check(&plan, machine)
}

fn failed(profile: &str, machine: &Machine) -> Vec<&'static str> {
    findings(profile, machine)
        .iter()
        .filter(|finding| finding.level == Level::Fail)
        .map(|finding| finding.check)
        .collect()
}

#[test]
fn a_good_machine_passes_everything() {
    let findings = findings("2p2d", &Machine::fixture(4, "0.25.0", Some("0.3.9")));
    assert!(
        findings.iter().all(|finding| finding.level == Level::Pass),
        "{findings:#?}"
    );
    assert_eq!(
        findings.iter().map(|finding| finding.check).collect::<Vec<_>>(),
        [
            "vllm",
            "python",
            "lmcache",
            "gpu",
            "gpu_memory",
            "model",
            "hf_access",
            "nofile",
            "shm",
            "ports",
            "memlock",
            "time"
        ]
    );
}

#[test]
fn too_few_gpus_name_the_missing_ones() {
    let findings = findings("2p2d", &Machine::fixture(3, "0.32.0", None));
    let gpu = findings
        .iter()
        .find(|finding| finding.level == Level::Fail)
        .expect("a failure");
    assert_eq!(
        gpu.message,
        "the plan needs 4 GPUs, but xpyd can use 3 here (none with index 3)"
    );
}

#[test]
fn no_driver_points_to_the_simulated_engine() {
    let mut machine = Machine::fixture(0, "0.32.0", None);
    machine.gpus = Gpus::Unavailable("no NVIDIA driver".to_owned());
    let findings = findings("2p2d", &machine);
    let gpu = findings
        .iter()
        .find(|finding| finding.check == "gpu")
        .expect("a finding");
    assert_eq!(gpu.level, Level::Fail);
    assert!(
        gpu.hint.as_ref().is_some_and(|hint| hint.contains("--engine sim")),
        "{gpu:?}"
    );
}

#[test]
fn a_missing_program_or_package_fails() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    if let Installation::Found { nixl, .. } = &mut machine.engine {
        *nixl = None;
    }
    assert_eq!(failed("2p2d", &machine), ["nixl"]);
    machine.engine = Installation::Missing("vllm".to_owned());
    assert_eq!(failed("2p2d", &machine), ["vllm"]);
}

#[test]
fn cache_servers_need_packages_and_memory() {
    let mut machine = Machine::fixture(4, "0.32.0", Some("0.5.6"));
    machine.available_memory_bytes = 4 * (8 << 30);
    assert!(failed("2p2d-lmcache-mp", &machine).is_empty());
    machine.available_memory_bytes -= 1;
    assert_eq!(failed("2p2d-lmcache-mp", &machine), ["cache_memory"]);
    if let Installation::Found { nixl, lmcache, .. } = &mut machine.engine {
        (*nixl, *lmcache) = (None, None);
    }
    assert_eq!(failed("2p2d-lmcache-mp", &machine), ["nixl", "lmcache", "cache_memory"]);
}

fn hub(machine: &mut Machine, model: RepositoryAccess) {
    machine.hugging_face.model.state = CacheState::Absent;
    machine.hugging_face.hub = Hub::Answered(HubReport {
        identity: Some(Identity::User("ada".to_owned())),
        model: Some(model),
        clock_ahead_seconds: Some(0),
    });
}

fn of<'findings>(findings: &'findings [Finding], check: &str) -> &'findings Finding {
    let found = findings.iter().find(|finding| finding.check == check);
    found.unwrap_or_else(|| panic!("no {check} in {findings:#?}"))
}

#[test]
fn each_hub_answer_has_a_finding() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    for (answer, check, level, hint) in [
        (
            RepositoryAccess::Gated { with_token: true },
            "hf_access",
            Level::Fail,
            "accept it at https://huggingface.co/meta-llama/",
        ),
        (
            RepositoryAccess::Gated { with_token: false },
            "hf_access",
            Level::Fail,
            "accept the licence",
        ),
        (RepositoryAccess::BadToken, "hf_access", Level::Fail, "settings/tokens"),
        (
            RepositoryAccess::NotFound { with_token: true },
            "hf_access",
            Level::Fail,
            "check the name",
        ),
        (RepositoryAccess::NoRevision, "hf_access", Level::Fail, "--revision"),
        (RepositoryAccess::RateLimited, "hf_access", Level::Warn, "wait"),
        (
            RepositoryAccess::Failed("status 503".to_owned()),
            "hf_access",
            Level::Warn,
            "status.huggingface.co",
        ),
        (
            RepositoryAccess::Open { bytes: Some(1 << 50) },
            "disk",
            Level::Fail,
            "HF_HOME",
        ),
    ] {
        hub(&mut machine, answer.clone());
        let findings = findings("2p2d", &machine);
        let found = of(&findings, check);
        assert_eq!(found.level, level, "{answer:?}: {found:?}");
        assert!(
            found.hint.as_ref().is_some_and(|text| text.contains(hint)),
            "{answer:?}: {found:?}"
        );
    }
    hub(&mut machine, RepositoryAccess::Open { bytes: Some(16 << 30) });
    let access = findings("2p2d", &machine);
    assert_eq!(
        of(&access, "hf_access").message,
        "`meta-llama/Llama-3.1-8B-Instruct` is not cached; xpyd downloads it before the start (16.0 GiB)"
    );
}

#[test]
fn a_typo_suggests_a_cached_model() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    hub(&mut machine, RepositoryAccess::NotFound { with_token: false });
    machine.hugging_face.similar = vec!["org/model".to_owned()];
    let findings = findings("2p2d", &machine);
    let hint = of(&findings, "hf_access").hint.clone();
    assert_eq!(
        hint.as_deref(),
        Some("did you mean `org/model`, which is cached? `--model org/model`")
    );
}

#[test]
fn offline_gated_models_need_a_token() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    machine.hugging_face.token = None;
    assert!(failed("2p2d", &machine).is_empty(), "cached");
    machine.hugging_face.model.state = CacheState::Absent;
    machine.hugging_face.hub = Hub::Unreachable("no route".to_owned());
    assert_eq!(failed("2p2d", &machine), ["hf_token"]);
    let token = |well_formed| Token {
        source: TokenSource::Environment("HF_TOKEN"),
        well_formed,
    };
    machine.hugging_face.token = Some(token(false));
    assert_eq!(failed("2p2d", &machine), ["hf_token"]);
    machine.hugging_face.token = Some(token(true));
    assert!(failed("2p2d", &machine).is_empty());
}

#[test]
fn missing_files_are_named() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    machine.hugging_face.model.state = CacheState::Partial {
        missing: (1..=5).map(|number| format!("model-{number}.safetensors")).collect(),
    };
    machine.hugging_face.hub = Hub::NotAsked("HF_HUB_OFFLINE is set".to_owned());
    let findings = findings("2p2d", &machine);
    let model = of(&findings, "model");
    assert_eq!(model.level, Level::Fail);
    assert!(
        model
            .message
            .contains("lacks model-1.safetensors, model-2.safetensors, model-3.safetensors and 2 more"),
        "{model:?}"
    );
    assert!(model.message.ends_with("HF_HUB_OFFLINE is set"), "{model:?}");
}

#[test]
fn system_limits_depend_on_the_plan() {
    let level = |profile: &str, change: &dyn Fn(&mut System), check: &str| {
        let mut machine = Machine::fixture(8, "0.32.0", None);
        change(&mut machine.system);
        let findings = findings(profile, &machine);
        of(&findings, check).level
    };
    let files = |hard| move |system: &mut System| system.open_files = Limit { soft: 1024, hard };
    assert_eq!(level("2p2d", &files(1 << 20), "nofile"), Level::Pass);
    assert_eq!(level("2p2d", &files(8192), "nofile"), Level::Warn);
    assert_eq!(level("2p2d", &files(1024), "nofile"), Level::Fail);
    let small = |system: &mut System| {
        system.shared_memory = Some(FilesystemSpace {
            total: 64 << 20,
            free: 64 << 20,
        });
    };
    assert_eq!(level("2p2d", &small, "shm"), Level::Warn);
    assert_eq!(level("2p2d-tp2", &small, "shm"), Level::Fail);
    assert_eq!(level("2p2d", &|system| system.shared_memory = None, "shm"), Level::Fail);
    assert_eq!(level("2p2d", &|system| system.unix_seconds = 0, "time"), Level::Warn);
    let bridges = |system: &mut System| {
        system.pcie = Pcie {
            has_iommu: true,
            redirecting_bridges: Some(2),
        };
    };
    assert_eq!(level("2p2d", &bridges, "acs"), Level::Warn);
    let locked = |system: &mut System| {
        system.locked_memory = Limit {
            soft: 65_536,
            hard: 65_536,
        }
    };
    assert_eq!(level("2p2d", &locked, "memlock"), Level::Pass);
}

#[test]
fn a_port_in_use_names_its_process() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    machine.system.listeners = vec![Listener {
        port: 7101,
        process: Some((4711, "nginx".to_owned())),
    }];
    let findings = findings("2p2d", &machine);
    let ports = of(&findings, "ports");
    assert_eq!(ports.level, Level::Fail);
    assert_eq!(
        ports.message,
        "1 port is in use: 7101 (prefiller2 http) by process 4711 (nginx)"
    );
}

fn with_options(options: &[&str], connectors: &[&str]) -> Machine {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    if let Installation::Found { environment, .. } = &mut machine.engine {
        environment.options = options.iter().map(|&name| name.to_owned()).collect();
        environment.connectors = connectors.iter().map(|&name| name.to_owned()).collect();
    }
    machine
}

#[test]
fn unknown_options_fail() {
    let mut options = vec![
        "--max-model-len",
        "--port",
        "--served-model-name",
        "--host",
        "--tensor-parallel-size",
    ];
    assert!(
        failed("2p2d", &with_options(&options[..1], &[])).is_empty(),
        "not all sources were found"
    );
    let failures = findings("2p2d", &with_options(&options, &[]));
    let message = &of(&failures, "options").message;
    assert!(message.starts_with("vLLM 0.32.0 has no option `--"), "{message}");
    options.extend([
        "--shutdown-timeout",
        "--kv-transfer-config",
        "--gpu-memory-utilization",
        "--max-num-batched-tokens",
    ]);
    options.extend([
        "--enable-prefix-caching",
        "--enforce-eager",
        "--enable-chunked-prefill",
        "--numa-bind",
        "--enable-prompt-tokens-details",
    ]);
    assert_eq!(failed("2p2d", &with_options(&options, &["NixlConnector"])), [""; 0]);
    assert_eq!(failed("2p2d", &with_options(&options, &["Other"])), ["connector"]);
}

fn findings_with(set: &[&str]) -> Vec<Finding> {
    let overrides: Vec<Override> = set
        .iter()
        .map(|set| Override::parse(set).expect("an override"))
        .collect();
    let profile = profile::load("2p2d", &overrides).expect("a profile");
    let machine = Machine::fixture(4, "0.32.0", Some("0.5.6"));
    let plan = crate::plan::build(&profile, &machine, Path::new("/run")).expect("a plan");
    check(&plan, &machine)
}

#[test]
fn roles_must_share_transfer_options() {
    let found = findings_with(&[
        "prefill.args=[\"--dtype\", \"float16\"]",
        "decode.args=[\"--dtype=bfloat16\"]",
    ]);
    assert_eq!(of(&found, "roles").level, Level::Fail);
    let found = findings_with(&["prefill.args=[\"--dtype\", \"float16\"]"]);
    assert_eq!(of(&found, "roles").level, Level::Warn);
    let found = findings_with(&[
        "prefill.args=[\"--disable-hybrid-kv-cache-manager\"]",
        "decode.args=[\"--no-disable-hybrid-kv-cache-manager\"]",
    ]);
    assert_eq!(of(&found, "roles").level, Level::Fail);
    let found = findings_with(&[
        "prefill.env.VLLM_KV_CACHE_LAYOUT=HND",
        "decode.env.VLLM_KV_CACHE_LAYOUT=NHD",
    ]);
    assert_eq!(of(&found, "roles").level, Level::Fail);
    let found = findings_with(&["decode.env={PYTHONHASHSEED=\"1\"}"]);
    assert_eq!(
        of(&found, "hash_seed").message,
        "PYTHONHASHSEED differs between engines (0, 1): they hash the same prompt differently"
    );
}

#[test]
fn a_forced_connector_gets_a_warning() {
    let found = findings_with(&["connector=lmcache", "force_connector=true"]);
    assert_eq!(of(&found, "lmcache_layout").level, Level::Warn);
}

#[test]
fn incompatible_versions_are_reported() {
    let checks = |vllm: &str, nixl: &str, lmcache: Option<&str>, torch: &str, profile: &str| -> Vec<(&str, Level)> {
        let mut machine = Machine::fixture(4, vllm, lmcache);
        if let Installation::Found {
            nixl: found,
            environment,
            ..
        } = &mut machine.engine
        {
            *found = crate::machine::Version::parse(nixl);
            environment.packages.insert("torch".to_owned(), torch.to_owned());
        }
        let bad = findings(profile, &machine);
        let bad = bad.iter().filter(|finding| finding.level != Level::Pass);
        bad.map(|finding| (finding.check, finding.level)).collect()
    };
    let none: [(&str, Level); 0] = [];
    assert_eq!(checks("0.32.0", "1.4.1", None, "2.13.0", "2p2d-nixl"), none);
    assert_eq!(checks("0.33.0", "1.5.0", None, "2.14.0", "2p2d-nixl"), none);
    let old_nixl = [("nixl_version", Level::Fail)];
    assert_eq!(checks("0.33.0", "1.4.1", None, "2.14.0", "2p2d-nixl"), old_nixl);
    assert_eq!(checks("0.33.1+cu130", "1.4.9", None, "2.14.0", "1p1d"), old_nixl);
    assert_eq!(
        checks("0.32.0", "1.5.1", Some("0.5.6"), "2.13.0", "2p2d-lmcache-mp"),
        none
    );
    assert_eq!(
        checks("0.33.0", "1.5.1", Some("0.3.7"), "2.13.0", "2p2d-lmcache-mp"),
        [("lmcache_version", Level::Fail)]
    );
    assert_eq!(
        checks("0.33.0", "1.5.1", Some("0.5.6"), "2.14.0", "2p2d-lmcache-mp"),
        [("lmcache_torch", Level::Warn)]
    );
    // Without the connector, LMCache's version does not matter.
    assert_eq!(checks("0.33.0", "1.5.1", Some("0.3.7"), "2.14.0", "2p2d-nixl"), none);
}

#[test]
fn uncertain_models_are_warnings() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    for state in [CacheState::GgufFile, CacheState::Elsewhere { what: "is an address" }] {
        machine.hugging_face.model.state = state;
        let found = findings("2p2d-nixl", &machine);
        assert_eq!(of(&found, "model").level, Level::Warn);
        assert!(failed("2p2d-nixl", &machine).is_empty());
    }
}

#[test]
fn named_gpus_work_without_nvml() {
    let mut machine = Machine::fixture(0, "0.32.0", None);
    machine.gpus = Gpus::Unavailable("no NVIDIA driver".to_owned());
    let level = |set: &[&str]| {
        let set: Vec<Override> = set
            .iter()
            .map(|set| Override::parse(set).expect("an override"))
            .collect();
        let profile = profile::load("1p1d", &set).expect("a profile");
        let plan = crate::plan::build(&profile, &machine, Path::new("/run")).expect("a plan");
        let numbers = plan
            .engines
            .iter()
            .map(|engine| engine.env["CUDA_VISIBLE_DEVICES"].clone());
        (of(&check(&plan, &machine), "gpu").level, numbers.collect::<Vec<_>>())
    };
    assert_eq!(
        level(&["prefill.gpus=[0]", "decode.gpus=[3]"]),
        (Level::Warn, vec!["0".to_owned(), "3".to_owned()])
    );
    assert_eq!(level(&["prefill.gpus=[0]"]).0, Level::Fail);
}

#[test]
fn unsupported_pipeline_stages_are_reported() {
    let stages = |set: &str| {
        let found = findings_with(&[set]);
        let ranks = found.iter().find(|finding| finding.check == "ranks");
        ranks.map(|finding| finding.level)
    };
    assert_eq!(stages("decode.args=[\"-pp\", \"2\"]"), Some(Level::Warn));
    assert_eq!(
        stages("decode.args=[\"--prefill-context-parallel-size=2\"]"),
        Some(Level::Warn)
    );
    assert_eq!(stages("prefill.args=[\"-pp\", \"2\"]"), None);
}

#[test]
fn an_overview_never_fails() {
    let mut machine = Machine::fixture(0, "0.32.0", None);
    machine.engine = Installation::Missing("vllm".to_owned());
    machine.gpus = Gpus::Unavailable("no NVIDIA driver".to_owned());
    machine.hugging_face.token = None;
    let findings = overview(&machine);
    assert!(
        findings.iter().all(|finding| finding.level != Level::Fail),
        "{findings:#?}"
    );
    let warned: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.level == Level::Warn)
        .map(|finding| finding.check)
        .collect();
    assert_eq!(warned, ["vllm", "gpu"]);
}

#[test]
fn cpu_engines_need_memory_and_cores() {
    let mut machine = Machine::fixture(0, "0.32.0", None);
    machine.gpus = Gpus::NotAsked;
    let warned = |machine: &Machine| {
        let findings = findings("cpu-1p1d", machine);
        assert!(
            findings.iter().all(|finding| finding.level != Level::Fail),
            "{findings:#?}"
        );
        findings
            .into_iter()
            .filter(|finding| finding.level == Level::Warn)
            .map(|finding| finding.check)
            .collect::<Vec<_>>()
    };
    assert!(warned(&machine).is_empty());
    machine.cores = 2;
    machine.available_memory_bytes = 7 << 30;
    assert_eq!(warned(&machine), ["memory", "cores"]);
}

#[test]
fn the_simulated_engine_needs_nothing() {
    let mut machine = Machine::fixture(0, "0.32.0", None);
    machine.engine = Installation::Missing("vllm".to_owned());
    let sim = [Override::flag("--engine", "engine", "sim")];
    let profile = profile::load("2p2d", &sim).expect("a profile");
    let plan = crate::plan::build(&profile, &machine, Path::new("/run")).expect("a plan");
    assert_eq!(check(&plan, &machine), []);
}
