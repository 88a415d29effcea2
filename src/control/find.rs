//! Finds runs: by their files, and by the names of their abstract sockets.
//!
//! A run exists exactly as long as its process; a file alone, or a missing one, proves nothing. The runtime folder of this
//! environment comes first. With the usual `XDG_RUNTIME_DIR` of a log-in, and without one (cron, `su -`, `docker exec`), the other
//! usual folders are searched as well. With any other `XDG_RUNTIME_DIR`, only that folder is searched.

use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::getuid;
use serde::Deserialize;

use super::run::RunInfo;
use super::rundir::{
    ATTACH_FILE, LOCK_FILE, RUN_FILE, RunDirError, SOCKET_FILE, check_name, check_private, is_locked, read_json,
    read_pid,
};
use crate::sockets::{KernelName, Who, connect_to_user};

/// Timeout of the status request by which a run is identified.
const PATIENCE: Duration = Duration::from_secs(5);

/// The largest status response, in bytes; more than any real one.
const LONGEST_ANSWER: u64 = 8 << 20;

/// The folder with all runtime folders of this user, in this environment.
pub(super) fn runtime_root() -> PathBuf {
    own_variable().map_or_else(root_without_login, |folder| folder.join("xpyd"))
}

/// `XDG_RUNTIME_DIR`. Under `sudo` and `su` it often names another user's folder, or one that does not exist.
fn own_variable() -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)?;
    let is_own = fs_err::metadata(&folder).is_ok_and(|found| found.uid() == getuid().as_raw());
    (folder.is_absolute() && is_own).then_some(folder)
}

fn root_without_login() -> PathBuf {
    PathBuf::from(format!("/tmp/xpyd-{}", getuid()))
}

/// The folder that a log-in creates for this user, and a log-out removes.
fn login_folder() -> PathBuf {
    PathBuf::from(format!("/run/user/{}", getuid()))
}

/// Whether this environment searches other folders as well.
fn looks_at_large() -> bool {
    own_variable().is_none_or(|folder| folder == login_folder())
}

/// The usual runtime folders other than this environment's.
fn other_roots() -> Vec<PathBuf> {
    let own = runtime_root();
    let usual = [login_folder().join("xpyd"), root_without_login()];
    usual.into_iter().filter(|root| *root != own).collect()
}

/// The run of this name, if it exists.
pub fn find(name: &str) -> Result<Option<RunInfo>, RunDirError> {
    match find_in(&runtime_root(), name)? {
        None if looks_at_large() => elsewhere(name),
        found => Ok(found),
    }
}

/// The run of this name in another environment, or, for root, of another user.
fn elsewhere(name: &str) -> Result<Option<RunInfo>, RunDirError> {
    let mut found: Vec<RunInfo> = Vec::new();
    let mut add = |info: Option<RunInfo>| {
        found.extend(info.filter(|info| !found.iter().any(|known| known.is_same_run(info))));
    };
    for root in other_roots() {
        add(find_in(&root, name)?);
    }
    let known = KernelName::all().into_iter();
    for known in known.filter(|known| known.who == Who::Xpyd && known.name == name && may_ask(known)) {
        add(ask(&known.socket(), known.user).run());
    }
    // The user's own run takes precedence.
    let is_own = |info: &RunInfo| info.is_of_user(getuid().as_raw());
    if found.iter().any(is_own) {
        found.retain(is_own);
    }
    match found.len() {
        0 | 1 => Ok(found.pop()),
        _ => Err(RunDirError::Several {
            name: name.to_owned(),
            pids: found.iter().map(|info| info.pid).collect(),
        }),
    }
}

fn may_ask(known: &KernelName) -> bool {
    getuid().is_root() || known.user == getuid().as_raw()
}

/// [`find`] below one folder.
pub fn find_in(root: &Path, name: &str) -> Result<Option<RunInfo>, RunDirError> {
    check_name(name)?;
    let folder = root.join(name);
    let lock_path = folder.join(LOCK_FILE);
    let was_locked = is_locked(&lock_path)?;
    if was_locked {
        // The folder exists, so it must belong to this user before its content is trusted.
        check_private(root)?;
        check_private(&folder)?;
        let info: Option<RunInfo> = read_json(&folder.join(RUN_FILE))?;
        if let Some(info) = info.filter(RunInfo::is_alive) {
            return Ok(Some(reachable(info, root)));
        }
    }
    // The files can have been removed, but not the abstract socket.
    let by_name = KernelName::of(Who::Xpyd, root, name);
    let not_published = |pid| RunDirError::NotPublished {
        name: name.to_owned(),
        pid,
    };
    let mut silent = None;
    for socket in [folder.join(SOCKET_FILE), by_name.socket()] {
        match ask(&socket, by_name.user) {
            SocketReply::Run(info) => return Ok(Some(*info)),
            SocketReply::Silent(pid) => silent = Some(pid),
            SocketReply::NoListener => {}
        }
    }
    match silent {
        Some(pid) => Err(not_published(Some(pid))),
        // The run can have ended in between.
        None if was_locked && is_locked(&lock_path)? => Err(not_published(read_pid(&lock_path))),
        None => Ok(None),
    }
}

