//! The proxy: in the test process over scripted engines, and as a program over simulated ones.

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

mod admission;
mod api_keys;
mod bodies;
mod browser_clients;
mod canary;
mod client_connections;
mod exact;
mod first_token;
mod handoff;
mod harness;
mod http1_client;
mod http_framing;
mod kv_cleanup;
mod limits;
mod lmcache;
mod metrics;
mod middleware;
mod observability;
mod overloaded_engines;
mod raw_client;
mod routing_policies;
mod sse_comments;
mod tls;
