//! The one gate through which every call to libvirt goes: a thread and a deadline per call, one connection for all.
//!
//! libvirt's calls block, some of them for as long as QEMU or a dead storage likes, and none can be cancelled. So
//! each runs on a plain thread of its own (some 30 µs; their number is bounded) while its caller waits no longer than
//! the deadline. A call that passed it is left behind, and its connection with it: the next call opens another.
//!
//! Invariants
//! - A caller of [`Gate::call`] is back by its deadline, whatever libvirtd, the network or QEMU do.
//! - Work that its caller has left changes nothing any more: before it does, it asks [`Line::about_to_change`]. A
//!   freeze that hung in a question does not happen minutes later.
//! - A missing answer is [`Kind::Unavailable`], never [`Kind::Interrupted`]: that one ends a run, this one makes it
//!   observe again and go on from what it finds. The text says if the change had been sent and may have taken effect,
//!   or may yet.
//! - A change is sent twice only if its [`Repeat`] allows it.
//! - A change that may take long and was left behind is not sent beside itself: who wants the very same again waits
//!   for the answer that is still owed ([`Gate::call_once`]).
//! - The state's lock is never held over a call to libvirt, and a connection is never closed on a caller's thread.
//!
//! A connection has an *epoch*, so that the failure of an old one cannot condemn its successor.

mod errors;
mod events;

pub use self::events::Wake;
use self::events::{Hub, start_event_loop};
use super::sys::{self, Event, Registrations};
use crate::error::{Error, Kind, Result};
use std::any::Any;
use std::mem;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};
use virt::connect::Connect;
use virt::error::{Error as VirtError, ErrorDomain, ErrorNumber};

/// Calls under way or left behind. Those left behind end when the keepalive declares their connection dead.
const CALLS_MAX: usize = 32;

/// A connection is dead when libvirtd has left this many probes, this far apart, unanswered: 20 s.
const KEEPALIVE_INTERVAL_S: i32 = 5;
const KEEPALIVE_PROBES: u32 = 3;

/// How long the end of a gate waits for its connection's. It takes a millisecond where libvirtd is well.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// May a change be sent again over a new connection if its answer was lost with the old one? Questions always may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// Doing it twice is as good as once, or there is no change at all.
    Harmless,
    /// A second time could do harm. If the answer is lost, the caller gets an error and must observe.
    Never,
}

/// One call, as its errors describe it.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// In the infinitive: "pause the domain".
    pub what: &'static str,
    /// Name or UUID of the domain it is about.
    pub domain: Option<&'a str>,
    /// How long the caller waits for the answer.
    pub deadline: Duration,
    /// Whether the call may be sent again if the connection breaks.
    pub repeat: Repeat,
}

/// Why the work of a call failed: libvirt's word, or ours about what libvirt said.
#[derive(Debug)]
pub enum Failure {
    /// libvirt's own error.
    Libvirt(VirtError),
    /// Our error about an answer that libvirt gave.
    Ours(Error),
    /// The caller has left; nobody will read this.
    Left,
}

impl From<VirtError> for Failure {
    fn from(e: VirtError) -> Self {
        Failure::Libvirt(e)
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Ours(e)
    }
}

/// What came back from the call's thread.
enum Answer<T> {
    Done(T),
    Failed(Failure),
    /// No connection could be had; nothing was sent.
    NotOpened(VirtError),
    /// The connection broke before the answer.
    Lost(VirtError),
}

/// How far the work of a call has come. The caller's leaving and the work's change exclude each other.
#[derive(Default)]
struct Progress {
    /// 0, at first: only questions were asked.
    stage: AtomicU8,
    /// Epoch of the connection it uses or waits for.
    epoch: AtomicU64,
}

const CHANGING: u8 = 1;
const LEFT: u8 = 2;

impl Progress {
    /// The caller leaves. Was the change sent before?
    fn leave(&self) -> bool {
        self.stage.swap(LEFT, Ordering::AcqRel) == CHANGING
    }

    fn is_changing(&self) -> bool {
        self.stage.load(Ordering::Acquire) == CHANGING
    }
}

