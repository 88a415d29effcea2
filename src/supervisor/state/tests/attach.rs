//! Attach to kept engines, and leaving engines to a later xpyd.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::world::{BACKOFF, DRAIN, World};
use crate::fleet::{EngineId, EngineState, EngineVerb, Exit, FleetStage, Incarnation};
use crate::plan::RestartWhen;
use crate::report::ExitStatus;
use crate::supervisor::shim::protocol::KeptState;
use crate::supervisor::state::{Action, Event};
use crate::supervisor::{EndReason, FailureCause, Leftover};

fn id(name: &str) -> EngineId {
    EngineId::named(name)
}

const RUNS: KeptState = KeptState::Running {
    pid: 7,
    startup_finished: true,
};
const STARTS: KeptState = KeptState::Running {
    pid: 7,
    startup_finished: false,
};
const GONE: KeptState = KeptState::Gone {
    exit: Some(Exit::Code(1)),
};

#[test]
fn engines_that_serve_need_only_canaries() {
    let mut world = World::attached(&[("prefiller1", RUNS), ("decoder1", RUNS)]);
    assert_eq!(world.stage(), FleetStage::Verifying);
    assert!(!world.log.iter().any(|action| matches!(action, Action::Spawn(..))));
    world.verified(&Ok(()));
    assert_eq!(world.stage(), FleetStage::Ready);
    assert_eq!(world.fleet.view(0).engines[0].incarnation, Incarnation(3));
}

#[test]
fn an_attached_starting_engine_is_awaited() {
    let mut world = World::attached(&[("prefiller1", RUNS), ("decoder1", STARTS)]);
    assert_eq!(world.stage(), FleetStage::Starting);
    assert!(world.did(&Action::Probe(id("decoder1"), Incarnation(3))));
    world.tell(Event::Probed(id("decoder1"), Incarnation(3)));
    assert_eq!(world.stage(), FleetStage::Verifying);
}

#[test]
fn an_engine_that_ended_meanwhile_delays_no_other() {
    let mut world = World::attached(&[("prefiller1", RUNS), ("decoder1", RUNS), ("decoder2", GONE)]);
    world.explained("decoder2", FailureCause::default());
    assert_eq!(
        (world.stage(), world.state("decoder2")),
        (FleetStage::Verifying, EngineState::Backoff)
    );
    world.verified(&Ok(()));
    assert_eq!(world.stage(), FleetStage::Ready);
    world.wait();
    assert!(world.did(&Action::Spawn(id("decoder2"), Incarnation(4))));
}

#[test]
fn a_role_without_engines_is_awaited() {
    let mut world = World::attached(&[("prefiller1", RUNS), ("decoder1", GONE)]);
    world.explained("decoder1", FailureCause::default());
    assert_eq!(world.stage(), FleetStage::Starting);
    world.wait();
    assert!(world.did(&Action::Spawn(id("decoder1"), Incarnation(4))));
}

#[test]
fn a_stopping_engine_is_killed_before_its_restart() {
    let mut world = World::attached(&[
        ("prefiller1", RUNS),
        ("decoder1", RUNS),
        ("decoder2", KeptState::Leaving { exit: None }),
    ]);
    assert!(world.did(&Action::Kill(id("decoder2"))));
    world.now += BACKOFF * 2;
    world.tell(Event::Tick);
    assert!(!world.did(&Action::Spawn(id("decoder2"), Incarnation(4))));
    world.empty("decoder2");
    world.explained("decoder2", FailureCause::default());
    assert!(world.did(&Action::Spawn(id("decoder2"), Incarnation(4))));
}

#[test]
fn an_early_failure_does_not_end_an_attached_fleet() {
    let mut world = World::attached(&[("prefiller1", RUNS), ("decoder1", RUNS), ("decoder2", RUNS)]);
    world.tell(Event::Hung(id("decoder2"), Incarnation(3), "hung".to_owned()));
    assert_eq!(world.state("decoder2"), EngineState::Backoff);
    // Its canary fails as well, which is no evidence against the others.
    world.verified(&Err("no answer".to_owned()));
    assert_eq!(world.stage(), FleetStage::Verifying);
    world.verified(&Ok(()));
    assert_eq!(world.stage(), FleetStage::Ready);
}

