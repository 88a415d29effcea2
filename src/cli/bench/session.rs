//! Common parts of the modes with several runs: the server, and one run after the other on it.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::prompts::Prompts;
use super::setup;
use super::{Arguments, Server, Target, base_url, failure, find_model, phase_label};
use crate::bench::{self, Progress, Record, Report, RunObserver, RunPhase, Spec, sweep};
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;
use crate::ui::bench::BenchProgress;

/// A server and the settings of its runs.
pub(super) struct Session<'a> {
    pub(super) arguments: &'a Arguments,
    pub(super) printer: Printer,
    /// Cancelled when the user stops the run.
    pub(super) stop: CancellationToken,
    /// The settings of the flags, with the server's model.
    pub(super) first: Spec,
    prompts: Prompts,
    /// Description of the measured server.
    setup: Value,
    /// Number of runs so far.
    runs: Cell<u32>,
}

impl<'a> Session<'a> {
    /// Finds the server and its model; `None` if the run was stopped before.
    pub(super) async fn open(
        arguments: &'a Arguments,
        defaults: Option<Target>,
        printer: Printer,
        stop: CancellationToken,
    ) -> Result<Option<Self>, Failure> {
        let mut first = arguments.spec(Server::of(arguments, base_url(&arguments.target, defaults))?)?;
        check(arguments, &first)?;
        let found = stop.run_until_cancelled(find_model(arguments, &mut first, &|_| {}, printer));
        let Some(root) = found.await.transpose()? else {
            return Ok(None);
        };
        let prompts = Prompts::open(arguments, &first, root, printer)?;
        let setup = setup::of(&first).await;
        Ok(Some(Self {
            arguments,
            printer,
            stop,
            first,
            prompts,
            setup,
            runs: Cell::new(0),
        }))
    }

    /// The settings of the next run: those of the flags with a change, and new prompts.
    pub(super) fn spec(&self, change: impl FnOnce(&mut Arguments)) -> Result<Spec, Failure> {
        let number = self.runs.replace(self.runs.get() + 1);
        self.numbered_spec(number, change)
    }

    /// As [`Self::spec`], with the prompts of run `number`.
    pub(super) fn numbered_spec(&self, number: u32, change: impl FnOnce(&mut Arguments)) -> Result<Spec, Failure> {
        let mut arguments = self.arguments.clone();
        arguments.data.seed = sweep::seed(self.first.workload.seed(), number);
        change(&mut arguments);
        let mut spec = arguments.spec(Server {
            base_url: self.first.base_url.clone(),
            headers: self.first.headers.clone(),
        })?;
        spec.model.clone_from(&self.first.model);
        spec.naming.clone_from(&self.first.naming);
        spec.check().map_err(failure)?;
        Ok(spec)
    }

    /// Runs once with progress. `ended` gets the requests that have ended so far; `stop` cancels the run.
    pub(super) async fn run(
        &self,
        spec: &Spec,
        label: &str,
        ended: &dyn Fn(&[Record]),
        stop: CancellationToken,
    ) -> Result<Report, Failure> {
        let mut spec = spec.clone();
        self.prompts.prepare(&mut spec, &|_| {}).await?;
        let shown = BenchProgress::wanted(self.printer, !self.arguments.output.disable_tqdm);
        let show = |progress: Progress| {
            let label = match progress.phase {
                RunPhase::Measuring => label,
                phase => phase_label(phase),
            };
            shown.update(label, &progress);
        };
        let observer = RunObserver {
            progress: &show,
            print_line: &|_| {},
            ended,
        };
        let run = bench::run_observed(&spec, observer, stop.clone());
        shown.until_stopped(stop.cancelled(), run).await.map_err(failure)
    }

    /// Prints a line of the result: as data, or as status if the result is JSON.
    pub(super) fn line(&self, line: &str) {
        if self.arguments.output.json {
            self.printer.status(line);
        } else {
            drop(self.printer.data(line));
        }
    }

    /// As [`Self::line`], for a sentence that can be wrapped.
    pub(super) fn sentence(&self, text: &str) {
        if self.arguments.output.json {
            self.printer.status(text);
        } else {
            drop(self.printer.prose(text));
        }
    }

    /// The first keys of every result of several runs.
    fn header(&self, mode: &str) -> Vec<(&'static str, Value)> {
        vec![
            ("xpyd_bench", json!(mode)),
            ("version", json!(env!("CARGO_PKG_VERSION"))),
            ("date", json!(jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string())),
            ("base_url", json!(self.first.base_url)),
            ("model_id", json!(self.first.model)),
            ("burstiness", json!(self.first.arrivals.burstiness)),
            ("seed", json!(self.first.workload.seed())),
            ("setup", self.setup.clone()),
        ]
    }

    /// Prints the result as JSON and saves it, if the flags ask for it. The result ends with `more`.
    pub(super) fn finish(
        &self,
        mode: &str,
        more: impl IntoIterator<Item = (&'static str, Value)>,
    ) -> Result<(), Failure> {
        let entries = self.header(mode).into_iter().chain(more);
        let document = Value::Object(entries.map(|(key, value)| (key.to_owned(), value)).collect());
        let output = &self.arguments.output;
        if output.json {
            self.printer.data(&document)?;
        }
        if output.save_result {
            let model = self.first.model.rsplit('/').next().unwrap_or_default();
            let date = document["date"].as_str().unwrap_or_default();
            let name = output.result_filename.clone();
            let name = name.unwrap_or_else(|| format!("{mode}-{model}-{date}.json"));
            let path = self.save(Path::new(&name), &document)?;
            self.printer.status(format_args!("result saved to {}", path.display()));
        }
        if let Some(path) = &self.arguments.html_report.report {
            super::html_report::write_document(&document, path, self.printer)?;
        }
        Ok(())
    }

    fn save(&self, name: &Path, document: &Value) -> Result<PathBuf, Failure> {
        let folder = self.arguments.output.result_dir.as_deref().unwrap_or(Path::new("."));
        let path = folder.join(name);
        fs_err::create_dir_all(folder)
            .and_then(|()| fs_err::write(&path, format!("{document}\n")))
            .map_err(|error| Failure::new(ExitStatus::Failure, error))?;
        Ok(path)
    }
}

/// Rejects invalid settings, and settings without meaning for several runs.
pub(super) fn check(arguments: &Arguments, first: &Spec) -> Result<(), Failure> {
    first.check().map_err(failure)?;
    let Some(flag) = arguments.modes.flag() else {
        return Ok(());
    };
    let usage = |text: String| Failure::message(ExitStatus::Usage, text);
    if arguments.output.append_result {
        return Err(
            usage(format!("`--append-result` appends results of one run, not of `{flag}`"))
                .hint("`--save-result` saves the result in a separate file"),
        );
    }
    if first.arrivals.ramp.is_some() && flag != "--against" {
        return Err(usage(format!("`{flag}` and `--ramp-up-strategy` both decide the rate"))
            .hint("remove the `--ramp-up` flags"));
    }
    if flag == "--against" && arguments.data.num_prompts < 2 {
        return Err(usage("`--against` needs at least 2 requests".to_owned())
            .hint("set their number, for example `--num-prompts 100`"));
    }
    if let Some(points) = &arguments.modes.sweep {
        super::sweep::check(arguments, points)?;
    }
    if arguments.modes.find_max {
        super::find_max::check(arguments, first)?;
    }
    if flag != "--against" && first.workload.is_self_timed() {
        return Err(
            usage(format!("`{flag}` and this dataset both decide the release times"))
                .hint("use another dataset, or measure this one in a single run"),
        );
    }
    Ok(())
}
