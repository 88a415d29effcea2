//! Expands paths as Python's `expandvars(expanduser(…))` does, which `huggingface_hub` applies to its variables. PURE,
//! except that it looks up the home folders of other users.

use std::path::PathBuf;

/// The path with the user's home for `~`, another user's for `~name`, and variables for `$NAME` and `${NAME}`. Unknown
/// names stay as they are.
pub(super) fn expanded(path: &str, variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    PathBuf::from(variables(&home(path, variable), variable))
}

fn home(path: &str, variable: &dyn Fn(&str) -> Option<String>) -> String {
    let Some(rest) = path.strip_prefix('~') else {
        return path.to_owned();
    };
    let (name, rest) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let of = |user: nix::Result<Option<nix::unistd::User>>| {
        let folder = user.ok().flatten()?.dir;
        folder.to_str().map(str::to_owned)
    };
    let folder = if name.is_empty() {
        variable("HOME").or_else(|| of(nix::unistd::User::from_uid(nix::unistd::getuid())))
    } else {
        of(nix::unistd::User::from_name(name))
    };
    match folder {
        Some(folder) => format!("{}{rest}", folder.trim_end_matches('/')),
        None => path.to_owned(),
    }
}

fn variables(path: &str, variable: &dyn Fn(&str) -> Option<String>) -> String {
    let mut text = String::new();
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('$') {
        text.push_str(before);
        let is_word = |character: char| character.is_ascii_alphanumeric() || character == '_';
        let braced = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let (name, left) = braced.unwrap_or_else(|| after.split_at(after.find(|c| !is_word(c)).unwrap_or(after.len())));
        let written = &after[..after.len() - left.len()];
        let value = variable(name).filter(|_| !name.is_empty());
        text += &value.unwrap_or_else(|| format!("${written}"));
        rest = left;
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn homes_and_variables_are_expanded() {
        let variable = |name: &str| match name {
            "HOME" => Some("/h/".to_owned()),
            "SCRATCH" => Some("/scratch/me".to_owned()),
            _ => None,
        };
        for (path, wanted) in [
            ("~", "/h"),
            ("~/hf", "/h/hf"),
            ("~root/hf", "/root/hf"),
            ("~no-such-user/hf", "~no-such-user/hf"),
            ("/a/~/b", "/a/~/b"),
            ("$SCRATCH/hf", "/scratch/me/hf"),
            ("${SCRATCH}_2/hf", "/scratch/me_2/hf"),
            ("$SCRATCH_2/hf", "$SCRATCH_2/hf"),
            ("/a/${NO}/$", "/a/${NO}/$"),
            ("~/$SCRATCH", "/h//scratch/me"),
        ] {
            assert_eq!(expanded(path, &variable), Path::new(wanted), "{path}");
        }
    }
}
