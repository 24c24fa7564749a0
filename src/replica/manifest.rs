//! The manifest of a replica, and every file name inside a replica's directory. Pure: bytes and ids in, values out.
//!
//! Owns the layout: no other file of the store spells a name, and every name is made from checked ids, so that a peer
//! names nothing (I21). Paths are derived, never stored: a manifest cannot point outside its directory.
//!
//! A removed point whose images the point above still reads through is a *link*: it does not exist as a point, and its
//! files stay until they are folded into the point above (`fold.rs`).
//!
//! A disk of a point may be *detaching*: an image that stands alone is taking the place of its own (`shorten.rs`), and
//! what lies below may be passed by already.
//!
//! Invariants, checked by [`Manifest::parse`] and kept by every method
//! - points ascend by sequence, ids are unique, links included;
//! - a disk's backing image is that of the point or link just below, which has that disk;
//! - no point is of a younger generation than the manifest;
//! - the head is a point, and so is what was promoted.
//!
//! A reader ignores fields it does not know and refuses a version it does not know.
//! Format: docs/formats/replica.md.

pub use super::file_names::*;
use super::left_out::LeftOut;
use super::source::Owner;
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::engine::stats::DiskStats;
use crate::error::{Error, Kind, Result, advice};
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use crate::replica::{Attachment, Consistency, PointDisk, PointView, Promoted};
use crate::words;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// First field of every manifest, so that `head -2` tells what the file is.
const FORMAT: &str = "virt-replica manifest";

/// The version this program writes where it can. 1: the first.
pub const VERSION: u32 = 1;

/// The version of a manifest with links. A program that does not know them would take their files for remains of an
/// unsealed point, and remove them.
const VERSION_WITH_LINKS: u32 = 2;

/// The version of a manifest with a disk that is detaching. A program that does not know of it would take the image for
/// damaged.
const VERSION_DETACHING: u32 = 3;

/// The version of a manifest with a promotion. A program that does not know of it would accept runs of the old source.
const VERSION_PROMOTED: u32 = 4;

/// The version of a manifest with attachments that the first ones had not, and the newest this program reads. A program
/// that does not know of the state of a TPM would bring the domain up with an empty one.
const VERSION_MORE_ATTACHED: u32 = 5;

/// Largest manifest read or written, in bytes: tens of thousands of points.
pub const MANIFEST_MAX: usize = 64 << 20;

/// A source may fill so much of it, by seals and by pins. The rest is for the records of recovery, which this host
/// writes itself: a promotion, an operator's pin.
pub const SOURCE_MAX: usize = MANIFEST_MAX - (1 << 20);

/// Largest disk in bytes.
pub const DISK_SIZE_MAX: u64 = DiskSize::MAX.0;

/// Most bytes of all disks of one point (4 PiB). An open point keeps a table of 16 MiB in memory for each PiB.
pub const POINT_SIZE_MAX: u64 = 1 << 52;

/// Most disks of one point.
pub const DISKS_MAX: usize = 256;

/// The manifest of one replica: its points, its links, and who may write to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    format: String,
    version: u32,
    /// UUID of the domain; also the name of the replica's directory.
    pub uuid: DomainUuid,
    /// Name of the domain, as its source gave it.
    pub name: DomainName,
    /// Generation of the replica. A source of a lower generation is refused; no point has a higher one.
    pub generation: Generation,
    /// Oldest first.
    points: Vec<Point>,
    /// Removed points that are still read through, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    links: Vec<Point>,
    /// The domain was brought up on this host: no run is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promotion: Option<Promoted>,
    /// The source of the newest point. Absent: it did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
}

