//! Reads clients' bodies, with a size limit for each and a byte budget for all.
//!
//! A body occupies the budget from its first byte until nothing refers to it, clean-ups included. Copies for engines
//! do not count unless they outlive the body: a request has one at a time.

use std::error::Error;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Body as _;

use crate::error::ProxyError;
use xpyd_base::report::one_line;

/// How long a client has to send its body.
const READ_DEADLINE: Duration = Duration::from_mins(1);

/// How much of an unwanted body the proxy reads, for how long, and how long the client can pause.
const MAX_DRAINED_BYTES: usize = 1 << 30;
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
const DRAIN_PAUSE: Duration = Duration::from_secs(1);

/// Larger bodies count as large. A prompt of 128 Ki tokens has about 512 KiB.
const SMALL_BYTES: usize = 1 << 20;

/// The bodies of all requests in a proxy.
#[derive(Debug)]
pub(crate) struct BodyReader {
    budget: Mutex<Budget>,
    /// Maximum size of one body in bytes.
    limit: usize,
}

impl BodyReader {
    /// `limit`: maximum bytes of one body. `budget`: maximum bytes of all bodies, 0 for no limit.
    pub(crate) fn new(limit: usize, budget: u64) -> Self {
        let limit_of_all = match usize::try_from(budget) {
            Ok(0) | Err(_) => usize::MAX,
            Ok(limit) => limit,
        };
        let budget = Budget {
            limit: limit_of_all,
            small: 0,
            large: 0,
        };
        Self {
            limit: limit.min(budget.share()),
            budget: Mutex::new(budget),
        }
    }

    fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all bodies in memory now.
    pub(crate) fn held(&self) -> usize {
        self.budget().held()
    }

    /// Reads a body, which must be JSON unless it is empty.
    pub(crate) async fn read(self: &Arc<Self>, headers: &HeaderMap, mut body: Body) -> Result<Bytes, ProxyError> {
        let read = self.take(headers, &mut body).await;
        let is_unread = |error: &ProxyError| !matches!(error, ProxyError::Unread(_) | ProxyError::Malformed(_));
        if read.as_ref().is_err_and(is_unread) && !headers.contains_key(header::EXPECT) {
            drain(&mut body).await;
        }
        read
    }

    /// A body whose announced length is too large, or does not fit into the budget, is refused unread: hyper sends
    /// `100 Continue` only once the body is read.
    async fn take(self: &Arc<Self>, headers: &HeaderMap, body: &mut Body) -> Result<Bytes, ProxyError> {
        let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        self.check(announced)?;
        if self.budget().clone().resize(0, announced).is_err() {
            return Err(self.full());
        }
        if !body.is_end_stream() {
            check_kind(headers)?;
        }
        let mut held = HeldBody {
            bytes: Vec::new(),
            bodies: Arc::clone(self),
        };
        let read = tokio::time::timeout(READ_DEADLINE, held.fill(body)).await;
        read.map_err(|_| {
            let deadline = humantime::format_duration(READ_DEADLINE);
            ProxyError::Unread(format!("incomplete after {deadline}"))
        })??;
        Ok(self.as_utf8(Bytes::from_owner(held)))
    }

    /// JSON is UTF-8. Python, and so the engines, also read a byte order mark and UTF-16, which PowerShell writes.
    fn as_utf8(self: &Arc<Self>, body: Bytes) -> Bytes {
        let decode: fn([u8; 2]) -> u16 = match &body[..] {
            [0xef, 0xbb, 0xbf, ..] => return body.slice(3..),
            [0xff, 0xfe, ..] | [1..=255, 0, ..] => u16::from_le_bytes,
            [0xfe, 0xff, ..] | [0, 1..=255, ..] => u16::from_be_bytes,
            _ => return body,
        };
        let (units, rest) = body.as_chunks::<2>();
        let units: Vec<u16> = units.iter().map(|unit| decode(*unit)).collect();
        match String::from_utf16(&units) {
            Ok(text) if rest.is_empty() => self.hold(text.trim_start_matches('\u{feff}').into()),
            _ => body,
        }
    }

