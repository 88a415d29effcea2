//! GPUs, through a library that says what each test wants: `tests/fake-nvml`. Engines are simulated ones behind a program
//! that looks like vLLM, so that plans want GPUs and NVML shows who runs on them.

mod memory;
mod placed;
mod plan;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::support::Place;

/// The library, built once.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        // A folder of its own, because the compiler writes its parts beside what it makes.
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
        // Another test process may be loading the one that is there.
        std::fs::rename(&made, &library).expect("a library");
        std::fs::remove_dir_all(&own).expect("an empty folder");
        library
    })
}

/// What a machine's `vllm` is.
const VLLM: &str = r#"{"packages": {"vllm": "0.32.0", "nixl": "1.5.1"}, "options": ["--shutdown-timeout", "--device-ids", "--numa-bind-nodes"], "numa_bind": true}"#;

/// A place with GPUs and a program that looks like vLLM.
struct Machine {
    place: Place,
}

impl Machine {
    /// Its GPUs are those of the script.
    fn new(script: &str) -> Self {
        Self::with_vllm(script, VLLM)
    }

    /// The same with another vLLM.
    fn with_vllm(script: &str, vllm: &str) -> Self {
        let place = Place::new();
        let machine = Self { place };
        machine.set(script);
        let bin = machine.place.path().join("bin");
        std::fs::create_dir(&bin).expect("a folder");
        // The probe asks the `python` beside it.
        write_program(&bin.join("python"), &format!("echo '{vllm}'"));
        write_program(
            &bin.join("vllm"),
            &format!(
                "shift\nexec '{}' sim \"$@\" --preset instant",
                env!("CARGO_BIN_EXE_xpyd")
            ),
        );
        write_program(&bin.join("numactl"), "exit 0");
        let model = machine.place.path().join("model");
        std::fs::create_dir(&model).expect("a folder");
        std::fs::write(model.join("config.json"), LLAMA).expect("a file");
        machine
    }

    /// Changes what NVML says, also for those who have loaded it.
    fn set(&self, script: &str) {
        let (new, path) = (self.place.path().join("nvml.new"), self.script());
        std::fs::write(&new, script).expect("a file");
        std::fs::rename(new, path).expect("a file");
    }

    fn script(&self) -> PathBuf {
        self.place.path().join("nvml.toml")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.place.command(arguments);
        let path = format!("{}:/usr/bin:/bin", self.place.path().join("bin").display());
        command
            .env("PATH", path)
            .env("XPYD_NVML", library())
            .env("XPYD_FAKE_NVML", self.script());
        command
    }

    /// The arguments of a command that plans, with a model that is here.
    fn arguments(&self, verb: &str, more: &[&str]) -> Vec<String> {
        let settings = [
            format!("port_offset={}", self.place.offset),
            format!("model={}", self.place.path().join("model").display()),
            "connector=nixl".to_owned(),
        ];
        let mut arguments = vec![verb.to_owned()];
        for setting in settings {
            arguments.extend(["--set".to_owned(), setting]);
        }
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        arguments
    }

    fn prepared(&self, verb: &str, more: &[&str]) -> Command {
        let arguments = self.arguments(verb, more);
        self.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// `xpyd plan`, as text.
    fn plan(&self, more: &[&str]) -> String {
        text(&self.prepared("plan", more).output().expect("xpyd runs"))
    }

    /// `xpyd plan --json`.
    fn json(&self, more: &[&str]) -> serde_json::Value {
        let output = self
            .prepared("plan", &[&["--json"], more].concat())
            .output()
            .expect("xpyd runs");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
    }

    /// The lines of the plan that tell findings of this check.
    fn findings(&self, check: &str, more: &[&str]) -> Vec<String> {
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

    /// A variable of each engine, in the order of the plan.
    fn variables(&self, name: &str, more: &[&str]) -> Vec<String> {
        let plan = self.json(more);
        let engines = plan["plan"]["engines"].as_array().expect("engines").iter();
        engines
            .map(|engine| engine["env"][name].as_str().unwrap_or_default().to_owned())
            .collect()
    }
}

fn text(output: &Output) -> String {
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

/// Llama 3.1 with 8 billion parameters, whose weights are not here.
const LLAMA: &str = r#"{"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "max_position_embeddings": 131072}"#;

/// `count` cards with `lines` each, in which `{}` is the card's number.
fn cards(count: usize, lines: &str) -> String {
    let card = |number: usize| format!("[gpu.{number}]\n{}\n", lines.replace("{}", &number.to_string()));
    (0..count).map(card).collect()
}

/// 8 × H100: bridges between 0 and 1, 2 and 3, …; two NUMA nodes.
fn nvlink_pairs() -> String {
    let card = |number: usize| format!("[gpu.{number}]\nnuma = {}\nnvlink = \"{}\"\n", number / 4, number ^ 1);
    (0..8).map(card).collect()
}

/// The UUID of the card of this number.
fn uuid(number: usize) -> String {
    format!("GPU-{number:08x}-0000-0000-0000-000000000000")
}
