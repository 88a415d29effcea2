//! The canary: a real generation through a pair of engines before clients use the pair.
//!
//! It must succeed, its output must equal the decode engine's own within rounding (`output_match`), and the decode
//! engine's counters must show that KV moved. It runs through the same `request::flow` as clients' requests.

mod output_match;
mod prompt;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Response, StatusCode};
use bytes::Bytes;
use http_body_util::BodyExt;
use serde::Deserialize;
use tokio::time::Instant;

use crate::body::document::Document;
use crate::body::serving_mode::GenerationKind;
use crate::error::{ProxyError, RequestStage};
use crate::request::attempt::{HandoffReport, HandoffTimings, Job, new_id};
use crate::request::flow::answer;
use crate::schedule::lease::EngineLease;
use crate::telemetry::metrics::HandoffOutcome;
use crate::telemetry::record::Record;
use crate::upstream::Call;
use crate::{Proxy, Shared};
use output_match::{ALTERNATIVES, CanaryAnswer, OutputMatch};
use prompt::{SHORT_WORDS, ShortPromptRun, long_words, of_words};
use xpyd_base::connector::{DecodeFlow, TransferCounter, TransferUnit};
use xpyd_base::fleet::EngineId;
use xpyd_base::report::one_line;
use xpyd_base::samples::{as_text_format, sum};

/// Tokens to generate.
const TOKENS: u64 = 8;

/// Number of prompts to try if the outputs differ and rounding can be the reason. One equal output proves the pair.
/// Without one, most outputs must begin the same.
const MAX_ATTEMPTS: usize = 5;

/// How long the decode engine's counters can lag behind its answer. On a busy host, metrics come late.
const COUNTER_DEADLINE: Duration = Duration::from_secs(30);

/// Time between two reads of the counters.
const COUNTER_INTERVAL: Duration = Duration::from_millis(100);

/// Which prompts a canary sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CanaryPrompts {
    /// A short prompt only.
    Short,
    /// A short prompt, then a long one that takes several KV blocks and engine steps and finds faults that short
    /// prompts do not show. xpyd skips the long prompt if KV is pushed, because the proxy does not know the size of
    /// LMCache's buffer, or if the model or the time does not allow it.
    ShortAndLong,
}

/// How much KV the decode engine reports to have received.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transferred {
    /// The growth of its counter.
    pub amount: f64,
    /// The unit of the counter.
    pub unit: TransferUnit,
}

impl fmt::Display for Transferred {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            TransferUnit::Bytes => "bytes",
            TransferUnit::Tokens => "tokens",
        };
        write!(formatter, "{:.0} {unit}", self.amount)
    }
}

/// The result of a successful canary.
#[derive(Debug, Clone)]
pub struct CanaryReport {
    /// The prefill and the decode engine.
    pub pair: (EngineId, EngineId),
    /// The KV that the decode engine received.
    pub transferred: Transferred,
    /// From the prefill engine's answer to the decode engine's: notification, transfer and first token.
    pub first_handoff: Duration,
    /// The whole request through the pair.
    pub total: Duration,
}

impl fmt::Display for CanaryReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefill, decode) = &self.pair;
        write!(
            formatter,
            "{prefill} handed {} to {decode} in {:.0} ms, {:.0} ms in all",
            self.transferred,
            self.first_handoff.as_secs_f64() * 1e3,
            self.total.as_secs_f64() * 1e3,
        )
    }
}