    /// Counts bytes that are made from a body and outlive it. They always fit, because their body did.
    pub(crate) fn hold(self: &Arc<Self>, bytes: Vec<u8>) -> Bytes {
        self.budget().add(bytes.len());
        Bytes::from_owner(HeldBody {
            bytes,
            bodies: Arc::clone(self),
        })
    }

    fn check(&self, length: usize) -> Result<(), ProxyError> {
        if length > self.limit {
            return Err(ProxyError::TooLarge { limit: self.limit });
        }
        Ok(())
    }

    fn full(&self) -> ProxyError {
        let limit = self.budget().limit;
        ProxyError::BodiesFull { limit }
    }
}

/// Checks that a body is JSON without a content encoding. Web pages can send other content types to any address
/// without a preflight, so engines refuse those too.
fn check_kind(headers: &HeaderMap) -> Result<(), ProxyError> {
    if let Some(encoding) = encoding(headers) {
        return Err(ProxyError::Encoded(encoding));
    }
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let kind = kind.and_then(|kind| kind.split(|byte| *byte == b';').next());
    if kind.is_some_and(|kind| kind.trim_ascii().eq_ignore_ascii_case(b"application/json")) {
        Ok(())
    } else {
        Err(ProxyError::NotJson)
    }
}

/// The content encoding of a body. `None` if it has none.
pub(crate) fn encoding(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(header::CONTENT_ENCODING).iter();
    let codings: Vec<_> = values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
    let codings = codings.join(", ");
    let is_none = |coding: &str| coding.is_empty() || coding.eq_ignore_ascii_case("identity");
    (!codings.split(',').map(str::trim).all(is_none)).then_some(codings)
}

/// Reads the rest of an unwanted body. Otherwise a client that still sends would see a broken connection instead of
/// its answer.
pub(crate) async fn drain(body: &mut Body) {
    let all = async {
        let mut bytes = 0;
        while bytes < MAX_DRAINED_BYTES
            && let Ok(Some(Ok(frame))) = tokio::time::timeout(DRAIN_PAUSE, body.frame()).await
        {
            bytes += frame.data_ref().map_or(0, Bytes::len);
        }
    };
    // The connection closes on whatever comes after that.
    drop(tokio::time::timeout(DRAIN_DEADLINE, all).await);
}

/// The error of a body that did not arrive. Broken chunk framing is the client's fault and would repeat, so it is not
/// a time-out.
fn unread(error: &(dyn Error + 'static)) -> ProxyError {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if let Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) = kind {
            return ProxyError::Malformed(error.to_string());
        }
        cause = error.source();
    }
    ProxyError::Unread(one_line(error))
}

/// A body and its share of the budget.
#[derive(Debug)]
struct HeldBody {
    bytes: Vec<u8>,
    bodies: Arc<BodyReader>,
}

impl HeldBody {
    /// Reads all of `body`. It copies the pieces, because a piece of one byte keeps the whole read buffer alive.
    async fn fill(&mut self, body: &mut Body) -> Result<(), ProxyError> {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| unread(&error))?;
            let Ok(piece) = frame.into_data() else {
                continue;
            };
            let (before, now) = (self.bytes.len(), self.bytes.len().saturating_add(piece.len()));
            self.bodies.check(now)?;
            if self.bodies.budget().resize(before, now).is_err() {
                return Err(self.bodies.full());
            }
            self.bytes.extend_from_slice(&piece);
        }
        Ok(())
    }
}

impl AsRef<[u8]> for HeldBody {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for HeldBody {
    fn drop(&mut self) {
        let freed = self.bodies.budget().resize(self.bytes.len(), 0);
        debug_assert!(freed.is_ok(), "a body that ends always fits");
    }
}

/// Bytes in memory. Small and large bodies are counted separately, and each kind gets at most three quarters of the
/// budget, so neither starves the other.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Budget {
    limit: usize,
    small: usize,
    large: usize,
}

/// The budget has no room.
#[derive(Debug, PartialEq, Eq)]
struct BudgetFull;

impl Budget {
    /// Maximum bytes of one kind of body.
    fn share(&self) -> usize {
        self.limit - self.limit / 4
    }

    fn held(&self) -> usize {
        self.small.saturating_add(self.large)
    }

