//! The rules of engines that leave and come back while the fleet serves, by name.

use super::world::{BACKOFF, DRAIN, FIRST, MAX_RESTARTS, Processes, World, engine};
use super::{kill, terminate};
use crate::fleet::{EngineId, EngineState, FleetStage, Incarnation, Retry, Role};
use crate::plan::RestartWhen;
use crate::report::ExitStatus;
use crate::supervisor::shim::protocol::LeftoverProcess;
use crate::supervisor::state::{Action, Event, Goal};
use crate::supervisor::{Cause, Ending, Refusal, Trial};

const SECOND: Incarnation = Incarnation(2);

fn id(name: &str) -> EngineId {
    EngineId::named(name)
}

fn cause(retry: Retry) -> Cause {
    Cause {
        retry,
        found: Some("out of memory: no byte left".to_owned()),
        phase: None,
    }
}

/// The pairs of the newest round of canaries.
fn canaries(world: &World) -> Vec<String> {
    let rounds = world.log.iter().rev().find_map(|action| match action {
        Action::Verify { pairs, .. } => Some(pairs.iter().map(|(prefill, decode)| format!("{prefill}-{decode}"))),
        _ => None,
    });
    rounds.expect("a round").collect()
}

/// Crashes, comes back, and is proven.
fn crash_and_return(world: &mut World, name: &str) {
    world.crash(name);
    world.wait();
    world.healthy(name);
    world.verified(&Ok(()));
    assert_eq!(world.state(name), EngineState::Ready);
}

#[test]
fn an_engine_that_fails_comes_back_through_canaries_while_the_others_serve() {
    let mut world = World::ready();
    let old = world.load("decoder1");
    world.exit("decoder1");
    let start = world.now;
    let restart_at = |world: &World| world.fleet.view(0).engine(&id("decoder1")).unwrap().restart_at;
    assert_eq!(
        (world.state("decoder1"), restart_at(&world)),
        (EngineState::Backoff, None)
    );
    world.empty("decoder1");
    world.now += BACKOFF / 2;
    world.explained("decoder1", Cause::default());
    assert_eq!(
        restart_at(&world),
        Some(start + BACKOFF),
        "the look for its cause is part of the wait"
    );
    assert!(!world.did(&Action::Spawn(id("decoder1"), SECOND)));
    world.wait();
    assert_eq!(world.now - start, BACKOFF);
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
    assert!(
        old.is_closed() && !world.load("decoder1").is_closed(),
        "each incarnation has its own load"
    );
    world.healthy("decoder1");
    assert_eq!(canaries(&world), ["prefiller1-decoder1", "prefiller2-decoder1"]);
    assert_eq!(world.state("decoder1"), EngineState::Healthy);
    assert_eq!(
        (world.stage(), world.state("decoder2")),
        (FleetStage::Ready, EngineState::Ready)
    );
    world.verified(&Ok(()));
    assert_eq!(world.state("decoder1"), EngineState::Ready);
}

