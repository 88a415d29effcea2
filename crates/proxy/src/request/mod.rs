//! One generation of a client, from its body to its answer.

pub(crate) mod answer;
pub(crate) mod attempt;
pub(crate) mod first_token;
pub(crate) mod flow;
pub(crate) mod keep_alive;
pub(crate) mod model_length;
pub(crate) mod passthrough;
pub(crate) mod stream_body;
