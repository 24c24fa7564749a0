//! The agent and its client: over pipes in one process, and over a real sshd on 127.0.0.1 with its own keys, port and
//! directory, started and ended by the test.
//!
//! The replica behind the agent is a fake that remembers what it was told and misbehaves on request.

mod conversation;
mod hostile;
mod mute;
mod ssh;
mod trouble;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virt_replica::agent::client::{AgentClient, ClientOptions};
use virt_replica::agent::server::{ReplicaOpener, ServeOptions, Served, serve};
use virt_replica::agent::wire::{self, FrameKind, Head, Request, Role};
use virt_replica::block::digest::{BLOCK_PIECES, BlockPieces, Digest, PieceDigest};
use virt_replica::block::{BlockIndex, DiskSize};
use virt_replica::engine::disk_target::*;
use virt_replica::engine::stats::*;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use virt_replica::replica::root::{StoreSeen, StoreWish};
use virt_replica::replica::upkeep::{
    Damage, DamageKind, Holds, Kept, PatchStream, PruneReport, ScrubStart, ScrubStep, ScrubTold, Scrubbing,
    ShortenStart, ShortenStep, Shortening, Upkeep,
};
use virt_replica::replica::*;
use virt_replica::transport::pipe::{PipeReader, PipeWriter};
use virt_replica::transport::{Channel, Closer, Transport};

const UUID: &str = "00000000-0000-4000-8000-000000000001";

fn uuid() -> DomainUuid {
    DomainUuid::new(UUID).unwrap()
}

fn disk(name: &str) -> DiskName {
    DiskName::new(name).unwrap()
}

/// What the fake replica was told, and how it misbehaves.
#[derive(Default)]
struct Fake {
    applied: Mutex<BTreeMap<String, Vec<u8>>>,
    attached: Mutex<Vec<(Attachment, usize)>>,
    sealed: AtomicUsize,
    abandoned: AtomicUsize,
    /// Replicas open now: each holds the lock.
    held: AtomicUsize,
    /// `apply` fails once a disk would have more bytes than this.
    room_bytes: Mutex<Option<usize>>,
    /// `apply` and `seal` take this long.
    delay: Mutex<Duration>,
    /// While it is set, `describe` is not answered; the agent goes on saying that it is alive.
    mute: AtomicBool,
    points: AtomicUsize,
    /// What was asked to be pinned or removed.
    asked: Mutex<Vec<String>>,
    /// Streams that are read.
    streams: AtomicUsize,
}

struct FakeReplica(Arc<Fake>);

impl Drop for FakeReplica {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::SeqCst);
    }
}

struct FakeOpener(Arc<Fake>);

impl ReplicaOpener for FakeOpener {
    fn open(&self, wanted: &DomainUuid) -> Result<Box<dyn Served>> {
        if *wanted != uuid() {
            return Err(Error::new(Kind::Busy, "held by run 17").hint("wait for it").domain(wanted));
        }
        self.0.held.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeReplica(Arc::clone(&self.0))))
    }

    fn find(&self, name: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        Ok(vec![(uuid(), DomainName::new(name)?)])
    }
}

fn point(seq: usize) -> PointView {
    PointView {
        id: PointId::from_parts(seq as u64, &RunId::from_bits(seq as u64)),
        generation: Generation(1),
        frozen_at: jiff::Timestamp::UNIX_EPOCH,
        sealed_at: jiff::Timestamp::UNIX_EPOCH,
        consistency: Consistency::Crash,
        consistency_reason: None,
        autostart: None,
        tpm_programs: None,
        run: RunId::from_bits(seq as u64),
        disks: vec![PointDisk {
            name: disk("vda"),
            image: "/srv/vda.qcow2".into(),
            size: DiskSize(1 << 30),
            root: Digest([7; 32]),
            stats: DiskStats { mode: Mode::Full, reason: "first run".into(), ..DiskStats::default() },
        }],
        attachments: vec![],
        left_out: Default::default(),
    }
}

/// The digest of a node is its number, so that an answer can be told from every other.
fn node(n: u64) -> Digest {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Digest(bytes)
}