#[test]
fn nothing_starts_beside_what_an_earlier_incarnation_left() {
    let mut world = World::ready();
    world.exit("decoder1");
    world.now += BACKOFF * 2;
    world.tell(Event::Tick);
    assert!(!world.did(&Action::Spawn(id("decoder1"), SECOND)));
    world.empty("decoder1");
    assert!(!world.did(&Action::Spawn(id("decoder1"), SECOND)));
    world.explained("decoder1", Cause::default());
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn an_engine_whose_processes_cannot_be_ended_is_not_started_again() {
    let mut world = World::ready();
    world.exit("decoder1");
    let stuck = LeftoverProcess {
        pid: 7,
        name: "VLLM::Worker".to_owned(),
        state: 'D',
    };
    world.tell(Event::Leftover(Some(id("decoder1")), vec![stuck]));
    assert_eq!(world.state("decoder1"), EngineState::Failed);
    let reason = world
        .fleet
        .view(0)
        .engine(&id("decoder1"))
        .unwrap()
        .reason
        .clone()
        .unwrap();
    assert!(
        reason.contains("exited with code 0") && reason.contains("cannot be ended"),
        "{reason}"
    );
    assert_eq!(
        world.fleet.may_leave(&id("decoder1"), Goal::StartAgain, true),
        Err(Refusal::State(EngineState::Failed))
    );
    // Once it is gone after all, a request brings it back.
    world.empty("decoder1");
    world.tell(Event::Restart(id("decoder1")));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn a_crash_loop_leaves_one_engine_failed_and_ends_the_run_with_the_last_of_its_role() {
    let mut world = World::ready();
    for name in ["decoder1", "decoder2"] {
        assert_eq!(world.stage(), FleetStage::Ready);
        for _ in 0..MAX_RESTARTS {
            crash_and_return(&mut world, name);
        }
        world.crash(name);
        assert_eq!(world.state(name), EngineState::Failed);
    }
    let outcome = world.play_out();
    assert!(
        matches!(outcome.ending, Ending::CrashLoop { role: Role::Decode, .. }),
        "{outcome:?}"
    );
    assert_eq!(outcome.exit_status(), ExitStatus::CrashLoop);
    assert!(
        outcome.ending.to_string().contains("kept failing"),
        "{}",
        outcome.ending
    );
}

#[test]
fn a_role_that_is_coming_back_is_not_lost() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.crash("decoder2");
    assert_eq!(world.stage(), FleetStage::Ready);
    assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 0);
    world.wait();
    world.healthy("decoder1");
    world.verified(&Ok(()));
    assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 1);
}

#[test]
fn a_whole_fleet_that_died_proves_itself_among_those_that_come_back() {
    let mut world = World::ready();
    let names = ["prefiller1", "prefiller2", "decoder1", "decoder2"];
    for name in names {
        world.crash(name);
    }
    world.wait();
    world.healthy("decoder1");
    assert_eq!(world.verifying, None, "there is nobody to try it with");
    world.healthy("prefiller1");
    assert_eq!(canaries(&world), ["prefiller1-decoder1"]);
    world.verified(&Ok(()));
    assert_eq!(
        [world.state("prefiller1"), world.state("decoder1")],
        [EngineState::Ready; 2]
    );
    world.healthy("decoder2");
    world.healthy("prefiller2");
    assert_eq!(canaries(&world), ["prefiller1-decoder2"], "one round at a time");
    world.verified(&Ok(()));
    assert_eq!(canaries(&world), ["prefiller2-decoder1", "prefiller2-decoder2"]);
    world.verified(&Ok(()));
    assert!(names.iter().all(|name| world.state(name) == EngineState::Ready));
}

#[test]
fn canaries_that_fail_or_never_answer_fail_the_engine_that_came_back_and_no_other() {
    for answer in [Some("no KV moved".to_owned()), None] {
        let mut world = World::ready();
        world.crash("prefiller1");
        world.wait();
        world.healthy("prefiller1");
        match answer {
            Some(reason) => world.verified(&Err(reason)),
            None => world.wait(),
        }
        assert_eq!(world.state("prefiller1"), EngineState::Backoff);
        assert!(world.did(&kill("prefiller1")));
        assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 2);
        assert_eq!(world.stage(), FleetStage::Ready);
    }
}

#[test]
fn an_engine_is_not_blamed_for_the_peer_that_died_during_its_canaries() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.healthy("decoder1");
    world.crash("prefiller2");
    world.verified(&Err("prefiller2 is gone".to_owned()));
    assert_eq!(world.state("decoder1"), EngineState::Healthy);
    assert_eq!(
        canaries(&world),
        ["prefiller1-decoder1"],
        "it is tried again with who is left"
    );
    world.verified(&Ok(()));
    assert_eq!(world.state("decoder1"), EngineState::Ready);
}

#[test]
fn an_answer_of_an_older_round_is_dropped() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.healthy("decoder1");
    world.tell(Event::Verified(1, vec![Trial::Worked]));
    assert_eq!(world.state("decoder1"), EngineState::Healthy);
}

