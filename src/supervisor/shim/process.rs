//! The body of `xpyd shim`: one thread that waits for commands, children and output, and never blocks on any of them.
//!
//! Its control socket is its stdin, both ways. It ends when told to, or when the socket closes because xpyd is gone:
//! then it takes every engine down first, unless it was told to keep them for a while: then it waits for the next xpyd. No
//! signal ends it but SIGKILL; that takes the leaders with it, and its monitor takes the rest.

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

use super::channel::{self, Outbox};
use super::engine::Engine;
use super::keep::Meeting;
use super::monitor::{self, Part};
use super::protocol::{self, Command, Event, Keep, Kept, KeptEngine, ProtocolError, Spawn};
use super::shm::SharedFiles;
use super::sweep::sweep;
use super::tree::{Process, Table};
use crate::fleet::EngineId;
use crate::fleet::Exit;
use crate::report::ExitStatus;

/// How often trees are looked at while nothing happens, to know members before their parents are gone.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often a tree without a leader is looked at: its last members may not be the shim's to reap.
const LOOK_LEADERLESS: Duration = Duration::from_millis(200);

/// How long the end may take once nobody can be told any more. A process that waits in the kernel for longer is left.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// How long one who comes for the engines may take to ask for something. Meanwhile nobody else gets in. `xpyd up` looks at
/// the machine in between.
const VISIT: Duration = Duration::from_mins(2);

/// How long strays may outlive SIGKILL in a shutdown before they are reported.
const STRAYS_DEADLINE: Duration = Duration::from_secs(3);

/// Runs the shim to its end, in a child process of this one, which becomes its monitor.
///
/// Must be called before any other thread is started. Returns [`ExitStatus::Usage`] if stdin is no Unix socket, which is
/// what a person who types the hidden command has.
pub fn run() -> ExitStatus {
    let Ok(control) = control_socket() else {
        return ExitStatus::Usage;
    };
    let ended = start_session().and_then(|()| monitor::split(control));
    match ended {
        Ok(Part::Monitor(status)) => status,
        Ok(Part::Shim(control)) => match Shim::start(control) {
            Ok(mut shim) => shim.serve(),
            Err(_) => ExitStatus::Bug,
        },
        Err(_) => ExitStatus::Bug,
    }
}

/// What monitor and shim have in common: a session of their own, because the terminal's Ctrl+C and hang-up are
/// xpyd's to handle; and no signal that ends them but SIGKILL.
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
        // A log beyond the limit of a file's size is a write that fails.
        Signal::SIGXFSZ,
    ] {
        blocked.add(signal);
    }
    Ok(blocked.thread_block()?)
}

/// The socket that is this process's stdin.
fn control_socket() -> io::Result<UnixStream> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.peer_addr()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// What the shim is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// xpyd is there.
    Serving,
    /// xpyd is gone, and the next one is waited for until this time.
    Waiting(Instant),
    /// xpyd is gone or wants an end; by this time the shim ends, whatever is left.
    Ending(Instant),
}

/// The stay of one who came to the meeting place and may only want to look.
#[derive(Debug, Clone, Copy)]
struct Visit {
    /// Until when the next xpyd was waited for.
    waited_until: Instant,
    /// By when it must have asked for something.
    leave_by: Instant,
}

#[derive(Debug)]
struct Shim {
    control: Control,
    children: SignalFd,
    engines: Vec<Engine>,
    /// The last incarnation of each engine of which nothing is there.
    gone: Vec<KeptEngine>,
    /// Where the next xpyd is waited for, if engines are to be kept.
    meeting: Option<Meeting>,
    /// Where clients connect: held so that they wait for the next xpyd instead of being refused.
    listener: Option<OwnedFd>,
    /// Somebody has come who has not asked for anything yet.
    visit: Option<Visit>,
    /// What was in `/dev/shm` before any engine was.
    foreign: SharedFiles,
    mode: Mode,
    next_look: Instant,
}

impl Shim {
    fn start(socket: UnixStream) -> io::Result<Self> {
        prctl::set_child_subreaper(true)?;
        let mut children = SigSet::empty();
        children.add(Signal::SIGCHLD);
        Ok(Self {
            control: Control::new(socket),
            children: SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
            engines: Vec::new(),
            gone: Vec::new(),
            meeting: None,
            listener: None,
            visit: None,
            foreign: SharedFiles::present(),
            mode: Mode::Serving,
            next_look: Instant::now(),
        })
    }

    fn serve(&mut self) -> ExitStatus {
        self.greet(None);
        loop {
            self.control.flush();
            self.wait();
            self.engines.iter_mut().for_each(Engine::drain_log);
            self.reap();
            match self.mode {
                Mode::Serving => self.obey(),
                Mode::Waiting(until) => self.keep(until),
                Mode::Ending(_) => {}
            }
            let now = Instant::now();
            for engine in &mut self.engines {
                if let Some(event) = engine.tick(&self.foreign, now) {
                    self.control.send(&event);
                }
            }
            self.look(now);
            if let Mode::Ending(deadline) = self.mode
                && (self.engines.is_empty() || now >= deadline)
            {
                return self.end();
            }
        }
    }

