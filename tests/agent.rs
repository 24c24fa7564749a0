//! The agent and its client: over pipes in one process, and over a real sshd on 127.0.0.1 with its own keys, port and
//! directory, started and ended by the test.
//!
//! The replica behind the agent is a fake that remembers what it was told and misbehaves on request.

#[path = "agent/ssh.rs"]
mod ssh;

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
use virt_replica::agent::{ReplicaOpener, ServeOptions, Served, serve};
use virt_replica::block::digest::{BLOCK_PIECES, BlockPieces, Digest, PieceDigest};
use virt_replica::block::{BlockIndex, DiskSize};
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use virt_replica::replica::upkeep::{
    Damage, DamageKind, Holds, Kept, PatchStream, PruneReport, ScrubStart, ScrubStep, ScrubTold, Scrubbing,
    ShortenStart, ShortenStep, Shortening, Upkeep,
};
use virt_replica::replica::*;
use virt_replica::transport::pipe::{PipeReader, PipeWriter};
use virt_replica::transport::{Channel, Closer, Transport};
use virt_replica::wire::{self, FrameKind, Head, Request, Role};

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
        run: RunId::from_bits(seq as u64),
        disks: vec![PointDisk {
            name: disk("vda"),
            image: "/srv/vda.qcow2".into(),
            size: DiskSize(1 << 30),
            root: Digest([7; 32]),
            stats: DiskStats { mode: Mode::Full, reason: "first run".into(), ..DiskStats::default() },
        }],
        attachments: vec![],
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
        disks: vec![],
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
    ServeOptions { silence: QUICK, ping_interval: Duration::from_millis(200) }
}

fn quick_client() -> ClientOptions {
    ClientOptions { silence: QUICK, ping_interval: Duration::from_millis(200) }
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

// ---- the conversation

#[test]
fn a_whole_run_through_the_trait() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    assert_eq!(client.agent_version(), wire::VERSION);
    assert_eq!(client.find("db01").unwrap(), [(uuid(), DomainName::new("db01").unwrap())]);
    let replica = client.open(&uuid()).unwrap();
    assert!(replica.describe().unwrap().points.is_empty());
    replica.begin(&begin_request(&["vda", "vdb"])).unwrap();

    // Longer than a frame, and in pieces of every kind.
    let patch: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7) as u8).collect();
    replica.apply(&disk("vdb"), &patch).unwrap();
    replica.apply(&disk("vda"), b"").unwrap();
    replica.apply(&disk("vda"), b"abc").unwrap();
    assert_eq!(replica.finish_disk(&disk("vdb")).unwrap().bytes_written, patch.len() as u64);
    assert_eq!(fake.applied.lock().unwrap()["vdb"], patch);
    assert_eq!(fake.applied.lock().unwrap()["vda"], b"abc");
    assert_eq!(replica.apply(&disk("vdc"), b"x").unwrap_err().kind(), Kind::Usage);

    for length in [0, 5, 1 << 20, (1 << 20) + 1, 3 << 20] {
        replica.attach(Attachment::Nvram, &vec![1; length]).unwrap();
        assert_eq!(fake.attached.lock().unwrap().last(), Some(&(Attachment::Nvram, length)));
    }
    assert_eq!(replica.seal(&seal_request()).unwrap(), point(1));
    replica.abandon().unwrap();
    assert_eq!(fake.abandoned.load(Ordering::SeqCst), 1);
    assert!(client.bytes_sent() > patch.len() as u64 && client.bytes_received() > 100);

    // The lock goes with the replica, not with the session.
    assert_eq!(fake.held.load(Ordering::SeqCst), 1);
    drop(replica);
    eventually("the replica is released", || fake.held.load(Ordering::SeqCst) == 0);
    client.close().unwrap();
    client.close().unwrap();
    assert_eq!(client.find("x").unwrap_err().kind(), Kind::Usage);
}

