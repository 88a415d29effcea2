//! Assets of the pages that xpyd writes: style, chart library (uPlot), chart script, and JSON that is safe in a page.
//!
//! A page holds each of them once, so it is one file that opens without a network. `README.md` names their origin.

use serde_json::Value;

const PAGE_STYLE: &str = include_str!("page.css");
const CHART_SCRIPT: &str = include_str!("charts.js");
const LIBRARY_STYLE: &str = include_str!("uPlot.min.css");
const LIBRARY_SCRIPT: &str = include_str!("uPlot.iife.min.js");
const LIBRARY_LICENSE: &str = include_str!("uPlot.LICENSE");

/// The content of the style element of a page.
#[must_use]
pub fn style() -> String {
    format!("{LIBRARY_STYLE}\n{PAGE_STYLE}")
}

/// The content of the script element of a page, with the licence text of the library. It comes after [`chart_data`].
#[must_use]
pub fn script() -> String {
    format!("/*\n{LIBRARY_LICENSE}\n*/\n{LIBRARY_SCRIPT}\n{CHART_SCRIPT}")
}

/// The content of the element `#chart-data` of a page, of type `application/json`. `<`, `>` and `&` are escaped, so no
/// text can end the element or start a comment.
#[must_use]
pub fn chart_data(charts: &[Value]) -> String {
    Value::from(charts.to_vec())
        .to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_ends_the_data_of_a_page() {
        let hostile = "</script><!--<script>\u{2028}\u{2029}&amp;\"\\";
        let data = chart_data(&[hostile.into()]);
        assert!(!data.contains(['<', '>', '&', '\u{2028}', '\u{2029}']), "{data}");
        assert_eq!(
            serde_json::from_str::<Value>(&data).unwrap(),
            serde_json::json!([hostile])
        );
    }

    #[test]
    fn script_and_style_stay_within_their_elements_and_carry_the_license() {
        let (script, style) = (script(), style());
        // The licence is within a comment.
        assert!(!LIBRARY_LICENSE.contains("*/") && script.contains("Copyright (c) 2022 Leon Sorokin"));
        for end in ["</script", "<script", "<!--", "</style"] {
            assert!(!script.contains(end) && !style.contains(end), "`{end}`");
        }
    }
}