/// The digest of a piece is its block's number and its own, and some are zero.
fn pieces_of(block: BlockIndex) -> BlockPieces {
    let mut pieces = [PieceDigest::ZERO; BLOCK_PIECES];
    for (n, piece) in (1..).zip(&mut pieces).filter(|(n, _)| !(block.0 % 3 + n).is_multiple_of(3)) {
        piece.0[..8].copy_from_slice(&block.0.to_le_bytes());
        piece.0[8..].copy_from_slice(&n.to_le_bytes());
    }
    pieces
}

impl DiskTarget for FakeReplica {
    fn nodes(&self, _: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        Ok(range.map(|n| if n % 3 == 0 { Digest::ZERO } else { node(n << 8 | u64::from(level)) }).collect())
    }

    fn pieces(&self, _: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        Ok(blocks.iter().copied().map(pieces_of).collect())
    }

    fn apply(&self, disk: &DiskName, bytes: &[u8]) -> Result<()> {
        std::thread::sleep(*self.0.delay.lock().unwrap());
        let mut applied = self.0.applied.lock().unwrap();
        let stream = applied.entry(disk.to_string()).or_default();
        if self.0.room_bytes.lock().unwrap().is_some_and(|room| stream.len() + bytes.len() > room) {
            let full = std::io::Error::from_raw_os_error(28);
            return Err(Error::io("cannot write", "/srv/vda.qcow2", full).offset(stream.len() as u64));
        }
        stream.extend_from_slice(bytes);
        Ok(())
    }

    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        let applied = self.0.applied.lock().unwrap();
        let bytes_written = applied.get(disk.as_str()).map_or(0, Vec::len) as u64;
        Ok(DiskApplied { root: Digest([7; 32]), bytes_written, blocks_changed: 1 })
    }
}

impl Replica for FakeReplica {
    fn describe(&self) -> Result<ReplicaView> {
        while self.0.mute.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(ReplicaView {
            generation: Generation(1),
            points: (1..=self.0.points.load(Ordering::SeqCst)).map(point).collect(),
            free_bytes: 1 << 40,
            path: "/srv".into(),
            open_point: None,
            seeds: Vec::new(),
            damaged: vec![],
            promoted: None,
        })
    }

    fn begin(&self, _: &BeginPoint) -> Result<Begun> {
        self.0.applied.lock().unwrap().clear();
        Ok(Begun::default())
    }

    fn attach(&self, name: Attachment, content: &[u8]) -> Result<()> {
        self.0.attached.lock().unwrap().push((name, content.len()));
        Ok(())
    }

    fn seal(&self, _: &SealPoint) -> Result<PointView> {
        std::thread::sleep(*self.0.delay.lock().unwrap());
        Ok(point(self.0.sealed.fetch_add(1, Ordering::SeqCst) + 1))
    }

    fn abandon(&self) -> Result<()> {
        self.0.abandoned.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn verify(&self, point: &PointId, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        for done in 0..4 {
            std::thread::sleep(Duration::from_millis(300));
            progress(done, 4);
        }
        Ok(VerifyReport { point: point.clone(), disks: vec![], damaged_attachments: vec![] })
    }
}

impl Upkeep for FakeReplica {
    fn holds(&self) -> Result<Holds> {
        Ok(Holds {
            now: jiff::Timestamp::UNIX_EPOCH,
            min_age_s: 7,
            young: vec![],
            pins: vec![],
            leases: vec![],
            links: vec![point(1).id],
            depth: 3,
            depth_max: 64,
            scrub: ScrubTold { damage: vec![rotten()], ..ScrubTold::default() },
        })
    }

    fn prune(&self, remove: &[PointId], progress: &mut dyn FnMut(u64, u64)) -> Result<PruneReport> {
        self.0.asked.lock().unwrap().push(format!("remove {}", remove.len()));
        if remove.contains(&point(9).id) {
            return Err(Error::new(Kind::Refused, "the newest point is never removed").point(&point(9).id));
        }
        for done in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            progress(done, 3);
        }
        let kept = vec![Kept { point: point(2).id, why: "pinned".into() }];
        Ok(PruneReport { removed: remove.to_vec(), kept, bytes_copied: 5, ..PruneReport::default() })
    }

