//! What the modes of several runs share: a server, found once, and one run after the other on it.

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

/// A server, and how it is measured.
pub(super) struct Session<'a> {
    pub(super) arguments: &'a Arguments,
    pub(super) printer: Printer,
    /// Cancelled when the user wants an end.
    pub(super) stop: CancellationToken,
    /// The run that the flags ask for, with the model that the server has.
    pub(super) first: Spec,
    prompts: Prompts,
    /// What is measured.
    setup: Value,
    /// Runs so far.
    runs: Cell<u32>,
}

impl<'a> Session<'a> {
    /// Finds the server and its model; `None` if the stop came first.
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

    /// The settings of one more run: those of the flags with a change, and prompts that no run before it had.
    pub(super) fn spec(&self, change: impl FnOnce(&mut Arguments)) -> Result<Spec, Failure> {
        let number = self.runs.replace(self.runs.get() + 1);
        self.numbered_spec(number, change)
    }

    /// As [`Self::spec`], with the prompts of the run of this number.
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

    /// One run, with progress. `ended` is told of the requests that have ended so far, and `stop` ends it.
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

    /// A line of the result, as it comes: data, or, where the result is JSON, something to look at meanwhile.
    pub(super) fn line(&self, line: &str) {
        if self.arguments.output.json {
            self.printer.status(line);
        } else {
            drop(self.printer.data(line));
        }
    }

    /// The same of a sentence, which may be broken between words.
    pub(super) fn sentence(&self, text: &str) {
        if self.arguments.output.json {
            self.printer.status(text);
        } else {
            drop(self.printer.prose(text));
        }
    }

    /// What every result of several runs begins with.
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

    /// Prints the whole result, which ends with `more`, where JSON is wanted, and saves it where that is.
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
        if let Some(path) = &self.arguments.page.report {
            super::page::write_document(&document, path, self.printer)?;
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

/// Refuses what makes no run, and what has no meaning for several of them.
pub(super) fn check(arguments: &Arguments, first: &Spec) -> Result<(), Failure> {
    first.check().map_err(failure)?;
    let Some(flag) = arguments.modes.flag() else {
        return Ok(());
    };
    let usage = |text: String| Failure::message(ExitStatus::Usage, text);
    if arguments.output.append_result {
        return Err(
            usage(format!("`--append-result` appends results of one run, not of `{flag}`"))
                .hint("`--save-result` saves the whole in a file of its own"),
        );
    }
    if first.arrivals.ramp.is_some() && flag != "--against" {
        return Err(usage(format!("`{flag}` and `--ramp-up-strategy` both decide the rate"))
            .hint("leave out the `--ramp-up` flags"));
    }
    if flag == "--against" && arguments.data.num_prompts < 2 {
        return Err(
            usage("`--against` deals requests out in blocks".to_owned()).hint("name their number: `--num-prompts 100`")
        );
    }
    if let Some(points) = &arguments.modes.sweep {
        super::sweep::check(arguments, points)?;
    }
    if arguments.modes.find_max {
        super::find_max::check(arguments, first)?;
    }
    if flag != "--against" && first.workload.is_self_timed() {
        return Err(usage(format!(
            "`{flag}` decides when requests go out, and this dataset does, too"
        ))
        .hint("name another dataset, or measure this one in a single run"));
    }
    Ok(())
}
