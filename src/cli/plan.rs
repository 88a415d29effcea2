//! `xpyd plan`: prints everything that a run would do, as text or as JSON.

mod blocks;
mod topology;

use clap::Parser;
use tokio::time::Instant;

use self::blocks::TextBlock;
use super::checks;
use super::doctor::Findings;
use super::fleet_arguments::FleetArguments;
use super::planning::build;
use crate::machine::Machine;
use crate::plan::{EngineSpec, Plan};
use crate::report::{ExitStatus, Failure};
use crate::ui::{Printer, Table, wrap};

/// Arguments of `xpyd plan`. It exits with 0 whenever there is a plan; `xpyd doctor` exits with 3 if a check fails.
#[derive(Debug, Parser)]
pub(super) struct Arguments {
    #[command(flatten)]
    fleet: FleetArguments,
    /// Print the plan and the findings as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, printer: Printer) -> Result<ExitStatus, Failure> {
    let (profile, machine) = arguments.fleet.survey()?;
    // The real name of the run's folder is only known at its start.
    let plan = build(&profile, &machine, &arguments.fleet.logs.join("RUN"))?;
    show(&plan, &machine, arguments.json, printer)?;
    Ok(ExitStatus::Success)
}

/// Prints the plan with its findings.
pub(super) fn show(plan: &Plan, machine: &Machine, json: bool, printer: Printer) -> Result<(), Failure> {
    let began = Instant::now();
    let findings = checks::of_machine(plan, machine);
    let plan = &plan.redacted();
    if json {
        let value = serde_json::json!({
            "plan": plan,
            "findings": findings,
            "gpus": machine.gpus.found(),
            "driver": machine.driver,
        });
        let text = serde_json::to_string_pretty(&value).map_err(anyhow::Error::from)?;
        return printer.data(text);
    }
    let width = printer.data_width();
    if !findings.is_empty() {
        // The findings come first, because they decide whether the plan can work.
        let found = Findings {
            profile: Some(&plan.profile),
            findings: &findings,
            took: began.elapsed(),
        };
        printer.data(format!("{}\n", found.text(width)))?;
    }
    printer.data(text(plan, width))?;
    if let Some(topology) = topology::text(plan, machine) {
        printer.prose(format!("\n{topology}"))?;
    }
    Ok(())
}

/// The plan for people, with sentences of at most `width` columns. Command lines are not wrapped, so that they can be
/// pasted.
fn text(plan: &Plan, width: Option<usize>) -> String {
    let head = [
        ("profile", plan.profile.clone()),
        ("model", format!("{}{}", plan.model, served_as(plan))),
        ("engine", plan.engine.name().to_owned()),
        (
            "connector",
            format!("{} ({})", plan.connector.name(), plan.connector_reason),
        ),
        (
            "proxy",
            format!(
                "{}://{}:{}{}",
                plan.proxy.config.clients.scheme(),
                plan.proxy.config.host,
                plan.proxy.config.port,
                notified_at(plan)
            ),
        ),
        ("run folder", plan.run_dir.display().to_string()),
    ];
    let notes = plan.notes.iter().map(|note| ("note", note.clone()));
    let head = head.into_iter().chain(notes);
    let mut lines: Vec<String> = head
        .map(|(name, value)| format!("{name:<11}{}", wrap::column(&value, 11, width)))
        .collect();
    let mut table = Table::new(["engine", "role", "gpus", "port", "other ports", "log"]);
    for engine in &plan.engines {
        table.row(row(engine));
    }
    lines.push(format!("\n{table}"));
    let engines = plan.engines.iter().map(engine_block);
    let files = plan.files().map(|file| TextBlock {
        kind: file
            .path
            .display()
            .to_string()
            .replace(|letter: char| letter.is_ascii_digit(), ""),
        title: plan.run_dir.join(&file.path).display().to_string(),
        lines: file
            .content
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(str::to_owned)
            .collect(),
    });
    lines.extend(blocks::text(&engines.chain(files).collect::<Vec<_>>()));
    lines.join("\n")
}

/// The start of an engine: its variables, then its command line.
fn engine_block(engine: &EngineSpec) -> TextBlock {
    let variables = engine
        .env
        .iter()
        .map(|(name, value)| format!("{name}={}", shell_word(value)));
    let command = command_line(&engine.argv);
    TextBlock {
        kind: engine.role.to_string(),
        title: engine.id.to_string(),
        lines: variables.chain(command.lines().map(str::to_owned)).collect(),
    }
}

