//! Canaries: Healthy to Ready. First through the whole fleet, later through each engine that has come back. PURE.
//!
//! Only one round of canaries runs at a time, so every pair of serving engines is verified, in whatever order they came back. In an
//! attached fleet an engine serves as soon as it works with all that serve, so one that hangs delays no other. Serving engines are
//! checked again if clients' hand-offs between them fail or are slow. [`blame`] finds the engine at fault, which is restarted by
//! policy while the others serve.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::blame::{self, PairOutcome};
use super::{Action, EngineFailure, FleetMachine, RunStage};
use crate::fleet::{EngineId, EngineState, Incarnation, Role};
use crate::supervisor::EndReason;
use crate::supervisor::hooks::CanaryResult;

/// Time between two checks of serving engines. Every check that finds nothing doubles it.
const CHECK_INTERVAL: Duration = Duration::from_mins(1);

/// How often it doubles at most.
const CHECK_DOUBLINGS: u32 = 5;

/// A running round of canaries.
#[derive(Debug)]
pub(super) struct Verification {
    pub(super) round: u64,
    pub(super) until: Instant,
    purpose: Purpose,
    /// All engines in it.
    members: Vec<(usize, Incarnation)>,
    /// The pairs of this round (prefill, decode).
    pairs: Vec<(usize, usize)>,
    /// Pairs that already worked in this round.
    worked: BTreeSet<(usize, usize)>,
    /// The results of an earlier round for the same purpose.
    earlier: Vec<PairOutcome>,
}

/// The purpose of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Verify the whole fleet before it serves.
    Fleet,
    /// Verify the engine that has come back, by index.
    Return(usize),
    /// Check serving engines, because hand-offs between two of them fail or are slow.
    Check,
}

/// When serving engines can be checked again.
#[derive(Debug, Default)]
pub(super) struct CheckSchedule {
    after: Option<Instant>,
    found_nothing: u32,
}

impl FleetMachine {
    /// Begins a round for an engine that has come back, unless one is running or no peer is up.
    pub(super) fn verify_next(&mut self, now: Instant) {
        if self.verification.is_some() {
            return;
        }
        for subject in self.indices_where(|engine| engine.state == EngineState::Healthy) {
            let role = self.engines[subject].spec.role;
            let others = |state| self.indices_where(|engine| engine.spec.role != role && engine.state == state);
            let mut peers = others(EngineState::Ready);
            if peers.is_empty() {
                // No engine of the other role serves; some have come back as well.
                peers = others(EngineState::Healthy);
            }
            if !peers.is_empty() {
                let pairs = peers.into_iter().map(|peer| self.pair(subject, peer)).collect();
                self.verify(Purpose::Return(subject), pairs, Vec::new(), now);
                return;
            }
        }
    }

    /// The two engines as (prefill, decode).
    fn pair(&self, one: usize, other: usize) -> (usize, usize) {
        match self.engines[one].spec.role {
            Role::Prefill => (one, other),
            Role::Decode => (other, one),
        }
    }

    /// The time limit of a round.
    fn time_limit(&self, pairs: &[(usize, usize)]) -> Duration {
        self.limits
            .verify
            .saturating_mul(u32::try_from(pairs.len()).unwrap_or(u32::MAX))
    }

    pub(super) fn verify(
        &mut self,
        purpose: Purpose,
        pairs: Vec<(usize, usize)>,
        earlier: Vec<PairOutcome>,
        now: Instant,
    ) {
        let id = |index: usize| self.engines[index].spec.id.clone();
        let named = pairs
            .iter()
            .map(|(prefill, decode)| (id(*prefill), id(*decode)))
            .collect();
        let before = earlier.iter().map(|tried| (tried.prefill, tried.decode));
        let mut members: Vec<usize> = pairs
            .iter()
            .copied()
            .chain(before)
            .flat_map(<[usize; 2]>::from)
            .collect();
        members.sort_unstable();
        members.dedup();
        self.rounds += 1;
        self.verification = Some(Verification {
            round: self.rounds,
            until: now + self.time_limit(&pairs),
            purpose,
            members: members
                .into_iter()
                .map(|index| (index, self.engines[index].incarnation))
                .collect(),
            pairs,
            worked: BTreeSet::new(),
            earlier,
        });
        self.output.push(Action::Verify {
            round: self.rounds,
            pairs: named,
            // Kept engines have handed over before, so their first hand-off needs no idle host.
            at_once: purpose == Purpose::Fleet && self.is_attached,
        });
    }

