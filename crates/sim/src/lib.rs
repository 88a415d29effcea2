//! The simulated engine: a server with the external behaviour of `vllm serve`.
//!
//! It reads the same arguments, variables and files, so a launch that is invalid for vLLM is invalid here. Routes,
//! errors, log lines, metrics, process tree and signals are those of vLLM 0.32. KV really moves between engines over
//! ZeroMQ, and the tokens depend on it. Times come from a model. It knows nothing of fleets, plans or proxies.

mod api;
mod engine_core;
mod fault;
mod kv;
mod log;
mod metrics;
mod null;
mod options;
mod process;
mod startup;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt as _;
use tokio::net::{TcpSocket, lookup_host};
use tokio::signal::unix::SignalKind;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

pub use self::engine_core::timing::{H100_LLAMA_3_1_8B, INSTANT, PRESETS, Preset};
pub use self::kv::lmcache::ConfigError;
pub use self::kv::lmcache_mp::CacheServer;
pub use fault::{Fault, FaultError, Phase};
pub use log::LogTarget;
pub use null::{COMPLETION as NULL_COMPLETION, NullEngine};
pub use options::{
    ExtraConfig, KvRole, KvTransferConfig, LoadFailurePolicy, Options, OptionsError, ProcessKind, STEP_DEADLINE,
};

use self::engine_core::scheduler::{Core, CoreParts, Death, EngineStage};
use self::kv::connector::ConnectorHandle;
use api::Api;
use log::{Log, Process};
use metrics::Metrics;
use process::Children;
use startup::Startup;
use xpyd_base::report::ExitStatus;
use xpyd_base::signals::SignalListener;

/// The version of vLLM that is simulated.
pub(crate) const VLLM_VERSION: &str = "0.33.0";

/// Most requests queued between the API and the core.
const COMMANDS: usize = 4096;
/// Time for which `/health` answers 503 after the core has died.
const DEAD_BUT_ANSWERING: Duration = Duration::from_millis(50);
/// Time for connections to close at the end.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// Why a simulated engine cannot serve. vLLM exits with 1 in all these cases.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The HTTP address cannot be bound.
    #[error("cannot listen on `{address}`")]
    Bind {
        /// Host and port.
        address: String,
        /// The system error.
        #[source]
        source: std::io::Error,
    },
    /// The side channel cannot be bound.
    #[error("cannot bind the NIXL side channel on `{address}`")]
    SideChannel {
        /// Host and port.
        address: String,
        /// The system error.
        #[source]
        source: std::io::Error,
    },
    /// The cache server's socket cannot be bound.
    #[error("cannot bind the cache server on `{0}`")]
    Cache(String, #[source] std::io::Error),
    /// The cache server is too small for one chunk.
    #[error("size_gb must provide room for one chunk, and is {0}")]
    CacheSize(f64),
    /// The engine's cache server does not answer.
    #[error("LMCache server at {0} does not answer")]
    NoCache(String),
    /// LMCache's file is invalid.
    #[error("cannot start LMCache")]
    Lmcache(#[source] ConfigError),
    /// Unknown connector.
    #[error("unsupported connector type: `{0}`")]
    Connector(String),
    /// Prefills without chunking must fit into one step.
    #[error("`max_num_batched_tokens` ({step}) is smaller than `max_model_len` ({model})")]
    StepTooSmall {
        /// Tokens of a step.
        step: u32,
        /// The model's length.
        model: u32,
    },
    /// The log of a failed start cannot be read.
    #[error(transparent)]
    LastWords(std::io::Error),
    /// The longest prompt must fit into the KV cache.
    #[error("No available memory for the cache blocks: {holds} tokens fit, `max_model_len` is {model}")]
    KvCache {
        /// Tokens that fit.
        holds: u32,
        /// The model's length.
        model: u32,
    },
    /// A system call for signals or processes failed.
    #[error("cannot {0}")]
    System(&'static str, #[source] std::io::Error),
    /// A fault stopped the start.
    #[error("the start died at phase {0:?}, as the fault says")]
    Fault(Phase),
}

/// The addresses of a serving engine, with the ports that the system chose for 0.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// The OpenAI API.
    pub http: SocketAddr,
    /// LMCache's handshake ports of a decode engine, in rank order.
    pub lmcache_init_ports: Vec<u16>,
    /// LMCache's allocation ports of a decode engine, in rank order.
    pub lmcache_alloc_ports: Vec<u16>,
}

/// Runs one process of an engine until its end. The API server runs until a signal, or until the engine dies.
///
/// # Errors
/// When the start fails.
pub async fn run(options: Options) -> Result<ExitStatus, SimError> {
    match options.process {
        ProcessKind::ApiServer => serve_logged(options, None).await,
        ProcessKind::EngineCore => process::engine_core(&options)
            .await
            .map(|()| ExitStatus::Success)
            .map_err(|error| SimError::System("run workers", error)),
        ProcessKind::Worker => process::worker(&options)
            .await
            .map(|()| ExitStatus::Success)
            .map_err(|error| SimError::System("wait for signals", error)),
    }
}

/// As [`run`] for the API server; reports its addresses once it serves. For engines within one process.
///
/// # Errors
/// When the start fails.
pub async fn run_telling(options: Options, ready: oneshot::Sender<Addresses>) -> Result<ExitStatus, SimError> {
    serve_logged(options, Some(ready)).await
}

async fn serve_logged(options: Options, ready: Option<oneshot::Sender<Addresses>>) -> Result<ExitStatus, SimError> {
    let log = Log::new(options.log);
    let result = Box::pin(serve(options, &log, ready)).await;
    if let Err(error) = &result {
        let message = xpyd_base::report::one_line(error);
        log.raw(&format!(
            "Traceback (most recent call last):\nRuntimeError: {message}\n"
        ));
    }
    result
}

async fn serve(options: Options, log: &Log, ready: Option<oneshot::Sender<Addresses>>) -> Result<ExitStatus, SimError> {
    let mut signals = Signals::listen(options.ignores_sigterm())?;
    let options = Arc::new(options);
    let socket = bind(&options).await?;
    let mut children = Children::new(&options);
    let started = tokio::select! {
        started = start(&options, log, socket, &mut children) => Some(started),
        () = signals.next() => None,
    };
    let engine = match started {
        Some(Ok(engine)) => engine,
        Some(Err(error)) => {
            children.stop(log).await;
            return Err(error);
        }
        None => {
            // Python raises KeyboardInterrupt.
            children.stop(log).await;
            return Ok(ExitStatus::Forced);
        }
    };
    if let Some(ready) = ready {
        // The receiver is optional.
        drop(ready.send(engine.addresses.clone()));
    }
    log.raw("INFO:     Application startup complete.\n");
    Ok(engine.serve(&mut signals, children, log).await)
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: SignalListener,
    interrupt: SignalListener,
    ignored: bool,
}

impl Signals {
    fn listen(ignored: bool) -> Result<Self, SimError> {
        let listen = |kind| SignalListener::listen(kind).map_err(|error| SimError::System("listen to signals", error));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            ignored,
        })
    }

    /// The next signal that is not ignored.
    async fn next(&mut self) {
        loop {
            tokio::select! {
                () = self.terminate.recv() => {}
                () = self.interrupt.recv() => {}
            }
            if !self.ignored {
                return;
            }
        }
    }
}