#[test]
fn attach_keeps_working_engines_and_restarts_broken_ones() {
    for wedged in ["prefiller2", "decoder1"] {
        let names = ["prefiller1", "prefiller2", "decoder1", "decoder2"];
        let mut world = World::attached(&names.map(|name| (name, RUNS)));
        world.verified_with_wedged(wedged);
        assert_eq!(world.stage(), FleetStage::Ready, "{wedged}");
        for name in names {
            let expected = if name == wedged {
                EngineState::Backoff
            } else {
                EngineState::Ready
            };
            assert_eq!(world.state(name), expected, "{name} where {wedged} is wedged");
        }
        assert!(
            world.reason(wedged).contains("fail: no KV moved"),
            "{}",
            world.reason(wedged)
        );
    }
}

#[test]
fn a_silent_engine_delays_no_other_at_attach() {
    let names = ["prefiller1", "prefiller2", "decoder1", "decoder2"];
    let mut world = World::attached(&names.map(|name| (name, RUNS)));
    assert!(
        matches!(world.log.last(), Some(Action::Verify { at_once: true, .. })),
        "{:?}",
        world.log
    );
    world.worked("prefiller2", "decoder2");
    assert_eq!(world.stage(), FleetStage::Ready);
    world.worked("prefiller2", "decoder1");
    let serving = |world: &World| names.map(|name| world.state(name) == EngineState::Ready);
    assert_eq!(serving(&world), [false, true, true, true]);
    // Later the canaries of the first one fail. The other engines serve on.
    world.verified_with_wedged("prefiller1");
    assert_eq!(serving(&world), [false, true, true, true]);
    assert_eq!(world.state("prefiller1"), EngineState::Backoff);
}

#[test]
fn an_engine_that_ends_leaves_others_serving() {
    let names = ["prefiller1", "prefiller2", "decoder1"];
    for late in [Ok(()), Err("no answer".to_owned())] {
        let mut world = World::attached(&names.map(|name| (name, RUNS)));
        world.worked("prefiller1", "decoder1");
        world.tell(Event::Hung(id("prefiller2"), Incarnation(3), "hung".to_owned()));
        world.verified(&late);
        assert_eq!(world.stage(), FleetStage::Ready);
        assert_eq!(world.state("decoder1"), EngineState::Ready);
    }
}

#[test]
fn an_untried_engine_gets_the_next_round() {
    let names = ["prefiller1", "prefiller2", "decoder1"];
    let mut world = World::attached(&names.map(|name| (name, RUNS)));
    world.worked("prefiller1", "decoder1");
    world.wait();
    assert_eq!(world.stage(), FleetStage::Ready);
    let (_, pairs) = world.verifying.clone().expect("a round");
    assert_eq!(pairs, [(id("prefiller2"), id("decoder1"))]);
}

