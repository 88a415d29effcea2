//! The start of a simulated engine as shown in its log: vLLM 0.32's lines in vLLM's order, spread over the preset's
//! time.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::fault::Phase;
use crate::log::{Log, Process};
use crate::options::Options;
use crate::{SimError, VLLM_VERSION};

/// Number of checkpoint shards in the log.
const SHARDS: u32 = 4;

/// The clock of a start.
#[derive(Debug)]
pub(crate) struct Startup<'options> {
    options: &'options Options,
    log: &'options Log,
    began: Instant,
    extra: Duration,
}

impl<'options> Startup<'options> {
    /// Starts the clock.
    pub(crate) fn begin(options: &'options Options, log: &'options Log) -> Self {
        Self {
            options,
            log,
            began: Instant::now(),
            extra: Duration::ZERO,
        }
    }

    /// Waits until this share of the start, 0 to 1, has passed.
    async fn reach(&self, share: f64) {
        let whole = Duration::from_secs_f64(self.options.preset.start);
        sleep_until(self.began + self.extra + whole.mul_f64(share)).await;
    }

    /// Enters a phase, or fails or hangs at it.
    async fn enter(&self, phase: Phase, share: f64) -> Result<(), SimError> {
        self.reach(share).await;
        if self.options.freezes_at(phase) {
            std::future::pending::<()>().await;
        }
        if !self.options.dies_at(phase) {
            return Ok(());
        }
        self.log.error("core.py:1512", "EngineCore failed to start.");
        self.log.error("core.py:1512", "Traceback (most recent call last):");
        self.log
            .error("core.py:1512", "RuntimeError: fault injected at this phase");
        self.log.raw(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}\n",
        );
        Err(SimError::Fault(phase))
    }

    /// From the beginning to the engine core.
    pub(crate) async fn read_config(&self) -> Result<(), SimError> {
        let (options, api) = (self.options, Process::ApiServer);
        if let Some(path) = options.dies_with_log().filter(|path| path.exists()) {
            let text = fs_err::read(path).map_err(SimError::LastWords)?;
            self.log.raw(&String::from_utf8_lossy(&text));
            return Err(SimError::Fault(Phase::Config));
        }
        self.reach(0.05).await;
        let banner = format!(" ▄▄ ▄█ █     █     █ ▀▄▀ █  version {VLLM_VERSION}");
        self.log.info(api, "api_utils.py:347", &banner);
        let banner = format!("  █▄█▀ █     █     █     █  model   {}", options.model);
        self.log.info(api, "api_utils.py:347", &banner);
        let arguments = format!(
            "non-default args: {{'model_tag': '{}', 'host': '{}', 'port': {}, 'max_model_len': {}}}",
            options.model, options.host, options.port, options.max_model_len
        );
        self.log.info(api, "api_utils.py:286", &arguments);
        if !options.ignored.is_empty() {
            let text = format!(
                "simulated: these options change nothing here: {}",
                options.ignored.join(", ")
            );
            self.log.line(api, "WARNING", "api_utils.py:286", &text);
        }
        self.enter(Phase::Config, 0.1).await?;
        self.log
            .info(api, "model.py:733", "Resolved architecture: LlamaForCausalLM");
        let length = format!("Using max model len {}", options.max_model_len);
        self.log.info(api, "model.py:2152", &length);
        if options
            .kv_transfer
            .as_ref()
            .is_some_and(|config| config.children().iter().any(crate::KvTransferConfig::is_nixl))
        {
            self.log.info(api, "nixl_utils.py:72", "NIXL is available");
        }
        self.enter(Phase::Engine, 0.2).await
    }

    /// From the engine core to the KV cache.
    pub(crate) async fn load(&mut self) -> Result<(), SimError> {
        let (options, core, worker) = (self.options, Process::EngineCore, Process::Worker);
        let engine = format!(
            "Initializing a V1 LLM engine (v{VLLM_VERSION}) with config: model='{0}', tokenizer='{0}', \
             max_seq_len={1}, tensor_parallel_size={2}",
            options.model, options.max_model_len, options.tensor_parallel_size
        );
        self.log.info(core, "core.py:133", &engine);
        self.enter(Phase::Workers, 0.35).await?;
        for rank in 0..options.tensor_parallel_size {
            let joined = format!(
                "world_size={} rank={rank} local_rank={rank} backend=nccl",
                options.tensor_parallel_size
            );
            self.log.info(worker, "parallel_state.py:1906", &joined);
        }
        self.enter(Phase::Weights, 0.45).await?;
        let loading = format!("Starting to load model {}...", options.model);
        self.log.info(worker, "gpu_model_runner.py:5100", &loading);
        let slow = options.extra_start();
        for shard in 0..=SHARDS {
            self.extra = slow.mul_f64(f64::from(shard) / f64::from(SHARDS));
            self.reach(0.45 + 0.25 * f64::from(shard) / f64::from(SHARDS)).await;
            let percent = shard * 100 / SHARDS;
            self.log.raw(&format!(
                "\rLoading safetensors checkpoint shards: {percent:>3}% Completed | {shard}/{SHARDS} [00:00<00:00,  9.00it/s]"
            ));
        }
        self.log.raw("\n");
        let took = self.began.elapsed().as_secs_f64();
        let weights = format!("Loading weights took {took:.2} seconds");
        self.log.info(worker, "default_loader.py:501", &weights);
        let memory = format!("Model loading took 14.99 GiB memory and {took:.6} seconds");
        self.log.info(worker, "gpu_model_runner.py:5150", &memory);
        if !options.enforce_eager {
            self.log.info(worker, "monitor.py:20", "Starting torch.compile");
            self.log
                .info(worker, "monitor.py:40", "torch.compile took 0.50 s in total");
        }
        self.enter(Phase::KvCache, 0.78).await?;
        let gibibytes =
            f64::from(options.preset.kv_cache_tokens) * options.preset.kv_bytes_per_token as f64 / f64::from(1 << 30);
        let memory = format!("Available KV cache memory: {gibibytes:.2} GiB");
        self.log.info(worker, "gpu_worker.py:760", &memory);
        let size = format!(
            "GPU KV cache size: {} tokens, Maximum concurrency for {} tokens per request: {:.2}x",
            thousands(options.preset.kv_cache_tokens),
            thousands(options.max_model_len),
            f64::from(options.preset.kv_cache_tokens) / f64::from(options.max_model_len)
        );
        self.log.info(core, "kv_cache_utils.py:2327", &size);
        if !options.enforce_eager {
            for percent in [0, 50, 100] {
                self.log
                    .raw(&format!("\rCapturing CUDA graphs (decode, FULL): {percent:>3}%|"));
            }
            self.log.raw("\n");
            let captured = "Graph capturing finished in 1 secs, took 0.60 GiB";
            self.log.info(worker, "gpu_model_runner.py:6657", captured);
        }
        self.enter(Phase::Warmup, 0.88).await
    }

    /// Logs the connector.
    pub(crate) fn connector(&self, name: &str, engine_id: &str) {
        let created = format!("Creating v1 connector with name: {name} and engine_id: {engine_id}");
        self.log.info(Process::Worker, "factory.py:62", &created);
        let registered = "Registering KV_Caches. use_mla: False, kv_buffer_device: cuda, use_host_buffer: False";
        self.log.info(Process::Worker, "base_worker.py:1416", registered);
    }

    /// From the ready engine core to the ready server.
    pub(crate) async fn open(&self, address: std::net::SocketAddr) -> Result<(), SimError> {
        let api = Process::ApiServer;
        let took = self.began.elapsed().as_secs_f64();
        let ready = format!("init engine (profile, create kv cache, warmup model) took {took:.2} s");
        self.log.info(Process::EngineCore, "core.py:402", &ready);
        self.enter(Phase::Server, 0.95).await?;
        self.log.info(api, "entry.py:136", "Supported tasks: ['generate']");
        let starting = format!("Starting vLLM server on http://{address}");
        self.log.info(api, "entry.py:140", &starting);
        self.log.info(api, "launcher.py:186", "Available routes are:");
        for route in [
            "/health, Methods: GET",
            "/v1/models, Methods: GET",
            "/v1/completions, Methods: POST",
        ] {
            self.log.info(api, "launcher.py:195", &format!("Route: {route}"));
        }
        self.log
            .raw(&format!("INFO:     Started server process [{}]\n", std::process::id()));
        self.log.raw("INFO:     Waiting for application startup.\n");
        self.reach(1.0).await;
        Ok(())
    }
}

/// `524,288`, as Python's `,` format.
fn thousands(number: u32) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_as_in_vllms_log() {
        assert_eq!(thousands(524_288), "524,288");
        assert_eq!(thousands(4096), "4,096");
        assert_eq!(thousands(100), "100");
    }
}
