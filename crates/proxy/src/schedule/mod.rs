//! Which engines get a request, and how long it waits for them.

pub(crate) mod admission;
pub(crate) mod breaker;
pub(crate) mod lease;
pub(crate) mod pairs;
pub(crate) mod pick;
pub(crate) mod prefix;
pub(crate) mod selection;
