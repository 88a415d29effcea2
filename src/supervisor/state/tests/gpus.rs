//! Engines on GPUs with known UUIDs: they start only when GPU memory is free, and others wait for theirs.

use super::world::{FIRST, World, engine};
use super::*;

/// An engine on GPUs with UUIDs.
fn on(name: &str, gpus: &[u32]) -> EngineSpec {
    let mut spec = engine(name, gpus);
    spec.gpu_uuids = gpus.iter().map(|gpu| format!("GPU-{gpu}")).collect();
    spec
}

fn prepared(name: &str, incarnation: Incarnation, result: Result<(), String>) -> Event {
    Event::Prepared(EngineId::named(name), incarnation, result)
}

fn waiting() -> World {
    World::new(&[on("prefiller1", &[0]), on("decoder1", &[1])])
}

fn running() -> World {
    let mut world = waiting();
    for name in ["prefiller1", "decoder1"] {
        world.tell(prepared(name, FIRST, Ok(())));
    }
    world.all_healthy();
    world.verified(&Ok(()));
    world
}

#[test]
fn an_engine_starts_when_its_gpu_memory_is_free() {
    let mut world = waiting();
    assert_eq!(world.spawned(), [""; 0]);
    assert!(world.did(&Action::Prepare(EngineId::named("decoder1"), FIRST)));
    world.tell(prepared("decoder1", FIRST, Ok(())));
    assert_eq!(world.spawned(), ["decoder1"]);
    world.tell(prepared("decoder1", FIRST, Ok(())));
    assert_eq!(world.spawned(), ["decoder1"], "once");
}

#[test]
fn held_gpu_memory_fails_the_start() {
    let mut world = waiting();
    world.tell(prepared(
        "decoder1",
        FIRST,
        Err("cannot start again: somebody".to_owned()),
    ));
    let outcome = world.play_out();
    assert_eq!(outcome.reason.to_string(), "decoder1 cannot start again: somebody");
}

#[test]
fn a_stop_ends_the_wait_for_gpu_memory() {
    for event in [Event::Stop, Event::Force] {
        let mut world = waiting();
        world.tell(prepared("prefiller1", FIRST, Ok(())));
        world.tell(event);
        assert!(
            !world.did(&terminate("decoder1")) && !world.did(&kill("decoder1")),
            "it has no process"
        );
        world.tell(prepared("decoder1", FIRST, Ok(())));
        assert_eq!(world.spawned(), ["prefiller1"]);
        world.play_out();
        assert_eq!(world.state("decoder1"), EngineState::Stopped);
    }
}

#[test]
fn a_restart_waits_for_gpu_memory_and_can_be_repeated() {
    let mut world = running();
    world.crash("decoder1");
    world.wait();
    let second = Incarnation(2);
    assert!(world.did(&Action::Prepare(EngineId::named("decoder1"), second)));
    assert_eq!(world.spawned().len(), 2);
    world.tell(Event::Requested(EngineId::named("decoder1"), EngineVerb::Restart));
    assert_eq!(world.incarnation(&EngineId::named("decoder1")), Incarnation(3));
    world.tell(prepared("decoder1", second, Ok(())));
    assert_eq!(world.spawned().len(), 2, "nobody waits for that one any more");
    world.tell(prepared(
        "decoder1",
        Incarnation(3),
        Err("cannot start again".to_owned()),
    ));
    assert_eq!(world.state("decoder1"), EngineState::Backoff);
}

#[test]
fn no_engine_starts_on_a_gpu_that_another_leaves() {
    let mut world = World::with_policy(
        &[
            engine("prefiller1", &[0]),
            engine("decoder1", &[1]),
            engine("decoder2", &[1]),
        ],
        RestartWhen::OnFailure,
    );
    for name in ["prefiller1", "decoder1", "decoder2"] {
        world.healthy(name);
    }
    world.verified(&Ok(()));
    world.crash("decoder1");
    world.exit("decoder2");
    world.wait();
    assert_eq!(world.spawned().len(), 3, "decoder2 still gives its memory back");
    world.empty("decoder2");
    assert_eq!(world.spawned().last(), Some(&"decoder1"));
}
