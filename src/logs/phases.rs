//! Reads the phases of an engine's start from its log.

use std::path::PathBuf;

use regex::{Regex, RegexSet};
use tokio::sync::mpsc;

use super::follow::Follower;
use super::lines::plain;
use crate::engine::{EngineKind, PhaseMarker};
use crate::fleet::EngineId;

/// A phase of an engine's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// Its name for the user, such as `loading weights`.
    pub name: &'static str,
    /// Progress of the whole start, 0 to 100: a guess for an engine on a warm machine.
    pub percent: u8,
    /// Progress within this phase, 0 to 100, if the engine reports it.
    pub done: Option<u8>,
}

impl Phase {
    /// Whether it is the last phase that the log shows.
    pub const LAST_PERCENT: u8 = 100;
}

/// Tracks one start by the lines of its log. The phase never goes back: several processes write one log, and each goes through
/// some of the phases by itself.
#[derive(Debug)]
pub struct PhaseTracker {
    markers: &'static [PhaseMarker],
    /// The patterns of all markers in one set, because most lines match none.
    any: RegexSet,
    /// The pattern of a percentage.
    each: Vec<Regex>,
    /// The latest marker, and the progress within its phase.
    reached: Option<(usize, Option<u8>)>,
}

impl PhaseTracker {
    /// A tracker at the beginning of a start.
    pub fn new(kind: EngineKind) -> Self {
        let markers = kind.phase_markers();
        let valid = "the markers are constants and a test compiles them all";
        Self {
            markers,
            any: RegexSet::new(markers.iter().map(|marker| marker.pattern)).expect(valid),
            each: markers
                .iter()
                .map(|marker| Regex::new(marker.pattern).expect(valid))
                .collect(),
            reached: None,
        }
    }

    /// Takes the next line of the log. Returns the phase if this line changed it.
    pub fn feed(&mut self, line: &str) -> Option<Phase> {
        let line = plain(line.trim_end().as_bytes());
        let news = self
            .any
            .matches(&line)
            .into_iter()
            .map(|index| (index, self.done_in(index, &line)))
            .max()?;
        if self.reached.is_some_and(|reached| news <= reached) {
            return None;
        }
        self.reached = Some(news);
        self.reached()
    }

    /// The phase reached so far.
    pub fn reached(&self) -> Option<Phase> {
        self.reached.map(|(index, done)| self.phase_of(index, done))
    }

    /// The percentage in a line that matches the marker with this index.
    fn done_in(&self, index: usize, line: &str) -> Option<u8> {
        let percent: u8 = self.each[index].captures(line)?.get(1)?.as_str().parse().ok()?;
        Some(percent.min(100))
    }

    /// The phase that the marker with this index begins. Its progress is a share of the span up to the next marker.
    fn phase_of(&self, index: usize, done: Option<u8>) -> Phase {
        let marker = &self.markers[index];
        let next = self.markers[index + 1..]
            .iter()
            .map(|next| next.percent)
            .find(|percent| *percent > marker.percent)
            .unwrap_or(Phase::LAST_PERCENT);
        let within = u16::from(next - marker.percent) * u16::from(done.unwrap_or(0)) / 100;
        Phase {
            name: marker.phase,
            percent: marker.percent + u8::try_from(within).expect("at most the span, which is a u8"),
            done,
        }
    }
}

/// Sends every phase of the start that the log at `log_path` shows from the byte `from` on, which is where the engine's
/// present incarnation began to write. Ends after the last phase, when the receiver is gone, or when the log cannot
/// be read; drop it to end it earlier.
pub async fn watch_phases(
    log_path: PathBuf,
    from: u64,
    kind: EngineKind,
    engine: EngineId,
    sender: mpsc::Sender<(EngineId, Phase)>,
) -> std::io::Result<()> {
    let mut tracker = PhaseTracker::new(kind);
    let mut follower = Follower::from_offset(&log_path, from);
    loop {
        let lines = tokio::select! {
            lines = follower.next() => lines?,
            () = sender.closed() => return Ok(()),
        };
        for line in lines {
            let Some(phase) = tracker.feed(&String::from_utf8_lossy(&line)) else {
                continue;
            };
            if sender.send((engine.clone(), phase)).await.is_err() || phase.percent == Phase::LAST_PERCENT {
                return Ok(());
            }
        }
    }
}
