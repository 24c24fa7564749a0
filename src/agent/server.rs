//! The agent's side of a session.
//!
//! Serves any [`Replica`] over one pair of pipes, one frame after the other on one thread; a second thread only says
//! "I am alive". It ends on the client's `Bye`, at the end of its input, and when nothing was heard for
//! [`ServeOptions::silence`]; ending drops the replicas, and with them their locks. A call into a replica is never
//! interrupted: the end of the session is noticed when it returns.
//!
//! Protocol: docs/formats/wire.md. The other side: [`super::client`].

mod bringup;
mod plain;
mod upkeep;

use super::patience::{Patient, up_to};
use crate::agent::wire::{
    BULK_MAX, Banner, Failed, FrameKind, Handle, Head, PROTOCOL, Progress, REPLY_MAX, Reply, Request, Role,
    SAME_VERSION, Stream, WireError, decode, encode, encode_nodes, encode_pieces, protocol, read_banner, read_frame,
    write_frame,
};
use crate::block::BlockIndex;
use crate::engine::disk_target::{DiskTarget, NODES_MAX, check_blocks};
use crate::error::{Error, Kind, Result, Words, advice};
use crate::name::{DiskName, DomainName, DomainUuid};
use crate::plain::tree::Make;
use crate::plain::{PlainTarget, Wish};
use crate::recovery::bringup::BringUp;
use crate::replica::root::{StoreSeen, StoreWish};
use crate::replica::upkeep::Upkeep;
use crate::replica::{ATTACHMENT_MAX, Attachment, BeginPoint, Begun, Replica};
use crate::transport::pipe::{PipeReader, PipeWriter};
use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// What an agent serves: a replica, and the keeping of its points.
pub trait Served: Replica + Upkeep {}

impl<T: Replica + Upkeep> Served for T {}

/// Where the agent's replicas come from.
pub trait ReplicaOpener {
    /// The replica of this domain, which need not exist yet.
    fn open(&self, uuid: &DomainUuid) -> Result<Box<dyn Served>>;

    /// Domains with this name, or all of them for an empty one. Names are not unique over time; UUIDs are.
    fn find(&self, name: &str) -> Result<Vec<(DomainUuid, DomainName)>>;

    /// The store that is served, created if the client wishes it so.
    fn store(&self, _: &StoreWish) -> Result<StoreSeen> {
        Err(Error::new(Kind::Refused, "this agent serves no store"))
    }

    /// An image that belongs to no domain, where such are served.
    fn image(&self, wish: &Wish) -> Result<Box<dyn PlainTarget>> {
        Err(Error::new(Kind::Refused, "this agent serves a store, and no images beside it")
            .path(&wish.path)
            .advise(advice::Host::ServeImages))
    }

    /// Makes a directory or a link beside such images.
    fn make(&self, make: &Make) -> Result<()> {
        Err(Error::new(Kind::Refused, "this agent serves a store, and no images beside it").path(&make.path))
    }

    /// How a domain is brought up on this host, where such is done.
    fn bring_up(&self, uuid: &DomainUuid) -> Result<Box<dyn BringUp + '_>> {
        Err(Error::new(Kind::Refused, "this agent keeps replicas, and brings nothing up")
            .domain(uuid)
            .advise(advice::Host::ServeFailovers))
    }
}

/// Deadlines of one session, as the agent applies them.
#[derive(Debug, Clone, Copy)]
pub struct ServeOptions {
    /// The session ends when nothing was heard, or nothing could be said, for this long.
    pub silence: Duration,
    /// How often the agent says that it is alive. Well below the client's patience.
    pub ping_interval: Duration,
    /// How this program words an advice, for clients that do not know it. `None`: they get no words.
    pub words: Option<Words>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { silence: Duration::from_secs(30), ping_interval: Duration::from_secs(5), words: None }
    }
}

/// Replicas one session may hold open.
const OPEN_MAX: usize = 256;
/// Points one session may have open at once: each keeps tables in memory. A run has one.
const BEGUN_MAX: usize = 8;
/// Verify says how far it is at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Serves one session on this process's stdin and stdout, which belong to it from now on (stdout becomes
/// non-blocking). Whoever talks on stderr is heard by the client.
pub fn serve_stdio(opener: &dyn ReplicaOpener, options: ServeOptions) -> Result<()> {
    let stdio = || -> std::io::Result<_> {
        let input = std::io::stdin().as_fd().try_clone_to_owned()?;
        let output = std::io::stdout().as_fd().try_clone_to_owned()?;
        Ok((PipeReader::new(input), PipeWriter::new(output)?))
    };
    let (input, output) = stdio().map_err(|e| Error::from_io("cannot use stdin and stdout", e))?;
    serve(input, output, opener, options)
}