    /// Clients' hand-offs between these two fail or are slow: checks all pairs of both, unless a check ended recently or engines are
    /// starting or stopping.
    pub(super) fn suspected(&mut self, prefill: &EngineId, decode: &EngineId, now: Instant) {
        let ready = |role| self.indices_where(|engine| engine.spec.role == role && engine.state == EngineState::Ready);
        let (all_prefill, all_decode) = (ready(Role::Prefill), ready(Role::Decode));
        let find = |all: &[usize], id: &EngineId| all.iter().copied().find(|index| self.engines[*index].spec.id == *id);
        let is_settled = self.engines.iter().all(|engine| {
            matches!(
                engine.state,
                EngineState::Ready | EngineState::Stopped | EngineState::Failed
            )
        });
        let is_due = self.checks.after.is_none_or(|after| after <= now);
        let (Some(prefill), Some(decode)) = (find(&all_prefill, prefill), find(&all_decode, decode)) else {
            return;
        };
        if self.stage != RunStage::Ready || self.verification.is_some() || !is_settled || !is_due {
            return;
        }
        let others = all_prefill
            .into_iter()
            .filter(|index| *index != prefill)
            .map(|index| (index, decode));
        let pairs = all_decode
            .into_iter()
            .map(|index| (prefill, index))
            .chain(others)
            .collect();
        self.verify(Purpose::Check, pairs, Vec::new(), now);
    }

    /// A pair of this round works. In an attached fleet, an engine serves once it works with every serving engine.
    pub(super) fn pair_worked(&mut self, round: u64, prefill: &EngineId, decode: &EngineId, now: Instant) {
        let is_pair = |&(one, other): &(usize, usize)| {
            self.engines[one].spec.id == *prefill && self.engines[other].spec.id == *decode
        };
        let is_attached = self.is_attached;
        let verification = self.verification.as_mut();
        let of_round =
            |found: &&mut Verification| is_attached && found.round == round && found.purpose == Purpose::Fleet;
        let Some(verification) = verification.filter(of_round) else {
            return;
        };
        let Some(pair) = verification.pairs.iter().copied().find(is_pair) else {
            return;
        };
        verification.worked.insert(pair);
        let (members, worked) = (verification.members.clone(), verification.worked.clone());
        let waits = |fleet: &Self, index: usize| {
            let engine = &fleet.engines[index];
            engine.state == EngineState::Healthy && members.contains(&(index, engine.incarnation))
        };
        if self.stage == RunStage::Verifying && waits(self, pair.0) && waits(self, pair.1) {
            self.proven(&[pair.0, pair.1], now);
        }
        while self.stage == RunStage::Ready {
            let joins = |&index: &usize| {
                let role = self.engines[index].spec.role;
                let peers = self.indices_where(|peer| peer.spec.role != role && peer.state == EngineState::Ready);
                !peers.is_empty() && peers.into_iter().all(|peer| worked.contains(&self.pair(index, peer)))
            };
            let mut waiting = (0..self.engines.len()).filter(|index| waits(self, *index));
            let Some(next) = waiting.find(joins) else { return };
            self.proven(&[next], now);
        }
    }

    pub(super) fn verified(&mut self, round: u64, results: Vec<CanaryResult>, now: Instant) {
        let Some(verification) = self.verification.take_if(|verification| verification.round == round) else {
            return;
        };
        let is_up = |&(index, incarnation): &(usize, Incarnation)| {
            let engine = &self.engines[index];
            engine.incarnation == incarnation && matches!(engine.state, EngineState::Healthy | EngineState::Ready)
        };
        let all_up = verification.members.iter().all(is_up);
        let up: Vec<usize> = verification
            .members
            .iter()
            .filter(|member| is_up(member))
            .map(|(index, _)| *index)
            .collect();
        let Verification {
            purpose,
            pairs,
            earlier: mut tried,
            ..
        } = verification;
        let wanted = tried.len() + pairs.len();
        let after = self.time_limit(&pairs);
        tried.extend(pairs.into_iter().zip(results).filter_map(|((prefill, decode), trial)| {
            let failure = match trial {
                CanaryResult::Worked => None,
                CanaryResult::Failed(reason) => Some(reason),
                CanaryResult::Untried => return None,
            };
            Some(PairOutcome {
                prefill,
                decode,
                failure,
            })
        }));
        for worked in tried.iter().filter(|tried| tried.failure.is_none()) {
            self.blamed.remove(&(worked.prefill, worked.decode));
        }
        let failure = tried.iter().find_map(|tried| tried.failure.clone());
        match (purpose, failure) {
            (Purpose::Check, None) => self.check_found_nothing(now),
            (_, None) if tried.len() == wanted => self.proven(&up, now),
            // An engine that left in between can be the cause; a next round follows.
            (Purpose::Fleet, _) if self.stage == RunStage::Verifying && self.is_attached && !all_up => {
                self.set_stage(RunStage::Starting);
            }
            (_, _) if !all_up && self.stage == RunStage::Ready => {}
            // Others serve already, and an engine that does not gets a round of its own.
            (Purpose::Fleet, None) if self.stage == RunStage::Ready => {}
            (Purpose::Fleet, failure) if failure.is_none() || !self.is_attached => {
                let engine = None;
                let reason = failure.unwrap_or_else(timed_out);
                self.end(EndReason::NotReady { engine, reason, after }, now);
            }
            (Purpose::Return(subject), None) => self.fail(subject, EngineFailure::without_exit(timed_out()), now),
            (purpose, _) => self.judge(purpose, &tried, &up, now),
        }
    }

