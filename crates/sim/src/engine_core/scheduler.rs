//! The engine core: one loop that prefills prompts one at a time and decodes all running sequences together, on the
//! clock of the timing model.
//!
//! Steps follow an absolute schedule: a late timer delays the output of one step, never the steps after it.

mod cache;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::engine_core::sequence::{Finish, Request, Sequence, SequenceEnd};
use crate::fault::{EveryNth, Fault};
use crate::kv::blocks::BlockPool;
use crate::kv::lmcache::receiver::Receiver;
use crate::kv::lmcache::sender::Sender;
use crate::kv::lmcache_mp::CacheClient;
use crate::kv::nixl::{Leases, Peer, PullError};
use crate::kv::params::{FirstToken, PullParams, Transfer};
use crate::log::{Log, Process};
use crate::metrics::Metrics;
use crate::options::{LoadFailurePolicy, Options};

/// Most sequences per decode step: vLLM's `max_num_seqs`.
const MAX_RUNNING: usize = 256;
/// Tokens between two checks of the queue if steps take no time.
const BURST: usize = 16;

/// The life cycle of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EngineStage {
    /// Serving.
    Serving,
    /// Rejects new requests; running ones continue.
    Draining,
    /// Running requests end now with reason `abort`.
    Aborting,
    /// Running requests end now with an error.
    DrainOver,
    /// The core is dead.
    Dead,
}

/// A command of the API to the core.
#[derive(Debug)]
pub(crate) enum Command {
    /// Generates a sequence.
    Add(Request),
    /// Releases the blocks of a prefill engine, because the request that named them was rejected.
    Release(PullParams),
}

/// Why the core died, as in its log.
#[derive(Debug)]
pub(crate) struct Death(pub(crate) String);

/// The connector's part in the core.
#[derive(Debug)]
pub(crate) enum Connector {
    None,
    Nixl {
        leases: Leases,
        engine_id: String,
        host: String,
        port: u16,
        policy: LoadFailurePolicy,
    },
    Sender(Box<Sender>),
    Receiver(Receiver),
}

/// The parts of the core.
#[derive(Debug)]
pub(crate) struct CoreParts {
    pub(crate) options: Arc<Options>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) log: Log,
    pub(crate) pool: BlockPool,
    pub(crate) connector: Connector,
    /// Its cache server, if it has one.
    pub(crate) cache: Option<CacheClient>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) stage: watch::Receiver<EngineStage>,
    /// Tasks that run as long as the core: sockets and peers.
    pub(crate) background: JoinSet<()>,
}

/// The engine core.
#[derive(Debug)]
pub(crate) struct Core {
    parts: CoreParts,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    loads: JoinSet<Loaded>,
    clock: Instant,
    longest: usize,
    met: HashSet<String>,
    unsent_releases: Vec<PullParams>,
    pull_failures: EveryNth,
    garbled_loads: EveryNth,
    drifts: Option<EveryNth>,
    stall_after: Option<usize>,
    hang_after: Option<u64>,
    /// Number of accepted requests.
    taken: u64,
}

/// The result of a task of the core.
#[derive(Debug)]
enum Loaded {
    Kv(Box<Sequence>, PullParams, Result<Vec<u64>, PullError>),
    Released(String),
    Cached(Box<Sequence>),
    Stored,
    /// The client of a stalled request has disconnected.
    ParkedLeft,
}

/// Corrupts received records if the fault selects them.
fn corrupt(fault: &mut EveryNth, records: &mut [u64]) {
    if let Some(first) = records.first_mut()
        && fault.hits()
    {
        *first ^= 1;
    }
}

