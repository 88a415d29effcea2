//! Everything that clients connect to: connections, TLS, middleware, and routes with their handlers.

pub(crate) mod auth;
pub(crate) mod connections;
pub(crate) mod cors;
pub(crate) mod engine_status;
pub(crate) mod handlers;
pub(crate) mod listen;
pub(crate) mod middleware;
pub(crate) mod respond;
pub(crate) mod route_table;
pub(crate) mod strict_heads;
pub(crate) mod tls;