/// The run with a reachable control socket: its path can have been removed.
fn reachable(info: RunInfo, root: &Path) -> RunInfo {
    if info.control_socket.exists() {
        return info;
    }
    let control_socket = KernelName::of(Who::Xpyd, root, &info.name).socket();
    RunInfo { control_socket, ..info }
}

/// The result of a status request to a socket.
#[derive(Debug)]
enum SocketReply {
    /// No process of that user listens.
    NoListener,
    /// The process with this id listens, but sends no valid status.
    Silent(u32),
    /// A run.
    Run(Box<RunInfo>),
}

impl SocketReply {
    fn run(self) -> Option<RunInfo> {
        match self {
            Self::Run(info) => Some(*info),
            Self::NoListener | Self::Silent(_) => None,
        }
    }
}

/// Requests the status at `socket`. Trusts only a visible process of `user`.
fn ask(socket: &Path, user: u32) -> SocketReply {
    let Ok(Some((stream, pid))) = connect_to_user(socket, user) else {
        return SocketReply::NoListener;
    };
    match run_of(stream) {
        Ok(info) => SocketReply::Run(Box::new(RunInfo {
            control_socket: socket.to_owned(),
            ..info
        })),
        Err(_) => SocketReply::Silent(pid),
    }
}

/// The run of the process of this user that listens at `socket`.
pub(super) fn listener_at(socket: &Path) -> Option<u32> {
    let answered = connect_to_user(socket, getuid().as_raw()).ok().flatten();
    answered.map(|(_, pid)| pid)
}

fn run_of(mut stream: UnixStream) -> io::Result<RunInfo> {
    #[derive(Deserialize)]
    struct StatusBody {
        run: RunInfo,
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: xpyd\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
    let body = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let body = body.map_or(&[][..], |end| &answer[end + 4..]);
    let StatusBody { run } = serde_json::from_slice(body)?;
    Ok(run)
}

/// A run that exists.
#[derive(Debug)]
pub enum FoundRun {
    /// xpyd answers.
    Up(Box<RunInfo>),
    /// xpyd runs but does not answer.
    Silent {
        /// Its name.
        name: String,
        /// Its process id, if known.
        pid: Option<u32>,
    },
    /// Its xpyd is gone, and a shim keeps its engines.
    Kept {
        /// Its name.
        name: String,
    },
    /// Another user's run, which only that user and root can query.
    Foreign {
        /// Its name.
        name: String,
        /// The user id.
        user: u32,
    },
}

impl FoundRun {
    /// The run's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Up(info) => &info.name,
            Self::Silent { name, .. } | Self::Kept { name } | Self::Foreign { name, .. } => name,
        }
    }
}

/// The runs that [`find`] finds in this environment.
pub fn visible() -> Vec<FoundRun> {
    if looks_at_large() {
        return all();
    }
    let root = runtime_root();
    seen(std::slice::from_ref(&root), |known| known.is_in(&root))
}

/// All runs of this user in every environment, and the visible runs of other users.
pub fn all() -> Vec<FoundRun> {
    seen(&[vec![runtime_root()], other_roots()].concat(), |_| true)
}