    /// Changes the size of a body from `before` to `now` bytes. Shrinking always succeeds.
    fn resize(&mut self, before: usize, now: usize) -> Result<(), BudgetFull> {
        let mut next = self.clone();
        *next.kind(before) -= before;
        let kind = next.kind(now);
        *kind = kind.saturating_add(now);
        let in_kind = *kind;
        if now > before && (in_kind > self.share() || next.held() > self.limit) {
            return Err(BudgetFull);
        }
        *self = next;
        Ok(())
    }

    /// Adds a body, even beyond the limit.
    fn add(&mut self, length: usize) {
        let kind = self.kind(length);
        *kind = kind.saturating_add(length);
    }

    fn kind(&mut self, length: usize) -> &mut usize {
        if length <= SMALL_BYTES {
            &mut self.small
        } else {
            &mut self.large
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    fn budget(limit: usize) -> Budget {
        Budget {
            limit,
            small: 0,
            large: 0,
        }
    }

    #[test]
    fn small_and_large_bodies_do_not_starve_each_other() {
        for (greedy, modest) in [(MIB, 16 * MIB), (16 * MIB, MIB)] {
            let mut budget = budget(64 * MIB);
            let count = std::iter::from_fn(|| budget.resize(0, greedy).ok()).count();
            assert_eq!(count, 48 * MIB / greedy);
            assert_eq!(budget.resize(0, modest), Ok(()));
            assert_eq!(budget.resize(0, greedy), Err(BudgetFull));
            assert_eq!(budget.resize(greedy, 0), Ok(()));
            assert_eq!(budget.resize(0, greedy), Ok(()));
        }
    }

    #[test]
    fn a_body_that_grows_large_leaves_the_small_ones() {
        let mut budget = budget(8 * MIB);
        for size in 1..=6 {
            assert_eq!(budget.resize((size - 1) * MIB, size * MIB), Ok(()));
        }
        assert_eq!((budget.small, budget.large), (0, 6 * MIB));
        assert_eq!(budget.resize(6 * MIB, 7 * MIB), Err(BudgetFull));
        assert_eq!(budget.held(), 6 * MIB, "a refusal changes nothing");
    }

    #[test]
    fn copies_that_outlive_a_body_count() {
        let bodies = Arc::new(BodyReader::new(64, 40));
        let held = [bodies.hold(vec![0; 30]), bodies.hold(vec![0; 30])];
        let slice = held[0].slice(1..2);
        assert_eq!(bodies.held(), 60);
        drop(held);
        assert_eq!((bodies.held(), slice.len()), (30, 1));
        drop(slice);
        assert_eq!(bodies.held(), 0);
    }

    #[test]
    fn a_body_over_its_budget_share_is_too_large() {
        assert_eq!(BodyReader::new(64, 0).limit, 64);
        assert_eq!(BodyReader::new(64, 1000).limit, 64);
        assert_eq!(BodyReader::new(64, 40).limit, 30);
    }

    proptest! {
        #[test]
        fn the_budget_is_never_exceeded_and_empty_at_the_end(
            sizes in proptest::collection::vec((0_usize..8, 0_usize..3 * MIB), 0..60),
        ) {
            let mut budget = budget(6 * MIB);
            let mut bodies = [0_usize; 8];
            for (body, size) in sizes {
                let before = bodies[body];
                if budget.resize(before, size).is_ok() {
                    bodies[body] = size;
                } else {
                    prop_assert!(size > before);
                }
                prop_assert_eq!(budget.held(), bodies.iter().sum::<usize>());
            }
            for size in bodies {
                prop_assert_eq!(budget.resize(size, 0), Ok(()));
            }
            prop_assert_eq!(budget.held(), 0);
        }
    }

    #[test]
    fn only_real_encodings_are_named() {
        let of = |value: &str| {
            encoding(&HeaderMap::from_iter([(
                header::CONTENT_ENCODING,
                value.parse().expect("a value"),
            )]))
        };
        assert_eq!((of("identity"), of(""), of("Identity, identity")), (None, None, None));
        assert_eq!(
            (of("gzip"), of("identity, br")),
            (Some("gzip".into()), Some("identity, br".into()))
        );
    }
}
