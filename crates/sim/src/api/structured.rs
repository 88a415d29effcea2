//! Structured output: the texts that a grammar allows, enough of them for two prompts to differ. The sampler draws one.

use serde::Deserialize;
use serde_json::{Value, json};

use super::ApiError;

/// Number of texts for an open grammar.
const VARIANTS: usize = 16;

/// vLLM's `structured_outputs`.
#[derive(Debug, Deserialize)]
pub(super) struct StructuredOutputs {
    choice: Option<Vec<String>>,
    json: Option<Value>,
}

/// The allowed texts; `None` without a restriction.
pub(super) fn texts(
    outputs: Option<&StructuredOutputs>,
    format: Option<&Value>,
) -> Result<Option<Vec<String>>, ApiError> {
    if let Some(StructuredOutputs { choice, json }) = outputs {
        return Ok(choice.clone().or_else(|| json.as_ref().map(instances)));
    }
    match format.and_then(|format| format["type"].as_str()) {
        None | Some("text") => Ok(None),
        Some("json_object") => Ok(Some(instances(&json!({"properties": {"answer": {"type": "string"}}})))),
        Some("json_schema") => match format.map(|format| &format["json_schema"]["schema"]) {
            Some(schema) if schema.is_object() => Ok(Some(instances(schema))),
            _ => {
                let message = "When response_format type is 'json_schema', the 'json_schema' field must be provided.";
                Err(ApiError::bad_request(message, Some("response_format")))
            }
        },
        Some(other) => {
            let message = format!("response_format type {other:?} is not supported");
            Err(ApiError::bad_request(message, Some("response_format")))
        }
    }
}

fn instances(schema: &Value) -> Vec<String> {
    (0..VARIANTS)
        .map(|variant| instance(schema, variant).to_string())
        .collect()
}

/// A minimal value of a schema, in variants.
fn instance(schema: &Value, variant: usize) -> Value {
    if let Some(values) = schema["enum"].as_array().filter(|values| !values.is_empty()) {
        return values[variant % values.len()].clone();
    }
    if let Some(properties) = schema["properties"].as_object() {
        let members = properties
            .iter()
            .map(|(name, of)| (name.clone(), instance(of, variant)));
        return members.collect();
    }
    match schema["type"].as_str() {
        Some("string") => json!(format!("{variant:x}")),
        Some("integer" | "number") => json!(variant),
        Some("boolean") => json!(variant.is_multiple_of(2)),
        Some("array") => json!([]),
        Some("object") => json!({}),
        _ => Value::Null,
    }
}
