//! From healthy to ready: canaries through the whole fleet at first, later through each engine that has come back. PURE.
//!
//! There is one round of canaries at a time, so every pair of engines that serve has been proven, in whatever order they
//! came back.

use tokio::time::Instant;

use super::{Action, Failure, Fleet, Stage};
use crate::fleet::{EngineId, EngineState, Incarnation, Role};
use crate::supervisor::Ending;

/// A round of canaries under way.
#[derive(Debug)]
pub(super) struct Verification {
    pub(super) round: u64,
    pub(super) until: Instant,
    /// The engine that has come back, by index; `None` if it is the whole fleet.
    subject: Option<usize>,
    /// All engines that take part.
    members: Vec<(usize, Incarnation)>,
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
                match role {
                    Role::Prefill => self.verify(Some(subject), &[subject], &peers, now),
                    Role::Decode => self.verify(Some(subject), &peers, &[subject], now),
                }
                return;
            }
        }
    }

    pub(super) fn verify(&mut self, subject: Option<usize>, prefill: &[usize], decode: &[usize], now: Instant) {
        let id = |index: &usize| self.engines[*index].spec.id.clone();
        let pairs = prefill
            .iter()
            .flat_map(|prefill| decode.iter().map(|decode| (id(prefill), id(decode))))
            .collect();
        let members = prefill.iter().chain(decode);
        let members = members.map(|&index| (index, self.engines[index].incarnation)).collect();
        self.rounds += 1;
        self.verification = Some(Verification {
            round: self.rounds,
            until: now + self.limits.verify,
            subject,
            members,
        });
        self.actions.push(Action::Verify(self.rounds, pairs));
    }

    pub(super) fn verified(&mut self, round: u64, result: Result<(), String>, now: Instant) {
        let Some(verification) = self.verification.take_if(|verification| verification.round == round) else {
            return;
        };
        let is_up = |&(index, incarnation): &(usize, Incarnation)| {
            let engine = &self.engines[index];
            engine.incarnation == incarnation && matches!(engine.state, EngineState::Healthy | EngineState::Ready)
        };
        let up: Vec<usize> = verification
            .members
            .iter()
            .filter(|member| is_up(member))
            .map(|(index, _)| *index)
            .collect();
        match (result, verification.subject) {
            (Ok(()), _) => {
                if self.stage == Stage::Verifying {
                    self.to(Stage::Ready);
                }
                for index in up {
                    if self.engines[index].state == EngineState::Healthy {
                        self.engines[index].restarts.ready(now);
                        self.engines[index].reason = None;
                        self.enter(index, EngineState::Ready, None);
                    }
                }
            }
            // The others are tried again without whoever failed meanwhile.
            (Err(_), None) if self.is_attached && up.len() < verification.members.len() => self.to(Stage::Starting),
            (Err(reason), None) => {
                let after = self.limits.verify;
                let engine = None;
                self.end(Ending::NotReady { engine, reason, after }, now);
            }
            // Whoever left in between may be the cause; then there is a next round.
            (Err(reason), Some(subject)) if up.len() == verification.members.len() => {
                self.fail(subject, Failure::without_exit(reason), now);
            }
            (Err(_), Some(_)) => {}
        }
    }
}
