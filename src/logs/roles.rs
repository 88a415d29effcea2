//! The logs in a run's folder, and their selection by name.

use std::io;
use std::path::{Path, PathBuf};

use super::rotation::split_number;
use crate::fleet::Role;

/// A log and the role it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleLog {
    /// `prefiller1`, `decoder2`, `proxy`, `xpyd`.
    pub name: String,
    /// The current file; full ones have numbers.
    pub path: PathBuf,
}

/// No log of the run has the requested name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no role `{name}` in this run")]
pub struct UnknownRole {
    /// The requested name.
    pub name: String,
    /// The existing names: single roles, then groups.
    pub known: Vec<String>,
    /// The existing name that was probably meant.
    pub nearest: Option<String>,
}

/// Names of groups of logs.
const GROUPS: [&str; 3] = ["prefill", "decode", "all"];

/// The logs in `folder`: prefill engines by number, decode engines by number, then the rest by name.
pub fn logs_in(folder: &Path) -> io::Result<Vec<RoleLog>> {
    let mut logs: Vec<RoleLog> = fs_err::read_dir(folder)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .filter_map(|path| {
            let stem = path.file_stem()?.to_str()?;
            // A full file stands for its log.
            let name = split_number(stem).map_or(stem, |(name, _)| name).to_owned();
            let path = path.with_file_name(format!("{name}.log"));
            Some(RoleLog { name, path })
        })
        .collect();
    sort(&mut logs);
    logs.dedup();
    Ok(logs)
}

/// Sorts logs for display.
pub fn sort(logs: &mut [RoleLog]) {
    logs.sort_by_cached_key(|log| {
        let group = match role_of(&log.name) {
            Some(Role::Prefill) => 0,
            Some(Role::Decode) => 1,
            None => 2,
        };
        let number: u32 = log
            .name
            .trim_start_matches(|letter: char| !letter.is_ascii_digit())
            .parse()
            .unwrap_or(0);
        (group, number, log.name.clone())
    });
}

/// The logs selected by `names`, each once, in the order of `logs`. No names select all.
pub fn select(logs: &[RoleLog], names: &[String]) -> Result<Vec<RoleLog>, UnknownRole> {
    for name in names {
        if !GROUPS.contains(&name.as_str()) && !logs.iter().any(|log| log.name == *name) {
            return Err(unknown(logs, name));
        }
    }
    let is_meant = |log: &&RoleLog| names.is_empty() || names.iter().any(|name| means(name, log));
    Ok(logs.iter().filter(is_meant).cloned().collect())
}

fn means(name: &str, log: &RoleLog) -> bool {
    match name {
        "all" => true,
        "prefill" => role_of(&log.name) == Some(Role::Prefill),
        "decode" => role_of(&log.name) == Some(Role::Decode),
        name => log.name == name,
    }
}

/// The role of the engine of this name: `prefiller1`, `decoder2`.
fn role_of(name: &str) -> Option<Role> {
    [Role::Prefill, Role::Decode].into_iter().find(|role| {
        name.strip_prefix(role.engine_stem())
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

fn unknown(logs: &[RoleLog], name: &str) -> UnknownRole {
    let known: Vec<String> = logs
        .iter()
        .map(|log| log.name.clone())
        .chain(GROUPS.map(str::to_owned))
        .collect();
    let nearest = known
        .iter()
        .map(|candidate| (strsim::jaro_winkler(candidate, name), candidate))
        // Another number is no typing error, so its group is no suggestion.
        .filter(|(likeness, candidate)| *likeness > 0.7 && role_of(name).is_none_or(|_| role_of(candidate).is_some()))
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate.clone());
    UnknownRole {
        name: name.to_owned(),
        known,
        nearest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs() -> Vec<RoleLog> {
        let mut logs: Vec<RoleLog> = ["xpyd", "decoder1", "prefiller10", "proxy", "prefiller2"]
            .map(|name| RoleLog {
                name: name.to_owned(),
                path: PathBuf::from(format!("{name}.log")),
            })
            .into();
        sort(&mut logs);
        logs
    }

    fn names(asked: &[&str]) -> Result<Vec<String>, UnknownRole> {
        let asked: Vec<String> = asked.iter().map(|&name| name.to_owned()).collect();
        Ok(select(&logs(), &asked)?.into_iter().map(|log| log.name).collect())
    }

    #[test]
    fn engine_logs_sort_by_number_before_others() {
        let all = ["prefiller2", "prefiller10", "decoder1", "proxy", "xpyd"];
        assert_eq!(names(&[]).unwrap(), all);
        assert_eq!(names(&["all"]).unwrap(), all);
    }

    #[test]
    fn groups_and_names_add_up_and_nothing_comes_twice() {
        assert_eq!(
            names(&["proxy", "prefill", "prefiller2"]).unwrap(),
            ["prefiller2", "prefiller10", "proxy"]
        );
    }

    #[test]
    fn an_unknown_role_error_names_the_nearest() {
        let error = names(&["decoder1", "prefiler2"]).unwrap_err();
        assert_eq!(error.name, "prefiler2");
        assert_eq!(error.nearest.as_deref(), Some("prefiller2"));
        assert!(error.known.contains(&"decode".to_owned()));
        assert_eq!(names(&["zzz"]).unwrap_err().nearest, None);
    }
}
