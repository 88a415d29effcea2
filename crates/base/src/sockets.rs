//! Unix sockets of runs, with a path and abstract ones.
//!
//! A log-out, a cleaner of `/tmp` or another environment can hide a folder. A name in the abstract namespace exists exactly as
//! long as the process that holds it, in all environments of the machine. Any process can take any name, so a client checks the
//! process that listens. As a path, an abstract name begins with a NUL.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind as bind_to, connect as connect_to, getsockopt, listen,
    socket, sockopt::PeerCredentials,
};
use nix::unistd::getuid;

/// The number of connection attempts to a full queue, and the pause between two. A suspended process leaves its queue full.
const ATTEMPTS: usize = 100;
const PAUSE_MS: u8 = 20;

/// Connects to a socket at a path or an abstract name.
pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let name = socket.as_os_str().as_bytes();
    let address = match name.strip_prefix(b"\0") {
        Some(name) => UnixAddr::new_abstract(name)?,
        None => UnixAddr::new(name)?,
    };
    let mut result = connect_to(stream.as_raw_fd(), &address);
    for _ in 0..ATTEMPTS {
        if result != Err(Errno::EAGAIN) {
            break;
        }
        poll(&mut [], PollTimeout::from(PAUSE_MS))?;
        result = connect_to(stream.as_raw_fd(), &address);
    }
    result?;
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Connects to a visible process of that user, and returns its id. Any process can take any name, and a process in another
/// container has no id here.
pub fn connect_to_user(socket: &Path, user: u32) -> io::Result<Option<(UnixStream, u32)>> {
    let stream = connect(socket)?;
    let peer = getsockopt(&stream, PeerCredentials)?;
    let pid = u32::try_from(peer.pid()).ok().filter(|pid| *pid > 0);
    Ok(pid.filter(|_| peer.uid() == user).map(|pid| (stream, pid)))
}

/// A socket as people read it: the kernel's tools show the NUL of an abstract name as `@`.
pub fn shown(socket: &Path) -> String {
    socket.display().to_string().replace('\0', "@")
}

/// Ports that the run of this process will use, claimed from every other xpyd of this network namespace.
///
/// A port that is only planned is not open yet, so two runs that start at the same moment would choose the same ones. A claim
/// is an abstract socket for each port, so it ends with the process at the latest.
#[derive(Debug)]
pub struct PortClaim(#[expect(dead_code, reason = "held open")] Vec<UnixDatagram>);

impl PortClaim {
    /// Claims all of these ports, or none: `None` if another process has claimed one.
    pub fn take(ports: impl IntoIterator<Item = u16>) -> Option<Self> {
        let mut held = Vec::new();
        for port in ports {
            let address = SocketAddr::from_abstract_name(format!("xpyd-port-{port}"));
            match address.and_then(|address| UnixDatagram::bind_addr(&address)) {
                Ok(socket) => held.push(socket),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => return None,
                // Without a claim, the checks of the start find a port that is in use.
                Err(_) => {}
            }
        }
        Some(Self(held))
    }

    /// Whether a process has claimed one of these ports now. It claims nothing, so it disturbs no start.
    pub fn is_taken(ports: impl IntoIterator<Item = u16>) -> bool {
        let table = fs_err::read_to_string(TABLE).unwrap_or_default();
        let claimed = |port| table.lines().any(|line| line.ends_with(&format!(" @xpyd-port-{port}")));
        ports.into_iter().any(claimed)
    }
}

/// The file that lists the Unix sockets.
const TABLE: &str = "/proc/net/unix";

/// The kind of process that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// xpyd, with the control socket.
    Xpyd,
    /// A shim that keeps engines, with `attach.sock`.
    Shim,
}

/// The abstract name of one socket of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelName {
    /// The kind of process that listens.
    pub who: Who,
    /// The user id of the run's owner.
    pub user: u32,
    /// A hash of the folder with all runtime folders: run names are unique only within it.
    root: u64,
    /// The run's name.
    pub name: String,
}

