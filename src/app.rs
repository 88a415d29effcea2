//! The composition root of a run: builds every part, wires them, joins them.
//!
//! Nothing here decides anything about engines or requests. The supervisor runs on the calling task, which is the main
//! thread's; proxy, control socket and reporting run on worker threads, so that a busy data plane cannot delay a stop.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::control::rundir::{self, RunDir, RunEngine, RunInfo};
use crate::control::{api, server};
use crate::fleet::{EngineId, EngineState, FleetStage, FleetView};
use crate::plan::{Plan, ProxySpec};
use crate::private;
use crate::proxy::{self, Notifications, Proxy};
use crate::report::{ExitStatus, Failure};
use crate::supervisor::{self, Keep, KeptRun, Outcome};
use crate::ui::Printer;

mod causes;
mod door;
mod gpus;
mod kept;
mod reporting;
mod scale;
mod signals;
mod socket;
mod starts;
mod throughput;
mod verify;

pub use kept::end_kept;
pub use scale::Grow;

pub use self::causes::Began;

/// How long the engines of a detached run wait for the next xpyd should this one be killed.
const KEEP_DETACHED: Duration = Duration::from_mins(15);

/// How long the parts may take to end once no engine is left.
const JOIN_DEADLINE: Duration = Duration::from_secs(5);

/// A run, decided and locked, about to begin.
pub struct Run {
    /// Everything decided about it. Its folder exists.
    pub plan: Plan,
    /// Its name and its lock.
    pub name: String,
    /// The lock, and the place of the control socket.
    pub run_dir: RunDir,
    /// Whether it runs without a terminal.
    pub detached: bool,
    /// Whether it ends with the xpyd that started it, which says so with SIGTERM.
    pub has_parent: bool,
    /// The engines that an earlier xpyd left, if they are to be taken over. The plan describes them.
    pub attach: Option<KeptRun>,
    /// Plans more engines for it.
    pub grow: Grow,
    /// What its proxy needs and no plan holds.
    pub proxy_parts: proxy::Parts,
    /// The key that was made for its engines, for the operator.
    pub engine_key: Option<String>,
    /// Where people read.
    pub printer: Printer,
    /// Whether they are told now and then what the fleet serves.
    pub tells_traffic: bool,
}

impl fmt::Debug for Run {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Run")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// How long the ready line of an attached fleet waits for engines that are still tried. Clients are served meanwhile.
const STRAGGLERS: Duration = Duration::from_secs(5);

/// A fleet that takes requests, as given to the work that [`run`] was asked to do.
#[derive(Debug, Clone)]
pub struct Ready {
    /// The run's name.
    pub name: String,
    /// Where clients send requests.
    pub url: String,
    /// Whether clients need an API key.
    pub wants_key: bool,
    /// The name to ask for.
    pub model: String,
    /// The proxy itself, for its metrics.
    pub proxy: Proxy,
    /// From the last engine's `/health` to the end of the canaries.
    pub verified_in: Duration,
    /// Engines that do not serve yet. Only a fleet that was taken over becomes ready with such.
    pub not_yet: Vec<EngineId>,
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// Where to read in the logs why.
    pub began: Began,
}

/// Runs the fleet until it ends. Once it is ready, `when_ready` runs beside it; when that returns, the fleet is stopped.
///
/// # Errors
/// When the run cannot begin: a port is taken, a file cannot be written. How a run that began ended is its [`Outcome`].
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
        tells_traffic,
    } = run;
    let run_dir = Arc::new(run_dir);
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
    let listener = sockets.listener;
    let door = door::Door::open(&mut parts, proxy.clone(), listener, &view, &stop, attach.is_some());
    let (planned, plans) = watch::channel(Arc::new(plan.clone()));
    let (progress_is_settled, seen, notes) = report(&mut parts, &plans, printer, &view, &stop);
    if tells_traffic {
        let served = throughput::follow(proxy.clone(), view.clone(), notes.clone());
        parts.spawn(until(stop.clone(), served));
    }
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
    let (began_sender, began) = watch::channel(Began::new());
    let wiring = supervisor::Wiring {
        signals: signals::forward(&mut parts, &stop, has_parent)?,
        requests: request_receiver,
        view: view_sender,
        verify: verify::canaries(proxy.clone(), verified_sender),
        hand_over: door.hand_over(),
        explain: causes::explain(&plan, began_sender),
        gpus: gpus::checks(&plan.engines, &plan.run_dir, notes),
    };
    let model = plan.served_model_name.clone();
    let work = work(view.clone(), progress_is_settled, requests, move |not_yet| {
        when_ready(Ready {
            name: ready_name,
            url: sockets.url,
            wants_key,
            model,
            proxy,
            verified_in: *verified.borrow(),
            not_yet,
        })
    });
    let outcome = tokio::select! {
        outcome = supervisor::run(supervisor_settings(&plan, name, sockets.reservations, keep, attach, sockets.held)?, wiring) => outcome,
        never = work => match never {},
    };
    stop.cancel();
    join(parts).await;
    record(&plan, &run_dir, &outcome);
    let began = began.borrow().clone();
    Ok(Ended { outcome, began })
}

