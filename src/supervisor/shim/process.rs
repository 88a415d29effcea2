//! The main loop of `xpyd shim`: one thread that waits for commands, children and output, and never blocks on one of them.
//!
//! Its socket to xpyd is its stdin. It ends on command, or when the socket closes because xpyd is gone. Before it ends it ends
//! every engine; if xpyd asked to keep them, it waits for the next xpyd instead. Only SIGKILL ends it: then the kernel kills the
//! leaders, and the monitor the rest.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{getppid, setsid};
use tokio::time::Instant;

use super::attach_socket::AttachListener;
use super::channel::{self, Outbox};
use super::engine::Engine;
use super::monitor::{self, ForkSide};
use super::protocol::{self, Command, Event, Keep, Kept, KeptEngine, ProtocolError, Spawn};
use super::shm::SharedFiles;
use super::sweep::sweep;
use super::tree::{Process, ProcessTable};
use crate::fleet::EngineId;
use crate::fleet::Exit;
use crate::report::ExitStatus;

/// Time between two checks of trees while nothing happens, to learn members before their parents are gone.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Time between two checks of a tree without a leader: its last members can have another parent that reaps them.
const LOOK_LEADERLESS: Duration = Duration::from_millis(200);

/// Time for the end after xpyd is gone. A process that waits in the kernel for longer is left.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// Time for a process that attaches to send its first command, during which no other is accepted. `xpyd up` surveys the machine in
/// between.
const VISIT: Duration = Duration::from_mins(2);

/// How long unowned processes can outlive SIGKILL in a shutdown before they are reported.
const UNOWNED_DEADLINE: Duration = Duration::from_secs(3);

/// Runs the shim in a child process; this process becomes its monitor.
///
/// Must be called before any other thread is started. Returns [`ExitStatus::Usage`] if stdin is no Unix socket, as when a person
/// types the hidden command.
pub fn run() -> ExitStatus {
    let Ok(control) = control_socket() else {
        return ExitStatus::Usage;
    };
    let ended = start_session().and_then(|()| monitor::fork_shim(control));
    match ended {
        Ok(ForkSide::Monitor(status)) => status,
        Ok(ForkSide::Shim(control)) => match Shim::start(control) {
            Ok(mut shim) => shim.serve(),
            Err(_) => ExitStatus::Bug,
        },
        Err(_) => ExitStatus::Bug,
    }
}

/// Detaches monitor and shim from the terminal with a session of their own, because xpyd handles Ctrl+C and hang-up, and blocks
/// every signal that would end them.
fn start_session() -> io::Result<()> {
    setsid()?;
    // Blocked rather than ignored, because ignoring is inherited by engines even through exec.
    let mut blocked = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        // A log that exceeds the file size limit is a write error, not a signal.
        Signal::SIGXFSZ,
    ] {
        blocked.add(signal);
    }
    Ok(blocked.thread_block()?)
}

/// This process's stdin, as a socket.
fn control_socket() -> io::Result<UnixStream> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.peer_addr()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The mode of the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// xpyd is connected.
    Serving,
    /// xpyd is gone; the shim waits for the next one until this time.
    Waiting(Instant),
    /// xpyd is gone or asked for the end; the shim ends at this time at the latest, whatever is left.
    Ending(Instant),
}

/// A connection at `attach.sock` that has sent no command yet; it can be one that only reads the state.
#[derive(Debug, Clone, Copy)]
struct PendingAttach {
    /// Until when the shim waited for the next xpyd before it came.
    waited_until: Instant,
    /// When its first command is due.
    leave_by: Instant,
}

#[derive(Debug)]
struct Shim {
    xpyd: XpydLink,
    children: SignalFd,
    engines: Vec<Engine>,
    /// The last incarnation of each engine that has no process.
    gone: Vec<KeptEngine>,
    /// The socket for the next xpyd, if engines are to be kept.
    meeting: Option<AttachListener>,
    /// The socket on which clients connect, held so that they wait for the next xpyd instead of being refused.
    listener: Option<OwnedFd>,
    /// The process that has attached and sent no command yet.
    pending_attach: Option<PendingAttach>,
    /// The files in `/dev/shm` before the first engine.
    foreign: SharedFiles,
    mode: Mode,
    next_check: Instant,
}