/// Serves one session until its end. Deadlines work as far as `input` and `output` give up now and then, as
/// [`crate::transport::Channel`] describes; over ends that block for ever there are none.
///
/// `Ok` after the client's `Bye` only.
pub fn serve(
    input: impl Read + Send,
    output: impl Write + Send,
    opener: &dyn ReplicaOpener,
    options: ServeOptions,
) -> Result<()> {
    let mut input = BufReader::with_capacity(64 << 10, Patient::new(input, up_to(options.silence)));
    let mut output = Patient::new(output, up_to(options.silence));
    output.write_all(Banner::ours().line(Role::Agent).as_bytes()).map_err(cannot_answer)?;
    output.flush().map_err(cannot_answer)?;
    let theirs = read_banner(&mut input, Role::Client, 0)?;
    if theirs.protocol != PROTOCOL {
        let (ours, version) = (Banner::ours(), &theirs.version);
        let what = format!(
            "the client speaks protocol {} (version {version}), this agent {} (version {})",
            theirs.protocol, ours.protocol, ours.version
        );
        return Err(Error::new(Kind::Protocol, what).hint(SAME_VERSION));
    }
    let output = Output(Mutex::new(Some(output)));
    let stop = Stop::default();
    std::thread::scope(|scope| {
        // Also when a replica panics: the scope waits for the second thread.
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| keep_alive(&output, &stop, options.ping_interval));
        let (replicas, streams) = (BTreeMap::new(), upkeep::Streams::default());
        let images = BTreeMap::new();
        let words = options.words;
        let mut session =
            Session { opener, output: &output, words, replicas, images, opened: 0, incoming: None, streams };
        let ended = session.run(&mut input);
        // The locks first: saying why may take as long as the silence that brought us here. It is best effort, since a
        // client that is gone is the commonest reason.
        session.close();
        if let Err(error) = &ended {
            let _ = session.send(FrameKind::Error, 0, &session.failure(error));
        }
        ended
    })
}

#[derive(Default)]
struct Stop {
    now: Mutex<bool>,
    changed: Condvar,
}

struct StopOnDrop<'a>(&'a Stop);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        *self.0.now.lock().expect("a bool is stored under this lock, nothing else") = true;
        self.0.changed.notify_all();
    }
}

/// Pings until told to stop, or until nobody hears it: then the main thread notices the same.
fn keep_alive<W: Write>(output: &Output<W>, stop: &Stop, interval: Duration) {
    loop {
        let now = stop.now.lock().expect("a bool is stored under this lock, nothing else");
        let (now, _) = stop
            .changed
            .wait_timeout_while(now, interval, |now| !*now)
            .expect("a bool is stored under this lock, nothing else");
        if *now {
            return;
        }
        drop(now);
        if output.send(FrameKind::Ping, 0, &[]).is_err() {
            return;
        }
    }
}

/// Where the answers go, shared with the thread that pings. `None` after a failed write: what stands in the pipe may be
/// half a frame, and nothing may follow it.
struct Output<W>(Mutex<Option<W>>);

impl<W: Write> Output<W> {
    /// Writes a message, in as many frames as it needs.
    fn send(&self, kind: FrameKind, id: u64, message: &[u8]) -> Result<()> {
        let mut rest = message;
        loop {
            let (now, later) = rest.split_at(rest.len().min(BULK_MAX));
            let head = Head { kind, more: !later.is_empty(), id };
            let mut output = self.0.lock().expect("nothing panics while it writes");
            let writer = output.as_mut().ok_or_else(|| cannot_answer(std::io::ErrorKind::BrokenPipe.into()))?;
            if let Err(error) = write_frame(writer, head, &[], now) {
                *output = None;
                return Err(cannot_answer(error));
            }
            if later.is_empty() {
                return Ok(());
            }
            rest = later;
        }
    }
}

fn cannot_answer(error: std::io::Error) -> Error {
    Error::new(Kind::Unavailable, "cannot answer the client").source(error)
}

