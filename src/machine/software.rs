//! The installed engine: its program, and the versions of its packages. The program's own interpreter reads package
//! metadata, and imports nothing heavy.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use super::expand::expanded;

/// The installed engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installation {
    /// Not looked for, because the plan runs none.
    NotAsked,
    /// No program of this name is on PATH, or the path is not a file.
    Missing(String),
    /// The program, and the versions of the packages in its environment.
    Found {
        /// Absolute path.
        program: PathBuf,
        /// Version of `vllm`, if its metadata could be read.
        vllm: Option<Version>,
        /// Version of `lmcache`, if installed.
        lmcache: Option<Version>,
        /// Version of `nixl`, if installed.
        nixl: Option<Version>,
        /// Whether `vllm serve` has the option `--shutdown-timeout`.
        has_shutdown_timeout: bool,
        /// Whether it accepts UUIDs in `CUDA_VISIBLE_DEVICES`. Versions with `--device-ids` do; older ones crash on them.
        has_device_ids: bool,
        /// Whether it has the option `--numa-bind`, and continues if the kernel forbids binding.
        has_numa_bind: bool,
        /// More facts about the program's environment.
        environment: Box<PythonEnvironment>,
    },
}

impl Installation {
    /// The version of vLLM, if it is known.
    pub fn vllm_version(&self) -> Option<&str> {
        match self {
            Self::Found { vllm, .. } => vllm.as_ref().map(|version| version.text.as_str()),
            Self::Missing(_) | Self::NotAsked => None,
        }
    }
}

/// The Python environment of the engine's program. All fields are empty if its interpreter could not be asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PythonEnvironment {
    /// The path of the interpreter.
    pub python: Option<PathBuf>,
    /// The version of the interpreter.
    pub python_version: Option<Version>,
    /// Versions of other relevant packages, by name. NIXL's library has a distribution of its own.
    pub packages: BTreeMap<String, String>,
    /// The CUDA version that torch was built for, from its `version.py`: `13.0`.
    pub cuda: Option<String>,
    /// Options of `vllm serve` in the sources of the installed version, as far as they can be found: `--max-model-len`.
    pub options: BTreeSet<String>,
    /// Whether its switches are paired, `--enable-x` and `--disable-x` (from 0.33 on).
    pub has_pairs: bool,
    /// Names of the connectors in vLLM's factory.
    pub connectors: BTreeSet<String>,
    /// Whether the program `lmcache` is in the folder of the engine's.
    pub has_lmcache_program: bool,
}

/// A version: its first three numbers, and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Major, minor, patch; missing numbers are 0.
    pub numbers: [u32; 3],
    /// The package's own text: `0.32.0+cpu`.
    pub text: String,
}

impl Version {
    /// Parses the leading numbers of a version.
    pub fn parse(text: &str) -> Option<Self> {
        let release = text
            .split(|character: char| !character.is_ascii_digit() && character != '.')
            .next()?;
        let mut parts = release.split('.').map(str::parse::<u32>);
        let mut numbers = [parts.next()?.ok()?, 0, 0];
        for slot in &mut numbers[1..] {
            *slot = parts.next().and_then(Result::ok).unwrap_or(0);
        }
        Some(Self {
            numbers,
            text: text.to_owned(),
        })
    }

