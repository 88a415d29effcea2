//! What the requests of one probe say, and when they have said enough: a sequential test of the share of good ones. Pure.
//!
//! Wald's test weighs each request for and against "the share is clearly high enough"; it ends as soon as one side is
//! twenty times likelier. Three things make it fit requests at a server:
//! - They vote in the order of their release, because slow ones come in last and would be missing from an early count.
//! - Those released before the first answer do not vote: they met an empty server.
//! - Bad ones come in clumps, while a queue is long. A clump counts as little more than one of them.

use std::collections::BTreeMap;

use super::super::stats::overload::Growth;

/// A request that has ended. Times are in seconds since the start of the probe.
#[derive(Debug, Clone, PartialEq)]
pub struct Ballot {
    /// When it was released.
    pub released: f64,
    /// When its last token came, or its failure.
    pub ended: f64,
    /// How long its first token took; `None` of one that failed.
    pub first_token: Option<f64>,
    /// The objectives that it missed, by their places.
    pub missed: Vec<usize>,
}

/// What the evidence says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opinion {
    /// More requests are needed.
    Open,
    /// The share is high enough.
    Pass,
    /// It is not.
    Fail,
}

/// The evidence of one probe.
#[derive(Debug, Clone)]
pub struct Evidence {
    attainment: f64,
    /// A probe that is to pass votes for at least so long, in seconds: a queue that grows needs time to be seen.
    shortest: f64,
    /// Those that have ended before one that was released earlier.
    waiting: BTreeMap<usize, Ballot>,
    /// The next one to vote.
    next: usize,
    first_end: f64,
    votes: usize,
    good: usize,
    failed: usize,
    /// Runs of bad ones.
    clumps: usize,
    last_was_bad: bool,
    missed: Vec<usize>,
    span: Option<(f64, f64)>,
    first_tokens: Vec<(f64, f64)>,
}

/// The odds of a bad request at which a probe should surely fail are so much higher than at which it should surely pass.
const ODDS_RATIO: f64 = 3.0;
/// One side must be so much likelier: errors of 5 % on both sides.
const LIKELIER: f64 = 19.0;
/// Fewest votes for any opinion.
const FEWEST: usize = 20;
/// Fewest votes to pass: where requests wait for each other, few of them are no sample.
const FEWEST_TO_PASS: usize = 100;

impl Evidence {
    /// No evidence yet. `attainment` is the share of good requests that is wanted, in (0, 1); `objectives` is their number.
    pub fn new(attainment: f64, objectives: usize, shortest: f64) -> Self {
        Self {
            attainment,
            shortest,
            waiting: BTreeMap::new(),
            next: 0,
            first_end: f64::INFINITY,
            votes: 0,
            good: 0,
            failed: 0,
            clumps: 0,
            last_was_bad: false,
            missed: vec![0; objectives],
            span: None,
            first_tokens: Vec::new(),
        }
    }

