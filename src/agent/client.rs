//! A session with an agent on another host; [`crate::agent::client::remote`] is a replica within it.
//!
//! One reader thread takes frames apart and wakes who waits for them; one thread says "I am alive"; requests are
//! written by whoever makes them, behind one lock, and a full pipe makes him wait. An agent that is not heard for
//! [`ClientOptions::silence`] is dead: everybody who waits, and everybody who asks later, gets the same error.
//!
//! Invariants
//! - A session dies once, for one reason; after that no byte is written.
//! - No call waits longer than the silence allowed while nothing is heard from the agent.
//! - An agent that is heard and does not answer is waited for in bounded time too: `bounds` says how long for which
//!   request. The session ends with it, since an agent does one thing after the other.
//!
//! Protocol: docs/formats/wire.md.

mod bounds;
mod reader;
pub mod remote;
pub mod remote_bringup;
pub mod remote_plain;
pub(super) mod remote_store;
pub(super) mod remote_upkeep;

use super::patience::Patient;
pub use crate::agent::client::bounds::ClientOptions;
use crate::agent::client::remote::RemoteReplica;
use crate::agent::wire::{
    Banner, FrameKind, Handle, Head, Progress, REQUEST_MAX, Reply, Request, Role, WireError, decode, encode, protocol,
    write_frame,
};
use crate::error::{Error, Kind, Result};
use crate::name::{DomainName, DomainUuid};
use crate::transport::{Closer, Transport};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a failed write waits for the reader to find out the reason (the agent's last words, its exit code).
const VERDICT_WAIT: Duration = Duration::from_secs(7);

/// A session with one agent. Shared by threads; ended by [`AgentClient::close`], or cut by dropping it.
pub struct AgentClient {
    pub(super) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The agent takes one attachment at a time.
    pub(super) attaching: Mutex<()>,
}

type Writer = Patient<Box<dyn Write + Send>, Box<dyn FnMut(Duration) -> io::Result<()> + Send>>;

/// What the threads of a session share.
pub(super) struct Shared {
    host: String,
    options: ClientOptions,
    /// `None` once nothing more may be written. Never locked while `state` is.
    writer: Mutex<Option<Writer>>,
    closer: Mutex<Option<Box<dyn Closer>>>,
    state: Mutex<State>,
    changed: Condvar,
    /// Says the same as `Phase::Dead`, to a writer that waits for room in the pipe.
    dead: Arc<AtomicBool>,
    next_id: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

struct State {
    phase: Phase,
    agent_version: String,
    /// Requests that are waited for.
    slots: HashMap<u64, Slot>,
    /// Replicas whose patches are no longer applied, and why.
    failed: HashMap<Handle, WireError>,
    heard: Instant,
    /// When the session moved last, either way; a ping is no movement.
    moved: Instant,
}

enum Phase {
    /// The agent's banner has not come.
    Greeting,
    Open,
    /// `Bye` is on its way: nothing new is asked, answers may still come.
    Closing,
    Ended,
    Dead(Box<WireError>),
}

/// A request in flight.
#[derive(Default)]
struct Slot {
    /// Kind and payload of the answer, as far as it has come.
    answer: Option<(FrameKind, Vec<u8>)>,
    complete: bool,
    owed: Option<bounds::Owed>,
    /// The latest only: a slow reader of progress holds up nobody.
    progress: Option<Progress>,
}

impl AgentClient {
    /// Starts an agent and greets it. Blocks for the transport's connect timeout and the silence allowed at most.
    pub fn connect(transport: &dyn Transport) -> Result<AgentClient> {
        Self::connect_with(transport, ClientOptions::default())
    }

    /// Starts an agent and greets it, with deadlines of the caller's choice. Blocks for the transport's connect
    /// timeout and `options.silence` at most.
    pub fn connect_with(transport: &dyn Transport, options: ClientOptions) -> Result<AgentClient> {
        let channel = transport.open()?;
        let dead = Arc::new(AtomicBool::new(false));
        let is_dead = Arc::clone(&dead);
        let writer = Patient::new(
            channel.input,
            Box::new(move |quiet: Duration| match is_dead.load(Ordering::Acquire) {
                true => Err(io::ErrorKind::BrokenPipe.into()),
                // As long as the agent is heard it may take its time: this is the backpressure of its disk.
                false if quiet < options.work => Ok(()),
                false => Err(io::ErrorKind::TimedOut.into()),
            }) as Box<dyn FnMut(Duration) -> io::Result<()> + Send>,
        );
        let shared = Arc::new(Shared {
            host: transport.host().to_owned(),
            options,
            writer: Mutex::new(Some(writer)),
            closer: Mutex::new(Some(channel.closer)),
            state: Mutex::new(State {
                phase: Phase::Greeting,
                agent_version: String::new(),
                slots: HashMap::new(),
                failed: HashMap::new(),
                heard: Instant::now(),
                moved: Instant::now(),
            }),
            changed: Condvar::new(),
            dead,
            next_id: AtomicU64::new(1),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
        });
        let client = AgentClient { shared, threads: Mutex::default(), attaching: Mutex::default() };
        let (reader, output) = (Arc::clone(&client.shared), channel.output);
        client.spawn("agent-reader", move || reader.read_until_end(output))?;
        let greeting = bounds::Owed { what: "greet", within: options.question };
        client.shared.wait_until(Some(greeting), |state| matches!(state.phase, Phase::Open).then_some(()))?;
        client.shared.write_with(|writer| {
            let line = Banner::ours().line(Role::Client);
            writer.write_all(line.as_bytes())?;
            writer.flush()?;
            Ok(line.len() as u64)
        })?;
        let pinger = Arc::clone(&client.shared);
        client.spawn("agent-ping", move || pinger.keep_alive())?;
        Ok(client)
    }

    fn spawn(&self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)
            .map_err(|e| Error::from_io("cannot start a thread", e))?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Whether something may be asked: the session has neither ended nor died.
    pub fn is_open(&self) -> bool {
        self.shared.is_open()
    }

    /// The host as messages name it.
    pub fn host(&self) -> &str {
        &self.shared.host
    }

    /// Version of the agent's program, for people.
    pub fn agent_version(&self) -> String {
        lock(&self.shared.state).agent_version.clone()
    }

    /// Bytes written to the agent so far, banner and frame headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.sent_bytes.load(Ordering::Relaxed)
    }

    /// Bytes read from the agent so far.
    pub fn bytes_received(&self) -> u64 {
        self.shared.received_bytes.load(Ordering::Relaxed)
    }

    /// The replica of a domain on the other host; it need not exist yet. Its lock there, if it took one, is released
    /// when the [`RemoteReplica`] is dropped.
    pub fn open(self: &Arc<Self>, uuid: &DomainUuid) -> Result<RemoteReplica> {
        match self.shared.call(&Request::Open { uuid: uuid.clone() })? {
            Reply::Open { replica } => Ok(RemoteReplica::new(Arc::clone(self), replica)),
            other => Err(self.shared.other_reply("open", &other)),
        }
    }

    /// Domains of this name on the other host, all of them for an empty name.
    pub fn find(&self, name: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        match self.shared.call(&Request::Find { name: name.to_owned() })? {
            Reply::Find { found } => Ok(found),
            other => Err(self.shared.other_reply("find", &other)),
        }
    }

    /// Ends the session in order: everything asked is answered, the agent says its last word and ends. Requests made
    /// meanwhile or later fail. Idempotent; an error tells how the session ended otherwise.
    pub fn close(&self) -> Result<()> {
        let shared = &self.shared;
        let say_bye = {
            let mut state = lock(&shared.state);
            let open = matches!(state.phase, Phase::Open);
            if open {
                state.phase = Phase::Closing;
            }
            open
        };
        if say_bye {
            // On a thread of its own: the pipe may be full, and stay so.
            let bye = Arc::clone(shared);
            self.spawn("agent-bye", move || drop(bye.send(head(FrameKind::Bye, 0), &[], &[])))?;
        }
        let owed = bounds::Owed { what: "say goodbye", within: shared.options.goodbye };
        let ended = shared.wait_until(Some(owed), |state| matches!(state.phase, Phase::Ended).then_some(()));
        shared.changed.notify_all();
        drop(lock(&shared.writer).take());
        for thread in lock(&self.threads).drain(..) {
            if thread.join().is_err() {
                return Err(Error::new(Kind::Io, "a thread of the session panicked"));
            }
        }
        let closer = lock(&shared.closer).take();
        let closed = closer.map_or(Ok(()), |closer| closer.close());
        ended.and(closed)
    }
}

impl Drop for AgentClient {
    /// Cuts the session, if it was not closed: end of file is the agent's end. Waits for nothing and nobody.
    fn drop(&mut self) {
        let cut = Error::new(Kind::Interrupted, "the session was dropped");
        self.shared.die(&cut);
        if let Ok(mut writer) = self.shared.writer.try_lock() {
            writer.take();
        }
    }
}

impl fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgentClient({})", self.shared.host)
    }
}