/// Binds early and listens late, as vLLM does: a taken port fails the start at once, and connections are refused until
/// the engine is ready.
async fn bind(options: &Options) -> Result<TcpSocket, SimError> {
    let address = format!("{}:{}", options.host, options.port);
    let failed = |source| SimError::Bind {
        address: address.clone(),
        source,
    };
    let resolved = lookup_host((options.host.as_str(), options.port))
        .await
        .map_err(failed)?
        .next()
        .ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
    let socket = if resolved.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
    .map_err(failed)?;
    socket.set_reuseaddr(true).map_err(failed)?;
    socket.bind(resolved).map_err(failed)?;
    Ok(socket)
}

/// The checks that vLLM makes before loading and when it sizes the KV cache.
fn check(options: &Options) -> Result<(), SimError> {
    let model = options.max_model_len;
    if !options.chunked_prefill && options.step_tokens() < model {
        return Err(SimError::StepTooSmall {
            step: options.step_tokens(),
            model,
        });
    }
    let holds = options.preset.kv_cache_tokens;
    if holds < model {
        return Err(SimError::KvCache { holds, model });
    }
    Ok(())
}

/// A serving engine.
struct Engine {
    options: Arc<Options>,
    addresses: Addresses,
    core: JoinSet<Result<(), Death>>,
    http: JoinSet<std::io::Result<()>>,
    closing: CancellationToken,
    stage: watch::Sender<EngineStage>,
    metrics: Arc<Metrics>,
}

