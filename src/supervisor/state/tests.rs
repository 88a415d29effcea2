//! The rules of the state machine by name, then random histories against a model of the processes.

use std::collections::BTreeMap;

use super::*;
use crate::fleet::Endpoint;
use crate::plan::PortUse;

/// An engine to be: its role follows from its name.
pub(in crate::supervisor) fn engine(name: &str, gpus: &[u32]) -> EngineSpec {
    EngineSpec {
        id: EngineId::named(name),
        role: if name.starts_with("prefiller") {
            Role::Prefill
        } else {
            Role::Decode
        },
        argv: vec!["true".to_owned()],
        env: BTreeMap::new(),
        gpus: gpus.to_vec(),
        endpoint: Endpoint {
            host: "127.0.0.1".to_owned(),
            port: 0,
            tensor_parallel: 1,
            receiver: None,
        },
        ports: vec![PortUse {
            port: 0,
            purpose: "http".to_owned(),
        }],
        ready_path: "/health".to_owned(),
        ready_deadline: Duration::from_secs(600),
        stop_grace: Duration::from_secs(30),
        log_file: format!("{name}.log").into(),
    }
}
