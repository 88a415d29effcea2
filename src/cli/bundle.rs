//! `xpyd bundle`: an archive for an issue, with a run's plan, its logs and this machine's findings, without secrets.

mod scrub;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;

use self::scrub::Scrubber;
use super::doctor;
use super::run_plan::RunPlan;
use crate::control::rundir::{self, DEFAULT_NAME};
use crate::machine::huggingface::Settings;
use crate::machine::{Installation, Machine};
use crate::plan::redacted_env;
use crate::preflight::gibibytes;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Number of bytes to take from the beginning of a long file. A failed start gives its reason there.
const HEAD_BYTES: u64 = 512 << 10;

/// Number of bytes to take from its end.
const TAIL_BYTES: u64 = 4 << 20;

/// Maximum number of files of a run. An engine can have many log files.
const MOST_FILES: usize = 200;

/// Prefixes of variables that change the behaviour of engines.
const TELLING: [&str; 16] = [
    "CUDA",
    "GLOO",
    "HF_",
    "LMCACHE",
    "NCCL",
    "NIXL",
    "NVIDIA",
    "OMP",
    "PATH",
    "PYTHON",
    "TORCH",
    "UCX",
    "VIRTUAL_ENV",
    "VLLM",
    "XPYD",
    "CONDA",
];

/// Arguments of `xpyd bundle`.
#[derive(Debug, Clone, Args)]
pub(super) struct Arguments {
    /// The archive to write; it must not exist
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The folder of a run; default: the run that is up, or the newest one
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Name of a run that is up
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// Folder that holds one folder per run
    #[arg(long, default_value = "logs", value_name = "DIR")]
    logs: PathBuf,
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let folder = run_folder(arguments)?;
    let stamp = jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string();
    let stem = format!("xpyd-bundle-{stamp}");
    let output = arguments
        .output
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{stem}.tar.gz")));
    let file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&output)
        .map_err(|error| {
            let error = anyhow::Error::new(error).context(format!("cannot make `{}`", output.display()));
            Failure::new(ExitStatus::Usage, error).hint("name another file: `xpyd bundle --output FILE.tar.gz`")
        })?;
    printer.status("checking this machine");
    // The archive does not need the account of the token.
    let machine = doctor::survey(false);
    let scrubber = Scrubber::new(&secrets(folder.as_deref()));
    let written = write(file, &stem, folder.as_deref(), &machine, &scrubber);
    let names = written.map_err(|error| {
        drop(std::fs::remove_file(&output));
        Failure::from(error.context(format!("cannot write `{}`", output.display())))
    })?;
    for name in &names {
        printer.status(format!("  {name}"));
    }
    let bytes = std::fs::metadata(&output).map_or(0, |file| file.len());
    printer.data(output.display())?;
    printer.status(format!(
        "{} with {} files. Recognised tokens, keys and passwords were removed; check the files before you share \
         them: logs can contain prompts.",
        gibibytes(bytes),
        names.len()
    ));
    Ok(ExitStatus::Success)
}

/// The folder of the run: the given one, that of the run that is up, or the newest; `None` if there is none.
fn run_folder(arguments: &Arguments) -> Result<Option<PathBuf>, Failure> {
    if let Some(folder) = &arguments.run {
        if folder.is_dir() {
            return Ok(Some(folder.clone()));
        }
        let message = format!("`{}` is not a folder", folder.display());
        return Err(Failure::message(ExitStatus::Usage, message).hint("`ls logs` shows the folders of runs"));
    }
    let up = rundir::find(&arguments.name).ok().flatten().map(|run| run.logs_dir);
    let newest = || std::fs::canonicalize(arguments.logs.join("latest")).ok();
    Ok(up.or_else(newest).filter(|folder| folder.is_dir()))
}

fn write(
    file: std::fs::File,
    stem: &str,
    folder: Option<&Path>,
    machine: &Machine,
    scrubber: &Scrubber,
) -> anyhow::Result<Vec<String>> {
    let mut archive = Archive {
        builder: tar::Builder::new(GzEncoder::new(file, Compression::default())),
        stem,
        scrubber,
        names: Vec::new(),
    };
    archive.add("about.txt", &about(machine))?;
    archive.add(
        "findings.json",
        &doctor::json(&doctor::findings_of_machine(machine)).map_err(|failure| failure.error)?,
    )?;
    archive.add("variables.txt", &variables())?;
    archive.add("packages.txt", &packages(machine))?;
    archive.add("gpus.txt", &format!("{:#?}", machine.gpus))?;
    for path in folder.map(files).unwrap_or_default() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The error takes the place of a file that cannot be read, because it can explain the problem.
        let text = ends(&path).unwrap_or_else(|error| format!("cannot be read: {error}"));
        archive.add(&format!("run/{name}"), &text)?;
    }
    archive.builder.into_inner()?.finish()?.flush()?;
    Ok(archive.names)
}

/// The archive while it is written. All content passes through the scrubber.
struct Archive<'bundle> {
    builder: tar::Builder<GzEncoder<std::fs::File>>,
    stem: &'bundle str,
    scrubber: &'bundle Scrubber,
    names: Vec<String>,
}

impl Archive<'_> {
    fn add(&mut self, name: &str, text: &str) -> anyhow::Result<()> {
        let text = self.scrubber.scrub(text);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0));
        let path = format!("{}/{name}", self.stem);
        self.builder.append_data(&mut header, path, text.as_bytes())?;
        self.names.push(name.to_owned());
        Ok(())
    }
}