/// An opened replica and what the stream of patches needs to know about it.
struct Opened {
    uuid: DomainUuid,
    replica: Box<dyn Served>,
    /// The disks of the point being written, in the order of `begin`: what the number in an `Apply` frame means.
    disks: Vec<DiskName>,
    /// Why patches are no longer applied; told again to whoever builds on them.
    failed: Option<WireError>,
}

impl Opened {
    /// Gives up a point that nobody is going to seal any more, in order: what arrived of a first copy is worth keeping.
    fn close(self) {
        if self.disks.is_empty() {
            return;
        }
        if let Err(e) = self.replica.abandon() {
            tracing::warn!(domain = %self.uuid, error = %e.chain(), "an open point was left behind; the next run removes it");
        }
    }
}

/// An attachment on its way in.
struct Incoming {
    id: u64,
    replica: Handle,
    name: Attachment,
    length: usize,
    content: Vec<u8>,
}

struct Session<'a, W> {
    opener: &'a dyn ReplicaOpener,
    output: &'a Output<W>,
    words: Option<Words>,
    replicas: BTreeMap<Handle, Opened>,
    images: BTreeMap<Handle, plain::Image>,
    opened: u32,
    incoming: Option<Incoming>,
    streams: upkeep::Streams,
}

/// An answer to a request: a message, or the request's failure, which the session survives.
enum Answer {
    Message(FrameKind, Vec<u8>),
    /// The answer comes after later frames.
    Later,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Answer::Message(FrameKind::Reply, encode(&reply))
    }
}

