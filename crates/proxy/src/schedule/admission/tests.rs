//! Tests of weights, of engines' limits, and of the queue: no waiter is lost, overtaken or starved.

use proptest::prelude::*;

use super::*;
use crate::body::media::condensed;
use xpyd_base::fleet::Role;

fn engine(index: usize, incarnation: u32) -> EngineView {
    EngineView {
        incarnation: Incarnation(incarnation),
        ..EngineView::fixture(Role::Decode, index)
    }
}

fn kv(kv: u64) -> Weight {
    Weight { kv, buffer: 0 }
}

fn ask(kind: GenerationKind, body: &str) -> (u64, bool, u64) {
    let document = Document::parse(body.as_bytes()).expect("an object");
    let prompt = condensed(document.given(kind.prompt_field()).unwrap_or_default());
    let demand = TokenDemand::of(kind, &document, &prompt);
    (demand.prompt, demand.exact, demand.answer)
}

#[test]
fn a_request_weighs_its_prompt_and_its_answer() {
    let completion = |body| ask(GenerationKind::Completions, body);
    assert_eq!(completion(r#"{"prompt":[1, 2,3]}"#), (3, true, 16));
    assert_eq!(completion(r#"{"prompt":"12345678","max_tokens":7}"#), (3, false, 7));
    assert_eq!(completion(r#"{"prompt":"","max_tokens":null}"#), (1, false, 16));
    assert_eq!(completion(r#"{"max_tokens":99999999999,"n":3}"#), (1, false, 3072));
    let chat = |body| ask(GenerationKind::Chat, body);
    assert_eq!(chat(r#"{"messages":[{"a":"b"}],"tools":[1,2,3]}"#), (5, false, 1024));
    assert_eq!(
        chat(r#"{"messages":[],"max_tokens":5,"max_completion_tokens":4}"#),
        (1, false, 4)
    );
    assert_eq!([0, 1, 256, 257].map(Weight::buffer_for), [0, 256, 256, 512]);
}

#[test]
fn capacity_is_the_users_else_the_engines_else_unlimited() {
    let fits = |given: Option<u64>, capacity: Option<u64>, more| {
        let mut tracker = LoadTracker::<()>::new(given, 0);
        let engine = engine(0, 1);
        if let Some(tokens) = capacity {
            tracker.set_capacity(&engine, tokens);
        }
        tracker.enter(&engine, kv(1), &[]);
        tracker.fits(&engine, kv(more))
    };
    assert!(fits(None, None, u64::MAX) && fits(Some(0), Some(10), u64::MAX));
    assert!(fits(None, Some(10), 9) && !fits(None, Some(10), 10));
    assert!(fits(Some(20), Some(10), 19) && !fits(Some(20), Some(10), 20));
}

#[test]
fn the_buffer_has_its_own_limit() {
    let mut tracker = LoadTracker::<()>::new(None, 512);
    let engine = engine(0, 1);
    let whole = Weight { kv: 300, buffer: 512 };
    tracker.enter(&engine, whole, &[]);
    assert!(!tracker.fits(&engine, Weight { kv: 1, buffer: 256 }));
    assert!(tracker.fits(&engine, kv(1)), "a request that no KV is pushed for");
    tracker.change(&engine, whole, kv(300));
    assert!(tracker.fits(&engine, whole));
}

#[test]
fn a_new_incarnation_starts_empty() {
    let mut tracker = LoadTracker::<()>::new(Some(10), 0);
    let (old, new) = (engine(0, 1), engine(0, 2));
    tracker.enter(&old, kv(9), &[1]);
    assert!(!tracker.fits(&old, kv(9)) && tracker.fits(&new, kv(9)));
    tracker.enter(&new, kv(4), &[]);
    assert_eq!(tracker.known_tokens(&new, &[1]), 0);
    tracker.change(&old, kv(9), Weight::default());
    assert_eq!((tracker.tokens(&old), tracker.tokens(&new)), (0, 4));
}

#[test]
fn clients_take_turns_and_one_client_is_served_in_order() {
    let mut queue = Queue::default();
    for (client, name) in [(1, "a1"), (1, "a2"), (1, "a3"), (2, "b1"), (3, "c1"), (2, "b2")] {
        queue.join(client, name);
    }
    let mut order = Vec::new();
    while let Some((number, name)) = queue.head().copied() {
        order.push(name);
        queue.serve(number, Instant::now());
    }
    assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
    assert_eq!(queue.len(), 0);
}

#[test]
fn retry_after_follows_the_queues_speed() {
    let mut queue = Queue::default();
    assert_eq!(queue.retry_after(), 1, "nothing is known");
    let start = Instant::now();
    for turn in 0..40 {
        queue.join(turn, ());
    }
    for turn in 0..38 {
        queue.serve(turn.into(), start + Duration::from_secs(2) * turn);
    }
    assert_eq!(queue.len(), 2);
    assert_eq!(queue.retry_after(), 6, "two before it, two seconds each");
    for turn in 0..100 {
        queue.join(turn, ());
    }
    assert_eq!(queue.retry_after(), 30);
}

/// A medium of any size has the same weight, and a prompt weighs at most the context length.
#[test]
fn media_have_a_bounded_weight() {
    let image = |bytes: usize| {
        let url = format!("data:image/png;base64,{}", "A".repeat(bytes));
        ask(
            GenerationKind::Chat,
            &format!(r#"{{"messages":[{{"content":[{{"image_url":{{"url":"{url}"}}}}]}}]}}"#),
        )
        .0
    };
    assert_eq!(image(1000), image(8 << 20));
    assert!((1000..2000).contains(&image(8 << 20)));
    let prompt = format!(r#"{{"prompt":"{}"}}"#, "a".repeat(400_000));
    let document = Document::parse(prompt.as_bytes()).expect("an object");
    let text = condensed(document.given("prompt").unwrap_or_default());
    let demand = TokenDemand::of(GenerationKind::Completions, &document, &text);
    assert!(demand.can_be_too_long());
    assert_eq!((demand.prompt, demand.within(4096).prompt), (100_001, 4096));
}

#[test]
fn a_deferred_waiter_lets_others_pass_until_its_patience_ends() {
    let (start, mut queue) = (Instant::now(), Queue::default());
    let after = |seconds| start + Duration::from_secs(seconds);
    queue.patience = Duration::from_secs(10);
    let numbers = [1, 2, 3].map(|client| queue.join(client, client));
    assert!(queue.can_try(Some(numbers[0]), start) && !queue.can_try(Some(numbers[1]), start));
    assert!(queue.defer(numbers[0], start) && !queue.defer(numbers[0], start));
    let can_try = |queue: &Queue<u64>, now| numbers.map(|number| queue.can_try(Some(number), now));
    assert_eq!(can_try(&queue, after(9)), [true, true, false]);
    assert_eq!(queue.wakers().collect::<Vec<_>>(), [&1, &2]);
    queue.serve(numbers[1], after(9));
    assert_eq!(can_try(&queue, after(10)), [true, false, false], "now it is its turn");
    assert!(!queue.can_try(None, after(10)));
    queue.serve(numbers[0], after(10));
    assert_eq!(can_try(&queue, after(10)), [false, false, true]);
    queue.leave(3, numbers[2]);
    assert_eq!((queue.len(), queue.can_try(None, after(11))), (0, true));
    // A deferred waiter that leaves is removed as well.
    let number = queue.join(4, 4);
    assert!(queue.defer(number, start) && queue.can_try(None, start));
    queue.leave(4, number);
    assert_eq!((queue.len(), queue.wakers().count()), (0, 0));
}

/// A request comes (client, weight), the oldest request on an engine ends, or a waiter leaves.
#[derive(Debug, Clone)]
enum Event {
    Comes(u64, u64),
    Ends(usize),
    Leaves(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => (0_u64..4, 1_u64..150).prop_map(|(client, weight)| Event::Comes(client, weight)),
        2 => (0_usize..2).prop_map(Event::Ends),
        1 => (0_usize..20).prop_map(Event::Leaves),
    ];
    proptest::collection::vec(event, 0..80)
}

/// A model of the scheduler: two engines with room for 100 tokens, whose leases and waiters it counts itself.
struct World {
    tracker: LoadTracker<u64>,
    engines: [EngineView; 2],
    inside: [VecDeque<u64>; 2],
    waiting: Vec<(u64, u64)>,
    served: Vec<(u64, u64)>,
}

impl World {
    fn new() -> Self {
        Self {
            tracker: LoadTracker::new(Some(100), 0),
            engines: [engine(0, 1), engine(1, 1)],
            inside: Default::default(),
            waiting: Vec::new(),
            served: Vec::new(),
        }
    }

    /// Gives a request of `weight` to the first engine that has room.
    fn lease(&mut self, weight: u64) -> bool {
        let place = (0..2).find(|place| self.tracker.fits(&self.engines[*place], kv(weight)));
        if let Some(place) = place {
            self.tracker.enter(&self.engines[place], kv(weight), &[]);
            self.inside[place].push_back(weight);
        }
        place.is_some()
    }

    fn settle(&mut self) {
        while let Some((number, weight)) = self.tracker.queue.head().copied() {
            if !self.lease(weight) {
                return;
            }
            let place = self.waiting.iter().position(|(_, waiter)| *waiter == number);
            self.served.push(self.waiting.remove(place.expect("it waits")));
            self.tracker.queue.serve(number, Instant::now());
        }
    }

    fn handle(&mut self, event: &Event) {
        match event {
            Event::Comes(client, weight) => {
                if !self.tracker.queue.can_try(None, Instant::now()) || !self.lease(*weight) {
                    let number = self.tracker.queue.join(*client, *weight);
                    self.waiting.push((*client, number));
                }
            }
            Event::Ends(place) => {
                if let Some(weight) = self.inside[*place].pop_front() {
                    self.tracker
                        .change(&self.engines[*place], kv(weight), Weight::default());
                }
            }
            Event::Leaves(place) => {
                if !self.waiting.is_empty() {
                    let (client, number) = self.waiting.remove(place % self.waiting.len());
                    self.tracker.queue.leave(client, number);
                }
            }
        }
        self.settle();
    }
}

proptest! {
    #[test]
    fn engines_are_never_overfilled_and_no_waiter_is_lost(events in events()) {
        let mut world = World::new();
        for event in &events {
            world.handle(event);
            prop_assert_eq!(world.tracker.queue.len(), world.waiting.len());
            for (inside, engine) in world.inside.iter().zip(&world.engines) {
                let used: u64 = inside.iter().sum();
                prop_assert_eq!(world.tracker.tokens(engine), used);
                prop_assert!(used <= 100 || inside.len() == 1, "{used} tokens of {}", inside.len());
            }
            let idle = world.inside.iter().any(VecDeque::is_empty);
            prop_assert!(world.waiting.is_empty() || !idle, "somebody waits for an empty engine");
        }
        // Every waiter gets a place once the others end.
        for _ in 0..events.len() {
            world.handle(&Event::Ends(0));
            world.handle(&Event::Ends(1));
        }
        prop_assert_eq!(world.waiting.len(), 0);
        prop_assert_eq!(world.tracker.queue.head(), None);
        for client in 0..4 {
            let own = world.served.iter().filter(|(key, _)| *key == client);
            prop_assert!(own.is_sorted(), "one client's requests overtook each other");
        }
    }
}