/// The files of a run: its plan, records, logs and rendered files, in the order of their names.
fn files(folder: &Path) -> Vec<PathBuf> {
    let known = ["json", "log", "yaml", "txt", "toml"];
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| known.contains(&extension))
        })
        .collect();
    files.sort();
    files.truncate(MOST_FILES);
    files
}

/// A whole text, or its beginning and its end, cut at line ends so that no secret is cut in half.
fn ends(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let size = file.metadata()?.len();
    if size <= HEAD_BYTES + TAIL_BYTES {
        let mut text = Vec::new();
        file.take(HEAD_BYTES + TAIL_BYTES).read_to_end(&mut text)?;
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    let mut head = Vec::new();
    (&mut file).take(HEAD_BYTES).read_to_end(&mut head)?;
    head.truncate(
        head.iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |index| index + 1),
    );
    file.seek(SeekFrom::Start(size - TAIL_BYTES))?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut tail)?;
    tail.drain(
        ..tail
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(tail.len(), |index| index + 1),
    );
    let left_out = size - head.len() as u64 - tail.len() as u64;
    Ok(format!(
        "{}... {left_out} bytes were left out by xpyd bundle ...\n{}",
        String::from_utf8_lossy(&head),
        String::from_utf8_lossy(&tail)
    ))
}

fn about(machine: &Machine) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let release = read("/etc/os-release");
    let name = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or("unknown");
    [
        format!(
            "xpyd      {} ({}, {})",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::OS,
            std::env::consts::ARCH
        ),
        format!("made at   {}", jiff::Timestamp::now()),
        format!("system    {}", name.trim_matches('"')),
        format!("kernel    {}", read("/proc/sys/kernel/osrelease").trim()),
        format!("cores     {}", machine.cores),
        format!("memory    {} available", gibibytes(machine.available_memory_bytes)),
        format!("cgroup    {}", read("/proc/self/cgroup").trim().replace('\n', ", ")),
    ]
    .join("\n")
        + "\n"
}

fn packages(machine: &Machine) -> String {
    match &machine.engine {
        Installation::Found {
            program, environment, ..
        } => {
            let mut lines = vec![format!("program {}", program.display())];
            lines.extend(
                environment
                    .python
                    .iter()
                    .map(|python| format!("python {}", python.display())),
            );
            lines.extend(
                environment
                    .python_version
                    .iter()
                    .map(|version| format!("python {version}")),
            );
            lines.extend(
                environment
                    .packages
                    .iter()
                    .map(|(name, version)| format!("{name} {version}")),
            );
            lines.extend(environment.cuda.iter().map(|cuda| format!("torch's CUDA {cuda}")));
            lines.join("\n") + "\n"
        }
        Installation::Missing(name) => format!("no `{name}` on PATH\n"),
        Installation::NotAsked => String::new(),
    }
}

/// The variables that change the behaviour of engines, without secrets.
fn variables() -> String {
    let all =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let telling = all.filter(|(name, _)| TELLING.iter().any(|beginning| name.starts_with(beginning)));
    let lines = redacted_env(&telling.collect())
        .into_iter()
        .map(|(name, value)| format!("{name}={value}\n"));
    lines.collect()
}

/// Every known secret on this machine: in this process's variables, Hugging Face tokens, and the API keys of the run's
/// proxy.
fn secrets(folder: Option<&Path>) -> Vec<String> {
    let all: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let shown = redacted_env(&all);
    let mut secrets: Vec<String> = all
        .iter()
        .filter(|(name, value)| shown.get(*name) != Some(*value))
        .map(|(_, value)| value.clone())
        .collect();
    let mut files = Settings::read(&BTreeMap::new()).token_files().to_vec();
    files.extend(folder.and_then(key_file));
    for file in files {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        secrets.extend(
            text.lines()
                .map(|line| line.trim().to_owned())
                .filter(|line| !line.starts_with('#')),
        );
    }
    secrets
}

/// The file with the API keys of a run's clients, from its plan.
fn key_file(folder: &Path) -> Option<PathBuf> {
    let plan = RunPlan::read(folder)?;
    // The second place is that of plans up to xpyd 0.1.0.
    let places = ["/proxy/guard/api_key_file", "/proxy/service/guard/api_key_file"];
    let path = places.iter().find_map(|place| plan.value().pointer(place)?.as_str())?;
    Some(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_file_is_found_in_new_and_old_plans() {
        let folder = tempfile::tempdir().expect("a folder");
        let guard = serde_json::json!({"guard": {"api_key_file": "keys"}});
        for proxy in [guard.clone(), serde_json::json!({"service": guard})] {
            let plan = serde_json::json!({"proxy": proxy}).to_string();
            std::fs::write(folder.path().join("plan.json"), plan).expect("a file");
            assert_eq!(key_file(folder.path()), Some(PathBuf::from("keys")));
        }
        // The plan of this version has it at the first place.
        let config = serde_json::to_value(crate::proxy_config::ProxyConfig {
            guard: crate::proxy_config::Guard {
                api_key_file: Some(PathBuf::from("keys")),
                ..crate::proxy_config::Guard::default()
            },
            ..crate::proxy_config::ProxyConfig::default()
        })
        .expect("JSON");
        assert_eq!(config.pointer("/guard/api_key_file"), Some(&"keys".into()));
        assert_eq!(config["max_body"], "64MiB");
    }
}
