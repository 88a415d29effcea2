//! The highest rate that a server meets objectives at: which rates to try, and when to stop. Pure.
//!
//! Doubling or halving finds a rate that passes and one that fails; halving the ratio between them, a narrower pair. A
//! verdict is wrong now and then: where one end of the pair has stood while the other came up to it, that end is tried again.

pub mod evidence;
#[cfg(test)]
pub(super) mod queue_model;

/// How a probe ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The objectives were met.
    Pass,
    /// They were not.
    Fail,
    /// The client, not the server, was measured.
    Invalid,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Try this rate, in requests per second.
    Probe(f64),
    /// Nothing more.
    End(Ending),
}

/// Why a search is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The pair is as narrow as wanted.
    Found,
    /// The lowest rate that is tried fails, too.
    NothingPasses,
    /// The highest rate that is tried passes, too.
    EverythingPasses,
    /// The client cannot send faster.
    ClientLimit,
    /// Too many probes.
    Probes,
}

/// A search, between its probes.
#[derive(Debug, Clone)]
pub struct Search {
    /// The pair is narrow enough when the failing rate is at most this share above the passing one.
    tolerance: f64,
    lowest: f64,
    /// The first rate, and by how much the next one is multiplied while the pair has one end.
    next: f64,
    factor: f64,
    low: Option<End>,
    high: Option<End>,
    invalid: usize,
    probes: usize,
}

/// One end of the pair.
#[derive(Debug, Clone, Copy)]
struct End {
    rate: f64,
    /// Probes that agreed.
    times: usize,
    /// How often the other end came closer since.
    stood: usize,
}

/// Most probes. Twenty doublings, and as many as the finest tolerance takes.
const MOST_PROBES: usize = 60;
/// The lowest rate is so much below the first.
const LOWEST: f64 = 1.0 / 1024.0;
/// No client sends more requests per second.
const HIGHEST: f64 = 100_000.0;
/// A rate is given up after so many probes in a row that measured the client: other work on its machine passes.
const MOST_INVALID: usize = 3;
/// An end that stood so often is tried again: by chance alone, an end is the nearer one that often once in eight times.
const SUSPICIOUS: usize = 3;
/// By how much the search steps beyond an end that was wrong.
const CORRECTION: f64 = 1.25;

/// Requests of a burst that tell too little when there are fewer.
const LEAST_OF_A_BURST: usize = 8;
/// A search begins at this share of what a burst showed: below the limit, but not far below, because a rate that passes takes
/// the more time the lower it is.
const SHARE_OF_A_BURST: f64 = 0.5;

/// Where a search begins, by when the answers to requests that were all sent at once had come, in seconds. A burst ends with
/// few requests at the server, so its last part is left out.
pub fn first_rate(mut ends: Vec<f64>) -> Option<f64> {
    ends.sort_unstable_by(f64::total_cmp);
    let counted = ends.len() * 4 / 5;
    let end = *ends.get(counted.checked_sub(1)?)?;
    let rate = counted as f64 / end * SHARE_OF_A_BURST;
    if ends.len() < LEAST_OF_A_BURST || !rate.is_finite() || rate <= 0.0 {
        return None;
    }
    // Two digits are more than such a guess is worth.
    let digit = 10_f64.powf(rate.log10().floor() - 1.0);
    Some((rate / digit).round().max(1.0) * digit)
}

impl Search {
    /// A search that begins at `first` requests per second. Both arguments are more than 0.
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

    /// What to do next.
    pub fn step(&self) -> Step {
        if self.probes >= MOST_PROBES {
            return Step::End(Ending::Probes);
        }
        if self.invalid >= MOST_INVALID {
            return Step::End(Ending::ClientLimit);
        }
        match (self.low, self.high) {
            (Some(low), Some(high)) if high.rate <= low.rate * (1.0 + self.tolerance) => {
                let doubtful = [high, low].into_iter().find(End::is_doubtful);
                doubtful.map_or(Step::End(Ending::Found), |end| Step::Probe(end.rate))
            }
            (Some(low), Some(high)) => Step::Probe((low.rate * high.rate).sqrt()),
            _ if self.next < self.lowest => Step::End(Ending::NothingPasses),
            _ if self.next > HIGHEST => Step::End(Ending::EverythingPasses),
            _ => Step::Probe(self.next),
        }
    }

    /// Takes the verdict on the rate that [`Self::step`] said.
    pub fn take(&mut self, rate: f64, verdict: Verdict) {
        self.probes += 1;
        self.invalid = if verdict == Verdict::Invalid {
            self.invalid + 1
        } else {
            0
        };
        match verdict {
            Verdict::Invalid => {}
            Verdict::Pass => {
                if self.high.is_some_and(|high| high.rate <= rate) {
                    self.high = None;
                    self.factor = CORRECTION;
                }
                self.low = Some(End::at(rate, self.low));
                self.high = self.high.map(End::stand);
                self.next = rate * self.factor;
            }
            Verdict::Fail => {
                if self.low.is_some_and(|low| low.rate >= rate) {
                    self.low = None;
                    self.factor = CORRECTION;
                }
                self.high = Some(End::at(rate, self.high));
                self.low = self.low.map(End::stand);
                self.next = rate / self.factor;
            }
        }
    }

    /// The highest rate that passed and the lowest that failed, as far as there are such.
    pub fn bracket(&self) -> (Option<f64>, Option<f64>) {
        (self.low.map(|end| end.rate), self.high.map(|end| end.rate))
    }
}

impl End {
    fn at(rate: f64, before: Option<Self>) -> Self {
        let again = before.filter(|before| before.rate.total_cmp(&rate).is_eq());
        Self {
            rate,
            times: again.map_or(0, |before| before.times) + 1,
            stood: 0,
        }
    }

    fn stand(self) -> Self {
        Self {
            stood: self.stood + 1,
            ..self
        }
    }

    fn is_doubtful(&self) -> bool {
        self.times < 2 && self.stood >= SUSPICIOUS
    }
}

#[cfg(test)]
mod tests;
