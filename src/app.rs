//! The composition root of a run: builds its parts, connects them, and joins them.
//!
//! It decides nothing about engines or requests. The supervisor runs on the calling task, on the main thread. Proxy, control
//! socket and reporting run on worker threads, so a busy proxy cannot delay a stop.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{self, OptionFuture};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::canaries::Canaries;
use self::client_socket::ClientService;
use self::diagnosis::LogDiagnosis;
use self::endpoints_file::EndpointsFile;
use self::gpu_watch::GpuChecks;
use self::hooks::RunHooks;
use crate::control::rundir::{self, RunDir, RunEngine, RunInfo};
use crate::control::{api, server};
use crate::fleet::{EngineId, EngineState, EngineView, FleetStage, FleetView};
use crate::plan::{Plan, ProxyPlan};
use crate::private;
use crate::proxy::{self, Notifications, Proxy};
use crate::report::{ExitStatus, Failure};
use crate::supervisor::{self, AttachableRun, Keep, Outcome};
use crate::ui::Printer;

mod canaries;
mod client_socket;
mod control_socket;
mod diagnosis;
mod end_kept;
mod endpoints_file;
mod forward;
mod gpu_watch;
mod hooks;
mod reporting;
mod scale;
mod signals;
mod start_history;
mod throughput;

pub use self::canaries::verify_pairs;
pub use self::diagnosis::LogStarts;
pub use self::end_kept::end_kept;
pub use self::scale::Grow;

/// How long the engines of a detached run wait for the next xpyd if this one is killed.
const KEEP_DETACHED: Duration = Duration::from_mins(15);

/// Time for the parts to end once no engine is left.
const JOIN_DEADLINE: Duration = Duration::from_secs(5);

/// A planned and locked run that is about to begin.
pub struct Run {
    /// The plan. The run's folder exists.
    pub plan: Plan,
    /// The run's name.
    pub name: String,
    /// The runtime folder, with the lock and the control socket.
    pub run_dir: RunDir,
    /// Whether it runs without a terminal.
    pub detached: bool,
    /// Whether another xpyd started it and ends it with SIGTERM.
    pub has_parent: bool,
    /// The run to attach to, whose engines an earlier xpyd left. The plan describes them.
    pub attach: Option<AttachableRun>,
    /// Plans more engines for a scale request.
    pub grow: Grow,
    /// Inputs of the proxy that no plan contains, such as keys.
    pub proxy_parts: proxy::Parts,
    /// The API key that xpyd made for the engines; the operator finds it in a file.
    pub engine_key: Option<String>,
    /// Prints progress and status.
    pub printer: Printer,
    /// Whether a line every ten seconds reports the throughput.
    pub prints_throughput: bool,
    /// The file that lists the engines that serve, for other proxies.
    pub write_endpoints: Option<PathBuf>,
}

