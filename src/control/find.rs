//! Finding runs: by their files, and by the names under which the kernel knows them.
//!
//! A run is there exactly as long as its process: a file alone proves nothing, and neither does the lack of one. The folder of
//! this environment comes first. A shell without the variables of a login (cron, `su -`, `docker exec`) and one with them look
//! at the other places, too; whoever has set `XDG_RUNTIME_DIR` to a folder of his own sees that folder only.

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

/// How long a run may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// More than any status.
const LONGEST_ANSWER: u64 = 8 << 20;

/// The folder with all runtime folders of this user, in this environment.
pub(super) fn runtime_root() -> PathBuf {
    own_variable().map_or_else(root_without_login, |folder| folder.join("xpyd"))
}

/// `XDG_RUNTIME_DIR`. Under `sudo` and `su` it often names another user's folder, or one that is not there.
fn own_variable() -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)?;
    let is_own = fs_err::metadata(&folder).is_ok_and(|found| found.uid() == getuid().as_raw());
    (folder.is_absolute() && is_own).then_some(folder)
}

fn root_without_login() -> PathBuf {
    PathBuf::from(format!("/tmp/xpyd-{}", getuid()))
}

/// The folder that a log-in makes for this user, and a log-out removes.
fn login_folder() -> PathBuf {
    PathBuf::from(format!("/run/user/{}", getuid()))
}

/// Whether runs below other folders are of interest in this environment.
fn looks_at_large() -> bool {
    own_variable().is_none_or(|folder| folder == login_folder())
}

/// The usual folders that are not this environment's.
fn other_roots() -> Vec<PathBuf> {
    let own = runtime_root();
    let usual = [login_folder().join("xpyd"), root_without_login()];
    usual.into_iter().filter(|root| *root != own).collect()
}

/// The run of this name, or `None` if none is there.
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
    // A run of one's own is meant before those of others.
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
        // The folder is there, so it must be ours before anything in it is believed.
        check_private(root)?;
        check_private(&folder)?;
        let info: Option<RunInfo> = read_json(&folder.join(RUN_FILE))?;
        if let Some(info) = info.filter(RunInfo::is_alive) {
            return Ok(Some(reachable(info, root)));
        }
    }
    // Its files may have been removed, but not what it listens on.
    let by_name = KernelName::of(Who::Xpyd, root, name);
    let not_published = |pid| RunDirError::NotPublished {
        name: name.to_owned(),
        pid,
    };
    let mut silent = None;
    for socket in [folder.join(SOCKET_FILE), by_name.socket()] {
        match ask(&socket, by_name.user) {
            Answer::Run(info) => return Ok(Some(*info)),
            Answer::Silent(pid) => silent = Some(pid),
            Answer::Nobody => {}
        }
    }
    match silent {
        Some(pid) => Err(not_published(Some(pid))),
        // The run may have ended between the two looks.
        None if was_locked && is_locked(&lock_path)? => Err(not_published(read_pid(&lock_path))),
        None => Ok(None),
    }
}

/// Where the run can be asked: its socket may have lost its path.
fn reachable(info: RunInfo, root: &Path) -> RunInfo {
    if info.control_socket.exists() {
        return info;
    }
    let control_socket = KernelName::of(Who::Xpyd, root, &info.name).socket();
    RunInfo { control_socket, ..info }
}

/// What a socket says.
#[derive(Debug)]
enum Answer {
    /// Nobody of that user listens.
    Nobody,
    /// This process listens, and says nothing, or something else.
    Silent(u32),
    /// A run.
    Run(Box<RunInfo>),
}

impl Answer {
    fn run(self) -> Option<RunInfo> {
        match self {
            Self::Run(info) => Some(*info),
            Self::Nobody | Self::Silent(_) => None,
        }
    }
}

/// Asks who listens at `socket`. Only a process of that `user`, which this process can see, is believed.
fn ask(socket: &Path, user: u32) -> Answer {
    let Ok(Some((stream, pid))) = connect_to_user(socket, user) else {
        return Answer::Nobody;
    };
    match run_of(stream) {
        Ok(info) => Answer::Run(Box::new(RunInfo {
            control_socket: socket.to_owned(),
            ..info
        })),
        Err(_) => Answer::Silent(pid),
    }
}

/// The process of this user that listens at `socket`.
pub(super) fn listener_at(socket: &Path) -> Option<u32> {
    let answered = connect_to_user(socket, getuid().as_raw()).ok().flatten();
    answered.map(|(_, pid)| pid)
}