/// A sealed point as the manifest records it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Id of the point; it is also the name of the point's directory.
    pub id: PointId,
    /// Generation that the source had when it made the point.
    pub generation: Generation,
    /// When the source's disks stood still, by the source's clock.
    pub frozen_at: Timestamp,
    /// When the point began to exist, by the target's clock.
    pub sealed_at: Timestamp,
    /// What the point promises of the guest's file systems.
    pub consistency: Consistency,
    /// Why the consistency is no better, or how a domain that is off came to be so. `None`: nothing to add.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "words::maybe_sentence")]
    pub consistency_reason: Option<String>,
    /// Whether the domain started with its host. Absent: made by a program that did not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
    /// What has written the state of the TPM. Absent: there is none, or its maker did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm_programs: Option<super::TpmPrograms>,
    /// Id of the run that made the point.
    pub run: RunId,
    /// Disks of the point, from 1 to 256, each name once.
    pub disks: Vec<Disk>,
    /// Files that the point has beside its disks, each kind at most once.
    #[serde(default)]
    pub attachments: Vec<Attached>,
    /// Disks of the domain that are not in the point.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
    /// Not to be removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<Pinned>,
    /// When it was sealed, in seconds of the replica's own clock ([`super::age`]). Absent: made by a program without
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed_clock_s: Option<u64>,
}

/// That a point is not to be removed, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pinned {
    /// When the point was pinned, by the target's clock.
    pub since: Timestamp,
    /// An operator's words; may be empty.
    #[serde(deserialize_with = "words::sentence")]
    pub reason: String,
    /// This host pinned it: no source unpins it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_target: bool,
}

/// One disk of a point as the manifest records it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// Name of the disk as the domain has it, for example `vda`.
    pub name: DiskName,
    /// Virtual size of the disk in bytes, when the point was frozen.
    pub size: DiskSize,
    /// Root of the digest tree over the whole disk; it binds the size.
    pub root: Digest,
    /// The point whose image of this disk lies below this one; absent: this image stands alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<PointId>,
    /// The image and the list are being replaced by some that stand alone: `backing` holds for those that are not yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detaching: bool,
    /// How the run read and sent the disk. In JSON its fields stand beside those of the disk.
    #[serde(flatten)]
    pub stats: DiskStats,
}

/// A file beside the disks, with what it takes to see that it is still what it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    /// Kind of the file. Its file name follows from it.
    pub name: Attachment,
    /// Length of the file in bytes.
    pub size_bytes: u64,
    /// Plain BLAKE3 of the content, as `b3sum` prints it.
    pub blake3: Digest,
}

/// Read before anything else, so that a future version is refused for its number and not for its fields.
#[derive(Deserialize)]
struct Preamble {
    format: String,
    version: u32,
}