/// A panic under one of these locks is a bug that has already been reported by the panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics under the locks of a session")
}

pub(super) fn head(kind: FrameKind, id: u64) -> Head {
    Head { kind, more: false, id }
}

/// What every request can meet.
impl Shared {
    /// Asks and waits for the answer.
    pub(super) fn call(&self, request: &Request) -> Result<Reply> {
        let id = self.ask(request)?;
        self.reply(id, &mut |_, _| {})
    }

    pub(super) fn reply(&self, id: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<Reply> {
        self.reply_told(id, &mut |p| progress(p.done_bytes, p.total_bytes))
    }

    pub(super) fn reply_told(&self, id: u64, progress: &mut dyn FnMut(&Progress)) -> Result<Reply> {
        match self.answer(id, progress)? {
            (FrameKind::Reply, payload) => decode("reply", &payload).map_err(|e| self.at_host(e)),
            (kind, _) => Err(self.at_host(protocol(format!("{kind} instead of a reply")))),
        }
    }

    /// Sends a request; its answer may be waited for under the id returned.
    pub(super) fn ask(&self, request: &Request) -> Result<u64> {
        let payload = encode(request);
        if payload.len() > REQUEST_MAX {
            let what = format!("a request of {} bytes; at most {REQUEST_MAX} are allowed", payload.len());
            return Err(Error::new(Kind::Usage, what));
        }
        let id = self.take_id();
        let owed = Some(bounds::of(request, &self.options));
        self.check_open()?.slots.insert(id, Slot { owed, ..Slot::default() });
        let sent = self.send(head(FrameKind::Request, id), &[], &payload);
        if sent.is_err() {
            lock(&self.state).slots.remove(&id);
        }
        sent.map(|()| id)
    }

    /// Waits for a whole answer; an `Error` answer is returned as one.
    pub(super) fn answer(&self, id: u64, progress: &mut dyn FnMut(&Progress)) -> Result<(FrameKind, Vec<u8>)> {
        enum News {
            Progress(Progress),
            Answer((FrameKind, Vec<u8>)),
        }
        let owed = lock(&self.state).slots.get(&id).and_then(|slot| slot.owed);
        loop {
            let news = self.wait_until(owed, |state| {
                let slot = state.slots.get_mut(&id)?;
                if slot.complete {
                    let slot = state.slots.remove(&id)?;
                    return slot.answer.map(News::Answer);
                }
                slot.progress.take().map(News::Progress)
            });
            match news {
                Ok(News::Progress(p)) => progress(&p),
                Ok(News::Answer((FrameKind::Error, payload))) => {
                    let error: WireError = decode("error", &payload).map_err(|e| self.at_host(e))?;
                    return Err(error.into_error(Some(&self.host)));
                }
                Ok(News::Answer(answer)) => return Ok(answer),
                Err(error) => {
                    lock(&self.state).slots.remove(&id);
                    return Err(error);
                }
            }
        }
    }

    /// The state, if something new may be asked.
    fn check_open(&self) -> Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        match &state.phase {
            Phase::Open => Ok(state),
            Phase::Dead(error) => Err(error.as_ref().clone().into_error(None)),
            _ => Err(Error::new(Kind::Usage, format!("the session with {} is closed", self.host))),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Open)
    }