/// Runs the phases of a start.
async fn start(
    options: &Arc<Options>,
    log: &Log,
    socket: TcpSocket,
    children: &mut Children,
) -> Result<Engine, SimError> {
    check(options)?;
    let mut startup = Startup::begin(options, log);
    startup.read_config().await?;
    children
        .spawn(options, log)
        .await
        .map_err(|error| SimError::System("spawn the engine core", error))?;
    startup.load().await?;
    let metrics = Arc::new(Metrics::default());
    let pool = kv::blocks::BlockPool::new(options.preset.kv_cache_tokens);
    let mut background = JoinSet::new();
    let connected = ConnectorHandle::make(options, log, &metrics, &pool, &mut background).await?;
    if let Some(config) = &options.kv_transfer {
        startup.connector(&config.kv_connector, &connected.engine_id);
    }
    let failed = |source| SimError::Bind {
        address: format!("{}:{}", options.host, options.port),
        source,
    };
    let address = socket.local_addr().map_err(failed)?;
    startup.open(address).await?;
    let (commands, queue) = mpsc::channel(COMMANDS);
    let (stage, stage_view) = watch::channel(EngineStage::Serving);
    let addresses = Addresses {
        http: address,
        lmcache_init_ports: connected.lmcache_ports.init,
        lmcache_alloc_ports: connected.lmcache_ports.alloc,
    };
    let core = Core::new(CoreParts {
        options: Arc::clone(options),
        metrics: Arc::clone(&metrics),
        log: log.clone(),
        pool: pool.clone(),
        connector: connected.connector,
        cache: connected.cache,
        commands: queue,
        stage: stage_view.clone(),
        background,
    });
    let api = Arc::new(Api {
        options: Arc::clone(options),
        kind: connected.kind,
        commands,
        stage: stage_view,
        metrics: Arc::clone(&metrics),
        pool,
    });
    let closing = CancellationToken::new();
    let listener = socket.listen(1024).map_err(failed)?.tap_io(|connection| {
        // Without it a token waits for the acknowledgement of the previous one.
        drop(connection.set_nodelay(true));
    });
    let mut http = JoinSet::new();
    let closed = closing.clone().cancelled_owned();
    http.spawn(async {
        axum::serve(listener, api::router(api))
            .with_graceful_shutdown(closed)
            .await
    });
    let mut cores = JoinSet::new();
    cores.spawn(Box::pin(core.run()));
    Ok(Engine {
        options: Arc::clone(options),
        addresses,
        core: cores,
        http,
        closing,
        stage,
        metrics,
    })
}

impl Engine {
    /// Serves until a signal, or until the core dies. The exit code is 0 in both cases, as in vLLM.
    async fn serve(mut self, signals: &mut Signals, mut children: Children, log: &Log) -> ExitStatus {
        let death = tokio::select! {
            () = signals.next() => None,
            Some(ended) = self.core.join_next() => Some(match ended {
                Ok(Ok(())) => Death("the engine core returned".to_owned()),
                Ok(Err(death)) => death,
                Err(error) => Death(error.to_string()),
            }),
            () = children.exited() => Some(Death("EngineCore proc died unexpectedly".to_owned())),
        };
        match death {
            Some(death) => self.die(&death, log).await,
            None => self.shut_down(log).await,
        }
        children.stop(log).await;
        ExitStatus::Success
    }

    async fn die(mut self, death: &Death, log: &Log) {
        let died = Instant::now();
        self.stage.send_replace(EngineStage::Dead);
        self.core.abort_all();
        log.error("core.py:1512", "EngineCore encountered a fatal error.");
        log.error("core.py:1512", "Traceback (most recent call last):");
        log.error("core.py:1512", &death.0);
        let message = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace \
                       (above) for the root cause.";
        log.line(Process::ApiServer, "ERROR", "async_llm.py:906", message);
        sleep(DEAD_BUT_ANSWERING).await;
        log.raw("INFO:     Shutting down\n");
        self.close(log).await;
        tokio::time::sleep_until(died + Duration::from_secs_f64(self.options.preset.death)).await;
    }

    async fn shut_down(mut self, log: &Log) {
        let limit = self.options.shutdown_timeout;
        let mode = if limit.is_zero() { "abort" } else { "drain" };
        let message = format!(
            "[shutdown] API server: shutdown triggered mode={mode} timeout={}s",
            limit.as_secs()
        );
        log.info(Process::ApiServer, "launcher.py:248", &message);
        if limit.is_zero() {
            self.stage.send_replace(EngineStage::Aborting);
        } else {
            self.stage.send_replace(EngineStage::Draining);
            // After the time limit, running requests end with an error.
            drop(timeout(limit, self.idle()).await);
            self.stage.send_replace(EngineStage::DrainOver);
        }
        drop(timeout(CLOSE_DEADLINE, self.core.join_next()).await);
        self.close(log).await;
    }

    /// Returns when no request runs or waits.
    async fn idle(&self) {
        while self.metrics.running.get() + self.metrics.waiting.get() > 0 {
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Closes the server and the connections that clients have not closed in time.
    async fn close(&mut self, log: &Log) {
        self.closing.cancel();
        drop(timeout(CLOSE_DEADLINE, self.http.join_next()).await);
        self.http.shutdown().await;
        log.raw(&format!(
            "INFO:     Application shutdown complete.\nINFO:     Finished server process [{}]\n",
            std::process::id()
        ));
    }
}
