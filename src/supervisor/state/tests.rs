//! Tests of the state machines, a rule each.

mod attach;
mod blame;
mod deadlines;
mod gpus;
mod histories;
mod restarts;
mod world;

pub(in crate::supervisor) use self::world::engine;
use self::world::{DRAIN, FIRST, Processes, VERIFY, World, exited};
use std::time::Duration;

use super::engine::{DIAGNOSIS_DEADLINE, KILL_REPLY_DEADLINE, START_GRACE};
use super::fleet::{CLOSE_DEADLINE, DECODE_STOP_DELAY};
use super::{Action, Event};
use crate::fleet::{EngineId, EngineState, EngineVerb, FleetStage, Incarnation, Role};
use crate::plan::{EngineSpec, RestartWhen};
use crate::report::ExitStatus;
use crate::supervisor::shim::protocol::LeftoverProcess;
use crate::supervisor::{EndReason, Leftover, Outcome};

fn terminate(name: &str) -> Action {
    Action::Terminate(EngineId::named(name))
}

fn kill(name: &str) -> Action {
    Action::Kill(EngineId::named(name))
}

#[test]
fn engines_on_one_gpu_start_in_sequence() {
    let mut world = World::new(&[
        engine("prefiller1", &[0, 1]),
        engine("prefiller2", &[1]),
        engine("decoder1", &[1, 2]),
        engine("decoder2", &[3]),
    ]);
    assert_eq!(world.spawned(), ["prefiller1", "decoder2"]);
    world.tell(Event::Probed(EngineId::named("prefiller1"), FIRST));
    assert_eq!(world.spawned(), ["prefiller1", "decoder2", "prefiller2"]);
    world.tell(Event::Probed(EngineId::named("prefiller2"), FIRST));
    assert_eq!(world.spawned(), ["prefiller1", "decoder2", "prefiller2", "decoder1"]);
}

#[test]
fn ready_means_that_every_pair_was_verified() {
    let mut world = World::two_by_two();
    world.all_healthy();
    assert_eq!(world.stage(), FleetStage::Verifying);
    let pairs = world.log.iter().find_map(|action| match action {
        Action::Verify { pairs, .. } => Some(pairs.len()),
        _ => None,
    });
    assert_eq!(pairs, Some(4));
    assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 0);
    world.verified(&Ok(()));
    assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 2);
}

#[test]
fn an_exit_with_code_0_while_starting_fails_the_run_and_names_the_log() {
    let mut world = World::two_by_two();
    world.announce(&EngineId::named("decoder2"));
    world.exit("decoder2");
    assert!(
        world.did(&kill("decoder2")),
        "what the leader left behind is killed at once"
    );
    let outcome = world.play_out();
    assert_eq!(outcome.exit_status(), ExitStatus::EngineFailed);
    assert_eq!(
        outcome.reason.to_string(),
        "decoder2 exited with code 0 while starting; see its log `decoder2.log`"
    );
}

#[test]
fn a_program_that_cannot_be_started_fails_the_run() {
    let mut world = World::two_by_two();
    world
        .processes
        .insert(EngineId::named("decoder1"), Processes::default());
    let reason = "cannot start `vllm`: no such file".to_owned();
    world.tell(Event::SpawnFailed(EngineId::named("decoder1"), FIRST, reason));
    assert!(!world.did(&kill("decoder1")), "there is nothing to kill");
    assert_eq!(world.play_out().exit_status(), ExitStatus::EngineFailed);
}

#[test]
fn an_engine_that_is_not_healthy_in_time_ends_the_run() {
    let mut world = World::two_by_two();
    world.wait();
    let outcome = world.play_out();
    assert_eq!(outcome.exit_status(), ExitStatus::NotReady);
    assert!(matches!(outcome.reason, EndReason::NotReady { engine: Some(_), .. }));
}

#[test]
fn a_stalled_start_ends_the_run_as_not_ready() {
    let mut world = World::two_by_two();
    let decoder = EngineId::named("decoder1");
    world.announce(&decoder);
    world.tell(Event::StartupStalled(
        decoder.clone(),
        Incarnation(2),
        "stalled".to_owned(),
    ));
    assert_eq!(
        world.state("decoder1"),
        EngineState::Starting,
        "of no incarnation that is there"
    );
    world.tell(Event::StartupStalled(decoder, FIRST, "stalled".to_owned()));
    assert!(world.did(&kill("decoder1")));
    let outcome = world.play_out();
    assert_eq!(outcome.exit_status(), ExitStatus::NotReady);
    assert_eq!(outcome.reason.to_string(), "decoder1 stalled");
}