fn seen(roots: &[PathBuf], is_wanted: impl Fn(&KernelName) -> bool) -> Vec<FoundRun> {
    let mut known = KernelName::all();
    known.retain(is_wanted);
    let mut seen: Vec<FoundRun> = Vec::new();
    let mut add = |found: FoundRun| {
        let is_known = |known: &FoundRun| match (known, &found) {
            (FoundRun::Up(known), FoundRun::Up(found)) => known.is_same_run(found),
            (FoundRun::Up(known), FoundRun::Silent { pid, .. }) => Some(known.pid) == *pid,
            _ => false,
        };
        if !seen.iter().any(is_known) {
            seen.push(found);
        }
    };
    for root in roots {
        for name in names(root, |_| true) {
            match find_in(root, &name) {
                Ok(Some(info)) => add(FoundRun::Up(Box::new(info))),
                Err(RunDirError::NotPublished { name, pid }) => add(FoundRun::Silent { name, pid }),
                Ok(None) | Err(_) => {}
            }
        }
    }
    for known in known.iter().filter(|known| known.who == Who::Xpyd) {
        if !may_ask(known) {
            let (name, user) = (known.name.clone(), known.user);
            add(FoundRun::Foreign { name, user });
            continue;
        }
        match ask(&known.socket(), known.user) {
            SocketReply::Run(info) => add(FoundRun::Up(info)),
            SocketReply::Silent(pid) => add(FoundRun::Silent {
                name: known.name.clone(),
                pid: Some(pid),
            }),
            SocketReply::NoListener => {}
        }
    }
    let is_kept =
        |kept: &&KernelName| kept.who == Who::Shim && may_ask(kept) && !known.contains(&kept.of_same_run(Who::Xpyd));
    let kept: Vec<FoundRun> = known
        .iter()
        .filter(is_kept)
        .map(|kept| FoundRun::Kept {
            name: kept.name.clone(),
        })
        .collect();
    seen.extend(kept);
    seen.sort_by(|left, right| left.name().cmp(right.name()));
    seen
}

/// Names of runs that were killed: their files exist, and no process holds their lock. The next run of that name removes the
/// files.
pub fn stale() -> Vec<String> {
    stale_in(&runtime_root())
}

/// [`stale`] below another folder than the user's.
pub fn stale_in(root: &Path) -> Vec<String> {
    let has_files = |folder: &Path| [RUN_FILE, SOCKET_FILE].iter().any(|file| folder.join(file).exists());
    let mut names = names(root, has_files);
    names.retain(|name| find_in(root, name).is_ok_and(|found| found.is_none()));
    names
}

/// Names of the runs below `root` whose folder satisfies the condition, sorted.
fn names(root: &Path, is_wanted: impl Fn(&Path) -> bool) -> Vec<String> {
    if check_private(root).is_err() {
        return Vec::new();
    }
    let entries = fs_err::read_dir(root).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names
        .filter(|name| check_name(name).is_ok() && is_wanted(&root.join(name)))
        .collect();
    names.sort();
    names
}

/// The sockets at which a shim can keep the engines of the run `name`, the most likely first.
pub fn kept_sockets(name: &str) -> Result<Vec<PathBuf>, RunDirError> {
    check_name(name)?;
    let places = |root: PathBuf| {
        let by_name = KernelName::of(Who::Shim, &root, name).socket();
        [root.join(name).join(ATTACH_FILE), by_name]
    };
    let mut sockets: Vec<PathBuf> = places(runtime_root()).into();
    if looks_at_large() {
        sockets.extend(other_roots().into_iter().flat_map(places));
        let own = getuid().as_raw();
        let known = KernelName::all().into_iter();
        let of_name = known.filter(|known| known.who == Who::Shim && known.user == own && known.name == name);
        sockets.extend(of_name.map(|known| known.socket()));
    }
    Ok(sockets)
}

/// A warning if a detached run ends when its user logs out.
pub fn fate_at_logout() -> Option<String> {
    let user = nix::unistd::User::from_uid(getuid()).ok().flatten()?;
    let is_of_login = runtime_root().starts_with(login_folder());
    is_of_login.then(|| fate(Path::new("/"), &user.name)).flatten()
}

/// The effect of systemd's settings (files below `system`) on processes of a user who logs out.
fn fate(system: &Path, user: &str) -> Option<String> {
    let lingers = system.join("var/lib/systemd/linger").join(user).exists();
    let is_managed = system.join("run/systemd/system").is_dir();
    (is_managed && !lingers).then(|| {
        format!(
            "when `{user}` logs out, systemd may end this run (KillUserProcesses=yes); `loginctl enable-linger {user}` prevents that"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_user_without_linger_is_warned() {
        let system = tempfile::tempdir().unwrap();
        assert_eq!(fate(system.path(), "ann"), None, "no systemd");
        fs_err::create_dir_all(system.path().join("run/systemd/system")).unwrap();
        assert!(
            fate(system.path(), "ann")
                .unwrap()
                .contains("`loginctl enable-linger ann`")
        );
        let linger = system.path().join("var/lib/systemd/linger");
        fs_err::create_dir_all(&linger).unwrap();
        fs_err::write(linger.join("ann"), "").unwrap();
        assert_eq!(fate(system.path(), "ann"), None);
    }
}