/// Why a pair cannot serve clients.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// The generation failed.
    #[error("the generation through `{prefill}` and `{decode}` failed: {reason}")]
    Failed {
        /// The prefill engine.
        prefill: EngineId,
        /// The decode engine.
        decode: EngineId,
        /// The whole chain of errors, or the engine's own answer.
        reason: String,
    },
    /// The decode engine's metrics cannot be read.
    #[error("the metrics of `{engine}` cannot be read: {reason}")]
    Metrics {
        /// The decode engine.
        engine: EngineId,
        /// The whole chain of errors.
        reason: String,
    },
    /// The decode engine's usage shows that it computed the prompt itself.
    #[error("no KV of this prompt moved from `{prefill}` to `{decode}`: `{decode}` computed it by itself")]
    Recomputed {
        /// The prefill engine.
        prefill: EngineId,
        /// The decode engine.
        decode: EngineId,
    },
    /// The output was right, but no counter of the decode engine shows that KV arrived.
    #[error("no KV moved from `{prefill}` to `{decode}`: none of {counters} grew")]
    NothingMoved {
        /// The prefill engine.
        prefill: EngineId,
        /// The decode engine.
        decode: EngineId,
        /// The counters that were watched.
        counters: String,
    },
    /// The KV that arrived does not belong to the prompt.
    #[error(
        "{}`{prefill}` and `{decode}` answer {through:?}, `{decode}` alone {alone:?}: the transferred KV is wrong",
        tokens.map(|tokens| format!("to a prompt of {tokens} tokens ")).unwrap_or_default()
    )]
    Differs {
        /// Tokens of the prompt, if the decode engine reports them.
        tokens: Option<u64>,
        /// The prefill engine.
        prefill: EngineId,
        /// The decode engine.
        decode: EngineId,
        /// The text through the pair.
        through: String,
        /// The decode engine's own.
        alone: String,
    },
}

impl Proxy {
    /// Runs real generations through this pair, before clients use it. The engines must be healthy or ready. The
    /// report is that of the short prompt.
    ///
    /// # Errors
    /// When a generation fails twice, no KV moves, or the output differs from the decode engine's own.
    pub async fn canary(
        &self,
        prefill: &EngineId,
        decode: &EngineId,
        prompts: CanaryPrompts,
    ) -> Result<CanaryReport, CanaryError> {
        let canary = Canary {
            shared: &self.0,
            prefill,
            decode,
        };
        Box::pin(canary.run(prompts)).await
    }
}

/// One prompt, answered through the pair and by the decode engine alone.
struct CanaryAttempt {
    report: CanaryReport,
    through: CanaryAnswer,
    alone: CanaryAnswer,
    /// Tokens of the prompt, if the decode engine reports them.
    tokens: Option<u64>,
}

struct Canary<'run> {
    shared: &'run Arc<Shared>,
    prefill: &'run EngineId,
    decode: &'run EngineId,
}

