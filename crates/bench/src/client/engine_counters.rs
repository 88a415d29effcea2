//! Counters of speculative and diffusion decoding from the server's `/metrics`, by the rules of vLLM's client.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::{Method, StatusCode};

use crate::client::http::Server;

/// Timeout of `/metrics`. The run does not wait longer, because the page is optional.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Largest metrics page in bytes. One engine has about 200 KiB.
const MAX_PAGE_BYTES: usize = 16 << 20;

/// The counters at one time, summed over engines. `None` where the server has none of that kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Counters {
    speculation: Option<SpeculationCounters>,
    diffusion: Option<DiffusionCounters>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct SpeculationCounters {
    drafts: i64,
    draft_tokens: i64,
    accepted_tokens: i64,
    accepted_by_position: BTreeMap<i64, i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct DiffusionCounters {
    denoising_steps: i64,
    canvas_positions: i64,
    committed_tokens: i64,
}

/// Speculative decoding over a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Speculation {
    /// Number of drafts.
    pub drafts: i64,
    /// Drafted tokens.
    pub draft_tokens: i64,
    /// Drafted tokens that the model accepted.
    pub accepted_tokens: i64,
    /// Accepted share of the drafted tokens, in percent.
    pub acceptance_rate: f64,
    /// Mean tokens per step, including the model's own token.
    pub acceptance_length: f64,
    /// Share of drafts whose token at each position was accepted.
    pub acceptance_by_position: Vec<f64>,
}

/// Diffusion decoding over a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Diffusion {
    /// Committed tokens per second.
    pub committed_throughput: f64,
    /// Mean denoising steps per canvas.
    pub steps_per_canvas: f64,
    /// Committed tokens per denoising step.
    pub committed_per_step: f64,
    /// Committed tokens.
    pub committed_tokens: i64,
    /// Denoising steps, without the steps that commit.
    pub denoising_steps: f64,
    /// Evaluated canvas positions.
    pub canvas_positions: i64,
}

/// Reads the server's counters. Any failure gives empty counters, because most servers have none.
pub(crate) async fn read(server: &Server) -> Counters {
    let page = server
        .ask(&Method::GET, "/metrics", None, MAX_PAGE_BYTES, TIMEOUT)
        .await;
    match page {
        Ok(page) if page.status == StatusCode::OK => Counters::of(&String::from_utf8_lossy(&page.body)),
        _ => Counters::default(),
    }
}

impl Counters {
    /// Parses a page in Prometheus text format.
    fn of(text: &str) -> Self {
        let mut counters = Self::default();
        for line in text.lines().map(str::trim) {
            let Some((name, value)) = sample(line) else { continue };
            if name.starts_with("vllm:spec_decode") {
                counters.speculation.get_or_insert_default().add(name, line, value);
            } else if name.starts_with("vllm:diffusion") {
                counters.diffusion.get_or_insert_default().add(name, value);
            }
        }
        counters
    }

    /// The difference to `earlier`. `None` if no token was drafted.
    pub(crate) fn speculation_since(&self, earlier: &Self) -> Option<Speculation> {
        let (before, after) = (earlier.speculation.as_ref()?, self.speculation.as_ref()?);
        let drafts = after.drafts - before.drafts;
        let draft_tokens = after.draft_tokens - before.draft_tokens;
        let accepted_tokens = after.accepted_tokens - before.accepted_tokens;
        let mut positions = before.accepted_by_position.clone();
        positions.extend(&after.accepted_by_position);
        let by_position = positions.into_iter().map(|(position, after)| {
            let before = before.accepted_by_position.get(&position).copied().unwrap_or_default();
            (after - before) as f64 / drafts as f64
        });
        (draft_tokens > 0).then(|| Speculation {
            drafts,
            draft_tokens,
            accepted_tokens,
            acceptance_rate: accepted_tokens as f64 / draft_tokens as f64 * 100.0,
            acceptance_length: if drafts > 0 {
                1.0 + accepted_tokens as f64 / drafts as f64
            } else {
                0.0
            },
            acceptance_by_position: if drafts > 0 { by_position.collect() } else { Vec::new() },
        })
    }