impl Shim {
    fn start(socket: UnixStream) -> io::Result<Self> {
        prctl::set_child_subreaper(true)?;
        let mut children = SigSet::empty();
        children.add(Signal::SIGCHLD);
        Ok(Self {
            xpyd: XpydLink::new(socket),
            children: SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
            engines: Vec::new(),
            gone: Vec::new(),
            meeting: None,
            listener: None,
            pending_attach: None,
            foreign: SharedFiles::present(),
            mode: Mode::Serving,
            next_check: Instant::now(),
        })
    }

    fn serve(&mut self) -> ExitStatus {
        self.send_hello(None);
        loop {
            self.xpyd.flush();
            self.wait();
            self.engines.iter_mut().for_each(Engine::drain_log);
            self.reap();
            match self.mode {
                Mode::Serving => self.accept_commands(),
                Mode::Waiting(until) => self.keep(until),
                Mode::Ending(_) => {}
            }
            let now = Instant::now();
            for engine in &mut self.engines {
                if let Some(event) = engine.tick(&self.foreign, now) {
                    self.xpyd.send(&event);
                }
            }
            self.check_trees(now);
            if let Mode::Ending(deadline) = self.mode
                && (self.engines.is_empty() || now >= deadline)
            {
                return self.end();
            }
        }
    }

    fn send_hello(&mut self, kept: Option<Kept>) {
        self.xpyd.send(&Event::Hello {
            version: protocol::VERSION,
            pid: std::process::id(),
            monitor: getppid().as_raw().unsigned_abs(),
            kept,
        });
    }