#[test]
fn points_are_kept_and_removed_through_the_trait() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let holds = replica.holds().unwrap();
    assert_eq!((holds.min_age_s, holds.links, holds.depth), (7, vec![point(1).id], 3));
    let mut heard = 0;
    let report = replica.prune(&[point(1).id], &mut |_, _| heard += 1).unwrap();
    assert_eq!((report.removed, report.kept[0].why.as_str(), report.bytes_copied), (vec![point(1).id], "pinned", 5));
    assert!(heard > 0, "progress travels");
    let refused = replica.prune(&[point(9).id], &mut |_, _| {}).unwrap_err();
    assert_eq!((refused.kind(), refused.context().point.clone()), (Kind::Refused, Some(point(9).id.to_string())));
    replica.pin(&point(2).id, Some("why")).unwrap();
    replica.pin(&point(2).id, None).unwrap();
    assert_eq!(*fake.asked.lock().unwrap(), ["remove 1", "remove 1", "pin 2 Some(\"why\")", "pin 2 None"]);
    client.close().unwrap();
}

#[test]
fn a_stream_is_read_ahead_and_ends_with_its_reader() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let mut stream = replica.export(&point(9).id, &disk("vda")).unwrap();
    for n in (1..=9).rev() {
        assert_eq!(stream.next_chunk().unwrap(), vec![n; 600_000]);
    }
    assert!(stream.next_chunk().unwrap().is_empty() && stream.next_chunk().unwrap().is_empty());
    stream.close().unwrap();
    assert_eq!(fake.streams.load(Ordering::SeqCst), 0);
    for asked in ["changes 3 vda", "attachment nvram.fd"] {
        let mut stream = match asked.starts_with("changes") {
            true => replica.changes(&point(3).id, &point(1).id, &disk("vda")).unwrap(),
            false => replica.attachment(&point(1).id, Attachment::Nvram).unwrap(),
        };
        assert_eq!(stream.next_chunk().unwrap(), vec![1; 600_000]);
        stream.close().unwrap();
        assert_eq!(fake.asked.lock().unwrap().last().unwrap(), asked);
    }

    let mut stream = replica.export(&point(200).id, &disk("vda")).unwrap();
    let e = stream.next_chunk().unwrap_err();
    assert_eq!((e.kind(), e.context().offset_bytes), (Kind::Corrupt, Some(7)));
    // Closed in the middle, and not closed at all: the agent lets go of the point.
    stream.close().unwrap();
    let mut stream = replica.export(&point(100).id, &disk("vda")).unwrap();
    stream.next_chunk().unwrap();
    stream.close().unwrap();
    for _ in 0..16 {
        drop(replica.export(&point(5).id, &disk("vda")).unwrap());
    }
    assert_eq!(replica.export(&point(5).id, &disk("vda")).err().unwrap().kind(), Kind::Refused);
    assert_eq!(fake.streams.load(Ordering::SeqCst), 16);
    drop(replica);
    eventually("the streams end with the replica", || fake.streams.load(Ordering::SeqCst) == 0);
    client.close().unwrap();
}

#[test]
fn a_reply_larger_than_a_frame_arrives_whole() {
    let fake = Arc::new(Fake::default());
    fake.points.store(20_000, Ordering::SeqCst);
    let client = session(&fake);
    let view = client.open(&uuid()).unwrap().describe().unwrap();
    assert_eq!(view.points.len(), 20_000);
    assert_eq!(view.head().unwrap(), &point(20_000));
    assert!(client.bytes_received() > 2 << 20);
    client.close().unwrap();
}

#[test]
fn eight_threads_ask_at_once_and_each_gets_its_own_answer() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let replica = &replica;
            scope.spawn(move || {
                for round in 0..50u64 {
                    let start = thread * 1_000_000 + round * 1000;
                    let nodes = replica.nodes(&disk("vda"), thread as u8, start..start + round * 7).unwrap();
                    let expected = (start..start + round * 7)
                        .map(|n| if n % 3 == 0 { Digest::ZERO } else { node(n << 8 | thread) });
                    assert!(nodes.iter().copied().eq(expected), "thread {thread}, round {round}");
                }
            });
        }
    });
    // Pieces too, among the others' nodes.
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let replica = &replica;
            scope.spawn(move || {
                for round in 0..50u64 {
                    let blocks: Vec<_> = (0..round * 5).map(|n| BlockIndex((thread << 40) + n * (round + 1))).collect();
                    let pieces = replica.pieces(&disk("vda"), &blocks).unwrap();
                    assert!(pieces.iter().copied().eq(blocks.iter().copied().map(pieces_of)), "{thread}, {round}");
                    assert_eq!(replica.nodes(&disk("vda"), 0, thread * 3 + 1..thread * 3 + 3).unwrap().len(), 2);
                }
            });
        }
    });
    let most = replica.nodes(&disk("vda"), 0, 0..NODES_MAX).unwrap();
    assert_eq!(most.len() as u64, NODES_MAX);
    assert_eq!(replica.nodes(&disk("vda"), 0, 0..NODES_MAX + 1).unwrap_err().kind(), Kind::Usage);
    let blocks: Vec<_> = (0..=PIECES_MAX as u64).map(BlockIndex).collect();
    assert_eq!(replica.pieces(&disk("vda"), &blocks[1..]).unwrap().len(), PIECES_MAX);
    assert_eq!(replica.pieces(&disk("vda"), &blocks).unwrap_err().kind(), Kind::Usage, "more than the most");
    let disorder = [BlockIndex(2), BlockIndex(2)];
    assert_eq!(replica.pieces(&disk("vda"), &disorder).unwrap_err().kind(), Kind::Usage);
    client.close().unwrap();
}

