//! Sends and receives bytes and file descriptors over a Unix socket. It knows no message and never blocks.
//!
//! A descriptor travels with the first byte of the message that announces it, so it has arrived when that message has.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// The send queue.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Encoded messages that are not sent yet.
    pub(super) bytes: Vec<u8>,
    /// A descriptor, and the offset of the byte with which it is sent.
    descriptor: Option<(usize, OwnedFd)>,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.descriptor = None;
    }

    /// Attaches a descriptor to the message that is encoded next.
    pub(super) fn attach(&mut self, descriptor: OwnedFd) {
        self.descriptor = Some((self.bytes.len(), descriptor));
    }

    /// Sends as much as the socket takes at once.
    pub(super) fn send(&mut self, socket: impl AsFd) -> io::Result<()> {
        let sent = match &self.descriptor {
            Some((0, descriptor)) => {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                let descriptors = [descriptor.as_fd()];
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                sendmsg(
                    socket,
                    &[IoSlice::new(&self.bytes)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )?
            }
            held => {
                let until = held.as_ref().map_or(self.bytes.len(), |(offset, _)| *offset);
                let bytes = [IoSlice::new(&self.bytes[..until])];
                sendmsg(socket, &bytes, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?
            }
        };
        self.bytes.drain(..sent);
        self.descriptor = match self.descriptor.take() {
            // The descriptor was sent with the first of these bytes.
            Some((0, _)) | None => None,
            Some((offset, descriptor)) => Some((offset - sent, descriptor)),
        };
        Ok(())
    }
}

/// Receives once. A descriptor that comes along replaces the one in `descriptor`; it is close-on-exec.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8], descriptor: &mut Option<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            for received in descriptors {
                *descriptor = Some(received);
            }
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::os::unix::net::UnixStream;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_its_message_close_on_exec() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut outbox = Outbox::default();
        outbox.bytes.extend_from_slice(b"before");
        outbox.attach(listener.into());
        outbox.bytes.extend_from_slice(b"with");
        let (mut descriptor, mut buffer) = (None, [0; 64]);
        outbox.send(&ours).unwrap();
        assert_eq!(receive(&theirs, &mut buffer, &mut descriptor).unwrap(), 6);
        assert!(descriptor.is_none());
        outbox.send(&ours).unwrap();
        assert!(outbox.is_empty());
        assert_eq!(receive(&theirs, &mut buffer, &mut descriptor).unwrap(), 4);
        let descriptor = descriptor.expect("a descriptor");
        assert_eq!(
            fcntl(&descriptor, FcntlArg::F_GETFD).unwrap(),
            FdFlag::FD_CLOEXEC.bits()
        );
        assert_eq!(TcpListener::from(descriptor).local_addr().unwrap(), address);
    }
}
