//! The section "What was measured": server, fleet, host and command, from the result file.

use maud::{Markup, html};
use serde_json::Value;

/// Longest text.
const LONGEST: usize = 2000;

/// Whether the engines were simulated.
pub(super) fn is_simulated(setup: &Value) -> bool {
    setup["server"]["simulated"] == true
}

/// The warning above the numbers.
pub(super) fn banner(setup: &Value) -> Markup {
    html! {
        @if is_simulated(setup) {
            div.banner role="note" { strong { "Simulated engines" }
                p { "No model ran: the times come from a simulation, not from a GPU." }
            }
        }
    }
}

/// The section; empty if the file has no setup.
pub(super) fn section(setup: &Value) -> Markup {
    let entries: Vec<(&str, String)> = entries(setup)
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .collect();
    html! {
        @if !entries.is_empty() {
            section { h2 { "What was measured" }
                dl.settings { @for (name, value) in &entries { div { dt { (name) } dd { bdi { (value) } } } } }
                @if let Some(command) = setup["command"].as_str() { p.command { code { (shortened(command)) } } }
            }
        }
    }
}

fn entries(setup: &Value) -> Vec<(&'static str, String)> {
    if !setup.is_object() {
        return Vec::new();
    }
    let (fleet, server, host) = (&setup["fleet"], &setup["server"], &setup["host"]);
    let text = |value: &Value| value.as_str().map(shortened).unwrap_or_default();
    let list = |value: &Value| {
        let texts = value.as_array().into_iter().flatten().filter_map(Value::as_str);
        shortened(&texts.collect::<Vec<_>>().join(", "))
    };
    let count = |key: &str| fleet[key].as_u64();
    let shape = count("prefill_engines").zip(count("decode_engines"));
    let engine = match (is_simulated(setup), server["version"].as_str()) {
        (true, _) => "simulated".to_owned(),
        (false, Some(version)) => format!("vLLM {}", shortened(version)),
        (false, None) => String::new(),
    };
    let gib = |bytes: u64| format!("{:.0} GiB", bytes as f64 / (1_u64 << 30) as f64);
    let size = host["cores"].as_u64().zip(host["memory_bytes"].as_u64());
    let size = size.map(|(cores, memory)| format!(", {cores} cores, {}", gib(memory)));
    vec![
        ("Server", text(&server["url"])),
        ("Engines", engine),
        (
            "Fleet",
            shape
                .map(|(prefill, decode)| format!("{prefill} prefill, {decode} decode"))
                .unwrap_or_default(),
        ),
        ("Profile", text(&fleet["profile"])),
        ("Connector", text(&fleet["connector"])),
        ("GPUs", list(&fleet["gpus"])),
        ("Versions", list(&fleet["versions"])),
        ("Measured from", text(&host["name"]) + &size.unwrap_or_default()),
        ("xpyd", text(&setup["xpyd"])),
    ]
}

fn shortened(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}