/// A client that does not check what it asks is refused by the agent, and what it asked reaches no replica.
#[test]
fn an_agent_checks_the_blocks_whose_pieces_are_asked_for() {
    let replica = wire::Handle(0);
    let (many, disorder) = (vec![BlockIndex(0); PIECES_MAX + 1], vec![BlockIndex(3), BlockIndex(2)]);
    for blocks in [many, disorder] {
        let mut input = wire::Banner::ours().line(Role::Client).into_bytes();
        let requests = [Request::Open { uuid: uuid() }, Request::Pieces { replica, disk: disk("vda"), blocks }];
        for (id, request) in (1..).zip(&requests) {
            let head = Head { kind: FrameKind::Request, more: false, id };
            wire::write_frame(&mut input, head, &[], &wire::encode(request)).unwrap();
        }
        wire::write_frame(&mut input, Head { kind: FrameKind::Bye, more: false, id: 0 }, &[], &[]).unwrap();
        let mut output = Vec::new();
        serve(&input[..], &mut output, &FakeOpener(Arc::default()), quick_serve()).unwrap();
        let mut output = &output[wire::Banner::ours().line(Role::Agent).len()..];
        let (mut answer, mut refused) = (Vec::new(), None);
        while let Some(head) = wire::read_frame(&mut output, &mut answer).unwrap() {
            if (head.id, head.kind) == (2, FrameKind::Error) {
                refused = Some(wire::decode::<wire::WireError>("error", &answer).unwrap());
            }
        }
        let refused = refused.expect("an error under the request's id");
        assert_eq!((refused.kind, refused.context.disk.as_deref()), (Kind::Usage, Some("vda")));
    }
}

#[test]
fn verify_reports_progress_and_outlasts_the_silence() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let mut seen = Vec::new();
    let began = Instant::now();
    let report = replica.verify(&point(3).id, &mut |done, total| seen.push((done, total))).unwrap();
    assert!(began.elapsed() > QUICK, "the test wants a verify longer than the silence allowed");
    assert_eq!(report.point, point(3).id);
    assert!(seen.len() >= 2 && seen.iter().all(|(_, total)| *total == 4), "{seen:?}");
    client.close().unwrap();
}

/// The agent pings while it works, the client while it waits.
#[test]
fn a_long_seal_is_not_silence() {
    let fake = Arc::new(Fake::default());
    *fake.delay.lock().unwrap() = QUICK * 2;
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    assert_eq!(replica.seal(&seal_request()).unwrap(), point(1));
    client.close().unwrap();
}

/// A slow disk there fills the pipe here: that is backpressure, not death.
#[test]
fn a_full_pipe_to_a_living_agent_waits() {
    let fake = Arc::new(Fake::default());
    *fake.delay.lock().unwrap() = QUICK * 3 / 2;
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    replica.begin(&begin_request(&["vda"])).unwrap();
    replica.apply(&disk("vda"), &vec![1; 3 << 20]).unwrap();
    assert_eq!(replica.finish_disk(&disk("vda")).unwrap().bytes_written, 3 << 20);
    client.close().unwrap();
}

// ---- errors that cross the wire

