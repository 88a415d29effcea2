//! Reads, checks and merges the layers of a profile: shipped profiles, the user's file, overrides.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use crate::connector::ConnectorKind;

use super::file::{File, MissingKey};
use super::{Profile, args_to_keys, ranges, suggestions};

/// The shipped profiles with their texts.
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

/// The longest chain of `extends`.
const MAX_DEPTH: usize = 8;

/// A reason why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The name is neither a shipped profile nor a file.
    #[error("no profile `{name}`{}: it is neither a shipped profile nor a file", extended(from.as_ref()))]
    Unknown {
        /// The name as the user wrote it.
        name: String,
        /// The profile whose `extends` names it.
        from: Option<String>,
        /// The shipped profile with the most similar name.
        nearest: Option<String>,
    },
    /// The file cannot be read.
    #[error("cannot read a profile{}", extended(from.as_ref()))]
    Read {
        /// The profile whose `extends` names it.
        from: Option<String>,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The text is not TOML, or not a profile. The message shows line, column and the line itself.
    #[error("{origin}: {message}")]
    Invalid {
        /// The file, shipped profile or override.
        origin: String,
        /// The parser's message.
        message: String,
        /// The known key that is most similar to the unknown one.
        nearest: Option<String>,
    },
    /// The chain of `extends` is a cycle, or too long.
    #[error("`{0}` extends itself, or the chain of `extends` is too long")]
    TooDeep(String),
    /// No layer has a required key.
    #[error("profile `{name}` has no `{key}`")]
    Missing {
        /// The name of the profile.
        name: String,
        /// The missing key.
        key: &'static str,
    },
    /// A value is outside its range.
    #[error("profile `{name}`: `{key}` {problem}")]
    OutOfRange {
        /// The name of the profile.
        name: String,
        /// The key with the value.
        key: String,
        /// What is wrong, as the rest of a sentence.
        problem: String,
    },
}

fn extended(from: Option<&String>) -> String {
    from.map(|from| format!(", which {from} extends")).unwrap_or_default()
}

impl ProfileError {
    /// What the user can do about the error.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Invalid { origin, .. } if is_other_format(origin) => {
                Some("a profile is TOML: `xpyd profiles show 2p2d` prints one to begin with".to_owned())
            }
            Self::Unknown {
                nearest: Some(nearest), ..
            }
            | Self::Invalid {
                nearest: Some(nearest), ..
            } => Some(format!("did you mean `{nearest}`?")),
            Self::Unknown { .. } => Some(
                "`xpyd profiles list` shows the shipped profiles; other numbers work as well, such as `3p1d`; the \
                 path of a file has a `/` or ends in `.toml`"
                    .to_owned(),
            ),
            Self::Missing { key, .. } => Some(format!("add `{key} = …`, or start the file with `extends = \"2p2d\"`")),
            Self::Invalid { message, .. } => suggestions::form_hint(message).map(str::to_owned),
            Self::Read { .. } => Some(
                "`xpyd profiles list` shows the shipped profiles; check the path of a \
                file"
                    .to_owned(),
            ),
            Self::TooDeep(_) => Some("`extends` names a shipped profile or another file, up to eight deep".to_owned()),
            Self::OutOfRange { .. } => None,
        }
    }
}

/// A layer on top of the profile that sets one key.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    /// Its source, for errors: `--set decode.count=3`.
    origin: String,
    table: Table,
    /// The same with a string instead of a number or boolean, for keys that hold strings.
    text: Option<Table>,
}

impl Override {
    /// Parses `KEY.PATH=VALUE`. The value is TOML. A value that is not TOML is a string, so `model=tiny` needs no quotes;
    /// so is `2024` if the key holds a string.
    ///
    /// # Errors
    /// Without `=`, or if the key is not a dotted key.
    pub fn parse(text: &str) -> Result<Self, ProfileError> {
        let origin = format!("`--set {text}`");
        let invalid = |message: &str| ProfileError::Invalid {
            origin: origin.clone(),
            message: message.to_owned(),
            nearest: None,
        };
        let (key, value) = text.split_once('=').ok_or_else(|| invalid("expected KEY=VALUE"))?;
        let table = |value: &str| format!("{key} = {value}").parse::<Table>().ok();
        let text = table(&Value::String(value.to_owned()).to_string());
        let is_plain = format!("x = {value}").parse::<Table>().is_ok_and(|parsed| {
            let value = parsed.get("x");
            value.is_some_and(|value| !(value.is_str() || value.is_array() || value.is_table()))
        });
        let (table, text) = match table(value) {
            Some(table) => (Some(table), text.filter(|_| is_plain)),
            None => (text, None),
        };
        let table = table.ok_or_else(|| invalid("the key is not a dotted key such as `decode.count`"))?;
        Ok(Self { origin, table, text })
    }