impl Canary<'_> {
    async fn run(&self, prompts: CanaryPrompts) -> Result<CanaryReport, CanaryError> {
        let short = self.prove(SHORT_WORDS).await?;
        let pulls = !self.shared.settings.connector.notifies();
        if prompts == CanaryPrompts::ShortAndLong
            && pulls
            && let Some(words) = self.long_words(&short).await?
        {
            self.prove(words).await?;
        }
        Ok(short.report)
    }

    /// Words of the long prompt. `None` if no long prompt is possible.
    async fn long_words(&self, short: &CanaryAttempt) -> Result<Option<usize>, CanaryError> {
        let (Some(tokens), Some(model_length)) = (short.tokens, self.model_length().await) else {
            return Ok(None);
        };
        // A second time, because the first request pays for what an engine compiles and allocates late.
        let sent = Instant::now();
        self.alone(&self.body(SHORT_WORDS)).await?;
        let short = ShortPromptRun {
            tokens,
            took: sent.elapsed(),
            model_length,
        };
        Ok(long_words(short, TOKENS))
    }

    /// The context length that both engines report, in tokens. `None` unless both do.
    async fn model_length(&self) -> Option<u64> {
        let mut least = u64::MAX;
        let headers = self.shared.own_headers();
        for engine in [self.prefill, self.decode] {
            let view = Arc::clone(&self.shared.view.borrow());
            let length = self.shared.length_of(view.engine(engine)?, &headers).await?;
            least = least.min(length);
        }
        Some(least)
    }

    /// Repeats a prompt of this many words until the output equals the decode engine's own, or certainly differs.
    async fn prove(&self, words: usize) -> Result<CanaryAttempt, CanaryError> {
        let (mut attempts, mut close) = (0, 0);
        loop {
            let attempt = self.attempt(words).await?;
            let output_match = attempt.through.compare(&attempt.alone);
            tracing::info!(
                prompt_tokens = attempt.tokens,
                through = attempt.through.text,
                alone = attempt.alone.text,
                "canary: {}; {output_match}",
                attempt.report
            );
            attempts += 1;
            close += usize::from(output_match == OutputMatch::NumericallyClose);
            let is_last = attempts == MAX_ATTEMPTS || output_match == OutputMatch::Different;
            let began_alike = attempts == MAX_ATTEMPTS && close > MAX_ATTEMPTS / 2;
            if output_match == OutputMatch::Same || (began_alike && output_match != OutputMatch::Different) {
                return Ok(attempt);
            }
            if is_last {
                return Err(CanaryError::Differs {
                    tokens: attempt.tokens,
                    prefill: self.prefill.clone(),
                    decode: self.decode.clone(),
                    through: attempt.through.text,
                    alone: attempt.alone.text,
                });
            }
        }
    }

    /// One generation through the pair, and the same by the decode engine alone.
    async fn attempt(&self, words: usize) -> Result<CanaryAttempt, CanaryError> {
        let body = self.body(words);
        let counters = self.shared.settings.connector.transfer_counters();
        let before = self.counters(counters).await?;
        let sent = Instant::now();
        let response = self.through(body.clone()).await?;
        let timings = response
            .extensions()
            .get::<HandoffTimings>()
            .copied()
            .unwrap_or_default();
        // The counters also grow with the hand-offs of other prefill engines.
        let handoff_report = response
            .extensions()
            .get::<HandoffReport>()
            .copied()
            .unwrap_or_default();
        if handoff_report.outcome == HandoffOutcome::Recomputed {
            return Err(CanaryError::Recomputed {
                prefill: self.prefill.clone(),
                decode: self.decode.clone(),
            });
        }
        let (through, _) = self.whole(response).await?;
        let total = sent.elapsed();
        let transferred = self.growth(counters, &before).await?;
        let (alone, tokens) = self.alone(&body).await?;
        let report = CanaryReport {
            pair: (self.prefill.clone(), self.decode.clone()),
            transferred,
            first_handoff: timings.handoff + timings.first_byte,
            total,
        };
        Ok(CanaryAttempt {
            report,
            through,
            alone,
            tokens,
        })
    }

    fn body(&self, words: usize) -> Bytes {
        let model = &self.shared.settings.served_model_name;
        let mut body = serde_json::json!({
            "prompt": of_words(words), "temperature": 0, "max_tokens": TOKENS, "ignore_eos": true,
        });
        // Without a name, an engine uses its own model.
        if !model.is_empty() {
            body["model"] = model.as_str().into();
        }
        // With the prefill engine's first token, a request for log-probabilities would go to the decode engine alone.
        if self.shared.settings.connector.decode_flow() == DecodeFlow::Original {
            body["logprobs"] = ALTERNATIVES.into();
        }
        body.to_string().into()
    }

    fn failed(&self, reason: String) -> CanaryError {
        CanaryError::Failed {
            prefill: self.prefill.clone(),
            decode: self.decode.clone(),
            reason,
        }
    }

    async fn through(&self, body: Bytes) -> Result<Response<Body>, CanaryError> {
        // A full proxy proves nothing about the pair, so the canary waits for a place.
        let permit = Arc::clone(&self.shared.admission).acquire_owned().await;
        let permit = permit.map_err(|error| self.failed(error.to_string()))?;
        let record = Arc::new(Record::of_canary(self.shared));
        record.begin_generation(None);
        let job = Job {
            kind: GenerationKind::Completions,
            body,
            headers: self.shared.own_headers(),
            session: None,
            pair: Some((self.prefill.clone(), self.decode.clone())),
            deadlines: self.shared.deadlines(),
            arrived: Instant::now(),
            permit: Arc::new(permit),
            record: Arc::clone(&record),
        };
        answer(self.shared, job)
            .await
            .map(|response| record.answer(response))
            .map_err(|error| self.failed(one_line(&error)))
    }

    fn lease(&self) -> Result<EngineLease, CanaryError> {
        let view = Arc::clone(&self.shared.view.borrow());
        view.engine(self.decode)
            .and_then(|engine| EngineLease::acquire(engine, &self.shared.view))
            .ok_or_else(|| self.failed(format!("`{}` does not run", self.decode)))
    }

    /// The same prompt on the decode engine alone. The salt bypasses caches, which can hold the KV that was handed
    /// over.
    async fn alone(&self, body: &Bytes) -> Result<(CanaryAnswer, Option<u64>), CanaryError> {
        let lease = self.lease()?;
        let salt = format!("\"{}\"", uuid::Uuid::new_v4());
        let edits = [("cache_salt", Some(salt.as_str()))];
        let body = Document::parse(body).map_or_else(|_| body.clone(), |document| document.edited(&edits).into());
        let headers = self.shared.own_headers();
        let id = new_id();
        let call = Call {
            body,
            ..Call::post(GenerationKind::Completions.path(), &headers, &id, Vec::new())
        };
        let step = self.shared.upstream.fetch(&lease.engine, call);
        let answer: Result<_, ProxyError> = lease
            .run(RequestStage::Pass, self.shared.deadlines().decode_idle, step)
            .await;
        let (head, body) = answer.map_err(|error| self.failed(one_line(&error)))?;
        self.read(head.status, &body)
    }

    async fn whole(&self, response: Response<Body>) -> Result<(CanaryAnswer, Option<u64>), CanaryError> {
        let status = response.status();
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| self.failed(one_line(&error)))?.to_bytes();
        self.read(status, &body)
    }

    /// The output, and the tokens of the prompt if the engine reports them.
    fn read(&self, status: StatusCode, body: &[u8]) -> Result<(CanaryAnswer, Option<u64>), CanaryError> {
        #[derive(Deserialize)]
        struct Completion {
            choices: Vec<CanaryAnswer>,
            usage: Option<Usage>,
        }
        #[derive(Deserialize)]
        struct Usage {
            prompt_tokens: u64,
        }
        let completion = serde_json::from_slice::<Completion>(body).ok();
        let parts = completion.map(|completion| (completion.choices.into_iter().next(), completion.usage));
        match parts {
            Some((Some(answer), usage)) if status.is_success() => Ok((answer, usage.map(|usage| usage.prompt_tokens))),
            _ => {
                let beginning: String = String::from_utf8_lossy(body).chars().take(500).collect();
                Err(self.failed(format!("{status}: {beginning}")))
            }
        }
    }

    /// The decode engine's counters, one value each.
    async fn counters(&self, counters: &[TransferCounter]) -> Result<Vec<f64>, CanaryError> {
        let lease = self.lease()?;
        let headers = self.shared.own_headers();
        let call = Call {
            method: Method::GET,
            path: "/metrics",
            headers: &headers,
            request_id: None,
            body: Bytes::new(),
        };
        let step = self.shared.upstream.fetch(&lease.engine, call);
        let answer = lease.run(RequestStage::Pass, COUNTER_DEADLINE, step).await;
        let (_, body) = answer.map_err(|error| CanaryError::Metrics {
            engine: self.decode.clone(),
            reason: one_line(&error),
        })?;
        let text = String::from_utf8_lossy(&body);
        let text = as_text_format(&text);
        if !text
            .lines()
            .any(|line| line.starts_with(|first: char| first.is_ascii_alphabetic()))
        {
            return Err(CanaryError::Metrics {
                engine: self.decode.clone(),
                reason: "the engine exports none: one of its options or variables turns them off".to_owned(),
            });
        }
        if let Some(tokens) = capacity(&text) {
            self.shared.scheduler.set_capacity(&lease.engine, tokens);
        }
        Ok(counters.iter().map(|counter| value(&text, counter)).collect())
    }

    /// Waits until one of the counters has grown.
    async fn growth(&self, counters: &[TransferCounter], before: &[f64]) -> Result<Transferred, CanaryError> {
        let deadline = Instant::now() + COUNTER_DEADLINE;
        loop {
            let after = self.counters(counters).await?;
            let grown = counters
                .iter()
                .zip(before.iter().zip(&after))
                .map(|(counter, (before, after))| (counter.unit, after - before))
                .find(|(_, growth)| *growth > 0.0);
            if let Some((unit, amount)) = grown {
                return Ok(Transferred { amount, unit });
            }
            if Instant::now() >= deadline {
                let names: Vec<_> = counters.iter().map(|counter| format!("`{}`", counter.name)).collect();
                return Err(CanaryError::NothingMoved {
                    prefill: self.prefill.clone(),
                    decode: self.decode.clone(),
                    counters: names.join(", "),
                });
            }
            tokio::time::sleep(COUNTER_INTERVAL).await;
        }
    }
}