#[test]
fn an_error_in_mid_apply_surfaces_with_kind_and_place() {
    let fake = Arc::new(Fake::default());
    *fake.room_bytes.lock().unwrap() = Some(100);
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    replica.begin(&begin_request(&["vda", "vdb"])).unwrap();
    replica.apply(&disk("vdb"), &[1; 80]).unwrap();
    replica.apply(&disk("vdb"), &[1; 80]).unwrap();
    let check = |error: Error| {
        assert_eq!(error.kind(), Kind::Space);
        assert_eq!(error.to_string(), "disk 'vdb': on b: cannot write (/srv/vda.qcow2) at byte 80");
        assert!(error.chain().contains("os error 28"), "{}", error.chain());
    };
    check(replica.finish_disk(&disk("vdb")).unwrap_err());
    check(replica.seal(&seal_request()).unwrap_err());
    assert_eq!(fake.sealed.load(Ordering::SeqCst), 0, "a point with a failed patch is never sealed");
    // Told unasked too: nothing more is sent for nothing.
    let sent = client.bytes_sent();
    check(replica.apply(&disk("vda"), &[1; 1 << 20]).unwrap_err());
    assert!(client.bytes_sent() < sent + (1 << 20));
    // The session and the replica live on.
    replica.abandon().unwrap();
    replica.begin(&begin_request(&["vda"])).unwrap();
    replica.apply(&disk("vda"), &[1; 80]).unwrap();
    assert_eq!(replica.finish_disk(&disk("vda")).unwrap().bytes_written, 80);
    client.close().unwrap();
}

#[test]
fn a_refused_open_keeps_its_kind_and_hint() {
    let client = session(&Arc::default());
    let other = DomainUuid::new("00000000-0000-4000-8000-00000000000f").unwrap();
    let error = client.open(&other).unwrap_err();
    assert_eq!((error.kind(), error.hint_text()), (Kind::Busy, Some("wait for it")));
    assert_eq!(error.to_string(), format!("domain '{other}': on b: held by run 17"));
    client.close().unwrap();
}

#[test]
fn a_point_of_another_domain_is_refused() {
    let client = session(&Arc::default());
    let replica = client.open(&uuid()).unwrap();
    let mut request = begin_request(&["vda"]);
    request.uuid = DomainUuid::new("00000000-0000-4000-8000-00000000000f").unwrap();
    assert_eq!(replica.begin(&request).unwrap_err().kind(), Kind::Refused);
    client.close().unwrap();
}

// ---- greetings

fn refused_greeting(said: &'static [u8]) -> Error {
    let transport = PipeTransport::new(move |mut input, mut output| {
        output.write_all(said).unwrap();
        drop(output);
        let mut rest = Vec::new();
        while input.read_to_end(&mut rest).is_err() {}
        Ok(())
    });
    AgentClient::connect_with(&transport, quick_client()).unwrap_err()
}

#[test]
fn an_agent_of_another_protocol_is_named_with_what_to_do() {
    let error = refused_greeting(b"virt-replica agent protocol 9 version 4.0.0\n");
    assert_eq!(error.kind(), Kind::Protocol);
    let text = error.to_string();
    assert!(
        text.contains("virt-replica 4.0.0 (protocol 9)") && text.contains(&format!("{} (protocol 1)", wire::VERSION))
    );
    assert_eq!(error.hint_text(), Some("install the same virt-replica on b"));
}

#[test]
fn what_a_profile_says_instead_of_a_banner_is_in_the_error() {
    let error = refused_greeting(b"This account is currently not available.\n");
    assert!(error.to_string().contains("it said: This account is currently not available."), "{error}");
}

#[test]
fn a_talkative_profile_is_read_past() {
    let transport = PipeTransport::new(|input, mut output| {
        output.write_all(b"Welcome to b!\nYou have mail.\n>> ").unwrap();
        serve(input, output, &FakeOpener(Arc::default()), quick_serve())
    });
    let client = Arc::new(AgentClient::connect_with(&transport, quick_client()).unwrap());
    client.open(&uuid()).unwrap();
    client.close().unwrap();
}

#[test]
fn a_client_of_another_protocol_is_refused() {
    let input = Cursor::new(b"virt-replica client protocol 2 version 2.0.0\n");
    let error = serve(input, std::io::sink(), &FakeOpener(Arc::default()), quick_serve()).unwrap_err();
    assert_eq!(error.kind(), Kind::Protocol);
    assert!(error.to_string().contains("protocol 2 (version 2.0.0)"), "{error}");
}

// ---- silence and cuts

#[test]
fn an_agent_that_never_greets_is_given_up() {
    let hold = Arc::new(AtomicBool::new(true));
    let held = Arc::clone(&hold);
    let transport = PipeTransport::new(move |_input, _output| {
        while held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    });
    let began = Instant::now();
    let error = AgentClient::connect_with(&transport, quick_client()).unwrap_err();
    hold.store(false, Ordering::SeqCst);
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(began.elapsed() < QUICK + Duration::from_secs(4), "{:?}", began.elapsed());
}

