//! From healthy to ready: canaries through the whole fleet at first, later through each engine that has come back. PURE.
//!
//! There is one round of canaries at a time, so every pair of engines that serve has been proven, in whatever order they
//! came back. In a fleet that was taken over an engine serves as soon as it is proven with all that serve, so one that hangs
//! keeps clients from no other one. Engines that serve are checked again where clients' hand-offs between them fail or crawl. What fails is blamed
//! on the engine that [`blame`] finds, which is restarted by policy; the others serve.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;

use super::blame::{self, Tried};
use super::{Action, Failure, Fleet, Goal, Stage};
use crate::fleet::{EngineId, EngineState, Incarnation, Retry, Role};
use crate::supervisor::restart::Decision;
use crate::supervisor::{Ending, Trial};

/// How long engines that serve are left alone after a check. Doubled by every check that finds nothing.
const CHECK_INTERVAL: Duration = Duration::from_mins(1);

/// How often that doubles.
const CHECK_DOUBLINGS: u32 = 5;

/// A round of canaries under way.
#[derive(Debug)]
pub(super) struct Verification {
    pub(super) round: u64,
    pub(super) until: Instant,
    purpose: Purpose,
    /// All engines that take part.
    members: Vec<(usize, Incarnation)>,
    /// The pairs of this round (prefill, decode).
    pairs: Vec<(usize, usize)>,
    /// Those that are known to work while the others are still tried.
    worked: BTreeSet<(usize, usize)>,
    /// What an earlier round for the same purpose showed.
    earlier: Vec<Tried>,
}

/// What a round is to prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The whole fleet, before it serves.
    Fleet,
    /// The engine that has come back, by index.
    Return(usize),
    /// Engines that serve, because hand-offs between two of them fail or crawl.
    Check,
}

/// When engines that serve may be checked again.
#[derive(Debug, Default)]
pub(super) struct Checks {
    after: Option<Instant>,
    found_nothing: u32,
}

impl Fleet {
    pub(super) fn probed(&mut self, id: &EngineId, incarnation: Incarnation, now: Instant) {
        let Some(index) = self.current(id, incarnation) else {
            return;
        };
        if self.engines[index].state != EngineState::Starting {
            return;
        }
        self.enter(index, EngineState::Healthy, None);
        self.actions.push(Action::Settled(id.clone()));
        self.actions.push(Action::Watch(id.clone(), incarnation));
        self.start_next(now);
    }

    /// Begins a round for an engine that has come back, unless one is under way or there is nobody to try it with.
    pub(super) fn verify_next(&mut self, now: Instant) {
        if self.verification.is_some() {
            return;
        }
        for subject in self.those(|engine| engine.state == EngineState::Healthy) {
            let role = self.engines[subject].spec.role;
            let others = |state| self.those(|engine| engine.spec.role != role && engine.state == state);
            let mut peers = others(EngineState::Ready);
            if peers.is_empty() {
                // The whole other role is coming back as well.
                peers = others(EngineState::Healthy);
            }
            if !peers.is_empty() {
                let pairs = peers.into_iter().map(|peer| self.pair(subject, peer)).collect();
                self.verify(Purpose::Return(subject), pairs, Vec::new(), now);
                return;
            }
        }
    }

    /// The two as (prefill, decode).
    fn pair(&self, one: usize, other: usize) -> (usize, usize) {
        match self.engines[one].spec.role {
            Role::Prefill => (one, other),
            Role::Decode => (other, one),
        }
    }

    /// How long the canaries of a round can take.
    fn allowed(&self, pairs: &[(usize, usize)]) -> Duration {
        self.limits
            .verify
            .saturating_mul(u32::try_from(pairs.len()).unwrap_or(u32::MAX))
    }

