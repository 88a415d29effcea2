//! The JSON Schema of profiles, made from the types that read them. Editors complete keys with it, and
//! `docs/profile-keys.md` is written from it. PURE.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::file::{DECODE_PORT, File, PREFILL_PORT};

/// The JSON Schema (draft 7, which editors of TOML know) of a profile file.
pub fn schema() -> Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<File>().to_value();
    schema["title"] = "xpyd profile".into();
    schema["description"] = "A profile of xpyd: the engines of a fleet, their model, and the proxy.".into();
    // The only default that depends on the role.
    for (role, port) in [("prefill", PREFILL_PORT), ("decode", DECODE_PORT)] {
        schema["properties"][role]["properties"]["port"]["default"] = json!(port);
    }
    simplify(&mut schema);
    schema
}

/// The TOML tables of a schema with their names, outer ones first. The outermost has no name.
pub(super) fn tables(schema: &Value) -> Vec<(String, &Value)> {
    let mut found = vec![(String::new(), schema)];
    let mut next = 0;
    while let Some((name, table)) = found.get(next) {
        let keys = table["properties"].as_object().into_iter().flatten();
        let prefix = if name.is_empty() {
            String::new()
        } else {
            format!("{name}.")
        };
        let inner: Vec<_> = keys
            .filter(|(_, value)| value.get("properties").is_some())
            .map(|(key, value)| (format!("{prefix}{key}"), value))
            .collect();
        next += 1;
        found.splice(next..next, inner);
    }
    found
}

/// Removes what says nothing to a reader: `null`, because TOML has none, defaults of tables, because their keys have
/// them, and the names of Rust's number types.
fn simplify(schema: &mut Value) {
    if let Some(object) = schema.as_object_mut() {
        remove_null(object);
        if object.get("default").is_some_and(Value::is_object) {
            object.remove("default");
        }
        if object.get("type").is_some_and(|kind| kind != "string") {
            object.remove("format");
        }
        object.values_mut().for_each(simplify);
    } else if let Some(items) = schema.as_array_mut() {
        items.iter_mut().for_each(simplify);
    }
}

/// A key without a value is absent, not `null`.
fn remove_null(object: &mut Map<String, Value>) {
    if let Some(kinds) = object.get_mut("type").and_then(Value::as_array_mut) {
        kinds.retain(|kind| kind != "null");
        if let [kind] = &kinds[..] {
            object["type"] = kind.clone();
        }
    }
    if let Some(options) = object.get_mut("anyOf").and_then(Value::as_array_mut) {
        options.retain(|option| option["type"] != "null");
        if let [Value::Object(option)] = &mut options[..] {
            let option = std::mem::take(option);
            object.remove("anyOf");
            for (key, value) in option {
                object.entry(key).or_insert(value);
            }
        }
    }
    if object.get("default").is_some_and(Value::is_null) {
        object.remove("default");
    }
}
