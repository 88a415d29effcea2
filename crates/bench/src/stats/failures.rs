//! Groups failed requests by cause. Pure.

use std::collections::HashMap;

/// Requests that failed for the same reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailureGroup {
    /// The error of the first of them, in one line.
    pub cause: String,
    /// How many requests.
    pub count: usize,
    /// Their positions in the given list.
    pub members: Vec<usize>,
}

/// Groups causes, the most frequent first. Causes that differ only in numbers and ids, such as the request id, are the
/// same group: a thousand of them would hide the problem.
pub(crate) fn by_cause<'a>(causes: impl IntoIterator<Item = (usize, &'a str)>) -> Vec<FailureGroup> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut groups: Vec<FailureGroup> = Vec::new();
    for (member, cause) in causes {
        let place = *places.entry(kind(cause)).or_insert(groups.len());
        if place == groups.len() {
            groups.push(FailureGroup {
                cause: cause.to_owned(),
                count: 0,
                members: Vec::new(),
            });
        }
        groups[place].count += 1;
        groups[place].members.push(member);
    }
    groups.sort_by(|left, right| right.count.cmp(&left.count).then_with(|| left.cause.cmp(&right.cause)));
    groups
}

/// The cause without the numbers that differ between requests. A number within a name, as in `decoder1`, and an HTTP
/// status keep causes apart.
fn kind(cause: &str) -> String {
    let mut kind = String::with_capacity(cause.len());
    let mut before = "";
    let mut rest = cause;
    while let Some(start) = rest.find(char::is_alphanumeric) {
        kind.push_str(&rest[..start]);
        rest = &rest[start..];
        let end = rest
            .find(|character: char| !character.is_alphanumeric())
            .unwrap_or(rest.len());
        let word = &rest[..end];
        let is_status = before == "HTTP";
        kind.push_str(if is_status || !is_volatile(word) { word } else { "#" });
        before = word;
        rest = &rest[end..];
    }
    kind + rest
}

/// Whether a word is a number, or an id in hexadecimal.
fn is_volatile(word: &str) -> bool {
    let digits = word.bytes().filter(u8::is_ascii_digit).count();
    let is_id = word.len() >= 8 && digits > 0 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits == word.len() || is_id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_that_differ_only_in_numbers_are_grouped() {
        let causes = [
            "HTTP 503: no engine",
            "HTTP 400: prompt of 7712 tokens, 8192 are the limit",
            "HTTP 500: request cmpl-3f2a9c01 was lost",
            "HTTP 400: prompt of 7713 tokens, 8192 are the limit",
            "HTTP 500: no engine",
            "HTTP 500: request cmpl-8820ab77 was lost",
            "HTTP 400: prompt of 7 tokens, 8192 are the limit",
        ];
        let groups = by_cause(causes.into_iter().enumerate());
        let seen: Vec<_> = groups.iter().map(|group| (group.count, group.cause.as_str())).collect();
        assert_eq!(
            seen,
            [
                (3, "HTTP 400: prompt of 7712 tokens, 8192 are the limit"),
                (2, "HTTP 500: request cmpl-3f2a9c01 was lost"),
                (1, "HTTP 500: no engine"),
                (1, "HTTP 503: no engine"),
            ]
        );
        assert_eq!(groups[0].members, [1, 3, 6]);
    }

    #[test]
    fn numbered_names_keep_causes_apart() {
        assert_ne!(kind("decoder1 died"), kind("decoder2 died"));
        assert_eq!(kind("after 3 s"), kind("after 12 s"));
        assert_eq!(kind("straße 漢字 12"), "straße 漢字 #");
    }
}