#[test]
fn a_cause_that_would_come_again_is_not_retried() {
    let mut world = World::ready();
    world.crash_of("decoder1", cause(Retry::Never));
    assert_eq!(
        (world.state("decoder1"), world.stage()),
        (EngineState::Failed, FleetStage::Ready)
    );
    let reason = world.reason("decoder1");
    assert!(
        reason.starts_with("exited with code 0 unasked; see its log `decoder1.log`: out of memory: no byte left")
            && reason.ends_with("it is not started again"),
        "{reason}"
    );
    world.crash_of("decoder2", cause(Retry::Never));
    let outcome = world.play_out();
    assert!(matches!(outcome.ending, Ending::LostRole { .. }), "{outcome:?}");
    assert!(outcome.ending.to_string().contains("no byte left"));
}

#[test]
fn a_lost_race_is_retried_once_and_an_unknown_cause_as_often_as_the_policy_says() {
    let mut world = World::ready();
    world.crash_of("decoder1", cause(Retry::Once));
    assert_eq!(world.state("decoder1"), EngineState::Backoff);
    world.wait();
    world.announce(&id("decoder1"));
    world.crash_of("decoder1", cause(Retry::Once));
    assert_eq!(world.state("decoder1"), EngineState::Failed);
    assert!(
        world.reason("decoder1").contains("kept failing"),
        "{}",
        world.reason("decoder1")
    );
    for _ in 0..MAX_RESTARTS {
        world.crash("decoder2");
        assert_eq!(world.state("decoder2"), EngineState::Backoff);
        world.wait();
        world.announce(&id("decoder2"));
    }
}

#[test]
fn an_answer_about_the_cause_that_comes_too_late_changes_nothing() {
    let mut world = World::ready();
    world.exit("decoder1");
    world.empty("decoder1");
    world.tell(Event::Restart(id("decoder1")));
    world.healthy("decoder1");
    world.tell(Event::Explained(id("decoder1"), FIRST, cause(Retry::Never)));
    world.tell(Event::Explained(id("decoder1"), SECOND, cause(Retry::Never)));
    assert_eq!(world.state("decoder1"), EngineState::Healthy);
    // A stop of the run does not wait for it either.
    world.exit("decoder2");
    world.empty("decoder2");
    world.tell(Event::Force);
    assert_eq!(world.state("decoder2"), EngineState::Failed);
    assert_eq!(world.play_out().exit_status(), ExitStatus::Forced);
}

#[test]
fn a_restarted_engine_that_is_not_healthy_in_time_is_tried_again_without_ending_the_run() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.announce(&id("decoder1"));
    world.wait();
    assert_eq!(
        (world.state("decoder1"), world.stage()),
        (EngineState::Backoff, FleetStage::Ready)
    );
    assert!(world.did(&kill("decoder1")));
}

#[test]
fn a_restart_that_stands_still_is_killed_and_tried_again() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.announce(&id("decoder1"));
    world.tell(Event::StoodStill(id("decoder1"), SECOND, "stands still".to_owned()));
    assert!(world.did(&kill("decoder1")));
    world.empty("decoder1");
    world.explained("decoder1", Cause::default());
    world.wait();
    assert!(world.did(&Action::Spawn(id("decoder1"), Incarnation(3))));
}

#[test]
fn a_hung_engine_is_killed_and_started_again() {
    let mut world = World::ready();
    world.tell(Event::Hung(id("decoder1"), FIRST, "hung: no token".to_owned()));
    assert_eq!(world.state("decoder1"), EngineState::Backoff);
    assert!(world.did(&kill("decoder1")) && world.load("decoder1").is_closed());
    world.tell(Event::Hung(id("decoder2"), SECOND, "hung: no token".to_owned()));
    assert_eq!(
        world.state("decoder2"),
        EngineState::Ready,
        "of no incarnation that is there"
    );
}

#[test]
fn restarts_on_one_gpu_come_one_after_the_other() {
    let mut world = World::new(&[
        engine("prefiller1", &[0]),
        engine("decoder1", &[1]),
        engine("decoder2", &[1]),
    ]);
    for name in ["prefiller1", "decoder1", "decoder2"] {
        world.healthy(name);
    }
    world.verified(&Ok(()));
    world.crash("decoder1");
    world.crash("decoder2");
    world.wait();
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
    assert!(!world.did(&Action::Spawn(id("decoder2"), SECOND)));
    world.healthy("decoder1");
    assert!(world.did(&Action::Spawn(id("decoder2"), SECOND)));
}

