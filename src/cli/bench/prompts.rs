//! Makes a dataset into requests before a run: finds the tokenizer, lets it work beside a progress bar, and holds what it
//! made against the server's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::arguments::Arguments;
use super::failure;
use crate::bench::{
    self, Dataset, DatasetError, Made, Product, Source, Spec, Stopped, Tokenizer, TokenizerError, Workload, tokenizer,
};
use crate::report::{ExitStatus, Failure};
use crate::ui::Printer;
use crate::ui::bench::{BenchProgress, Snapshot};

/// Between two looks at how far the work is.
const TICK: Duration = Duration::from_millis(100);

/// Puts requests in the place of the spec's dataset. `models` are names that the tokenizer may have, the likeliest first.
pub(super) async fn prepare(
    arguments: &Arguments,
    spec: &mut Spec,
    models: &[&str],
    say: &dyn Fn(&str),
    printer: Printer,
) -> Result<(), Failure> {
    let dataset = arguments.data.dataset()?;
    let tokenizer = find(arguments, models)?;
    match &tokenizer {
        Ok(tokenizer) => spec.naming.tokenizer_id = Some(tokenizer.name().to_owned()),
        Err(reason) => {
            spec.options.is_without_tokenizer = arguments.data.skip_tokenizer_init;
            if matches!(dataset.source, Source::Random(_)) {
                // Ids need no tokenizer, and are made when the run begins.
                printer.status(format_args!("prompts are {}: {reason}", without_tokenizer(arguments)));
                return Ok(());
            }
        }
    }
    let is_aligned = matches!(dataset.source, Source::Random(_) | Source::PrefixRepetition(_));
    let seed = dataset.seed;
    let named = dataset.source.name();
    let mut product = make(dataset, tokenizer, models, printer).await?;
    for remark in &product.remarks {
        printer.status(format_args!("note: {remark}"));
    }
    if is_aligned {
        let shown = BenchProgress::new(printer);
        let begun = Instant::now();
        let progress = |done, total| shown.update(&snapshot("alignment", begun, done, total));
        let line = bench::align(spec, &mut product.orders, &progress)
            .await
            .map_err(failure);
        shown.finish();
        if let Some(line) = line? {
            say(&line);
        }
    }
    if named == "timed_trace" {
        printer.status(format_args!(
            "blocks of the trace are seeded by Python's hash with PYTHONHASHSEED={}",
            arguments.data.timed_trace_hash_seed
        ));
    }
    spec.workload = Workload::Made(Made::new(product, seed));
    Ok(())
}

fn without_tokenizer(arguments: &Arguments) -> &'static str {
    if arguments.target.backend.is_chat() {
        "words, about one token each"
    } else {
        "token ids"
    }
}

/// The tokenizer, or why there is none: that is no failure unless one was named.
fn find(arguments: &Arguments, models: &[&str]) -> Result<Result<Arc<Tokenizer>, String>, Failure> {
    if arguments.data.skip_tokenizer_init {
        return Ok(Err("`--skip-tokenizer-init` asks for no tokenizer".to_owned()));
    }
    if let Some(named) = &arguments.data.tokenizer {
        let found = tokenizer::find(named).and_then(|path| Tokenizer::load(named, &path));
        return found
            .map(|found| Ok(Arc::new(found)))
            .map_err(|error| unusable(named, error));
    }
    let mut first = None;
    for model in models {
        match tokenizer::find(model) {
            // A folder that names itself a model and holds a broken tokenizer is no reason to measure something else.
            Ok(path) => {
                let loaded = Tokenizer::load(model, &path);
                return loaded
                    .map(|found| Ok(Arc::new(found)))
                    .map_err(|error| unusable(model, error));
            }
            Err(error) => {
                first.get_or_insert(error.to_string());
            }
        }
    }
    Ok(Err(first.unwrap_or_else(|| "no model is known by name".to_owned())))
}

fn unusable(name: &str, error: TokenizerError) -> Failure {
    let hints = match &error {
        TokenizerError::Missing { .. } => missing(name),
        _ => vec!["`--skip-tokenizer-init` measures without one, with prompts of token ids".to_owned()],
    };
    let mut failure = Failure::new(ExitStatus::Usage, error);
    failure.hints = hints;
    failure
}

/// What to do about a tokenizer that is not there.
fn missing(name: &str) -> Vec<String> {
    let mut hints = Vec::new();
    let is_repository = name.split('/').count() == 2 && !name.starts_with(['/', '.', '~']);
    if is_repository {
        hints.push(format!(
            "`hf download {name} --include 'tokenizer*' --include '*.jinja' --include config.json` fetches it"
        ));
    }
    hints.push(
        "`--tokenizer` names a folder with a `tokenizer.json`, that file, or a repository in Hugging Face's cache"
            .to_owned(),
    );
    hints
}

/// Lets the dataset work on a thread of its own.
async fn make(
    dataset: Dataset,
    tokenizer: Result<Arc<Tokenizer>, String>,
    models: &[&str],
    printer: Printer,
) -> Result<Product, Failure> {
    let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let theirs = Arc::clone(&counts);
    // Dropped with this future, which tells the thread that nobody waits any more.
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
                    shown.update(&snapshot("prompts", begun, done, total));
                }
            }
        }
    };
    shown.finish();
    drop(wanted);
    // Nothing aborts the work, so what failed to join has panicked.
    let made = made.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
    made.map_err(|error| {
        let hints = match &error {
            DatasetError::NoTokenizer { .. } => models.first().map_or_else(Vec::new, |model| missing(model)),
            DatasetError::Tokenizer(TokenizerError::Template { .. }) => {
                vec!["`--skip-chat-template` sends the prompts as they stand".to_owned()]
            }
            _ => Vec::new(),
        };
        let mut failure = Failure::new(ExitStatus::Usage, error);
        failure.hints = hints;
        failure
    })
}

fn snapshot(label: &'static str, begun: Instant, done: usize, total: usize) -> Snapshot {
    Snapshot {
        label,
        total,
        done,
        failed: 0,
        in_flight: 0,
        elapsed: begun.elapsed(),
        mean_ttft_ms: None,
        mean_tpot_ms: None,
    }
}
