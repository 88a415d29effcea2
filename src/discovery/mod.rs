//! Engines that come and go, for `xpyd proxy`: which ones exist, and which of them have proven that they work.
//!
//! `listing` reads what a source says (pure), `roster` decides (pure), and this module reads, verifies and publishes.

mod listing;
mod roster;

use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::fleet::{EngineId, FleetView};
use listing::Listing;
use roster::Roster;

/// Interval between two looks at the source.
const LOOK: Duration = Duration::from_secs(1);

/// A prefill engine and a decode engine.
pub type Pair = (EngineId, EngineId);

/// Where the list of engines comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file in llm-d's format.
    File(PathBuf),
}

/// The text names no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("write `file:PATH`")]
pub struct NoSource;

impl FromStr for Source {
    type Err = NoSource;

    fn from_str(text: &str) -> Result<Self, NoSource> {
        let path = text.strip_prefix("file:").filter(|path| !path.is_empty());
        path.map(|path| Self::File(path.into())).ok_or(NoSource)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(formatter, "`{}`", path.display()),
        }
    }
}

impl Source {
    /// What the source says now. The error is one line.
    fn read(&self) -> Result<Listing, String> {
        match self {
            Self::File(path) => {
                let text = read_file(path).map_err(|error| error.to_string())?;
                listing::parse(&text).map_err(|error| format!("`{}`: {error}", path.display()))
            }
        }
    }
}

/// The beginning of the file, which is enough to see that it is too large. A pipe would never end.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    if !fs_err::metadata(path)?.is_file() {
        return Err(io::Error::other(format!("`{}` is no file", path.display())));
    }
    let mut text = Vec::new();
    let limit = u64::try_from(listing::MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    fs_err::File::open(path)?.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

/// Follows the source, until it is dropped. `verify` sends a canary through each pair, and returns why one failed. `report`
/// gets a line for people about everything that changes.
pub async fn follow<V>(
    source: Source,
    view: watch::Sender<Arc<FleetView>>,
    verify: impl Fn(Vec<Pair>) -> V,
    report: impl Fn(String),
) where
    V: Future<Output = Vec<Result<(), String>>>,
{
    let mut roster = Roster::default();
    let (mut last, mut verification) = (None, None);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = look.tick() => {
                let now = source.read();
                if last.as_ref() != Some(&now) {
                    match &now {
                        Ok(listing) => {
                            listing.problems.iter().for_each(|problem| report(format!("warn  {problem}")));
                            roster.update(&listing.engines).into_iter().for_each(&report);
                        }
                        // The engines that are known go on.
                        Err(error) => report(format!("warn  cannot read the engines: {error}")),
                    }
                    last = Some(now);
                }
                roster.remove_idle().into_iter().for_each(&report);
            }
            results = async { verification.as_mut().expect("checked below").await }, if verification.is_some() => {
                verification = None;
                roster.verified(results, Instant::now()).into_iter().for_each(&report);
            }
        }
        if let Some(changed) = roster.changed_view() {
            view.send_replace(Arc::new(changed));
        }
        if verification.is_none() {
            let pairs = roster.pairs_to_verify(Instant::now());
            if !pairs.is_empty() {
                let results = verify(pairs.iter().map(roster::NumberedPair::names).collect());
                verification = Some(Box::pin(async move { pairs.into_iter().zip(results.await).collect() }));
            }
        }
    }
}