impl Manifest {
    /// Of a domain that has no point yet. Exists in memory only: a manifest is first written by the first seal.
    pub fn new(uuid: DomainUuid, name: DomainName, generation: Generation) -> Self {
        let (points, links) = (Vec::new(), Vec::new());
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            uuid,
            name,
            generation,
            points,
            links,
            promotion: None,
            owner: None,
        }
    }

    /// Reads and checks a manifest. [`Kind::Protocol`] for another program's version, [`Kind::Corrupt`] for the rest.
    pub fn parse(json: &[u8]) -> Result<Self> {
        Self::parse_sound(json).map_err(|e| explain(json, e))
    }

    /// The same, without advice.
    pub(super) fn parse_sound(json: &[u8]) -> Result<Self> {
        if json.len() > MANIFEST_MAX {
            return Err(corrupt(format!("the manifest is larger than {MANIFEST_MAX} bytes")));
        }
        let not_json = |e| corrupt("the manifest cannot be read").source(e);
        // The words in it are a source's.
        let json = &words::of_document(json)[..];
        let preamble: Preamble = serde_json::from_slice(json).map_err(not_json)?;
        if preamble.format != FORMAT {
            return Err(corrupt(format!("this is not a {FORMAT}")));
        }
        if !(VERSION..=VERSION_MORE_ATTACHED).contains(&preamble.version) {
            return Err(Error::new(
                Kind::Protocol,
                format!(
                    "the manifest has version {}, this program reads versions {VERSION} to {VERSION_MORE_ATTACHED}",
                    preamble.version
                ),
            )
            .hint("use the version of virt-replica that wrote the replica, or a newer one"));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(not_json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The document as written. Indented: somebody may have to read it on a bad day.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let any = |is: fn(&Point) -> bool| self.points.iter().chain(&self.links).any(is);
        let version = match (&self.promotion, self.links.is_empty()) {
            _ if any(Point::has_more_attached) => VERSION_MORE_ATTACHED,
            (Some(_), _) => VERSION_PROMOTED,
            (None, _) if any(Point::is_detaching) => VERSION_DETACHING,
            (None, false) => VERSION_WITH_LINKS,
            (None, true) => VERSION,
        };
        let document = Self { version, ..self.clone() };
        let mut json =
            serde_json::to_vec_pretty(&document).map_err(|e| corrupt("cannot write the manifest").source(e))?;
        json.push(b'\n');
        match json.len() <= MANIFEST_MAX {
            true => Ok(json),
            false => Err(no_room()),
        }
    }

    /// Oldest first.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// Gives the newest point. `None`: the replica has no point.
    pub fn head(&self) -> Option<&Point> {
        self.points.last()
    }

    /// Finds a point by its id. `None`: there is no such point, or it is only a link.
    pub fn point(&self, id: &PointId) -> Option<&Point> {
        self.points.iter().find(|p| &p.id == id)
    }

    /// Finds a point by its id, to change it. `None`: there is no such point, or it is only a link.
    pub fn point_mut(&mut self, id: &PointId) -> Option<&mut Point> {
        self.points.iter_mut().find(|p| &p.id == id)
    }

    /// Removed points that are still read through, oldest first.
    pub fn links(&self) -> &[Point] {
        &self.links
    }

    /// Says whether a removed point of this id is still kept as a link.
    pub fn is_link(&self, id: &PointId) -> bool {
        self.links.iter().any(|p| &p.id == id)
    }

    /// The point or link of this id: whose directory holds files that somebody needs.
    pub fn named(&self, id: &PointId) -> Option<&Point> {
        self.point(id).or_else(|| self.links.iter().find(|p| &p.id == id))
    }

    /// Points and links, oldest first.
    pub fn all(&self) -> Vec<&Point> {
        let mut all: Vec<&Point> = self.points.iter().chain(&self.links).collect();
        all.sort_by_key(|p| p.id.seq());
        all
    }

    /// The head's record of a disk, if it has it.
    pub fn head_disk(&self, disk: &DiskName) -> Option<&Disk> {
        self.head()?.disk(disk)
    }

    /// Adds the new head. The generation rises to the point's.
    pub fn push(&mut self, point: Point) -> Result<()> {
        self.generation = self.generation.max(point.generation);
        self.points.push(point);
        self.check()
    }

    /// Makes links of these points: from now on they do not exist. [`Kind::Refused`] for the head, [`Kind::NotFound`]
    /// for what is no point; then nothing was changed.
    pub fn remove(&mut self, ids: &[PointId]) -> Result<()> {
        for id in ids {
            if self.point(id).is_none() {
                return Err(Error::new(Kind::NotFound, "the replica has no such point").point(id));
            }
            if self.head().is_some_and(|head| head.id == *id) {
                return Err(Error::new(Kind::Refused, "the newest point is never removed").point(id));
            }
            if self.promotion.as_ref().is_some_and(|p| p.point == *id) {
                return Err(Error::new(Kind::Refused, "the domain runs here from this point").point(id));
            }
        }
        let gone = self.points.extract_if(.., |p| ids.contains(&p.id));
        self.links.extend(gone);
        self.links.sort_by_key(|p| p.id.seq());
        self.check()
    }

    /// Each unbroken row of links, with the point above it: (point, links uppermost first).
    pub fn rows(&self) -> Vec<(&Point, Vec<&Point>)> {
        let mut rows = Vec::new();
        let mut row: Vec<&Point> = Vec::new();
        for point in self.all() {
            if self.is_link(&point.id) {
                row.insert(0, point);
            } else if !row.is_empty() {
                rows.push((point, std::mem::take(&mut row)));
            }
        }
        rows
    }

    /// Takes note that the row of links below `above` was folded into it: nobody reads through them any more.
    pub fn folded(&mut self, above: &PointId) -> Result<()> {
        let row = self.rows().into_iter().find(|(point, _)| &point.id == above);
        let gone: Vec<PointId> = row.map(|(_, links)| links.iter().map(|l| l.id.clone()).collect()).unwrap_or_default();
        let below = |disk: &Disk| -> Option<PointId> {
            let chain = disk.backing.as_ref().map(|id| self.chain(id, &disk.name)).transpose().ok()??;
            chain.into_iter().map(|p| &p.id).find(|id| !gone.contains(id)).cloned()
        };
        let point = self.point(above).ok_or_else(|| corrupt("links without a point above them"))?;
        let backing: Vec<Option<PointId>> = point.disks.iter().map(below).collect();
        let point = self.point_mut(above).expect("it was there a line above");
        for (disk, backing) in point.disks.iter_mut().zip(backing) {
            disk.detaching &= backing.is_some();
            disk.backing = backing;
        }
        self.links.retain(|l| !gone.contains(&l.id));
        self.check()
    }

    /// Takes note that these disks of a point are about to get images that stand alone.
    pub fn detach(&mut self, point: &PointId, disks: &[DiskName]) -> Result<()> {
        let record = self.point_mut(point).ok_or_else(|| corrupt("only a point gets images that stand alone"))?;
        record.disks.iter_mut().filter(|d| disks.contains(&d.name)).for_each(|d| d.detaching = true);
        self.check()
    }

    /// Takes note that they have them: nothing lies below them any more.
    pub fn detached(&mut self, point: &PointId) -> Result<()> {
        let all = self.points.iter_mut().chain(&mut self.links);
        for disk in all.filter(|p| p.id == *point).flat_map(|p| &mut p.disks).filter(|d| d.detaching) {
            (disk.detaching, disk.backing) = (false, None);
        }
        self.check()
    }

    /// Sequence of the next point.
    pub fn next_seq(&self) -> u64 {
        self.head().map_or(1, |p| p.id.seq() + 1)
    }

    /// The points and links that a disk at `point` is recorded to consist of, the point itself first, the base last.
    /// Never empty. Some of the links may be folded already: `chain.rs` knows.
    pub fn chain(&self, point: &PointId, disk: &DiskName) -> Result<Vec<&Point>> {
        let mut chain = Vec::new();
        let mut next = Some(point);
        while let Some(id) = next {
            let link = self.named(id).and_then(|p| Some((p, p.disk(disk)?)));
            let (point, record) = link.ok_or_else(|| {
                Error::new(Kind::NotFound, "the replica has no such disk in this point").disk(disk).point(id)
            })?;
            chain.push(point);
            next = record.backing.as_ref();
        }
        Ok(chain)
    }

    fn check(&self) -> Result<()> {
        let ascend = |points: &[Point]| points.is_sorted_by(|a, b| a.id.seq() < b.id.seq());
        if !ascend(&self.points) || !ascend(&self.links) {
            return Err(corrupt("the manifest contradicts itself: points do not ascend"));
        }
        let mut below: Option<&Point> = None;
        for point in self.all() {
            point
                .check(below)
                .map_err(|why| corrupt(format!("the manifest contradicts itself: {why}")).point(&point.id))?;
            if point.generation > self.generation {
                return Err(
                    corrupt("the manifest contradicts itself: the point is of a future generation").point(&point.id)
                );
            }
            below = Some(point);
        }
        if let Some(promotion) = self.promotion.as_ref().filter(|p| self.point(&p.point).is_none()) {
            return Err(corrupt("the manifest contradicts itself: it is promoted to no point").point(&promotion.point));
        }
        match (self.head(), self.links.last()) {
            (head, Some(link)) if head.is_none_or(|h| h.id.seq() < link.id.seq()) => {
                Err(corrupt("the manifest contradicts itself: the newest point is removed").point(&link.id))
            }
            _ => Ok(()),
        }
    }
}

impl Point {
    /// Finds a disk of the point by its name. `None`: the disk is not in the point.
    pub fn disk(&self, name: &DiskName) -> Option<&Disk> {
        self.disks.iter().find(|d| &d.name == name)
    }

    /// Says whether any disk of the point is getting an image that stands alone.
    pub fn is_detaching(&self) -> bool {
        self.disks.iter().any(|d| d.detaching)
    }

    fn has_more_attached(&self) -> bool {
        self.attachments.iter().any(|a| matches!(a.name, Attachment::Tpm | Attachment::Firmware))
    }

    /// The public view; `points_dir` is the absolute path under which the point's directory lies.
    pub fn view(&self, points_dir: &Path) -> PointView {
        let dir = points_dir.join(self.id.as_str());
        PointView {
            id: self.id.clone(),
            generation: self.generation,
            frozen_at: self.frozen_at,
            sealed_at: self.sealed_at,
            consistency: self.consistency,
            consistency_reason: self.consistency_reason.clone(),
            autostart: self.autostart,
            tpm_programs: self.tpm_programs.clone(),
            run: self.run.clone(),
            disks: self
                .disks
                .iter()
                .map(|d| PointDisk {
                    name: d.name.clone(),
                    image: dir.join(image_file(&d.name)),
                    size: d.size,
                    root: d.root,
                    stats: d.stats.clone(),
                })
                .collect(),
            attachments: self.attachments.iter().map(|a| a.name).collect(),
            left_out: self.left_out.clone(),
        }
    }

    fn check(&self, below: Option<&Point>) -> Result<(), &'static str> {
        if below.is_some_and(|b| b.id.seq() >= self.id.seq()) {
            return Err("points do not ascend");
        }
        if self.disks.is_empty() || self.disks.len() > DISKS_MAX {
            return Err("a point has between 1 and 256 disks");
        }
        for (i, disk) in self.disks.iter().enumerate() {
            if self.disks[..i].iter().any(|d| d.name == disk.name) {
                return Err("a disk is there twice");
            }
            if disk.size.0 > DISK_SIZE_MAX {
                return Err("a disk is impossibly large");
            }
            if disk.detaching && disk.backing.is_none() {
                return Err("a disk that stands alone is detaching");
            }
            if let Some(backing) = &disk.backing
                && !below.is_some_and(|b| b.id == *backing && b.disk(&disk.name).is_some())
            {
                return Err("a disk's backing image is not that of the point below");
            }
        }
        for (i, attached) in self.attachments.iter().enumerate() {
            if self.attachments[..i].iter().any(|a| a.name == attached.name) {
                return Err("an attachment is there twice");
            }
        }
        Ok(())
    }
}