/// Also for who writes: a frozen agent leaves the pipe full.
#[test]
fn an_agent_that_freezes_is_dead_for_everybody() {
    let hold = Arc::new(AtomicBool::new(true));
    let held = Arc::clone(&hold);
    let transport = PipeTransport::new(move |_input, mut output| {
        output.write_all(wire::Banner::ours().line(Role::Agent).as_bytes()).unwrap();
        let open = wire::encode(&wire::Reply::Open { replica: wire::Handle(0) });
        // Answers the first two requests unread: open and begin.
        for (id, answer) in [(1, open), (2, wire::encode(&wire::Reply::Begin { begun: None }))] {
            std::thread::sleep(Duration::from_millis(100));
            let head = Head { kind: FrameKind::Reply, more: false, id };
            wire::write_frame(&mut output, head, &[], &answer).unwrap();
        }
        while held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    });
    let client = Arc::new(AgentClient::connect_with(&transport, quick_client()).unwrap());
    let replica = client.open(&uuid()).unwrap();
    replica.begin(&begin_request(&["vda"])).unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| replica.describe().unwrap_err());
        let writes = scope.spawn(|| replica.apply(&disk("vda"), &vec![1; 4 << 20]).unwrap_err());
        for error in [waits.join().unwrap(), writes.join().unwrap()] {
            assert_eq!(error.kind(), Kind::Unavailable);
            assert!(error.to_string().contains("has been silent"), "{error}");
        }
    });
    assert!(began.elapsed() < QUICK + Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(client.close().is_err());
    hold.store(false, Ordering::SeqCst);
}

/// An agent whose client has gone without a word ends and lets the lock go.
#[test]
fn a_silent_client_ends_the_agent_and_frees_the_lock() {
    let fake = Arc::new(Fake::default());
    let (agent_input, mut input) = pipe();
    let (mut output, agent_output) = pipe();
    let opener = FakeOpener(Arc::clone(&fake));
    let agent = std::thread::spawn(move || serve(agent_input, agent_output, &opener, quick_serve()));
    input.write_all(wire::Banner::ours().line(Role::Client).as_bytes()).unwrap();
    let open = wire::encode(&Request::Open { uuid: uuid() });
    wire::write_frame(&mut input, Head { kind: FrameKind::Request, more: false, id: 1 }, &[], &open).unwrap();
    eventually("the replica is open", || fake.held.load(Ordering::SeqCst) == 1);
    let began = Instant::now();
    while !agent.is_finished() {
        // Read by someone, so that only the client's own silence can be the reason.
        let _ = output.read(&mut [0; 4096]);
        assert!(began.elapsed() < QUICK + Duration::from_secs(3));
    }
    let error = agent.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("silent"), "{error}");
    assert_eq!(fake.held.load(Ordering::SeqCst), 0);
}

