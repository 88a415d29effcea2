//! Pushes of prompts that begin alike into one decode engine's buffer, which LMCache shares between them.
//!
//! A page counts as there from its allocation, before its bytes have landed, and a second push of the same beginning takes
//! it for sent (LMCache 0.5.6, `pd_backend_async.py`). So a decode leg must not begin while another push of its beginning
//! is half-way; and where one ends there, because its prefill engine died, whatever shared its pages has to begin anew,
//! after all of them are gone. Otherwise a client gets another text without any error.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::fleet::{EngineId, EngineView, Incarnation};
use crate::proxy::prefix::hash_of;

/// Bytes of a prompt's JSON that are compared. LMCache shares whole chunks of 256 tokens, or whole prompts.
const BEGINNING: usize = 128;

/// One incarnation of a decode engine, and how a prompt begins.
type Key = (EngineId, Incarnation, u64);

/// All pushes whose KV is not yet out of its decode engine's buffer. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(in crate::proxy) struct Pushes(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    slots: HashMap<Key, Slot>,
    next: u64,
}

/// The pushes of one beginning.
#[derive(Debug, Default)]
struct Slot {
    /// By number; whether its bytes have landed.
    pushes: BTreeMap<u64, bool>,
    /// One has ended half-way. What is here now may have shared its pages.
    is_tainted: bool,
    /// Told of every change.
    changed: watch::Sender<()>,
}

impl Slot {
    fn is_half_way(&self) -> bool {
        self.pushes.values().any(|landed| !landed)
    }
}

/// KV of another request has got mixed with this one's, or may have.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::proxy) struct Mixed;

/// The hash of how a prompt begins.
pub(in crate::proxy) fn beginning_of(model: Option<&str>, prompt: &str) -> u64 {
    let bytes = prompt.as_bytes();
    hash_of((model, &bytes[..bytes.len().min(BEGINNING)]))
}

impl Pushes {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A push begins, as soon as nothing is left that could spoil it. The caller bounds the wait.
    pub(in crate::proxy) async fn enter(&self, decode: &EngineView, beginning: u64) -> Push {
        let key = (decode.id.clone(), decode.incarnation, beginning);
        loop {
            let mut changed = {
                let mut table = self.lock();
                let number = table.next;
                table.next += 1;
                let slot = table.slots.entry(key.clone()).or_default();
                if !slot.is_tainted {
                    slot.pushes.insert(number, false);
                    let pushes = self.clone();
                    return Push { pushes, key, number };
                }
                slot.changed.subscribe()
            };
            // An error says that the slot has gone, which is what was waited for.
            let _ = changed.changed().await;
        }
    }

    /// Waits until no push of this beginning is half-way, for a decode engine that is to answer alone: it would find those
    /// pages as well. The caller bounds the wait.
    pub(in crate::proxy) async fn quiet(&self, decode: &EngineView, beginning: u64) {
        let key = (decode.id.clone(), decode.incarnation, beginning);
        loop {
            let mut changed = match self.lock().slots.get(&key) {
                Some(slot) if slot.is_tainted || slot.is_half_way() => slot.changed.subscribe(),
                _ => return,
            };
            let _ = changed.changed().await;
        }
    }
}

/// One push, until its KV is out of the buffer.
#[derive(Debug)]
pub(in crate::proxy) struct Push {
    pushes: Pushes,
    key: Key,
    number: u64,
}

impl Push {
    fn change(&self, change: impl FnOnce(&mut Slot)) {
        let mut table = self.pushes.lock();
        let Some(slot) = table.slots.get_mut(&self.key) else {
            return;
        };
        change(slot);
        slot.changed.send_replace(());
        if slot.pushes.is_empty() {
            table.slots.remove(&self.key);
        }
    }

    /// Its bytes have landed, or none will come.
    pub(in crate::proxy) fn landed(&self) {
        self.change(|slot| {
            slot.pushes.insert(self.number, true);
        });
    }