fn served_as(plan: &Plan) -> String {
    if plan.served_model_name == plan.model {
        String::new()
    } else {
        format!(", served as {}", plan.served_model_name)
    }
}

fn notified_at(plan: &Plan) -> String {
    let port = plan.proxy.notify.as_ref().map(|(_, port)| *port);
    port.map_or_else(String::new, |port| format!(", lmcache notifications on port {port}"))
}

fn row(engine: &EngineSpec) -> [String; 6] {
    let gpus: Vec<String> = engine.gpus.iter().map(u32::to_string).collect();
    [
        engine.id.to_string(),
        engine.role.to_string(),
        gpus.join(","),
        engine.endpoint.port.to_string(),
        other_ports(engine),
        engine.log_file.display().to_string(),
    ]
}

/// `lmcache init 7300,7301; lmcache alloc 7400,7401`: the other ports, grouped over ranks.
fn other_ports(engine: &EngineSpec) -> String {
    let mut groups: Vec<(&str, Vec<String>)> = Vec::new();
    for using in engine.ports.iter().filter(|using| using.port != engine.endpoint.port) {
        let purpose = using.purpose.split(", rank").next().unwrap_or_default();
        match groups.iter_mut().find(|(name, _)| *name == purpose) {
            Some((_, ports)) => ports.push(using.port.to_string()),
            None => groups.push((purpose, vec![using.port.to_string()])),
        }
    }
    let groups: Vec<String> = groups
        .into_iter()
        .map(|(purpose, ports)| format!("{purpose} {}", ports.join(",")))
        .collect();
    groups.join("; ")
}

/// The command line for a shell, one flag per line.
fn command_line(argv: &[String]) -> String {
    let mut text = String::new();
    for (index, word) in argv.iter().enumerate() {
        if index > 0 {
            text.push_str(if word.starts_with("--") { " \\\n  " } else { " " });
        }
        text.push_str(&shell_word(word));
    }
    text
}

