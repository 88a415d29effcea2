//! Property test over random histories: in any order of events the invariants hold and the run ends.

use proptest::prelude::*;

use super::world::{MAX_RESTARTS, World, engine, exited};
use crate::fleet::{EngineId, EngineState, EngineVerb, FleetStage, Incarnation, Retry};
use crate::plan::EngineSpec;
use crate::supervisor::state::Event;
use crate::supervisor::{EndReason, FailureCause};

/// One step of a random history. The number picks an engine.
#[derive(Debug, Clone, Copy)]
enum Step {
    Announce(usize),
    Probe(usize),
    Exit(usize),
    Empty(usize),
    Stale(usize),
    Hung(usize),
    Explained(usize, Retry),
    Leave(usize, bool, bool),
    Verified(bool),
    Suspected(usize),
    Drained,
    Wait,
    Stop,
    Interrupt,
    Force,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4_usize).prop_map(Step::Announce),
        8 => (0..4_usize).prop_map(Step::Probe),
        2 => (0..4_usize).prop_map(Step::Exit),
        2 => (0..4_usize).prop_map(Step::Empty),
        1 => (0..4_usize).prop_map(Step::Stale),
        1 => (0..4_usize).prop_map(Step::Hung),
        4 => (0..4_usize, prop_oneof![4 => Just(Retry::Yes), 1 => Just(Retry::Once), 1 => Just(Retry::Never)])
            .prop_map(|(index, retry)| Step::Explained(index, retry)),
        2 => (0..4_usize, any::<bool>(), any::<bool>()).prop_map(|(index, again, force)| Step::Leave(index, again, force)),
        2 => proptest::bool::weighted(0.8).prop_map(Step::Verified),
        1 => (0..4_usize).prop_map(Step::Suspected),
        1 => Just(Step::Drained),
        1 => Just(Step::Wait),
        1 => Just(Step::Stop),
        1 => Just(Step::Interrupt),
        1 => Just(Step::Force),
    ]
}

/// Carries out the step, if the state of the processes allows it.
fn take(world: &mut World, ids: &[EngineId], step: Step) {
    let processes = |world: &World, index: usize| world.processes[&ids[index]];
    match step {
        Step::Announce(index) if processes(world, index).leader && !processes(world, index).announced => {
            world.announce(&ids[index]);
        }
        Step::Probe(index) if processes(world, index).leader && processes(world, index).announced => {
            world.tell(Event::Probed(ids[index].clone(), world.incarnation(&ids[index])));
        }
        Step::Exit(index) if processes(world, index).leader && processes(world, index).announced => {
            if !processes(world, index).terminated && !world.ending {
                world.unasked_exits += 1;
            }
            world.exit(ids[index].as_str());
        }
        Step::Empty(index) if processes(world, index).tree && !processes(world, index).leader => {
            world.empty(ids[index].as_str());
        }
        Step::Stale(index) => {
            let before = format!("{:?}", world.fleet.view(0));
            world.tell(exited(ids[index].clone(), Incarnation(0)));
            assert_eq!(format!("{:?}", world.fleet.view(0)), before);
        }
        Step::Verified(ok) if world.verifying.is_some() => {
            let result = if ok { Ok(()) } else { Err("no KV moved".to_owned()) };
            // This failure can be the one for which an engine is given up.
            world.unasked_exits += usize::from(!ok);
            world.verified(&result);
        }
        Step::Suspected(index) => {
            let id = |name: &str| EngineId::named(name);
            let decode = if index % 2 == 0 { id("decoder1") } else { id("decoder2") };
            world.tell(Event::Suspected(id("prefiller1"), decode));
        }
        Step::Drained if !world.awaiting_idle.is_empty() => {
            let of = world.awaiting_idle.remove(0);
            world.tell(Event::Drained(of));
        }
        Step::Hung(index) if processes(world, index).leader => {
            world.unasked_exits += 1;
            world.tell(Event::Hung(
                ids[index].clone(),
                world.incarnation(&ids[index]),
                "hung".to_owned(),
            ));
        }
        Step::Explained(index, retry) => {
            let cause = FailureCause {
                retry,
                ..FailureCause::default()
            };
            world.explained(ids[index].as_str(), cause);
        }
        Step::Leave(index, again, force) => {
            let verb = if again { EngineVerb::Restart } else { EngineVerb::Drain };
            if world.fleet.check_request(&ids[index], verb, force).is_ok() {
                *world.requests.entry(ids[index].clone()).or_default() += 1;
                let id = ids[index].clone();
                world.tell(Event::Requested(id, verb));
            }
        }
        Step::Wait => world.wait(),
        Step::Stop => drop(world.tell(Event::Stop)),
        Step::Interrupt => drop(world.tell(Event::Interrupt)),
        Step::Force => drop(world.tell(Event::Force)),
        Step::Announce(_)
        | Step::Probe(_)
        | Step::Exit(_)
        | Step::Empty(_)
        | Step::Hung(_)
        | Step::Verified(_)
        | Step::Drained => {}
    }
}

