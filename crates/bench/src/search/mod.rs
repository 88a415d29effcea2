//! The search for the highest rate at which a server meets its objectives: which rates to try, and when to stop. Pure.
//!
//! Doubling or halving finds a rate that passes and one that fails; then the search bisects the ratio between them. A
//! single result can be wrong, so an end of the bracket that stays while the other end approaches is tried again.

#[cfg(test)]
pub(super) mod queue_model;
pub mod sprt;

/// The result of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeVerdict {
    /// It met the objectives.
    Pass,
    /// It did not meet them.
    Fail,
    /// The client limited the measurement.
    Invalid,
}

/// The next step of the search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Probe this rate, in requests per second.
    Probe(f64),
    /// The search is done.
    Done(SearchEnd),
}

/// Why a search ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SearchEnd {
    /// The bracket is narrow enough.
    Found,
    /// Even the lowest rate fails.
    NothingPasses,
    /// Even the highest rate passes.
    EverythingPasses,
    /// The client cannot send faster.
    ClientLimit,
    /// Too many probes without a result.
    Probes,
}

/// The state of a search between probes.
#[derive(Debug, Clone)]
pub struct Search {
    /// The bracket is narrow enough if the failing rate is at most this share above the passing one.
    tolerance: f64,
    lowest: f64,
    /// The next rate, and its factor while the bracket has one end.
    next: f64,
    factor: f64,
    low: Option<BracketEnd>,
    high: Option<BracketEnd>,
    invalid: usize,
    probes: usize,
}

/// One end of the bracket.
#[derive(Debug, Clone, Copy)]
struct BracketEnd {
    rate: f64,
    /// Number of probes at this rate with this result.
    agreed: usize,
    /// How often the other end has moved since.
    kept_for: usize,
}

/// Most probes: twenty doublings, and the bisections of the finest tolerance.
const MOST_PROBES: usize = 60;
/// The lowest rate, relative to the first.
const LOWEST: f64 = 1.0 / 1024.0;
/// The highest rate, in requests per second. No client sends faster.
const HIGHEST: f64 = 100_000.0;
/// Invalid probes in a row after which the search ends. Other work on the client's machine is often over before.
const MOST_INVALID: usize = 3;
/// An end that stayed this often is probed again: by chance alone this happens once in eight cases.
const SUSPICIOUS: usize = 3;
/// Step factor beyond an end that was wrong.
const CORRECTION: f64 = 1.25;

/// Fewest answers of a burst to estimate a rate.
const LEAST_OF_A_BURST: usize = 8;
/// The search starts at this share of the rate of a burst: below the limit, but not far below, because probes at low
/// rates take long.
const SHARE_OF_A_BURST: f64 = 0.5;

/// The first rate, from the end times in seconds of requests that were sent at once. The last part of a burst is left
/// out, because few requests are then at the server.
pub fn first_rate(mut ends: Vec<f64>) -> Option<f64> {
    ends.sort_unstable_by(f64::total_cmp);
    let counted = ends.len() * 4 / 5;
    let end = *ends.get(counted.checked_sub(1)?)?;
    let rate = counted as f64 / end * SHARE_OF_A_BURST;
    if ends.len() < LEAST_OF_A_BURST || !rate.is_finite() || rate <= 0.0 {
        return None;
    }
    // Two digits are enough for an estimate.
    let digit = 10_f64.powf(rate.log10().floor() - 1.0);
    Some((rate / digit).round().max(1.0) * digit)
}

impl Search {
    /// A search that starts at `first` requests per second. Both arguments must be positive.
    pub fn new(first: f64, tolerance: f64) -> Self {
        Self {
            tolerance,
            lowest: first * LOWEST,
            next: first,
            factor: 2.0,
            low: None,
            high: None,
            invalid: 0,
            probes: 0,
        }
    }

    /// The next step of the search.
    pub fn step(&self) -> Step {
        if self.probes >= MOST_PROBES {
            return Step::Done(SearchEnd::Probes);
        }
        if self.invalid >= MOST_INVALID {
            return Step::Done(SearchEnd::ClientLimit);
        }
        match (self.low, self.high) {
            (Some(low), Some(high)) if high.rate <= low.rate * (1.0 + self.tolerance) => {
                let doubtful = [high, low].into_iter().find(BracketEnd::is_doubtful);
                doubtful.map_or(Step::Done(SearchEnd::Found), |end| Step::Probe(end.rate))
            }
            (Some(low), Some(high)) => Step::Probe((low.rate * high.rate).sqrt()),
            _ if self.next < self.lowest => Step::Done(SearchEnd::NothingPasses),
            _ if self.next > HIGHEST => Step::Done(SearchEnd::EverythingPasses),
            _ => Step::Probe(self.next),
        }
    }

    /// Adds the result of a probe at the rate of [`Self::step`].
    pub fn take(&mut self, rate: f64, verdict: ProbeVerdict) {
        self.probes += 1;
        self.invalid = if verdict == ProbeVerdict::Invalid {
            self.invalid + 1
        } else {
            0
        };
        match verdict {
            ProbeVerdict::Invalid => {}
            ProbeVerdict::Pass => {
                if self.high.is_some_and(|high| high.rate <= rate) {
                    self.high = None;
                    self.factor = CORRECTION;
                }
                self.low = Some(BracketEnd::at(rate, self.low));
                self.high = self.high.map(BracketEnd::keep);
                self.next = rate * self.factor;
            }
            ProbeVerdict::Fail => {
                if self.low.is_some_and(|low| low.rate >= rate) {
                    self.low = None;
                    self.factor = CORRECTION;
                }
                self.high = Some(BracketEnd::at(rate, self.high));
                self.low = self.low.map(BracketEnd::keep);
                self.next = rate / self.factor;
            }
        }
    }

    /// The highest passing and the lowest failing rate so far.
    pub fn bracket(&self) -> (Option<f64>, Option<f64>) {
        (self.low.map(|end| end.rate), self.high.map(|end| end.rate))
    }
}

impl BracketEnd {
    fn at(rate: f64, before: Option<Self>) -> Self {
        let again = before.filter(|before| before.rate.total_cmp(&rate).is_eq());
        Self {
            rate,
            agreed: again.map_or(0, |before| before.agreed) + 1,
            kept_for: 0,
        }
    }

    fn keep(self) -> Self {
        Self {
            kept_for: self.kept_for + 1,
            ..self
        }
    }

    fn is_doubtful(&self) -> bool {
        self.agreed < 2 && self.kept_for >= SUSPICIOUS
    }
}

#[cfg(test)]
mod tests;
