//! The default name of a result file, by vLLM's rule.

use super::python::repr;
use crate::report::Report;

/// `label-rate-limit-model-time.json`.
pub(crate) fn name(report: &Report) -> String {
    let spec = &report.spec;
    let label = spec.naming.label.as_deref().filter(|label| !label.is_empty());
    let label = label.unwrap_or_else(|| report.backend());
    let rate = match spec.arrivals.ramp {
        Some(ramp) => format!("ramp-up-{}-{}qps-{}qps", ramp.strategy.name(), ramp.start, ramp.end),
        None => format!("{}qps", repr(spec.arrivals.request_rate)),
    };
    let limit = spec
        .max_concurrency
        .map(|limit| format!("-concurrency{limit}"))
        .unwrap_or_default();
    let model = report.model_id().rsplit('/').next().unwrap_or_default();
    format!("{label}-{rate}{limit}-{model}-{}.json", report.date)
}
