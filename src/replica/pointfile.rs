//! A whole recovery point in one stream: all disks of one instant as patches, and what else the point has. A store is
//! fed from it where the network is too thin for a first copy, or where there is none.
//!
//! Invariants
//! - It leads on from a point whose disks have the roots that it names, or from nothing, and to nothing else is it
//!   applied.
//! - The point exists when all of the stream has come and its checksum is right: patches and attachments go into an
//!   open point, and the seal comes last.
//! - Applied again it changes nothing.
//! - Every length is bounded before anything is allocated.
//!
//! Format: docs/formats/point.md.

use super::left_out::LeftOut;
use super::manifest::DISKS_MAX;
use super::upkeep::{PatchStream, Upkeep};
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::block::layout::Banner;
use crate::engine::stats::{DiskStats, Mode};
use crate::error::advice::{self, Advice};
use crate::error::{Error, Kind, Result, printable};
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use crate::replica::{
    ATTACHMENT_MAX, Attachment, BeginDisk, BeginPoint, Consistency, PointDisk, PointView, Replica, ReplicaView,
    SealDisk, SealPoint,
};
use crate::words;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::io::{BufReader, Read, Write};

const BANNER: Banner = Banner { what: "point", version: 1 };

/// Longest second line.
const HEAD_MAX: usize = 256 << 10;

/// Longest piece of a section.
const PIECE_MAX: usize = 1 << 20;

/// Longest reason that is carried on.
const REASON_MAX: usize = 200;

/// What a stream says of its point before the point comes. Fields are added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Carried {
    /// UUID of the domain that the point belongs to.
    pub uuid: DomainUuid,
    /// Name of the domain, as the replica had it that the stream was read from.
    pub name: DomainName,
    /// Generation that the point's source had when it made the point.
    pub generation: Generation,
    /// What the point is called where it was read.
    pub point: PointId,
    /// Id of the run that made the point. With `frozen_at` and the roots it tells whether a replica has the point.
    pub run: RunId,
    /// When the source's disks stood still, by the source's clock.
    pub frozen_at: Timestamp,
    /// What the point promises of the guest's file systems.
    pub consistency: Consistency,
    /// Why the consistency is no better, or how a domain that is off came to be so. `None`: nothing to add.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency_reason: Option<String>,
    /// Whether the domain started with its host. Absent: made by a program that did not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
    /// What has written the state of the TPM. Absent: there is none, or its maker did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm_programs: Option<super::TpmPrograms>,
    /// What it leads on from; absent: from nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Since>,
    /// In the order of their patches.
    pub disks: Vec<CarriedDisk>,
    /// In their order.
    #[serde(default)]
    pub attachments: Vec<Attachment>,
    /// Disks of the domain that are not in the point.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
}

/// A point that a stream leads on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Since {
    /// What it is called where it was read; it may be called otherwise elsewhere, and is known by its disks.
    pub point: PointId,
    /// Disks of that point. The stream applies only to a head with exactly these disks, sizes and roots.
    pub disks: Vec<CarriedDisk>,
}

/// A disk of a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CarriedDisk {
    /// Name of the disk as the domain has it.
    pub name: DiskName,
    /// Virtual size of the disk in bytes.
    pub size: DiskSize,
    /// Root of the digest tree over the whole disk at this point.
    pub root: Digest,
}

impl From<&PointDisk> for CarriedDisk {
    fn from(disk: &PointDisk) -> Self {
        CarriedDisk { name: disk.name.clone(), size: disk.size, root: disk.root }
    }
}

fn carried(point: &PointView) -> Vec<CarriedDisk> {
    point.disks.iter().map(CarriedDisk::from).collect()
}

impl Carried {
    fn new(uuid: &DomainUuid, name: &DomainName, point: &PointView, since: Option<&PointView>) -> Carried {
        Carried {
            uuid: uuid.clone(),
            name: name.clone(),
            generation: point.generation,
            point: point.id.clone(),
            run: point.run.clone(),
            frozen_at: point.frozen_at,
            consistency: point.consistency,
            consistency_reason: point.consistency_reason.clone(),
            autostart: point.autostart,
            tpm_programs: point.tpm_programs.clone(),
            since: since.map(|since| Since { point: since.id.clone(), disks: carried(since) }),
            disks: carried(point),
            attachments: point.attachments.clone(),
            left_out: point.left_out.clone(),
        }
    }

    /// Whether the disk's patch starts from the point below.
    fn leads_on(&self, disk: &DiskName) -> bool {
        self.since.as_ref().is_some_and(|since| since.disks.iter().any(|d| d.name == *disk))
    }

    fn is(&self, point: &PointView) -> bool {
        point.run == self.run && point.frozen_at == self.frozen_at && carried(point) == self.disks
    }
}