    /// The override as a table, if the key accepts the value.
    fn checked(&self) -> Result<Table, ProfileError> {
        let check = |table: &Table| check(&self.origin, &Value::Table(table.clone()).to_string(), Some(table));
        let as_text = self.text.as_ref().map(|table| check(table).map(|()| table));
        match (as_text, check(&self.table)) {
            (Some(Ok(text)), _) => Ok(text.clone()),
            (_, Ok(())) => Ok(self.table.clone()),
            // The error about the string is better: it says which form is right.
            (Some(Err(error)), Err(_)) if !error.to_string().contains("invalid type") => Err(error),
            (_, Err(error)) => Err(error),
        }
    }

    /// An override that sets one key from a flag.
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
            text: None,
        }
    }
}

/// The names and texts of the shipped profiles.
pub fn shipped() -> impl Iterator<Item = (&'static str, &'static str)> {
    SHIPPED.iter().copied()
}

/// The names of the shipped profiles.
pub fn shipped_names() -> impl Iterator<Item = &'static str> {
    SHIPPED.iter().map(|(name, _)| *name)
}

/// Loads a profile by name or path with everything it extends, and applies `overrides`.
///
/// # Errors
/// When a layer cannot be read or is invalid, or a required key is missing.
pub fn load(name: &str, overrides: &[Override]) -> Result<Profile, ProfileError> {
    load_with(name, overrides, &[])
}

/// [`load`] with more arguments for all engines.
///
/// # Errors
/// Those of [`load`].
pub fn load_with(name: &str, overrides: &[Override], args: &[String]) -> Result<Profile, ProfileError> {
    let merged = resolved(name, overrides, args)?;
    let file = File::deserialize(merged).map_err(|error| invalid(name, &error))?;
    let profile = file.resolve(name).map_err(|MissingKey(key)| ProfileError::Missing {
        name: name.to_owned(),
        key,
    })?;
    ranges::check(&profile)?;
    Ok(profile)
}

/// All layers merged into one table, without default values.
///
/// # Errors
/// When a layer cannot be read or is invalid.
pub fn resolved(name: &str, overrides: &[Override], args: &[String]) -> Result<Table, ProfileError> {
    let mut merged = load_layers(name, None, 0)?;
    for layer in overrides {
        merge(&mut merged, layer.checked()?);
    }
    merged.remove("extends");
    args_to_keys::apply(&mut merged, args);
    Ok(merged)
}

/// The text of a profile as it was written.
///
/// # Errors
/// When the profile does not exist.
pub fn text(name: &str) -> Result<String, ProfileError> {
    read(name, None).map(|(_, text, _)| text)
}

/// The text of a profile that its name describes: `3p1d`, optionally with `-tp2`, `-nixl`, `-lmcache` or `-lmcache-mp`.
fn generated_profile(name: &str) -> Option<String> {
    let (size, more) = name
        .split_once('-')
        .map_or((name, None), |(size, more)| (size, Some(more)));
    let (prefill, decode) = size.strip_suffix('d')?.split_once('p')?;
    let (prefill, decode): (u16, u16) = (prefill.parse().ok()?, decode.parse().ok()?);
    let mut lines = vec![
        "extends = \"2p2d\"".to_owned(),
        format!("description = \"{prefill} prefill + {decode} decode engines\""),
        format!("prefill.count = {prefill}"),
        format!("decode.count = {decode}"),
    ];
    let mut more = more;
    if let Some(rest) = more.and_then(|more| more.strip_prefix("tp")) {
        let (ranks, rest) = rest
            .split_once('-')
            .map_or((rest, None), |(ranks, rest)| (ranks, Some(rest)));
        let ranks: u16 = ranks.parse().ok()?;
        lines.extend(["prefill", "decode"].map(|role| format!("{role}.tensor_parallel = {ranks}")));
        more = rest;
    }
    match more {
        None => {}
        Some(name) => lines.push(format!("connector = \"{}\"", ConnectorKind::named(name)?.name())),
    }
    Some(lines.join("\n"))
}

