//! The chat template of a model: Jinja with the settings of transformers and Python's string and map methods.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value as Jinja};
use serde_json::{Map, Value, json};

use super::{TokenizerError, read_json};

/// A template and its variables.
#[derive(Debug)]
pub(super) struct Template {
    source: String,
    specials: Map<String, Value>,
}

impl Template {
    /// The template of a model folder: from a separate file, else from the tokenizer configuration; `None` if there is
    /// none.
    pub(super) fn read(
        folder: &Path,
        config: &Map<String, Value>,
        specials: Vec<(String, String)>,
    ) -> Result<Option<Self>, TokenizerError> {
        let path = folder.join("chat_template.jinja");
        let source = match std::fs::read_to_string(&path) {
            Ok(source) => Some(source),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let old = read_json(&folder.join("chat_template.json"))?.unwrap_or_default();
                let value = config.get("chat_template").or_else(|| old.get("chat_template"));
                match value {
                    Some(Value::String(source)) => Some(source.clone()),
                    Some(Value::Array(named)) => {
                        let default = named.iter().find(|entry| entry["name"] == "default");
                        default.and_then(|entry| Some(entry["template"].as_str()?.to_owned()))
                    }
                    _ => None,
                }
            }
            Err(error) => {
                return Err(TokenizerError::File {
                    path,
                    reason: error.to_string(),
                });
            }
        };
        let named = specials.into_iter().filter(|(name, _)| !name.is_empty());
        let specials = named.map(|(name, token)| (name, Value::String(token))).collect();
        Ok(source.map(|source| Self { source, specials }))
    }

    /// Renders one user message and the beginning of the answer; `settings` are additional variables.
    pub(super) fn render(&self, content: &str, settings: &Map<String, Value>) -> Result<String, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| -> String {
            jiff::Zoned::now().strftime(&format).to_string()
        });
        let mut names = self.specials.clone();
        names.insert("messages".to_owned(), json!([{"role": "user", "content": content}]));
        names.insert("tools".to_owned(), Value::Null);
        names.insert("documents".to_owned(), Value::Null);
        names.insert("add_generation_prompt".to_owned(), json!(true));
        names.extend(settings.clone());
        environment
            .render_str(&self.source, Jinja::from(Serde(names)))
            .map_err(|error| format!("fails: {error}"))
    }
}
