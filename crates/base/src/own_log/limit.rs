//! The rate limit of log lines by kind. PURE.
//!
//! Each kind has a token bucket: a burst is written whole, a flood at a steady rate, and the rest is counted.

use std::collections::HashMap;
use std::hash::Hash;

use tokio::time::Instant;

/// The burst size, in lines of one kind. A large fleet logs one line per engine when it starts.
const BURST: u32 = 100;

/// The rate after the burst, in lines of one kind per second.
const PER_SECOND: u32 = 10;

/// The most kinds with a bucket of their own, more than the program has; the rest shares one.
const MOST_KINDS: usize = 512;

#[derive(Debug)]
pub(super) struct Limiter<Kind> {
    buckets: HashMap<Kind, Bucket>,
    /// The bucket of kinds beyond [`MOST_KINDS`].
    rest: Option<(Kind, Bucket)>,
}

#[derive(Debug)]
struct Bucket {
    room: u32,
    refilled: Instant,
    suppressed: u64,
}

impl<Kind> Default for Limiter<Kind> {
    fn default() -> Self {
        Self {
            buckets: HashMap::new(),
            rest: None,
        }
    }
}

impl<Kind: Clone + Eq + Hash> Limiter<Kind> {
    /// Whether a line of this kind can be written. Otherwise it is counted.
    pub(super) fn admits(&mut self, kind: &Kind, now: Instant) -> bool {
        let is_known = self.buckets.contains_key(kind);
        let bucket = if is_known || self.buckets.len() < MOST_KINDS {
            self.buckets.entry(kind.clone()).or_insert_with(|| Bucket::full(now))
        } else {
            &mut self.rest.get_or_insert_with(|| (kind.clone(), Bucket::full(now))).1
        };
        bucket.takes(now)
    }

    /// The suppressed lines by kind since the last call.
    pub(super) fn take_suppressed(&mut self) -> Vec<(Kind, u64)> {
        let rest = self.rest.iter_mut().map(|(kind, bucket)| (&*kind, bucket));
        self.buckets
            .iter_mut()
            .chain(rest)
            .filter(|(_, bucket)| bucket.suppressed > 0)
            .map(|(kind, bucket)| (kind.clone(), std::mem::take(&mut bucket.suppressed)))
            .collect()
    }
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self {
            room: BURST,
            refilled: now,
            suppressed: 0,
        }
    }

    fn takes(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.refilled).as_millis() * u128::from(PER_SECOND) / 1000;
        if gained > 0 {
            let gained = u32::try_from(gained).unwrap_or(u32::MAX);
            self.room = self.room.saturating_add(gained).min(BURST);
            self.refilled = now;
        }
        if self.room == 0 {
            self.suppressed += 1;
            return false;
        }
        self.room -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn bursts_pass_and_floods_are_counted_by_kind() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        let written = (0..1000).filter(|_| limiter.admits(&"flood", start)).count();
        assert_eq!(written, 100);
        assert!(limiter.admits(&"other", start), "one kind does not silence another");
        assert_eq!(limiter.take_suppressed(), [("flood", 900)]);
        assert_eq!(limiter.take_suppressed(), []);
        let later = start + Duration::from_secs(1);
        let written = (0..1000).filter(|_| limiter.admits(&"flood", later)).count();
        assert_eq!(written, 10);
    }

    #[test]
    fn kinds_without_end_share_one_bucket() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        let written = (0..10_000).filter(|kind| limiter.admits(kind, now)).count();
        assert_eq!(written, MOST_KINDS + BURST as usize);
        assert_eq!(limiter.buckets.len(), MOST_KINDS);
    }
}