#[test]
fn an_engine_that_is_up_cannot_stall_its_start() {
    let mut world = World::ready();
    let reason = "stalled".to_owned();
    world.tell(Event::StartupStalled(EngineId::named("decoder1"), FIRST, reason));
    assert_eq!(world.state("decoder1"), EngineState::Ready);
}

#[test]
fn failed_canaries_end_the_run() {
    for answer in [Some(Err("decoder1 got other tokens".to_owned())), None] {
        let mut world = World::two_by_two();
        world.all_healthy();
        match answer {
            Some(result) => world.verified(&result),
            None => world.wait(),
        }
        let outcome = world.play_out();
        assert!(matches!(outcome.reason, EndReason::NotReady { engine: None, .. }));
        assert_eq!(outcome.exit_status(), ExitStatus::NotReady);
    }
}

#[test]
fn a_failed_engine_leaves_the_view_at_once() {
    let mut world = World::ready();
    world.exit("decoder1");
    assert_eq!(world.state("decoder1"), EngineState::Backoff);
    assert!(world.load("decoder1").is_closed());
    assert!(world.did(&kill("decoder1")));
    assert_eq!(world.stage(), FleetStage::Ready);
    assert!(!world.load("decoder2").is_closed());
    assert_eq!(world.fleet.view(0).serving(Role::Decode).count(), 1);
}

#[test]
fn losing_the_last_engine_of_a_role_ends_the_run() {
    let mut world = World::ready_with_policy(RestartWhen::Never);
    world.exit("prefiller1");
    world.exit("prefiller2");
    let outcome = world.play_out();
    assert!(matches!(
        outcome.reason,
        EndReason::LostRole {
            role: Role::Prefill,
            ..
        }
    ));
    assert_eq!(outcome.exit_status(), ExitStatus::Failure);
}

#[test]
fn a_stop_drains_then_stops_prefill_before_decode() {
    let mut world = World::ready();
    world.tell(Event::Stop);
    assert_eq!(world.stage(), FleetStage::Draining);
    assert!(!world.load("decoder1").is_closed(), "requests in flight go on");
    assert!(!world.did(&terminate("prefiller1")));
    world.tell(Event::Drained(None));
    assert!(world.did(&terminate("prefiller1")) && world.did(&terminate("prefiller2")));
    assert!(!world.did(&terminate("decoder1")));
    world.exit("prefiller1");
    assert!(!world.did(&terminate("decoder1")));
    world.exit("prefiller2");
    assert!(world.did(&terminate("decoder1")) && world.did(&terminate("decoder2")));
    assert_eq!(world.play_out().exit_status(), ExitStatus::Success);
}

#[test]
fn decode_engines_do_not_wait_long_for_slow_prefill_engines() {
    let mut world = World::ready();
    world.tell(Event::Stop);
    world.tell(Event::Drained(None));
    world.wait();
    assert!(world.did(&terminate("decoder1")));
    assert!(!world.did(&kill("prefiller1")));
}

#[test]
fn a_drain_ends_at_its_deadline() {
    let mut world = World::ready();
    let start = world.now;
    world.tell(Event::Stop);
    world.wait();
    assert_eq!(world.now - start, DRAIN);
    assert!(world.load("decoder1").is_closed());
    assert!(world.did(&terminate("prefiller1")));
}

#[test]
fn an_engine_that_ignores_sigterm_is_killed_after_its_grace() {
    let mut world = World::ready();
    world.tell(Event::Stop);
    world.tell(Event::Drained(None));
    let start = world.now;
    while !world.did(&kill("prefiller1")) {
        world.wait();
    }
    assert_eq!(world.now - start, Duration::from_secs(30));
}

#[test]
fn the_rest_of_a_tree_gets_the_leaders_remaining_grace() {
    let mut world = World::ready();
    world.tell(Event::Stop);
    world.tell(Event::Drained(None));
    let start = world.now;
    world.now += Duration::from_secs(7);
    world.exit("prefiller1");
    while !world.did(&kill("prefiller1")) {
        world.wait();
    }
    assert_eq!(world.now - start, engine("prefiller1", &[]).stop_grace);
}

