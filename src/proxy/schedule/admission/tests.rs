//! What requests weigh; that engines are never overfilled; that nobody in the queue is lost, overtaken or starved.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::fleet::{Endpoint, EngineState, Load, Role};
use crate::proxy::body::media::condensed;

fn engine(index: usize, incarnation: u32) -> EngineView {
    EngineView {
        id: EngineId::new(Role::Decode, index),
        role: Role::Decode,
        incarnation: Incarnation(incarnation),
        state: EngineState::Ready,
        endpoint: Endpoint {
            host: "127.0.0.1".into(),
            port: 1,
            tensor_parallel: 1,
            receiver: None,
        },
        pid: None,
        reason: None,
        restart_at: None,
        load: Arc::new(Load::default()),
    }
}

fn kv(kv: u64) -> Weight {
    Weight { kv, buffer: 0 }
}

fn ask(kind: Kind, body: &str) -> (u64, bool, u64) {
    let document = Document::parse(body.as_bytes()).expect("an object");
    let prompt = condensed(document.given(kind.prompt_field()).unwrap_or_default());
    let ask = Ask::of(kind, &document, &prompt);
    (ask.prompt, ask.exact, ask.answer)
}

#[test]
fn a_request_weighs_its_prompt_and_the_answer_that_it_may_get() {
    let completion = |body| ask(Kind::Completions, body);
    assert_eq!(completion(r#"{"prompt":[1, 2,3]}"#), (3, true, 16));
    assert_eq!(completion(r#"{"prompt":"12345678","max_tokens":7}"#), (3, false, 7));
    assert_eq!(completion(r#"{"prompt":"","max_tokens":null}"#), (1, false, 16));
    assert_eq!(completion(r#"{"max_tokens":99999999999,"n":3}"#), (1, false, 3072));
    let chat = |body| ask(Kind::Chat, body);
    assert_eq!(chat(r#"{"messages":[{"a":"b"}],"tools":[1,2,3]}"#), (5, false, 1024));
    assert_eq!(
        chat(r#"{"messages":[],"max_tokens":5,"max_completion_tokens":4}"#),
        (1, false, 4)
    );
    assert_eq!([0, 1, 256, 257].map(Weight::buffer_for), [0, 256, 256, 512]);
}

#[test]
fn room_is_what_the_user_says_else_what_the_engine_says_else_without_end() {
    let fits = |given: Option<u64>, said: Option<u64>, more| {
        let mut book = Book::<()>::new(given, 0);
        let engine = engine(0, 1);
        if let Some(tokens) = said {
            book.said(&engine, tokens);
        }
        book.enter(&engine, kv(1), &[]);
        book.fits(&engine, kv(more))
    };
    assert!(fits(None, None, u64::MAX) && fits(Some(0), Some(10), u64::MAX));
    assert!(fits(None, Some(10), 9) && !fits(None, Some(10), 10));
    assert!(fits(Some(20), Some(10), 19) && !fits(Some(20), Some(10), 20));
}

#[test]
fn the_buffer_is_a_limit_of_its_own_until_the_kv_is_taken() {
    let mut book = Book::<()>::new(None, 512);
    let engine = engine(0, 1);
    let whole = Weight { kv: 300, buffer: 512 };
    book.enter(&engine, whole, &[]);
    assert!(!book.fits(&engine, Weight { kv: 1, buffer: 256 }));
    assert!(book.fits(&engine, kv(1)), "a request that no KV is pushed for");
    book.change(&engine, whole, kv(300));
    assert!(book.fits(&engine, whole));
}

#[test]
fn a_new_incarnation_is_empty_and_an_old_one_counts_nowhere() {
    let mut book = Book::<()>::new(Some(10), 0);
    let (old, new) = (engine(0, 1), engine(0, 2));
    book.enter(&old, kv(9), &[1]);
    assert!(!book.fits(&old, kv(9)) && book.fits(&new, kv(9)));
    book.enter(&new, kv(4), &[]);
    assert_eq!(book.known_tokens(&new, &[1]), 0);
    book.change(&old, kv(9), Weight::default());
    assert_eq!((book.tokens(&old), book.tokens(&new)), (0, 4));
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
fn clients_are_told_to_come_back_when_the_queue_will_have_moved() {
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

/// A medium of any size weighs the same, and no prompt more than the model reads.
#[test]
fn what_is_no_text_weighs_a_bounded_number_of_tokens() {
    let image = |bytes: usize| {
        let url = format!("data:image/png;base64,{}", "A".repeat(bytes));
        ask(
            Kind::Chat,
            &format!(r#"{{"messages":[{{"content":[{{"image_url":{{"url":"{url}"}}}}]}}]}}"#),
        )
        .0
    };
    assert_eq!(image(1000), image(8 << 20));
    assert!((1000..2000).contains(&image(8 << 20)));
    let prompt = format!(r#"{{"prompt":"{}"}}"#, "a".repeat(400_000));
    let document = Document::parse(prompt.as_bytes()).expect("an object");
    let text = condensed(document.given("prompt").unwrap_or_default());
    let ask = Ask::of(Kind::Completions, &document, &text);
    assert!(ask.may_be_too_long());
    assert_eq!((ask.prompt, ask.within(4096).prompt), (100_001, 4096));
}

#[test]
fn who_steps_aside_holds_nobody_up_for_a_while_and_is_served_then() {
    let (start, mut queue) = (Instant::now(), Queue::default());
    let after = |seconds| start + Duration::from_secs(seconds);
    queue.patience = Duration::from_secs(10);
    let numbers = [1, 2, 3].map(|client| queue.join(client, client));
    assert!(queue.may_try(Some(numbers[0]), start) && !queue.may_try(Some(numbers[1]), start));
    assert!(queue.step_aside(numbers[0], start) && !queue.step_aside(numbers[0], start));
    let may_try = |queue: &Queue<u64>, now| numbers.map(|number| queue.may_try(Some(number), now));
    assert_eq!(may_try(&queue, after(9)), [true, true, false]);
    assert_eq!(queue.wakers().collect::<Vec<_>>(), [&1, &2]);
    queue.serve(numbers[1], after(9));
    assert_eq!(may_try(&queue, after(10)), [true, false, false], "now it is its turn");
    assert!(!queue.may_try(None, after(10)));
    queue.serve(numbers[0], after(10));
    assert_eq!(may_try(&queue, after(10)), [false, false, true]);
    queue.leave(3, numbers[2]);
    assert_eq!((queue.len(), queue.may_try(None, after(11))), (0, true));
    // Who leaves from there is forgotten, too.
    let number = queue.join(4, 4);
    assert!(queue.step_aside(number, start) && queue.may_try(None, start));
    queue.leave(4, number);
    assert_eq!((queue.len(), queue.wakers().count()), (0, 0));
}

/// What may happen: a request comes (client, weight), the longest running one on an engine ends, a waiter leaves.
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

/// A model of the shell: two engines with room for 100 tokens, whose seats and waiters it counts by itself.
struct World {
    book: Book<u64>,
    engines: [EngineView; 2],
    inside: [VecDeque<u64>; 2],
    waiting: Vec<(u64, u64)>,
    served: Vec<(u64, u64)>,
}

impl World {
    fn new() -> Self {
        Self {
            book: Book::new(Some(100), 0),
            engines: [engine(0, 1), engine(1, 1)],
            inside: Default::default(),
            waiting: Vec::new(),
            served: Vec::new(),
        }
    }

    /// A request of `weight` goes to the first engine that has room.
    fn seat(&mut self, weight: u64) -> bool {
        let place = (0..2).find(|place| self.book.fits(&self.engines[*place], kv(weight)));
        if let Some(place) = place {
            self.book.enter(&self.engines[place], kv(weight), &[]);
            self.inside[place].push_back(weight);
        }
        place.is_some()
    }

    fn settle(&mut self) {
        while let Some((number, weight)) = self.book.queue.head().copied() {
            if !self.seat(weight) {
                return;
            }
            let place = self.waiting.iter().position(|(_, waiter)| *waiter == number);
            self.served.push(self.waiting.remove(place.expect("it waits")));
            self.book.queue.serve(number, Instant::now());
        }
    }

    fn handle(&mut self, event: &Event) {
        match event {
            Event::Comes(client, weight) => {
                if !self.book.queue.may_try(None, Instant::now()) || !self.seat(*weight) {
                    let number = self.book.queue.join(*client, *weight);
                    self.waiting.push((*client, number));
                }
            }
            Event::Ends(place) => {
                if let Some(weight) = self.inside[*place].pop_front() {
                    self.book.change(&self.engines[*place], kv(weight), Weight::default());
                }
            }
            Event::Leaves(place) => {
                if !self.waiting.is_empty() {
                    let (client, number) = self.waiting.remove(place % self.waiting.len());
                    self.book.queue.leave(client, number);
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
            prop_assert_eq!(world.book.queue.len(), world.waiting.len());
            for (inside, engine) in world.inside.iter().zip(&world.engines) {
                let used: u64 = inside.iter().sum();
                prop_assert_eq!(world.book.tokens(engine), used);
                prop_assert!(used <= 100 || inside.len() == 1, "{used} tokens of {}", inside.len());
            }
            let idle = world.inside.iter().any(VecDeque::is_empty);
            prop_assert!(world.waiting.is_empty() || !idle, "somebody waits for an empty engine");
        }
        // Whatever waited gets a seat once the others end.
        for _ in 0..events.len() {
            world.handle(&Event::Ends(0));
            world.handle(&Event::Ends(1));
        }
        prop_assert_eq!(world.waiting.len(), 0);
        prop_assert_eq!(world.book.queue.head(), None);
        for client in 0..4 {
            let own = world.served.iter().filter(|(key, _)| *key == client);
            prop_assert!(own.is_sorted(), "one client's requests overtook each other");
        }
    }
}
