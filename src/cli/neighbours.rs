//! The ports of other runs on this machine: told from their plans, because a reserved port can be seen by nobody.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::control::rundir::{self, FoundRun, RunInfo};
use crate::plan::Plan;
use crate::preflight::{Finding, Level, Topic};

use super::command;
use super::run_plan::RunPlan;

/// What is tried for a fleet beside others, added to its ports.
const STEP: u16 = 20;

/// How often. Three ranges of ports of a shipped profile are 100 apart, so 5 fleets fit between them; then it begins anew
/// beyond all of them.
const TRIES: u16 = 400;

/// Ports that runs have, and which run.
pub(super) struct Neighbours(BTreeMap<u16, RunInfo>);

impl Neighbours {
    /// Those of all runs that are up now.
    pub(super) fn look() -> Self {
        let mut ports = BTreeMap::new();
        for seen in rundir::all() {
            if let FoundRun::Up(info) = seen {
                let of_run = ports_of(&info);
                ports.extend(of_run.into_iter().map(|port| (port, (*info).clone())));
            }
        }
        Self(ports)
    }

    /// Ports of the plan that a run has, and what for.
    fn taken<'here>(&'here self, plan: &Plan) -> Vec<(u16, String, &'here RunInfo)> {
        let wanted = plan.ports().into_iter();
        wanted
            .filter_map(|(port, purpose)| Some((port, purpose, self.0.get(&port)?)))
            .collect()
    }

    /// The run that has a port of the plan, if one has.
    pub(super) fn in_the_way(&self, plan: &Plan) -> Option<&RunInfo> {
        self.taken(plan).first().map(|(_, _, run)| *run)
    }

    /// The first offset from `base` on at which nobody has a port of the fleet.
    pub(super) fn free_offset<E>(&self, base: u16, plan: impl Fn(u16) -> Result<Plan, E>) -> Result<Option<u16>, E> {
        let is_free = |(port, _): &(u16, String)| {
            *port == 0 || !self.0.contains_key(port) && std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()
        };
        for offset in (0..TRIES).map_while(|turn| base.checked_add(turn * STEP)) {
            if plan(offset)?.ports().iter().all(is_free) {
                return Ok(Some(offset));
            }
        }
        Ok(None)
    }

    /// What the preflight says of ports that runs have; `None` where none has any.
    pub(super) fn finding(&self, plan: &Plan) -> Option<Finding> {
        let taken = self.taken(plan);
        let (_, _, run) = taken.first()?;
        let shown: Vec<String> = taken
            .iter()
            .take(3)
            .map(|(port, purpose, _)| format!("{port} ({purpose})"))
            .collect();
        let more = taken.len() - shown.len();
        let more = if more == 0 {
            String::new()
        } else {
            format!(" and {more} more")
        };
        let noun = if taken.len() == 1 { "port is" } else { "ports are" };
        Some(Finding {
            topic: Topic::System,
            check: "ports",
            level: Level::Fail,
            message: format!(
                "{} {noun} taken by run `{}` (pid {}): {}{more}",
                taken.len(),
                run.name,
                run.pid,
                shown.join(", ")
            ),
            hint: Some(format!(
                "`{}` stops that run; without `--port` and `port_offset`, `xpyd up --name NAME` starts this one on other ports",
                command("down", &run.name)
            )),
        })
    }
}

/// The ports of a run's plan, and the proxy's as it is.
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