impl Core {
    pub(crate) fn new(parts: CoreParts) -> Self {
        let options = &parts.options;
        let pull_failures = EveryNth::new(options.fault(|fault| match fault {
            Fault::FailTransfer(nth) => Some(*nth),
            _ => None,
        }));
        let garbled_loads = EveryNth::new(options.fault(|fault| match fault {
            Fault::GarbleKv(nth) => Some(*nth),
            _ => None,
        }));
        let drifts = options.fault(|fault| match fault {
            Fault::Drift(nth) => Some(EveryNth::new(Some(*nth))),
            _ => None,
        });
        let stall_after = options.fault(|fault| match fault {
            Fault::StallDecode(tokens) => Some(*tokens),
            _ => None,
        });
        let hang_after = options.fault(|fault| match fault {
            Fault::Hang(requests) => Some(*requests),
            _ => None,
        });
        Self {
            parts,
            waiting: VecDeque::new(),
            running: Vec::new(),
            loads: JoinSet::new(),
            clock: Instant::now(),
            longest: 0,
            met: HashSet::new(),
            unsent_releases: Vec::new(),
            pull_failures,
            garbled_loads,
            drifts,
            stall_after,
            hang_after,
            taken: 0,
        }
    }

    /// Runs until the stage ends it.
    pub(crate) async fn run(mut self) -> Result<(), Death> {
        loop {
            let stage = *self.parts.stage.borrow_and_update();
            match stage {
                EngineStage::Serving | EngineStage::Draining => {}
                EngineStage::Aborting | EngineStage::DrainOver | EngineStage::Dead => {
                    self.end_all(stage);
                    return Ok(());
                }
            }
            while let Ok(command) = self.parts.commands.try_recv() {
                self.take(command)?;
            }
            while let Some(loaded) = self.loads.try_join_next() {
                self.take_loaded(loaded)?;
            }
            if self.hang_after.is_some_and(|after| self.taken > after) {
                wedged(&mut self.parts).await?;
                continue;
            }
            self.count();
            if self.can_prefill() {
                self.prefill_next().await?;
            } else if self.running.iter().any(|sequence| !self.is_stalled(sequence)) {
                self.step().await;
            } else {
                self.idle().await?;
            }
        }
    }

    fn is_stalled(&self, sequence: &Sequence) -> bool {
        !sequence.is_abandoned() && self.stall_after.is_some_and(|after| sequence.made >= after)
    }

    /// Waits for something to do.
    async fn idle(&mut self) -> Result<(), Death> {
        // Blocks can become free and stalled clients can disconnect without an event.
        let pause = if self.waiting.is_empty() && self.running.is_empty() {
            Duration::from_hours(1)
        } else {
            Duration::from_millis(20)
        };
        tokio::select! {
            command = self.parts.commands.recv() => match command {
                Some(command) => self.take(command)?,
                None => std::future::pending().await,
            },
            Some(loaded) = self.loads.join_next() => self.take_loaded(loaded)?,
            _ = self.parts.stage.changed() => {}
            () = sleep(pause) => {}
        }
        self.clock = Instant::now();
        Ok(())
    }

    fn count(&self) {
        let metrics = &self.parts.metrics;
        metrics.running.set(self.running.len());
        metrics.deferred.set(self.loads.len());
        metrics.waiting.set(self.waiting.len() + self.loads.len());
    }

    fn take(&mut self, command: Command) -> Result<(), Death> {
        match command {
            Command::Release(params) => {
                let met = self.met.contains(&params.engine_id);
                if met {
                    self.release(params);
                } else {
                    // vLLM makes the handshake at once, but sends the notification with the next step.
                    self.unsent_releases.push(params);
                }
                Ok(())
            }
            Command::Add(request) => {
                self.taken += 1;
                let mut sequence = Sequence::new(request);
                sequence.tie = self.drifts.as_mut().map(EveryNth::hits);
                self.add(sequence)
            }
        }
    }