    fn pin(&self, point: &PointId, reason: Option<&str>) -> Result<()> {
        self.0.asked.lock().unwrap().push(format!("pin {} {reason:?}", point.seq()));
        Ok(())
    }

    fn export(&self, point: &PointId, _: &DiskName) -> Result<Box<dyn PatchStream>> {
        self.0.streams.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeStream(Arc::clone(&self.0), point.seq() as u8)))
    }

    fn changes(&self, since: &PointId, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>> {
        self.0.asked.lock().unwrap().push(format!("changes {} {disk}", since.seq()));
        self.export(point, disk)
    }

    fn attachment(&self, point: &PointId, name: Attachment) -> Result<Box<dyn PatchStream>> {
        self.0.asked.lock().unwrap().push(format!("attachment {}", name.file_name()));
        self.export(point, &disk("none"))
    }

    fn scrub(&self, restart: bool) -> Result<Box<dyn Scrubbing>> {
        self.0.streams.fetch_add(1, Ordering::SeqCst);
        self.0.asked.lock().unwrap().push(format!("scrub {restart}"));
        Ok(Box::new(FakeScrub(Arc::clone(&self.0), 0)))
    }

    fn shorten(&self) -> Result<Option<Box<dyn Shortening>>> {
        self.0.asked.lock().unwrap().push("shorten".to_owned());
        // As a target does that was shortened just now: the second time there is nothing to do.
        let again = self.0.asked.lock().unwrap().iter().filter(|a| *a == "shorten").count() > 1;
        if again {
            return Ok(None);
        }
        self.0.streams.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Box::new(FakeShorten(Arc::clone(&self.0), 0))))
    }
}

fn rotten() -> Damage {
    Damage {
        point: point(3).id,
        disk: Some(disk("vdb")),
        what: DamageKind::Content,
        start: 65_536,
        end: 131_072,
        attachment: None,
        found_at: jiff::Timestamp::UNIX_EPOCH,
        dependants: vec![point(4).id],
    }
}

/// Three steps, with damage in the last.
struct FakeScrub(Arc<Fake>, u64);

impl Scrubbing for FakeScrub {
    fn start(&self) -> ScrubStart {
        ScrubStart { resumed: true, bytes_done: 5, bytes_total: 35 }
    }

