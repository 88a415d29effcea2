//! A hash of any value, the same within one process only.

use std::hash::{DefaultHasher, Hash, Hasher};

/// A hash of any value.
pub(crate) fn hash_of(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
