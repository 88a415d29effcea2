//! llm-d's `endpoints.yaml` (llm-d-router, docs/discovery.md). PURE.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::fleet::{MAX_ENGINES_PER_ROLE, Role};

/// The largest file that is read, in bytes, as in llm-d.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// The label with an engine's role.
const ROLE_LABEL: &str = "llm-d.ai/role";

/// An engine that a source names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListedEngine {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) host: String,
    pub(super) port: u16,
}

/// All engines of a source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// The valid entries.
    pub(super) engines: Vec<ListedEngine>,
    /// What is wrong with each of the others, in one line.
    pub(super) problems: Vec<String>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    endpoints: Vec<serde_yaml_ng::Value>,
}

#[derive(Deserialize)]
#[serde(expecting = "a mapping with `name`, `address`, `port` and `labels`")]
struct Entry {
    name: String,
    address: String,
    port: Port,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// llm-d writes a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Text(String),
}

/// Reads the file. An entry that is wrong is left out, and named.
pub(super) fn parse(text: &[u8]) -> Result<Listing, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("it is larger than {MAX_BYTES} bytes"));
    }
    let file: File = serde_yaml_ng::from_slice(text).map_err(|error| error.to_string())?;
    let entries = file.endpoints.into_iter().enumerate();
    let entries = entries.map(|(number, value)| {
        entry(value).map_err(|problem| format!("entry {} of `endpoints` is left out: {problem}", number + 1))
    });
    Ok(checked(entries))
}

/// Leaves out engines whose name is taken, and those beyond the limit of their role.
pub(super) fn limited(engines: Vec<ListedEngine>) -> Listing {
    checked(engines.into_iter().map(Ok))
}

fn checked(entries: impl Iterator<Item = Result<ListedEngine, String>>) -> Listing {
    let mut listing = Listing::default();
    for entry in entries {
        match entry {
            Ok(engine) if listing.engines.iter().any(|known| known.name == engine.name) => {
                let problem = format!("engine `{}` is listed twice; the first entry counts", engine.name);
                listing.problems.push(problem);
            }
            Ok(engine) if count(&listing, engine.role) == usize::from(MAX_ENGINES_PER_ROLE) => {
                let (name, role) = (engine.name, engine.role);
                listing.problems.push(format!(
                    "`{name}` is left out: there are {MAX_ENGINES_PER_ROLE} {role} engines"
                ));
            }
            Ok(engine) => listing.engines.push(engine),
            Err(problem) => listing.problems.push(problem),
        }
    }
    listing
}

fn count(listing: &Listing, role: Role) -> usize {
    listing.engines.iter().filter(|engine| engine.role == role).count()
}

fn entry(value: serde_yaml_ng::Value) -> Result<ListedEngine, String> {
    let entry: Entry = serde_yaml_ng::from_value(value).map_err(|error| error.to_string())?;
    let name = entry.name;
    let role = match entry.labels.get(ROLE_LABEL).map(String::as_str) {
        Some("prefill") => Role::Prefill,
        Some("decode") => Role::Decode,
        Some(other) => return Err(format!("`{name}` has the role `{other}`, not `prefill` or `decode`")),
        None => return Err(format!("`{name}` has no label `{ROLE_LABEL}`")),
    };
    let port = match entry.port {
        Port::Number(port) => Some(port),
        Port::Text(text) => text.parse().ok(),
    };
    let port = port
        .filter(|port| *port > 0)
        .ok_or_else(|| format!("the port of `{name}` is not a port"))?;
    let host = entry.address.trim_matches(['[', ']']).to_owned();
    if name.is_empty() || host.is_empty() {
        return Err("its name or its address is empty".to_owned());
    }
    Ok(ListedEngine { name, role, host, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_that_of_llm_d() {
        let text = r#"
endpoints:
  - {name: p0, namespace: default, address: 10.0.0.1, port: "8000", labels: {llm-d.ai/role: prefill, other: x}}
  - {name: d0, address: "fd00::1", port: 8200, labels: {llm-d.ai/role: decode}}
"#;
        let listing = parse(text.as_bytes()).expect("valid");
        let engines = listing
            .engines
            .iter()
            .map(|engine| (engine.name.as_str(), engine.role, engine.host.as_str(), engine.port));
        assert_eq!(
            engines.collect::<Vec<_>>(),
            [
                ("p0", Role::Prefill, "10.0.0.1", 8000),
                ("d0", Role::Decode, "fd00::1", 8200)
            ]
        );
        assert_eq!(listing.problems, [""; 0]);
    }

    #[test]
    fn wrong_entries_are_left_out_and_named() {
        let text = r"
endpoints:
  - {name: a, address: h, port: 1, labels: {llm-d.ai/role: both}}
  - {name: b, address: h, port: 1}
  - {name: c, address: h, port: http, labels: {llm-d.ai/role: decode}}
  - {name: d, address: h, port: 0, labels: {llm-d.ai/role: decode}}
  - {address: h, port: 1}
  - 7
  - {name: e, address: h, port: 1, labels: {llm-d.ai/role: decode}}
  - {name: e, address: i, port: 1, labels: {llm-d.ai/role: decode}}
";
        let listing = parse(text.as_bytes()).expect("YAML");
        assert_eq!(listing.engines.len(), 1);
        insta::assert_snapshot!(listing.problems.join("\n"), @r"
        entry 1 of `endpoints` is left out: `a` has the role `both`, not `prefill` or `decode`
        entry 2 of `endpoints` is left out: `b` has no label `llm-d.ai/role`
        entry 3 of `endpoints` is left out: the port of `c` is not a port
        entry 4 of `endpoints` is left out: the port of `d` is not a port
        entry 5 of `endpoints` is left out: missing field `name`
        entry 6 of `endpoints` is left out: invalid type: integer `7`, expected a mapping with `name`, `address`, `port` and `labels`
        engine `e` is listed twice; the first entry counts
        ");
    }

    #[test]
    fn the_number_of_engines_is_limited() {
        let entry =
            |number: u16| format!("- {{name: d{number}, address: h, port: 1, labels: {{llm-d.ai/role: decode}}}}\n");
        let text = format!(
            "endpoints:\n{}",
            (0..=MAX_ENGINES_PER_ROLE).map(entry).collect::<String>()
        );
        let listing = parse(text.as_bytes()).expect("YAML");
        assert_eq!(listing.engines.len(), usize::from(MAX_ENGINES_PER_ROLE));
        assert_eq!(listing.problems, ["`d64` is left out: there are 64 decode engines"]);
    }

    #[test]
    fn other_files_are_errors() {
        assert!(parse(b"endpoints: {}").is_err());
        assert!(parse(b"a: [").is_err());
        assert!(parse(&vec![b' '; MAX_BYTES + 1]).expect_err("large").contains("larger"));
        assert_eq!(parse(b"{}"), Ok(Listing::default()));
    }
}