    pub(super) fn take_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Fails with the agent's reason if it no longer applies patches for this replica.
    pub(super) fn check_sound(&self, replica: Handle) -> Result<()> {
        match self.check_open()?.failed.get(&replica) {
            Some(error) => Err(error.clone().into_error(Some(&self.host))),
            None => Ok(()),
        }
    }

    pub(super) fn forget_failure(&self, replica: Handle) {
        lock(&self.state).failed.remove(&replica);
    }

    /// Waits until `ready` gives something, or the session dies. It dies of an agent that is heard and lets
    /// everything stand for longer than it may owe this.
    fn wait_until<T>(&self, owed: Option<bounds::Owed>, mut ready: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        let began = Instant::now();
        let mut state = lock(&self.state);
        loop {
            if let Some(value) = ready(&mut state) {
                return Ok(value);
            }
            match &state.phase {
                Phase::Dead(error) => return Err(error.as_ref().clone().into_error(None)),
                Phase::Ended => return Err(protocol(format!("the agent on {} ended in mid-answer", self.host))),
                _ => {}
            }
            // The reader finds silence out by itself; this is for an output that blocks for ever.
            let quiet = state.heard.elapsed();
            let patience = self.options.silence + Duration::from_secs(1);
            if quiet >= patience {
                drop(state);
                return Err(self.die(&self.silent(quiet)));
            }
            let mut wait = patience - quiet;
            if let Some(owed) = owed {
                let still = state.moved.max(began).elapsed();
                if still >= owed.within {
                    drop(state);
                    return Err(self.die(&owed.late(&self.host)));
                }
                wait = wait.min(owed.within - still);
            }
            state = self.changed.wait_timeout(state, wait).expect("nothing panics under the state's lock").0;
        }
    }