    /// Waits for an event or a deadline.
    fn wait(&self) {
        let mut polled = vec![PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
        match (self.mode, &self.meeting) {
            (Mode::Serving, _) => polled.push(PollFd::new(self.xpyd.socket(), self.xpyd.interest())),
            (Mode::Waiting(_), Some(meeting)) => {
                polled.extend(meeting.descriptors().map(|place| PollFd::new(place, PollFlags::POLLIN)));
            }
            (Mode::Waiting(_) | Mode::Ending(_), _) => {}
        }
        let logs = self.engines.iter().filter_map(Engine::log_descriptor);
        polled.extend(logs.map(|pipe| PollFd::new(pipe, PollFlags::POLLIN)));

        let due = self.engines.iter().filter_map(Engine::next_tick);
        let look = (!self.engines.is_empty()).then_some(self.next_check);
        let end = match self.mode {
            Mode::Serving => self.pending_attach.map(|visit| visit.leave_by),
            Mode::Waiting(deadline) | Mode::Ending(deadline) => Some(deadline),
        };
        let timeout = due.chain(look).chain(end).min().map(|instant| {
            // One more millisecond, because a timeout that is rounded down would spin until the deadline.
            let wait = instant.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        // Interrupted or not, the loop checks everything.
        let _ = poll(&mut polled, timeout);
    }

    /// Reaps every ended child, adopted ones included.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.children.read_signal() {}
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Exit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal as i32)),
                Err(Errno::EINTR) => continue,
                Ok(_) | Err(_) => return,
            };
            // Each reaped process can have been the last of its tree.
            self.next_check = Instant::now();
            for engine in &mut self.engines {
                if let Some(event) = engine.reaped(pid.as_raw(), exit) {
                    self.xpyd.send(&event);
                }
            }
        }
    }

    /// Checks all trees if that is due, and removes those that are empty.
    fn check_trees(&mut self, now: Instant) {
        if now < self.next_check || self.engines.is_empty() {
            return;
        }
        if let Some(meeting) = &mut self.meeting {
            meeting.restore();
        }
        let table = ProcessTable::read();
        let (control, gone, foreign) = (&mut self.xpyd, &mut self.gone, &self.foreign);
        self.engines.retain_mut(|engine| {
            let event = engine.update_tree(&table, foreign);
            if let Some(event) = &event {
                control.send(event);
                gone.push(engine.gone());
            }
            event.is_none()
        });
        let leaderless = self.engines.iter().any(Engine::is_leaderless);
        self.next_check = now + if leaderless { LOOK_LEADERLESS } else { LOOK_EVERY };
    }

    /// Carries out xpyd's commands.
    fn accept_commands(&mut self) {
        let mut open = self.xpyd.receive();
        loop {
            match self.xpyd.command() {
                Ok(Some(command)) => self.carry_out(command),
                Ok(None) => break,
                // The peer is no xpyd of this version: its connection is closed. The engines stay if the shim waits for
                // the next xpyd.
                Err(_) => {
                    open = false;
                    break;
                }
            }
        }
        open &= self.pending_attach.is_none_or(|visit| Instant::now() < visit.leave_by);
        if !open && self.mode == Mode::Serving {
            self.xpyd.close();
            match &self.meeting {
                Some(meeting) if !meeting.keep.wait.is_zero() => {
                    let until = || Instant::now() + meeting.keep.wait;
                    let waited_until = self.pending_attach.take().map(|visit| visit.waited_until);
                    self.mode = Mode::Waiting(waited_until.unwrap_or_else(until));
                }
                _ => self.end_orphaned(),
            }
        }
    }

    /// Keeps the engines for the next xpyd, and hands them over when it attaches. A peer that only reads does not prolong the wait.
    fn keep(&mut self, until: Instant) {
        let now = Instant::now();
        for engine in &mut self.engines {
            engine.keep(&self.foreign, now);
        }
        let Some(meeting) = self
            .meeting
            .as_ref()
            .filter(|_| now < until && !self.engines.is_empty())
        else {
            return self.end_orphaned();
        };
        if let Some(socket) = meeting.accept() {
            let listener = self.listener.as_ref().and_then(|listener| listener.try_clone().ok());
            let engines = self.engines.iter().map(Engine::kept).chain(self.gone.iter().cloned());
            let kept = Kept {
                run_dir: meeting.keep.run_dir.clone(),
                engines: engines.collect(),
                has_listener: listener.is_some(),
            };
            self.xpyd = XpydLink::new(socket);
            if let Some(listener) = listener {
                self.xpyd.outgoing.attach(listener);
            }
            self.mode = Mode::Serving;
            self.pending_attach = Some(PendingAttach {
                waited_until: until,
                leave_by: now + VISIT,
            });
            self.send_hello(Some(kept));
        }
    }

    /// Opens the socket for the next xpyd. It is open even if engines end with xpyd, because a later command can change that.
    fn prepare_to_keep(&mut self, keep: Keep) {
        match &mut self.meeting {
            // The same path is not opened again: a process can have connected already.
            Some(meeting) if meeting.keep.socket == keep.socket => meeting.keep = keep,
            _ => match AttachListener::open(keep) {
                Ok(meeting) => self.meeting = Some(meeting),
                Err(error) => self.xpyd.send(&Event::CannotKeep {
                    reason: error.to_string(),
                }),
            },
        }
    }

    fn carry_out(&mut self, command: Command) {
        let now = Instant::now();
        self.pending_attach = None;
        match command {
            Command::Spawn(spawn) => self.spawn(spawn),
            Command::StartupFinished { engine } => self.with(&engine, |engine, _| engine.finish_startup()),
            Command::Terminate { engine } => self.with(&engine, Engine::terminate),
            Command::Kill { engine } => self.with(&engine, |engine, foreign| engine.kill(foreign, now)),
            Command::Keep(keep) => self.prepare_to_keep(keep),
            Command::Listener { is_given: true } => {
                if let Some(listener) = self.xpyd.descriptor.take() {
                    self.listener = Some(listener);
                }
            }
            Command::Listener { is_given: false } => self.listener = None,
            Command::Shutdown => {
                for engine in &mut self.engines {
                    engine.kill(&self.foreign, now);
                }
                (self.meeting, self.listener) = (None, None);
                self.mode = Mode::Ending(now + UNOWNED_DEADLINE);
            }
        }
    }

    fn spawn(&mut self, spawn: Spawn) {
        let (engine, incarnation) = (spawn.engine.clone(), spawn.incarnation);
        let started = if self.engines.iter().any(|running| running.id == engine) {
            Err("its previous process is still running".to_owned())
        } else {
            Engine::spawn(spawn)
        };
        match started {
            Ok(started) => {
                self.xpyd.send(&started.spawned());
                self.gone.retain(|gone| gone.engine != started.id);
                self.engines.push(started);
            }
            Err(reason) => self.xpyd.send(&Event::SpawnFailed {
                engine,
                incarnation,
                reason,
            }),
        }
    }

    /// Applies `change` to the engine, if it has a process.
    fn with(&mut self, engine: &EngineId, change: impl FnOnce(&mut Engine, &SharedFiles)) {
        if let Some(engine) = self.engines.iter_mut().find(|running| running.id == *engine) {
            change(engine, &self.foreign);
        }
    }

    /// xpyd is gone, and the engines are not kept: ends all of them.
    fn end_orphaned(&mut self) {
        let now = Instant::now();
        (self.meeting, self.listener) = (None, None);
        for engine in &mut self.engines {
            engine.end_orphaned(&self.foreign, now);
        }
        self.mode = Mode::Ending(now + END_DEADLINE);
    }

    /// Kills the unowned processes, reports those that do not end, and returns the shim's exit status.
    fn end(&mut self) -> ExitStatus {
        let table = ProcessTable::read();
        let mut clean = true;
        for engine in &mut self.engines {
            let processes = engine.leftover(&table);
            if !processes.is_empty() {
                clean = false;
                let engine = Some(engine.id.clone());
                self.xpyd.send(&Event::Leftover { engine, processes });
            }
        }
        let unowned = sweep(std::process::id(), &self.foreign, UNOWNED_DEADLINE);
        if !unowned.is_empty() && self.engines.is_empty() {
            clean = false;
            let processes = unowned.iter().map(Process::leftover).collect();
            self.xpyd.send(&Event::Leftover {
                engine: None,
                processes,
            });
        }
        self.xpyd.flush();
        if clean {
            ExitStatus::Success
        } else {
            ExitStatus::TeardownIncomplete
        }
    }
}

