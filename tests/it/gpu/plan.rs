//! `xpyd plan` on different machines: GPU facts, placement, pinning, and findings.

use super::machine::{Machine, cards, nvlink_pairs, uuid};

fn pins(machine: &Machine, more: &[&str]) -> Vec<String> {
    machine.variables("CUDA_VISIBLE_DEVICES", more)
}

#[test]
fn pairs_share_nvlink_and_are_pinned_by_uuid() {
    let machine = Machine::new(&nvlink_pairs());
    assert_eq!(pins(&machine, &["-p", "2p2d"]), [uuid(0), uuid(2), uuid(1), uuid(3)]);
    let orders = machine.variables("CUDA_DEVICE_ORDER", &[]);
    assert!(
        !orders.is_empty() && orders.iter().all(|order| order == "PCI_BUS_ID"),
        "{orders:?}"
    );
    let ranks = [format!("{},{}", uuid(0), uuid(1)), format!("{},{}", uuid(2), uuid(3))];
    assert_eq!(pins(&machine, &["-p", "1p1d-tp2"]), ranks);
    let drawing = machine.plan(&["-p", "2p2d"]);
    let from = drawing.find("GPUs (driver").expect("a drawing");
    insta::assert_snapshot!("nvlink_pairs", drawing[from..].trim_end());
}

#[test]
fn an_nvswitch_connects_all_and_pcie_wins_over_numa() {
    let switch = cards(8, "numa = 0\nnvlink = \"0,1,2,3,4,5,6,7\"");
    let text = Machine::new(&switch).plan(&["-p", "2p2d-tp2"]);
    assert!(
        text.contains("decoder2 rank 1") && text.contains("NVLink to 0-6"),
        "{text}"
    );
    assert!(!text.contains("hand-offs over one NUMA node"), "{text}");

    // GPU n shares a PCIe switch with GPU n + 2. The machine has two NUMA nodes.
    let card = |number: usize| {
        format!(
            "[gpu.{number}]\nnuma = {}\nswitch = \"{}\"\n",
            number % 2,
            (number + 2) % 4
        )
    };
    let pcie = Machine::new(&(0..4).map(card).collect::<String>());
    assert_eq!(pins(&pcie, &["-p", "1p1d"]), [uuid(0), uuid(2)]);
    let text = pcie.plan(&["-p", "2p2d"]);
    assert!(
        text.contains("hand-offs over a PCIe switch: prefiller1 to decoder1, prefiller2 to decoder2"),
        "{text}"
    );
}

#[test]
fn inherited_visible_devices_are_respected() {
    let machine = Machine::new(&nvlink_pairs());
    let pins = |visible: &str| {
        let mut command = machine.prepared("plan", &["--json", "-p", "1p1d"]);
        let output = command
            .env("CUDA_VISIBLE_DEVICES", visible)
            .output()
            .expect("xpyd runs");
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let engines = plan["plan"]["engines"].as_array().expect("engines");
        let pin = |engine: &serde_json::Value| {
            engine["env"]["CUDA_VISIBLE_DEVICES"]
                .as_str()
                .expect("a pin")
                .to_owned()
        };
        engines.iter().map(pin).collect::<Vec<_>>()
    };
    assert_eq!(pins("1,2,3"), [uuid(2), uuid(3)]);
    assert_eq!(pins(&format!("{},GPU-00000006", uuid(5))), [uuid(5), uuid(6)]);
    let only_one = Machine::new(&nvlink_pairs());
    let mut command = only_one.prepared("plan", &["-p", "1p1d"]);
    let output = command.env("CUDA_VISIBLE_DEVICES", "7").output().expect("xpyd runs");
    let text = super::machine::text(&output);
    assert!(
        text.contains(
            "the plan needs 2 GPUs, but xpyd can use 1 here (none with index 8); CUDA_VISIBLE_DEVICES is \"7\""
        ),
        "{text}"
    );
}

#[test]
fn gpus_named_in_the_profile_are_used() {
    let machine = Machine::new(&nvlink_pairs());
    let more = ["-p", "1p1d", "--set", "decode.gpus=[6]"];
    assert_eq!(pins(&machine, &more), [uuid(7), uuid(6)]);
    let outside = machine.findings("gpu", &["-p", "1p1d", "--set", "decode.gpus=[9]"]);
    assert!(outside[0].contains("none with index 9"), "{outside:?}");
}