    fn add(&mut self, mut sequence: Sequence) -> Result<(), Death> {
        for params in std::mem::take(&mut self.unsent_releases) {
            self.release(params);
        }
        let prompt = Arc::clone(&sequence.request.prompt);
        let metrics = Arc::clone(&self.parts.metrics);
        match sequence.request.transfer.clone() {
            Transfer::Fatal => {
                return Err(Death("AssertionError: num_external_tokens == 0".to_owned()));
            }
            Transfer::Park => {
                let message = "Got invalid KVTransferParams. This request will not utilize KVTransfer";
                self.parts
                    .log
                    .line(Process::EngineCore, "WARNING", "pull_scheduler.py:171", message);
                self.loads.spawn(async move {
                    sequence.request.output.closed().await;
                    Loaded::ParkedLeft
                });
                return Ok(());
            }
            Transfer::PushNowhere if self.dies_of_plain_requests() => {
                return Err(Death(
                    "AttributeError: 'NoneType' object has no attribute 'receiver_init_port'".to_owned(),
                ));
            }
            Transfer::Pull(params) => {
                if params.blocks.len() < prompt.len().div_ceil(crate::kv::blocks::BLOCK_TOKENS) {
                    return Err(Death(
                        "AssertionError: assert num_decode_blocks <= len(prefill_group)".to_owned(),
                    ));
                }
                metrics.external_queries.add(prompt.len());
                self.pull(sequence, params);
                return Ok(());
            }
            Transfer::Retrieve(tag) => self.retrieve(&mut sequence, &tag),
            Transfer::None | Transfer::Hold | Transfer::Push(..) | Transfer::PushNowhere => {}
        }
        self.look_up(sequence);
        Ok(())
    }

    fn dies_of_plain_requests(&self) -> bool {
        !self.parts.options.faults.contains(&Fault::SurvivePlainRequests)
            && matches!(&self.parts.connector, Connector::Sender(sender) if !sender.tolerates_plain_requests())
    }

    fn pull(&mut self, sequence: Sequence, params: PullParams) {
        let met = self.met.contains(&params.engine_id);
        let (model, preset) = (self.parts.options.model.clone(), self.parts.options.preset);
        let fails = self.pull_failures.hits();
        let tokens = sequence.request.prompt.len();
        self.loads.spawn(async move {
            let result = async {
                let peer = Peer::reach(&params, &model, met, &preset).await?;
                if fails {
                    return Err(PullError::Disconnected);
                }
                peer.fetch(&params, tokens, &preset).await
            }
            .await;
            Loaded::Kv(Box::new(sequence), params, result)
        });
    }

    fn release(&mut self, params: PullParams) {
        let met = self.met.contains(&params.engine_id);
        let (model, preset) = (self.parts.options.model.clone(), self.parts.options.preset);
        self.loads.spawn(async move {
            if let Ok(mut peer) = Peer::reach(&params, &model, met, &preset).await {
                // If it is lost, the lease expires.
                drop(peer.done(&params).await);
            }
            Loaded::Released(params.engine_id)
        });
    }

    fn take_loaded(&mut self, loaded: Result<Loaded, tokio::task::JoinError>) -> Result<(), Death> {
        let loaded = loaded.map_err(|error| Death(error.to_string()))?;
        match loaded {
            Loaded::ParkedLeft => return Err(Death("KeyError: 'remote_host'".to_owned())),
            Loaded::Stored => {}
            Loaded::Cached(sequence) => {
                self.parts.metrics.external_hits.add(sequence.loaded.len());
                self.waiting.push_back(*sequence);
            }
            Loaded::Released(engine_id) => {
                self.met.insert(engine_id);
            }
            Loaded::Kv(mut sequence, params, Ok(records)) => {
                let metrics = &self.parts.metrics;
                metrics.external_hits.add(records.len());
                let preset = &self.parts.options.preset;
                let bytes = records.len() as u64 * preset.kv_bytes_per_token;
                metrics.transferred(bytes, preset.transfer(records.len()));
                sequence.cached_tokens = params.cached_tokens.unwrap_or(records.len());
                sequence.loaded = records;
                corrupt(&mut self.garbled_loads, &mut sequence.loaded);
                self.met.insert(params.engine_id);
                self.waiting.push_back(*sequence);
            }
            Loaded::Kv(sequence, _, Err(error)) => self.take_failed_load(*sequence, &error),
        }
        Ok(())
    }