/// Runs `when_ready` once the fleet is ready, and then asks for the stop. Never returns.
async fn work<Work>(
    view: watch::Receiver<Arc<FleetView>>,
    progress_is_settled: impl Future,
    requests: mpsc::Sender<supervisor::Request>,
    when_ready: impl FnOnce(Vec<EngineId>) -> Work,
) -> std::convert::Infallible
where
    Work: Future<Output = ()>,
{
    if let Some(not_yet) = reached_ready(view).await {
        // So that what is printed now stands below the bars.
        drop(progress_is_settled.await);
        when_ready(not_yet).await;
        request_stop(&requests).await;
    }
    std::future::pending().await
}

/// Stops the run; a full or closed queue means that it is ending anyway.
async fn request_stop(requests: &mpsc::Sender<supervisor::Request>) {
    let (reply, _outcome) = oneshot::channel();
    drop(requests.send(supervisor::Request::Stop { force: false, reply }).await);
}

/// Leaves word for `xpyd down` of how the run ended.
fn record(plan: &Plan, run_dir: &RunDir, outcome: &Outcome) {
    let left: Vec<String> = outcome.left.iter().map(ToString::to_string).collect();
    if let Err(error) = rundir::record_outcome(&plan.run_dir, outcome.exit_status(), &left) {
        tracing::warn!(%error, "cannot record how the run ended");
    }
    if outcome.ending != supervisor::Ending::Kept {
        run_dir.remove_engine_key();
    }
}

/// Tells later commands of the run.
fn publish(run_dir: &RunDir, info: RunInfo) -> Result<RunInfo, Failure> {
    let info = RunInfo {
        control_socket: run_dir.socket_path().to_owned(),
        ..info
    };
    let published = run_dir.publish(&info);
    published.map_err(|error| Failure::new(ExitStatus::Failure, error))?;
    Ok(info)
}

/// Writes the key of the engines where the operator finds it.
fn engine_key_file(run_dir: &RunDir, key: Option<&str>) -> Result<Option<PathBuf>, Failure> {
    let written = key.map(|key| run_dir.write_engine_key(key)).transpose();
    written.map_err(|error| Failure::new(ExitStatus::Failure, error))
}

/// Starts the control socket, and what hands its requests on to the supervisor.
fn control_parts(
    parts: &mut JoinSet<()>,
    stop: &CancellationToken,
    listener: tokio::net::UnixListener,
    status: impl Fn() -> api::Status + Send + Sync + 'static,
    suspects: watch::Receiver<Option<(EngineId, EngineId)>>,
    scaler: scale::Scaler,
) {
    let (stops, stop_receiver) = mpsc::channel(8);
    let (take_outs, take_out_receiver) = mpsc::channel(8);
    let (scales, scale_receiver) = mpsc::channel(8);
    let state = server::ServerState {
        status: Arc::new(status),
        stop: stops,
        take_out: take_outs,
        scale: scales,
    };
    let requests = scaler.requests.clone();
    parts.spawn(socket::serve(listener, state.clone(), stop.clone()));
    let run_dir = Arc::clone(&scaler.run_dir);
    parts.spawn(socket::keep_findable(run_dir, state, stop.clone()));
    parts.spawn(until(stop.clone(), forward_stops(stop_receiver, requests.clone())));
    parts.spawn(until(
        stop.clone(),
        forward_take_outs(take_out_receiver, requests.clone()),
    ));
    parts.spawn(until(stop.clone(), forward_suspects(suspects, requests)));
    parts.spawn(until(stop.clone(), scaler.run(scale_receiver)));
}