#[test]
fn an_older_vllm_is_pinned_by_index() {
    let old = r#"{"packages": {"vllm": "0.11.0", "nixl": "1.5.1"}}"#;
    let machine = Machine::with_vllm(&nvlink_pairs(), old);
    assert_eq!(pins(&machine, &["-p", "1p1d"]), ["0", "1"]);
}

#[test]
fn workers_are_bound_to_their_gpus_numa_node() {
    let bound = |machine: &Machine, more: &[&str]| {
        let plan = machine.json(&[&["-p", "2p2d-tp2"], more].concat());
        let argv = plan["plan"]["engines"][3]["argv"].as_array().expect("words").clone();
        let at = argv.iter().position(|word| word == "--numa-bind-nodes")?;
        Some((argv[at + 1].as_str()?.to_owned(), argv[at + 2].as_str()?.to_owned()))
    };
    let machine = Machine::new(&nvlink_pairs());
    assert_eq!(bound(&machine, &[]), Some(("1".to_owned(), "1".to_owned())));
    assert_eq!(
        bound(&machine, &["--set", "decode.args=[\"--no-numa-bind\"]"]),
        None,
        "the profile speaks of it"
    );
    let unknown = Machine::new(&format!("fail = \"nvmlDeviceGetMemoryAffinity\"\n{}", nvlink_pairs()));
    assert_eq!(bound(&unknown, &[]), None);
    let old = r#"{"packages": {"vllm": "0.32.0", "nixl": "1.5.1"}, "options": ["--shutdown-timeout", "--device-ids"]}"#;
    assert_eq!(bound(&Machine::with_vllm(&nvlink_pairs(), old), &[]), None);
}

#[test]
fn larger_gpus_are_preferred_and_mixed_ranks_reported() {
    let machine = Machine::new(
        "[gpu.0]\nname = \"NVIDIA L4\"\ntotal_mib = 23034\n[gpu.1]\n[gpu.2]\n[gpu.3]\nname = \"NVIDIA L4\"\ntotal_mib = 23034\n",
    );
    assert_eq!(pins(&machine, &["-p", "1p1d"]), [uuid(1), uuid(2)]);
    let summary = machine.findings("gpu", &["-p", "1p1d"]);
    assert_eq!(
        summary,
        ["pass 2 of 4 GPUs (2 × NVIDIA L4, 2 × NVIDIA H100 80GB HBM3), driver 570.86.15, CUDA 12.8"]
    );
    assert_eq!(machine.findings("gpu_kinds", &["-p", "1p1d-tp2"]), [""; 0]);
    let more = [
        "-p",
        "1p1d",
        "--set",
        "prefill.tensor_parallel=2",
        "--set",
        "prefill.gpus=[0,1]",
    ];
    let mixed = machine.findings("gpu_kinds", &more);
    assert!(
        mixed[0].starts_with("warn prefiller1 runs on GPUs of different kinds: NVIDIA H100 80GB HBM3, NVIDIA L4"),
        "{mixed:?}"
    );
}

#[test]
fn mig_slices_are_separate_devices() {
    let script = "[gpu.0]\n[gpu.0.mig.0]\ntotal_mib = 40000\nname = \"NVIDIA H100 MIG 3g.40gb\"\n[gpu.0.mig.1]\ntotal_mib = 40000\n";
    let machine = Machine::new(script);
    let slice = |number: usize| format!("MIG-00000000-0000-0000-0000-{number:012x}");
    assert_eq!(pins(&machine, &["-p", "1p1d"]), [slice(1), slice(2)]);
    let text = machine.plan(&["-p", "1p1d"]);
    assert!(
        text.contains("GPU 0 slice 1") && text.split_whitespace().any(|word| word == "1000"),
        "{text}"
    );
    assert_eq!(
        pins(&machine, &["-p", "1p1d", "--set", "prefill.gpus=[1001]"]),
        [slice(2), slice(1)]
    );
    let wide = machine.findings(
        "mig",
        &[
            "-p",
            "1p1d",
            "--set",
            "prefill.tensor_parallel=2",
            "--set",
            "prefill.gpus=[1000, 1001]",
            "--set",
            "decode.gpus=[1000]",
        ],
    );
    assert!(wide[0].contains("CUDA shows a process only one slice"), "{wide:?}");
    let old = r#"{"packages": {"vllm": "0.11.0", "nixl": "1.5.1"}}"#;
    let old = Machine::with_vllm(script, old).findings("mig", &["-p", "1p1d"]);
    assert!(old[0].contains("vLLM 0.11.0 crashes on the UUID of one"), "{old:?}");
}

