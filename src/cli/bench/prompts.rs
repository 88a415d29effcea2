//! Makes the requests of a dataset before a run: finds the tokenizer, makes the prompts with a progress bar, and aligns
//! them with the server's tokenizer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::arguments::Arguments;
use super::failure;
use crate::bench::{
    self, Dataset, DatasetError, MadeRequests, Prepared, Progress, RunPhase, Source, Spec, Stopped, Tokenizer,
    TokenizerError, Workload, tokenizer,
};
use crate::machine::huggingface;
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;
use crate::ui::bench::BenchProgress;

/// Interval of progress updates.
const TICK: Duration = Duration::from_millis(100);

/// Makes the requests of datasets, with one tokenizer for all runs.
#[derive(Debug)]
pub(super) struct Prompts {
    tokenizer: Result<Arc<Tokenizer>, String>,
    is_skipped: bool,
    /// Possible names of the tokenizer, the likeliest first.
    names: Vec<String>,
    printer: Printer,
}

impl Prompts {
    /// Finds the tokenizer: from the flags, else the model's, which can also be known as `root`.
    ///
    /// Without a tokenizer, a line explains what random prompts are made of, and why.
    pub(super) fn open(
        arguments: &Arguments,
        spec: &Spec,
        root: Option<String>,
        printer: Printer,
    ) -> Result<Self, Failure> {
        let names = [spec.naming.model_id.clone(), root, Some(spec.model.clone())];
        let names: Vec<String> = names.into_iter().flatten().collect();
        let tokenizer = find(arguments, &names)?;
        if let (Err(reason), Workload::Random(_)) = (&tokenizer, &spec.workload) {
            let form = if arguments.target.backend.is_chat() {
                "words, about one token each"
            } else {
                "token ids, not text"
            };
            printer.status(format_args!("prompts are {form}: {reason}"));
        }
        Ok(Self {
            tokenizer,
            is_skipped: arguments.data.skip_tokenizer_init,
            names,
            printer,
        })
    }

    /// Replaces the dataset of the spec by its requests. `print_line` gets vLLM's lines about them.
    pub(super) async fn prepare(&self, spec: &mut Spec, print_line: &dyn Fn(&str)) -> Result<(), Failure> {
        spec.options.tokenizer = self.tokenizer.as_ref().ok().cloned();
        let Some(dataset) = spec.workload.dataset() else {
            return Ok(());
        };
        spec.naming.tokenizer_id = self.tokenizer.as_ref().ok().map(|found| found.name().to_owned());
        spec.options.is_without_tokenizer = self.is_skipped;
        if self.tokenizer.is_err() && matches!(dataset.source, Source::Random(_)) {
            // Ids need no tokenizer and are made when the run starts.
            return Ok(());
        }
        let is_aligned = matches!(dataset.source, Source::Random(_) | Source::PrefixRepetition(_));
        if let Source::TimedTrace(trace) = &dataset.source {
            self.printer.status(format_args!(
                "the blocks of the trace are seeded by Python's hash with PYTHONHASHSEED={}",
                trace.hash_seed
            ));
        }
        let seed = dataset.seed;
        let mut product = make(dataset, self.tokenizer.clone(), &self.names, self.printer).await?;
        for remark in &product.remarks {
            self.printer.status(format_args!("note: {remark}"));
        }
        if is_aligned {
            let shown = BenchProgress::new(self.printer);
            let begun = Instant::now();
            let progress = |done, total| shown.update("alignment", &preparing(begun, done, total));
            let line = bench::align(spec, &mut product.items, &progress).await.map_err(failure);
            shown.clear();
            if let Some(line) = line? {
                print_line(&line);
            }
        }
        spec.workload = Workload::Prepared(Prepared::new(product, seed));
        Ok(())
    }
}

