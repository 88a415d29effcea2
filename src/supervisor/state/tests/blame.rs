//! Failing hand-offs restart the engine at fault, and never fail another one.

use std::time::Duration;

use super::world::{MAX_RESTARTS, World, engine};
use crate::fleet::{EngineId, EngineState, FleetStage, Role};
use crate::plan::RestartWhen;
use crate::supervisor::state::{Action, Event};

fn suspect(world: &mut World, prefill: &str, decode: &str) {
    world.tell(Event::Suspected(EngineId::named(prefill), EngineId::named(decode)));
}

fn rounds(world: &World) -> usize {
    let is_round = |action: &&Action| matches!(action, Action::Verify { .. });
    world.log.iter().filter(is_round).count()
}

/// Whether the engine was drained, stopped and restarted by policy.
fn comes_back(world: &mut World, name: &str) {
    assert_eq!(world.state(name), EngineState::Draining);
    world.drain_and_end(name);
    assert_eq!(world.state(name), EngineState::Backoff);
    world.wait();
    world.healthy(name);
}

#[test]
fn an_engine_at_fault_is_drained_restarted_and_verified() {
    for wedged in ["prefiller2", "decoder2"] {
        let mut world = World::ready();
        suspect(&mut world, "prefiller2", "decoder2");
        world.verified_with_wedged(wedged);
        assert!(
            world.reason(wedged).starts_with("its hand-offs with"),
            "{}",
            world.reason(wedged)
        );
        comes_back(&mut world, wedged);
        world.verified(&Ok(()));
        assert_eq!(world.state(wedged), EngineState::Ready);
        assert_eq!(world.spawned().len(), 5, "{wedged} alone was started again");
        assert_eq!(world.reason(wedged), "");
    }
}

#[test]
fn a_restarted_engine_is_not_blamed_for_a_wedged_peer() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.healthy("decoder1");
    world.verified_with_wedged("prefiller2");
    assert_eq!(world.state("decoder1"), EngineState::Ready);
    comes_back(&mut world, "prefiller2");
    world.verified(&Ok(()));
    assert_eq!(world.state("prefiller2"), EngineState::Ready);
    assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 2);
}

#[test]
fn a_peer_that_works_with_a_third_engine_is_not_blamed_first() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.healthy("decoder1");
    let only_pair = |prefill: &str, decode: &str| match (prefill, decode) {
        ("prefiller2", "decoder1") => Err("no KV moved".to_owned()),
        _ => Ok(()),
    };
    world.verified_each(only_pair);
    assert_eq!(
        world.state("decoder1"),
        EngineState::Healthy,
        "the peer is tried with decoder2"
    );
    world.verified_each(only_pair);
    assert_eq!(world.state("decoder1"), EngineState::Backoff);
    assert_eq!(world.state("prefiller2"), EngineState::Ready);
    world.empty("decoder1");
    world.explained("decoder1", crate::supervisor::FailureCause::default());
    world.wait();
    world.healthy("decoder1");
    world.verified_each(only_pair);
    world.verified_each(only_pair);
    assert_eq!(world.state("decoder1"), EngineState::Ready, "the other end is next");
    assert_eq!(world.state("prefiller2"), EngineState::Draining);
}

#[test]
fn no_innocent_engine_is_given_up_for_a_peer_that_stays_wedged() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.healthy("decoder1");
    for _ in 0..MAX_RESTARTS {
        world.verified_with_wedged("prefiller2");
        if world.state("prefiller2") == EngineState::Draining {
            world.drain_and_end("prefiller2");
        } else {
            world.empty("prefiller2");
            world.explained("prefiller2", crate::supervisor::FailureCause::default());
        }
        world.wait();
        world.healthy("prefiller2");
    }
    world.verified_with_wedged("prefiller2");
    world.empty("prefiller2");
    world.explained("prefiller2", crate::supervisor::FailureCause::default());
    assert_eq!(world.state("prefiller2"), EngineState::Failed);
    for innocent in ["prefiller1", "decoder1", "decoder2"] {
        assert_eq!(world.state(innocent), EngineState::Ready, "{innocent}");
    }
    assert_eq!(world.stage(), FleetStage::Ready);
}

#[test]
fn one_prefill_and_one_decode_engine_are_restarted_in_turn() {
    let mut world = World::new(&[engine("prefiller1", &[0]), engine("decoder1", &[1])]);
    world.all_healthy();
    world.verified(&Ok(()));
    suspect(&mut world, "prefiller1", "decoder1");
    world.verified_with_wedged("decoder1");
    assert_eq!(world.state("decoder1"), EngineState::Ready);
    comes_back(&mut world, "prefiller1");
    world.verified_with_wedged("decoder1");
    assert_eq!(world.state("prefiller1"), EngineState::Healthy, "it waits for its peer");
    comes_back(&mut world, "decoder1");
    world.verified(&Ok(()));
    assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 1);
    assert_eq!(world.fleet.view(0).serving(Role::Prefill).count(), 1);
}

#[test]
fn checks_that_find_nothing_become_rare() {
    let mut world = World::ready();
    let before = rounds(&world);
    for minutes in [0, 1, 2, 4] {
        world.now += Duration::from_mins(minutes);
        suspect(&mut world, "prefiller1", "decoder1");
        assert!(world.verifying.is_some(), "after {minutes} minutes");
        world.verified(&Ok(()));
        suspect(&mut world, "prefiller1", "decoder1");
        assert!(world.verifying.is_none(), "not at once");
    }
    assert_eq!(rounds(&world) - before, 4);
    assert_eq!(world.spawned().len(), 4, "nobody was started again");
}

#[test]
fn no_check_runs_while_an_engine_restarts() {
    let mut world = World::ready();
    world.crash("decoder2");
    suspect(&mut world, "prefiller1", "decoder1");
    assert!(world.verifying.is_none());
}

#[test]
fn without_restarts_the_engine_at_fault_keeps_serving() {
    let mut world = World::ready_with_policy(RestartWhen::Never);
    suspect(&mut world, "prefiller2", "decoder2");
    world.verified_with_wedged("prefiller2");
    assert_eq!(world.state("prefiller2"), EngineState::Ready);
    assert!(
        world.reason("prefiller2").contains("decoder1 and decoder2"),
        "{}",
        world.reason("prefiller2")
    );
}
