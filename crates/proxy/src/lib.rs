//! The proxy: the OpenAI API over a fleet of prefill and decode engines.
//!
//! A completion walks down through the folders, and each folder imports only those below it:
//!
//! | Folder | What it holds |
//! |---|---|
//! | `server` | client connections, TLS, middleware, API keys, the route table and its handlers |
//! | `canary` | the test generation that proves a pair of engines before clients use it |
//! | `request` | one generation from its body to its answer: `flow` is the place to start |
//! | `transfer` | the KV of one hand-off, and its clean-up when the request ends early |
//! | `schedule` | which engines get a request, and how long it waits for them |
//! | `telemetry` | metrics, the record of each request, access log, traces |
//! | `upstream` | calls to engines and their headers |
//! | `body` | what JSON bodies and event streams hold, and the rule of each field |
//!
//! All folders use `error`, `overload`, `hash`, and the state in `shared`. The proxy learns of engines only from the fleet's
//! view. It does not know who starts them, from which profile, or with which arguments.

mod body;
mod canary;
mod error;
mod hash;
#[cfg(test)]
mod matrix;
mod overload;
mod request;
mod schedule;
mod server;
mod settings;
mod shared;
mod telemetry;
mod transfer;
mod upstream;

use shared::Shared;

pub use canary::{CanaryError, CanaryPrompts, CanaryReport, Transferred};
pub use server::auth::{ClientKeys, EngineKey, KeyError, LineError};
pub use server::tls::{Tls, TlsError, validity};
pub use settings::{Parts, Settings};
pub use shared::Proxy;
pub use telemetry::access_log::AccessLog;
pub use telemetry::traces::{Traces, TracesError};
pub use transfer::notify::{Notifications, NotifyError};
