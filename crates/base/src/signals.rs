//! The signals that ask xpyd to stop, as one stream.
//!
//! A signal that was ignored when xpyd started stays ignored: `nohup` relies on that, and so does a shell without job control for
//! background processes.

use std::io;

use nix::sys::signal::{SigSet, Signal as Number};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A request to stop, made with a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// Ctrl+C (SIGINT).
    Interrupt,
    /// SIGTERM, from `kill`, systemd or a container runtime.
    Terminate,
    /// The terminal went away (SIGHUP).
    Hangup,
}

/// A listener for one signal. It never fires if the signal was ignored when this process started.
#[derive(Debug)]
pub struct SignalListener(Option<Signal>);

impl SignalListener {
    /// Starts to listen. Must be called within a tokio runtime.
    pub fn listen(kind: SignalKind) -> io::Result<Self> {
        if is_ignored(&fs_err::read_to_string("/proc/self/status")?, kind.as_raw_value()) {
            return Ok(Self(None));
        }
        Self::listen_always(kind)
    }

    fn listen_always(kind: SignalKind) -> io::Result<Self> {
        signal(kind).map(Some).map(Self)
    }

    /// Completes at the next signal. Safe to cancel.
    pub async fn recv(&mut self) {
        match &mut self.0 {
            Some(signal) => drop(signal.recv().await),
            None => std::future::pending().await,
        }
    }
}

/// Whether a process ignores a signal, by the mask in its `/proc/PID/status`.
fn is_ignored(status: &str, number: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.unwrap_or_default() >> (number - 1) & 1 == 1
}

/// Listens for the signals that stop a run. Once created, these signals no longer end the process by themselves.
#[derive(Debug)]
pub struct StopSignals {
    interrupt: SignalListener,
    terminate: SignalListener,
    hangup: SignalListener,
}

impl StopSignals {
    /// Starts to listen. Must be called within a tokio runtime.
    pub fn listen() -> io::Result<Self> {
        // Other services reopen their logs on these. Without a handler they would end this process, and its engines.
        for kind in [SignalKind::user_defined1(), SignalKind::user_defined2()] {
            drop(signal(kind)?);
        }
        Ok(Self {
            interrupt: SignalListener::listen(SignalKind::interrupt())?,
            terminate: SignalListener::listen(SignalKind::terminate())?,
            hangup: SignalListener::listen(SignalKind::hangup())?,
        })
    }

    /// The same for a process whose parent, another xpyd, ends it with SIGTERM: SIGTERM is handled in any case.
    pub fn listen_to_parent() -> io::Result<Self> {
        Ok(Self {
            terminate: SignalListener::listen_always(SignalKind::terminate())?,
            ..Self::listen()?
        })
    }

    /// The next request to stop. Safe to cancel.
    pub async fn next(&mut self) -> StopSignal {
        tokio::select! {
            () = self.interrupt.recv() => StopSignal::Interrupt,
            () = self.terminate.recv() => StopSignal::Terminate,
            () = self.hangup.recv() => StopSignal::Hangup,
        }
    }
}

/// Unblocks all signals but SIGXFSZ, in this thread and in those that it starts. A write beyond the file size limit (`ulimit -f`)
/// must be an error of that write, and signals that a parent left blocked must reach xpyd.
pub fn prepare() {
    let mut blocked = SigSet::empty();
    blocked.add(Number::SIGXFSZ);
    // It fails only for an unknown signal.
    let _ = blocked.thread_set_mask();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        // SIGHUP (1), SIGQUIT (3) and SIGPIPE (13).
        let status = "Name:\txpyd\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000001005\nSigCgt:\t0000000000000002\n";
        let ignored: Vec<i32> = (1..=64).filter(|number| is_ignored(status, *number)).collect();
        assert_eq!(ignored, [1, 3, 13]);
        assert!(!is_ignored("Name:\txpyd\n", 1), "nobody knows, so it is heeded");
    }
}
