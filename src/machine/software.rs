//! The installed engine: where its program is, and the versions beside it. Nothing heavy is imported to find out:
//! the program's own interpreter reads package metadata.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::Deserialize;

/// What is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Engine {
    /// The plan runs none.
    NotAsked,
    /// The program of this name is not on PATH, or the path is no file.
    Missing(String),
    /// The program, and the versions of the packages of its environment.
    Found {
        /// Absolute path.
        program: PathBuf,
        /// Version of `vllm`, if its metadata could be read.
        vllm: Option<Version>,
        /// Version of `lmcache`, if installed.
        lmcache: Option<Version>,
        /// Version of `nixl`, if installed.
        nixl: Option<Version>,
        /// Whether `vllm serve` knows `--shutdown-timeout`.
        has_shutdown_timeout: bool,
        /// Whether it reads UUIDs in `CUDA_VISIBLE_DEVICES`: those that know `--device-ids` do, older ones crash on them.
        has_device_ids: bool,
        /// Whether it knows `--numa-bind`, and goes on where the kernel forbids it.
        has_numa_bind: bool,
    },
}

/// The first three numbers of a version, and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Major, minor, patch; what is absent counts as 0.
    pub numbers: [u32; 3],
    /// As the package says it: `0.32.0+cpu`.
    pub text: String,
}

impl Version {
    /// Reads a version, as far as it consists of numbers.
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

/// What [`PROBE`] prints.
#[derive(Debug, Default, Deserialize)]
struct Probe {
    vllm: Option<String>,
    lmcache: Option<String>,
    nixl: Option<String>,
    shutdown_timeout: bool,
    #[serde(default)]
    device_ids: bool,
    #[serde(default)]
    numa_bind: bool,
}

/// Reads metadata, and one source file for a flag that older versions lack. Imports neither vllm nor torch.
const PROBE: &str = r#"
import importlib.metadata as metadata, importlib.util, json, pathlib
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
found = {name: version(name) for name in ("vllm", "lmcache")}
found["nixl"] = version("nixl") or version("nixl-cu13") or version("nixl-cu12")
spec = importlib.util.find_spec("vllm")
folders = [pathlib.Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
sources = ("engine/arg_utils.py", "entrypoints/openai/cli_args.py")
def has(word, *sources):
    return any(word in (folder / source).read_text() for folder in folders for source in sources
        if (folder / source).is_file())
found["shutdown_timeout"] = has("shutdown_timeout", *sources)
found["device_ids"] = has("--device-ids", *sources)
found["numa_bind"] = has("--numa-bind-nodes", *sources) and has("_resolve_numactl_args", "utils/numa_utils.py")
print(json.dumps(found))
"#;

/// Looks for the program and asks its interpreter.
pub(super) fn survey(program: &str) -> Engine {
    let Some(path) = find(program) else {
        return Engine::Missing(program.to_owned());
    };
    let probe = interpreter(&path)
        .and_then(|interpreter| ask(&interpreter))
        .unwrap_or_default();
    let version = |text: Option<String>| text.as_deref().and_then(Version::parse);
    Engine::Found {
        program: path,
        vllm: version(probe.vllm),
        lmcache: version(probe.lmcache),
        nixl: version(probe.nixl),
        has_shutdown_timeout: probe.shutdown_timeout,
        has_device_ids: probe.device_ids,
        has_numa_bind: probe.numa_bind,
    }
}

/// A path as it is, a name on PATH.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return std::path::absolute(program).ok().filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// The interpreter of a script that pip made: the one of its first line, or the `python` beside it.
fn interpreter(program: &Path) -> Option<PathBuf> {
    let head = fs_err::read(program).ok()?;
    let line = String::from_utf8_lossy(head.split(|byte| *byte == b'\n').next()?).into_owned();
    let named = line.strip_prefix("#!").map(|rest| PathBuf::from(rest.trim()));
    named
        .filter(|path| {
            path.is_file()
                && path
                    .file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("python"))
        })
        .or_else(|| Some(program.with_file_name("python")).filter(|path| path.is_file()))
}

/// Runs the probe. An interpreter that does not answer in time is as good as none.
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
    // After an answer the process is at its end anyway; without one it must go, which also ends the reader.
    drop(child.kill());
    drop(child.wait());
    drop(reader.join());
    serde_json::from_slice(&answer?).ok()
}

const PROBE_DEADLINE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn versions_compare_by_their_numbers() {
        let version = |text| Version::parse(text).expect("a version");
        assert!(version("0.32.0+cpu").at_least(0, 26) && !version("0.9.2").at_least(0, 26));
        assert!(version("1.0").at_least(0, 26) && !version("0.25.1rc2").at_least(0, 26));
        assert_eq!(version("0.26.0.dev1+g123").numbers, [0, 26, 0]);
        assert_eq!(Version::parse("unknown"), None);
    }
}
