//! The names of the connectors, on the command line and in profiles.

use clap::ValueEnum;
use clap::builder::PossibleValue;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A connector, without its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConnectorKind {
    /// NIXL: the decode engine pulls
    Nixl,
    /// LMCache's PD backend: the prefill engine pushes and notifies the proxy
    #[value(name = "lmcache")]
    LmCache,
    /// As `nixl`, with a cache server of LMCache for each engine
    #[value(name = "lmcache-mp")]
    LmCacheMp,
}

impl ConnectorKind {
    /// The connector of this name.
    pub fn named(name: &str) -> Option<Self> {
        let kinds = Self::value_variants().iter();
        kinds.copied().find(|kind| kind.name() == name)
    }

    /// The name in profiles and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nixl => "nixl",
            Self::LmCache => "lmcache",
            Self::LmCacheMp => "lmcache-mp",
        }
    }
}

/// The connector that the user asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ConnectorChoice {
    /// LMCache where the installed versions make it safe, else NIXL.
    #[default]
    Auto,
    /// A connector that the user names.
    Named(ConnectorKind),
}

impl ConnectorChoice {
    const ALL: [Self; 4] = [
        Self::Auto,
        Self::Named(ConnectorKind::Nixl),
        Self::Named(ConnectorKind::LmCache),
        Self::Named(ConnectorKind::LmCacheMp),
    ];
    const NAMES: [&str; 4] = ["auto", "nixl", "lmcache", "lmcache-mp"];

    /// The name in profiles and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Named(kind) => kind.name(),
        }
    }
}

impl ValueEnum for ConnectorChoice {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Auto => {
                Some(PossibleValue::new("auto").help("LMCache where the installed versions make it safe, else NIXL"))
            }
            Self::Named(kind) => kind.to_possible_value(),
        }
    }
}

impl<'de> Deserialize<'de> for ConnectorChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::ALL
            .into_iter()
            .find(|choice| choice.name() == text)
            .ok_or_else(|| serde::de::Error::unknown_variant(&text, &Self::NAMES))
    }
}

impl Serialize for ConnectorChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl JsonSchema for ConnectorChoice {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "connector".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "enum": Self::NAMES})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_in_profiles_and_on_the_command_line() {
        for (choice, name) in ConnectorChoice::ALL.into_iter().zip(ConnectorChoice::NAMES) {
            assert_eq!(choice.name(), name);
            let value = choice.to_possible_value().expect("a visible value");
            assert_eq!(value.get_name(), name);
        }
    }
}