    pub(super) fn verify(&mut self, purpose: Purpose, pairs: Vec<(usize, usize)>, earlier: Vec<Tried>, now: Instant) {
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
            until: now + self.allowed(&pairs),
            purpose,
            members: members
                .into_iter()
                .map(|index| (index, self.engines[index].incarnation))
                .collect(),
            pairs,
            worked: BTreeSet::new(),
            earlier,
        });
        self.actions.push(Action::Verify {
            round: self.rounds,
            pairs: named,
            // Engines that were kept have handed over before: their first hand-off needs no quiet host.
            at_once: purpose == Purpose::Fleet && self.is_attached,
        });
    }

    /// Clients' hand-offs between these two fail or crawl: all pairs of both are checked, unless that was done just now or the
    /// fleet changes anyway.
    pub(super) fn suspected(&mut self, prefill: &EngineId, decode: &EngineId, now: Instant) {
        let ready = |role| self.those(|engine| engine.spec.role == role && engine.state == EngineState::Ready);
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
        if self.stage != Stage::Ready || self.verification.is_some() || !is_settled || !is_due {
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

    /// A pair of this round works. In an attached fleet, each engine that now works with every engine that serves begins to serve.
    pub(super) fn worked(&mut self, round: u64, prefill: &EngineId, decode: &EngineId, now: Instant) {
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
        if self.stage == Stage::Verifying && waits(self, pair.0) && waits(self, pair.1) {
            self.proven(&[pair.0, pair.1], now);
        }
        while self.stage == Stage::Ready {
            let joins = |&index: &usize| {
                let role = self.engines[index].spec.role;
                let peers = self.those(|peer| peer.spec.role != role && peer.state == EngineState::Ready);
                !peers.is_empty() && peers.into_iter().all(|peer| worked.contains(&self.pair(index, peer)))
            };
            let mut waiting = (0..self.engines.len()).filter(|index| waits(self, *index));
            let Some(next) = waiting.find(joins) else { return };
            self.proven(&[next], now);
        }
    }

    pub(super) fn verified(&mut self, round: u64, trials: Vec<Trial>, now: Instant) {
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
        let after = self.allowed(&pairs);
        tried.extend(pairs.into_iter().zip(trials).filter_map(|((prefill, decode), trial)| {
            let failure = match trial {
                Trial::Worked => None,
                Trial::Failed(reason) => Some(reason),
                Trial::Untried => return None,
            };
            Some(Tried {
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
            (Purpose::Check, None) => self.checked_in_vain(now),
            (_, None) if tried.len() == wanted => self.proven(&up, now),
            // Whoever left in between may be the cause; then there is a next round.
            (Purpose::Fleet, _) if self.stage == Stage::Verifying && self.is_attached && !all_up => {
                self.to(Stage::Starting);
            }
            (_, _) if !all_up && self.stage == Stage::Ready => {}
            // Others serve already, and who does not yet has a round of its own next.
            (Purpose::Fleet, None) if self.stage == Stage::Ready => {}
            (Purpose::Fleet, failure) if failure.is_none() || !self.is_attached => {
                let engine = None;
                let reason = failure.unwrap_or_else(too_long);
                self.end(Ending::NotReady { engine, reason, after }, now);
            }
            (Purpose::Return(subject), None) => self.fail(subject, Failure::without_exit(too_long()), now),
            (purpose, _) => self.judge(purpose, &tried, &up, now),
        }
    }

    /// Some pairs fail: blames engines for it, and lets the others serve.
    fn judge(&mut self, purpose: Purpose, tried: &[Tried], members: &[usize], now: Instant) {
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
        self.checks = Checks {
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
        } else if self.stage == Stage::Verifying {
            self.to(Stage::Starting);
        }
    }

    /// Pairs that tell whether peers with which the engine fails work with others.
    fn untried_with_peers_of(&self, subject: usize, tried: &[Tried]) -> Vec<(usize, usize)> {
        let role = self.engines[subject].spec.role;
        let others = self.those(|engine| engine.spec.role == role && engine.state == EngineState::Ready);
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

    /// The end of a failing pair to restart where nothing tells its ends apart: the other one than last time. At first the one
    /// that has just started, which serves nobody yet; else the prefill engine, on whose side channel hand-offs wait.
    fn first_to_blame(&self, prefill: usize, decode: usize, subject: Option<usize>) -> usize {
        match self.blamed.get(&(prefill, decode)) {
            Some(last) if *last == prefill => decode,
            Some(_) => prefill,
            None if subject == Some(decode) => decode,
            None => prefill,
        }
    }

    /// The engine's hand-offs fail: it is restarted by policy, once what it computes for clients is done.
    fn convict(&mut self, index: usize, reason: String, now: Instant) {
        if self.engines[index].state != EngineState::Ready {
            self.fail(index, Failure::without_exit(reason), now);
            return;
        }
        let dice = self.random.as_mut().map_or(0.0, RngExt::random);
        let engine = &mut self.engines[index];
        self.changed = true;
        match engine.restarts.failed(&self.limits.restart, Retry::Yes, dice, now) {
            Decision::Restart(wait) => {
                (engine.goal, engine.restart_at) = (Goal::StartAgain, Some(now + wait));
                engine.reason = Some(reason);
                let of = Some((engine.spec.id.clone(), engine.incarnation));
                self.enter(index, EngineState::Draining, Some(now + self.limits.drain));
                self.actions.push(Action::AwaitIdle(of));
            }
            // Nothing is to be restarted, and slow answers are better than none.
            Decision::Leave => engine.reason = Some(reason),
            Decision::CrashLoop => self.give_up(index, &reason, now),
        }
    }

    fn checked_in_vain(&mut self, now: Instant) {
        let doublings = self.checks.found_nothing.min(CHECK_DOUBLINGS);
        self.checks = Checks {
            after: Some(now + CHECK_INTERVAL * 2_u32.pow(doublings)),
            found_nothing: doublings + 1,
        };
    }

    /// Hand-offs between these work: those that do not serve yet do so now.
    fn proven(&mut self, engines: &[usize], now: Instant) {
        if self.stage == Stage::Verifying {
            self.to(Stage::Ready);
        }
        for index in engines.iter().copied() {
            if self.engines[index].state == EngineState::Healthy {
                self.engines[index].restarts.ready(now);
                self.engines[index].reason = None;
                self.enter(index, EngineState::Ready, None);
            }
        }
    }
}

fn too_long() -> String {
    "the canaries took too long".to_owned()
}