    /// Some pairs fail: restarts the engines at fault, and lets the others serve.
    fn judge(&mut self, purpose: Purpose, tried: &[PairOutcome], members: &[usize], now: Instant) {
        let subject = match purpose {
            Purpose::Return(subject) => Some(subject),
            Purpose::Fleet | Purpose::Check => None,
        };
        let guilty = blame::guilty(tried, |prefill, decode| self.first_to_blame(prefill, decode, subject));
        let second_opinion = subject.map(|subject| self.untried_with_peers_of(subject, tried));
        let is_clear = guilty
            .iter()
            .all(|guilty| Some(guilty.engine) == subject && guilty.either_of.is_none());
        if let Some(pairs) = second_opinion.filter(|pairs| !pairs.is_empty() && !is_clear) {
            self.verify(purpose, pairs, tried.to_vec(), now);
            return;
        }
        for found in &guilty {
            if let Some(pair) = found.either_of {
                self.blamed.insert(pair, found.engine);
            }
            let reason = blame::reason(tried, found.engine, |index| self.engines[index].spec.id.to_string());
            self.convict(found.engine, reason, now);
        }
        self.checks = CheckSchedule {
            after: Some(now + CHECK_INTERVAL),
            found_nothing: 0,
        };
        let works = |index: usize| {
            let mut own = tried.iter().filter(|tried| tried.has(index));
            own.any(|tried| tried.failure.is_none() && !guilty.iter().any(|guilty| tried.has(guilty.engine)))
        };
        let innocent: Vec<usize> = members.iter().copied().filter(|index| works(*index)).collect();
        if !innocent.is_empty() {
            self.proven(&innocent, now);
        } else if self.stage == RunStage::Verifying {
            self.set_stage(RunStage::Starting);
        }
    }

    /// Pairs that show whether the peers of the engine's failing pairs work with other engines.
    fn untried_with_peers_of(&self, subject: usize, tried: &[PairOutcome]) -> Vec<(usize, usize)> {
        let role = self.engines[subject].spec.role;
        let others = self.indices_where(|engine| engine.spec.role == role && engine.state == EngineState::Ready);
        let failing = tried
            .iter()
            .filter(|tried| tried.failure.is_some() && tried.has(subject));
        let peers = failing.map(|tried| {
            if role == Role::Prefill {
                tried.decode
            } else {
                tried.prefill
            }
        });
        let pairs = peers.flat_map(|peer| others.iter().map(move |other| (*other, peer)));
        let pairs = pairs
            .filter(|(other, _)| *other != subject)
            .map(|(other, peer)| self.pair(other, peer));
        let is_tried = |pair: &(usize, usize)| tried.iter().any(|tried| (tried.prefill, tried.decode) == *pair);
        pairs.filter(|pair| !is_tried(pair)).collect()
    }

    /// The end of a failing pair to restart when the results do not show which is at fault: the other one than last time. At first
    /// the one that has just started, because it serves no client yet; else the prefill engine, on whose side channel hand-offs wait.
    fn first_to_blame(&self, prefill: usize, decode: usize, subject: Option<usize>) -> usize {
        match self.blamed.get(&(prefill, decode)) {
            Some(last) if *last == prefill => decode,
            Some(_) => prefill,
            None if subject == Some(decode) => decode,
            None => prefill,
        }
    }

    fn check_found_nothing(&mut self, now: Instant) {
        let doublings = self.checks.found_nothing.min(CHECK_DOUBLINGS);
        self.checks = CheckSchedule {
            after: Some(now + CHECK_INTERVAL * 2_u32.pow(doublings)),
            found_nothing: doublings + 1,
        };
    }

    /// Hand-offs between these engines work: they serve from now on.
    fn proven(&mut self, engines: &[usize], now: Instant) {
        if self.stage == RunStage::Verifying {
            self.set_stage(RunStage::Ready);
        }
        for index in engines.iter().copied() {
            self.engines[index].ready(now, &mut self.output);
        }
    }
}

fn timed_out() -> String {
    "the canaries took too long".to_owned()
}