impl fmt::Debug for Run {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Run")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// How long the ready line of an attached fleet waits for engines whose canaries still run. Clients are served meanwhile.
const READY_LINE_DELAY: Duration = Duration::from_secs(5);

/// A fleet that serves, as passed to the work of [`run`].
#[derive(Debug, Clone)]
pub struct Ready {
    /// The run's name.
    pub name: String,
    /// The base URL for clients.
    pub url: String,
    /// Whether clients need an API key.
    pub wants_key: bool,
    /// The served model name.
    pub model: String,
    /// The proxy, for its metrics.
    pub proxy: Proxy,
    /// Time from the last engine's `/health` to the end of the canaries.
    pub verified_in: Duration,
    /// Engines that do not serve yet. Only an attached fleet can be ready with such.
    pub not_serving: Vec<EngineId>,
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Why and how it ended.
    pub outcome: Outcome,
    /// Where in its log each engine's last incarnation begins.
    pub log_starts: LogStarts,
}

/// Runs at the same time whichever of the two there are.
async fn optional(one: Option<impl Future<Output = ()>>, other: Option<impl Future<Output = ()>>) {
    future::join(OptionFuture::from(one), OptionFuture::from(other)).await;
}

/// Runs the fleet until it ends. Once it is ready, `when_ready` runs beside it; when that returns, the fleet is stopped.
///
/// # Errors
/// When the run cannot begin: a port is taken, or a file cannot be written. The end of a run that began is its [`Outcome`].
pub async fn run<Work>(run: Run, when_ready: impl FnOnce(Ready) -> Work) -> Result<Ended, Failure>
where
    Work: Future<Output = ()>,
{
    let Run {
        plan,
        name,
        run_dir,
        detached,
        has_parent,
        mut attach,
        grow,
        proxy_parts,
        engine_key,
        printer,
        prints_throughput,
        write_endpoints,
    } = run;
    let (run_dir, model) = (Arc::new(run_dir), plan.served_model_name.clone());
    write_plan(&plan).map_err(anyhow::Error::from)?;
    let sockets = open_sockets(&plan, &run_dir, attach.as_mut()).await?;
    let keep = keep(&plan, &run_dir, detached);
    let info = RunInfo {
        engine_key_file: engine_key_file(&run_dir, engine_key.as_deref())?,
        keeps_engines: !keep.wait.is_zero(),
        ..run_info(&plan, &name, &sockets.url, detached)?
    };
    let info = publish(&run_dir, info)?;

    let (ready_name, wants_key) = (name.clone(), !proxy_parts.client_keys.is_empty());
    let (view_sender, view) = watch::channel(Arc::new(supervisor::initial_view(&plan.engines)));
    let proxy = Proxy::new(proxy_settings(&plan, proxy_parts), view.clone(), sockets.notifications);
    let (requests, request_receiver) = mpsc::channel(8);
    let (stop, mut parts) = (CancellationToken::new(), JoinSet::new());
    let clients = ClientService::start(&mut parts, &proxy, sockets.listener, &view, &stop, attach.is_some());
    let (planned, plans) = watch::channel(Arc::new(plan.clone()));
    let (progress_done, seen, notes) = start_reporting(&mut parts, &plans, printer, &view, &stop);
    let served = prints_throughput.then(|| throughput::follow(proxy.clone(), view.clone(), notes.clone()));
    let listed = write_endpoints.map(|path| EndpointsFile::at(path).follow(view.clone()));
    parts.spawn(until(stop.clone(), optional(served, listed)));
    let status = status(&info, plans, &view, &seen, &proxy);
    let scaler = scale::Scaler {
        grow,
        plan: planned,
        view: view.clone(),
        requests: requests.clone(),
        run_dir: Arc::clone(&run_dir),
        info,
    };
    control_parts(&mut parts, &stop, sockets.control, status, proxy.suspects(), scaler);

    let (verified_sender, verified) = watch::channel(Duration::ZERO);
    let (log_starts_sender, log_starts) = watch::channel(LogStarts::new());
    let wiring = supervisor::Wiring {
        signals: signals::forward(&mut parts, &stop, has_parent, detached)?,
        requests: request_receiver,
        view: view_sender,
        hooks: RunHooks {
            canaries: Canaries::new(proxy.clone(), verified_sender),
            clients,
            diagnosis: LogDiagnosis::new(&plan, log_starts_sender),
            gpus: GpuChecks::new(&plan.engines, &plan.run_dir, notes),
        },
    };
    let work = work(view.clone(), progress_done, requests, move |not_serving| {
        when_ready(Ready {
            name: ready_name,
            url: sockets.url,
            wants_key,
            model,
            proxy,
            verified_in: *verified.borrow(),
            not_serving,
        })
    });
    let outcome = tokio::select! {
        outcome = supervisor::run(supervisor_settings(&plan, name, sockets.reservations, keep, attach, sockets.held)?, wiring) => outcome,
        never = work => match never {},
    };
    stop.cancel();
    join(parts).await;
    record_outcome(&plan, &run_dir, &outcome);
    let log_starts = log_starts.borrow().clone();
    Ok(Ended { outcome, log_starts })
}

/// Runs `when_ready` once the fleet is ready, and then requests the stop. Never returns.
async fn work<Work>(
    view: watch::Receiver<Arc<FleetView>>,
    progress_done: impl Future,
    requests: mpsc::Sender<supervisor::Request>,
    when_ready: impl FnOnce(Vec<EngineId>) -> Work,
) -> std::convert::Infallible
where
    Work: Future<Output = ()>,
{
    if let Some(not_serving) = wait_until_ready(view).await {
        // Further output must come below the progress bars.
        drop(progress_done.await);
        when_ready(not_serving).await;
        request_stop(&requests).await;
    }
    std::future::pending().await
}

/// Requests the stop. A closed queue means that the run is ending already.
async fn request_stop(requests: &mpsc::Sender<supervisor::Request>) {
    let (reply, _outcome) = oneshot::channel();
    drop(requests.send(supervisor::Request::Stop { force: false, reply }).await);
}

/// Writes `outcome.json` for `xpyd down`.
fn record_outcome(plan: &Plan, run_dir: &RunDir, outcome: &Outcome) {
    let left: Vec<String> = outcome.left.iter().map(ToString::to_string).collect();
    if let Err(error) = rundir::record_outcome(&plan.run_dir, outcome.exit_status(), &left) {
        tracing::warn!(%error, "cannot record how the run ended");
    }
    if outcome.reason != supervisor::EndReason::EnginesKept {
        run_dir.remove_engine_key();
    }
}

/// Writes `run.json`, by which other commands find the run.
fn publish(run_dir: &RunDir, info: RunInfo) -> Result<RunInfo, Failure> {
    let info = RunInfo {
        control_socket: run_dir.socket_path().to_owned(),
        ..info
    };
    let published = run_dir.publish(&info);
    published.map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    Ok(info)
}

/// Writes the key of the engines into the runtime folder.
fn engine_key_file(run_dir: &RunDir, key: Option<&str>) -> Result<Option<PathBuf>, Failure> {
    let written = key.map(|key| run_dir.write_engine_key(key)).transpose();
    written.map_err(|error| Failure::new(ExitStatus::Failure, error))
}

/// Starts the control socket, and the tasks that forward its requests to the supervisor.
fn control_parts(
    parts: &mut JoinSet<()>,
    stop: &CancellationToken,
    listener: tokio::net::UnixListener,
    status: impl Fn() -> api::Status + Send + Sync + 'static,
    suspects: watch::Receiver<Option<(EngineId, EngineId)>>,
    scaler: scale::Scaler,
) {
    let (stops, stop_receiver) = mpsc::channel(8);
    let (engine_commands, engine_command_receiver) = mpsc::channel(8);
    let (scales, scale_receiver) = mpsc::channel(8);
    let state = server::ServerState {
        status: Arc::new(status),
        stop: stops,
        engine: engine_commands,
        scale: scales,
    };
    let requests = scaler.requests.clone();
    parts.spawn(control_socket::serve(listener, state.clone(), stop.clone()));
    let run_dir = Arc::clone(&scaler.run_dir);
    parts.spawn(control_socket::keep_findable(run_dir, state, stop.clone()));
    parts.spawn(until(stop.clone(), forward::stops(stop_receiver, requests.clone())));
    parts.spawn(until(
        stop.clone(),
        forward::engine_commands(engine_command_receiver, requests.clone()),
    ));
    parts.spawn(until(stop.clone(), forward::suspects(suspects, requests)));
    parts.spawn(until(stop.clone(), scaler.run(scale_receiver)));
}

/// The sockets of the run itself, and the ports reserved for its engines.
struct Sockets {
    reservations: supervisor::Reservations,
    listener: TcpListener,
    /// A duplicate of `listener`, for the shim.
    held: OwnedFd,
    url: String,
    notifications: Option<Notifications>,
    control: tokio::net::UnixListener,
}

async fn open_sockets(plan: &Plan, run_dir: &RunDir, attach: Option<&mut AttachableRun>) -> Result<Sockets, Failure> {
    let reservations = if attach.is_some() {
        supervisor::reserve_running(&plan.engines)
    } else {
        supervisor::reserve(&plan.engines).map_err(|conflict| {
            Failure::new(ExitStatus::Preflight, conflict).hint(
                "stop that process, or move the fleet with another `port_offset`, for example `--set port_offset=1000`",
            )
        })?
    };
    let listener = client_socket::listen(&plan.proxy, attach.and_then(|kept| kept.listener.take())).await?;
    let held = listener.as_fd().try_clone_to_owned().map_err(anyhow::Error::from)?;
    let scheme = plan.proxy.config.clients.scheme();
    let url = format!("{scheme}://{}", listener.local_addr().map_err(anyhow::Error::from)?);
    let notifications = bind_notifications(&plan.proxy).await?;
    let control = run_dir.listen().map_err(|error| {
        Failure::new(
            ExitStatus::Failure,
            anyhow::Error::new(error).context("cannot open the control socket"),
        )
    })?;
    Ok(Sockets {
        reservations,
        listener,
        held,
        url,
        notifications,
        control,
    })
}

/// Starts one reader of phases per engine, and the reporter. Returns: a receiver that fires once the progress of the start was
/// drawn for the last time, the progress of each engine, and a sender for further messages to the user.
fn start_reporting(
    parts: &mut JoinSet<()>,
    plans: &watch::Receiver<Arc<Plan>>,
    printer: Printer,
    view: &watch::Receiver<Arc<FleetView>>,
    stop: &CancellationToken,
) -> (
    oneshot::Receiver<()>,
    watch::Receiver<Arc<reporting::StartProgress>>,
    mpsc::Sender<String>,
) {
    let (sender, receiver) = mpsc::channel(64);
    parts.spawn(until(
        stop.clone(),
        reporting::follow_all(plans.clone(), sender, view.clone()),
    ));
    let (published, seen) = watch::channel(Arc::default());
    let (settled, progress_done) = oneshot::channel();
    let reporter = reporting::Reporter::new(printer, &plans.borrow(), settled, published);
    let (notes, told) = mpsc::channel(8);
    parts.spawn(reporter.run(view.clone(), receiver, told, stop.clone()));
    (progress_done, seen, notes)
}

fn supervisor_settings(
    plan: &Plan,
    name: String,
    reservations: supervisor::Reservations,
    keep: Keep,
    attach: Option<AttachableRun>,
    listener: OwnedFd,
) -> Result<supervisor::Settings, Failure> {
    Ok(supervisor::Settings {
        engines: plan.engines.clone(),
        reservations,
        run_dir: plan.run_dir.clone(),
        drain_deadline: plan.proxy.drain_deadline,
        restart: plan.restart.clone(),
        verify_deadline: canaries::VERIFY_DEADLINE,
        keep,
        attach,
        listener: Some(listener),
        run_name: name,
        program: std::env::current_exe().map_err(anyhow::Error::from)?,
    })
}

/// Waits for all parts, up to [`JOIN_DEADLINE`].
async fn join(mut parts: JoinSet<()>) {
    let all = async { while parts.join_next().await.is_some() {} };
    if tokio::time::timeout(JOIN_DEADLINE, all).await.is_err() {
        tracing::warn!(parts = parts.len(), "parts of xpyd did not end in time");
        parts.abort_all();
    }
}

/// Runs `work` until it ends or `stop` is cancelled.
async fn until(stop: CancellationToken, work: impl Future<Output = ()>) {
    stop.run_until_cancelled(work).await;
}

/// How long the engines outlive this process if it disappears.
fn keep(plan: &Plan, run_dir: &RunDir, detached: bool) -> Keep {
    let default = if detached { KEEP_DETACHED } else { Duration::ZERO };
    Keep {
        socket: run_dir.attach_path(),
        wait: plan.keep.unwrap_or(default),
        run_dir: plan.run_dir.clone(),
    }
}

/// Writes `plan.json`. Creates the folder again if it was removed with old logs.
fn write_plan(plan: &Plan) -> std::io::Result<()> {
    private::create_folders(&plan.run_dir)?;
    private::write(
        &plan.run_dir.join("plan.json"),
        serde_json::to_string_pretty(&plan.redacted())?,
    )
}

async fn bind_notifications(proxy: &ProxyPlan) -> Result<Option<Notifications>, Failure> {
    let Some((host, port)) = &proxy.notify else {
        return Ok(None);
    };
    let bound = Notifications::bind(host, *port).await.map_err(|error| {
        let context = format!(
            "the proxy cannot take notifications on {host}:{port}{}",
            port_holder(*port)
        );
        Failure::new(ExitStatus::Preflight, anyhow::Error::new(error).context(context))
            .hint("choose another port with `--set lmcache.notify_port=…`")
    })?;
    Ok(Some(bound))
}

/// The holder of a port, as the end of an error message.
fn port_holder(port: u16) -> String {
    supervisor::ports::holder(port).map_or_else(String::new, |holder| format!(", in use by {holder}"))
}

fn proxy_settings(plan: &Plan, parts: proxy::Parts) -> proxy::Settings {
    proxy::Settings {
        connector: plan.connector.clone(),
        served_model_name: plan.served_model_name.clone(),
        notifications: plan.proxy.notifications,
        deadlines: plan.proxy.deadlines,
        asks_engines: false,
        parts,
        config: plan.proxy.config.clone(),
    }
}

fn run_info(plan: &Plan, name: &str, url: &str, detached: bool) -> Result<RunInfo, Failure> {
    let info = RunInfo::of_this_process(name).map_err(anyhow::Error::from)?;
    Ok(RunInfo {
        profile: plan.profile.clone(),
        model: plan.served_model_name.clone(),
        proxy_url: url.to_owned(),
        logs_dir: plan.run_dir.clone(),
        engines: run_engines(plan),
        detached,
        ..info
    })
}

/// The engines, as listed in `run.json`.
fn run_engines(plan: &Plan) -> Vec<RunEngine> {
    let engines = plan.engines.iter();
    engines
        .map(|engine| RunEngine {
            id: engine.id.clone(),
            role: engine.role,
            log_file: engine.log_file.clone(),
        })
        .collect()
}

/// A function that builds the status for the control socket.
fn status(
    info: &RunInfo,
    plans: watch::Receiver<Arc<Plan>>,
    view: &watch::Receiver<Arc<FleetView>>,
    seen: &watch::Receiver<Arc<reporting::StartProgress>>,
    proxy: &Proxy,
) -> impl Fn() -> api::Status + Send + Sync + use<> {
    let (info, view, seen, proxy) = (info.clone(), view.clone(), seen.clone(), proxy.clone());
    move || {
        let (plan, view, seen) = (plans.borrow().clone(), view.borrow().clone(), seen.borrow().clone());
        let engines = view.engines.iter().map(|engine| {
            let start = seen.starts.get(&engine.id);
            let planned = plan.engines.iter().find(|planned| planned.id == engine.id);
            let status = api::EngineStatus {
                phase: start.map(|start| start.phase().to_owned()),
                uptime_seconds: uptime(engine, start),
                gpus: planned.map(|planned| planned.gpus.clone()).unwrap_or_default(),
                node: planned.and_then(|planned| Some(planned.node.as_ref()?.name.clone())),
                ..api::EngineStatus::from(&**engine)
            };
            match start.map(reporting::EngineStart::estimate) {
                Some(estimate) if engine.state == EngineState::Starting => {
                    status.starting(estimate.percent, estimate.left)
                }
                _ => status,
            }
        });
        api::Status {
            run: RunInfo {
                engines: run_engines(&plan),
                ..info.clone()
            },
            stage: view.stage,
            ready_since: seen.ready_since.clone(),
            in_flight: proxy.in_flight(),
            drain_seconds_left: None,
            engines: engines.collect(),
        }
    }
}

/// How long this incarnation has been running, in seconds. Of an engine that an earlier xpyd started, only its process knows.
fn uptime(engine: &EngineView, start: Option<&reporting::EngineStart>) -> Option<u64> {
    if !engine.state.is_alive() {
        return None;
    }
    let of_process = || rundir::process_age(engine.pid?);
    let age = start.map(|start| start.began.elapsed()).or_else(of_process);
    age.map(|age| age.as_secs())
}

/// The engines that should serve and do not.
fn not_serving(view: &FleetView) -> Vec<EngineId> {
    let is_out = |state| matches!(state, EngineState::Ready | EngineState::Stopped);
    let engines = view.engines.iter().filter(|engine| !is_out(engine.state));
    engines.map(|engine| engine.id.clone()).collect()
}

/// Waits until clients are served. Returns the engines that do not serve yet; `None` if the run ends before.
async fn wait_until_ready(mut view: watch::Receiver<Arc<FleetView>>) -> Option<Vec<EngineId>> {
    let settled = |view: &Arc<FleetView>| !matches!(view.stage, FleetStage::Starting | FleetStage::Verifying);
    let is_ready = view.wait_for(settled).await.ok()?.stage == FleetStage::Ready;
    // The canaries of an attached fleet run at the same time, and most pass within milliseconds.
    let is_tried = |view: &Arc<FleetView>| view.engines.iter().any(|engine| engine.state == EngineState::Healthy);
    let all = view.wait_for(|view| view.stage != FleetStage::Ready || !is_tried(view));
    let _ = tokio::time::timeout(READY_LINE_DELAY, all).await;
    is_ready.then(|| not_serving(&view.borrow()))
}