impl KernelName {
    /// The name for this user's run `name` in the folder `root`.
    pub fn of(who: Who, root: &Path, name: &str) -> Self {
        Self {
            who,
            user: getuid().as_raw(),
            root: mark(root),
            name: name.to_owned(),
        }
    }

    /// The name for the run whose runtime folder contains `file`.
    pub fn of_file(who: Who, file: &Path) -> Option<Self> {
        let folder = file.parent()?;
        Some(Self::of(who, folder.parent()?, folder.file_name()?.to_str()?))
    }

    /// The name for another process of the same run.
    #[must_use]
    pub fn of_same_run(&self, who: Who) -> Self {
        Self { who, ..self.clone() }
    }

    /// All names that a process holds now.
    pub fn all() -> Vec<Self> {
        let table = fs_err::read_to_string(TABLE).unwrap_or_default();
        // The kernel shows the NUL at the beginning as `@`.
        let names = table
            .lines()
            .filter_map(|line| line.split_once(" @"))
            .map(|(_, name)| name);
        let mut names: Vec<Self> = names.filter_map(Self::parse).collect();
        names.sort_by(|left, right| (left.user, &left.name, left.root).cmp(&(right.user, &right.name, right.root)));
        names.dedup();
        names
    }

    /// Whether it belongs to a run below the folder `root`.
    pub fn is_in(&self, root: &Path) -> bool {
        self.root == mark(root)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("xpyd/")?.splitn(4, '/');
        let who = match parts.next()? {
            "run" => Who::Xpyd,
            "kept" => Who::Shim,
            _ => return None,
        };
        Some(Self {
            who,
            user: parts.next()?.parse().ok()?,
            root: u64::from_str_radix(parts.next()?, 16).ok()?,
            name: parts.next()?.to_owned(),
        })
    }

    fn text(&self) -> String {
        let who = match self.who {
            Who::Xpyd => "run",
            Who::Shim => "kept",
        };
        format!("xpyd/{who}/{}/{:016x}/{}", self.user, self.root, self.name)
    }

    /// The path form, which begins with a NUL.
    pub fn socket(&self) -> PathBuf {
        OsString::from_vec(format!("\0{}", self.text()).into_bytes()).into()
    }

    /// Binds the name without listening: connections are refused.
    pub fn take(&self) -> io::Result<OwnedFd> {
        let address = UnixAddr::new_abstract(self.text().as_bytes())?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let taken = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        bind_to(taken.as_raw_fd(), &address)?;
        Ok(taken)
    }
}

/// Listens on a bound name.
pub fn listen_to(taken: &OwnedFd) -> io::Result<UnixListener> {
    let taken = taken.try_clone()?;
    listen(&taken, Backlog::new(128)?)?;
    Ok(UnixListener::from(taken))
}

/// FNV-1a: the same in every version of xpyd, unlike the hashes of the standard library.
fn mark(root: &Path) -> u64 {
    let bytes = root.as_os_str().as_bytes().iter();
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_names_round_trip_and_differ_by_folder() {
        let here = KernelName::of(Who::Xpyd, Path::new("/tmp/xpyd-7"), "a.b-c_1");
        assert_eq!(KernelName::parse(&here.text()), Some(here.clone()));
        assert_ne!(
            here,
            KernelName::of(Who::Xpyd, Path::new("/run/user/7/xpyd"), "a.b-c_1")
        );
        for other in ["xpyd/port/7100", "xpyd-tests/4000", "xpyd/run/x/0/a", ""] {
            assert_eq!(KernelName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_held_name_is_listed_and_refuses_until_it_listens() {
        let folder = tempfile::tempdir().unwrap();
        let name = KernelName::of(Who::Xpyd, folder.path(), "a");
        let taken = name.take().unwrap();
        assert!(KernelName::all().contains(&name));
        assert_eq!(name.take().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let refused = connect(&name.socket()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let listener = listen_to(&taken).unwrap();
        connect(&name.socket()).unwrap();
        drop((taken, listener));
        assert!(!KernelName::all().contains(&name));
    }
}
