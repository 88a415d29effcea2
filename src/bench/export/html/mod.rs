//! The report as one page of HTML that needs nothing else: no network, and no script to be read.
//!
//! It is a function of the result file, so a run and a file saved earlier, by xpyd or by `vllm bench serve`, give the same
//! page. Texts of servers and models stand in it only escaped. Its size is bounded: charts of many requests are drawn from a
//! sample, and say so.

mod chart;
mod comparison;
mod distribution;
mod number;
mod over_time;
mod page;
mod phase;
mod run;
mod series;
mod setup;
mod stages;
mod table;
mod timeline;

pub use self::run::ResultFileError;
use self::run::Run;
use super::super::report::Report;
use serde::Deserialize;
use serde_json::Value;

/// The page of a run that has just ended.
pub(crate) fn of_report(report: &Report) -> String {
    page::of_run(&Run::of(report)).into_string()
}

/// For the result file: what the server told of each request, so that a page can be made of the file later.
pub(super) fn stages(report: &Report) -> Value {
    run::stages_to_json(&report.records)
}

/// The page of a saved result: xpyd's or that of `vllm bench serve --save-result`, best with `--save-detailed`; or of a
/// sweep, a search, or a comparison.
///
/// # Errors
/// When the text is no such result.
pub fn of_file(text: &str) -> Result<String, ResultFileError> {
    /// What tells a result of several runs from that of one.
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "xpyd_bench")]
        _mode: String,
    }
    if serde_json::from_str::<Kind>(text).is_ok() {
        let document: Value = serde_json::from_str(text)?;
        return of_document(&document).ok_or(ResultFileError::Missing("xpyd_bench"));
    }
    Ok(page::of_run(&Run::read(text)?).into_string())
}

/// The page of a sweep, a search or a comparison, of what `--json` prints of it; nothing of anything else.
pub fn of_document(document: &Value) -> Option<String> {
    page::of_document(document).map(maud::Markup::into_string)
}

#[cfg(test)]
mod tests;
