//! A machine with GPUs: the NVML library of `tests/fake-nvml` reports what each test sets. Simulated engines run behind a
//! program that looks like vLLM, so that plans need GPUs and NVML shows the engines' processes.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::support::TestEnv;

/// The path of the fake NVML library, which is built once.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        // A separate folder, because the compiler writes temporary files next to its output.
        let own = folder.join(format!("fake-nvml-{}", std::process::id()));
        std::fs::create_dir_all(&own).expect("a folder");
        let (library, made) = (folder.join("libfake-nvml.so"), own.join("libfake-nvml.so"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-nvml/lib.rs");
        let compiler = std::env::var_os("RUSTC")
            .filter(|path| !path.is_empty())
            .unwrap_or_else(|| "rustc".into());
        let status = Command::new(compiler)
            .args([
                "--edition",
                "2024",
                "--crate-name",
                "fake_nvml",
                "--crate-type",
                "cdylib",
                "-o",
            ])
            .args([&made, &source])
            .status()
            .expect("rustc runs");
        assert!(status.success(), "the fake library is built");
        // Another test process can be loading the existing library.
        std::fs::rename(&made, &library).expect("a library");
        std::fs::remove_dir_all(&own).expect("an empty folder");
        library
    })
}

/// The installed software that the machine's `python` reports.
const VLLM: &str = r#"{"packages": {"vllm": "0.32.0", "nixl": "1.5.1"}, "options": ["--shutdown-timeout", "--device-ids", "--numa-bind-nodes"], "numa_bind": true}"#;

/// A test environment with GPUs and a program that looks like vLLM.
pub(super) struct Machine {
    pub(super) env: TestEnv,
}

impl Machine {
    /// A machine with the GPUs of the script.
    pub(super) fn new(script: &str) -> Self {
        Self::with_vllm(script, VLLM)
    }

    /// The same, with another vLLM.
    pub(super) fn with_vllm(script: &str, vllm: &str) -> Self {
        let env = TestEnv::new();
        let machine = Self { env };
        machine.set(script);
        let bin = machine.env.path().join("bin");
        std::fs::create_dir(&bin).expect("a folder");
        // The software probe runs the `python` next to `vllm`.
        write_program(&bin.join("python"), &format!("echo '{vllm}'"));
        write_program(
            &bin.join("vllm"),
            &format!(
                "shift\nexec '{}' sim \"$@\" --preset instant",
                env!("CARGO_BIN_EXE_xpyd")
            ),
        );
        write_program(&bin.join("numactl"), "exit 0");
        let model = machine.env.path().join("model");
        std::fs::create_dir(&model).expect("a folder");
        std::fs::write(model.join("config.json"), LLAMA).expect("a file");
        machine
    }

    /// Changes what NVML reports, also to processes that have already loaded it.
    pub(super) fn set(&self, script: &str) {
        let (new, path) = (self.env.path().join("nvml.new"), self.script());
        std::fs::write(&new, script).expect("a file");
        std::fs::rename(new, path).expect("a file");
    }

    pub(super) fn script(&self) -> PathBuf {
        self.env.path().join("nvml.toml")
    }

    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.env.command(arguments);
        let path = format!("{}:/usr/bin:/bin", self.env.path().join("bin").display());
        command
            .env("PATH", path)
            .env("XPYD_NVML", library())
            .env("XPYD_FAKE_NVML", self.script());
        command
    }

    /// The arguments of a command that plans a fleet, with a local model.
    pub(super) fn arguments(&self, verb: &str, more: &[&str]) -> Vec<String> {
        let settings = [
            format!("port_offset={}", self.env.offset),
            format!("model={}", self.env.path().join("model").display()),
            "connector=nixl".to_owned(),
        ];
        let mut arguments = vec![verb.to_owned()];
        for setting in settings {
            arguments.extend(["--set".to_owned(), setting]);
        }
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        arguments
    }

    pub(super) fn prepared(&self, verb: &str, more: &[&str]) -> Command {
        let arguments = self.arguments(verb, more);
        self.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The text output of `xpyd plan`.
    pub(super) fn plan(&self, more: &[&str]) -> String {
        text(&self.prepared("plan", more).output().expect("xpyd runs"))
    }

    /// The output of `xpyd plan --json`.
    pub(super) fn json(&self, more: &[&str]) -> serde_json::Value {
        let output = self
            .prepared("plan", &[&["--json"], more].concat())
            .output()
            .expect("xpyd runs");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
    }

    /// The findings of this check, each as `level message | hint`.
    pub(super) fn findings(&self, check: &str, more: &[&str]) -> Vec<String> {
        let plan = self.json(more);
        let findings = plan["findings"].as_array().expect("findings").iter();
        let line = |finding: &serde_json::Value| {
            let part = |name: &str| finding[name].as_str().unwrap_or_default().to_owned();
            let hint = part("hint");
            let hint = if hint.is_empty() { hint } else { format!(" | {hint}") };
            format!("{} {}{hint}", part("level"), part("message"))
        };
        findings.filter(|finding| finding["check"] == check).map(line).collect()
    }

    /// The value of a variable for each engine, in the order of the plan.
    pub(super) fn variables(&self, name: &str, more: &[&str]) -> Vec<String> {
        let plan = self.json(more);
        let engines = plan["plan"]["engines"].as_array().expect("engines").iter();
        engines
            .map(|engine| engine["env"][name].as_str().unwrap_or_default().to_owned())
            .collect()
    }
}

pub(super) fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn write_program(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("a file");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a program");
}

/// The configuration of Llama 3.1 8B, without weights.
const LLAMA: &str = r#"{"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "max_position_embeddings": 131072}"#;

/// A script of `count` GPUs with these `lines` each, in which `{}` stands for the number of the GPU.
pub(super) fn cards(count: usize, lines: &str) -> String {
    let card = |number: usize| format!("[gpu.{number}]\n{}\n", lines.replace("{}", &number.to_string()));
    (0..count).map(card).collect()
}

/// A script of 8 × H100 with NVLink between 0 and 1, 2 and 3, …, on two NUMA nodes.
pub(super) fn nvlink_pairs() -> String {
    let card = |number: usize| format!("[gpu.{number}]\nnuma = {}\nnvlink = \"{}\"\n", number / 4, number ^ 1);
    (0..8).map(card).collect()
}

/// The UUID of the GPU of this number.
pub(super) fn uuid(number: usize) -> String {
    format!("GPU-{number:08x}-0000-0000-0000-000000000000")
}