    fn take_failed_load(&mut self, mut sequence: Sequence, error: &PullError) {
        self.parts.metrics.failed_transfers.add(1);
        let message = format!("NIXL transfer failure for request {}: {error}", sequence.request.id);
        self.parts.log.error("base_worker.py:2870", &message);
        let recompute = matches!(
            self.parts.connector,
            Connector::Nixl {
                policy: LoadFailurePolicy::Recompute,
                ..
            }
        );
        if recompute {
            self.waiting.push_back(sequence);
            return;
        }
        let message = "Failing 1 request(s) due to KV load failure (failure_policy=fail)";
        self.parts.log.error("scheduler.py:3417", message);
        self.parts.metrics.finished("error");
        send(&mut sequence, SequenceEnd::Failed);
    }

    fn can_prefill(&self) -> bool {
        self.running.len() < MAX_RUNNING
            && self.waiting.front().is_some_and(|next| {
                next.is_abandoned()
                    || self.parts.pool.usage() < 1.0 - next.request.prompt.len() as f64 / self.pool_tokens()
            })
    }

    fn pool_tokens(&self) -> f64 {
        (self.parts.pool.total() * crate::kv::blocks::BLOCK_TOKENS) as f64
    }

    /// Prefills the next prompt, or the rest of it.
    async fn prefill_next(&mut self) -> Result<(), Death> {
        let Some(mut sequence) = self.waiting.pop_front() else {
            return Ok(());
        };
        if sequence.is_abandoned() {
            self.parts.metrics.finished("abort");
            return Ok(());
        }
        let Some(blocks) = self.parts.pool.reserve(sequence.request.prompt.len()) else {
            self.waiting.push_front(sequence);
            self.step().await;
            return Ok(());
        };
        sequence.scheduled = Some(Instant::now());
        let prompt = sequence.request.prompt.len();
        let uncomputed = sequence.uncomputed();
        let metrics = &self.parts.metrics;
        metrics.prompt_tokens.add(prompt);
        metrics.computed_tokens.add(prompt - sequence.loaded.len().min(prompt));
        let transferred = uncomputed == 1 && !sequence.loaded.is_empty();
        if !transferred {
            let duration = self.parts.options.preset.prefill(uncomputed, self.longest);
            self.longest = self.longest.max(uncomputed);
            self.pass(duration).await;
        }
        let records = sequence.prefill();
        self.store(&sequence, &records);
        blocks.write(&records);
        sequence.blocks = Some(blocks);
        if !self.push(&sequence, &records).await? || sequence.is_abandoned() {
            self.parts.metrics.finished("abort");
            return Ok(());
        }
        // The last token of a transferred prompt is computed with the next step; a computed prompt has its first token.
        if transferred || self.advance(&mut sequence) {
            self.running.push(sequence);
        }
        Ok(())
    }

    /// Passes the KV of a prefilled prompt to LMCache's sender. False if the engine ended meanwhile.
    async fn push(&mut self, sequence: &Sequence, records: &[u64]) -> Result<bool, Death> {
        let parts = &mut self.parts;
        let (Transfer::Push(spec, _, tag), Connector::Sender(sender)) =
            (&sequence.request.transfer, &mut parts.connector)
        else {
            return Ok(true);
        };
        if parts.options.chunked_prefill && records.len() > parts.options.step_tokens() as usize {
            // LMCache only transfers a prompt that is prefilled in one step, and reports nothing.
            return Ok(true);
        }
        let meeting = sender.meet(spec, &mut parts.background);
        tokio::select! {
            met = tokio::time::timeout(parts.options.step_deadline, meeting) => match met {
                Ok(Ok(())) => {
                    sender.push(spec, tag, &sequence.request.prompt, records);
                    return Ok(true);
                }
                Ok(Err(error)) => {
                    let message = xpyd_base::report::one_line(&error);
                    parts.log.line(Process::Worker, "ERROR", "multiproc_executor.py:1040", &message);
                }
                Err(_) => {}
            },
            () = ended(&mut parts.stage) => return Ok(false),
        }
        wedged(parts).await.map(|()| false)
    }

