//! Estimates the progress and the time left of a start from the last successful start of the same engine. PURE.
//!
//! The last start is stored as marks: when it entered each phase, and the ends of progress bars within phases. A start that reaches
//! a phase gets the progress that the last start had there, and moves with the clock up to the next mark.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::phases::Phase;
use crate::fleet::TimeLeft;

/// The highest progress, in percent, before an engine is ready.
const NOT_READY_PERCENT: u8 = 99;

/// The most marks of a start: one per phase, and the ends of its progress bar.
const MAX_MARKS: usize = 64;

/// A point in a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The phase, such as `loading weights`.
    pub phase: String,
    /// Progress within the phase, 0 to 100, if the engine reports it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub done: Option<u8>,
    /// Time since the engine's spawn, in milliseconds.
    pub at_ms: u64,
}

/// A successful start: its duration and its marks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastStart {
    /// The marks by time.
    pub marks: Vec<Mark>,
    /// Time from the engine's spawn until it was healthy, in milliseconds.
    pub took_ms: u64,
}

impl PastStart {
    /// Whether the values are consistent; a file can contain anything.
    pub fn is_sound(&self) -> bool {
        self.took_ms > 0
            && self.marks.len() <= MAX_MARKS
            && self.marks.is_sorted_by_key(|mark| mark.at_ms)
            && self.marks.last().is_none_or(|last| last.at_ms <= self.took_ms)
    }

    /// Its duration.
    pub fn took(&self) -> Duration {
        Duration::from_millis(self.took_ms)
    }

    /// When it reached the mark with this index; its end for the index after the last.
    fn at(&self, index: usize) -> Duration {
        let at_ms = self.marks.get(index).map_or(self.took_ms, |mark| mark.at_ms);
        Duration::from_millis(at_ms)
    }

    /// When this start reached `phase`, and when it reached the next mark. `None` if it had no such phase.
    fn locate(&self, phase: &Phase) -> Option<MarkSpan> {
        let entered = self.marks.iter().position(|mark| mark.phase == phase.name)?;
        let in_phase = |index: &usize| self.marks.get(*index).is_some_and(|mark| mark.phase == phase.name);
        let reached = |index: &usize| self.marks[*index].done.is_none_or(|done| Some(done) <= phase.done);
        let before = (entered..self.marks.len())
            .take_while(in_phase)
            .take_while(reached)
            .last()
            .unwrap_or(entered);
        let (from, to) = (self.at(before), self.at(before + 1));
        let ends = (
            self.marks[before].done,
            self.marks.get(before + 1).and_then(|mark| mark.done),
        );
        let share = match (ends, phase.done) {
            ((Some(first), Some(last)), Some(done)) if in_phase(&(before + 1)) && first < last => {
                f64::from(done.saturating_sub(first)) / f64::from(last - first)
            }
            _ => 0.0,
        };
        let from = from + to.saturating_sub(from).mul_f64(share.min(1.0));
        Some(MarkSpan { from, to })
    }
}

/// A section of the last start.
#[derive(Debug, Clone, Copy, Default)]
struct MarkSpan {
    from: Duration,
    to: Duration,
}

/// The estimate for a running start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Progress, 0 to 99: the share of the last start's time, or a guess by the phase without one. Never decreases.
    pub percent: u8,
    /// The time left.
    pub left: TimeLeft,
}

/// A running start. Times are since the engine's spawn.
#[derive(Debug, Clone, Default)]
pub struct StartEstimator {
    last: Option<Arc<PastStart>>,
    marks: Vec<Mark>,
    phase: Option<Phase>,
    /// The section of the last start between this start's latest mark and the next one.
    stretch: MarkSpan,
    /// When this start reached its latest mark.
    seen_at: Duration,
    /// The part of the last start that was already shown as done then.
    shown: Duration,
}

impl StartEstimator {
    /// A start that has just begun, with the last successful one of the same engine, which must be consistent.
    pub fn begin(last: Option<Arc<PastStart>>) -> Self {
        let to = last.as_ref().map(|last| last.at(0)).unwrap_or_default();
        Self {
            last,
            stretch: MarkSpan {
                from: Duration::ZERO,
                to,
            },
            ..Self::default()
        }
    }

    /// The current phase.
    pub fn phase(&self) -> Option<Phase> {
        self.phase
    }

