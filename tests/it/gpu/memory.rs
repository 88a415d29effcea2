//! GPU memory before a start: which process uses it, and whether engines and model fit.

use super::machine::{Machine, cards, uuid};

#[test]
fn a_busy_gpu_is_avoided_or_its_process_named() {
    let own = std::process::id();
    let machine = Machine::new(&format!(
        "[gpu.0]\n[gpu.0.process.0]\npid = {own}\nmib = 70000\n[gpu.0.process.1]\npid = 4194305\nmib = 300\n[gpu.1]\n[gpu.2]\n"
    ));
    let pins = machine.variables("CUDA_VISIBLE_DEVICES", &["-p", "1p1d"]);
    assert_eq!(pins, [uuid(1), uuid(2)]);
    let more = ["-p", "1p1d", "--set", "prefill.gpus=[0]"];
    let found = machine.findings("gpu_memory", &more);
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::current())
        .ok()
        .flatten()
        .map(|user| user.name);
    let user = user.expect("a name");
    assert!(
        found[0].starts_with("fail GPU 0 has 10.4 of 79.6 GiB free, and prefiller1 needs 0.92 of it (73.3 GiB); "),
        "{found:?}"
    );
    assert!(
        found[0].contains(&format!("pid {own} ({user}, ")) && found[0].contains(", 70000 MiB)"),
        "{found:?}"
    );
    assert!(found[0].contains("pid 4194305 (300 MiB, not visible here"), "{found:?}");
    assert!(
        found[0].contains("`--set vllm.gpu_memory_utilization=0.13` fits"),
        "{found:?}"
    );

    let output = machine.prepared("up", &more).output().expect("xpyd runs");
    assert_eq!(output.status.code(), Some(3), "{}", super::machine::text(&output));
    let fits = [&more[..], &["--set", "vllm.gpu_memory_utilization=0.13"]].concat();
    assert!(
        machine.findings("gpu_memory", &fits)[0].starts_with("pass"),
        "the hinted amount fits"
    );
}

#[test]
fn memory_without_a_visible_process_is_reported() {
    let script = cards(2, "used_mib = 60000");
    let found = Machine::new(&script).findings("gpu_memory", &["-p", "1p1d"]);
    assert!(found[0].contains("NVML lists no process that uses it"), "{found:?}");
    let hidden = format!("fail = \"nvmlDeviceGetComputeRunningProcesses_v3\"\n{script}");
    let found = Machine::new(&hidden).findings("gpu_memory", &["-p", "1p1d"]);
    assert!(
        found[0].contains("NVML does not report which process uses it"),
        "{found:?}"
    );
    let unknown = format!("fail = \"nvmlDeviceGetMemoryInfo_v2\"\n{script}");
    let found = Machine::new(&unknown).findings("gpu_memory", &["-p", "1p1d"]);
    assert!(
        found[0].starts_with("warn the memory of GPU 0 cannot be read"),
        "{found:?}"
    );
}

#[test]
fn engines_with_small_memory_shares_share_a_gpu() {
    let machine = Machine::new(&cards(1, ""));
    let found = machine.findings("gpu", &["-p", "1p1d"]);
    assert!(found[0].contains("gpu_memory_utilization=0.45"), "{found:?}");
    let more = [
        "-p",
        "1p1d",
        "--set",
        "vllm.gpu_memory_utilization=0.45",
        "--set",
        "vllm.max_model_len=8192",
    ];
    assert_eq!(machine.variables("CUDA_VISIBLE_DEVICES", &more), [uuid(0), uuid(0)]);
    let text = machine.plan(&more);
    assert!(
        text.contains("prefiller1 and decoder1 share GPU 0 and start one after the other"),
        "{text}"
    );
    assert!(
        text.contains("prefiller1 + decoder1") && text.contains("--gpu-memory-utilization 0.45"),
        "{text}"
    );
    assert!(machine.findings("gpu_memory", &more)[0].starts_with("pass"));
    let wrong = machine.plan(&["--set", "decode.gpu_memory_utilization=1.5"]);
    assert!(wrong.contains("1.5 is not a fraction of the memory"), "{wrong}");
}

#[test]
fn a_model_that_does_not_fit_is_reported_before_the_start() {
    let small = Machine::new(&cards(2, "total_mib = 23034\nname = \"NVIDIA L4\""));
    let found = small.findings("fit", &["-p", "1p1d", "--set", "vllm.max_model_len=131072"]);
    assert!(
        found[0].starts_with("warn KV of one request of 131072 tokens needs 16.0 GiB on each GPU of prefill engines"),
        "{found:?}"
    );
    assert!(found[0].contains("| `--set vllm.max_model_len="), "{found:?}");
    let tiny = Machine::new(&cards(2, "total_mib = 16000"));
    let found = tiny.findings("fit", &["-p", "1p1d"]);
    assert!(
        found[1].contains("decode engines need about 15.0 GiB for weights") && found[1].contains("tensor_parallel=2"),
        "{found:?}"
    );
    let large = Machine::new(&cards(2, ""));
    let found = large.findings("fit", &["-p", "1p1d"]);
    assert!(
        found[0].starts_with(
            "pass prefill engines: about 15.0 GiB of weights on each GPU, and KV for about 28 requests of 16384 tokens"
        ),
        "{found:?}"
    );
}
