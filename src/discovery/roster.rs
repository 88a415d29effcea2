//! The engines that were discovered, and how far each has come. PURE.
//!
//! ```text
//! listed ──> Healthy ──canary──> Ready ──left──> Draining ──idle──> gone
//!               └──left, address changed──────────^
//! ```
//!
//! A new engine gets traffic once a canary has worked through a pair with it, and none has failed through a pair whose other
//! engine works. An entry with another address is another engine: it waits until the one before it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Pair;
use super::listing::ListedEngine;
use crate::fleet::{Endpoint, EngineId, EngineState, EngineView, FleetStage, FleetView, Incarnation, Load, Role};

/// The pause before an engine is verified again. It doubles with each failure.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// A pair, with the incarnations that are verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NumberedPair([(EngineId, Incarnation); 2]);

impl NumberedPair {
    pub(super) fn names(&self) -> Pair {
        let [(prefill, _), (decode, _)] = &self.0;
        (prefill.clone(), decode.clone())
    }
}

/// All engines.
#[derive(Debug, Default)]
pub(super) struct Roster {
    members: BTreeMap<EngineId, Member>,
    /// What the source says.
    listed: Vec<ListedEngine>,
    /// The last incarnation of each name, also of those that are gone.
    incarnations: BTreeMap<EngineId, Incarnation>,
    generation: u64,
    is_changed: bool,
}

#[derive(Debug)]
struct Member {
    view: EngineView,
    failures: u32,
    /// When it is verified next.
    verify_at: Option<Instant>,
}

impl Roster {
    /// Takes over what the source says. Returns lines for people.
    pub(super) fn update(&mut self, listed: &[ListedEngine]) -> Vec<String> {
        self.listed = listed.to_vec();
        let mut lines = Vec::new();
        for (id, member) in &mut self.members {
            let stays = listed.iter().any(|engine| is_same(&member.view, engine));
            if !stays && member.view.state != EngineState::Draining {
                member.view.state = EngineState::Draining;
                member.view.load.close();
                self.is_changed = true;
                lines.push(format!("{id} left: it finishes its requests"));
            }
        }
        lines.extend(self.admit());
        lines
    }

    /// Removes engines that left and have finished. Returns lines for people.
    pub(super) fn remove_idle(&mut self) -> Vec<String> {
        let before = self.members.len();
        let has_finished = |member: &Member| member.view.state == EngineState::Draining && member.view.load.is_idle();
        self.members.retain(|_, member| !has_finished(member));
        if self.members.len() == before {
            return Vec::new();
        }
        self.is_changed = true;
        self.admit()
    }

    /// Adds the listed engines whose name is free.
    fn admit(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        for engine in &self.listed {
            let id = EngineId::named(&engine.name);
            if self.members.contains_key(&id) {
                continue;
            }
            let last = self.incarnations.entry(id.clone()).or_insert(Incarnation(0));
            last.0 += 1;
            let endpoint = Endpoint {
                host: engine.host.clone(),
                port: engine.port,
                tensor_parallel: 1,
                receiver: None,
            };
            lines.push(format!("{id} at {} joins: it is being verified", endpoint.authority()));
            let view = EngineView {
                id: id.clone(),
                role: engine.role,
                incarnation: *last,
                state: EngineState::Healthy,
                endpoint,
                pid: None,
                reason: None,
                restart_at: None,
                load: Arc::new(Load::default()),
            };
            let member = Member {
                view,
                failures: 0,
                verify_at: None,
            };
            self.members.insert(id, member);
            self.is_changed = true;
        }
        lines
    }