fn run_of(mut stream: UnixStream) -> io::Result<RunInfo> {
    #[derive(Deserialize)]
    struct Told {
        run: RunInfo,
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: xpyd\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
    let body = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let body = body.map_or(&[][..], |end| &answer[end + 4..]);
    let Told { run } = serde_json::from_slice(body)?;
    Ok(run)
}

/// A run that is there.
#[derive(Debug)]
pub enum Seen {
    /// It can be asked.
    Up(Box<RunInfo>),
    /// It is there, and says nothing.
    Silent {
        /// Its name.
        name: String,
        /// Its process.
        pid: Option<u32>,
    },
    /// Its xpyd has gone, and a shim keeps its engines.
    Kept {
        /// Its name.
        name: String,
    },
    /// It is another user's, which only that user and root may ask.
    Foreign {
        /// Its name.
        name: String,
        /// Whose it is.
        user: u32,
    },
}

impl Seen {
    /// The run's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Up(info) => &info.name,
            Self::Silent { name, .. } | Self::Kept { name } | Self::Foreign { name, .. } => name,
        }
    }
}

/// The runs that [`find`] finds in this environment.
pub fn visible() -> Vec<Seen> {
    if looks_at_large() {
        return all();
    }
    let root = runtime_root();
    seen(std::slice::from_ref(&root), |known| known.is_in(&root))
}

/// All runs of this user, wherever they were started; those of other users as far as this one may know.
pub fn all() -> Vec<Seen> {
    seen(&[vec![runtime_root()], other_roots()].concat(), |_| true)
}

fn seen(roots: &[PathBuf], is_wanted: impl Fn(&KernelName) -> bool) -> Vec<Seen> {
    let mut known = KernelName::all();
    known.retain(is_wanted);
    let mut seen: Vec<Seen> = Vec::new();
    let mut add = |found: Seen| {
        let is_known = |known: &Seen| match (known, &found) {
            (Seen::Up(known), Seen::Up(found)) => known.is_same_run(found),
            (Seen::Up(known), Seen::Silent { pid, .. }) => Some(known.pid) == *pid,
            _ => false,
        };
        if !seen.iter().any(is_known) {
            seen.push(found);
        }
    };
    for root in roots {
        for name in names(root, |_| true) {
            match find_in(root, &name) {
                Ok(Some(info)) => add(Seen::Up(Box::new(info))),
                Err(RunDirError::NotPublished { name, pid }) => add(Seen::Silent { name, pid }),
                Ok(None) | Err(_) => {}
            }
        }
    }
    for known in known.iter().filter(|known| known.who == Who::Xpyd) {
        if !may_ask(known) {
            let (name, user) = (known.name.clone(), known.user);
            add(Seen::Foreign { name, user });
            continue;
        }
        match ask(&known.socket(), known.user) {
            Answer::Run(info) => add(Seen::Up(info)),
            Answer::Silent(pid) => add(Seen::Silent {
                name: known.name.clone(),
                pid: Some(pid),
            }),
            Answer::Nobody => {}
        }
    }
    let is_kept =
        |kept: &&KernelName| kept.who == Who::Shim && may_ask(kept) && !known.contains(&kept.of_same_run(Who::Xpyd));
    let kept: Vec<Seen> = known
        .iter()
        .filter(is_kept)
        .map(|kept| Seen::Kept {
            name: kept.name.clone(),
        })
        .collect();
    seen.extend(kept);
    seen.sort_by(|left, right| left.name().cmp(right.name()));
    seen
}

/// Names of runs that were killed: their files are there, and nobody holds their lock. The next run of that name removes what
/// they left.
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

/// Names of the runs below `root` whose folder is as wanted, in order.
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

/// Where a shim may keep the engines of the run `name`, most likely places first.
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

/// What becomes of a detached run when its user logs out, where that is not just nothing.
pub fn fate_at_logout() -> Option<String> {
    let user = nix::unistd::User::from_uid(getuid()).ok().flatten()?;
    let is_of_login = runtime_root().starts_with(login_folder());
    is_of_login.then(|| fate(Path::new("/"), &user.name)).flatten()
}

/// What systemd, whose files are below `system`, does to processes of a user without a log-in.
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
    fn a_user_without_linger_is_warned_and_no_other() {
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
