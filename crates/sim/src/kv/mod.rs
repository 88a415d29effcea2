//! KV transfer between simulated engines: paged blocks, the parameters of a request, the connectors, and their sockets.

pub(super) mod blocks;
pub(super) mod connector;
pub(super) mod lmcache;
pub(super) mod lmcache_mp;
pub(super) mod messages;
pub(super) mod nixl;
pub(super) mod params;
pub(super) mod zmq;