/// The tokenizer, or the reason why there is none. That is an error only if the user named one.
fn find(arguments: &Arguments, names: &[String]) -> Result<Result<Arc<Tokenizer>, String>, Failure> {
    if arguments.data.skip_tokenizer_init {
        return Ok(Err("`--skip-tokenizer-init` is set".to_owned()));
    }
    let load = |name: &str, path: &Path| {
        let loaded = Tokenizer::load(name, path);
        loaded
            .map(|found| Ok(Arc::new(found)))
            .map_err(|error| unusable(name, error))
    };
    let settings = huggingface::Settings::read(&BTreeMap::new());
    if let Some(named) = &arguments.data.tokenizer {
        let path = tokenizer::find(named, settings.cache()).map_err(|error| unusable(named, error))?;
        return load(named, &path);
    }
    let mut first = None;
    for name in names {
        match tokenizer::find(name, settings.cache()) {
            // If the model's tokenizer is broken, no other one is used.
            Ok(path) => return load(name, &path),
            Err(error) => {
                first.get_or_insert(error.to_string());
            }
        }
    }
    Ok(Err(
        first.unwrap_or_else(|| "the name of the model is unknown".to_owned())
    ))
}

fn unusable(name: &str, error: TokenizerError) -> Failure {
    let hints = match &error {
        TokenizerError::Missing { .. } => missing(name),
        _ => vec!["set `--skip-tokenizer-init` to use prompts of token ids without a tokenizer".to_owned()],
    };
    let mut failure = Failure::new(ExitStatus::Usage, error);
    failure.hints = hints;
    failure
}

/// Hints for a missing tokenizer.
fn missing(name: &str) -> Vec<String> {
    let mut hints = Vec::new();
    let is_repository = name.split('/').count() == 2 && !name.starts_with(['/', '.', '~']);
    if is_repository {
        hints.push(format!(
            "`hf download {name} --include 'tokenizer*' --include '*.jinja' --include config.json` downloads it"
        ));
    }
    hints.push(
        "set `--tokenizer` to a folder with a `tokenizer.json`, that file, or a repository in the Hugging Face cache"
            .to_owned(),
    );
    hints
}

/// Makes the requests on a thread of its own.
async fn make(
    dataset: Dataset,
    tokenizer: Result<Arc<Tokenizer>, String>,
    names: &[String],
    printer: Printer,
) -> Result<MadeRequests, Failure> {
    let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let theirs = Arc::clone(&counts);
    // Dropped with this future, which cancels the thread.
    let (wanted, is_wanted) = watch::channel(());
    let mut work = tokio::task::spawn_blocking(move || {
        let tokenizer = tokenizer.as_deref().map_err(String::as_str);
        dataset.make(tokenizer, &|done, total| {
            theirs.0.store(done, Ordering::Relaxed);
            theirs.1.store(total, Ordering::Relaxed);
            is_wanted.has_changed().map(|_| ()).map_err(|_| Stopped)
        })
    });
    let shown = BenchProgress::new(printer);
    let begun = Instant::now();
    let mut ticker = interval(TICK);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let made = loop {
        tokio::select! {
            made = &mut work => break made,
            _ = ticker.tick() => {
                let (done, total) = (counts.0.load(Ordering::Relaxed), counts.1.load(Ordering::Relaxed));
                if total > 0 {
                    shown.update("prompts", &preparing(begun, done, total));
                }
            }
        }
    };
    shown.clear();
    drop(wanted);
    // Nothing aborts the task, so a failed join is a panic.
    let made = made.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
    made.map_err(|error| {
        let hints = match &error {
            DatasetError::NoTokenizer { .. } => names.first().map_or_else(Vec::new, |name| missing(name)),
            DatasetError::Tokenizer(TokenizerError::Template { .. }) => {
                vec!["set `--skip-chat-template` to send the prompts unchanged".to_owned()]
            }
            _ => Vec::new(),
        };
        let mut failure = Failure::new(ExitStatus::Usage, error);
        failure.hints = hints;
        failure
    })
}

fn preparing(begun: Instant, done: usize, total: usize) -> Progress {
    Progress {
        phase: RunPhase::Preparing,
        total,
        released: done,
        done,
        failed: 0,
        in_flight: 0,
        elapsed: begun.elapsed(),
        asked_rate: None,
        mean_ttft_ms: None,
        mean_tpot_ms: None,
    }
}