    /// It has failed. Unless its bytes have landed, nothing that is here now may be decoded from.
    pub(in crate::proxy) fn failed(&self) {
        self.change(|slot| slot.is_tainted |= slot.pushes.get(&self.number) == Some(&false));
    }

    /// Waits until no other push is half-way. The caller bounds the wait.
    pub(in crate::proxy) async fn unmixed(&self) -> Result<(), Mixed> {
        loop {
            let mut changed = {
                let table = self.pushes.lock();
                let Some(slot) = table.slots.get(&self.key) else {
                    return Ok(());
                };
                if slot.is_tainted {
                    return Err(Mixed);
                }
                if !slot.is_half_way() {
                    return Ok(());
                }
                slot.changed.subscribe()
            };
            let _ = changed.changed().await;
        }
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        self.failed();
        self.change(|slot| {
            slot.pushes.remove(&self.number);
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio_test::task::spawn;
    use tokio_test::{assert_pending, assert_ready, assert_ready_eq};

    use super::*;
    use crate::fleet::{Endpoint, EngineState, Load, Role};

    fn engine(index: usize) -> EngineView {
        EngineView {
            id: EngineId::new(Role::Decode, index),
            role: Role::Decode,
            incarnation: Incarnation::FIRST,
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

    fn enter(pushes: &Pushes, index: usize, beginning: u64) -> Push {
        let engine = engine(index);
        let mut entering = spawn(pushes.enter(&engine, beginning));
        assert_ready!(entering.poll())
    }

    #[test]
    fn a_decode_leg_waits_while_another_push_of_its_beginning_is_half_way() {
        let pushes = Pushes::default();
        let (mine, other) = (enter(&pushes, 0, 7), enter(&pushes, 0, 7));
        let (elsewhere, unlike) = (enter(&pushes, 1, 7), enter(&pushes, 0, 8));
        mine.landed();
        let mut unmixed = spawn(mine.unmixed());
        assert_pending!(unmixed.poll());
        other.landed();
        assert!(unmixed.is_woken());
        assert_ready_eq!(unmixed.poll(), Ok(()));
        drop((elsewhere, unlike));
        assert_ready_eq!(spawn(mine.unmixed()).poll(), Ok(()));
    }

    #[test]
    fn what_shared_pages_with_a_push_that_died_begins_anew_after_all_are_gone() {
        let pushes = Pushes::default();
        let (mine, dying) = (enter(&pushes, 0, 7), enter(&pushes, 0, 7));
        mine.landed();
        dying.failed();
        assert_ready_eq!(spawn(mine.unmixed()).poll(), Err(Mixed));
        let engine = engine(0);
        let mut anew = spawn(pushes.enter(&engine, 7));
        let mut alone = spawn(pushes.quiet(&engine, 7));
        assert_pending!(anew.poll());
        assert_pending!(alone.poll());
        drop(dying);
        assert_pending!(anew.poll());
        drop(mine);
        assert_ready!(alone.poll());
        let again = assert_ready!(anew.poll());
        again.landed();
        assert_ready_eq!(spawn(again.unmixed()).poll(), Ok(()));
        drop(again);
        assert!(pushes.lock().slots.is_empty(), "nothing is kept of what has gone");
    }

    #[test]
    fn one_that_failed_after_its_bytes_had_landed_spoils_nothing() {
        let pushes = Pushes::default();
        let (mine, other) = (enter(&pushes, 0, 7), enter(&pushes, 0, 7));
        mine.landed();
        other.landed();
        other.failed();
        drop(other);
        assert_ready_eq!(spawn(mine.unmixed()).poll(), Ok(()));
    }

    #[test]
    fn prompts_are_told_apart_by_their_beginning_only() {
        let long = "x".repeat(BEGINNING);
        assert_eq!(
            beginning_of(None, &format!("{long}a")),
            beginning_of(None, &format!("{long}b"))
        );
        assert_ne!(beginning_of(None, "a"), beginning_of(None, "b"));
        assert_ne!(beginning_of(Some("m"), "a"), beginning_of(Some("n"), "a"));
    }
}