/// The capacity of an engine's KV cache in tokens, summed over its engine cores, from `vllm:cache_config_info` of
/// vLLM 0.32. `None` if the engine does not report it.
fn capacity(text: &str) -> Option<u64> {
    let core = |line: &str| {
        let labels = line.strip_prefix("vllm:cache_config_info{")?;
        let number = |name: &str| -> Option<u64> {
            let mut pairs = labels
                .split(',')
                .filter_map(|pair| pair.trim_end_matches('}').split_once('='));
            let value = pairs.find_map(|(key, value)| (key == name).then_some(value))?;
            value.strip_prefix('"')?.split('"').next()?.parse().ok()
        };
        number("block_size")?.checked_mul(number("num_gpu_blocks")?)
    };
    let tokens = text.lines().filter_map(core).reduce(u64::saturating_add);
    tokens.filter(|tokens| *tokens > 0)
}

/// The value of a counter in Prometheus text. An absent counter is 0: vLLM exports some only after their first count.
fn value(text: &str, counter: &TransferCounter) -> f64 {
    let names = [counter.name.to_owned(), format!("{}_total", counter.name)];
    names.iter().map(|name| sum(text, name, counter.label)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kv_cache_size_is_read() {
        let line = |blocks: &str, engine: u8| {
            format!(
                "vllm:cache_config_info{{block_size=\"16\",engine=\"{engine}\",num_cpu_blocks=\"None\",num_gpu_blocks=\"{blocks}\"}} 1.0\n"
            )
        };
        let head = "# TYPE vllm:cache_config_info gauge\n";
        assert_eq!(capacity(&format!("{head}{}", line("100", 0))), Some(1600));
        assert_eq!(capacity(&format!("{}{}", line("100", 0), line("50", 1))), Some(2400));
        assert_eq!(capacity(&line("None", 0)), None);
        assert_eq!(capacity(head), None);
    }

    #[test]
    fn counters_are_read_with_and_without_their_suffix() {
        let text = "# HELP vllm:external_prefix_cache_hits_total x\n\
            vllm:external_prefix_cache_hits_total{engine=\"0\",model_name=\"m\"} 7.0\n\
            vllm:external_prefix_cache_hits_total{engine=\"1\",model_name=\"m\"} 2.0\n\
            vllm:external_prefix_cache_hits_created{engine=\"0\"} 1.7e9\n\
            vllm:prompt_tokens_by_source_total{source=\"local_compute\",engine=\"0\"} 9.0\n\
            vllm:prompt_tokens_by_source_total{engine=\"0\",source=\"external_kv_transfer\"} 4.0\n\
            vllm:nixl_bytes_transferred_sum 1.5e3\n";
        let counter = |name, label| TransferCounter {
            name,
            label,
            unit: TransferUnit::Tokens,
        };
        let read = |name, label| value(text, &counter(name, label)).to_string();
        assert_eq!(read("vllm:external_prefix_cache_hits", None), "9");
        assert_eq!(
            read("vllm:prompt_tokens_by_source", Some("source=\"external_kv_transfer\"")),
            "4"
        );
        assert_eq!(read("vllm:nixl_bytes_transferred_sum", None), "1500");
        assert_eq!(read("vllm:absent", None), "0");
    }
}