/// A call that was sent.
struct Sent<T> {
    answered: Receiver<Answer<T>>,
    progress: Arc<Progress>,
    worker: thread::JoinHandle<()>,
}

/// A change that its caller left, and that may still be under way.
struct LeftBehind {
    what: &'static str,
    domain: Option<String>,
    /// All that the change is about: only the very same one is waited for.
    content: String,
    /// A `Sent<T>`.
    sent: Box<dyn Any + Send>,
}

/// Changes left behind that are remembered; of more than that the oldest are sent again when they are wanted again.
const LEFT_BEHIND_MAX: usize = 8;

/// The connection, as the work of one call has it.
pub struct Line<'a> {
    connection: &'a Connect,
    progress: &'a Progress,
}

impl Line<'_> {
    /// To be asked right before the first libvirt call that changes anything; an error means: do not.
    pub fn about_to_change(&self) -> Result<(), Failure> {
        let stage = |stage| (stage != LEFT).then_some(CHANGING);
        match self.progress.stage.fetch_update(Ordering::AcqRel, Ordering::Acquire, stage) {
            Ok(_) => Ok(()),
            Err(_) => Err(Failure::Left),
        }
    }
}

impl Deref for Line<'_> {
    type Target = Connect;

    fn deref(&self) -> &Connect {
        self.connection
    }
}

/// A connection to one URI that heals itself. Cheap to share; dropping it closes the connection in the background.
pub struct Gate(Arc<Inner>);

struct Inner {
    uri: Option<String>,
    state: Mutex<State>,
    /// A call ended, or the slot changed.
    changed: Condvar,
    hub: Arc<Hub>,
    left_behind: Mutex<Vec<LeftBehind>>,
}

struct State {
    slot: Slot,
    /// Epoch of the connection opened last.
    epoch: u64,
    calls: usize,
}

enum Slot {
    Empty,
    Opening(u64),
    Open(Arc<Session>),
}

impl Gate {
    /// A gate to `uri`; `None`: libvirt decides, as `virsh` without `-c`. Nothing is opened yet. The first gate of the
    /// process starts libvirt's event loop.
    pub fn new(uri: Option<&str>) -> Result<Self> {
        if uri.is_some_and(|u| u.contains('\0')) {
            return Err(Error::new(Kind::Usage, "a libvirt URI has no NUL byte"));
        }
        start_event_loop()?;
        let state = State { slot: Slot::Empty, epoch: 0, calls: 0 };
        Ok(Self(Arc::new(Inner {
            uri: uri.map(str::to_owned),
            state: Mutex::new(state),
            changed: Condvar::new(),
            hub: Arc::default(),
            left_behind: Mutex::default(),
        })))
    }

    /// Runs `work` with a line to libvirt and returns what it returned, or an error by the call's deadline at the
    /// latest. `work` runs wholly on one thread. It must not use this gate.
    pub fn call<T, F>(&self, call: Call<'_>, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Line<'_>) -> Result<T, Failure> + Send + 'static,
    {
        let until = Instant::now() + call.deadline;
        let sent = self.send(&call, until, work)?;
        self.wait(&call, sent, until).unwrap_or_else(|(_, changing)| Err(call.late(changing)))
    }