proptest! {
    /// In whatever order pairs work, two engines serve together only if their pair works, and in the end all serve.
    #[test]
    fn serving_engines_are_verified_with_each_other(
        order in Just([0_usize, 1, 2, 3, 4, 5]).prop_shuffle(),
        count in 0..=6_usize,
    ) {
        let (prefill, decode) = (["prefiller1", "prefiller2"], ["decoder1", "decoder2", "decoder3"]);
        let mut world = World::attached(&prefill.iter().chain(&decode).map(|name| (*name, RUNS)).collect::<Vec<_>>());
        let mut worked = BTreeSet::new();
        for pair in order.into_iter().take(count) {
            let pair = (prefill[pair / 3], decode[pair % 3]);
            world.worked(pair.0, pair.1);
            worked.insert(pair);
            let serving = |names: &[&'static str]| -> Vec<&'static str> {
                names.iter().copied().filter(|name| world.state(name) == EngineState::Ready).collect()
            };
            for one in serving(&prefill) {
                for other in serving(&decode) {
                    prop_assert!(worked.contains(&(one, other)), "{one} and {other} serve untried");
                }
            }
            prop_assert_eq!(world.stage(), FleetStage::Ready);
        }
        if count == 6 {
            prop_assert!(prefill.iter().chain(&decode).all(|name| world.state(name) == EngineState::Ready));
        }
    }
}

#[test]
fn a_pair_that_fails_alone_is_restarted_one_end_after_the_other() {
    let mut world = World::attached(&[("prefiller1", RUNS), ("decoder1", RUNS)]);
    for (restarted, kept) in [
        ("prefiller1", "decoder1"),
        ("decoder1", "prefiller1"),
        ("prefiller1", "decoder1"),
    ] {
        world.verified(&Err("wrong text".to_owned()));
        assert_eq!(world.state(restarted), EngineState::Backoff);
        assert_eq!(world.state(kept), EngineState::Healthy);
        world.empty(restarted);
        world.explained(restarted, FailureCause::default());
        world.wait();
        world.healthy(restarted);
    }
    world.verified(&Ok(()));
    assert_eq!(world.stage(), FleetStage::Ready);
}

#[test]
fn without_restarts_the_last_engine_of_a_role_ends_it() {
    let mut world = World::attached_with(RestartWhen::Never, &[("prefiller1", RUNS), ("decoder1", GONE)]);
    world.explained("decoder1", FailureCause::default());
    assert_eq!(world.stage(), FleetStage::Stopping);
    world.empty("prefiller1");
    world.tell(Event::ShimGone("shim is gone".to_owned()));
    world.tell(Event::Checked(Vec::<Leftover>::new()));
    let outcome = world.outcome.expect("an outcome");
    assert!(matches!(outcome.reason, EndReason::LostRole { .. }), "{outcome:?}");
}

#[test]
fn leaving_serves_accepted_clients_and_keeps_engines() {
    let mut world = World::ready();
    world.tell(Event::Leave);
    assert_eq!(world.stage(), FleetStage::Leaving);
    assert!(world.did(&Action::HandOver));
    assert_eq!(world.state("decoder1"), EngineState::Ready);
    world.tell(Event::Drained(None));
    assert!(world.did(&Action::Leave));
    let outcome = world.outcome.clone().expect("an outcome");
    assert_eq!(
        (outcome.reason.clone(), outcome.exit_status()),
        (EndReason::EnginesKept, ExitStatus::Success)
    );
    let touched = |action: &Action| matches!(action, Action::Terminate(_) | Action::Kill(_) | Action::Shutdown);
    assert!(!world.log.iter().any(touched), "{:?}", world.log);
}

#[test]
fn leaving_ends_at_the_drain_deadline() {
    let mut world = World::ready();
    world.tell(Event::Leave);
    let began = world.now;
    world.wait();
    assert_eq!(world.now - began, DRAIN);
    assert!(world.did(&Action::Leave));
}

#[test]
fn a_stop_while_leaving_stops_the_engines() {
    let mut world = World::ready();
    world.tell(Event::Leave);
    world.tell(Event::Stop);
    world.tell(Event::Drained(None));
    assert!(!world.did(&Action::Leave));
    assert_eq!(world.stage(), FleetStage::Stopping);
}

#[test]
fn a_drained_engine_stays_stopped_after_attach() {
    let leaving = KeptState::Leaving { exit: None };
    let kept = [
        ("prefiller1", RUNS),
        ("decoder1", RUNS),
        ("decoder2", GONE),
        ("decoder3", leaving),
    ];
    let stopped = ["decoder2", "decoder3"];
    let mut world = World::attached_after(RestartWhen::OnFailure, &kept, &stopped);
    world.verified(&Ok(()));
    assert_eq!(world.stage(), FleetStage::Ready);
    world.empty("decoder3");
    for name in stopped {
        assert_eq!(world.state(name), EngineState::Stopped, "{name}");
    }
    assert_eq!(world.fleet.stopped_on_request().len(), 2);
    assert_eq!(world.spawned().len(), 0);
    world.tell(Event::Requested(id("decoder2"), EngineVerb::Restart));
    assert_eq!(world.spawned(), ["decoder2"]);
    assert_eq!(world.fleet.stopped_on_request().len(), 1);
}
