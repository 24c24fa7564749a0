//! The manifest of a replica, and every file name inside a replica's directory. Pure: bytes and ids in, values out.
//!
//! Owns the layout: no other file of the store spells a name, and every name is made from checked ids, so that a peer
//! names nothing (I21). Paths are derived, never stored: a manifest cannot point outside its directory.
//!
//! Invariants, checked by [`Manifest::parse`] and kept by [`Manifest::push`]
//! - points ascend by sequence, ids are unique;
//! - a disk's backing image is that of the point just below, which has that disk;
//! - no point is of a younger generation than the manifest.
//!
//! A reader ignores fields it does not know and refuses a version it does not know.
//! Format: docs/formats/replica.md.

use super::{Attachment, Consistency, DiskStats, PointDisk, PointView};
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// First field of every manifest, so that `head -2` tells what the file is.
const FORMAT: &str = "virt-replica manifest";

/// The version this program writes, and the newest it reads. 1: the first.
pub const VERSION: u32 = 1;

/// Largest manifest read or written, in bytes: tens of thousands of points.
pub const MANIFEST_MAX: usize = 64 << 20;

/// Largest disk in bytes (1 PiB): bounds every length derived from a size that a peer sent.
pub const DISK_SIZE_MAX: u64 = 1 << 50;

/// Most disks of one point.
pub const DISKS_MAX: usize = 256;

/// Directory of all replicas, below the root of a store.
pub const REPLICAS_DIR: &str = "replicas";
pub const MANIFEST_FILE: &str = "manifest.json";
pub const LOCK_FILE: &str = "lock";
pub const POINTS_DIR: &str = "points";
pub const DIGESTS_DIR: &str = "digests";
/// Holds disk space for an open point; gone before it is sealed.
pub const RESERVATION_FILE: &str = "reservation";

/// Of a disk's image, in a point's directory.
pub fn image_file(disk: &DiskName) -> String {
    format!("{disk}.qcow2")
}

/// Of the list of blocks a point changed on a disk, in the point's directory.
pub fn changes_file(disk: &DiskName) -> String {
    format!("{disk}.changes")
}

/// Of the head's digests of a disk, in [`DIGESTS_DIR`].
pub fn digests_file(disk: &DiskName) -> String {
    format!("{disk}.tree")
}

/// What an overlay's header says of its backing image: relative, so that a replica may be moved as a whole.
pub fn backing_reference(backing: &PointId, disk: &DiskName) -> String {
    format!("../{backing}/{}", image_file(disk))
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    format: String,
    version: u32,
    pub uuid: DomainUuid,
    pub name: DomainName,
    pub generation: Generation,
    /// Oldest first.
    points: Vec<Point>,
}

/// A sealed point as the manifest records it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub id: PointId,
    pub generation: Generation,
    pub frozen_at: Timestamp,
    pub sealed_at: Timestamp,
    pub consistency: Consistency,
    pub run: RunId,
    pub disks: Vec<Disk>,
    #[serde(default)]
    pub attachments: Vec<Attached>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    pub name: DiskName,
    pub size: DiskSize,
    pub root: Digest,
    /// The point whose image of this disk lies below this one; absent: this image stands alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<PointId>,
    #[serde(flatten)]
    pub stats: DiskStats,
}

/// A file beside the disks, with what it takes to see that it is still what it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    pub name: Attachment,
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
        Self { format: FORMAT.to_owned(), version: VERSION, uuid, name, generation, points: Vec::new() }
    }

    /// Reads and checks a manifest. [`Kind::Protocol`] for another program's version, [`Kind::Corrupt`] for the rest.
    pub fn parse(json: &[u8]) -> Result<Self> {
        if json.len() > MANIFEST_MAX {
            return Err(corrupt(format!("the manifest is larger than {MANIFEST_MAX} bytes")));
        }
        let not_json = |e| corrupt("the manifest cannot be read").source(e);
        let preamble: Preamble = serde_json::from_slice(json).map_err(not_json)?;
        if preamble.format != FORMAT {
            return Err(corrupt(format!("this is not a {FORMAT}")));
        }
        if preamble.version != VERSION {
            return Err(Error::new(
                Kind::Protocol,
                format!("the manifest has version {}, this program reads version {VERSION}", preamble.version),
            )
            .hint("use the version of virt-replica that wrote the replica, or a newer one"));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(not_json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The document as written. Indented: somebody may have to read it on a bad day.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|e| corrupt("cannot write the manifest").source(e))?;
        json.push(b'\n');
        if json.len() > MANIFEST_MAX {
            return Err(Error::new(Kind::Refused, "the manifest has no room for another point")
                .hint("prune the replica's oldest points"));
        }
        Ok(json)
    }

    /// Oldest first.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    pub fn head(&self) -> Option<&Point> {
        self.points.last()
    }

    pub fn point(&self, id: &PointId) -> Option<&Point> {
        self.points.iter().find(|p| &p.id == id)
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

    /// Sequence of the next point.
    pub fn next_seq(&self) -> u64 {
        self.head().map_or(1, |p| p.id.seq() + 1)
    }

    /// The points whose images make up a disk at `point`, the point itself first, the base last. Never empty.
    pub fn chain(&self, point: &PointId, disk: &DiskName) -> Result<Vec<&Point>> {
        let mut chain = Vec::new();
        let mut next = Some(point);
        while let Some(id) = next {
            let link = self.point(id).and_then(|p| Some((p, p.disk(disk)?)));
            let (point, record) = link.ok_or_else(|| {
                Error::new(Kind::NotFound, "the replica has no such disk in this point").disk(disk).point(id)
            })?;
            chain.push(point);
            next = record.backing.as_ref();
        }
        Ok(chain)
    }

    fn check(&self) -> Result<()> {
        let mut below: Option<&Point> = None;
        for point in &self.points {
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
        Ok(())
    }
}

impl Point {
    pub fn disk(&self, name: &DiskName) -> Option<&Disk> {
        self.disks.iter().find(|d| &d.name == name)
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

fn corrupt(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(Kind::Corrupt, what)
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
                stats: DiskStats::default(),
            }
        };
        Point {
            id: PointId::from_parts(seq, &run(seq)),
            generation: Generation(1),
            frozen_at: "2024-05-01T12:00:00Z".parse().unwrap(),
            sealed_at: "2024-05-01T12:00:05Z".parse().unwrap(),
            consistency: Consistency::Crash,
            run: run(seq),
            disks: disks.split(' ').map(disk).collect(),
            attachments: vec![],
        }
    }

    fn manifest(points: &[(u64, &str)]) -> Result<Manifest> {
        let mut m = Manifest::new(DomainUuid::new(UUID).unwrap(), DomainName::new("db01").unwrap(), Generation(1));
        for (seq, disks) in points {
            m.push(point(*seq, disks))?;
        }
        Ok(m)
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
        let e = Manifest::parse(br#"{"format":"virt-replica manifest","version":2,"points":"elsewhere"}"#).unwrap_err();
        assert_eq!(e.kind(), Kind::Protocol);
        assert!(e.to_string().contains("version 2"), "{e}");
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
}