    /// The same for a change that may be made twice, and may take longer than anybody waits. If the same change of
    /// the same content was left behind and is still under way, this call waits for its answer, and sends nothing.
    pub fn call_once<T, F>(&self, call: Call<'_>, content: &str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Line<'_>) -> Result<T, Failure> + Send + 'static,
    {
        let until = Instant::now() + call.deadline;
        let sent = match self.under_way(&call, content) {
            Some(sent) => match sent.answered.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Answer::Done(value)) => return Ok(value),
                Err(RecvTimeoutError::Timeout) => {
                    self.leave_behind(&call, content, sent);
                    return Err(call.late(true));
                }
                // Its no may be older than this call.
                Ok(_) | Err(RecvTimeoutError::Disconnected) => self.send(&call, until, work)?,
            },
            None => self.send(&call, until, work)?,
        };
        self.wait(&call, sent, until).unwrap_or_else(|(sent, changing)| {
            if changing {
                self.leave_behind(&call, content, sent);
            }
            Err(call.late(changing))
        })
    }

    /// The same change, if it is under way. One that has been answered says nothing about now.
    fn under_way<T: Send + 'static>(&self, call: &Call<'_>, content: &str) -> Option<Sent<T>> {
        let mut all = lock(&self.0.left_behind);
        let at = all.iter().position(|l| l.what == call.what && l.domain.as_deref() == call.domain)?;
        let left = all.remove(at);
        let sent = left.sent.downcast::<Sent<T>>().ok().filter(|_| left.content == content)?;
        (!sent.worker.is_finished()).then_some(*sent)
    }

    fn leave_behind<T: Send + 'static>(&self, call: &Call<'_>, content: &str, sent: Sent<T>) {
        let (what, domain, content) = (call.what, call.domain.map(str::to_owned), content.to_owned());
        let mut all = lock(&self.0.left_behind);
        if all.len() == LEFT_BEHIND_MAX {
            all.remove(0);
        }
        all.push(LeftBehind { what, domain, content, sent: Box::new(sent) });
    }

    fn send<T, F>(&self, call: &Call<'_>, until: Instant, work: F) -> Result<Sent<T>>
    where
        T: Send + 'static,
        F: Fn(&Line<'_>) -> Result<T, Failure> + Send + 'static,
    {
        let Some(permit) = Permit::get(&self.0, until) else {
            return Err(call.error(
                Kind::Unavailable,
                format!(
                    "{CALLS_MAX} earlier calls to libvirt are still without an answer; did not try to {}",
                    call.what
                ),
            ));
        };
        let progress = Arc::new(Progress::default());
        let (answer, answered) = mpsc::sync_channel(1);
        let (its_progress, repeat) = (Arc::clone(&progress), call.repeat);
        let worker = thread::Builder::new()
            .name("libvirt-call".into())
            .spawn(move || {
                // Nobody listens any more if the deadline passed.
                let _ = answer.send(permit.0.perform(&its_progress, until, repeat, &work));
            })
            .map_err(|e| Error::from_io("cannot start a thread for a call to libvirt", e))?;
        Ok(Sent { answered, progress, worker })
    }

    /// The outer error: the deadline passed, and the caller leaves the call behind; whether the change had been sent.
    fn wait<T>(&self, call: &Call<'_>, sent: Sent<T>, until: Instant) -> Result<Result<T>, (Sent<T>, bool)> {
        Ok(match sent.answered.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Answer::Done(value)) => Ok(value),
            Ok(Answer::Failed(Failure::Ours(e))) => Err(call.place(e)),
            Ok(Answer::Failed(Failure::Libvirt(e))) => Err(call.refused(&e)),
            Ok(Answer::Failed(Failure::Left)) => unreachable!("only this thread leaves, and it is here"),
            Ok(Answer::NotOpened(e)) => Err(call.not_opened(&e, self.0.uri.as_deref())),
            Ok(Answer::Lost(e)) => Err(call.lost(&e, sent.progress.is_changing())),
            Err(RecvTimeoutError::Timeout) => {
                let changing = sent.progress.leave();
                self.0.condemn(sent.progress.epoch.load(Ordering::Acquire));
                return Err((sent, changing));
            }
            // Only a panic in `work` drops the sender; it belongs to whoever called.
            Err(RecvTimeoutError::Disconnected) => match sent.worker.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("the thread sends before it ends"),
            },
        })
    }

    /// From now on, events about this disk's block job or its domain end [`Wake::wait`], as does a lost connection.
    pub fn subscribe(&self, uuid: &str, disk: &str) -> Wake {
        self.0.hub.subscribe(uuid, disk)
    }
}