    /// The most votes that a probe may need: about twice what it takes where the share is just the one that is wanted, which
    /// is the hardest to tell.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small positive number"
    )]
    pub fn most_votes(attainment: f64) -> usize {
        let variance = attainment * (1.0 - attainment) * ODDS_RATIO.ln().powi(2);
        ((2.0 * LIKELIER.ln().powi(2) / variance).ceil() as usize).clamp(3 * FEWEST_TO_PASS, 100_000)
    }

    /// Takes the request at this place of the schedule.
    pub fn add(&mut self, place: usize, ballot: Ballot) {
        self.first_end = self.first_end.min(ballot.ended);
        if place >= self.next {
            self.waiting.insert(place, ballot);
        }
        while let Some(ballot) = self.waiting.remove(&self.next) {
            self.next += 1;
            self.count(&ballot);
        }
    }

    fn count(&mut self, ballot: &Ballot) {
        if ballot.released < self.first_end {
            return;
        }
        let is_bad = ballot.first_token.is_none() || !ballot.missed.is_empty();
        self.votes += 1;
        self.good += usize::from(!is_bad);
        self.failed += usize::from(ballot.first_token.is_none());
        self.clumps += usize::from(is_bad && !self.last_was_bad);
        self.last_was_bad = is_bad;
        for &objective in &ballot.missed {
            self.missed[objective] += 1;
        }
        let first = self.span.map_or(ballot.released, |(first, _)| first);
        self.span = Some((first, ballot.released));
        if let Some(first_token) = ballot.first_token {
            self.first_tokens.push((ballot.released, first_token));
        }
    }

    /// What the requests so far say.
    pub fn opinion(&self) -> Opinion {
        if self.votes < FEWEST {
            return Opinion::Open;
        }
        let weight = self.weight();
        if weight >= LIKELIER.ln() {
            return Opinion::Fail;
        }
        let has_time = self.span.is_some_and(|(first, last)| last - first >= self.shortest);
        let is_sample = self.votes >= FEWEST_TO_PASS && has_time;
        if weight <= -LIKELIER.ln() && is_sample && !self.is_growing() {
            return Opinion::Pass;
        }
        Opinion::Open
    }

    /// What the requests say when there will be no more of them: the bare share decides, unless the queue grows.
    pub fn last_opinion(&self) -> Opinion {
        match self.opinion() {
            Opinion::Open if self.votes == 0 => Opinion::Open,
            Opinion::Open if self.share() >= self.attainment && !self.is_growing() => Opinion::Pass,
            Opinion::Open => Opinion::Fail,
            decided => decided,
        }
    }

    /// The logarithm of how much likelier a share that is clearly too low is than one that is clearly high enough.
    fn weight(&self) -> f64 {
        let bad = (self.votes - self.good) as f64;
        let odds = (1.0 - self.attainment) / self.attainment;
        let [low, high] = [odds / ODDS_RATIO.sqrt(), odds * ODDS_RATIO.sqrt()].map(|odds| odds / (1.0 + odds));
        let sum = bad * (high / low).ln() + self.good as f64 * ((1.0 - high) / (1.0 - low)).ln();
        if self.clumps == 0 {
            return sum;
        }
        // How much longer runs of bad ones are than chance makes them.
        let excess = bad / self.clumps as f64 * self.share();
        sum / excess.max(1.0)
    }

    /// Whether the queue grew along the probe.
    pub fn is_growing(&self) -> bool {
        Growth::of(&self.first_tokens).is_some_and(Growth::is_overload)
    }

    /// Requests that voted.
    pub fn votes(&self) -> usize {
        self.votes
    }

    /// The share of good requests among them; 1 without any.
    pub fn share(&self) -> f64 {
        if self.votes == 0 {
            return 1.0;
        }
        self.good as f64 / self.votes as f64
    }

    /// How many of them failed.
    pub fn failed(&self) -> usize {
        self.failed
    }

    /// How many of them missed each objective.
    pub fn missed(&self) -> &[usize] {
        &self.missed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn ballot(place: usize, is_good: bool) -> Ballot {
        let released = place as f64 / 10.0;
        Ballot {
            released,
            ended: released + 0.1,
            first_token: Some(0.1),
            missed: if is_good { vec![] } else { vec![0] },
        }
    }

    /// The opinion on requests that are bad with this probability, and how many votes it took.
    fn decide(attainment: f64, bad: f64, seed: u64) -> (Opinion, usize) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut evidence = Evidence::new(attainment, 1, 0.0);
        for place in 0..Evidence::most_votes(attainment) {
            evidence.add(place, ballot(place, random.random_range(0.0..1.0) >= bad));
            if evidence.opinion() != Opinion::Open {
                break;
            }
        }
        (evidence.last_opinion(), evidence.votes())
    }

    #[test]
    fn clear_shares_are_told_with_few_requests_and_few_errors() {
        for attainment in [0.5, 0.9, 0.99] {
            let odds = (1.0 - attainment) / attainment;
            let share = |odds: f64| odds / (1.0 + odds);
            let wrong = |bad: f64, opinion| {
                (0..200)
                    .filter(|&seed| decide(attainment, bad, seed).0 == opinion)
                    .count()
            };
            let (passes, fails) = (
                wrong(share(odds * 2.0), Opinion::Pass),
                wrong(share(odds / 2.0), Opinion::Fail),
            );
            assert!(passes <= 20 && fails <= 20, "{attainment}: {passes}, {fails} of 200");
        }
        assert_eq!(decide(0.99, 1.0, 0), (Opinion::Fail, FEWEST));
        assert!((240..300).contains(&decide(0.99, 0.0, 0).1));
    }

    #[test]
    fn slow_requests_are_waited_for() {
        let mut evidence = Evidence::new(0.9, 1, 0.0);
        evidence.add(0, ballot(0, true));
        for place in 3..100 {
            evidence.add(place, ballot(place, true));
        }
        assert_eq!((evidence.votes(), evidence.opinion()), (0, Opinion::Open));
        evidence.add(1, ballot(1, false));
        evidence.add(2, ballot(2, false));
        // The first answer came at 0.1 s, and only the first request was released before that.
        assert_eq!(evidence.votes(), 99);
        assert_eq!(evidence.missed(), [2]);
    }

    #[test]
    fn those_that_met_an_empty_server_do_not_vote() {
        let mut evidence = Evidence::new(0.9, 1, 0.0);
        for place in 0..50 {
            let released = place as f64 / 10.0;
            evidence.add(
                place,
                Ballot {
                    ended: released + 2.0,
                    ..ballot(place, true)
                },
            );
        }
        assert_eq!(evidence.votes(), 30);
    }

    #[test]
    fn a_clump_of_bad_requests_does_not_fail_a_probe_alone_as_many_clumps_do() {
        let opinion = |bad: &dyn Fn(usize) -> bool| {
            let mut evidence = Evidence::new(0.99, 1, 0.0);
            for place in 0..150 {
                evidence.add(place, ballot(place, !bad(place)));
            }
            evidence.opinion()
        };
        assert_eq!(opinion(&|place| (100..106).contains(&place)), Opinion::Open);
        assert_eq!(opinion(&|place| place % 24 == 23), Opinion::Fail);
    }

    #[test]
    fn a_probe_passes_only_after_its_shortest_time() {
        let mut evidence = Evidence::new(0.9, 1, 20.0);
        for place in 0..201 {
            evidence.add(place, ballot(place, true));
        }
        assert_eq!(evidence.opinion(), Opinion::Open);
        evidence.add(201, ballot(201, true));
        assert_eq!(evidence.opinion(), Opinion::Pass);
    }

    #[test]
    fn failures_are_bad_requests() {
        let mut evidence = Evidence::new(0.9, 1, 0.0);
        for place in 0..40 {
            evidence.add(
                place,
                Ballot {
                    first_token: None,
                    ..ballot(place, true)
                },
            );
        }
        assert_eq!((evidence.opinion(), evidence.failed()), (Opinion::Fail, 39));
    }

    proptest! {
        #[test]
        fn the_order_in_which_requests_end_changes_nothing(
            bad in prop::collection::vec(any::<bool>(), 30..80), seed: u64,
        ) {
            let mut places: Vec<usize> = (1..bad.len()).collect();
            let mut random = StdRng::seed_from_u64(seed);
            for place in (1..places.len()).rev() {
                places.swap(place, random.random_range(0..=place));
            }
            let counted = |places: &[usize]| {
                let mut evidence = Evidence::new(0.9, 1, 0.0);
                evidence.add(0, ballot(0, !bad[0]));
                for &place in places {
                    evidence.add(place, ballot(place, !bad[place]));
                }
                (evidence.votes(), evidence.missed().to_vec(), evidence.opinion())
            };
            let in_order: Vec<usize> = (1..bad.len()).collect();
            prop_assert_eq!(counted(&places), counted(&in_order));
        }
    }
}
