//! The runtime folder and the control socket of a run.

#![expect(clippy::unwrap_used, reason = "a failed helper must fail its test")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use clap::Parser;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use xpyd::cli::{down, logs, status};
use xpyd::control::api::{DownRequest, Status};
use xpyd::control::client::{ClientError, ControlClient};
use xpyd::control::rundir::{RunDir, RunDirError, RunInfo, find_in, outcome, record_outcome};
use xpyd::control::server::{ServerState, StopRequest, serve};
use xpyd::fleet::FleetStage;
use xpyd::report::ExitStatus;
use xpyd::ui::Printer;

use crate::support::DEADLINE;

const FORCED: DownRequest = DownRequest {
    force: true,
    keep_engines: false,
};

fn root() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    fs_err::set_permissions(root.path(), PermissionsExt::from_mode(0o700)).unwrap();
    root
}

fn info(name: &str) -> RunInfo {
    RunInfo {
        model: "tiny".to_owned(),
        ..RunInfo::of_this_process(name).unwrap()
    }
}

#[test]
fn a_run_is_found_from_publication_to_its_end() {
    let root = root();
    assert_eq!(find_in(root.path(), "a").unwrap(), None);
    let run = RunDir::acquire_in(root.path(), "a").unwrap();
    assert!(
        matches!(find_in(root.path(), "a"), Err(RunDirError::NotPublished { pid: Some(pid), .. }) if pid == std::process::id())
    );
    run.publish(&info("a")).unwrap();
    assert_eq!(find_in(root.path(), "a").unwrap().unwrap().model, "tiny");
    assert_eq!(find_in(root.path(), "b").unwrap(), None);
    drop(run);
    assert_eq!(find_in(root.path(), "a").unwrap(), None);
    assert!(!root.path().join("a/run.json").exists());
}

#[test]
fn a_second_run_of_the_same_name_is_refused() {
    let root = root();
    let run = RunDir::acquire_in(root.path(), "a").unwrap();
    let error = RunDir::acquire_in(root.path(), "a").unwrap_err();
    assert!(
        matches!(error, RunDirError::AlreadyRunning { pid: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );
    RunDir::acquire_in(root.path(), "b").unwrap();
    drop(run);
    RunDir::acquire_in(root.path(), "a").unwrap();
}

#[test]
fn files_of_a_killed_run_are_ignored() {
    let root = root();
    // The lock is free, so the files do not matter.
    let folder = root.path().join("a");
    fs_err::create_dir(&folder).unwrap();
    fs_err::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
    fs_err::write(folder.join("lock"), "1\n").unwrap();
    let write =
        |info: &RunInfo| fs_err::write(root.path().join("a/run.json"), serde_json::to_vec(info).unwrap()).unwrap();
    write(&info("a"));
    assert_eq!(find_in(root.path(), "a").unwrap(), None);
    // The next run holds the lock and has not published itself yet.
    let run = RunDir::acquire_in(root.path(), "a").unwrap();
    assert!(!root.path().join("a/run.json").exists());
    let mut of_a_process_with_our_pid = info("a");
    of_a_process_with_our_pid.start_time_ticks += 1;
    let mut of_another_boot = info("a");
    of_another_boot.boot_id = "00000000-0000-0000-0000-000000000000".to_owned();
    for stale in [of_a_process_with_our_pid, of_another_boot] {
        write(&stale);
        assert!(matches!(
            find_in(root.path(), "a"),
            Err(RunDirError::NotPublished { .. })
        ));
    }
    drop(run);
}

#[test]
fn bad_run_names_and_long_socket_paths_are_refused() {
    let root = root();
    for name in ["", ".", "..", "a/b", "ä", &"x".repeat(33)] {
        assert!(
            matches!(RunDir::acquire_in(root.path(), name), Err(RunDirError::BadName(_))),
            "{name}"
        );
        assert!(
            matches!(find_in(root.path(), name), Err(RunDirError::BadName(_))),
            "{name}"
        );
    }
    let deep = root.path().join("x".repeat(100));
    let error = RunDir::acquire_in(&deep, "a").unwrap_err();
    assert!(matches!(error, RunDirError::SocketPathTooLong { .. }), "{error}");
    assert!(error.to_string().contains("at most 107"), "{error}");
}

#[test]
fn a_shared_or_linked_runtime_folder_is_refused() {
    let root = root();
    fs_err::create_dir(root.path().join("open")).unwrap();
    fs_err::set_permissions(root.path().join("open"), PermissionsExt::from_mode(0o755)).unwrap();
    symlink(root.path(), root.path().join("link")).unwrap();
    for name in ["open", "link"] {
        let error = RunDir::acquire_in(root.path(), name).unwrap_err();
        assert!(matches!(error, RunDirError::NotPrivate { .. }), "{error}");
    }
}

#[test]
fn the_outcome_belongs_to_its_own_run_only() {
    let logs = root();
    let info = RunInfo {
        logs_dir: logs.path().join("run"),
        ..info("a")
    };
    assert_eq!(outcome(&info).unwrap(), None);
    let leftovers = ["pid 7 is in state D".to_owned()];
    record_outcome(&info.logs_dir, ExitStatus::TeardownIncomplete, &leftovers).unwrap();
    let printed = outcome(&info).unwrap().unwrap();
    assert_eq!((printed.exit_code, printed.leftovers), (7, leftovers.to_vec()));
    let mut other = info;
    other.start_time_ticks += 1;
    assert_eq!(outcome(&other).unwrap(), None);
}

/// A control server whose status is `ready`, with its tasks and the stop requests it received.
struct Server {
    run: RunDir,
    tasks: JoinSet<std::io::Result<()>>,
    stop: CancellationToken,
    requests: mpsc::Receiver<StopRequest>,
}

fn start_server(root: &Path) -> Server {
    let run = RunDir::acquire_in(root, "a").unwrap();
    let listener = run.listen().unwrap();
    let (sender, requests) = mpsc::channel(1);
    let status = Status {
        run: info("a"),
        stage: FleetStage::Ready,
        ready_since: None,
        in_flight: 3,
        drain_seconds_left: None,
        engines: Vec::new(),
    };
    let state = ServerState {
        status: Arc::new(move || status.clone()),
        stop: sender,
        engine: mpsc::channel(1).0,
        scale: mpsc::channel(1).0,
    };
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(listener, state, stop.clone()));
    Server {
        run,
        tasks,
        stop,
        requests,
    }
}

#[tokio::test]
async fn status_and_down_work_over_the_socket() {
    let root = root();
    let mut server = start_server(root.path());
    let client = ControlClient::new(server.run.socket_path()).unwrap();
    let status = client.status().await.unwrap();
    assert_eq!((status.stage, status.in_flight), (FleetStage::Ready, 3));
    assert!(client.down(DownRequest::default()).await.unwrap().stopping);
    // The run already has one stop request. A second one changes nothing, but a forced one must not get lost.
    assert!(client.down(DownRequest::default()).await.unwrap().stopping);
    let error = client.down(FORCED).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { status: 503, .. }), "{error}");
    assert!(matches!(
        server.requests.recv().await,
        Some(StopRequest::Stop { force: false })
    ));
    client.down(FORCED).await.unwrap();
    assert!(matches!(
        server.requests.recv().await,
        Some(StopRequest::Stop { force: true })
    ));
}

