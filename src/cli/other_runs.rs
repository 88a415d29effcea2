//! The ports of other runs on this machine, from their plans, because a port that is only reserved is not visible.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::control::rundir::{self, FoundRun, RunInfo};
use crate::plan::Plan;
use crate::preflight::{Finding, Level, Topic};
use crate::sockets::PortClaim;

use super::command;
use super::run_plan::RunPlan;

/// Step between two port offsets that are tried.
const STEP: u16 = 20;

/// Number of offsets to try. The three port ranges of a shipped profile are 100 apart, so 5 fleets fit between them;
/// further fleets are placed above all three.
const TRIES: u16 = 400;

/// Ports of other runs, with the run of each.
pub(super) struct OtherRuns(BTreeMap<u16, RunInfo>);

impl OtherRuns {
    /// The ports of all runs that are up.
    pub(super) fn find() -> Self {
        let mut ports = BTreeMap::new();
        for seen in rundir::all() {
            if let FoundRun::Up(info) = seen {
                let of_run = ports_of(&info);
                ports.extend(of_run.into_iter().map(|port| (port, (*info).clone())));
            }
        }
        Self(ports)
    }

    /// The ports of the plan that other runs have, with the purpose of each.
    fn ports_in_use<'here>(&'here self, plan: &Plan) -> Vec<(u16, String, &'here RunInfo)> {
        let wanted = plan.ports().into_iter();
        wanted
            .filter_map(|(port, purpose)| Some((port, purpose, self.0.get(&port)?)))
            .collect()
    }

    /// The first run that has a port of the plan.
    pub(super) fn conflicting(&self, plan: &Plan) -> Option<&RunInfo> {
        self.ports_in_use(plan).first().map(|(_, _, run)| *run)
    }

    /// The first offset from `base` on at which no port of the fleet is in use, with a claim on these ports.
    pub(super) fn free_offset<E>(
        &self,
        base: u16,
        plan: impl Fn(u16) -> Result<Plan, E>,
    ) -> Result<Option<(u16, PortClaim)>, E> {
        let is_free = |(port, _): &(u16, String)| {
            *port == 0 || !self.0.contains_key(port) && std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()
        };
        for offset in (0..TRIES).map_while(|turn| base.checked_add(turn * STEP)) {
            let plan = plan(offset)?;
            if plan.ports().iter().all(is_free)
                && let Some(claim) = claim(&plan)
            {
                return Ok(Some((offset, claim)));
            }
        }
        Ok(None)
    }

    /// The finding about ports of other runs; `None` if there is no conflict.
    pub(super) fn finding(&self, plan: &Plan) -> Option<Finding> {
        let ports_in_use = self.ports_in_use(plan);
        let (_, _, run) = ports_in_use.first()?;
        let shown: Vec<String> = ports_in_use
            .iter()
            .take(3)
            .map(|(port, purpose, _)| format!("{port} ({purpose})"))
            .collect();
        let more = ports_in_use.len() - shown.len();
        let more = if more == 0 {
            String::new()
        } else {
            format!(" and {more} more")
        };
        let noun = if ports_in_use.len() == 1 {
            "port is"
        } else {
            "ports are"
        };
        Some(Finding {
            topic: Topic::System,
            check: "ports",
            level: Level::Fail,
            message: format!(
                "{} {noun} in use by run `{}` (pid {}): {}{more}",
                ports_in_use.len(),
                run.name,
                run.pid,
                shown.join(", ")
            ),
            hint: Some(format!(
                "`{}` stops that run; without `--port` and `port_offset`, `xpyd up --name NAME` starts this one on \
                 other ports",
                command("down", &run.name)
            )),
        })
    }
}

/// A claim on the ports of a plan; `None` if another run that starts now has claimed one.
pub(super) fn claim(plan: &Plan) -> Option<PortClaim> {
    PortClaim::take(fixed_ports(plan))
}

/// Whether another run that starts now has claimed a port of the plan.
pub(super) fn is_claimed(plan: &Plan) -> bool {
    PortClaim::is_taken(fixed_ports(plan))
}

/// The ports of a plan, without those that the kernel chooses.
fn fixed_ports(plan: &Plan) -> impl Iterator<Item = u16> {
    plan.ports().into_iter().map(|(port, _)| port).filter(|port| *port != 0)
}

/// The ports of a run's plan, and the proxy's real port.
fn ports_of(info: &RunInfo) -> Vec<u16> {
    let number = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    let plan = RunPlan::read(&info.logs_dir);
    let engines = plan.iter().flat_map(RunPlan::engines);
    let used = engines.flat_map(|engine| engine["ports"].as_array().into_iter().flatten());
    let mut ports: Vec<u16> = used.filter_map(|used| number(&used["port"])).collect();
    let notified = plan.as_ref().map(|plan| &plan.value()["proxy"]["notify"][1]);
    ports.extend(notified.and_then(number));
    let proxy = info.proxy_url.rsplit_once(':');
    ports.extend(proxy.and_then(|(_, port)| port.parse::<u16>().ok()));
    ports
}
