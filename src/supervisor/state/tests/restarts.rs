//! Restarts and drains of single engines while the fleet serves.

use super::world::{BACKOFF, DRAIN, FIRST, MAX_RESTARTS, Processes, World, engine};
use super::{kill, terminate};
use crate::fleet::{EngineId, EngineState, EngineVerb, FleetStage, Incarnation, Retry, Role};
use crate::plan::RestartWhen;
use crate::report::ExitStatus;
use crate::supervisor::shim::protocol::LeftoverProcess;
use crate::supervisor::state::{Action, Event};
use crate::supervisor::{CanaryResult, EndReason, FailureCause, Refusal};

const SECOND: Incarnation = Incarnation(2);

fn id(name: &str) -> EngineId {
    EngineId::named(name)
}

fn cause(retry: Retry) -> FailureCause {
    FailureCause {
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

/// Crashes the engine, restarts it, and lets its canaries pass.
fn crash_and_return(world: &mut World, name: &str) {
    world.crash(name);
    world.wait();
    world.healthy(name);
    world.verified(&Ok(()));
    assert_eq!(world.state(name), EngineState::Ready);
}

#[test]
fn a_failed_engine_restarts_while_others_serve() {
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
    world.explained("decoder1", FailureCause::default());
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
fn no_restart_before_the_old_tree_is_empty() {
    let mut world = World::ready();
    world.exit("decoder1");
    world.now += BACKOFF * 2;
    world.tell(Event::Tick);
    assert!(!world.did(&Action::Spawn(id("decoder1"), SECOND)));
    world.empty("decoder1");
    assert!(!world.did(&Action::Spawn(id("decoder1"), SECOND)));
    world.explained("decoder1", FailureCause::default());
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn an_engine_with_unkillable_processes_is_not_restarted() {
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
        world.fleet.check_request(&id("decoder1"), EngineVerb::Restart, true),
        Err(Refusal::State(EngineState::Failed))
    );
    // Once its processes are gone after all, a request restarts it.
    world.empty("decoder1");
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn a_crash_loop_ends_the_run_with_the_last_engine_of_a_role() {
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
        matches!(outcome.reason, EndReason::CrashLoop { role: Role::Decode, .. }),
        "{outcome:?}"
    );
    assert_eq!(outcome.exit_status(), ExitStatus::CrashLoop);
    assert!(
        outcome.reason.to_string().contains("kept failing"),
        "{}",
        outcome.reason
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
fn a_fleet_that_died_verifies_its_restarted_engines() {
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
fn failed_canaries_fail_only_the_restarted_engine() {
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
fn a_result_of_an_older_round_is_ignored() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.healthy("decoder1");
    world.tell(Event::Verified(1, vec![CanaryResult::Worked]));
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
    assert!(matches!(outcome.reason, EndReason::LostRole { .. }), "{outcome:?}");
    assert!(outcome.reason.to_string().contains("no byte left"));
}

#[test]
fn a_race_is_retried_once_and_an_unknown_cause_by_policy() {
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
fn a_diagnosis_after_its_deadline_is_ignored() {
    let mut world = World::ready();
    world.exit("decoder1");
    world.empty("decoder1");
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
    world.healthy("decoder1");
    world.tell(Event::Diagnosed(id("decoder1"), FIRST, cause(Retry::Never)));
    world.tell(Event::Diagnosed(id("decoder1"), SECOND, cause(Retry::Never)));
    assert_eq!(world.state("decoder1"), EngineState::Healthy);
    // A stop of the run does not wait for the diagnosis either.
    world.exit("decoder2");
    world.empty("decoder2");
    world.tell(Event::Force);
    assert_eq!(world.state("decoder2"), EngineState::Failed);
    assert_eq!(world.play_out().exit_status(), ExitStatus::Forced);
}

#[test]
fn a_restart_that_is_not_healthy_in_time_is_repeated() {
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
fn a_stalled_restart_is_killed_and_repeated() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.announce(&id("decoder1"));
    world.tell(Event::StartupStalled(id("decoder1"), SECOND, "stalled".to_owned()));
    assert!(world.did(&kill("decoder1")));
    world.empty("decoder1");
    world.explained("decoder1", FailureCause::default());
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
fn restarts_on_one_gpu_run_in_sequence() {
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
fn a_requested_restart_is_no_failure() {
    let mut world = World::ready();
    for start in 1..=MAX_RESTARTS + 2 {
        world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
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
fn a_request_ends_a_backoff_and_restarts_a_failed_engine() {
    let mut world = World::ready();
    world.crash("decoder1");
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
    let mut world = World::ready_with_policy(RestartWhen::Never);
    world.crash("decoder1");
    assert_eq!(world.state("decoder1"), EngineState::Failed);
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn an_engine_drains_alone_to_its_deadline() {
    let mut world = World::ready();
    let start = world.now;
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Drain));
    world.wait();
    assert_eq!(world.now - start, DRAIN);
    assert!(world.load("decoder1").is_closed() && world.did(&terminate("decoder1")));
}

#[test]
fn a_drained_engine_stays_stopped_until_a_restart() {
    let mut world = World::ready();
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Drain));
    world.tell(Event::Drained(Some((id("decoder1"), FIRST))));
    world.crash("decoder1");
    assert_eq!(
        (world.state("decoder1"), world.stage()),
        (EngineState::Stopped, FleetStage::Ready)
    );
    assert_eq!(world.fleet.next_deadline(), None);
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
    assert!(world.did(&Action::Spawn(id("decoder1"), SECOND)));
}

#[test]
fn the_last_engine_of_a_role_drains_only_by_force() {
    let mut world = World::ready();
    let ask = |world: &World, name, force| world.fleet.check_request(&id(name), EngineVerb::Restart, force);
    assert_eq!(ask(&world, "decoder1", false), Ok(SECOND));
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
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
fn a_stop_of_the_run_includes_draining_and_restarting_engines() {
    let mut world = World::ready();
    world.crash("prefiller1");
    world.tell(Event::Requested(id("decoder1"), EngineVerb::Restart));
    world.tell(Event::Drained(Some((id("decoder1"), FIRST))));
    world.tell(Event::Requested(id("decoder2"), EngineVerb::Restart));
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