#[test]
fn broken_gpus_are_avoided_or_named() {
    let script = "[gpu.0]\nlost = 15\n[gpu.1]\nrepair_failed = 1\n[gpu.2]\nrepair_pending = 1\nuncorrected_errors = 3\n[gpu.3]\n";
    let machine = Machine::new(script);
    assert_eq!(pins(&machine, &["-p", "1p1d"]), [uuid(2), uuid(3)]);
    let two = machine.findings("gpu_health", &["-p", "1p1d"]);
    assert_eq!(two.len(), 2, "{two:?}");
    assert!(
        two[0].starts_with("warn GPU 2, planned for prefiller1, waits for a reset"),
        "{two:?}"
    );
    assert!(two[1].contains("had 3 uncorrected memory errors"), "{two:?}");
    let all = machine.findings("gpu_health", &["-p", "2p2d"]);
    assert!(
        all[0].starts_with("fail GPU 0") && all[0].contains("fell off the bus"),
        "{all:?}"
    );
    assert!(all[1].starts_with("fail GPU 1") && all[1].contains("XID 64"), "{all:?}");
}

#[test]
fn a_missing_or_broken_nvml_is_a_finding() {
    let machine = Machine::new(&cards(2, ""));
    let mut command = machine.prepared("plan", &["-p", "1p1d"]);
    let output = command
        .env("XPYD_NVML", "/nowhere/libnvidia-ml.so")
        .output()
        .expect("xpyd runs");
    assert!(output.status.success());
    let text = super::machine::text(&output);
    let finding = text
        .lines()
        .find(|line| line.trim_start().starts_with("fail  gpu "))
        .unwrap_or_default();
    assert!(
        finding
            .contains("the plan needs 2 GPUs: no NVIDIA driver: the library /nowhere/libnvidia-ml.so cannot be loaded"),
        "{text}"
    );
    // Findings that prevent the start come first.
    let position = |needle: &str| text.find(needle).expect(needle);
    assert!(position("fail  gpu") < position("profile    1p1d"), "{text}");
    machine.set(&format!("fail = \"nvmlInit_v2\"\nfail_with = 18\n{}", cards(2, "")));
    let updated = machine.findings("gpu", &["-p", "1p1d"]);
    assert!(updated[0].contains("the NVIDIA driver was updated"), "{updated:?}");
    machine.set(&format!("fail = \"nvmlDeviceGetCount_v2\"\n{}", cards(2, "")));
    let uncounted = machine.findings("gpu", &["-p", "1p1d"]);
    assert!(
        uncounted[0].starts_with("fail the plan needs 2 GPUs: NVML failed"),
        "{uncounted:?}"
    );
}

#[test]
fn only_nvml_calls_that_list_gpus_are_required() {
    let machine = Machine::new(&nvlink_pairs());
    for call in [
        "nvmlSystemGetDriverVersion",
        "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlDeviceGetName",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetMPSComputeRunningProcesses_v3",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetPciInfo_v3",
        "nvmlDeviceGetMemoryAffinity",
        "nvmlDeviceGetCpuAffinityWithinScope",
        "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetTopologyCommonAncestor",
        "nvmlDeviceGetP2PStatus",
    ] {
        machine.set(&format!("fail = \"{call}\"\n{}", nvlink_pairs()));
        let plan = machine.json(&["-p", "2p2d"]);
        assert_eq!(plan["gpus"].as_array().map(Vec::len), Some(8), "{call}");
        let failed = plan["findings"]
            .as_array()
            .expect("findings")
            .iter()
            .filter(|finding| finding["level"] == "fail");
        assert_eq!(failed.count(), 0, "{call}");
        // Without peer status, the remote ends of the links show the same topology.
        if call == "nvmlDeviceGetP2PStatus" {
            let text = machine.plan(&["-p", "2p2d"]);
            assert!(text.contains("NVLink to 1"), "{text}");
        }
        if call == "nvmlDeviceGetUUID" {
            assert_eq!(pins(&machine, &["-p", "1p1d"]), ["0", "1"]);
        }
    }
}
