//! `xpyd bench`: requests, datasets, modes, errors, accuracy, and equality with `vllm bench serve`.

mod accuracy;
mod breakdown;
mod datasets;
mod drop_in;
mod errors;
mod fake_server;
mod modes;
mod requests;
mod servers;