#[test]
fn a_restart_on_request_drains_stops_and_starts_without_counting_as_a_failure() {
    let mut world = World::ready();
    for start in 1..=MAX_RESTARTS + 2 {
        world.tell(Event::Restart(id("decoder1")));
        assert_eq!(world.state("decoder1"), EngineState::Draining);
        assert!(!world.load("decoder1").is_closed(), "requests in flight go on");
        world.tell(Event::Drained(Some((id("decoder1"), Incarnation(start)))));
        assert_eq!(world.state("decoder1"), EngineState::Stopping);
        assert!(world.did(&terminate("decoder1")));
        world.crash("decoder1");
        assert!(world.did(&Action::Spawn(id("decoder1"), Incarnation(start + 1))));
        world.healthy("decoder1");
        world.verified(&Ok(()));
        assert_eq!(
            (world.state("decoder1"), world.stage()),
            (EngineState::Ready, FleetStage::Ready)
        );
    }
}

#[test]
fn a_request_ends_the_wait_of_a_backoff_and_revives_what_was_given_up() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.tell(Event::Restart(id("decoder1")));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
    let mut world = World::ready_with_policy(RestartWhen::Never);
    world.crash("decoder1");
    assert_eq!(world.state("decoder1"), EngineState::Failed);
    world.tell(Event::Restart(id("decoder1")));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn an_engine_drains_alone_to_its_deadline() {
    let mut world = World::ready();
    let start = world.now;
    world.tell(Event::TakeOut(id("decoder1")));
    world.wait();
    assert_eq!(world.now - start, DRAIN);
    assert!(world.load("decoder1").is_closed() && world.did(&terminate("decoder1")));
}

#[test]
fn a_drained_engine_stays_stopped_until_it_is_asked_for() {
    let mut world = World::ready();
    world.tell(Event::TakeOut(id("decoder1")));
    world.tell(Event::Drained(Some((id("decoder1"), FIRST))));
    world.crash("decoder1");
    assert_eq!(
        (world.state("decoder1"), world.stage()),
        (EngineState::Stopped, FleetStage::Ready)
    );
    assert_eq!(world.fleet.next_deadline(), None);
    world.tell(Event::Restart(id("decoder1")));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn the_last_engine_that_serves_its_role_leaves_by_force_only() {
    let mut world = World::ready();
    let ask = |world: &World, name, force| world.fleet.may_leave(&id(name), Goal::StartAgain, force);
    assert_eq!(ask(&world, "decoder1", false), Ok(SECOND));
    world.tell(Event::Restart(id("decoder1")));
    assert_eq!(
        ask(&world, "decoder1", true),
        Err(Refusal::State(EngineState::Draining))
    );
    assert_eq!(ask(&world, "decoder2", false), Err(Refusal::LastOfRole(Role::Decode)));
    assert_eq!(ask(&world, "decoder2", true), Ok(SECOND));
    assert_eq!(ask(&world, "decoder3", true), Err(Refusal::UnknownEngine));
    world.tell(Event::Stop);
    assert_eq!(
        ask(&world, "prefiller1", true),
        Err(Refusal::FleetNotReady(FleetStage::Draining))
    );
}

#[test]
fn a_stop_of_the_run_takes_along_whoever_leaves_or_comes_back() {
    let mut world = World::ready();
    world.crash("prefiller1");
    world.tell(Event::Restart(id("decoder1")));
    world.tell(Event::Drained(Some((id("decoder1"), FIRST))));
    world.tell(Event::Restart(id("decoder2")));
    world.tell(Event::Stop);
    world.tell(Event::Drained(None));
    let outcome = world.play_out();
    assert_eq!(outcome.exit_status(), ExitStatus::Success);
    assert_eq!(
        world.processes[&id("decoder1")],
        Processes {
            announced: true,
            spawns: 1,
            ..Processes::default()
        }
    );
    assert_eq!(world.state("prefiller1"), EngineState::Failed);
    assert_eq!(world.state("decoder1"), EngineState::Stopped);
}