impl<W: Write> Session<'_, W> {
    /// One frame after the other. An error of this function ends the session; an error of a request does not.
    fn run(&mut self, input: &mut impl Read) -> Result<()> {
        let mut payload = Vec::new();
        while let Some(head) = read_frame(input, &mut payload)? {
            match head.kind {
                FrameKind::Request => {
                    let answer = self.request(head.id, &payload);
                    self.answer(head.id, answer)?;
                }
                FrameKind::Apply => self.apply(&payload)?,
                FrameKind::Attach => {
                    if let Some(answer) = self.attach(head, &payload)? {
                        self.answer(head.id, answer)?;
                    }
                }
                FrameKind::Release => {
                    let handle = Handle::from_bytes(&payload)?;
                    self.streams.close_all(Some(handle));
                    self.images.remove(&handle);
                    self.replicas.remove(&handle).into_iter().for_each(Opened::close);
                }
                FrameKind::Ping => {}
                // The replicas go first: who has read `End` may rely on their locks being free.
                FrameKind::Bye => {
                    self.close();
                    return self.send(FrameKind::End, 0, &[]);
                }
                other => return Err(protocol(format!("{other} is not for an agent"))),
            }
        }
        Err(Error::new(Kind::Unavailable, "the client ended without a goodbye"))
    }

    /// Ends with every replica, and so frees their locks.
    fn close(&mut self) {
        self.streams.close_all(None);
        self.images.clear();
        std::mem::take(&mut self.replicas).into_values().for_each(Opened::close);
    }

    fn request(&mut self, id: u64, payload: &[u8]) -> Result<Answer> {
        let request: Request = decode("request", payload)?;
        Ok(match request {
            Request::Open { uuid } => Reply::Open { replica: self.open(uuid)? }.into(),
            Request::Find { name } => Reply::Find { found: self.opener.find(&name)? }.into(),
            Request::Describe { replica } => Reply::Describe { view: self.at(replica)?.replica.describe()? }.into(),
            Request::Begin { replica, request } => Reply::Begin { begun: Some(self.begin(replica, &request)?) }.into(),
            Request::Nodes { replica, disk, level, start, end } => self.nodes(replica, &disk, level, start..end)?,
            Request::Pieces { replica, disk, blocks } => self.pieces(replica, &disk, &blocks)?,
            Request::FinishDisk { replica, disk } => {
                Reply::FinishDisk { applied: self.end_of_patch(replica)?.finish_disk(&disk)? }.into()
            }
            Request::Attach { replica, name, length } => self.expect_attachment(id, replica, name, length)?,
            Request::Seal { replica, request } => {
                let opened = self.sound(replica)?;
                let point = opened.replica.seal(&request)?;
                opened.disks = Vec::new();
                Reply::Seal { point }.into()
            }
            Request::Abandon { replica } => {
                let opened = self.at(replica)?;
                opened.replica.abandon()?;
                (opened.failed, opened.disks) = (None, Vec::new());
                Reply::Abandon {}.into()
            }
            Request::Verify { replica, point } => {
                let mut last = Instant::now();
                let output = self.output;
                let mut progress = |done_bytes, total_bytes| {
                    if last.elapsed() >= PROGRESS_INTERVAL {
                        last = Instant::now();
                        let message = encode(&Progress::bytes(done_bytes, total_bytes));
                        // A client that is gone is noticed by the answer.
                        let _ = output.send(FrameKind::Progress, id, &message);
                    }
                };
                Reply::Verify { report: self.at(replica)?.replica.verify(&point, &mut progress)? }.into()
            }
            Request::Upkeep { replica, ask } => self.upkeep(id, replica, ask)?,
            Request::Plain { ask } => self.plain(id, ask)?,
            Request::BringUp { uuid, ask } => self.bring_up(id, &uuid, ask)?,
            Request::Claim { replica, claim } => {
                Reply::Claim { claimed: self.at(replica)?.replica.claim(&claim)? }.into()
            }
            Request::Store { wish } => Reply::Store { store: self.opener.store(&wish)? }.into(),
        })
    }

    fn open(&mut self, uuid: DomainUuid) -> Result<Handle> {
        self.have_room()?;
        let replica = self.opener.open(&uuid)?;
        let handle = self.next_handle()?;
        self.replicas.insert(handle, Opened { uuid, replica, disks: Vec::new(), failed: None });
        Ok(handle)
    }

    fn have_room(&self) -> Result<()> {
        match self.replicas.len() + self.images.len() < OPEN_MAX {
            true => Ok(()),
            false => Err(Error::new(Kind::Refused, format!("one session may open {OPEN_MAX} replicas and images"))),
        }
    }

    fn next_handle(&mut self) -> Result<Handle> {
        let handle = Handle(self.opened);
        self.opened = self.opened.checked_add(1).ok_or_else(|| protocol("a session without end"))?;
        Ok(handle)
    }

    fn begin(&mut self, handle: Handle, request: &BeginPoint) -> Result<Begun> {
        let others = self.replicas.iter().filter(|(other, opened)| **other != handle && !opened.disks.is_empty());
        let begun_elsewhere = others.count();
        let opened = self.at(handle)?;
        if request.uuid != opened.uuid {
            let what = format!("this replica is of domain {}, not {}", opened.uuid, request.uuid);
            return Err(Error::new(Kind::Refused, what));
        }
        if begun_elsewhere >= BEGUN_MAX {
            return Err(Error::new(Kind::Refused, format!("one session may have {BEGUN_MAX} points open at once")));
        }
        let begun = opened.replica.begin(request)?;
        opened.disks = request.disks.iter().map(|disk| disk.name.clone()).collect();
        opened.failed = None;
        Ok(begun)
    }

    fn nodes(&mut self, handle: Handle, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Answer> {
        let count = range.end.checked_sub(range.start).filter(|count| *count <= NODES_MAX);
        let count = count.ok_or_else(|| {
            protocol(format!("nodes {} to {}: at most {NODES_MAX} in one request", range.start, range.end))
        })?;
        let nodes = self.end_of_patch(handle)?.nodes(disk, level, range)?;
        if nodes.len() as u64 != count {
            let what = format!("the store gave {} nodes for {count}", nodes.len());
            return Err(Error::new(Kind::Corrupt, what).disk(disk));
        }
        Ok(Answer::Message(FrameKind::Nodes, encode_nodes(&nodes)))
    }

    fn pieces(&mut self, handle: Handle, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Answer> {
        // Whatever stands behind: what it is handed is bounded.
        check_blocks(blocks).map_err(|e| e.disk(disk))?;
        let pieces = self.end_of_patch(handle)?.pieces(disk, blocks)?;
        if pieces.len() != blocks.len() {
            let what = format!("the store gave the pieces of {} blocks for {}", pieces.len(), blocks.len());
            return Err(Error::new(Kind::Corrupt, what).disk(disk));
        }
        Ok(Answer::Message(FrameKind::Pieces, encode_pieces(&pieces)))
    }

    /// Applies patch bytes. A failure of the replica is told at once and again to the next request that builds on it;
    /// what still arrives is dropped.
    fn apply(&mut self, payload: &[u8]) -> Result<()> {
        let (stream, patch) = Stream::split(payload)?;
        if let Some(image) = self.images.get_mut(&stream.replica) {
            let Some(error) = image.apply(patch) else { return Ok(()) };
            return self.send(FrameKind::Failed, 0, &encode(&Failed { replica: stream.replica, error }));
        }
        // Released while bytes were on their way: nobody waits for them.
        let Some(opened) = self.replicas.get_mut(&stream.replica) else { return Ok(()) };
        if opened.failed.is_some() {
            return Ok(());
        }
        let applied = match opened.disks.get(stream.disk as usize) {
            Some(disk) => opened.replica.apply(disk, patch).map_err(|e| e.disk(disk)),
            None => Err(protocol(format!("patch bytes for disk number {}, which was not begun", stream.disk))),
        };
        let Err(error) = applied else { return Ok(()) };
        let error = WireError::from(&error).spoken(self.words);
        opened.failed = Some(error.clone());
        self.send(FrameKind::Failed, 0, &encode(&Failed { replica: stream.replica, error }))
    }

    fn expect_attachment(&mut self, id: u64, replica: Handle, name: Attachment, length: u64) -> Result<Answer> {
        if self.incoming.is_some() {
            return Err(protocol("a second attachment before the first one ended"));
        }
        if length > ATTACHMENT_MAX as u64 {
            return Err(protocol(format!("an attachment of {length} bytes; at most {ATTACHMENT_MAX} are allowed")));
        }
        self.sound(replica)?;
        // Not allocated in advance: memory follows what really arrives.
        self.incoming = Some(Incoming { id, replica, name, length: length as usize, content: Vec::new() });
        Ok(Answer::Later)
    }

    /// Takes content in; answers after the last of it. Frames of a refused attachment are dropped.
    fn attach(&mut self, head: Head, payload: &[u8]) -> Result<Option<Result<Answer>>> {
        let Some(incoming) = self.incoming.as_mut().filter(|incoming| incoming.id == head.id) else { return Ok(None) };
        if payload.len() > incoming.length - incoming.content.len() {
            return Err(protocol("an attachment is longer than it said"));
        }
        incoming.content.extend_from_slice(payload);
        if head.more {
            return Ok(None);
        }
        let incoming = self.incoming.take().expect("it was there a line above");
        if incoming.content.len() != incoming.length {
            return Err(protocol("an attachment is shorter than it said"));
        }
        let attached = self
            .sound(incoming.replica)
            .and_then(|opened| opened.replica.attach(incoming.name, &incoming.content))
            .map(|()| Reply::Attach {}.into());
        Ok(Some(attached))
    }

    fn at(&mut self, handle: Handle) -> Result<&mut Opened> {
        self.replicas.get_mut(&handle).ok_or_else(|| protocol(format!("replica {} is not open", handle.0)))
    }

    /// The replica, unless an earlier patch failed: then that failure.
    fn sound(&mut self, handle: Handle) -> Result<&mut Opened> {
        let opened = self.at(handle)?;
        match &opened.failed {
            Some(error) => Err(error.clone().into_error(None)),
            None => Ok(opened),
        }
    }

    /// What stands at the end of a patch: a replica's disks, or an image; unless an earlier part of the patch failed.
    fn end_of_patch(&mut self, handle: Handle) -> Result<&dyn DiskTarget> {
        if self.images.contains_key(&handle) {
            return self.images.get_mut(&handle).expect("asked in the line above").sound();
        }
        Ok(self.sound(handle)?.replica.as_ref())
    }

    fn answer(&self, id: u64, answer: Result<Answer>) -> Result<()> {
        match answer {
            Ok(Answer::Later) => Ok(()),
            Ok(Answer::Message(_, message)) if message.len() > REPLY_MAX => {
                let error = Error::new(Kind::Refused, format!("the answer has {} bytes", message.len()));
                self.send(FrameKind::Error, id, &self.failure(&error))
            }
            Ok(Answer::Message(kind, message)) => self.send(kind, id, &message),
            Err(error) => self.send(FrameKind::Error, id, &self.failure(&error)),
        }
    }

    /// A failure as it is sent: with this program's words.
    fn failure(&self, error: &Error) -> Vec<u8> {
        encode(&WireError::from(error).spoken(self.words))
    }

    fn send(&self, kind: FrameKind, id: u64, message: &[u8]) -> Result<()> {
        self.output.send(kind, id, message)
    }
}
