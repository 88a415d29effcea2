//! Downloads the model once, before any engine starts.

use crate::machine::Machine;
use crate::machine::huggingface::{self, Access, DownloadError, Settings};
use crate::plan::{self, ModelFetch, Plan};
use crate::preflight::gibibytes;
use crate::profile::Profile;
use crate::report::{ExitStatus, Failure};
use crate::ui::{DownloadProgress, Printer};

/// Downloads the plan's model, unless it is in the cache.
pub(super) fn model(plan: &Plan, profile: &Profile, machine: &Machine, printer: Printer) -> Result<(), Failure> {
    let is_missing = machine.hugging_face.model.state.is_to_fetch();
    let Some(fetch) = plan.fetch.as_ref().filter(|_| is_missing) else {
        return Ok(());
    };
    let access = Access::new(&Settings::read(&plan::shared_env(profile)));
    printer.status(format!(
        "downloading {} into {}, once for all engines",
        fetch.repository,
        machine.hugging_face.cache.display()
    ));
    let progress = DownloadProgress::new(printer);
    let result = huggingface::download(
        &access,
        &fetch.repository,
        &fetch.revision,
        &|now| progress.advance(now.bytes, now.total_bytes, (now.files, now.total_files)),
        &|text| progress.note(&text),
    );
    let took = progress.finish();
    result.map_err(|error| failure(error, fetch))?;
    printer.status(format!("downloaded {} in {took}", fetch.repository));
    Ok(())
}

fn failure(error: DownloadError, fetch: &ModelFetch) -> Failure {
    let hint = match &error {
        DownloadError::Refused(_) => "`xpyd doctor --profile …` shows why",
        DownloadError::Access(_) => "start again: the download resumes",
        DownloadError::Damaged { .. } => "a proxy or a mirror changes files: try another network, or unset HF_ENDPOINT",
        DownloadError::NoSpace { .. } => {
            "`hf cache ls` shows what is there and `hf cache rm` removes it; or `export HF_HOME=/a/larger/disk`"
        }
        DownloadError::Locked { .. } => "stop the other download, or wait for it",
        DownloadError::Io(_) => "check the cache folder, or set another one: `export HF_HOME=/a/folder/of/yours`",
    };
    let error = match error {
        DownloadError::NoSpace { needed, free, folder } => anyhow::Error::msg(format!(
            "{} are missing, but only {} are free in {folder}",
            gibibytes(needed),
            gibibytes(free)
        )),
        error => anyhow::Error::new(error),
    };
    let error = error.context(format!("cannot download {}", fetch.repository));
    Failure::new(ExitStatus::Preflight, error).hint(hint)
}
