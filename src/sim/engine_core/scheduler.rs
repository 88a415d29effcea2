//! The engine core: one loop that prefills prompts one at a time and decodes all running sequences together, on the
//! clock of the timing model.
//!
//! Steps lie on an absolute schedule: a timer that fires late delays one step's news, never the steps after it.

mod cache;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::sim::engine_core::sequence::{End, Finish, Request, Sequence};
use crate::sim::fault::{EveryNth, Fault};
use crate::sim::kv::blocks::BlockPool;
use crate::sim::kv::lmcache::receiver::Receiver;
use crate::sim::kv::lmcache::sender::Sender;
use crate::sim::kv::lmcache_mp::CacheClient;
use crate::sim::kv::nixl::{Leases, Peer, PullError};
use crate::sim::kv::params::{FirstToken, PullParams, Transfer};
use crate::sim::log::{Log, Process};
use crate::sim::metrics::Metrics;
use crate::sim::options::{LoadFailurePolicy, Options};

/// Sequences that one step decodes at most: vLLM's `max_num_seqs`.
const MAX_RUNNING: usize = 256;
/// Tokens made between two looks at the queue when steps take no time.
const BURST: usize = 16;

/// Where an engine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It serves.
    Serving,
    /// It takes no new request; those running go on.
    Draining,
    /// What runs ends now, with reason `abort`.
    Aborting,
    /// What runs ends now, with an error.
    DrainOver,
    /// The core is dead.
    Dead,
}

/// What the API asks of the core.
#[derive(Debug)]
pub(crate) enum Command {
    /// Generate.
    Add(Request),
    /// Tell a prefill engine that its blocks are not wanted: a request that carried them was refused.
    Release(PullParams),
}

/// Why the core died, in the words of its log.
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

/// What the core is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) options: Arc<Options>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) log: Log,
    pub(crate) pool: BlockPool,
    pub(crate) connector: Connector,
    /// Its cache server, if it has one.
    pub(crate) cache: Option<CacheClient>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) stage: watch::Receiver<Stage>,
    /// Tasks that live as long as the core: sockets and their peers.
    pub(crate) background: JoinSet<()>,
}

/// The engine core.
#[derive(Debug)]
pub(crate) struct Core {
    parts: Parts,
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
    /// Requests taken so far.
    taken: u64,
}

/// What a task of the core brought.
#[derive(Debug)]
enum Loaded {
    Kv(Box<Sequence>, PullParams, Result<Vec<u64>, PullError>),
    Released(String),
    Cached(Box<Sequence>),
    Stored,
    /// The client of a request that could never be scheduled has left.
    ParkedLeft,
}

/// Changes what arrived, if the fault hits it.
fn garble(fault: &mut EveryNth, records: &mut [u64]) {
    if let Some(first) = records.first_mut()
        && fault.hits()
    {
        *first ^= 1;
    }
}

impl Core {
    pub(crate) fn new(parts: Parts) -> Self {
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

    /// Works until the stage says that it is over.
    pub(crate) async fn run(mut self) -> Result<(), Death> {
        loop {
            let stage = *self.parts.stage.borrow_and_update();
            match stage {
                Stage::Serving | Stage::Draining => {}
                Stage::Aborting | Stage::DrainOver | Stage::Dead => {
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
        // Blocks may come free, and stalled clients may leave, without a word.
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
                    // vLLM makes the handshake at once, but the notification leaves with the next step only.
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
                if params.blocks.len() < prompt.len().div_ceil(crate::sim::kv::blocks::BLOCK_TOKENS) {
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
                // If it is lost, the lease ends by itself.
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
                garble(&mut self.garbled_loads, &mut sequence.loaded);
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
        send(&mut sequence, End::Failed);
    }

    fn can_prefill(&self) -> bool {
        self.running.len() < MAX_RUNNING
            && self.waiting.front().is_some_and(|next| {
                next.is_abandoned()
                    || self.parts.pool.usage() < 1.0 - next.request.prompt.len() as f64 / self.pool_tokens()
            })
    }

    fn pool_tokens(&self) -> f64 {
        (self.parts.pool.total() * crate::sim::kv::blocks::BLOCK_TOKENS) as f64
    }

    /// Prefills the next prompt, or what is left of it.
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
        // The last token of a transferred prompt is computed with the next step; a computed one has its first token.
        if transferred || self.advance(&mut sequence) {
            self.running.push(sequence);
        }
        Ok(())
    }

    /// Hands the KV of a prefilled prompt to LMCache's sender. False when the engine ended meanwhile.
    async fn push(&mut self, sequence: &Sequence, records: &[u64]) -> Result<bool, Death> {
        let parts = &mut self.parts;
        let (Transfer::Push(spec, _, tag), Connector::Sender(sender)) =
            (&sequence.request.transfer, &mut parts.connector)
        else {
            return Ok(true);
        };
        if parts.options.chunked_prefill && records.len() > parts.options.step_tokens() as usize {
            // LMCache transfers only a prompt that is prefilled in one step. Nobody is told.
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
                    let message = crate::report::one_line(&error);
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

    /// Lets time pass on the engine's schedule.
    async fn pass(&mut self, duration: Duration) {
        if duration.is_zero() {
            tokio::task::yield_now().await;
            return;
        }
        self.clock += duration;
        sleep_until(self.clock).await;
    }

    /// Makes one token of a sequence. False when it is over.
    fn advance(&self, sequence: &mut Sequence) -> bool {
        if sequence.is_abandoned() {
            self.parts.metrics.finished("abort");
            return false;
        }
        self.parts.metrics.generation_tokens.add(1);
        let Some(mut finish) = sequence.advance() else {
            if let Some(output) = sequence.report(None) {
                // The channel has room for every token; it fails only when the client is gone.
                return sequence.request.output.try_send(output).is_ok();
            }
            return true;
        };
        self.parts.metrics.finished(finish.reason);
        if let Some(times) = &finish.times {
            self.parts.metrics.took(times.queue, times.first_token);
        }
        finish.kv_transfer_params = self.answer_params(sequence, &finish);
        send(sequence, End::Finished(finish));
        false
    }

    /// `kv_transfer_params` of the answer. Blocks that a decode engine is to fetch get their lease here.
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

    fn end_all(&mut self, stage: Stage) {
        let all = self.running.drain(..).chain(self.waiting.drain(..));
        for mut sequence in all {
            let end = if stage == Stage::Aborting {
                self.parts.metrics.finished("abort");
                End::Finished(sequence.finish("abort", Value::Null))
            } else {
                End::Failed
            };
            send(&mut sequence, end);
        }
    }
}

/// Tells the end of a sequence. Nobody listens when the client is gone.
fn send(sequence: &mut Sequence, end: End) {
    if let Some(output) = sequence.report(Some(end)) {
        drop(sequence.request.output.try_send(output));
    }
}

/// Returns once what runs is to end.
/// The worker does not answer, and all that waits waits with it: until the end, or until the core gives it up.
async fn wedged(parts: &mut Parts) -> Result<(), Death> {
    tokio::select! {
        () = sleep(parts.options.step_deadline) => Err(Death("RPC call to execute_model timed out".to_owned())),
        () = ended(&mut parts.stage) => Ok(()),
    }
}

async fn ended(stage: &mut watch::Receiver<Stage>) {
    let over = stage
        .wait_for(|stage| !matches!(stage, Stage::Serving | Stage::Draining))
        .await;
    drop(over);
}
