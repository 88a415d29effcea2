//! The layers of a profile: shipped files, the user's file, overrides. Reads, checks and merges them.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::Profile;
use super::file::{File, MissingKey};
use crate::fleet::MAX_ENGINES_PER_ROLE;

/// The shipped profiles, embedded: name and text.
const SHIPPED: &[(&str, &str)] = &[
    ("1p1d", include_str!("../../profiles/1p1d.toml")),
    ("2p2d", include_str!("../../profiles/2p2d.toml")),
    ("2p2d-nixl", include_str!("../../profiles/2p2d-nixl.toml")),
    ("2p2d-lmcache-mp", include_str!("../../profiles/2p2d-lmcache-mp.toml")),
    ("1p1d-tp2", include_str!("../../profiles/1p1d-tp2.toml")),
    ("2p2d-tp2", include_str!("../../profiles/2p2d-tp2.toml")),
    ("1p3d", include_str!("../../profiles/1p3d.toml")),
    ("cpu-1p1d", include_str!("../../profiles/cpu-1p1d.toml")),
];

/// A profile may extend one that extends another, this deep.
const MAX_DEPTH: usize = 8;

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The name is no shipped profile and no file.
    #[error("no profile `{name}`: it is neither a shipped profile nor a file")]
    Unknown {
        /// As the user wrote it.
        name: String,
        /// The shipped profile that it is most like.
        nearest: Option<String>,
    },
    /// The file cannot be read.
    #[error("cannot read a profile")]
    Read(#[source] std::io::Error),
    /// The text is no TOML, or no profile. The message shows line, column and the line itself.
    #[error("{origin}: {message}")]
    Invalid {
        /// File, shipped profile or override.
        origin: String,
        /// The parser's message.
        message: String,
        /// The known key that an unknown one is most like.
        nearest: Option<String>,
    },
    /// `extends` goes round, or too deep.
    #[error("`{0}` extends itself, or too many profiles")]
    TooDeep(String),
    /// A required key is nowhere in the layers.
    #[error("profile `{name}` has no `{key}`")]
    Missing {
        /// The profile.
        name: String,
        /// The key.
        key: &'static str,
    },
    /// A value is out of its range.
    #[error("profile `{name}`: `{key}` {problem}")]
    OutOfRange {
        /// The profile.
        name: String,
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl ProfileError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown {
                nearest: Some(nearest), ..
            }
            | Self::Invalid {
                nearest: Some(nearest), ..
            } => Some(format!("did you mean `{nearest}`?")),
            Self::Unknown { .. } => Some("`xpyd profiles list` shows the shipped ones; a path must exist".to_owned()),
            Self::Missing { key, .. } => Some(format!("add `{key} = …`, or start the file with `extends = \"2p2d\"`")),
            Self::Invalid { .. } | Self::Read(_) | Self::TooDeep(_) | Self::OutOfRange { .. } => None,
        }
    }
}

/// A layer on top of the profile: a key path with its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    /// Where it came from, for errors: `--set decode.count=3`.
    origin: String,
    table: Table,
}

impl Override {
    /// Parses `KEY.PATH=VALUE`. The value is TOML; what is no TOML is a string, so that `model=tiny` needs no quotes.
    ///
    /// # Errors
    /// Without `=`, or with a key that is no dotted key.
    pub fn parse(text: &str) -> Result<Self, ProfileError> {
        let origin = format!("`--set {text}`");
        let invalid = |message: &str| ProfileError::Invalid {
            origin: origin.clone(),
            message: message.to_owned(),
            nearest: None,
        };
        let (key, value) = text.split_once('=').ok_or_else(|| invalid("expected KEY=VALUE"))?;
        let quoted = Value::String(value.to_owned());
        let table = format!("{key} = {value}")
            .parse::<Table>()
            .or_else(|_| format!("{key} = {quoted}").parse::<Table>())
            .map_err(|_| invalid("the key is not a dotted key such as `decode.count`"))?;
        Ok(Self { origin, table })
    }

    /// A flag's value for one key.
    pub fn flag(flag: &str, key: &str, value: impl Into<Value>) -> Self {
        let (mut outer, last) = match key.rsplit_once('.') {
            Some((outer, last)) => (Some(outer), last),
            None => (None, key),
        };
        let mut table = Table::from_iter([(last.to_owned(), value.into())]);
        while let Some(path) = outer {
            let (rest, name) = path
                .rsplit_once('.')
                .map_or((None, path), |(rest, name)| (Some(rest), name));
            table = Table::from_iter([(name.to_owned(), Value::Table(table))]);
            outer = rest;
        }
        Self {
            origin: format!("`{flag}`"),
            table,
        }
    }
}

/// Names and texts of the shipped profiles.
pub fn shipped() -> impl Iterator<Item = (&'static str, &'static str)> {
    SHIPPED.iter().copied()
}

/// Names of the shipped profiles.
pub fn shipped_names() -> impl Iterator<Item = &'static str> {
    SHIPPED.iter().map(|(name, _)| *name)
}