/// The manifest is full, or as full as a source may make it.
pub(super) fn no_room() -> Error {
    Error::new(Kind::Refused, "the manifest has no room for another point").hint("prune the replica's oldest points")
}

fn corrupt(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(Kind::Corrupt, what)
}

/// Adds the way out, where generations are all that is wrong with a manifest.
pub(super) fn explain(json: &[u8], error: Error) -> Error {
    match error.kind() == Kind::Corrupt && set(json, Generation(1)).is_ok() {
        true => error.advise(advice::Store::SetGenerationHere),
        false => error,
    }
}

/// The manifest with this generation, and no point above it.
pub(crate) fn set(json: &[u8], generation: Generation) -> Result<Manifest> {
    let not_json = |e| Error::new(Kind::Corrupt, "the manifest cannot be read").source(e);
    if json.len() > MANIFEST_MAX {
        return Err(Error::new(Kind::Corrupt, "the manifest is too large"));
    }
    let mut document: Map<String, Value> = serde_json::from_slice(json).map_err(not_json)?;
    for list in ["points", "links"] {
        let points = document.get_mut(list).and_then(Value::as_array_mut);
        for point in points.into_iter().flatten().filter_map(Value::as_object_mut) {
            if point.get("generation").and_then(Value::as_u64).is_none_or(|of| of > generation.0) {
                point.insert("generation".to_owned(), generation.0.into());
            }
        }
    }
    document.insert("generation".to_owned(), generation.0.into());
    let json = serde_json::to_vec(&document).map_err(not_json)?;
    Manifest::parse_sound(&json)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "0a1b2c3d-0000-4000-8000-000000000001";

    fn run(n: u64) -> RunId {
        RunId::from_bits(n << 32)
    }

    /// `"vda<1 vdb"`: disk vda backed by point 1, vdb alone.
    fn point(seq: u64, disks: &str) -> Point {
        let disk = |text: &str| {
            let (name, backing) = text.split_once('<').map_or((text, None), |(n, b)| (n, Some(b.parse().unwrap())));
            Disk {
                name: DiskName::new(name).unwrap(),
                size: DiskSize(1 << 20),
                root: Digest([seq as u8; 32]),
                backing: backing.map(|b: u64| PointId::from_parts(b, &run(b))),
                detaching: false,
                stats: DiskStats::default(),
            }
        };
        Point {
            id: PointId::from_parts(seq, &run(seq)),
            generation: Generation(1),
            frozen_at: "2024-05-01T12:00:00Z".parse().unwrap(),
            sealed_at: "2024-05-01T12:00:05Z".parse().unwrap(),
            consistency: Consistency::Crash,
            consistency_reason: None,
            autostart: None,
            tpm_programs: None,
            run: run(seq),
            disks: disks.split(' ').map(disk).collect(),
            attachments: vec![],
            left_out: LeftOut::default(),
            pinned: None,
            sealed_clock_s: None,
        }
    }

    fn manifest(points: &[(u64, &str)]) -> Result<Manifest> {
        let mut m = Manifest::new(DomainUuid::new(UUID).unwrap(), DomainName::new("db01").unwrap(), Generation(1));
        for (seq, disks) in points {
            m.push(point(*seq, disks))?;
        }
        Ok(m)
    }

    /// A program that does not know the field passes over it; one that reads an older manifest is told nothing.
    #[test]
    fn whether_a_domain_starts_with_its_host_needs_no_version_of_its_own() {
        let mut m = manifest(&[(1, "vda")]).unwrap();
        let old = String::from_utf8(m.to_json().unwrap()).unwrap();
        assert!(!old.contains("autostart"), "{old}");
        for said in [true, false] {
            m.point_mut(&PointId::from_parts(1, &run(1))).unwrap().autostart = Some(said);
            let json = m.to_json().unwrap();
            assert_eq!(serde_json::from_slice::<Preamble>(&json).unwrap().version, VERSION);
            assert_eq!(Manifest::parse(&json).unwrap().head().unwrap().view(Path::new("/")).autostart, Some(said));
        }
    }

    #[test]
    fn reads_back_what_it_wrote_and_ignores_what_it_does_not_know() {
        let m = manifest(&[(1, "vda vdb"), (2, "vda<1 vdb")]).unwrap();
        let json = m.to_json().unwrap();
        assert_eq!(Manifest::parse(&json).unwrap(), m);
        let mut value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        value["points"][0]["disks"][0]["colour"] = "blue".into();
        assert_eq!(Manifest::parse(value.to_string().as_bytes()).unwrap(), m);
    }

    #[test]
    fn a_future_version_is_refused_for_its_number() {
        let e = Manifest::parse(br#"{"format":"virt-replica manifest","version":6,"points":"elsewhere"}"#).unwrap_err();
        assert_eq!(e.kind(), Kind::Protocol);
        assert!(e.to_string().contains("version 6"), "{e}");
    }

    #[test]
    fn contradictions_are_corruption() {
        for bad in [
            &[(2, "vda"), (1, "vda")][..],
            &[(1, "vda"), (1, "vda")],
            &[(1, "vda<1")],
            &[(1, "vda vda")],
            &[(1, "vda"), (2, "vdb<1")],
            &[(1, "vda"), (2, "vda<1"), (3, "vda<1")],
        ] {
            assert_eq!(manifest(bad).unwrap_err().kind(), Kind::Corrupt, "{bad:?}");
        }
        for bad in
            ["", "[]", "{}", r#"{"format":"x","version":1}"#, r#"{"format":"virt-replica manifest","version":1}"#]
        {
            assert_eq!(Manifest::parse(bad.as_bytes()).unwrap_err().kind(), Kind::Corrupt, "{bad}");
        }
    }

    /// I21: an id from a manifest becomes a path, so a manifest cannot hold one that climbs.
    #[test]
    fn hostile_ids_do_not_parse() {
        let json = String::from_utf8(manifest(&[(1, "vda")]).unwrap().to_json().unwrap()).unwrap();
        assert!(Manifest::parse(json.replace("\"vda\"", "\"../vda\"").as_bytes()).is_err());
        assert!(Manifest::parse(json.replace("000001-", "../01-").as_bytes()).is_err());
        assert!(Manifest::parse(json.replace(UUID, "../../../../etc").as_bytes()).is_err());
    }

    #[test]
    fn a_chain_ends_where_a_disk_started_afresh() {
        let m = manifest(&[(1, "vda vdb"), (2, "vda<1 vdb"), (3, "vda<2 vdb<2")]).unwrap();
        let seqs = |disk: &str| {
            let head = &m.head().unwrap().id;
            m.chain(head, &DiskName::new(disk).unwrap()).unwrap().iter().map(|p| p.id.seq()).collect::<Vec<_>>()
        };
        assert_eq!(seqs("vda"), [3, 2, 1]);
        assert_eq!(seqs("vdb"), [3, 2]);
        assert_eq!(m.next_seq(), 4);
        let e = m.chain(&m.head().unwrap().id, &DiskName::new("vdc").unwrap()).unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound);
    }

    fn ids(seqs: &[u64]) -> Vec<PointId> {
        seqs.iter().map(|seq| PointId::from_parts(*seq, &run(*seq))).collect()
    }

    fn seqs<'a>(points: impl IntoIterator<Item = &'a Point>) -> Vec<u64> {
        points.into_iter().map(|p| p.id.seq()).collect()
    }

    #[test]
    fn a_removed_point_is_a_link_until_it_is_folded() {
        let mut m = manifest(&[(1, "vda vdb"), (2, "vda<1 vdb"), (3, "vda<2 vdb<2"), (4, "vda<3 vdb<3")]).unwrap();
        m.remove(&ids(&[1, 2])).unwrap();
        assert_eq!((seqs(m.points()), seqs(m.links())), (vec![3, 4], vec![1, 2]));
        let json = m.to_json().unwrap();
        assert!(String::from_utf8_lossy(&json).contains("\"version\": 2"), "an older program must not touch it");
        let mut m = Manifest::parse(&json).unwrap();
        let rows = m.rows();
        assert_eq!((rows.len(), rows[0].0.id.seq(), seqs(rows[0].1.iter().copied())), (1, 3, vec![2, 1]));
        let vda = DiskName::new("vda").unwrap();
        assert_eq!(seqs(m.chain(&ids(&[4])[0], &vda).unwrap()), [4, 3, 2, 1]);
        m.folded(&ids(&[3])[0]).unwrap();
        assert!(m.links().is_empty() && m.point(&ids(&[3])[0]).unwrap().disks.iter().all(|d| d.backing.is_none()));
        assert!(String::from_utf8_lossy(&m.to_json().unwrap()).contains("\"version\": 1"));
        assert_eq!(seqs(m.chain(&ids(&[4])[0], &vda).unwrap()), [4, 3]);
    }

    #[test]
    fn a_row_in_the_middle_is_folded_onto_what_lies_below() {
        let mut m = manifest(&[(1, "vda"), (2, "vda<1"), (3, "vda<2"), (4, "vda<3"), (5, "vda<4")]).unwrap();
        m.remove(&ids(&[2, 4])).unwrap();
        assert_eq!(m.rows().iter().map(|(p, l)| (p.id.seq(), l.len())).collect::<Vec<_>>(), [(3, 1), (5, 1)]);
        m.folded(&ids(&[5])[0]).unwrap();
        assert_eq!(m.head_disk(&DiskName::new("vda").unwrap()).unwrap().backing, Some(ids(&[3])[0].clone()));
        // A point that becomes a link before what lies below it is folded joins that row.
        m.remove(&ids(&[3])).unwrap();
        assert_eq!(m.rows().iter().map(|(p, l)| (p.id.seq(), l.len())).collect::<Vec<_>>(), [(5, 2)]);
    }

    #[test]
    fn the_head_and_what_is_not_there_are_not_removed() {
        let mut m = manifest(&[(1, "vda"), (2, "vda<1")]).unwrap();
        let before = m.clone();
        assert_eq!(m.remove(&ids(&[1, 2])).unwrap_err().kind(), Kind::Refused);
        assert_eq!(m.remove(&ids(&[1, 7])).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(m, before);
        // Not even by a manifest that was written by hand.
        m.remove(&ids(&[1])).unwrap();
        let json = String::from_utf8(m.to_json().unwrap()).unwrap();
        let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
        let points = value["points"].take();
        value["points"] = value["links"].take();
        value["links"] = points;
        assert_eq!(Manifest::parse(value.to_string().as_bytes()).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn a_detaching_disk_is_told_to_programs_that_do_not_know_of_it() {
        let mut m = manifest(&[(1, "vda vdb"), (2, "vda<1 vdb<1")]).unwrap();
        let vda = DiskName::new("vda").unwrap();
        m.detach(&ids(&[2])[0], std::slice::from_ref(&vda)).unwrap();
        let json = m.to_json().unwrap();
        assert!(String::from_utf8_lossy(&json).contains("\"version\": 3"));
        let mut again = Manifest::parse(&json).unwrap();
        assert_eq!(seqs(again.chain(&ids(&[2])[0], &vda).unwrap()), [2, 1], "both answers are still possible");
        again.detached(&ids(&[2])[0]).unwrap();
        assert_eq!(seqs(again.chain(&ids(&[2])[0], &vda).unwrap()), [2]);
        assert_eq!(again.head_disk(&DiskName::new("vdb").unwrap()).unwrap().backing, Some(ids(&[1])[0].clone()));
        let json = String::from_utf8(again.to_json().unwrap()).unwrap();
        assert!(json.contains("\"version\": 1") && !json.contains("detaching"));
        // What stands alone cannot be detaching, and no link begins to.
        let lie = json.replacen("\"root\"", "\"detaching\": true, \"root\"", 1);
        assert_eq!(Manifest::parse(lie.as_bytes()).unwrap_err().kind(), Kind::Corrupt);
        m.remove(&ids(&[1])).unwrap();
        assert_eq!(m.detach(&ids(&[1])[0], &[vda]).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn the_state_of_a_tpm_is_told_to_programs_that_do_not_know_of_it() {
        let mut m = manifest(&[(1, "vda"), (2, "vda<1")]).unwrap();
        let version = |m: &Manifest| {
            let json = m.to_json().unwrap();
            assert_eq!(Manifest::parse(&json).unwrap().to_json().unwrap(), json);
            serde_json::from_slice::<Preamble>(&json).unwrap().version
        };
        assert_eq!(version(&m), VERSION);
        let attached = Attached { name: Attachment::Tpm, size_bytes: 1, blake3: Digest::ZERO };
        m.point_mut(&ids(&[1])[0]).unwrap().attachments.push(attached);
        assert_eq!(version(&m), VERSION_MORE_ATTACHED);
        // It goes with the point that has it.
        m.remove(&ids(&[1])).unwrap();
        m.folded(&ids(&[2])[0]).unwrap();
        assert_eq!(version(&m), VERSION);
    }
}
