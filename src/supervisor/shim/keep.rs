//! The place where a shim whose xpyd has gone waits for the next one: a Unix socket in the run's runtime folder, and one
//! without a path, because that folder may be removed.
//!
//! It is open from the moment that engines are to be kept, so that whoever finds xpyd's lock free finds the shim too.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::protocol::Keep;
use crate::sockets::{KernelName, Who, listen_to};

/// An open place to wait. Dropping it closes and removes it.
#[derive(Debug)]
pub(super) struct Meeting {
    pub(super) keep: Keep,
    listener: UnixListener,
    /// `None` where somebody else has the name.
    by_name: Option<UnixListener>,
}

impl Meeting {
    /// Opens it, in place of what a killed shim may have left there.
    pub(super) fn open(keep: Keep) -> io::Result<Self> {
        Ok(Self {
            listener: listen(&keep.socket)?,
            by_name: KernelName::of_file(Who::Shim, &keep.socket).and_then(|name| listen_as(&name).ok()),
            keep,
        })
    }

    /// Opens its path again, should somebody have removed that. As long as there is no folder, the name has to do.
    pub(super) fn restore(&mut self) {
        if fs_err::symlink_metadata(&self.keep.socket).is_err()
            && let Ok(listener) = listen(&self.keep.socket)
        {
            self.listener = listener;
        }
    }

    /// What becomes readable when somebody comes.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listeners().map(AsFd::as_fd)
    }

    fn listeners(&self) -> impl Iterator<Item = &UnixListener> {
        std::iter::once(&self.listener).chain(&self.by_name)
    }

    /// The next xpyd, if it has come. Only a process of the same user is one: it will be given the engines.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.listeners().find_map(|listener| listener.accept().ok())?;
        let peer = getsockopt(&stream, PeerCredentials).ok()?;
        stream.set_nonblocking(true).ok()?;
        (peer.uid() == geteuid().as_raw()).then_some(stream)
    }
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    match fs_err::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs_err::set_permissions(socket, Permissions::from_mode(0o600))?;
    without_blocking(listener)
}

fn listen_as(name: &KernelName) -> io::Result<UnixListener> {
    without_blocking(listen_to(&name.take()?)?)
}

fn without_blocking(listener: UnixListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Drop for Meeting {
    fn drop(&mut self) {
        // One that is gone already is as good.
        let _ = fs_err::remove_file(&self.keep.socket);
    }
}