    /// The difference to `earlier` in a run of `duration` seconds. `None` if no token was committed.
    pub(crate) fn diffusion_since(&self, earlier: &Self, duration: f64) -> Option<Diffusion> {
        let (before, after) = (earlier.diffusion?, self.diffusion?);
        let steps = after.denoising_steps - before.denoising_steps;
        let canvas_positions = after.canvas_positions - before.canvas_positions;
        let committed_tokens = after.committed_tokens - before.committed_tokens;
        let canvas_length = canvas_positions as f64 / steps as f64;
        let canvases = committed_tokens as f64 / canvas_length;
        // The committing step does not denoise.
        let denoising_steps = steps as f64 - canvases;
        (steps > 0 && committed_tokens > 0).then(|| Diffusion {
            committed_throughput: committed_tokens as f64 / duration,
            steps_per_canvas: denoising_steps / canvases,
            committed_per_step: committed_tokens as f64 / denoising_steps,
            committed_tokens,
            denoising_steps,
            canvas_positions,
        })
    }
}

/// Name and value of a counter sample. Comments, gauges and creation times give `None`.
fn sample(line: &str) -> Option<(&str, i64)> {
    let end = line.find(|character: char| character == '{' || character.is_whitespace())?;
    let name = line[..end].strip_suffix("_total")?;
    let value: f64 = line.rsplit(char::is_whitespace).next()?.parse().ok()?;
    #[expect(clippy::cast_possible_truncation, reason = "a counter is whole, and far below 2^63")]
    value.is_finite().then_some((name, value as i64))
}

impl SpeculationCounters {
    fn add(&mut self, name: &str, line: &str, value: i64) {
        if name.contains("num_drafts") {
            self.drafts += value;
        } else if name.contains("num_draft_tokens") {
            self.draft_tokens += value;
        } else if name.contains("num_accepted_tokens_per_pos") {
            let label = line
                .split_once("position=\"")
                .and_then(|(_, rest)| rest.split_once('"'));
            if let Some(position) = label.and_then(|(position, _)| position.parse().ok()) {
                *self.accepted_by_position.entry(position).or_default() += value;
            }
        } else if name.contains("num_accepted_tokens") {
            self.accepted_tokens += value;
        }
    }
}

impl DiffusionCounters {
    fn add(&mut self, name: &str, value: i64) {
        if name.contains("num_denoising_steps") {
            self.denoising_steps += value;
        } else if name.contains("num_canvas_positions") {
            self.canvas_positions += value;
        } else if name.contains("num_committed_tokens") {
            self.committed_tokens += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "\
        # TYPE vllm:spec_decode_num_drafts_total counter\n\
        vllm:spec_decode_num_drafts_total{engine=\"0\",model_name=\"a b\"} 10.0\n\
        vllm:spec_decode_num_drafts_created{engine=\"0\"} 1.7e9\n\
        vllm:spec_decode_num_draft_tokens_total{engine=\"0\"} 20.0\n\
        vllm:spec_decode_num_accepted_tokens_total{engine=\"0\"} 5.0\n\
        vllm:spec_decode_num_accepted_tokens_per_pos_total{engine=\"0\",position=\"0\"} 4.0\n\
        vllm:spec_decode_num_accepted_tokens_per_pos_total{engine=\"0\",position=\"1\"} 1.0\n";

    #[test]
    fn drafts_are_counted_between_two_pages() {
        let before = Counters::of(BEFORE);
        let after = BEFORE
            .replace("} 10.0", "} 18.0")
            .replace("} 20.0", "} 36.0")
            .replace("} 5.0", "} 13.0")
            .replace("} 4.0", "} 10.0")
            .replace("} 1.0", "} 3.0");
        let speculation = Counters::of(&after).speculation_since(&before).unwrap();
        assert_eq!(
            speculation,
            Speculation {
                drafts: 8,
                draft_tokens: 16,
                accepted_tokens: 8,
                acceptance_rate: 50.0,
                acceptance_length: 2.0,
                acceptance_by_position: vec![0.75, 0.25],
            }
        );
        assert_eq!(before.speculation_since(&before), None);
        assert_eq!(before.speculation_since(&Counters::of("")), None);
    }

    #[test]
    fn diffusion_excludes_committing_steps() {
        let text = |steps, positions, tokens| {
            Counters::of(&format!(
                "vllm:diffusion_num_denoising_steps_total {steps}\nvllm:diffusion_num_canvas_positions_total {positions}\n\
                 vllm:diffusion_num_committed_tokens_total {tokens}\n"
            ))
        };
        let diffusion = text(110, 3200, 650).diffusion_since(&text(10, 0, 10), 2.0).unwrap();
        assert_eq!(
            diffusion,
            Diffusion {
                committed_throughput: 320.0,
                steps_per_canvas: 4.0,
                committed_per_step: 8.0,
                committed_tokens: 640,
                denoising_steps: 80.0,
                canvas_positions: 3200,
            }
        );
    }
}