#[test]
fn an_engine_that_is_still_starting_gets_a_short_grace() {
    let mut world = World::two_by_two();
    let start = world.now;
    world.tell(Event::Interrupt);
    assert!(world.did(&terminate("decoder1")));
    while !world.did(&kill("decoder1")) {
        world.wait();
    }
    assert_eq!(world.now - start, START_GRACE);
    assert_eq!(world.play_out().exit_status(), ExitStatus::Success);
}

#[test]
fn an_engine_that_was_never_started_is_stopped_without_a_process() {
    let mut world = World::new(&[engine("prefiller1", &[0]), engine("decoder1", &[0])]);
    world.tell(Event::Stop);
    assert_eq!(world.state("decoder1"), EngineState::Stopped);
    world.play_out();
    assert_eq!(world.spawned(), ["prefiller1"]);
}

#[test]
fn a_second_interrupt_kills_and_a_second_sigterm_does_not() {
    let mut world = World::ready();
    world.tell(Event::Stop);
    world.tell(Event::Stop);
    assert_eq!(world.stage(), FleetStage::Draining);
    world.tell(Event::Interrupt);
    for name in ["prefiller1", "prefiller2", "decoder1", "decoder2"] {
        assert!(world.did(&kill(name)), "{name}");
    }
    assert_eq!(world.play_out().exit_status(), ExitStatus::Forced);
}

#[test]
fn a_first_interrupt_in_a_failing_run_does_not_force_it() {
    let mut world = World::ready_with_policy(RestartWhen::Never);
    world.crash("prefiller1");
    world.crash("prefiller2");
    world.tell(Event::Interrupt);
    assert!(!world.did(&kill("decoder1")));
    world.tell(Event::Interrupt);
    assert!(world.did(&kill("decoder1")));
}

#[test]
fn events_of_an_older_incarnation_are_dropped() {
    let mut world = World::ready();
    world.tell(exited(EngineId::named("decoder1"), Incarnation(0)));
    world.tell(Event::TreeEmpty(EngineId::named("decoder1"), Incarnation(0)));
    assert_eq!(world.state("decoder1"), EngineState::Ready);
}

#[test]
fn a_lost_shim_ends_the_run_after_a_sweep() {
    let mut world = World::ready();
    world.tell(Event::ShimGone("shim is gone".to_owned()));
    assert!(world.did(&Action::Sweep));
    assert!(world.load("decoder1").is_closed());
    let outcome = world.play_out();
    assert_eq!(outcome.exit_status(), ExitStatus::Failure);
    assert!(matches!(outcome.reason, EndReason::SupervisionLost { .. }));
}

#[test]
fn a_shim_that_never_answers_a_kill_is_given_up() {
    let mut world = World::ready();
    world.tell(Event::Force);
    world.wait();
    assert!(world.did(&Action::Sweep));
}

#[test]
fn a_process_that_survives_sigkill_is_reported() {
    let mut world = World::ready();
    let stuck = LeftoverProcess {
        pid: 7,
        name: "VLLM::Worker".to_owned(),
        state: 'D',
    };
    world.tell(Event::Force);
    for name in ["prefiller1", "prefiller2", "decoder2"] {
        world.empty(name);
    }
    world
        .processes
        .insert(EngineId::named("decoder1"), Processes::default());
    world.tell(Event::Leftover(Some(EngineId::named("decoder1")), vec![stuck.clone()]));
    assert!(world.did(&Action::Shutdown));
    assert_eq!(world.fleet.leftovers(), [(Some(EngineId::named("decoder1")), stuck)]);
}

#[test]
fn leftovers_decide_the_exit_code() {
    let left = Leftover::Port {
        engine: EngineId::named("decoder1"),
        port: 7200,
        purpose: "http".to_owned(),
        holder: None,
    };
    for reason in [EndReason::Stopped, EndReason::Forced] {
        let outcome = Outcome {
            reason,
            left: vec![left.clone()],
            teardown: Duration::ZERO,
        };
        assert_eq!(outcome.exit_status(), ExitStatus::TeardownIncomplete);
    }
}
