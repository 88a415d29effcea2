//! The report as one self-contained HTML page: it needs no network. Only its charts need JavaScript.
//!
//! The page is a function of the result file, so a finished run and a saved file, of xpyd or of `vllm bench serve`,
//! give the same page. Texts from servers and models are escaped. The size is limited: charts of many requests show a
//! sample and say so.

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

/// The page of a finished run.
pub(crate) fn of_report(report: &Report) -> String {
    page::of_run(&Run::of(report)).into_string()
}

/// The stages of each request for the result file, so that a page can be made from it later.
pub(super) fn stages(report: &Report) -> Value {
    run::stages_to_json(&report.records)
}

/// The page of a saved result of xpyd or `vllm bench serve --save-result`, best with `--save-detailed`; or of a sweep,
/// a search or a comparison.
///
/// # Errors
/// When the text is not such a result.
pub fn of_file(text: &str) -> Result<String, ResultFileError> {
    /// The key that only results of several runs have.
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

/// The page of a sweep, a search or a comparison from its JSON; `None` for other JSON.
pub fn of_document(document: &Value) -> Option<String> {
    page::of_document(document).map(maud::Markup::into_string)
}

#[cfg(test)]
mod tests;