#[test]
fn a_dropped_client_ends_the_agent() {
    let ended = Arc::new(AtomicBool::new(false));
    let says = Arc::clone(&ended);
    let transport = PipeTransport::new(move |input, output| {
        let ended = serve(input, output, &FakeOpener(Arc::default()), quick_serve());
        says.store(true, Ordering::SeqCst);
        ended
    });
    let client = Arc::new(AgentClient::connect_with(&transport, quick_client()).unwrap());
    client.open(&uuid()).unwrap().describe().unwrap();
    assert!(!ended.load(Ordering::SeqCst));
    drop(client);
    eventually("the agent has ended", || ended.load(Ordering::SeqCst));
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

#[test]
fn a_session_torn_at_any_byte_seals_nothing_and_frees_the_lock() {
    let said = spoken();
    for cut in 0..=said.len() {
        let fake = Arc::new(Fake::default());
        let ended = serve(&said[..cut], std::io::sink(), &FakeOpener(Arc::clone(&fake)), quick_serve());
        assert!(ended.is_err(), "cut at {cut}: no goodbye was said");
        assert_eq!(fake.sealed.load(Ordering::SeqCst), usize::from(cut == said.len()), "cut at {cut}");
        assert_eq!(fake.held.load(Ordering::SeqCst), 0, "cut at {cut}");
    }
}

#[test]
fn an_agent_torn_at_any_byte_is_an_error_here() {
    let mut answers = wire::Banner::ours().line(Role::Agent).into_bytes();
    let ping = Head { kind: FrameKind::Ping, more: false, id: 0 };
    wire::write_frame(&mut answers, ping, &[], &[]).unwrap();
    let open = wire::encode(&wire::Reply::Open { replica: wire::Handle(0) });
    wire::write_frame(&mut answers, Head { kind: FrameKind::Reply, more: false, id: 1 }, &[], &open).unwrap();
    for cut in 0..answers.len() {
        let said = answers[..cut].to_vec();
        let transport = PipeTransport::new(move |mut input, mut output| {
            // Not before the request is here: an answer to a request that nobody made is another test.
            let banner_end = said.len().min(wire::Banner::ours().line(Role::Agent).len());
            output.write_all(&said[..banner_end]).unwrap();
            if said.len() > banner_end {
                let mut asked = Vec::new();
                while !asked.windows(6).any(|w| w == b"\"open\"") {
                    let mut buf = [0; 256];
                    if let Ok(n @ 1..) = input.read(&mut buf) {
                        asked.extend_from_slice(&buf[..n]);
                    }
                }
                output.write_all(&said[banner_end..]).unwrap();
            }
            Ok(())
        });
        let opened = AgentClient::connect_with(&transport, quick_client()).map(Arc::new).and_then(|c| c.open(&uuid()));
        let error = opened.expect_err(&format!("cut at {cut}"));
        assert_eq!(error.kind(), Kind::Unavailable, "cut at {cut}: {error}");
    }
}

#[test]
fn answers_that_nobody_asked_for_end_the_session() {
    for (kind, id, payload) in [
        (FrameKind::Reply, 99, &b"{}"[..]),
        (FrameKind::End, 0, b""),
        (FrameKind::Request, 1, b"{}"),
        (FrameKind::Failed, 0, b"nonsense"),
    ] {
        let transport = PipeTransport::new(move |mut input, mut output| {
            output.write_all(wire::Banner::ours().line(Role::Agent).as_bytes()).unwrap();
            wire::write_frame(&mut output, Head { kind, more: false, id }, &[], payload).unwrap();
            let mut rest = Vec::new();
            while input.read_to_end(&mut rest).is_err() {}
            Ok(())
        });
        let error = match AgentClient::connect_with(&transport, quick_client()) {
            Ok(client) => Arc::new(client).open(&uuid()).unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.kind(), Kind::Protocol, "{kind:?}: {error}");
    }
}

// ---- hostile input

/// Counts what each thread holds, so that "bounded" can be measured.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    // Gone while a thread ends; nobody measures then.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches two plain cells.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// splitmix64: a seed is the whole state.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn random_input_never_panics_and_never_costs_memory() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    println!("SEED={seed}");
    let mut random = seed;
    let banner_len = wire::Banner::ours().line(Role::Client).len();
    for round in 0..1000 {
        let mut input = spoken();
        match next(&mut random) % 4 {
            // Changed bytes, most of them behind the banner.
            0 => {
                for _ in 0..=next(&mut random) % 4 {
                    let at = banner_len + next(&mut random) as usize % (input.len() - banner_len);
                    input[at] = next(&mut random) as u8;
                }
            }
            // A stretch lost or said twice.
            1 => {
                let at = next(&mut random) as usize % input.len();
                let length = (next(&mut random) as usize % 64).min(input.len() - at);
                match next(&mut random) % 2 {
                    0 => drop(input.drain(at..at + length)),
                    _ => {
                        let again = input[at..at + length].to_vec();
                        input.splice(at..at, again);
                    }
                }
            }
            // Well-formed frames with anything inside.
            2 => {
                input.truncate(banner_len);
                for _ in 0..20 {
                    let kinds = [1u8, 2, 3, 4, 5, 0x10, 0x81, 0x83, 0x87, 0x99];
                    let length = next(&mut random) as usize % 300;
                    input.extend_from_slice(&(length as u32).to_le_bytes());
                    input.extend_from_slice(&[kinds[next(&mut random) as usize % kinds.len()], 0, 0, 0]);
                    input.extend_from_slice(&(next(&mut random) % 4).to_le_bytes());
                    input.extend((0..length).map(|_| next(&mut random) as u8));
                }
            }
            // Noise from the first byte.
            _ => input = (0..next(&mut random) % 2000).map(|_| next(&mut random) as u8).collect(),
        }
        let opener = FakeOpener(Arc::default());
        let before = HELD.with(Cell::get);
        PEAK.with(|peak| peak.set(before));
        // No goodbye, or a broken one; either way it returns.
        let _ = serve(&input[..], std::io::sink(), &opener, quick_serve());
        let cost = PEAK.with(Cell::get) - before;
        assert!(cost < 2 << 20, "SEED={seed}, round {round}: {cost} bytes");
    }
}