/// A word quoted for a shell.
pub(super) fn shell_word(word: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./:=,@%+".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::text;
    use crate::machine::{Gpus, Installation, Machine};
    use crate::plan::{self, PlanError};
    use crate::profile::{self, Override};

    fn plan_text(name: &str, machine: &Machine, overrides: &[&str]) -> Result<String, PlanError> {
        let overrides: Vec<Override> = overrides
            .iter()
            .map(|set| Override::parse(set).expect("an override"))
            .collect();
        let profile = profile::load(name, &overrides).expect("a profile");
        plan::build(&profile, machine, Path::new("/run"))
            .map(|plan| anstream::adapter::strip_str(&text(&plan, None)).to_string())
    }

    #[test]
    fn shipped_profiles_match_their_snapshots() {
        // Old versions with which LMCache is safe, so that the snapshots show its files.
        let machine = Machine::fixture(8, "0.25.1", Some("0.3.9"));
        for name in profile::shipped_names() {
            insta::assert_snapshot!(name, plan_text(name, &machine, &[]).expect("a plan"));
        }
    }

    #[test]
    fn a_simulated_fleet_matches_its_snapshot() {
        let mut machine = Machine::fixture(0, "0.32.0", None);
        machine.engine = Installation::NotAsked;
        machine.gpus = Gpus::NotAsked;
        insta::assert_snapshot!("sim", plan_text("1p1d", &machine, &["engine=sim"]).expect("a plan"));
    }

    #[test]
    fn auto_picks_lmcache_only_if_safe() {
        let connector = |machine: &Machine| {
            let text = plan_text("2p2d", machine, &[]).expect("a plan");
            text.lines()
                .find(|line| line.starts_with("connector"))
                .unwrap_or_default()
                .to_owned()
        };
        let old = Machine::fixture(4, "0.25.1", Some("0.3.9"));
        assert_eq!(
            connector(&old),
            "connector  lmcache (it is safe with the installed versions)"
        );
        let new = Machine::fixture(4, "0.26.0", Some("0.5.6"));
        assert_eq!(
            connector(&new),
            "connector  nixl (not LMCache, because with vLLM 0.26.0 it transfers wrong KV (the layout changed in \
             vLLM 0.26))"
        );
        let without = Machine::fixture(4, "0.25.1", None);
        assert_eq!(
            connector(&without),
            "connector  nixl (not LMCache, because LMCache is not installed beside vLLM)"
        );
    }

    #[test]
    fn an_unsafe_connector_is_refused_unless_forced() {
        let new = Machine::fixture(4, "0.32.0", Some("0.5.6"));
        let refused = plan_text("2p2d", &new, &["connector=lmcache"]);
        assert!(matches!(refused, Err(PlanError::UnsafeConnector(_))), "{refused:?}");
        let forced = plan_text("2p2d", &new, &["connector=lmcache", "force_connector=true"]).expect("a plan");
        assert!(forced.contains("connector  lmcache (forced, although"), "{forced}");
    }

    #[test]
    fn explicit_gpus_win() {
        let machine = Machine::fixture(4, "0.32.0", None);
        let text = plan_text("2p2d", &machine, &["decode.gpus=[0, 2]"]).expect("a plan");
        let gpus: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("CUDA_VISIBLE_DEVICES="))
            .collect();
        assert_eq!(gpus, [1, 3, 0, 2].map(|number| format!("GPU-{number:08x}")));
    }

    #[test]
    fn engines_search_ports_in_different_ranges() {
        let machine = Machine::fixture(8, "0.32.0", None);
        let own = |overrides: &[&str]| -> Vec<String> {
            let text = plan_text("2p2d", &machine, overrides).expect("a plan");
            let ports = text.lines().filter_map(|line| line.trim().strip_prefix("VLLM_PORT="));
            ports.map(str::to_owned).collect()
        };
        assert_eq!(own(&["port_offset=1000"]), ["8600", "8620", "8640", "8660"]);
        assert_eq!(own(&["decode.args=[\"--data-parallel-size=2\"]"]), ["7600", "7620"]);
    }

    #[test]
    fn data_parallel_ranks_get_gpus_and_ports() {
        let machine = Machine::fixture(8, "0.32.0", None);
        let parallel = "decode.args=[\"--data-parallel-size\", \"2\", \"--data_parallel_rpc_port\", \"29550\"]";
        let text = plan_text("1p1d-tp2", &machine, &["connector=nixl", parallel]).expect("a plan");
        let row = text.lines().find(|line| line.starts_with("decoder1 ")).expect("a row");
        assert!(row.contains("2,3,4,5"), "{row}");
        assert!(
            row.contains("nixl side channel 5700,5701; data-parallel rpc 29550"),
            "{row}"
        );
        let clash = plan_text("2p2d-nixl", &machine, &[parallel]).expect_err("both decode engines");
        assert_eq!(
            clash.to_string(),
            "port 29550 is used twice: decoder1 data-parallel rpc and decoder2 data-parallel rpc"
        );
    }

    #[test]
    fn every_kind_of_rank_has_a_gpu() {
        let machine = Machine::fixture(8, "0.32.0", None);
        for args in [
            r#""-pp", "2""#,
            r#""--pipeline_parallel_size=2""#,
            r#""-tp", "2""#,
            r#""--prefill-context-parallel-size", "2""#,
            r#""-dp=2""#,
        ] {
            let text =
                plan_text("1p1d", &machine, &["connector=nixl", &format!("vllm.args=[{args}]")]).expect("a plan");
            let row = |name: &str| {
                text.lines()
                    .find(|line| line.starts_with(name))
                    .expect("a row")
                    .to_owned()
            };
            assert!(
                row("prefiller1 ").contains(" 0,1 ") && row("decoder1 ").contains(" 2,3 "),
                "{args}: {text}"
            );
        }
    }

    #[test]
    fn duplicate_and_invalid_ports_are_errors() {
        let machine = Machine::fixture(4, "0.32.0", None);
        let clash = plan_text("2p2d", &machine, &["decode.port=7101"]).expect_err("a clash");
        assert_eq!(
            clash.to_string(),
            "port 7101 is used twice: decoder1 http and prefiller2 http"
        );
        let high = plan_text("2p2d", &machine, &["decode.port=65535"]).expect_err("too high");
        assert_eq!(
            high.to_string(),
            "http of decoder2 would need port 65536, which is above 65535"
        );
    }
}