    /// One decode step of all running sequences.
    async fn step(&mut self) {
        let context = self.running.iter().map(Sequence::context).sum();
        let preset = &self.parts.options.preset;
        let rounds = if preset.steps_take_no_time() { BURST } else { 1 };
        self.pass(preset.step(self.running.len(), context)).await;
        let mut running = std::mem::take(&mut self.running);
        for _ in 0..rounds {
            running.retain_mut(|sequence| self.is_stalled(sequence) || self.advance(sequence));
            if running.is_empty() {
                break;
            }
        }
        self.running = running;
    }

    /// Waits on the engine's schedule.
    async fn pass(&mut self, duration: Duration) {
        if duration.is_zero() {
            tokio::task::yield_now().await;
            return;
        }
        self.clock += duration;
        sleep_until(self.clock).await;
    }

    /// Generates one token of a sequence. False if it has ended.
    fn advance(&self, sequence: &mut Sequence) -> bool {
        if sequence.is_abandoned() {
            self.parts.metrics.finished("abort");
            return false;
        }
        self.parts.metrics.generation_tokens.add(1);
        let Some(mut finish) = sequence.advance() else {
            if let Some(output) = sequence.report(None) {
                // The channel has room for every token; it fails only if the client is gone.
                return sequence.request.output.try_send(output).is_ok();
            }
            return true;
        };
        self.parts.metrics.finished(finish.reason);
        if let Some(times) = &finish.times {
            self.parts.metrics.observe_request(times.queue, times.first_token);
        }
        finish.kv_transfer_params = self.answer_params(sequence, &finish);
        send(sequence, SequenceEnd::Finished(finish));
        false
    }

    /// The `kv_transfer_params` of the answer. Blocks for a decode engine get their lease here.
    fn answer_params(&self, sequence: &mut Sequence, finish: &Finish) -> Value {
        match (&self.parts.connector, &sequence.request.transfer) {
            (
                Connector::Nixl {
                    leases,
                    engine_id,
                    host,
                    port,
                    ..
                },
                Transfer::Hold,
            ) => {
                let Some(blocks) = sequence.blocks.take() else {
                    return Value::Null;
                };
                let params = json!({
                    "do_remote_prefill": true,
                    "do_remote_decode": false,
                    "remote_block_ids": [blocks.ids()],
                    "remote_engine_id": engine_id,
                    "remote_request_id": sequence.request.id,
                    "remote_host": host,
                    "remote_port": port,
                    "tp_size": self.parts.options.tensor_parallel_size,
                    "dcp_size": 1,
                    "pp_size": 1,
                    "remote_num_tokens": sequence.request.prompt.len(),
                    "remote_blocks_expiry_time": null,
                    "transfer_mode": "pull",
                    "remote_prefill_cached_tokens": finish.cached_tokens,
                    "remote_registration_generation": 0,
                });
                leases.hold(&sequence.request.id, blocks);
                params
            }
            (Connector::Sender(_), Transfer::Push(_, FirstToken::Told, _)) => sequence
                .first_token()
                .map_or(Value::Null, |token| json!({"first_tok": token})),
            _ => Value::Null,
        }
    }

    fn end_all(&mut self, stage: EngineStage) {
        let all = self.running.drain(..).chain(self.waiting.drain(..));
        for mut sequence in all {
            let end = if stage == EngineStage::Aborting {
                self.parts.metrics.finished("abort");
                SequenceEnd::Finished(sequence.finish("abort", Value::Null))
            } else {
                SequenceEnd::Failed
            };
            send(&mut sequence, end);
        }
    }
}

/// Sends the end of a sequence. Ignored if the client is gone.
fn send(sequence: &mut Sequence, end: SequenceEnd) {
    if let Some(output) = sequence.report(Some(end)) {
        drop(sequence.request.output.try_send(output));
    }
}

/// Returns when running requests must end.
async fn wedged(parts: &mut CoreParts) -> Result<(), Death> {
    tokio::select! {
        () = sleep(parts.options.step_deadline) => Err(Death("RPC call to execute_model timed out".to_owned())),
        () = ended(&mut parts.stage) => Ok(()),
    }
}

async fn ended(stage: &mut watch::Receiver<EngineStage>) {
    let over = stage
        .wait_for(|stage| !matches!(stage, EngineStage::Serving | EngineStage::Draining))
        .await;
    drop(over);
}