    /// Records that it has reached `phase`, or made progress in it.
    pub fn reach(&mut self, phase: Phase, elapsed: Duration) {
        self.phase = Some(phase);
        self.mark(phase, elapsed);
        let Some(stretch) = self.last.as_ref().and_then(|last| last.locate(&phase)) else {
            return;
        };
        self.shown = self.shown.max(self.position(elapsed));
        self.stretch = stretch;
        self.seen_at = elapsed;
    }

    /// The estimate after `elapsed`.
    pub fn estimate(&self, elapsed: Duration) -> Estimate {
        let Some(last) = &self.last else {
            let guess = self.phase.map_or(0, |phase| phase.percent);
            return Estimate {
                percent: guess.min(NOT_READY_PERCENT),
                left: TimeLeft::Unknown,
            };
        };
        let position = self.position(elapsed);
        let share = self.shown.max(position).as_millis() * 100 / last.took().as_millis().max(1);
        let left = last.took().saturating_sub(position);
        Estimate {
            percent: u8::try_from(share).unwrap_or(u8::MAX).min(NOT_READY_PERCENT),
            left: if left.is_zero() || elapsed > last.took() {
                TimeLeft::Longer
            } else {
                TimeLeft::About(left)
            },
        }
    }

    /// The start to store, once the engine is healthy.
    pub fn finish(&self, elapsed: Duration) -> PastStart {
        let took_ms = milliseconds(elapsed);
        let mut marks = self.marks.clone();
        // A log is read a moment after it is written, and the engine can have answered before.
        for mark in &mut marks {
            mark.at_ms = mark.at_ms.min(took_ms);
        }
        PastStart { marks, took_ms }
    }

    /// Its position in the last start.
    fn position(&self, elapsed: Duration) -> Duration {
        let went_on = self.stretch.from + elapsed.saturating_sub(self.seen_at);
        went_on.min(self.stretch.to)
    }

    /// Keeps only the first and the latest mark of a progress bar.
    fn mark(&mut self, phase: Phase, elapsed: Duration) {
        let mark = Mark {
            phase: phase.name.to_owned(),
            done: phase.done,
            at_ms: milliseconds(elapsed),
        };
        let of_this_bar = |mark: &&Mark| mark.phase == phase.name && mark.done.is_some();
        let is_third = phase.done.is_some() && self.marks.iter().rev().take_while(of_this_bar).count() == 2;
        let is_reentry = phase.done.is_none() && self.marks.last().is_some_and(|last| last.phase == phase.name);
        if is_third {
            self.marks.pop();
        }
        if !is_reentry && self.marks.len() < MAX_MARKS {
            self.marks.push(mark);
        }
    }
}

