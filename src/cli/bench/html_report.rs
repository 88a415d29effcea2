//! `xpyd bench --report`: writes the HTML report of a run or of a saved result.

use std::io::Read as _;
use std::path::Path;

use serde_json::Value;

use crate::bench::{self, Report};
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;

/// Largest result file in bytes. A million requests take some hundred megabytes.
const LARGEST_RESULT: u64 = 2 << 30;

/// How to save a file that can be reported.
const SAVING: &str =
    "`xpyd bench --save-result --save-detailed` and `vllm bench serve` with the same flags save such a file";

/// Writes the HTML report of a run.
pub(super) fn write(report: &Report, path: &Path, printer: Printer) -> Result<(), Failure> {
    save(&report.to_html(), path, printer)
}

/// Writes the HTML report of a sweep, a search or a comparison, from its JSON.
pub(super) fn write_document(document: &Value, path: &Path, printer: Printer) -> Result<(), Failure> {
    match bench::page_of_document(document) {
        Some(page) => save(&page, path, printer),
        None => Ok(()),
    }
}

/// Writes the HTML report of a saved result.
pub(super) fn convert(result: &Path, path: &Path, printer: Printer) -> Result<ExitStatus, Failure> {
    let text = read(result).map_err(|error| {
        let context = format!("cannot make a report of `{}`", result.display());
        Failure::new(ExitStatus::Usage, anyhow::Error::from(error).context(context)).hint(SAVING)
    })?;
    let page = bench::page_of_file(&text).map_err(|error| {
        let context = format!("cannot make a report of `{}`", result.display());
        Failure::new(ExitStatus::Usage, anyhow::Error::from(error).context(context)).hint(SAVING)
    })?;
    save(&page, path, printer)?;
    Ok(ExitStatus::Success)
}

/// The text of a result file within the size limit.
fn read(result: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let mut file = std::fs::File::open(result)?.take(LARGEST_RESULT + 1);
    if file.read_to_string(&mut text)? as u64 > LARGEST_RESULT {
        let message = format!("the file exceeds the limit of {} GiB", LARGEST_RESULT >> 30);
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
    }
    Ok(text)
}

fn save(page: &str, path: &Path, printer: Printer) -> Result<(), Failure> {
    let write = || {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs_err::create_dir_all(folder)?;
        }
        fs_err::write(path, page)
    };
    write().map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    printer.status(format_args!("report written to {}", path.display()));
    Ok(())
}
