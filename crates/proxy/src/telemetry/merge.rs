//! Merges the proxy's own metrics with those of its engines, whose samples get a label with their engine.
//!
//! Pure. Knows Prometheus' text format (version 0.0.4) and `OpenMetrics`: engines write either, and the merged page
//! is in the former. An engine cannot break the page: anything but a sample is left out.

use std::borrow::Cow;
use std::collections::BTreeMap;

use xpyd_base::samples::{Sample, as_text_format, is_name, labels};

/// The metrics of one engine.
#[derive(Debug, Clone)]
pub(crate) struct EnginePage {
    pub(crate) engine: String,
    pub(crate) role: String,
    pub(crate) text: String,
}

/// A metric: its help, its type and its samples.
#[derive(Debug, Default)]
struct MetricFamily<'page> {
    help: Option<&'page str>,
    kind: Option<&'page str>,
    samples: String,
}

/// The proxy's own page, in `OpenMetrics`, and those of its engines as one page in the text format 0.0.4. Samples of
/// engines get the labels `engine` and `role`; their own labels of these names become `exported_…`, as in Prometheus.
pub(crate) fn merge(own: &str, pages: &[EnginePage]) -> String {
    let mut merged = as_text_format(own).into_owned();
    let texts: Vec<Cow<'_, str>> = pages.iter().map(|page| as_text_format(&page.text)).collect();
    let mut order: Vec<&str> = Vec::new();
    let mut families: BTreeMap<&str, MetricFamily<'_>> = BTreeMap::new();
    for (page, text) in pages.iter().zip(&texts) {
        let mut current = "";
        for line in text.lines() {
            let said = line.strip_prefix("# ").and_then(|said| {
                let (what, rest) = said.split_once(' ')?;
                let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
                matches!(what, "HELP" | "TYPE").then_some((what, name, text))
            });
            let sample = || Sample::read(line);
            let name = match (said, sample()) {
                (Some((_, name, _)), _) if is_name(name) => name,
                (None, Some(sample)) if belongs_to(&sample, current) => current,
                (None, Some(sample)) => sample.name,
                _ => continue,
            };
            current = name;
            let family = families.entry(name).or_insert_with(|| {
                order.push(name);
                MetricFamily::default()
            });
            match said {
                Some(("HELP", _, text)) => family.help = family.help.or(Some(text)),
                Some((_, _, text)) => family.kind = family.kind.or(Some(text)),
                None => sample()
                    .into_iter()
                    .for_each(|sample| write(&sample, page, &mut family.samples)),
            }
        }
    }
    for name in order {
        let MetricFamily { help, kind, samples } = &families[name];
        if samples.is_empty() {
            continue;
        }
        for (what, text) in [("HELP", help), ("TYPE", kind)] {
            if let Some(text) = text {
                merged.extend(["# ", what, " ", name, " ", text, "\n"]);
            }
        }
        merged.push_str(samples);
    }
    merged
}

/// Whether the sample belongs to the metric of this name.
fn belongs_to(sample: &Sample<'_>, family: &str) -> bool {
    let suffix = (!family.is_empty()).then(|| sample.name.strip_prefix(family)).flatten();
    matches!(suffix, Some("" | "_bucket" | "_sum" | "_count" | "_total"))
}