    /// The pairs through which engines that wait must prove themselves now: with each engine of the other role that serves, or
    /// with those that wait as well if none serves.
    pub(super) fn pairs_to_verify(&self, now: Instant) -> Vec<NumberedPair> {
        let waits =
            |member: &&Member| member.view.state == EngineState::Healthy && member.verify_at.is_none_or(|at| at <= now);
        let partners = |role: Role| {
            let of_role = |state: EngineState| {
                let members = self.members.values();
                members.filter(move |member| member.view.role == role && member.view.state == state)
            };
            let serving: Vec<&Member> = of_role(EngineState::Ready).collect();
            if serving.is_empty() {
                of_role(EngineState::Healthy).collect()
            } else {
                serving
            }
        };
        let mut pairs = Vec::new();
        let mut add = |prefill: &Member, decode: &Member| {
            let numbered = |member: &Member| (member.view.id.clone(), member.view.incarnation);
            let pair = NumberedPair([numbered(prefill), numbered(decode)]);
            if !pairs.contains(&pair) {
                pairs.push(pair);
            }
        };
        for member in self.members.values().filter(waits) {
            match member.view.role {
                Role::Prefill => partners(Role::Decode)
                    .into_iter()
                    .for_each(|decode| add(member, decode)),
                Role::Decode => partners(Role::Prefill)
                    .into_iter()
                    .for_each(|prefill| add(prefill, member)),
            }
        }
        pairs
    }

    /// Takes over the results of canaries. Returns lines for people.
    pub(super) fn verified(&mut self, results: Vec<(NumberedPair, Result<(), String>)>, now: Instant) -> Vec<String> {
        let is_current = |(id, incarnation): &(EngineId, Incarnation)| {
            self.members
                .get(id)
                .is_some_and(|member| member.view.incarnation == *incarnation)
        };
        let results: Vec<_> = results
            .into_iter()
            .filter(|(pair, _)| pair.0.iter().all(is_current))
            .collect();
        let with_success: BTreeSet<EngineId> = results
            .iter()
            .filter(|(_, result)| result.is_ok())
            .flat_map(|(pair, _)| pair.0.iter().map(|(id, _)| id.clone()))
            .collect();
        let mut lines = Vec::new();
        for (id, member) in &mut self.members {
            let tried = results
                .iter()
                .filter(|(pair, _)| pair.0.iter().any(|(other, _)| other == id));
            // An engine is not to blame for a partner with which nothing works.
            let mut failed = tried.filter_map(|(pair, result)| {
                let reason = result.as_ref().err()?;
                let partner = pair.0.iter().find(|(other, _)| other != id)?;
                (with_success.contains(&partner.0) || !with_success.contains(id)).then_some(reason)
            });
            let failure = failed.next_back();
            if member.view.state != EngineState::Healthy || (failure.is_none() && !with_success.contains(id)) {
                continue;
            }
            self.is_changed = true;
            if let Some(reason) = failure {
                let pause = LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.saturating_pow(member.failures.min(10)));
                member.failures += 1;
                member.verify_at = Some(now + pause);
                if member.view.reason.as_ref() != Some(reason) {
                    lines.push(format!("warn  {id} gets no requests yet: {reason}"));
                }
                member.view.reason = Some(reason.clone());
            } else {
                member.view.state = EngineState::Ready;
                member.view.reason = None;
                lines.push(format!("{id} serves"));
            }
        }
        lines
    }

    /// The view, if it has changed since the last call.
    pub(super) fn changed_view(&mut self) -> Option<FleetView> {
        if !std::mem::take(&mut self.is_changed) {
            return None;
        }
        self.generation += 1;
        let of = |role: Role| self.members.values().filter(move |member| member.view.role == role);
        let members = of(Role::Prefill).chain(of(Role::Decode));
        Some(FleetView {
            // The first view, without engines, has 1.
            generation: self.generation + 1,
            stage: FleetStage::Ready,
            engines: members.map(|member| Arc::new(member.view.clone())).collect(),
        })
    }
}