/// The shim's side of the socket. It never blocks: unsent messages are queued.
#[derive(Debug)]
struct XpydLink {
    socket: UnixStream,
    incoming: Vec<u8>,
    /// The descriptor that came with the bytes in `incoming`.
    descriptor: Option<OwnedFd>,
    outgoing: Outbox,
}

impl XpydLink {
    fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            incoming: Vec::new(),
            descriptor: None,
            outgoing: Outbox::default(),
        }
    }

    /// Closes the connection.
    fn close(&mut self) {
        self.outgoing.clear();
        // The peer can have closed it already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn interest(&self) -> PollFlags {
        if self.outgoing.is_empty() {
            PollFlags::POLLIN
        } else {
            PollFlags::POLLIN | PollFlags::POLLOUT
        }
    }

    /// Events are small and few per incarnation, so the queue stays small.
    fn send(&mut self, event: &Event) {
        // Events hold only short UTF-8 strings, so all of them can be encoded.
        let _ = protocol::encode(event, &mut self.outgoing.bytes);
    }

    fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match self.outgoing.send(&self.socket) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The read side will see the end as well.
                Err(_) => self.outgoing.clear(),
            }
        }
    }

    /// Reads the available bytes. Returns false once the peer has closed the connection.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 1 << 14];
        // The protocol limits the length of a message, so a peer that sends without end is refused.
        while self.incoming.len() < 2 * protocol::MAX_MESSAGE_BYTES {
            match channel::receive(&self.socket, &mut buffer, &mut self.descriptor) {
                Ok(0) => return false,
                Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        true
    }

    fn command(&mut self) -> Result<Option<Command>, ProtocolError> {
        protocol::decode(&mut self.incoming)
    }
}