/// Everything that a run listens on itself, and what it holds for its engines.
struct Sockets {
    reservations: supervisor::Reservations,
    listener: TcpListener,
    /// The same socket, for the shim.
    held: OwnedFd,
    url: String,
    notifications: Option<Notifications>,
    control: tokio::net::UnixListener,
}

async fn open_sockets(plan: &Plan, run_dir: &RunDir, attach: Option<&mut KeptRun>) -> Result<Sockets, Failure> {
    let reservations = if attach.is_some() {
        supervisor::reserve_running(&plan.engines)
    } else {
        supervisor::reserve(&plan.engines).map_err(|conflict| {
            Failure::new(ExitStatus::Preflight, conflict).hint(
                "stop that process, or move the fleet with another `port_offset`, for example `--set port_offset=1000`",
            )
        })?
    };
    let listener = door::listen(&plan.proxy, attach.and_then(|kept| kept.listener.take())).await?;
    let held = listener.as_fd().try_clone_to_owned().map_err(anyhow::Error::from)?;
    let scheme = plan.proxy.service.clients.scheme();
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

/// Starts what tells people of the run: one reader of phases per engine, and the reporter. The receivers say when the
/// start has been shown for the last time, and how far each engine is; the sender takes what else people should know.
fn report(
    parts: &mut JoinSet<()>,
    plans: &watch::Receiver<Arc<Plan>>,
    printer: Printer,
    view: &watch::Receiver<Arc<FleetView>>,
    stop: &CancellationToken,
) -> (
    oneshot::Receiver<()>,
    watch::Receiver<Arc<reporting::Seen>>,
    mpsc::Sender<String>,
) {
    let (sender, receiver) = mpsc::channel(64);
    parts.spawn(until(
        stop.clone(),
        reporting::follow_all(plans.clone(), sender, view.clone()),
    ));
    let (published, seen) = watch::channel(Arc::default());
    let (settled, progress_is_settled) = oneshot::channel();
    let reporter = reporting::Reporter::new(printer, &plans.borrow(), settled, published);
    let (notes, told) = mpsc::channel(8);
    parts.spawn(reporter.run(view.clone(), receiver, told, stop.clone()));
    (progress_is_settled, seen, notes)
}

fn supervisor_settings(
    plan: &Plan,
    name: String,
    reservations: supervisor::Reservations,
    keep: Keep,
    attach: Option<KeptRun>,
    listener: OwnedFd,
) -> Result<supervisor::Settings, Failure> {
    Ok(supervisor::Settings {
        engines: plan.engines.clone(),
        reservations,
        run_dir: plan.run_dir.clone(),
        drain_deadline: plan.proxy.drain_deadline,
        restart: plan.restart.clone(),
        verify_deadline: verify::VERIFY_DEADLINE,
        keep,
        attach,
        listener: Some(listener),
        run_name: name,
        program: std::env::current_exe().map_err(anyhow::Error::from)?,
    })
}

/// Waits for all parts, but not for ever.
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

/// What becomes of the engines should this process disappear.
fn keep(plan: &Plan, run_dir: &RunDir, detached: bool) -> Keep {
    let default = if detached { KEEP_DETACHED } else { Duration::ZERO };
    Keep {
        socket: run_dir.attach_path(),
        wait: plan.keep.unwrap_or(default),
        run_dir: plan.run_dir.clone(),
    }
}

/// Writes `plan.json`, into a folder that may have been removed with old logs.
fn write_plan(plan: &Plan) -> std::io::Result<()> {
    private::create_folders(&plan.run_dir)?;
    private::write(
        &plan.run_dir.join("plan.json"),
        serde_json::to_string_pretty(&plan.redacted())?,
    )
}

async fn bind_notifications(proxy: &ProxySpec) -> Result<Option<Notifications>, Failure> {
    let Some((host, port)) = &proxy.notify else {
        return Ok(None);
    };
    let bound = Notifications::bind(host, *port).await.map_err(|error| {
        let context = format!("the proxy cannot take notifications on {host}:{port}{}", had_by(*port));
        Failure::new(ExitStatus::Preflight, anyhow::Error::new(error).context(context))
            .hint("choose another port with `--set lmcache.notify_port=…`")
    })?;
    Ok(Some(bound))
}

/// Who has a port, as the end of a sentence.
fn had_by(port: u16) -> String {
    supervisor::ports::holder(port).map_or_else(String::new, |holder| format!(", which {holder} has"))
}

fn proxy_settings(plan: &Plan, parts: proxy::Parts) -> proxy::Settings {
    let spec = &plan.proxy;
    proxy::Settings {
        connector: plan.connector.clone(),
        served_model_name: plan.served_model_name.clone(),
        session_header: spec.session_header.clone(),
        notifications: spec.notifications,
        prefill_deadline: spec.prefill_deadline,
        handoff_deadline: spec.handoff_deadline,
        decode_idle_deadline: spec.decode_idle_deadline,
        kv_lease: spec.kv_lease,
        asks_engines: false,
        max_body_bytes: spec.max_body_bytes,
        max_in_flight: spec.max_in_flight,
        parts,
        service: spec.service.clone(),
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

/// The engines as later commands need to know them.
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

/// What the control socket answers from.
fn status(
    info: &RunInfo,
    plans: watch::Receiver<Arc<Plan>>,
    view: &watch::Receiver<Arc<FleetView>>,
    seen: &watch::Receiver<Arc<reporting::Seen>>,
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
                uptime_seconds: start
                    .filter(|_| engine.state.is_alive())
                    .map(|start| start.began.elapsed().as_secs()),
                gpus: planned.map(|planned| planned.gpus.clone()).unwrap_or_default(),
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

/// Hands requests to stop from the control socket on to the supervisor.
async fn forward_stops(mut stops: mpsc::Receiver<server::StopRequest>, requests: mpsc::Sender<supervisor::Request>) {
    while let Some(asked) = stops.recv().await {
        let request = match asked {
            server::StopRequest::Stop { force } => supervisor::Request::Stop {
                force,
                reply: oneshot::channel().0,
            },
            server::StopRequest::Leave { reply } => supervisor::Request::Leave { reply },
        };
        if requests.send(request).await.is_err() {
            return;
        }
    }
}

/// Hands requests that concern one engine from the control socket on to the supervisor.
async fn forward_take_outs(mut asked: mpsc::Receiver<server::TakeOut>, requests: mpsc::Sender<supervisor::Request>) {
    while let Some(take_out) = asked.recv().await {
        let (reply, answer) = oneshot::channel();
        let engine = take_out.engine.clone();
        let request = supervisor::Request::Engine {
            engine: take_out.engine,
            then: match take_out.verb {
                server::EngineVerb::Restart => supervisor::Then::Restart,
                server::EngineVerb::Drain => supervisor::Then::Stay,
            },
            force: take_out.force,
            reply,
        };
        if requests.send(request).await.is_err() {
            return;
        }
        if let Ok(answer) = answer.await {
            let answer = answer.map_err(|refusal| format!("{engine} cannot be taken out: {refusal}"));
            // Whoever asked may have gone.
            let _ = take_out.reply.send(answer);
        }
    }
}

/// Has the supervisor check engines between which clients' hand-offs fail or are slow.
async fn forward_suspects(
    mut suspects: watch::Receiver<Option<(EngineId, EngineId)>>,
    requests: mpsc::Sender<supervisor::Request>,
) {
    while suspects.changed().await.is_ok() {
        let pair = suspects.borrow_and_update().clone();
        if let Some((prefill, decode)) = pair
            && requests
                .send(supervisor::Request::Check { prefill, decode })
                .await
                .is_err()
        {
            return;
        }
    }
}

/// The engines that are to serve and do not.
fn not_yet(view: &FleetView) -> Vec<EngineId> {
    let is_out = |state| matches!(state, EngineState::Ready | EngineState::Stopped);
    let engines = view.engines.iter().filter(|engine| !is_out(engine.state));
    engines.map(|engine| engine.id.clone()).collect()
}

/// Waits until clients are served, and returns the engines that do not serve even then; `None` if it will never be.
async fn reached_ready(mut view: watch::Receiver<Arc<FleetView>>) -> Option<Vec<EngineId>> {
    let settled = |view: &Arc<FleetView>| !matches!(view.stage, FleetStage::Starting | FleetStage::Verifying);
    let is_ready = view.wait_for(settled).await.ok()?.stage == FleetStage::Ready;
    // Kept engines are tried at the same time, and most of them pass within milliseconds.
    let is_tried = |view: &Arc<FleetView>| view.engines.iter().any(|engine| engine.state == EngineState::Healthy);
    let all = view.wait_for(|view| view.stage != FleetStage::Ready || !is_tried(view));
    let _ = tokio::time::timeout(STRAGGLERS, all).await;
    is_ready.then(|| not_yet(&view.borrow()))
}