fn is_same(view: &EngineView, engine: &ListedEngine) -> bool {
    view.id.as_str() == engine.name
        && view.role == engine.role
        && view.endpoint.host == engine.host
        && view.endpoint.port == engine.port
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(names: &[&str]) -> Vec<ListedEngine> {
        let engine = |name: &&str| ListedEngine {
            name: name.trim_end_matches('\'').to_owned(),
            role: if name.starts_with('p') {
                Role::Prefill
            } else {
                Role::Decode
            },
            // A name with a prime has another address.
            host: if name.ends_with('\'') { "b" } else { "a" }.to_owned(),
            port: 1,
        };
        names.iter().map(engine).collect()
    }

    fn states(roster: &mut Roster) -> String {
        roster.is_changed = true;
        let view = roster.changed_view().expect("a view");
        let states = view
            .engines
            .iter()
            .map(|engine| format!("{}.{} {}", engine.id, engine.incarnation, engine.state));
        states.collect::<Vec<_>>().join(", ")
    }

    /// Verifies everything; pairs that `fails` names fail.
    fn verify(roster: &mut Roster, now: Instant, fails: &[&str]) -> Vec<String> {
        let pairs = roster.pairs_to_verify(now);
        let names: Vec<String> = pairs
            .iter()
            .map(|pair| format!("{}-{}", pair.names().0, pair.names().1))
            .collect();
        let result = |name: &String| {
            if fails.contains(&name.as_str()) {
                Err(format!("{name} failed"))
            } else {
                Ok(())
            }
        };
        let results = names.iter().map(result).collect::<Vec<_>>();
        roster.verified(pairs.into_iter().zip(results).collect(), now);
        names
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_serves_after_its_canaries() {
        let mut roster = Roster::default();
        let now = Instant::now();
        roster.update(&listed(&["p1", "d1"]));
        assert_eq!(states(&mut roster), "p1.1 healthy, d1.1 healthy");
        assert_eq!(verify(&mut roster, now, &[]), ["p1-d1"]);
        assert_eq!(states(&mut roster), "p1.1 ready, d1.1 ready");
        assert_eq!(verify(&mut roster, now, &[]), [""; 0]);
        roster.update(&listed(&["p1", "p2", "d1", "d2"]));
        assert_eq!(verify(&mut roster, now, &["p1-d2"]), ["p1-d2", "p2-d1"]);
        assert_eq!(states(&mut roster), "p1.1 ready, p2.1 ready, d1.1 ready, d2.1 healthy");
        assert_eq!(verify(&mut roster, now, &[]), [""; 0], "not at once");
        assert_eq!(verify(&mut roster, now + FIRST_PAUSE, &[]), ["p1-d2", "p2-d2"]);
        assert_eq!(states(&mut roster), "p1.1 ready, p2.1 ready, d1.1 ready, d2.1 ready");
    }

    #[tokio::test(start_paused = true)]
    async fn a_partner_that_never_works_is_to_blame() {
        let mut roster = Roster::default();
        roster.update(&listed(&["p1", "d1", "d2"]));
        verify(&mut roster, Instant::now(), &["p1-d2"]);
        assert_eq!(states(&mut roster), "p1.1 ready, d1.1 ready, d2.1 healthy");
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_left_finishes_its_requests() {
        let mut roster = Roster::default();
        roster.update(&listed(&["p1", "d1"]));
        verify(&mut roster, Instant::now(), &[]);
        let request = roster.members[&EngineId::named("d1")]
            .view
            .load
            .try_enter()
            .expect("open");
        roster.update(&listed(&["p1", "d1'"]));
        roster.remove_idle();
        assert_eq!(states(&mut roster), "p1.1 ready, d1.1 draining");
        drop(request);
        roster.remove_idle();
        assert_eq!(
            states(&mut roster),
            "p1.1 ready, d1.2 healthy",
            "the next address is another engine"
        );
        roster.update(&[]);
        roster.remove_idle();
        assert_eq!(states(&mut roster), "");
    }

    #[tokio::test(start_paused = true)]
    async fn results_of_an_engine_that_was_replaced_do_not_count() {
        let mut roster = Roster::default();
        roster.update(&listed(&["p1", "d1"]));
        let pairs = roster.pairs_to_verify(Instant::now());
        roster.update(&listed(&["p1", "d1'"]));
        roster.remove_idle();
        roster.verified(pairs.into_iter().map(|pair| (pair, Ok(()))).collect(), Instant::now());
        assert_eq!(states(&mut roster), "p1.1 healthy, d1.2 healthy");
    }
}
