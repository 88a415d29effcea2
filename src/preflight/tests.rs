//! Tests of the preflight: each problem gives its finding, and a good machine gives none.

use std::path::Path;

use super::*;
use crate::machine::{Engine, Gpus, Token, TokenSource};
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
        ["vllm", "lmcache", "gpu", "gpu_memory", "model"]
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
        "the plan needs 4 GPUs, and xpyd may use 3 here (none with index 3)"
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
    if let Engine::Found { nixl, .. } = &mut machine.engine {
        *nixl = None;
    }
    assert_eq!(failed("2p2d", &machine), ["nixl"]);
    machine.engine = Engine::Missing("vllm".to_owned());
    assert_eq!(failed("2p2d", &machine), ["vllm"]);
}

#[test]
fn cache_servers_want_both_packages_and_memory_for_all_of_them() {
    let mut machine = Machine::fixture(4, "0.32.0", Some("0.5.6"));
    machine.available_memory_bytes = 4 * (8 << 30);
    assert!(failed("2p2d-lmcache-mp", &machine).is_empty());
    machine.available_memory_bytes -= 1;
    assert_eq!(failed("2p2d-lmcache-mp", &machine), ["cache_memory"]);
    if let Engine::Found { nixl, lmcache, .. } = &mut machine.engine {
        (*nixl, *lmcache) = (None, None);
    }
    assert_eq!(failed("2p2d-lmcache-mp", &machine), ["nixl", "lmcache", "cache_memory"]);
}

#[test]
fn a_gated_model_needs_a_well_formed_token_unless_it_is_cached() {
    let mut machine = Machine::fixture(4, "0.32.0", None);
    machine.hugging_face.token = None;
    assert!(failed("2p2d", &machine).is_empty(), "cached");
    machine.hugging_face.model_is_local = false;
    assert_eq!(failed("2p2d", &machine), ["hf_token"]);
    machine.hugging_face.token = Some(Token {
        source: TokenSource::Environment("HF_TOKEN"),
        well_formed: false,
    });
    assert_eq!(failed("2p2d", &machine), ["hf_token"]);
    machine.hugging_face.token = Some(Token {
        source: TokenSource::Environment("HF_TOKEN"),
        well_formed: true,
    });
    assert!(failed("2p2d", &machine).is_empty());
}

#[test]
fn engines_on_the_cpu_want_memory_and_cores_but_no_gpu() {
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
    machine.engine = Engine::Missing("vllm".to_owned());
    let sim = [Override::flag("--engine", "engine", "sim")];
    let profile = profile::load("2p2d", &sim).expect("a profile");
    let plan = crate::plan::build(&profile, &machine, Path::new("/run")).expect("a plan");
    assert_eq!(check(&plan, &machine), []);
}
