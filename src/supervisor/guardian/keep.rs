//! The place where a guardian whose xpyd has gone waits for the next one: a Unix socket in the run's runtime folder.
//!
//! It is open from the moment that engines are to be kept, so that whoever finds xpyd's lock free finds the guardian too.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::protocol::Keep;

/// An open place to wait. Dropping it closes and removes it.
#[derive(Debug)]
pub(super) struct Meeting {
    pub(super) keep: Keep,
    listener: UnixListener,
}

impl Meeting {
    /// Opens it, in place of what a killed guardian may have left there.
    pub(super) fn open(keep: Keep) -> io::Result<Self> {
        match fs_err::remove_file(&keep.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&keep.socket)?;
        fs_err::set_permissions(&keep.socket, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { keep, listener })
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The next xpyd, if it has come. Only a process of the same user is one: it will be given the engines.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.listener.accept().ok()?;
        let peer = getsockopt(&stream, PeerCredentials).ok()?;
        stream.set_nonblocking(true).ok()?;
        (peer.uid() == geteuid().as_raw()).then_some(stream)
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        // One that is gone already is as good.
        let _ = fs_err::remove_file(&self.keep.socket);
    }
}
