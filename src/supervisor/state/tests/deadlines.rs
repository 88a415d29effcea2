//! Every wait of the fleet ends exactly when its deadline says, and not a moment before. Those of the drains and graces
//! stand by the rules that they belong to.

use super::*;

/// What happens until then is nothing that the test looks for.
const MOMENT: Duration = Duration::from_millis(1);

/// The next deadline is `after` from now: a tick just before it does nothing that `is_over` sees, and one at it does.
fn ends_after(world: &mut World, after: Duration, is_over: impl Fn(&World) -> bool) {
    assert_eq!(world.fleet.next_deadline(), Some(world.now + after));
    world.now += after.saturating_sub(MOMENT);
    world.tell(Event::Tick);
    assert!(!is_over(world), "over before its time");
    world.now += MOMENT;
    world.tell(Event::Tick);
    assert!(is_over(world), "not over at its time");
}

fn all_asked_to_leave() -> World {
    let mut world = World::ready();
    world.tell(Event::Stop);
    world.tell(Event::Drained(None));
    world
}

#[test]
fn a_start_has_its_ready_deadline() {
    let deadline = engine("decoder1", &[]).ready_deadline;
    ends_after(&mut World::two_by_two(), deadline, |world| world.ending);
}

#[test]
fn canaries_have_the_verify_deadline_for_each_pair() {
    let mut world = World::two_by_two();
    world.all_healthy();
    ends_after(&mut world, VERIFY * 4, |world| world.ending);
    let mut world = World::ready();
    world.crash("decoder1");
    world.wait();
    world.healthy("decoder1");
    ends_after(&mut world, VERIFY * 2, |world| {
        world.did(&kill("decoder1")) && world.state("decoder1") == EngineState::Backoff
    });
}

#[test]
fn the_fleet_drains_to_its_deadline() {
    let mut world = World::ready();
    world.tell(Event::Stop);
    ends_after(&mut world, DRAIN, |world| world.did(&terminate("prefiller1")));
}

#[test]
fn decode_engines_wait_their_turn() {
    ends_after(&mut all_asked_to_leave(), DECODE_TURN, |world| {
        world.did(&terminate("decoder1"))
    });
}

#[test]
fn the_rest_of_a_tree_has_the_grace_of_its_leader() {
    let mut world = all_asked_to_leave();
    world.exit("prefiller2");
    world.exit("prefiller1");
    let grace = engine("prefiller1", &[]).stop_grace;
    // Decode engines no longer wait for their turn.
    ends_after(&mut world, grace, |world| world.did(&kill("prefiller1")));
}

#[test]
fn the_shim_has_a_while_to_answer_a_kill() {
    let mut world = World::ready();
    world.tell(Event::Force);
    ends_after(&mut world, KILL_ANSWER, |world| world.did(&Action::Sweep));
    let mut world = World::ready();
    world.exit("decoder1");
    ends_after(&mut world, KILL_ANSWER, |world| world.did(&Action::Sweep));
}

#[test]
fn the_shim_has_a_while_to_end() {
    let mut world = World::ready();
    world.tell(Event::Force);
    for name in ["prefiller1", "prefiller2", "decoder1", "decoder2"] {
        world.exit(name);
        world.empty(name);
    }
    assert!(world.did(&Action::Shutdown));
    ends_after(&mut world, CLOSE_DEADLINE, |world| world.did(&Action::Sweep));
}

#[test]
fn the_look_for_a_cause_has_its_time_and_then_it_counts_as_unknown() {
    let mut world = World::ready();
    world.exit("decoder1");
    world.empty("decoder1");
    let restarts = |world: &World| world.did(&Action::Spawn(EngineId::named("decoder1"), Incarnation(2)));
    // The backoff is over by then.
    ends_after(&mut world, CAUSE_DEADLINE, restarts);
}