proptest! {
    /// The model asserts on every action: no engine has two incarnations at once, none is spawned after a stop began, no leader gets
    /// a second SIGTERM, and the shim ends only when no process is left.
    #[test]
    fn every_history_keeps_the_invariants_and_ends(
        steps in prop::collection::vec(step(), 0..120),
        shared_gpu in any::<bool>(),
    ) {
        let gpus: [&[u32]; 4] = if shared_gpu { [&[0], &[0], &[1], &[1]] } else { [&[0], &[1], &[2], &[3]] };
        let names = ["prefiller1", "prefiller2", "decoder1", "decoder2"];
        let engines: Vec<EngineSpec> = names.iter().zip(gpus).map(|(name, gpus)| engine(name, gpus)).collect();
        let ids: Vec<EngineId> = engines.iter().map(|engine| engine.id.clone()).collect();
        let mut world = World::new(&engines);
        for step in steps {
            if world.outcome.is_some() {
                break;
            }
            let before = world.fleet.view(0);
            take(&mut world, &ids, step);
            let view = world.fleet.view(0);
            for engine in &view.engines {
                // A serving engine has a leader, and a failed or stopped one accepts no request.
                let processes = world.processes[&engine.id];
                prop_assert!(!engine.state.serves() || processes.leader);
                prop_assert!(engine.state != EngineState::Failed || engine.load.is_closed());
                // Only a request restarts an engine that the policy gave up.
                let was_failed = before.engine(&engine.id).is_some_and(|was| was.state == EngineState::Failed);
                let may_revive = matches!(step, Step::Leave(index, true, _) if ids[index] == engine.id);
                prop_assert!(!was_failed || engine.state == EngineState::Failed || may_revive);
                // A request resets the count.
                let requests = world.requests.get(&engine.id).copied().unwrap_or(0);
                prop_assert!(processes.spawns <= 1 + requests + MAX_RESTARTS * (requests + 1), "{:?}", world.log);
                // The next incarnation gets its number before it starts, and can fail to start.
                prop_assert!([0, 1].contains(&(engine.incarnation.0 - processes.spawns)));
            }
        }
        if world.outcome.is_none() {
            world.tell(Event::Stop);
        }
        let outcome = world.play_out();
        let view = world.fleet.view(0);
        prop_assert_eq!(view.stage, FleetStage::Stopped);
        for engine in &view.engines {
            prop_assert!(matches!(engine.state, EngineState::Stopped | EngineState::Failed), "{:?}", engine);
            prop_assert!(engine.load.is_closed());
        }
        if matches!(
            outcome.reason,
            EndReason::EngineFailed { .. } | EndReason::LostRole { .. } | EndReason::CrashLoop { .. }
        ) {
            prop_assert!(world.unasked_exits > 0);
        }
    }
}
