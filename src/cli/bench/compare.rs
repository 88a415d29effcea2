//! `xpyd bench --compare A.json B.json`: compares two saved results. Needs no server.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::bench::saved::SavedResult;
use crate::bench::stats::compare::{self, MetricChange};
use crate::report::{ExitStatus, Failure};
use crate::ui::{Printer, Table};

/// Largest file in bytes: the gaps of about ten million tokens.
const MOST_BYTES: u64 = 1 << 30;

/// Compares the two files.
pub(super) fn run(
    files: &[PathBuf],
    as_json: bool,
    page: Option<&Path>,
    printer: Printer,
) -> Result<ExitStatus, Failure> {
    let [before, after] = files else {
        return Err(Failure::message(ExitStatus::Usage, "`--compare` takes two files"));
    };
    let (first, second) = (read(before)?, read(after)?);
    let rows = compare::saved_results(&first, &second);
    let caveats = compare::caveats(&first, &second);
    for caveat in &caveats {
        printer.status(format_args!("not directly comparable: {caveat}"));
    }
    let document = json!({
        "xpyd_bench": "compare",
        "a": described(before, &first),
        "b": described(after, &second),
        "confidence": 0.95,
        "measures": compare::to_json(&rows),
        "caveats": caveats,
    });
    if let Some(page) = page {
        super::html_report::write_document(&document, page, printer)?;
    }
    if as_json {
        printer.data(document)?;
        return Ok(ExitStatus::Success);
    }
    print_changes(&rows, printer)?;
    if rows.iter().all(|row| row.interval.is_none()) {
        printer.status("to show confidence intervals, save both results with `--save-detailed`");
    }
    Ok(ExitStatus::Success)
}

/// Prints the changes as a table.
pub(super) fn print_changes(rows: &[MetricChange], printer: Printer) -> Result<(), Failure> {
    let percent = |share: f64| format!("{:+.1}%", share * 100.0);
    let mut table = Table::new(["measure", "a", "b", "change", "95% interval", "detectable", "verdict"]);
    for row in rows {
        let interval = row
            .interval
            .map(|(low, high)| format!("{} .. {}", percent(low), percent(high)));
        table.row([
            row.label.clone(),
            format!("{:.2}", row.before),
            format!("{:.2}", row.after),
            row.change.map(percent).unwrap_or_default(),
            interval.unwrap_or_default(),
            row.detectable
                .map(|share| format!("{:.1}%", share * 100.0))
                .unwrap_or_default(),
            row.verdict.words().to_owned(),
        ]);
    }
    printer.data(table)
}

fn read(path: &Path) -> Result<SavedResult, Failure> {
    let unusable = |error: anyhow::Error| {
        let context = format!("cannot compare `{}`", path.display());
        Failure::new(ExitStatus::Usage, error.context(context))
            .hint("use two files that `--save-result` of `xpyd bench` or `vllm bench serve` wrote")
    };
    let mut text = String::new();
    fs_err::File::open(path)
        .and_then(|file| file.take(MOST_BYTES).read_to_string(&mut text))
        .map_err(|error| unusable(error.into()))?;
    SavedResult::read(&text).map_err(|error| unusable(error.into()))
}

fn described(path: &Path, saved: &SavedResult) -> Value {
    let of = |key: &str| saved.document.get(key).cloned().unwrap_or(Value::Null);
    json!({
        "file": path.display().to_string(),
        "date": of("date"),
        "model_id": of("model_id"),
        "completed": of("completed"),
        "failed": of("failed"),
    })
}
