//! The changes to an engine before a restart. PURE: the caller reserves the ports and writes the file.
//!
//! Only an LMCache receiver changes. Prefill engines know it by host and init port, and never connect again to an address
//! that they have lost. NIXL engines create a new id by themselves.

use super::EngineSpec;
use crate::connector::with_receiver_ports;
use crate::fleet::{Endpoint, Receiver};

/// Number of ports that [`respawn`] needs. No earlier start of the engine can have used them.
pub fn fresh_ports_needed(spec: &EngineSpec) -> usize {
    spec.endpoint
        .receiver
        .as_ref()
        .map_or(0, |receiver| receiver.init_ports.len() + receiver.alloc_ports.len())
}

/// The engine with `fresh` ports for its receiver. Its file names the new ports, too.
///
/// # Panics
/// With fewer ports than [`fresh_ports_needed`].
pub fn respawn(spec: &EngineSpec, fresh: &[u16]) -> EngineSpec {
    let mut spec = spec.clone();
    let Some(receiver) = &spec.endpoint.receiver else {
        return spec;
    };
    let old: Vec<u16> = receiver
        .init_ports
        .iter()
        .chain(&receiver.alloc_ports)
        .copied()
        .collect();
    let (init, alloc) = fresh.split_at(receiver.init_ports.len());
    let receiver = Receiver {
        host: receiver.host.clone(),
        init_ports: init.to_vec(),
        alloc_ports: alloc.to_vec(),
    };
    for used in &mut spec.ports {
        if let Some(index) = old.iter().position(|port| *port == used.port) {
            used.port = fresh[index];
        }
    }
    if let Some(file) = &mut spec.file
        && let Some(template) = &file.template
    {
        file.content = with_receiver_ports(template, &receiver);
    }
    spec.endpoint.receiver = Some(receiver);
    spec
}

impl EngineSpec {
    /// The engine as it runs already, or `None` if `running` is not what this plan would start. The receiver's ports and
    /// everything outside its process can differ.
    pub fn resume(&self, running: &Self) -> Option<Self> {
        let without_receiver = |endpoint: &Endpoint| (endpoint.host.clone(), endpoint.port, endpoint.tensor_parallel);
        let is_same = (&self.argv, &self.env, &self.gpus, self.role)
            == (&running.argv, &running.env, &running.gpus, running.role)
            && without_receiver(&self.endpoint) == without_receiver(&running.endpoint);
        is_same.then(|| Self {
            endpoint: running.endpoint.clone(),
            ports: running.ports.clone(),
            file: running.file.clone(),
            ..self.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::fleet::Role;
    use crate::machine::Machine;
    use crate::plan::{Plan, build};
    use crate::profile::{self, Override};

    fn plan(connector: &str) -> Plan {
        let overrides = [Override::parse(&format!("connector={connector}")).expect("an override")];
        let profile = profile::load("1p1d-tp2", &overrides).expect("a shipped profile");
        build(
            &profile,
            &Machine::fixture(4, "0.25.1", Some("0.3.9")),
            Path::new("/run"),
        )
        .expect("a plan")
    }

    #[test]
    fn a_restarted_receiver_has_new_ports() {
        let plan = plan("lmcache");
        let first = &plan.engines[1];
        assert_eq!((first.role, fresh_ports_needed(first)), (Role::Decode, 4));
        let second = respawn(first, &[41, 42, 43, 44]);
        let receiver = second.endpoint.receiver.as_ref().expect("a receiver");
        assert_eq!(
            (&receiver.init_ports[..], &receiver.alloc_ports[..]),
            (&[41, 42][..], &[43, 44][..])
        );
        let ports: Vec<u16> = second.ports.iter().map(|used| used.port).collect();
        assert_eq!(ports, [first.endpoint.port, 41, 42, 43, 44]);
        let planned = first.file.as_ref().expect("a file");
        let file = second.file.as_ref().expect("a file");
        assert_eq!(file.path, planned.path);
        let replaced = planned
            .content
            .replace("[7300, 7301]", "[41, 42]")
            .replace("[7400, 7401]", "[43, 44]");
        assert_eq!(file.content, replaced);
        let third = respawn(&second, &[51, 52, 53, 54]);
        assert_eq!(
            third.endpoint.receiver.as_ref().expect("a receiver").init_ports,
            [51, 52]
        );
        assert!(third.file.expect("a file").content.contains("[53, 54]"));
    }

    #[test]
    fn other_engines_restart_unchanged() {
        let (nixl, lmcache, lmcache_mp) = (plan("nixl"), plan("lmcache"), plan("lmcache-mp"));
        let without = nixl.engines.iter().chain(&lmcache_mp.engines);
        for engine in without.chain(&lmcache.engines[..1]) {
            assert_eq!(fresh_ports_needed(engine), 0);
            let again = respawn(engine, &[]);
            assert_eq!(
                (again.ports, again.endpoint),
                (engine.ports.clone(), engine.endpoint.clone())
            );
        }
    }
}