/// Loads a profile by name or path, with everything it extends, and puts `overrides` on top.
///
/// # Errors
/// When a layer cannot be read or is wrong, or the whole lacks a required key.
pub fn load(name: &str, overrides: &[Override]) -> Result<Profile, ProfileError> {
    let mut merged = load_layers(name, None, 0)?;
    for layer in overrides {
        check(
            &layer.origin,
            &Value::Table(layer.table.clone()).to_string(),
            Some(&layer.table),
        )?;
        merge(&mut merged, layer.table.clone());
    }
    let file = File::deserialize(merged).map_err(|error| invalid(name, &error))?;
    let profile = file.resolve(name).map_err(|MissingKey(key)| ProfileError::Missing {
        name: name.to_owned(),
        key,
    })?;
    check_ranges(&profile)?;
    Ok(profile)
}

/// The merged table of a profile and of all that it extends.
fn load_layers(name: &str, from: Option<&Path>, depth: usize) -> Result<Table, ProfileError> {
    if depth >= MAX_DEPTH {
        return Err(ProfileError::TooDeep(name.to_owned()));
    }
    let (origin, text, folder) = read(name, from)?;
    check(&origin, &text, None)?;
    let table: Table = text.parse().map_err(|error| invalid(&origin, &error))?;
    let Some(Value::String(base)) = table.get("extends") else {
        return Ok(table);
    };
    let mut merged = load_layers(base, folder.as_deref(), depth + 1)?;
    merge(&mut merged, table);
    Ok(merged)
}

/// Finds a profile: a shipped name, or a file, relative to the one that extends it. Returns its origin and folder too.
fn read(name: &str, from: Option<&Path>) -> Result<(String, String, Option<std::path::PathBuf>), ProfileError> {
    if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
        return Ok((format!("shipped profile `{name}`"), (*text).to_owned(), None));
    }
    let path = from.map_or_else(|| Path::new(name).to_owned(), |folder| folder.join(name));
    let looks_like_path = name.contains('/') || path.extension().is_some_and(|extension| extension == "toml");
    if !path.is_file() && !looks_like_path {
        let nearest = nearest(name, shipped_names());
        return Err(ProfileError::Unknown {
            name: name.to_owned(),
            nearest,
        });
    }
    let text = fs_err::read_to_string(&path).map_err(ProfileError::Read)?;
    Ok((path.display().to_string(), text, path.parent().map(Path::to_owned)))
}

/// Deserializes one layer by itself, so that the error shows the place where the user wrote the mistake. A layer that is
/// no text of the user's (an override) is shown by its origin alone.
fn check(origin: &str, text: &str, table: Option<&Table>) -> Result<(), ProfileError> {
    let checked = match table {
        Some(table) => File::deserialize(table.clone()),
        None => toml::from_str::<File>(text),
    };
    checked.map(drop).map_err(|error| match table {
        None => invalid(origin, &error),
        Some(_) => ProfileError::Invalid {
            origin: origin.to_owned(),
            message: error.message().to_owned(),
            nearest: nearest_key(error.message()),
        },
    })
}

fn invalid(origin: &str, error: &toml::de::Error) -> ProfileError {
    ProfileError::Invalid {
        origin: origin.to_owned(),
        message: error.to_string().trim_end().to_owned(),
        nearest: nearest_key(error.message()),
    }
}

/// serde says ``unknown field `cuont`, expected one of `count`, `port` ``: the names between backticks are all we need.
fn nearest_key(message: &str) -> Option<String> {
    if !message.contains("unknown field") && !message.contains("unknown variant") {
        return None;
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    nearest(unknown, quoted)
}

/// The candidate most like `name`, if one is like it at all.
fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate.to_owned())
}

/// Puts `top` over `base`: tables are merged key by key, everything else is replaced.
fn merge(base: &mut Table, top: Table) {
    for (key, value) in top {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn check_ranges(profile: &Profile) -> Result<(), ProfileError> {
    let fail = |key: String, problem: &str| {
        Err(ProfileError::OutOfRange {
            name: profile.name.clone(),
            key,
            problem: problem.to_owned(),
        })
    };
    for (table, role) in [("prefill", &profile.prefill), ("decode", &profile.decode)] {
        for (key, value, most) in [
            ("count", role.count, MAX_ENGINES_PER_ROLE),
            ("tensor_parallel", role.tensor_parallel, 64),
        ] {
            if !(1..=most).contains(&value) {
                return fail(format!("{table}.{key}"), &format!("must be between 1 and {most}"));
            }
        }
        let needed = usize::from(role.count) * usize::from(role.tensor_parallel);
        if !role.gpus.is_empty() && role.gpus.len() != needed {
            return fail(
                format!("{table}.gpus"),
                &format!(
                    "lists {} GPUs, but count × tensor_parallel needs {needed}",
                    role.gpus.len()
                ),
            );
        }
    }
    if profile.model.trim().is_empty() {
        return fail("model".to_owned(), "is empty");
    }
    if profile.proxy.max_in_flight == 0 {
        return fail("proxy.max_in_flight".to_owned(), "must be at least 1");
    }
    if profile.deadlines.start_stall.is_zero() {
        return fail("deadlines.start_stall".to_owned(), "must be longer than 0");
    }
    let shortest = profile.deadlines.kv_lease();
    if profile.nixl.lease.is_some_and(|lease| lease < shortest) {
        let problem = format!(
            "must be at least {} with these deadlines, or a request may read KV that is no longer its own; leave it out, \
             or shorten `deadlines.prefill`, `deadlines.decode_idle` or `deadlines.stall`",
            humantime::format_duration(shortest)
        );
        return fail("nixl.lease".to_owned(), &problem);
    }
    Ok(())
}
