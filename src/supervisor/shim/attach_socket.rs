//! `attach.sock`: where a shim whose xpyd is gone waits for the next one. A Unix socket in the run's runtime folder, and an
//! abstract one, because that folder can be removed.
//!
//! It is open as long as the engines are to be kept, so that a process that finds xpyd's lock free finds the shim as well.

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

/// Listens for the next xpyd. Dropping it closes and removes the socket.
#[derive(Debug)]
pub(super) struct AttachListener {
    pub(super) keep: Keep,
    listener: UnixListener,
    /// The abstract socket; `None` if another process has the name.
    by_name: Option<UnixListener>,
}

impl AttachListener {
    /// Opens the socket. Replaces one that a killed shim left.
    pub(super) fn open(keep: Keep) -> io::Result<Self> {
        Ok(Self {
            listener: listen(&keep.socket)?,
            by_name: KernelName::of_file(Who::Shim, &keep.socket).and_then(|name| listen_as(&name).ok()),
            keep,
        })
    }

    /// Opens the path again if it was removed. Without the folder only the abstract socket remains.
    pub(super) fn restore(&mut self) {
        if fs_err::symlink_metadata(&self.keep.socket).is_err()
            && let Ok(listener) = listen(&self.keep.socket)
        {
            self.listener = listener;
        }
    }

    /// The descriptors that become readable when a process connects.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listeners().map(AsFd::as_fd)
    }

    fn listeners(&self) -> impl Iterator<Item = &UnixListener> {
        std::iter::once(&self.listener).chain(&self.by_name)
    }

    /// The connection of the next xpyd, if it has come. Only a process of the same user is accepted, because it gets the engines.
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

impl Drop for AttachListener {
    fn drop(&mut self) {
        // It can be gone already.
        let _ = fs_err::remove_file(&self.keep.socket);
    }
}