    /// Whether it is at least `major.minor`.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        self.numbers >= [major, minor, 0]
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

/// The output of [`PROBE`].
#[derive(Debug, Default, Deserialize)]
struct Probe {
    python: Option<String>,
    #[serde(default)]
    packages: BTreeMap<String, String>,
    cuda: Option<String>,
    #[serde(default)]
    options: BTreeSet<String>,
    #[serde(default)]
    connectors: BTreeSet<String>,
    #[serde(default)]
    numa_bind: bool,
    #[serde(default)]
    pairs: bool,
}

/// Reads metadata, and the source files that define options and connectors. It imports neither vllm nor torch.
///
/// An option of `vllm serve` is a string in a file that calls `add_argument`, or a field of an argument class, which vLLM
/// turns into `--field-name`. The places of these files differ between versions.
const PROBE: &str = r#"
import sys
# The engine's program does not look into the current folder either.
sys.path = [folder for folder in sys.path if folder]
import importlib.metadata as metadata, importlib.util, json, pathlib, platform, re
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
names = ("vllm", "lmcache", "nixl", "nixl-cu12", "nixl-cu13", "torch", "transformers", "huggingface_hub")
packages = {name: version(name) for name in names}
def folder(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return pathlib.Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
def text(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
options, connectors, cuda, numa_bind, pairs = set(), set(), None, False, False
vllm, torch = folder("vllm"), folder("torch")
if vllm:
    serve = vllm / "entrypoints"
    parser = vllm / "utils/argparse_utils.py"
    pairs = "class EnableDisableAction" in text(parser)
    sources = [vllm / "engine/arg_utils.py", parser, *serve.rglob("cli_args.py"),
        *serve.rglob("serve.py"), *(serve / "cli").glob("*.py")]
    for source in map(text, sources):
        options.update(re.findall(r"[\"'](--?[A-Za-z][A-Za-z0-9_-]*)[\"']", source))
        options.update("--" + name for name in re.findall(r"^    ([a-z][a-z0-9_]*)\s*:", source, re.M))
    factory = text(vllm / "distributed/kv_transfer/kv_connector/factory.py")
    numa_bind = "_resolve_numactl_args" in text(vllm / "utils/numa_utils.py")
    connectors.update(re.findall(r"register_connector\(\s*[\"'](\w+)[\"']", factory))
if torch:
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text(torch / "version.py"), re.M)
    cuda = found and found.group(1)
print(json.dumps({"python": platform.python_version(), "packages": {k: v for k, v in packages.items() if v},
    "cuda": cuda, "options": sorted(options), "connectors": sorted(connectors),
    "numa_bind": numa_bind, "pairs": pairs}))
"#;

/// Finds the program and asks its interpreter. `env` are the variables of the engines.
pub(super) fn survey(program: &str, env: &BTreeMap<String, String>) -> Installation {
    let Some(path) = find(program, env.get("PATH").map(String::as_str)) else {
        return Installation::Missing(program.to_owned());
    };
    let python = interpreter(&path);
    let probe = python.as_deref().and_then(ask).unwrap_or_default();
    let version = |names: &[&str]| {
        let found = names.iter().find_map(|name| probe.packages.get(*name));
        found.and_then(|text| Version::parse(text))
    };
    let options: BTreeSet<String> = probe.options.iter().map(|option| option.replace('_', "-")).collect();
    Installation::Found {
        vllm: version(&["vllm"]),
        lmcache: version(&["lmcache"]),
        nixl: version(&["nixl", "nixl-cu13", "nixl-cu12"]),
        has_shutdown_timeout: options.contains("--shutdown-timeout"),
        has_device_ids: options.contains("--device-ids"),
        has_numa_bind: options.contains("--numa-bind-nodes") && probe.numa_bind,
        environment: Box::new(PythonEnvironment {
            has_lmcache_program: path.with_file_name("lmcache").is_file(),
            python_version: probe.python.as_deref().and_then(Version::parse),
            python,
            packages: probe.packages,
            cuda: probe.cuda,
            has_pairs: probe.pairs,
            options,
            connectors: probe.connectors,
        }),
        program: path,
    }
}

/// Resolves a path or a name as a shell does: a name is searched in the folders of `path`, or else of PATH.
pub(super) fn find(program: &str, path: Option<&str>) -> Option<PathBuf> {
    let variable = |name: &str| std::env::var(name).ok();
    if program.contains('/') {
        let program = expanded(program, &variable);
        return std::path::absolute(program).ok().filter(|path| path.is_file());
    }
    let path = path.map(Into::into).or_else(|| std::env::var_os("PATH"))?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// The interpreter of a script that pip, uv or pipx made: the one in its header, or the `python` in its folder. The script
/// can be a link from a folder of programs into an environment.
fn interpreter(program: &Path) -> Option<PathBuf> {
    let script = program.canonicalize().ok()?;
    let mut head = [0; 1024];
    let read = fs_err::File::open(&script).ok()?.read(&mut head).ok()?;
    let head = String::from_utf8_lossy(&head[..read]).into_owned();
    let is_python = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        path.is_file() && (name.starts_with("python") || name.starts_with("pypy"))
    };
    let beside = [script.as_path(), program].map(|script| script.with_file_name("python"));
    named(&head)
        .filter(is_python)
        .or_else(|| beside.into_iter().find(|path| path.is_file()))
}

/// The interpreter in the header of a script. If its path is too long for `#!` or has a space, it is in a second line,
/// which a shell executes and Python reads as text: `'''exec' "/a b/python" "$0" "$@"`.
fn named(head: &str) -> Option<PathBuf> {
    let mut lines = head.lines();
    let mut words = lines.next()?.strip_prefix("#!")?.split_ascii_whitespace();
    let second = lines.next().unwrap_or_default();
    if let Some(command) = second.strip_prefix("'''exec' ") {
        let quote = command.chars().next().filter(|first| ['"', '\''].contains(first));
        let path = match quote {
            Some(quote) => command[1..].split(quote).next(),
            None => command.split(' ').next(),
        };
        return path.map(PathBuf::from);
    }
    match (words.next(), words.next()) {
        (Some(env), Some(name)) if env.ends_with("/env") => find(name, None),
        (Some(path), _) => Some(PathBuf::from(path)),
        _ => None,
    }
}

/// Runs the probe. `None` if the interpreter fails or does not answer in time.
fn ask(interpreter: &Path) -> Option<Probe> {
    let mut child = Command::new(interpreter)
        .args(["-c", PROBE])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut stdout = child.stdout.take()?;
    let (sender, receiver) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        drop(stdout.read_to_end(&mut text));
        drop(sender.send(text));
    });
    let answer = receiver.recv_timeout(PROBE_DEADLINE).ok();
    // After its answer the process exits anyway. Without one it must be killed, which also ends the reader.
    drop(child.kill());
    drop(child.wait());
    drop(reader.join());
    serde_json::from_slice(&answer?).ok()
}