impl Drop for Gate {
    /// Waits for the goodbye, because the process often ends right behind it: libvirtd 9.0 frees the events of a client
    /// whose socket breaks while a worker of its still takes back those very events, and crashes. A connection that a
    /// call which was left behind still uses is closed when that one ends.
    fn drop(&mut self) {
        let slot = mem::replace(&mut lock(&self.0.state).slot, Slot::Empty);
        let Slot::Open(session) = slot else { return };
        if let Some(closed) = Arc::into_inner(session).and_then(|mut session| session.close()) {
            // Hung up when it is closed. If that takes longer, libvirtd does not answer anyway.
            let _ = closed.recv_timeout(CLOSE_MAX);
        }
    }
}

impl Inner {
    fn perform<T>(
        &self,
        progress: &Progress,
        until: Instant,
        repeat: Repeat,
        work: &impl Fn(&Line<'_>) -> Result<T, Failure>,
    ) -> Answer<T> {
        for last in [false, true] {
            let session = match self.session(&progress.epoch, until) {
                Ok(session) => session,
                Err(e) if progress.is_changing() => return Answer::Lost(e),
                Err(e) => return Answer::NotOpened(e),
            };
            match work(&Line { connection: session.connection(), progress }) {
                Ok(value) => return Answer::Done(value),
                Err(Failure::Libvirt(e)) if session.is_lost(&e) => {
                    self.condemn(session.epoch);
                    if last || repeat == Repeat::Never && progress.is_changing() {
                        return Answer::Lost(e);
                    }
                }
                Err(failure) => return Answer::Failed(failure),
            }
        }
        unreachable!("the last turn returns")
    }

    /// The connection, opened if there is none. Whoever finds none opens it, the others wait for that.
    fn session(&self, runs_on: &AtomicU64, until: Instant) -> Result<Arc<Session>, VirtError> {
        let mut state = lock(&self.state);
        loop {
            match &state.slot {
                Slot::Open(session) if !session.closed.load(Ordering::Acquire) => {
                    runs_on.store(session.epoch, Ordering::Release);
                    return Ok(Arc::clone(session));
                }
                Slot::Opening(epoch) => {
                    runs_on.store(*epoch, Ordering::Release);
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        // The caller has left at this moment as well.
                        return Err(VirtError::last_error());
                    }
                    state = self.changed.wait_timeout(state, left).expect(UNPOISONED).0;
                }
                Slot::Open(_) | Slot::Empty => return self.open(state, runs_on),
            }
        }
    }

    fn open(&self, mut state: MutexGuard<'_, State>, runs_on: &AtomicU64) -> Result<Arc<Session>, VirtError> {
        state.epoch += 1;
        let epoch = state.epoch;
        runs_on.store(epoch, Ordering::Release);
        let old = mem::replace(&mut state.slot, Slot::Opening(epoch));
        drop(state);
        drop(old);
        let opened = Session::open(self.uri.as_deref(), epoch, &self.hub).map(Arc::new);
        let mut state = lock(&self.state);
        // Condemned meanwhile: this call may use what it opened, the others have gone on without it.
        if matches!(state.slot, Slot::Opening(e) if e == epoch) {
            state.slot = match &opened {
                Ok(session) => Slot::Open(Arc::clone(session)),
                Err(_) => Slot::Empty,
            };
            self.changed.notify_all();
        }
        opened
    }

    /// No further call uses the connection of this epoch.
    fn condemn(&self, epoch: u64) {
        let mut state = lock(&self.state);
        let current = match &state.slot {
            Slot::Open(session) => session.epoch == epoch,
            Slot::Opening(e) => *e == epoch,
            Slot::Empty => false,
        };
        let old = if current { mem::replace(&mut state.slot, Slot::Empty) } else { Slot::Empty };
        self.changed.notify_all();
        drop(state);
        drop(old);
    }
}

/// The right to have one more call under way; held by the call's thread until libvirt lets go of it.
struct Permit(Arc<Inner>);