    pub(super) fn send(&self, head: Head, prefix: &[u8], payload: &[u8]) -> Result<()> {
        self.write_with(|writer| write_frame(writer, head, prefix, payload))?;
        if head.kind != FrameKind::Ping {
            lock(&self.state).moved = Instant::now();
        }
        Ok(())
    }

    fn write_with(&self, write: impl FnOnce(&mut Writer) -> io::Result<u64>) -> Result<()> {
        let written = match lock(&self.writer).as_mut() {
            Some(writer) => write(writer),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match written {
            Ok(bytes) => {
                self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(self.verdict(error)),
        }
    }

    /// Why a write failed: what the reader found out, or else what the write met. The session is dead afterwards.
    fn verdict(&self, error: io::Error) -> Error {
        let deadline = Instant::now() + VERDICT_WAIT;
        let mut state = lock(&self.state);
        while !matches!(state.phase, Phase::Dead(_) | Phase::Ended) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).expect("nothing panics under the state's lock").0;
        }
        drop(state);
        let what = format!("cannot write to the agent on {}", self.host);
        self.die(&Error::new(Kind::Unavailable, what).source(error))
    }

    /// Declares the session dead for this reason, unless it is already; returns the reason that holds.
    fn die(&self, error: &Error) -> Error {
        let mut state = lock(&self.state);
        self.dead.store(true, Ordering::Release);
        if !matches!(state.phase, Phase::Dead(_) | Phase::Ended) {
            state.phase = Phase::Dead(Box::new(WireError::from(error)));
        }
        self.changed.notify_all();
        match &state.phase {
            Phase::Dead(reason) => reason.as_ref().clone().into_error(None),
            _ => Error::new(Kind::Usage, format!("the session with {} is closed", self.host)),
        }
    }

    fn silent(&self, quiet: Duration) -> Error {
        let what = format!("the agent on {} has been silent for {} s", self.host, quiet.as_secs());
        Error::new(Kind::Unavailable, what)
    }

    pub(super) fn at_host(&self, error: Error) -> Error {
        WireError::from(&error).into_error(Some(&self.host))
    }

    pub(super) fn other_reply(&self, asked: &str, reply: &Reply) -> Error {
        tracing::debug!("the answer to '{asked}' is {reply:?}");
        self.at_host(protocol(format!("the answer to '{asked}' is one to another question")))
    }

    /// The second thread: says that we are alive, until the session ends.
    fn keep_alive(&self) {
        let mut due = Instant::now() + self.options.ping_interval;
        let mut state = lock(&self.state);
        while matches!(state.phase, Phase::Open) {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                // A write that has been waiting for room all this time says the same as a ping.
                if self.send(head(FrameKind::Ping, 0), &[], &[]).is_err() {
                    return;
                }
                due = Instant::now() + self.options.ping_interval;
                state = lock(&self.state);
                continue;
            }
            state = self.changed.wait_timeout(state, left).expect("nothing panics under the state's lock").0;
        }
    }
}
