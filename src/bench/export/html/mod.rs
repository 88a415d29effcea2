//! The report as one page of HTML that needs nothing else: no network, and no script to be read.
//!
//! It is a function of the result file, so a run and a file saved earlier, by xpyd or by `vllm bench serve`, give the same
//! page. Texts of servers and models stand in it only escaped. Its size is bounded: charts of many requests are drawn from a
//! sample, and say so.

mod chart;
mod course;
mod number;
mod page;
mod phase;
mod run;
mod spread;
mod stages;
mod table;
mod timeline;

pub use self::run::ResultFileError;
use self::run::Run;
use super::super::report::Report;

/// The page of a run that has just ended.
pub(crate) fn of_report(report: &Report) -> String {
    page::of_run(&Run::of(report)).into_string()
}

/// The page of a saved result: xpyd's or that of `vllm bench serve --save-result`, best with `--save-detailed`.
///
/// # Errors
/// When the text is no such result.
pub fn of_file(text: &str) -> Result<String, ResultFileError> {
    Ok(page::of_run(&Run::read(text)?).into_string())
}

#[cfg(test)]
mod tests;