/// Time limit for the probe. It only reads metadata, but perhaps from a cold disk of a busy host.
const PROBE_DEADLINE: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Version, named};

    #[test]
    fn the_interpreter_is_read_from_the_header() {
        for (head, wanted) in [
            ("#!/opt/venv/bin/python3\nimport x", "/opt/venv/bin/python3"),
            (
                "#!/bin/sh\n'''exec' \"/t ool/bin/python\" \"$0\" \"$@\"\n' '''\n",
                "/t ool/bin/python",
            ),
            (
                "#!/bin/sh\n'''exec' '/t ool/bin/python' \"$0\" \"$@\"\n' '''\n",
                "/t ool/bin/python",
            ),
            (
                "#!/bin/sh\n'''exec' /long/bin/python \"$0\" \"$@\"\n' '''\n",
                "/long/bin/python",
            ),
        ] {
            assert_eq!(named(head).as_deref(), Some(Path::new(wanted)), "{head}");
        }
        assert_eq!(named("\x7fELF"), None);
    }

    #[test]
    fn versions_compare_by_their_numbers() {
        let version = |text| Version::parse(text).expect("a version");
        assert!(version("0.32.0+cpu").at_least(0, 26) && !version("0.9.2").at_least(0, 26));
        assert!(version("1.0").at_least(0, 26) && !version("0.25.1rc2").at_least(0, 26));
        assert_eq!(version("0.26.0.dev1+g123").numbers, [0, 26, 0]);
        assert_eq!(Version::parse("unknown"), None);
    }
}