fn milliseconds(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 4] = ["importing", "loading weights", "capturing graphs", "starting server"];

    fn phase(name: &'static str, percent: u8, done: Option<u8>) -> Phase {
        Phase { name, percent, done }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// 10 s to the weights, 20 s of weights by a bar, 10 s more.
    fn last() -> Arc<PastStart> {
        let mut start = StartEstimator::begin(None);
        start.reach(phase("importing", 15, None), seconds(2));
        start.reach(phase("loading weights", 55, None), seconds(10));
        for done in [0, 25, 50, 75, 100] {
            start.reach(
                phase("loading weights", 60, Some(done)),
                seconds(10 + u64::from(done) / 5),
            );
        }
        start.reach(phase("starting server", 92, None), seconds(35));
        Arc::new(start.finish(seconds(40)))
    }

    #[test]
    fn without_a_last_start_the_phase_is_the_guess() {
        let mut start = StartEstimator::begin(None);
        start.reach(phase("up", 100, None), seconds(3));
        let expected = Estimate {
            percent: 99,
            left: TimeLeft::Unknown,
        };
        assert_eq!(start.estimate(seconds(3)), expected);
    }

    #[test]
    fn a_bar_is_remembered_by_its_ends() {
        let marks: Vec<_> = last().marks.iter().map(|mark| (mark.done, mark.at_ms)).collect();
        let expected = [
            (None, 2000),
            (None, 10_000),
            (Some(0), 10_000),
            (Some(100), 30_000),
            (None, 35_000),
        ];
        assert_eq!(marks, expected);
    }

    #[test]
    fn progress_follows_the_last_start_by_phase() {
        let mut start = StartEstimator::begin(Some(last()));
        let seen = |start: &StartEstimator, at| {
            let estimate = start.estimate(seconds(at));
            (estimate.percent, estimate.left)
        };
        assert_eq!(seen(&start, 1), (2, TimeLeft::About(seconds(39))));
        // Twice as fast as last time, up to half of the weights.
        start.reach(phase("loading weights", 55, None), seconds(5));
        start.reach(phase("loading weights", 60, Some(50)), seconds(10));
        assert_eq!(seen(&start, 10), (50, TimeLeft::About(seconds(20))));
        assert_eq!(seen(&start, 14), (60, TimeLeft::About(seconds(16))));
        // It hangs in the weights: the rest is still to come, until it has lasted longer than the last one did.
        assert_eq!(seen(&start, 40), (75, TimeLeft::About(seconds(10))));
        assert_eq!(seen(&start, 41), (75, TimeLeft::Longer));
    }

    #[test]
    fn the_last_phase_that_takes_longer_says_so() {
        let mut start = StartEstimator::begin(Some(last()));
        start.reach(phase("starting server", 92, None), seconds(1));
        assert_eq!(start.estimate(seconds(5)).left, TimeLeft::About(seconds(1)));
        let late = start.estimate(seconds(6));
        assert_eq!((late.percent, late.left), (99, TimeLeft::Longer));
    }

    #[test]
    fn what_cannot_have_happened_is_not_sound() {
        assert!(last().is_sound());
        let mut unsorted = (*last()).clone();
        unsorted.marks.swap(0, 1);
        let mut endless = (*last()).clone();
        endless.took_ms = 1;
        let nothing = PastStart {
            marks: Vec::new(),
            took_ms: 0,
        };
        assert!(![unsorted, endless, nothing].iter().any(PastStart::is_sound));
    }

    /// A start: how long each step took, which phase it led to, and how much of that was done.
    fn starts() -> impl Strategy<Value = Vec<(u64, usize, Option<u8>)>> {
        proptest::collection::vec((0..30_000_u64, 0..NAMES.len(), proptest::option::of(0..=100_u8)), 0..30)
    }

    /// Plays a start through `each`, which sees the time before and after every step; returns it and its end.
    fn play(
        last: Option<Arc<PastStart>>,
        steps: &[(u64, usize, Option<u8>)],
        mut each: impl FnMut(&StartEstimator, Duration),
    ) -> PastStart {
        let mut start = StartEstimator::begin(last);
        let mut now = Duration::ZERO;
        for (span, name, done) in steps {
            for _ in 0..3 {
                now += Duration::from_millis(span / 3);
                each(&start, now);
            }
            start.reach(phase(NAMES[*name], 50, *done), now);
            each(&start, now);
        }
        start.finish(now + Duration::from_millis(1))
    }

    proptest! {
        #[test]
        fn progress_is_monotonic_and_bounded(before in starts(), now in starts()) {
            let last = play(None, &before, |_, _| {});
            prop_assert!(last.is_sound());
            let took = last.took();
            let mut highest = 0;
            let mut wrong = None;
            play(Some(Arc::new(last)), &now, |start, elapsed| {
                let Estimate { percent, left } = start.estimate(elapsed);
                let is_left_right = match left {
                    TimeLeft::Unknown => false,
                    TimeLeft::About(left) => !left.is_zero() && left <= took && elapsed <= took,
                    TimeLeft::Longer => true,
                };
                if percent < highest || percent > 99 || !is_left_right {
                    wrong = Some((percent, highest, left));
                }
                highest = percent;
            });
            prop_assert_eq!(wrong, None);
        }

        #[test]
        fn the_same_start_again_is_told_to_the_second(steps in proptest::collection::vec(300..30_000_u64, 4)) {
            let steps: Vec<_> = steps.into_iter().enumerate().map(|(name, span)| (span, name, None)).collect();
            let last = play(None, &steps, |_, _| {});
            let took = last.took();
            let mut wrong = None;
            play(Some(Arc::new(last)), &steps, |start, elapsed| {
                let TimeLeft::About(left) = start.estimate(elapsed).left else {
                    wrong = Some((elapsed, Duration::ZERO));
                    return;
                };
                if (elapsed + left).abs_diff(took) > Duration::from_millis(1) {
                    wrong = Some((elapsed, left));
                }
            });
            prop_assert_eq!(wrong, None);
        }
    }
}
