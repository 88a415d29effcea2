//! `docs/profile-keys.md` and `docs/profile.schema.json`: every key of a profile, written from the types that read it.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::schema::{schema, tables};

const HEAD: &str = "\
# Keys of a profile

Every key, with its type, its default and its meaning. [configuration.md](configuration.md) explains how they work together. A
*duration* is a string such as `\"90s\"` or `\"1m 30s\"`, at most ten years, or `\"never\"` for no limit. A *size* is a string such as
`\"64MiB\"`. A key without a default is not set. `--set TABLE.KEY=VALUE` changes a key for one run.

This page and [profile.schema.json](profile.schema.json), a JSON Schema for editors, are generated from the program:
`XPYD_UPDATE_DOCS=1 cargo test --lib reference` writes them, and a test compares them with it.
";

/// The type of a key in words.
fn kind(schema: &Value) -> String {
    let options = |key: &str| {
        schema[key]
            .as_array()
            .map(|options| options.iter().map(kind).collect::<Vec<_>>())
    };
    if let Some(values) = schema["enum"].as_array() {
        return values
            .iter()
            .map(|value| format!("`{value}`"))
            .collect::<Vec<_>>()
            .join(", ");
    }
    if let Some(value) = schema.get("const") {
        return format!("`{value}`");
    }
    if let Some(options) = options("oneOf") {
        return options.join(", ");
    }
    if let Some(options) = options("anyOf") {
        return options.join(" or ");
    }
    let name = schema["title"].as_str().or(schema["type"].as_str()).unwrap_or("any");
    let range = range(schema);
    match name {
        "array" => format!("list of {}s", schema["items"]["type"].as_str().unwrap_or("value")),
        "object" => "table".to_owned(),
        _ if range.is_empty() => name.to_owned(),
        _ => format!("{name}, {range}"),
    }
}

/// The range of a number. That no count is negative, and no port above 65535, goes without saying.
fn range(schema: &Value) -> String {
    let is_implied = |value: &Value| [0, 255, 65535].iter().any(|bound| value == bound);
    let bound = |key: &str, word: &str| {
        let value = schema
            .get(key)
            .filter(|value| key.starts_with("exclusive") || !is_implied(value));
        value.map(|value| format!("{word} {value}"))
    };
    let bounds = [
        bound("minimum", "from"),
        bound("exclusiveMinimum", "above"),
        bound("maximum", "to"),
    ];
    bounds.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

fn render() -> String {
    let schema = schema();
    let mut text = HEAD.to_owned();
    for (name, table) in tables(&schema) {
        let heading = if name.is_empty() {
            "Top level".to_owned()
        } else {
            format!("`[{name}]`")
        };
        write!(text, "\n## {heading}\n\n").expect("a string takes all");
        if !name.is_empty() {
            let description = table["description"].as_str().unwrap_or_default();
            write!(text, "{description}\n\n").expect("a string takes all");
        }
        text.push_str("| Key | Type | Default | Meaning |\n|---|---|---|---|\n");
        for (key, value) in table["properties"].as_object().into_iter().flatten() {
            if value.get("properties").is_some() {
                continue;
            }
            let default = value
                .get("default")
                .map(|default| format!("`{default}`"))
                .unwrap_or_default();
            let meaning = value["description"].as_str().unwrap_or_default().replace('\n', " ");
            writeln!(text, "| `{key}` | {} | {default} | {meaning} |", kind(value)).expect("a string takes all");
        }
    }
    text
}

fn assert_file(name: &str, content: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    if std::env::var_os("XPYD_UPDATE_DOCS").is_some() {
        std::fs::write(&path, content).expect("the page is written");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == content,
        "docs/{name} is not what the program knows: `XPYD_UPDATE_DOCS=1 cargo test --lib reference` writes it"
    );
}

#[test]
fn the_page_lists_every_key() {
    assert_file("profile-keys.md", &render());
}

#[test]
fn the_schema_is_the_one_of_the_types() {
    assert_file("profile.schema.json", &format!("{:#}\n", schema()));
}

/// Each key has a description, and a type that the page can name.
#[test]
fn every_key_has_a_meaning_and_a_type() {
    let schema = schema();
    let all = tables(&schema);
    assert!(all.len() > 15, "the tables of `[proxy]` are among them");
    for (name, table) in all {
        assert_eq!(table["additionalProperties"], false, "{name}: unknown keys are refused");
        for (key, value) in table["properties"].as_object().expect("keys") {
            assert!(value["description"].is_string(), "{name}.{key}");
            assert!(!kind(value).contains("any"), "{name}.{key}: {value}");
        }
    }
}

/// The schema accepts what xpyd ships: every key of every profile is in it, with a type that fits.
#[test]
fn shipped_profiles_fit_the_schema() {
    let schema = schema();
    let tables = tables(&schema);
    for name in crate::profile::shipped_names() {
        let whole = crate::profile::resolved(name, &[], &[]).expect("a profile");
        let whole = serde_json::to_value(&whole).expect("JSON");
        for (table, known) in &tables {
            let path = format!("/{}", table.replace('.', "/"));
            let Some(keys) = whole.pointer(path.trim_end_matches('/')).and_then(Value::as_object) else {
                continue;
            };
            for (key, value) in keys {
                let expected = &known["properties"][key];
                let is_right = match value {
                    Value::String(_) => ["string", "enum", "oneOf"]
                        .iter()
                        .any(|kind| expected.get(kind).is_some() || expected["type"] == *kind),
                    Value::Bool(_) => expected["type"] == "boolean",
                    Value::Number(_) => expected["type"] == "integer" || expected["type"] == "number",
                    Value::Array(_) => expected["type"] == "array",
                    _ => expected["type"] == "object",
                };
                assert!(is_right, "{name}: {table}.{key} = {value}: {expected}");
            }
        }
    }
}