    fn step(&mut self, bytes_max: u64) -> Result<ScrubStep> {
        self.1 += 1;
        let (end, found) = (self.1 == 3, if self.1 == 3 { vec![rotten()] } else { vec![] });
        Ok(ScrubStep { bytes_read: bytes_max, bytes_done: 5 + self.1 * bytes_max, found, end })
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.0.streams.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

struct FakeShorten(Arc<Fake>, u64);

impl Shortening for FakeShorten {
    fn start(&self) -> ShortenStart {
        ShortenStart { point: point(4).id, disks: vec![disk("vdb")], bytes_total: 20 }
    }

    fn step(&mut self, bytes_max: u64) -> Result<ShortenStep> {
        self.1 += bytes_max;
        Ok(ShortenStep { bytes_done: self.1, end: self.1 >= 20 })
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.0.streams.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

/// As many chunks as the point has for a number, then the end; of point 200 an error.
struct FakeStream(Arc<Fake>, u8);

impl PatchStream for FakeStream {
    fn next_chunk(&mut self) -> Result<Vec<u8>> {
        match self.1 {
            0 => Ok(vec![]),
            200 => Err(Error::new(Kind::Corrupt, "rotten").offset(7)),
            n => {
                self.1 = n - 1;
                Ok(vec![n; 600_000])
            }
        }
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.0.streams.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

fn begin_request(disks: &[&str]) -> BeginPoint {
    BeginPoint {
        uuid: uuid(),
        name: DomainName::new("db01").unwrap(),
        run: RunId::from_bits(1),
        generation: Generation(1),
        expected_head: None,
        disks: disks
            .iter()
            .map(|name| BeginDisk {
                name: disk(name),
                size: DiskSize(1 << 30),
                fresh: true,
                reserve_bytes: 0,
                resume: false,
                repair: false,
            })
            .collect(),
    }
}

fn seal_request() -> SealPoint {
    SealPoint {
        frozen_at: jiff::Timestamp::UNIX_EPOCH,
        consistency: Consistency::Crash,
        consistency_reason: None,
        autostart: None,
        tpm_programs: None,
        disks: vec![],
        left_out: Default::default(),
    }
}

/// What the other end of a pair of pipes does.
type Peer = dyn Fn(PipeReader, PipeWriter) -> Result<()> + Send + Sync;

/// Runs its peer on a thread of this process, once per channel.
struct PipeTransport(Arc<Peer>);

impl std::fmt::Debug for PipeTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PipeTransport")
    }
}

impl PipeTransport {
    fn new(peer: impl Fn(PipeReader, PipeWriter) -> Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(peer))
    }

    /// An agent in front of this fake.
    fn agent(fake: &Arc<Fake>, options: ServeOptions) -> Self {
        let fake = Arc::clone(fake);
        Self::new(move |input, output| serve(input, output, &FakeOpener(Arc::clone(&fake)), options))
    }
}

fn pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    (PipeReader::new(reader.into()), PipeWriter::new(writer.into()).unwrap())
}

impl Transport for PipeTransport {
    fn host(&self) -> &str {
        "b"
    }

    fn open(&self) -> Result<Channel> {
        let (agent_input, input) = pipe();
        let (output, agent_output) = pipe();
        let peer = Arc::clone(&self.0);
        let thread = std::thread::spawn(move || peer(agent_input, agent_output));
        Ok(Channel { input: Box::new(input), output: Box::new(output), closer: Box::new(Join(thread)) })
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

struct Join(JoinHandle<Result<()>>);

impl Closer for Join {
    /// As the real ones: a bad end is an error of the transport's own words.
    fn close(self: Box<Self>) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.0.is_finished() {
            if Instant::now() > deadline {
                return Err(Error::new(Kind::Unavailable, "the agent did not end"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.0.join().expect("the agent does not panic")
    }
}

const QUICK: Duration = Duration::from_millis(900);

fn quick_serve() -> ServeOptions {
    ServeOptions { silence: QUICK, ping_interval: Duration::from_millis(200), ..ServeOptions::default() }
}

fn quick_client() -> ClientOptions {
    ClientOptions { silence: QUICK, ping_interval: Duration::from_millis(200), ..ClientOptions::default() }
}

fn session(fake: &Arc<Fake>) -> Arc<AgentClient> {
    Arc::new(AgentClient::connect_with(&PipeTransport::agent(fake, quick_serve()), quick_client()).unwrap())
}

/// Waits for something that another thread does.
fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What a client says in a short session, banner included, up to and including `seal`.
fn spoken() -> Vec<u8> {
    let mut said = wire::Banner::ours().line(Role::Client).into_bytes();
    let replica = wire::Handle(0);
    let requests = [
        Request::Open { uuid: uuid() },
        Request::Begin { replica, request: begin_request(&["vda"]) },
        Request::Attach { replica, name: Attachment::InactiveXml, length: 4 },
        Request::FinishDisk { replica, disk: disk("vda") },
        Request::Nodes { replica, disk: disk("vda"), level: 1, start: 5, end: 9 },
        Request::Pieces { replica, disk: disk("vda"), blocks: vec![BlockIndex(5), BlockIndex(u64::MAX)] },
        Request::Seal { replica, request: seal_request() },
    ];
    for (id, request) in (1..).zip(&requests) {
        let head = |kind| Head { kind, more: false, id };
        if let Request::FinishDisk { .. } = request {
            let stream = wire::Stream { replica, disk: 0 };
            wire::write_frame(&mut said, head(FrameKind::Apply), &stream.to_bytes(), b"patch").unwrap();
        }
        wire::write_frame(&mut said, head(FrameKind::Request), &[], &wire::encode(request)).unwrap();
        if let Request::Attach { .. } = request {
            wire::write_frame(&mut said, head(FrameKind::Attach), &[], b"<x/>").unwrap();
        }
    }
    said
}
