//! `xpyd bench --against`: compares two servers with the same requests, block by block.

use serde_json::json;

use super::compare::print_changes;
use super::session::Session;
use super::{Server, failure, without_version};
use crate::bench::stats::ab_order::{self, Pairs, Side};
use crate::bench::stats::compare;
use crate::bench::{self, Report, Spec, sweep};
use crate::report::{ExitStatus, Failure};

/// The other server and its model.
struct Other {
    server: Server,
    model: String,
}

/// Runs all blocks on both servers.
pub(super) async fn run(session: &Session<'_>, url: &str) -> Result<ExitStatus, Failure> {
    let Some(other) = find(session, url).await? else {
        return Ok(ExitStatus::Forced);
    };
    let blocks = ab_order::blocks(session.arguments.data.num_prompts);
    session.printer.status(format_args!(
        "{} requests to each of two servers in {} blocks, in the order A B B A:\n  A  `{}` at {}\n  B  `{}` at {}",
        session.arguments.data.num_prompts,
        blocks.len(),
        session.first.model,
        session.first.base_url,
        other.model,
        other.server.base_url
    ));
    let mut pairs = Pairs::default();
    let mut done = Vec::new();
    for (block, &count) in blocks.iter().enumerate() {
        let Some([first, second]) = Box::pin(both(session, &other, block, count)).await? else {
            break;
        };
        pairs.add(&first.records, &second.records);
        done.push([first, second]);
    }
    conclude(session, &other, &pairs, &done, blocks.len())
}

/// Asks the other server for its model; `None` if the run was stopped before.
async fn find(session: &Session<'_>, url: &str) -> Result<Option<Other>, Failure> {
    let url = without_version(url, &session.arguments.target);
    let server = Server::of(session.arguments, url)?;
    let insecure = session.first.options.is_insecure;
    let found = bench::discover_with(&server.base_url, &server.headers, insecure, None);
    let found = session.stop.run_until_cancelled(found);
    let Some(model) = found.await.transpose().map_err(failure)? else {
        return Ok(None);
    };
    Ok(Some(Other {
        server,
        model: model.id,
    }))
}

/// Runs one block on both servers and returns the reports of A and B; `None` if the user stopped the run.
async fn both(
    session: &Session<'_>,
    other: &Other,
    block: usize,
    count: usize,
) -> Result<Option<[Report; 2]>, Failure> {
    let number = u32::try_from(block).unwrap_or(u32::MAX);
    let of_a = session.numbered_spec(number, |arguments| arguments.data.num_prompts = count)?;
    let mut of_b = Spec {
        base_url: other.server.base_url.clone(),
        headers: other.server.headers.clone(),
        model: other.model.clone(),
        ..of_a.clone()
    };
    of_b.naming.model_id = None;
    let mut reports = [None, None];
    for side in ab_order::order(block) {
        let (spec, label, place) = match side {
            Side::A => (&of_a, "A", 0),
            Side::B => (&of_b, "B", 1),
        };
        let report = session.run(spec, label, &|_| {}, session.stop.clone()).await?;
        if session.stop.is_cancelled() {
            return Ok(None);
        }
        session.printer.status(format_args!(
            "block {} on {label}: mean TTFT {:.1} ms, mean TPOT {:.2} ms{}",
            block + 1,
            report.mean_ttft_ms(),
            report.mean_tpot_ms(),
            block_problems(&report)
        ));
        reports[place] = Some(report);
    }
    let [first, second] = reports;
    Ok(first.zip(second).map(|(first, second)| [first, second]))
}

/// Failures and invalidity of a block.
fn block_problems(report: &Report) -> String {
    let failed = report.failures().into_iter().next();
    let failed = failed.map(|group| format!(", {} failed: {}", report.failed(), group.cause));
    let invalid = sweep::why_invalid(report).map(|why| format!(", not valid: {why}"));
    failed.unwrap_or_default() + &invalid.unwrap_or_default()
}

fn conclude(
    session: &Session<'_>,
    other: &Other,
    pairs: &Pairs,
    done: &[[Report; 2]],
    blocks: usize,
) -> Result<ExitStatus, Failure> {
    let rows = pairs.rows(&session.first.percentiles);
    if !session.arguments.output.json {
        print_changes(&rows, session.printer)?;
    }
    if done.len() < blocks {
        session
            .printer
            .status(format_args!("stopped: {} of {blocks} blocks are complete", done.len()));
    }
    session.printer.status(format_args!(
        "{} requests were answered by both servers; the change is from A to B",
        pairs.len()
    ));
    if pairs.unpaired() > 0 {
        session.printer.error(format_args!(
            "{} requests were not answered by both servers and do not count",
            pairs.unpaired()
        ));
    }
    let detailed = session.arguments.output.save_detailed;
    let entry = |[first, second]: &[Report; 2]| json!({"a": first.to_json(detailed), "b": second.to_json(detailed)});
    let more = [
        (
            "a",
            json!({"base_url": session.first.base_url, "model_id": session.first.model}),
        ),
        ("b", json!({"base_url": other.server.base_url, "model_id": other.model})),
        ("pairs", json!(pairs.len())),
        ("unpaired", json!(pairs.unpaired())),
        ("confidence", json!(0.95)),
        ("measures", compare::to_json(&rows)),
        ("blocks", done.iter().map(entry).collect()),
    ];
    session.finish("against", more)?;
    let has_failed = pairs.unpaired() > 0 || pairs.is_empty();
    let is_stopped = session.stop.is_cancelled();
    Ok(session.arguments.output.exit_status(is_stopped, has_failed))
}