/// What was written. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// Description of the point in the stream. In JSON its fields stand at the top level.
    #[serde(flatten)]
    pub carried: Carried,
    /// Of the stream.
    pub bytes: u64,
}

/// Writes the point (the head: `None`) of a replica as a stream, from `since` on or from nothing. `progress` gets the
/// bytes written so far. Blocks; not durable by itself.
pub fn write<R: Replica + Upkeep + ?Sized>(
    replica: &R,
    (uuid, name): (&DomainUuid, &DomainName),
    (since, point): (Option<&PointId>, Option<&PointId>),
    out: impl Write,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Written> {
    let view = replica.describe()?;
    let find = |id: &PointId| view.points.iter().find(|p| p.id == *id).ok_or_else(|| no_such(Some(id)));
    let point = match point {
        Some(id) => find(id)?,
        None => view.head().ok_or_else(|| no_such(None))?,
    };
    let head = Carried::new(uuid, name, point, since.map(find).transpose()?);
    let mut out = Sections { out, checksum: blake3::Hasher::new(), bytes: 0 };
    out.put(BANNER.line().as_bytes())?;
    let line = serde_json::to_string(&head).expect("names and numbers") + "\n";
    if line.len() > HEAD_MAX {
        return Err(Error::new(Kind::Usage, "the point has too many disks for one stream").point(&point.id));
    }
    out.put(line.as_bytes())?;
    for disk in &head.disks {
        let stream = match &head.since {
            Some(since) if head.leads_on(&disk.name) => replica.changes(&since.point, &point.id, &disk.name)?,
            _ => replica.export(&point.id, &disk.name)?,
        };
        out.section(stream, progress).map_err(|e| e.disk(&disk.name))?;
    }
    for name in &head.attachments {
        out.section(replica.attachment(&point.id, *name)?, progress)?;
    }
    let bytes = out.end()?;
    Ok(Written { carried: head, bytes })
}

fn no_such(id: Option<&PointId>) -> Error {
    let e = Error::new(Kind::NotFound, "the target has no such point");
    id.into_iter().fold(e, |e, id| e.point(id)).advise(advice::Store::ListPoints { root: None })
}

/// The writing end: everything goes into the checksum.
struct Sections<W> {
    out: W,
    checksum: blake3::Hasher,
    bytes: u64,
}

impl<W: Write> Sections<W> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.checksum.update(bytes);
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|e| Error::from_io("cannot write the point", e))
    }

    fn section(&mut self, mut stream: Box<dyn PatchStream>, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        let copied = (|| {
            loop {
                let chunk = stream.next_chunk()?;
                for piece in chunk.chunks(PIECE_MAX) {
                    self.put(&(piece.len() as u32).to_le_bytes())?;
                    self.put(piece)?;
                }
                progress(self.bytes)?;
                if chunk.is_empty() {
                    return self.put(&0u32.to_le_bytes());
                }
            }
        })();
        if let Err(e) = stream.close() {
            tracing::debug!("a stream did not end in order: {}", e.chain());
        }
        copied
    }

    fn end(mut self) -> Result<u64> {
        let checksum = *self.checksum.finalize().as_bytes();
        self.put(&checksum)?;
        self.out.flush().map_err(|e| Error::from_io("cannot write the point", e))?;
        Ok(self.bytes)
    }
}

/// The reading end.
struct Reading<R> {
    input: R,
    checksum: blake3::Hasher,
    piece: Vec<u8>,
    bytes: u64,
}

impl<R: Read> Reading<R> {
    fn new(input: R) -> Self {
        Reading { input, checksum: blake3::Hasher::new(), piece: Vec::new(), bytes: 0 }
    }