/// `2p1d-tp2`, for a name that means it: `2P1D-TP2`, `1d2p-tp2`.
fn as_size(name: &str) -> Option<String> {
    let name = name.to_lowercase();
    if generated_profile(&name).is_some() {
        return Some(name);
    }
    let (size, more) = name.split_at(name.find('-').unwrap_or(name.len()));
    let (decode, prefill) = size.strip_suffix('p')?.split_once('d')?;
    let swapped = format!("{prefill}p{decode}d{more}");
    generated_profile(&swapped).map(|_| swapped)
}

/// Whether a profile's origin is a file of another format.
fn is_other_format(origin: &str) -> bool {
    let extension = Path::new(origin).extension().map(std::ffi::OsStr::to_ascii_lowercase);
    extension.is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|other| extension == *other))
}

/// The merged table of a profile and of all that it extends.
fn load_layers(name: &str, from: Option<&Path>, depth: usize) -> Result<Table, ProfileError> {
    if depth >= MAX_DEPTH {
        return Err(ProfileError::TooDeep(name.to_owned()));
    }
    let (origin, text, path) = read(name, from)?;
    check(&origin, &text, None)?;
    let table: Table = text.parse().map_err(|error| invalid(&origin, &error))?;
    let Some(Value::String(base)) = table.get("extends") else {
        return Ok(table);
    };
    let mut merged = load_layers(base, path.as_deref(), depth + 1)?;
    merge(&mut merged, table);
    Ok(merged)
}

/// Finds a profile: a shipped name, a generated one, or a file relative to the profile that extends it. Returns origin,
/// text and path.
fn read(name: &str, from: Option<&Path>) -> Result<(String, String, Option<std::path::PathBuf>), ProfileError> {
    if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
        return Ok((format!("shipped profile `{name}`"), (*text).to_owned(), None));
    }
    let folder = from.and_then(Path::parent);
    let path = folder.map_or_else(|| Path::new(name).to_owned(), |folder| folder.join(name));
    if let Some(text) = generated_profile(name).filter(|_| !path.is_file()) {
        return Ok((format!("profile `{name}`"), text, None));
    }
    let extended_by = || from.map(|from| format!("`{}`", from.display()));
    let looks_like_path = name.contains('/') || path.extension().is_some_and(|extension| extension == "toml");
    if !path.is_file() && !looks_like_path {
        let nearest = as_size(name).or_else(|| suggestions::nearest(name, shipped_names()));
        return Err(ProfileError::Unknown {
            name: name.to_owned(),
            from: extended_by(),
            nearest,
        });
    }
    let text = fs_err::read_to_string(&path).map_err(|source| ProfileError::Read {
        from: extended_by(),
        source,
    })?;
    Ok((path.display().to_string(), text, Some(path)))
}

/// Deserializes one layer alone, so that an error shows the line that the user wrote. An override has no line: its error
/// only names the origin.
fn check(origin: &str, text: &str, table: Option<&Table>) -> Result<(), ProfileError> {
    let checked = match table {
        Some(table) => File::deserialize(table.clone()),
        None => toml::from_str::<File>(text),
    };
    checked.map(drop).map_err(|error| match table {
        None => invalid(origin, &error),
        Some(_) => ProfileError::Invalid {
            origin: origin.to_owned(),
            message: suggestions::readable(error.message()),
            nearest: suggestions::nearest_key(error.message()),
        },
    })
}

fn invalid(origin: &str, error: &toml::de::Error) -> ProfileError {
    ProfileError::Invalid {
        origin: origin.to_owned(),
        message: suggestions::readable(error.to_string().trim_end()),
        nearest: suggestions::nearest_key(error.message()),
    }
}

/// Merges `top` into `base`: tables key by key, all other values are replaced.
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