fn write(sample: &Sample<'_>, page: &EnginePage, text: &mut String) {
    text.extend([sample.name, "{engine=\"", &page.engine, "\",role=\"", &page.role, "\""]);
    for label in labels(sample.labels) {
        let is_ours = ["engine=", "role="].iter().any(|ours| label.starts_with(ours));
        text.extend([",", if is_ours { "exported_" } else { "" }, label]);
    }
    text.extend(["} ", sample.value, "\n"]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(engine: &str, role: &str, text: &str) -> EnginePage {
        EnginePage {
            engine: engine.into(),
            role: role.into(),
            text: text.into(),
        }
    }

    #[test]
    fn samples_of_all_engines_share_one_heading() {
        let text = |value: u8| {
            format!(
                "# HELP vllm:prompt_tokens_total Number of prefill tokens processed.\n\
                 # TYPE vllm:prompt_tokens_total counter\n\
                 vllm:prompt_tokens_total{{engine=\"0\",model_name=\"m\"}} {value}.0\n\
                 # HELP up Whether.\n# TYPE up gauge\nup 1\n\
                 # TYPE vllm:e2e histogram\n\
                 vllm:e2e_bucket{{le=\"+Inf\"}} 2.0 1700000000000\nvllm:e2e_sum 0.5\nvllm:e2e_count 2.0\n"
            )
        };
        let own = "# HELP xpyd_requests Requests.\n# TYPE xpyd_requests counter\nxpyd_requests_total{status=\"200\"} 1\n# TYPE xpyd_open gauge\nxpyd_open 0\n# EOF\n";
        let merged = merge(
            own,
            &[
                page("prefiller1", "prefill", &text(7)),
                page("decoder1", "decode", &text(8)),
            ],
        );
        let expected = r#"# HELP xpyd_requests_total Requests.
# TYPE xpyd_requests_total counter
xpyd_requests_total{status="200"} 1
# TYPE xpyd_open gauge
xpyd_open 0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="prefiller1",role="prefill",exported_engine="0",model_name="m"} 7.0
vllm:prompt_tokens_total{engine="decoder1",role="decode",exported_engine="0",model_name="m"} 8.0
# HELP up Whether.
# TYPE up gauge
up{engine="prefiller1",role="prefill"} 1
up{engine="decoder1",role="decode"} 1
# TYPE vllm:e2e histogram
vllm:e2e_bucket{engine="prefiller1",role="prefill",le="+Inf"} 2.0 1700000000000
vllm:e2e_sum{engine="prefiller1",role="prefill"} 0.5
vllm:e2e_count{engine="prefiller1",role="prefill"} 2.0
vllm:e2e_bucket{engine="decoder1",role="decode",le="+Inf"} 2.0 1700000000000
vllm:e2e_sum{engine="decoder1",role="decode"} 0.5
vllm:e2e_count{engine="decoder1",role="decode"} 2.0
"#;
        assert_eq!(merged, expected);
    }

    #[test]
    fn values_may_hold_every_mark_of_the_format() {
        let line = r#"m{a="},{\"x\"",engine="e\\",role="r,",b=""} NaN"#;
        assert_eq!(
            merge("", &[page("d", "decode", line)]),
            "m{engine=\"d\",role=\"decode\",a=\"},{\\\"x\\\"\",exported_engine=\"e\\\\\",exported_role=\"r,\",b=\"\"} NaN\n"
        );
    }

    #[test]
    fn non_samples_are_left_out() {
        for junk in [
            "",
            "<html>",
            "m",
            "m{",
            "m{a=\"1\"",
            "m{a=\"1} 2",
            "m x",
            "0m 1",
            "m{a=1} x",
            "# EOF",
            "# TYPE m gauge",
            "m }{ 1",
        ] {
            let merged = merge("", &[page("d", "decode", junk)]);
            assert_eq!(merged, "", "{junk}");
        }
        // An invalid label is left out; its sample stays.
        assert_eq!(
            merge("", &[page("d", "decode", "m{a=1,b=\"2\"} 3")]),
            "m{engine=\"d\",role=\"decode\",b=\"2\"} 3\n"
        );
    }

    #[test]
    fn both_dialects_make_one_family() {
        let open = "# HELP vllm:prompt_tokens Tokens.\n# TYPE vllm:prompt_tokens counter\n# UNIT vllm:prompt_tokens tokens\n\
             vllm:prompt_tokens_total{model_name=\"a # {\"} 7.0 # {trace_id=\"x y\"} 1.0 1700000000.5\n\
             vllm:prompt_tokens_created 1.5e9\n\
             # TYPE vllm:ttft histogram\nvllm:ttft_bucket{le=\"1.0\"} 2 1700000000.25 # {} 0.3\nvllm:ttft_bucket{le=\"+Inf\"} 2 # {trace_id=\"y\"} 4.2\n\
             vllm:ttft_count 2\nvllm:ttft_sum 1.0\n# TYPE vllm:build info\nvllm:build_info{v=\"1\"} 1\n# TYPE x unknown\nx 1\n# EOF\n";
        let classic = "# HELP vllm:prompt_tokens_total Tokens.\n# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total 8.0\n";
        let merged = merge(
            "# TYPE xpyd_requests counter\nxpyd_requests_total 1\n# EOF\n",
            &[page("p", "prefill", open), page("d", "decode", classic)],
        );
        let expected = r#"# TYPE xpyd_requests_total counter
xpyd_requests_total 1
# HELP vllm:prompt_tokens_total Tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="p",role="prefill",model_name="a # {"} 7.0
vllm:prompt_tokens_total{engine="d",role="decode"} 8.0
vllm:prompt_tokens_created{engine="p",role="prefill"} 1.5e9
# TYPE vllm:ttft histogram
vllm:ttft_bucket{engine="p",role="prefill",le="1.0"} 2 1700000000250
vllm:ttft_bucket{engine="p",role="prefill",le="+Inf"} 2
vllm:ttft_count{engine="p",role="prefill"} 2
vllm:ttft_sum{engine="p",role="prefill"} 1.0
# TYPE vllm:build_info gauge
vllm:build_info{engine="p",role="prefill",v="1"} 1
# TYPE x untyped
x{engine="p",role="prefill"} 1
"#;
        assert_eq!(merged, expected);
    }

    proptest! {
        #[test]
        fn any_engine_text_merges_into_valid_samples(text in "([a-z_{}\"\\\\=,# \n0-9.]|# TYPE |m 1\n){0,60}") {
            let merged = merge("xpyd_open 0\n", &[page("d", "decode", &text)]);
            for line in merged.lines().skip(1).filter(|line| !line.starts_with("# ")) {
                let sample = Sample::read(line).expect("a sample");
                prop_assert!(sample.labels.starts_with("engine=\"d\",role=\"decode\""), "{}", line);
            }
        }
    }
}