    fn take(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.input.read_exact(buffer).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => corrupt("the stream ends before the point does"),
            _ => Error::from_io("cannot read the point", e),
        })?;
        self.checksum.update(buffer);
        self.bytes += buffer.len() as u64;
        Ok(())
    }

    /// A line without its newline; an error that `long` gives if it has more than `max` bytes.
    fn line(&mut self, max: usize, long: impl FnOnce() -> Error) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            self.take(&mut byte)?;
            match byte {
                [b'\n'] => return Ok(line),
                _ if line.len() == max => return Err(long()),
                [byte] => line.push(byte),
            }
        }
    }

    fn head(&mut self) -> Result<Carried> {
        let banner = self.line(Banner::LEN_MAX, || BANNER.not_this())?;
        BANNER.check(&[&banner[..], b"\n"].concat())?;
        let line = self.line(HEAD_MAX, || corrupt("this is no point in a stream"))?;
        // A file with a point is bounded as a message is.
        let line = words::of_message(&line).map_err(corrupt)?;
        let head: Carried =
            serde_json::from_slice(&line).map_err(|e| corrupt("the stream does not say what it carries").source(e))?;
        let mut names: Vec<Attachment> = head.attachments.clone();
        names.sort();
        names.dedup();
        let since = head.since.as_ref().map_or(0, |since| since.disks.len());
        match head.disks.len() > DISKS_MAX || since > DISKS_MAX || names.len() != head.attachments.len() {
            true => Err(corrupt("the stream says that it carries more than a point has")),
            false => Ok(head),
        }
    }

    /// The next piece of a section; empty at its end.
    fn piece(&mut self) -> Result<&[u8]> {
        let mut len = [0; 4];
        self.take(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > PIECE_MAX {
            return Err(corrupt("the stream has a piece of more than 1 MiB"));
        }
        let mut piece = std::mem::take(&mut self.piece);
        piece.resize(len, 0);
        let taken = self.take(&mut piece);
        self.piece = piece;
        taken.map(|()| self.piece.as_slice())
    }

    /// The checksum is right, and nothing follows.
    fn end(&mut self) -> Result<()> {
        let expected = *self.checksum.finalize().as_bytes();
        let mut found = [0; 32];
        self.take(&mut found)?;
        if found != expected {
            return Err(corrupt("the checksum of the stream is not that of its content"));
        }
        match self.input.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(corrupt("something follows the point")),
            Err(e) => Err(Error::from_io("cannot read the point", e)),
        }
    }
}

