//! Every wait ends exactly at its deadline. Tests of drain deadlines and grace periods are beside their rules.

use super::*;

/// The smallest difference that the tests distinguish.
const MOMENT: Duration = Duration::from_millis(1);

/// Asserts that the next deadline is `after` from now, that a tick just before it changes nothing that `is_over` checks, and that
/// one at the deadline does.
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
fn decode_engines_stop_after_the_delay() {
    ends_after(&mut all_asked_to_leave(), DECODE_STOP_DELAY, |world| {
        world.did(&terminate("decoder1"))
    });
}

#[test]
fn the_rest_of_a_tree_has_the_grace_of_its_leader() {
    let mut world = all_asked_to_leave();
    world.exit("prefiller2");
    world.exit("prefiller1");
    let grace = engine("prefiller1", &[]).stop_grace;
    // The stop delay of decode engines is over.
    ends_after(&mut world, grace, |world| world.did(&kill("prefiller1")));
}

#[test]
fn the_reply_to_a_kill_has_a_deadline() {
    let mut world = World::ready();
    world.tell(Event::Force);
    ends_after(&mut world, KILL_REPLY_DEADLINE, |world| world.did(&Action::Sweep));
    let mut world = World::ready();
    world.exit("decoder1");
    ends_after(&mut world, KILL_REPLY_DEADLINE, |world| world.did(&Action::Sweep));
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
fn a_late_diagnosis_counts_as_unknown_cause() {
    let mut world = World::ready();
    world.exit("decoder1");
    world.empty("decoder1");
    let restarts = |world: &World| world.did(&Action::Spawn(EngineId::named("decoder1"), Incarnation(2)));
    // The backoff is over before.
    ends_after(&mut world, DIAGNOSIS_DEADLINE, restarts);
}