    fn greet(&mut self, kept: Option<Kept>) {
        self.control.send(&Event::Hello {
            version: protocol::VERSION,
            pid: std::process::id(),
            monitor: getppid().as_raw().unsigned_abs(),
            kept,
        });
    }

    /// Waits for anything to happen or become due.
    fn wait(&self) {
        let mut polled = vec![PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
        match (self.mode, &self.meeting) {
            (Mode::Serving, _) => polled.push(PollFd::new(self.control.socket(), self.control.interest())),
            (Mode::Waiting(_), Some(meeting)) => {
                polled.extend(meeting.descriptors().map(|place| PollFd::new(place, PollFlags::POLLIN)));
            }
            (Mode::Waiting(_) | Mode::Ending(_), _) => {}
        }
        let logs = self.engines.iter().filter_map(Engine::log_descriptor);
        polled.extend(logs.map(|pipe| PollFd::new(pipe, PollFlags::POLLIN)));

        let due = self.engines.iter().filter_map(Engine::next_tick);
        let look = (!self.engines.is_empty()).then_some(self.next_look);
        let end = match self.mode {
            Mode::Serving => self.visit.map(|visit| visit.leave_by),
            Mode::Waiting(deadline) | Mode::Ending(deadline) => Some(deadline),
        };
        let timeout = due.chain(look).chain(end).min().map(|instant| {
            // One more millisecond, because a timeout that is rounded down would spin until the instant has come.
            let wait = instant.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        // Interrupted or not, the loop looks at everything.
        let _ = poll(&mut polled, timeout);
    }

    /// Reaps every ended child, adopted ones too.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.children.read_signal() {}
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Exit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal as i32)),
                Err(Errno::EINTR) => continue,
                Ok(_) | Err(_) => return,
            };
            // Anything that was reaped may have been the last of its tree.
            self.next_look = Instant::now();
            for engine in &mut self.engines {
                if let Some(event) = engine.reaped(pid.as_raw(), exit) {
                    self.control.send(&event);
                }
            }
        }
    }

    /// Looks at all trees, if it is time, and lets go of those that are empty.
    fn look(&mut self, now: Instant) {
        if now < self.next_look || self.engines.is_empty() {
            return;
        }
        if let Some(meeting) = &mut self.meeting {
            meeting.restore();
        }
        let table = Table::read();
        let (control, gone, foreign) = (&mut self.control, &mut self.gone, &self.foreign);
        self.engines.retain_mut(|engine| {
            let event = engine.look(&table, foreign);
            if let Some(event) = &event {
                control.send(event);
                gone.push(engine.gone());
            }
            event.is_none()
        });
        let leaderless = self.engines.iter().any(Engine::is_leaderless);
        self.next_look = now + if leaderless { LOOK_LEADERLESS } else { LOOK_EVERY };
    }

    /// Carries out what xpyd asked for.
    fn obey(&mut self) {
        let mut open = self.control.receive();
        loop {
            match self.control.command() {
                Ok(Some(command)) => self.carry_out(command),
                Ok(None) => break,
                // Who speaks another language is no xpyd of this version, and loses its connection. The engines stay where
                // the next xpyd is waited for.
                Err(_) => {
                    open = false;
                    break;
                }
            }
        }
        open &= self.visit.is_none_or(|visit| Instant::now() < visit.leave_by);
        if !open && self.mode == Mode::Serving {
            self.control.close();
            match &self.meeting {
                Some(meeting) if !meeting.keep.wait.is_zero() => {
                    let until = || Instant::now() + meeting.keep.wait;
                    let waited_until = self.visit.take().map(|visit| visit.waited_until);
                    self.mode = Mode::Waiting(waited_until.unwrap_or_else(until));
                }
                _ => self.orphan(),
            }
        }
    }

    /// Keeps the engines for the next xpyd, and hands them over when it comes. One that only looks does not lengthen the wait.
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
            return self.orphan();
        };
        if let Some(socket) = meeting.accept() {
            let listener = self.listener.as_ref().and_then(|listener| listener.try_clone().ok());
            let engines = self.engines.iter().map(Engine::kept).chain(self.gone.iter().cloned());
            let kept = Kept {
                run_dir: meeting.keep.run_dir.clone(),
                engines: engines.collect(),
                has_listener: listener.is_some(),
            };
            self.control = Control::new(socket);
            if let Some(listener) = listener {
                self.control.outgoing.attach(listener);
            }
            self.mode = Mode::Serving;
            self.visit = Some(Visit {
                waited_until: until,
                leave_by: now + VISIT,
            });
            self.greet(Some(kept));
        }
    }

    /// Opens the place to wait for the next xpyd. It is open even where engines end with xpyd: it may change its mind.
    fn prepare_to_keep(&mut self, keep: Keep) {
        match &mut self.meeting {
            // One that stays where it is is not opened anew: somebody may stand before it.
            Some(meeting) if meeting.keep.socket == keep.socket => meeting.keep = keep,
            _ => match Meeting::open(keep) {
                Ok(meeting) => self.meeting = Some(meeting),
                Err(error) => self.control.send(&Event::CannotKeep {
                    reason: error.to_string(),
                }),
            },
        }
    }

    fn carry_out(&mut self, command: Command) {
        let now = Instant::now();
        self.visit = None;
        match command {
            Command::Spawn(spawn) => self.spawn(spawn),
            Command::Settled { engine } => self.with(&engine, |engine, _| engine.settle()),
            Command::Terminate { engine } => self.with(&engine, Engine::terminate),
            Command::Kill { engine } => self.with(&engine, |engine, foreign| engine.kill(foreign, now)),
            Command::Keep(keep) => self.prepare_to_keep(keep),
            Command::Listener { is_given: true } => {
                if let Some(listener) = self.control.descriptor.take() {
                    self.listener = Some(listener);
                }
            }
            Command::Listener { is_given: false } => self.listener = None,
            Command::Shutdown => {
                for engine in &mut self.engines {
                    engine.kill(&self.foreign, now);
                }
                (self.meeting, self.listener) = (None, None);
                self.mode = Mode::Ending(now + STRAYS_DEADLINE);
            }
        }
    }

    fn spawn(&mut self, spawn: Spawn) {
        let (engine, incarnation) = (spawn.engine.clone(), spawn.incarnation);
        let started = if self.engines.iter().any(|running| running.id == engine) {
            Err("an earlier start of it is not gone yet".to_owned())
        } else {
            Engine::spawn(spawn)
        };
        match started {
            Ok(started) => {
                self.control.send(&started.spawned());
                self.gone.retain(|gone| gone.engine != started.id);
                self.engines.push(started);
            }
            Err(reason) => self.control.send(&Event::SpawnFailed {
                engine,
                incarnation,
                reason,
            }),
        }
    }

    /// Applies `change` to the engine, if it is still there.
    fn with(&mut self, engine: &EngineId, change: impl FnOnce(&mut Engine, &SharedFiles)) {
        if let Some(engine) = self.engines.iter_mut().find(|running| running.id == *engine) {
            change(engine, &self.foreign);
        }
    }

    /// xpyd is gone: nothing of the run may outlive it.
    fn orphan(&mut self) {
        let now = Instant::now();
        (self.meeting, self.listener) = (None, None);
        for engine in &mut self.engines {
            engine.orphan(&self.foreign, now);
        }
        self.mode = Mode::Ending(now + END_DEADLINE);
    }

    /// Kills what no engine could be named for, reports what does not go, and says how the shim ends.
    fn end(&mut self) -> ExitStatus {
        let table = Table::read();
        let mut clean = true;
        for engine in &mut self.engines {
            let processes = engine.leftover(&table);
            if !processes.is_empty() {
                clean = false;
                let engine = Some(engine.id.clone());
                self.control.send(&Event::Leftover { engine, processes });
            }
        }
        let strays = sweep(std::process::id(), &self.foreign, STRAYS_DEADLINE);
        if !strays.is_empty() && self.engines.is_empty() {
            clean = false;
            let processes = strays.iter().map(Process::leftover).collect();
            self.control.send(&Event::Leftover {
                engine: None,
                processes,
            });
        }
        self.control.flush();
        if clean {
            ExitStatus::Success
        } else {
            ExitStatus::TeardownIncomplete
        }
    }
}

/// The shim's end of the socket. Nothing here blocks: what cannot be sent yet is kept.
#[derive(Debug)]
struct Control {
    socket: UnixStream,
    incoming: Vec<u8>,
    /// The descriptor that came with what is in `incoming`.
    descriptor: Option<OwnedFd>,
    outgoing: Outbox,
}

impl Control {
    fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            incoming: Vec::new(),
            descriptor: None,
            outgoing: Outbox::default(),
        }
    }

    /// Lets the other end know that nobody listens any more.
    fn close(&mut self) {
        self.outgoing.clear();
        // One that the other end has closed is as good.
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

    /// Events are small and few per incarnation, so what waits here is bounded by them.
    fn send(&mut self, event: &Event) {
        // Events hold only short strings that are UTF-8, so all of them can be written.
        let _ = protocol::encode(event, &mut self.outgoing.bytes);
    }

    fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match self.outgoing.send(&self.socket) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The reading side will see the end as well.
                Err(_) => self.outgoing.clear(),
            }
        }
    }

    /// Reads what is there. False once the other end is closed.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 1 << 14];
        // A peer that sends without end is refused by the protocol, one buffer of a message at a time.
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