/// A part of a stream that is looked at.
pub enum Part<'a> {
    /// Always the first.
    Head(&'a Carried),
    /// The section of this disk, or of this attachment, begins at this byte of the stream.
    Disk(&'a CarriedDisk, u64),
    /// An attachment of the point, and its length in bytes.
    Attachment(Attachment, u64),
    /// Bytes of the section that is open.
    Bytes(&'a [u8]),
    /// The checksum is right, and nothing follows.
    End(u64),
}

/// Whether a file that begins so is a point in a stream, of whatever version.
pub fn is_one(beginning: &[u8]) -> bool {
    beginning.starts_with(format!("virt-replica {} ", BANNER.what).as_bytes())
}

/// Reads a stream and tells its parts, in order and in pieces of at most 1 MiB. What was told before an error is what
/// the stream had; whether it is right is known at the end alone. An error names the byte behind what was read.
pub fn look(input: impl Read, told: &mut dyn FnMut(Part) -> Result<()>) -> Result<()> {
    let mut reading = Reading::new(BufReader::new(input));
    let looked = look_on(&mut reading, told);
    looked.map_err(|e| e.offset(reading.bytes))
}

fn look_on<R: Read>(reading: &mut Reading<R>, told: &mut dyn FnMut(Part) -> Result<()>) -> Result<()> {
    let head = reading.head()?;
    told(Part::Head(&head))?;
    let disks = head.disks.iter().map(|disk| (Some(disk), None));
    for (disk, attachment) in disks.chain(head.attachments.iter().map(|name| (None, Some(*name)))) {
        let at = reading.bytes;
        disk.map_or(Ok(()), |disk| told(Part::Disk(disk, at)))?;
        attachment.map_or(Ok(()), |name| told(Part::Attachment(name, at)))?;
        loop {
            match reading.piece()? {
                [] => break,
                piece => told(Part::Bytes(piece))?,
            }
        }
    }
    reading.end()?;
    told(Part::End(reading.bytes))
}

fn corrupt(what: &'static str) -> Error {
    Error::new(Kind::Corrupt, what).advise(advice::Store::WritePointAnew)
}

/// What applying did. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct Brought {
    /// The replica had the point; nothing was done.
    pub already: bool,
    /// Description of the point in the stream. In JSON its fields stand at the top level.
    #[serde(flatten)]
    pub carried: Carried,
    /// What the point is called here.
    pub point_here: PointId,
    /// Of the stream.
    pub bytes: u64,
    /// Bytes of guest data that were written to the images here; 0 if the replica had the point already.
    pub bytes_written: u64,
}

/// Makes a new point of a stream, in the replica that `open` gives. `Conflict` if the replica's head is not what the
/// stream leads on from. `progress` gets the bytes read so far; an error of it ends the work, and no point comes to be.
/// Blocks; durable when it returns.
pub fn apply<R: Replica>(
    input: impl Read,
    open: impl FnOnce(&Carried) -> Result<R>,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Brought> {
    let mut stream = Reading::new(BufReader::with_capacity(PIECE_MAX, input));
    let head = stream.head()?;
    let replica = open(&head)?;
    let expected_head = match decide(&head, &replica.describe()?)? {
        Step::Already(point_here) => {
            for _ in 0..head.disks.len() + head.attachments.len() {
                while !stream.piece()?.is_empty() {}
            }
            stream.end()?;
            let bytes = stream.bytes;
            return Ok(Brought { already: true, carried: head, point_here, bytes, bytes_written: 0 });
        }
        Step::On(expected_head) => expected_head,
    };
    replica.begin(&begin(&head, expected_head))?;
    let sealed = fill(&mut stream, &head, &replica, progress);
    let (point, bytes_written) = sealed.inspect_err(|_| {
        if let Err(e) = replica.abandon() {
            tracing::debug!("what had come was left behind: {}", e.chain());
        }
    })?;
    let bytes = stream.bytes;
    Ok(Brought { already: false, carried: head, point_here: point.id, bytes, bytes_written })
}

enum Step {
    Already(PointId),
    /// Build on this head.
    On(Option<PointId>),
}

/// What the stream means to a replica as it is.
fn decide(head: &Carried, view: &ReplicaView) -> Result<Step> {
    if let Some(point) = view.points.iter().rev().find(|point| head.is(point)) {
        return Ok(Step::Already(point.id.clone()));
    }
    let found = view.head();
    let fits = match (&head.since, found) {
        (None, None) => true,
        (Some(since), Some(found)) => since.disks == carried(found),
        _ => false,
    };
    if fits {
        return Ok(Step::On(found.map(|point| point.id.clone())));
    }
    let name = |point: Option<(&PointId, &[CarriedDisk])>| match point {
        None => "nothing".to_owned(),
        Some((id, disks)) => {
            let roots: Vec<String> = disks.iter().map(|d| format!("{} has root {}", d.name, d.root)).collect();
            format!("point {id} ({})", roots.join(", "))
        }
    };
    let wanted = name(head.since.as_ref().map(|since| (&since.point, since.disks.as_slice())));
    let disks = found.map(carried).unwrap_or_default();
    let found = name(found.map(|point| (&point.id, disks.as_slice())));
    let what = format!("point {} leads on from {wanted}, and the newest point here is {found}", head.point);
    Err(Error::new(Kind::Conflict, what).domain(&head.name).advise(match head.since.is_some() {
        true => Advice::from(advice::Store::BringPointsBetween),
        false => "a point that starts from nothing is for a replica without points".into(),
    }))
}

fn begin(head: &Carried, expected_head: Option<PointId>) -> BeginPoint {
    let disk = |disk: &CarriedDisk| BeginDisk {
        name: disk.name.clone(),
        size: disk.size,
        fresh: !head.leads_on(&disk.name),
        // How much comes is not known before it has come.
        reserve_bytes: 0,
        resume: false,
        repair: false,
    };
    BeginPoint {
        uuid: head.uuid.clone(),
        name: head.name.clone(),
        run: head.run.clone(),
        generation: head.generation,
        expected_head,
        disks: head.disks.iter().map(disk).collect(),
    }
}

fn fill(
    stream: &mut Reading<impl Read>,
    head: &Carried,
    replica: &impl Replica,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<(PointView, u64)> {
    let mut disks = Vec::new();
    for disk in &head.disks {
        let before = stream.bytes;
        loop {
            let piece = stream.piece()?;
            if piece.is_empty() {
                break;
            }
            replica.apply(&disk.name, piece)?;
            progress(stream.bytes)?;
        }
        let applied = replica.finish_disk(&disk.name)?;
        if applied.root != disk.root {
            let what = format!("the patch leads to root {}, and the point has {}", applied.root, disk.root);
            return Err(Error::new(Kind::Corrupt, what).disk(&disk.name));
        }
        let (mode, reason) = match head.leads_on(&disk.name) {
            true => (Mode::Digest, "brought in a file, from the point before on"),
            false => (Mode::Full, "brought in a file, from nothing"),
        };
        let stats = DiskStats {
            mode,
            reason: reason.to_owned(),
            bytes_sent: stream.bytes - before,
            bytes_written: applied.bytes_written,
            blocks_changed: applied.blocks_changed,
            ..DiskStats::default()
        };
        disks.push(SealDisk { name: disk.name.clone(), root: applied.root, stats });
    }
    for name in &head.attachments {
        let mut content = Vec::new();
        loop {
            let piece = stream.piece()?;
            if piece.is_empty() {
                break;
            }
            if content.len() + piece.len() > ATTACHMENT_MAX {
                return Err(corrupt("the stream has an attachment that is larger than any"));
            }
            content.extend_from_slice(piece);
        }
        replica.attach(*name, &content)?;
    }
    stream.end()?;
    let bytes_written = disks.iter().map(|d| d.stats.bytes_written).sum();
    let request = SealPoint {
        frozen_at: head.frozen_at,
        consistency: head.consistency,
        consistency_reason: head.consistency_reason.as_ref().map(|reason| printable(reason, REASON_MAX)),
        autostart: head.autostart,
        tpm_programs: head.tpm_programs.clone(),
        disks,
        left_out: head.left_out.clone(),
    };
    Ok((replica.seal(&request)?, bytes_written))
}