/// JSON costs more than its text once parsed; the request's limit must hold for the worst of it.
#[test]
fn the_largest_request_is_parsed_in_bounded_memory() {
    let wide = format!("{{\"find\":{{\"name\":\"{}\"}}}}", "x".repeat(wire::REQUEST_MAX - 40));
    let deep = "[".repeat(wire::REQUEST_MAX);
    let disks = r#"{"name":"a","size":1,"fresh":true,"reserve_bytes":1},"#.repeat(4000);
    let many = format!(
        "{{\"begin\":{{\"replica\":0,\"request\":{{\"uuid\":\"{UUID}\",\"name\":\"a\",\"run\":\"0000000000000000\",\
         \"generation\":1,\"expected_head\":null,\"disks\":[{}]}}}}}}",
        disks.trim_end_matches(',')
    );
    let blocks =
        format!("{{\"pieces\":{{\"replica\":0,\"disk\":\"a\",\"blocks\":[{}]}}}}", vec!["1"; 120_000].join(","));
    for payload in [wide, deep, many, blocks] {
        let mut input = wire::Banner::ours().line(Role::Client).into_bytes();
        let head = Head { kind: FrameKind::Request, more: false, id: 1 };
        wire::write_frame(&mut input, head, &[], payload.as_bytes()).unwrap();
        let before = HELD.with(Cell::get);
        PEAK.with(|peak| peak.set(before));
        let _ = serve(&input[..], std::io::sink(), &FakeOpener(Arc::default()), quick_serve());
        let cost = PEAK.with(Cell::get) - before;
        assert!(cost < 2 << 20, "{cost} bytes for {}...", &payload[..30]);
        // The meter works: the text itself was held.
        assert!(cost > 100 << 10, "{cost} bytes for {}...", &payload[..30]);
    }
}

/// A scrub reads while it is asked to, and ends with its replica.
#[test]
fn a_shortening_goes_step_by_step_where_there_is_one() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let mut shorten = replica.shorten().unwrap().expect("the chain is deep");
    let start = ShortenStart { point: point(4).id, disks: vec![disk("vdb")], bytes_total: 20 };
    assert_eq!(shorten.start(), start);
    assert_eq!(shorten.step(10).unwrap(), ShortenStep { bytes_done: 10, end: false });
    assert_eq!(shorten.step(10).unwrap(), ShortenStep { bytes_done: 20, end: true });
    shorten.close().unwrap();
    assert_eq!(fake.streams.load(Ordering::SeqCst), 0);
    assert!(replica.shorten().unwrap().is_none());
    drop(replica);
    client.close().unwrap();
}

#[test]
fn a_scrub_goes_step_by_step_and_ends_with_its_replica() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    assert_eq!(replica.holds().unwrap().scrub.damage, [rotten()]);
    let mut scrub = replica.scrub(true).unwrap();
    assert_eq!(scrub.start(), ScrubStart { resumed: true, bytes_done: 5, bytes_total: 35 });
    assert_eq!(scrub.step(10).unwrap(), ScrubStep { bytes_read: 10, bytes_done: 15, found: vec![], end: false });
    // Other requests come in between.
    assert_eq!(replica.holds().unwrap().min_age_s, 7);
    scrub.step(10).unwrap();
    assert_eq!(scrub.step(10).unwrap(), ScrubStep { bytes_read: 10, bytes_done: 35, found: vec![rotten()], end: true });
    scrub.close().unwrap();
    assert_eq!(
        (fake.streams.load(Ordering::SeqCst), fake.asked.lock().unwrap().as_slice()),
        (0, &["scrub true".to_owned()][..])
    );
    let left = replica.scrub(false).unwrap();
    assert_eq!(fake.streams.load(Ordering::SeqCst), 1);
    drop((left, replica));
    eventually("it ends with the replica", || fake.streams.load(Ordering::SeqCst) == 0);
    client.close().unwrap();
}