#[tokio::test]
async fn a_half_sent_request_does_not_block_the_server() {
    let root = root();
    let mut server = start_server(root.path());
    let mut half = UnixStream::connect(server.run.socket_path()).await.unwrap();
    half.write_all(b"POST /v1/down HTTP/1.1\r\ncontent-length: 10\r\n")
        .await
        .unwrap();
    // Connections are accepted in order, so this response proves that the half-sent request was accepted.
    ControlClient::new(server.run.socket_path())
        .unwrap()
        .status()
        .await
        .unwrap();
    server.stop.cancel();
    tokio::time::timeout(DEADLINE, server.tasks.join_next())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_missing_run_is_an_error_naming_the_socket() {
    let root = root();
    let socket = root.path().join("control.sock");
    let error = ControlClient::new(&socket).unwrap().status().await.unwrap_err();
    assert!(matches!(error, ClientError::NoAnswer { .. }));
    assert!(error.to_string().contains("control.sock"), "{error}");
}

/// What another user's process receives from the socket for a plain request.
fn ask_as(uid: Option<u32>, socket: &Path) -> std::io::Result<String> {
    let socket = socket.to_owned();
    // The kernel keeps the user id per thread, and this thread ends after the request.
    let asking = std::thread::spawn(move || {
        if let Some(uid) = uid {
            rustix::thread::set_thread_uid(rustix::thread::Uid::from_raw(uid))?;
        }
        let mut stream = std::os::unix::net::UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    asking.join().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn another_user_is_refused_by_peer_credentials() {
    if !nix::unistd::getuid().is_root() {
        // Only root can switch to another user.
        return;
    }
    let root = root();
    let server = start_server(root.path());
    let socket = server.run.socket_path().to_owned();
    for (path, mode) in [(root.path(), 0o755), (&root.path().join("a"), 0o755), (&socket, 0o666)] {
        fs_err::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }
    let own = ask_as(None, &socket).unwrap();
    assert!(own.starts_with("HTTP/1.1 200"), "{own}");
    let other = ask_as(Some(65_534), &socket);
    // The server sends nothing, whether or not the request was still written.
    assert!(
        other.as_ref().map_or_else(
            |error| matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
            String::is_empty
        ),
        "{other:?}"
    );
}

/// The commands that need a run.
#[derive(Debug, Parser)]
enum Command {
    Status(status::Arguments),
    Down(down::Arguments),
    Logs(logs::Arguments),
}

#[tokio::test]
async fn commands_without_a_run_exit_with_8() {
    let name = format!("absent-{}", std::process::id());
    for verb in ["status", "down", "logs"] {
        let command = Command::try_parse_from(["xpyd", verb, "--name", &name]).unwrap();
        let printer = Printer { quiet: true };
        let result = match command {
            Command::Status(arguments) => status::run(arguments, printer).await,
            Command::Down(arguments) => down::run(arguments, printer).await,
            Command::Logs(arguments) => logs::run(arguments, printer).await,
        };
        let failure = result.unwrap_err();
        assert_eq!(failure.status, ExitStatus::RunState, "{verb}: {failure}");
        assert!(failure.to_string().contains(&name), "{verb}: {failure}");
    }
}