impl Permit {
    fn get(inner: &Arc<Inner>, until: Instant) -> Option<Self> {
        let state = lock(&inner.state);
        let left = until.saturating_duration_since(Instant::now());
        let full = |state: &mut State| state.calls >= CALLS_MAX;
        let (mut state, timeout) = inner.changed.wait_timeout_while(state, left, full).expect(UNPOISONED);
        if timeout.timed_out() {
            return None;
        }
        state.calls += 1;
        Some(Self(Arc::clone(inner)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        lock(&self.0.state).calls -= 1;
        self.0.changed.notify_all();
    }
}

/// One open connection with its events.
struct Session {
    epoch: u64,
    /// libvirt told us that it is gone.
    closed: Arc<AtomicBool>,
    /// `None` only while it is dropped.
    open: Option<(Connect, Registrations)>,
}

impl Session {
    fn open(uri: Option<&str>, epoch: u64, hub: &Arc<Hub>) -> Result<Self, VirtError> {
        let connection = Connect::open(uri)?;
        let closed = Arc::new(AtomicBool::new(false));
        let mut registrations = Registrations::default();
        let handler = {
            let (closed, hub) = (Arc::clone(&closed), Arc::clone(hub));
            move |event: Event<'_>| {
                if event == Event::Closed {
                    closed.store(true, Ordering::Release);
                }
                hub.tell(event);
            }
        };
        let events = sys::register(&connection, handler, &mut registrations);
        let session = Self { epoch, closed, open: Some((connection, registrations)) };
        // Drivers without a daemon have neither, and need neither: callers poll, and such a driver cannot be lost.
        tolerate_unsupported(events)?;
        tolerate_unsupported(session.connection().set_keep_alive(KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES))?;
        // It may have gone before the callback stood that would have said so.
        if session.connection().is_alive().is_ok_and(|alive| !alive) {
            session.closed.store(true, Ordering::Release);
        }
        tracing::debug!(epoch, uri = uri.unwrap_or("default"), "connected to libvirt");
        Ok(session)
    }

    fn connection(&self) -> &Connect {
        &self.open.as_ref().expect("taken only by drop").0
    }

    /// Was this error the end of the connection rather than an answer?
    fn is_lost(&self, e: &VirtError) -> bool {
        self.closed.load(Ordering::Acquire) || e.domain().is(ErrorDomain::Rpc)
    }
}

impl Session {
    /// Closing asks libvirtd, which may be the very one that does not answer: it happens on a thread of its own. What
    /// is returned hangs up when that has ended; `None` if somebody closed it before.
    fn close(&mut self) -> Option<Receiver<()>> {
        let (connection, registrations) = self.open.take()?;
        let (ended, closed) = mpsc::sync_channel(0);
        let closing = move || {
            registrations.end(&connection);
            drop(connection);
            drop(ended);
        };
        // Without a thread the connection stays open until the process ends, which is harmless.
        let _ = thread::Builder::new().name("libvirt-close".into()).spawn(closing);
        Some(closed)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

fn tolerate_unsupported(result: Result<(), VirtError>) -> Result<(), VirtError> {
    match result {
        Err(e) if e.code().is(ErrorNumber::NoSupport) => Ok(()),
        other => other,
    }
}

const UNPOISONED: &str = "nothing panics while it holds this lock";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect(UNPOISONED)
}

#[cfg(test)]
mod tests {
    //! On libvirt's in-process test driver: the gate's own promises, without a daemon. The daemon's part (kill, hang)
    //! is in tests/hypervisor.rs.

    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn gate() -> Gate {
        Gate::new(Some("test:///default")).unwrap()
    }

    fn call(repeat: Repeat, deadline_ms: u64) -> Call<'static> {
        Call { what: "try", domain: Some("test"), deadline: Duration::from_millis(deadline_ms), repeat }
    }

    fn epoch(gate: &Gate) -> u64 {
        lock(&gate.0.state).epoch
    }

    /// A genuine error of libvirt that looks like a broken connection to the gate.
    fn rpc_error() -> VirtError {
        let e = Connect::open(Some("qemu+unix:///system?socket=/nonexistent/socket")).unwrap_err();
        assert!(e.domain().is(ErrorDomain::Rpc), "{e}");
        e
    }

    #[test]
    fn one_connection_serves_all_calls() {
        let gate = gate();
        for _ in 0..3 {
            let name =
                gate.call(call(Repeat::Harmless, 5000), |c| Ok(c.lookup_domain_by_name("test")?.name()?)).unwrap();
            assert_eq!(name, "test");
        }
        assert_eq!(epoch(&gate), 1);
    }

    #[test]
    fn libvirts_no_becomes_a_kind_with_its_words() {
        let e = gate().call(call(Repeat::Harmless, 5000), |c| Ok(c.lookup_domain_by_name("nope")?.id())).unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound);
        assert!(e.chain().starts_with("domain 'test': cannot try: libvirt: Domain not found"), "{}", e.chain());
        let e = Gate::new(Some("qemu+unix:///system?socket=/nonexistent/socket")).unwrap();
        let e = e.call(call(Repeat::Never, 5000), |_| Ok(())).unwrap_err();
        assert_eq!(e.kind(), Kind::Unavailable);
        assert!(e.hint_text().unwrap().contains("virsh -c 'qemu+unix:///system?socket=/nonexistent/socket'"));
        assert_eq!(Gate::new(Some("a\0b")).err().unwrap().kind(), Kind::Usage);
    }

    #[test]
    fn a_late_call_is_left_behind_with_its_connection() {
        let gate = gate();
        for change in [false, true] {
            let (start, before) = (Instant::now(), epoch(&gate));
            let slow = move |line: &Line<'_>| {
                if change {
                    line.about_to_change()?;
                }
                thread::sleep(Duration::from_millis(1500));
                Ok(())
            };
            let e = gate.call(call(Repeat::Never, 500), slow).unwrap_err();
            assert!(start.elapsed() < Duration::from_millis(1000), "{:?}", start.elapsed());
            assert_eq!((e.kind(), e.what().contains("may have taken effect")), (Kind::Unavailable, change));
            gate.call(call(Repeat::Never, 5000), |_| Ok(())).unwrap();
            assert_eq!(epoch(&gate), before.max(1) + 1, "the next call opens another connection");
        }
    }

    /// An honest answer that takes longer than the caller waits: the same change again is not sent beside it, and
    /// gets its answer.
    #[test]
    fn an_answer_that_comes_late_is_used() {
        let (gate, sent) = (gate(), Arc::new(AtomicUsize::new(0)));
        let slow = || {
            let sent = Arc::clone(&sent);
            move |line: &Line<'_>| {
                line.about_to_change()?;
                sent.fetch_add(1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(900));
                Ok(sent.load(Ordering::SeqCst))
            }
        };
        let late = |content: &str| gate.call_once(call(Repeat::Harmless, 300), content, slow()).unwrap_err();
        assert!(late("a").what().contains("may have taken effect"));
        // Once more too early, once in time.
        assert_eq!(late("a").kind(), Kind::Unavailable);
        assert_eq!(gate.call_once(call(Repeat::Harmless, 5000), "a", slow()).unwrap(), 1);
        assert_eq!(sent.load(Ordering::SeqCst), 1, "sent once");
        // Something else is another change, and an answer from before the question is none.
        late("a");
        assert_eq!(gate.call_once(call(Repeat::Harmless, 5000), "b", slow()).unwrap(), 3);
        late("a");
        thread::sleep(Duration::from_millis(1200));
        assert_eq!(gate.call_once(call(Repeat::Harmless, 5000), "a", slow()).unwrap(), 5);
    }

    /// libvirtd hung in a question and comes back: the change that was to follow must not happen then.
    #[test]
    fn work_that_was_left_changes_nothing() {
        let (release, released) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        let released = Mutex::new(released);
        let hangs = move |line: &Line<'_>| {
            let _ = lock(&released).recv();
            let allowed = line.about_to_change();
            report.send(allowed.is_ok()).unwrap();
            allowed
        };
        let e = gate().call(call(Repeat::Harmless, 300), hangs).unwrap_err();
        assert_eq!(e.kind(), Kind::Unavailable);
        drop(release);
        assert_eq!(reported.recv_timeout(Duration::from_secs(10)), Ok(false));
    }

    #[test]
    fn a_change_is_repeated_only_if_it_may_be() {
        for (change, repeat, sent) in [
            (false, Repeat::Harmless, 2),
            (false, Repeat::Never, 2),
            (true, Repeat::Harmless, 2),
            (true, Repeat::Never, 1),
        ] {
            let (gate, count) = (gate(), Arc::new(AtomicUsize::new(0)));
            let counter = Arc::clone(&count);
            let work = move |line: &Line<'_>| {
                if change {
                    line.about_to_change()?;
                }
                counter.fetch_add(1, Ordering::Relaxed);
                Err::<(), _>(rpc_error().into())
            };
            let e = gate.call(call(repeat, 5000), work).unwrap_err();
            assert_eq!((e.kind(), count.load(Ordering::Relaxed)), (Kind::Unavailable, sent), "{change} {repeat:?}");
            assert_eq!(e.what().contains("may have taken effect"), change, "{e}");
            assert_eq!(epoch(&gate), sent as u64, "each attempt on a connection of its own");
        }
    }

    #[test]
    fn a_repeated_query_answers() {
        let (gate, count) = (gate(), AtomicUsize::new(0));
        let work = move |_: &Line<'_>| match count.fetch_add(1, Ordering::Relaxed) {
            0 => Err(rpc_error().into()),
            n => Ok(n),
        };
        assert_eq!(gate.call(call(Repeat::Harmless, 5000), work).unwrap(), 1);
    }

    #[test]
    fn a_closed_connection_is_replaced_before_anything_is_sent() {
        let gate = gate();
        gate.call(call(Repeat::Harmless, 5000), |_| Ok(())).unwrap();
        match &lock(&gate.0.state).slot {
            Slot::Open(session) => session.closed.store(true, Ordering::Release),
            _ => panic!("not open"),
        }
        gate.call(call(Repeat::Never, 5000), |_| Ok(())).unwrap();
        assert_eq!(epoch(&gate), 2);
    }

    #[test]
    fn calls_without_an_answer_are_bounded() {
        let gate = gate();
        let stuck = Arc::new((Mutex::new((0, false)), Condvar::new()));
        thread::scope(|scope| {
            for _ in 0..CALLS_MAX {
                let stuck = Arc::clone(&stuck);
                let work = move |_: &Line<'_>| {
                    let mut state = lock(&stuck.0);
                    state.0 += 1;
                    stuck.1.notify_all();
                    drop(stuck.1.wait_while(state, |s| !s.1).unwrap());
                    Ok(())
                };
                scope.spawn(|| gate.call(call(Repeat::Harmless, 20_000), work).unwrap());
            }
            drop(stuck.1.wait_while(lock(&stuck.0), |s| s.0 < CALLS_MAX).unwrap());
            let e = gate.call(call(Repeat::Never, 50), |_| Ok(())).unwrap_err();
            assert_eq!(e.kind(), Kind::Unavailable, "nothing was sent: {e}");
            lock(&stuck.0).1 = true;
            stuck.1.notify_all();
        });
        gate.call(call(Repeat::Never, 5000), |_| Ok(())).unwrap();
    }

    #[test]
    #[should_panic(expected = "of the caller")]
    fn a_panic_in_the_work_belongs_to_the_caller() {
        let _ = gate().call(call(Repeat::Harmless, 5000), |_| -> Result<(), Failure> { panic!("of the caller") });
    }

    /// A panic in a handler would otherwise unwind through libvirt.
    #[test]
    fn a_panicking_handler_stays_inside() {
        start_event_loop().unwrap();
        let connection = Connect::open(Some("test:///default")).unwrap();
        let (told, hear) = mpsc::channel();
        let told = Arc::new(Mutex::new(told));
        let mut registrations = Registrations::default();
        let handler = move |_: Event<'_>| {
            let _ = told.lock().unwrap_or_else(|e| e.into_inner()).send(());
            panic!("on purpose");
        };
        sys::register(&connection, handler, &mut registrations).unwrap();
        let domain = connection.lookup_domain_by_name("test").unwrap();
        domain.suspend().unwrap();
        hear.recv_timeout(Duration::from_secs(10)).unwrap();
        domain.resume().unwrap();
        hear.recv_timeout(Duration::from_secs(10)).expect("the loop lives on");
        registrations.end(&connection);
    }
}
