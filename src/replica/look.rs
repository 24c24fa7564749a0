//! A replica as it lies there, for people who look into it: its manifest, the files of its points, leases, and what is
//! out of bounds; and a file of digests. Takes no lock, changes nothing, and judges nothing by itself.
//!
//! Invariants
//! - Below the directory that was named nothing is opened through a link, and no FIFO is waited for.
//! - What cannot be read is told beside what can: nothing here ends the look but the directory itself.
//!
//! Format: docs/formats/replica.md.

use super::damage;
use super::digests;
use super::files::Dir;
use super::lease;
use super::manifest::{
    DISKS_MAX, LEASES_DIR, MANIFEST_FILE, MANIFEST_MAX, Manifest, POINT_SIZE_MAX, POINTS_DIR, SOURCE_MAX, changes_file,
    image_file,
};
use super::upkeep::{Damage, Lease};
use crate::block::digest::{Digest, root_digest};
use crate::block::tree::{RootBuilder, TreeShape};
use crate::engine::nodefile::NodeFile;
use crate::error::{Error, Kind, Result};
use crate::name::{Generation, PointId};
use crate::words;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

pub use super::digests::{Binding, SlotSeen};

/// Longest manifest that is read loosely once it was refused, in bytes: each word of it costs memory then.
const LOOSE_MAX: usize = 4 << 20;

/// Most findings that are made.
const FINDINGS_MAX: usize = 1000;

/// Nodes read at once.
const NODES_AT_ONCE: usize = 4096;

/// A manifest, as far as it can be read.
#[derive(Debug)]
pub struct ManifestSeen {
    /// Length of the manifest's file, in bytes.
    pub bytes: u64,
    /// The number of its format, if there is one.
    pub version: Option<u64>,
    /// Why it is refused, if it is: then `sketch` is all there is.
    pub manifest: Result<Manifest>,
    /// A line for each entry of a manifest that is refused, in its own words, not checked.
    pub sketch: Vec<String>,
    /// What stands close to a bound, or beyond.
    pub findings: Vec<String>,
}

/// Reads a manifest as every reader of a replica does and, where it is refused, what it says all the same. At most
/// `lines` of the sketch are made.
pub fn manifest(json: &[u8], lines: usize) -> ManifestSeen {
    let clean = words::of_document(json);
    let small = json.len() <= LOOSE_MAX;
    let manifest = if small { Manifest::parse(&clean) } else { Manifest::parse_sound(&clean) };
    let mut findings = Vec::new();
    if json.len() > SOURCE_MAX {
        findings.push(format!("the manifest has {} bytes: no source may add a point beyond {SOURCE_MAX}", json.len()));
    }
    let loose = (small && manifest.is_err()).then(|| serde_json::from_slice::<Value>(&clean).ok()).flatten();
    let version = match &manifest {
        Ok(_) => Preamble::of(&clean),
        Err(_) => loose.as_ref().and_then(|loose| loose["version"].as_u64()),
    };
    let sketch = loose.as_ref().map(|loose| sketch(loose, lines)).unwrap_or_default();
    findings.extend(manifest.as_ref().map(out_of_bounds).unwrap_or_default());
    findings.extend(loose.as_ref().map(loosely_out_of_bounds).unwrap_or_default());
    ManifestSeen { bytes: json.len() as u64, version, manifest, sketch, findings }
}

#[derive(serde::Deserialize)]
struct Preamble {
    version: u64,
}

impl Preamble {
    fn of(json: &[u8]) -> Option<u64> {
        serde_json::from_slice::<Preamble>(json).ok().map(|preamble| preamble.version)
    }
}

fn out_of_bounds(manifest: &Manifest) -> Vec<String> {
    let mut found = Vec::new();
    if manifest.generation == Generation::MAX {
        found.push("the replica is of the last generation there is".to_owned());
    }
    for point in manifest.all() {
        if found.len() >= FINDINGS_MAX {
            break;
        }
        let total = point.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.size.0));
        if total > POINT_SIZE_MAX {
            found.push(format!("point {}: its disks have {total} bytes, and may have {POINT_SIZE_MAX}", point.id));
        }
        if point.frozen_at > point.sealed_at {
            found.push(format!("point {}: it was frozen after it was sealed: a clock was ahead", point.id));
        }
    }
    found
}

fn entries(document: &Value) -> impl Iterator<Item = (&'static str, &Value)> {
    let of = |list: &'static str| document[list].as_array().into_iter().flatten().map(move |entry| (list, entry));
    of("points").chain(of("links"))
}

fn sketch(document: &Value, lines: usize) -> Vec<String> {
    let short = |value: &Value| crate::error::printable(&value.to_string(), 80);
    let mut told = Vec::new();
    for name in ["format", "version", "uuid", "name", "generation", "promotion"] {
        if let Some(value) = document.get(name) {
            told.push(format!("{name}: {}", short(value)));
        }
    }
    for (list, entry) in entries(document).take(lines) {
        let disks = entry["disks"].as_array().map_or(0, Vec::len);
        let (id, generation) = (short(&entry["id"]), short(&entry["generation"]));
        told.push(format!(
            "{list}: {id}, generation {generation}, {disks} disks, frozen {}",
            short(&entry["frozen_at"])
        ));
    }
    told
}

fn loosely_out_of_bounds(document: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let generation = document["generation"].as_u64();
    if generation.is_none_or(|number| number > Generation::MAX.0) {
        found.push(format!("the generation is no number up to {}", Generation::MAX));
    }
    for (list, entry) in entries(document) {
        if found.len() >= FINDINGS_MAX {
            break;
        }
        let id = crate::error::printable(&entry["id"].to_string(), 80);
        if entry["generation"].as_u64().is_none_or(|of| generation.is_some_and(|max| of > max)) {
            found.push(format!("{list}: {id} is of a generation above that of the replica"));
        }
        let disks = entry["disks"].as_array();
        if disks.is_none_or(|disks| disks.is_empty() || disks.len() > DISKS_MAX) {
            found.push(format!("{list}: {id} has no disks, or more than {DISKS_MAX}"));
        }
        let large = |disk: &&Value| disk["size"].as_u64().is_none_or(|size| size > super::manifest::DISK_SIZE_MAX);
        for disk in disks.into_iter().flatten().filter(large).take(DISKS_MAX) {
            let name = crate::error::printable(&disk["name"].to_string(), 80);
            found.push(format!("{list}: {id}: disk {name} has an impossible size"));
        }
    }
    found
}

/// A file that belongs to a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSeen {
    /// Relative to the replica's directory.
    pub name: String,
    /// Its length and what it occupies; or why there is none.
    pub bytes: Result<(u64, u64), String>,
}

/// The directory of a replica.
pub struct ReplicaSeen {
    /// Directory of the replica.
    pub path: PathBuf,
    /// What its manifest says, as far as it could be read.
    pub manifest: ManifestSeen,
    /// Of the points and links, in their order: image and change list of each disk, then what is attached.
    pub files: Vec<FileSeen>,
    /// Directories in `points/` that the manifest does not name: a point that is open, or remains of one.
    pub unnamed: Vec<String>,
    /// Every lease with its file, also one that is over; or why it is none.
    pub leases: Vec<(String, Result<Lease, String>)>,
    /// What scrubs found; or why that is not known.
    pub damage: Result<Vec<Damage>>,
}

/// Looks into the directory of a replica. `NotFound` if there is no manifest in it; no other fault of it is an error.
/// `lines`: of every list so many entries are made, and files are looked at for so many points, the newest ones.
pub fn replica(path: &Path, lines: usize) -> Result<ReplicaSeen> {
    let missing = || {
        Error::new(Kind::NotFound, "there is no manifest, so this is no replica")
            .path(path)
            .hint("name the directory of a replica, ROOT/replicas/UUID, or its manifest.json")
    };
    let dir = Dir::open_root(path)?.ok_or_else(missing)?;
    // One byte more than there may be, so that the reader refuses what is too large.
    let json = dir.read(MANIFEST_FILE, MANIFEST_MAX)?.ok_or_else(missing)?;
    let manifest = manifest(&json, lines);
    let (files, unnamed) = match &manifest.manifest {
        Ok(manifest) => (files(&dir, manifest, lines), unnamed(&dir, manifest)),
        Err(_) => (Vec::new(), Vec::new()),
    };
    let leases = leases(&dir).unwrap_or_else(|e| vec![(LEASES_DIR.to_owned(), Err(e.chain()))]);
    let damage = damage::State::load(&dir).map(|state| state.damage.into_iter().map(|record| record.damage).collect());
    Ok(ReplicaSeen { path: path.to_owned(), manifest, files, unnamed, leases, damage })
}

fn files(dir: &Dir, manifest: &Manifest, points: usize) -> Vec<FileSeen> {
    let all = manifest.all();
    let mut seen = Vec::new();
    for point in &all[all.len().saturating_sub(points)..] {
        let place = dir.sub(POINTS_DIR).and_then(|points| points.map_or(Ok(None), |dir| dir.sub(point.id.as_str())));
        let disks = point.disks.iter().flat_map(|disk| [image_file(&disk.name), changes_file(&disk.name)]);
        let attached = point.attachments.iter().map(|attached| attached.name.file_name().to_owned());
        for name in disks.chain(attached) {
            let bytes = match &place {
                Ok(Some(place)) => room(place, &name),
                Ok(None) => Err("its point has no directory".to_owned()),
                Err(e) => Err(e.chain()),
            };
            seen.push(FileSeen { name: format!("{POINTS_DIR}/{}/{name}", point.id), bytes });
        }
    }
    seen
}

fn room(dir: &Dir, name: &str) -> Result<(u64, u64), String> {
    match dir.open(name) {
        Ok(Some(file)) => match file.metadata() {
            Ok(metadata) => Ok((metadata.len(), metadata.blocks().saturating_mul(512))),
            Err(e) => Err(e.to_string()),
        },
        Ok(None) => Err("it is not there".to_owned()),
        Err(e) => Err(e.what().to_owned()),
    }
}

fn unnamed(dir: &Dir, manifest: &Manifest) -> Vec<String> {
    let entries = dir.sub(POINTS_DIR).ok().flatten().and_then(|points| points.entries().ok()).unwrap_or_default();
    let named = |name: &String| PointId::new(name.as_str()).is_ok_and(|id| manifest.named(&id).is_some());
    entries.into_iter().filter(|name| !named(name)).collect()
}

fn leases(dir: &Dir) -> Result<Vec<(String, Result<Lease, String>)>> {
    let Some(leases) = dir.sub(LEASES_DIR)? else { return Ok(Vec::new()) };
    lease::look(&leases)
}

/// One level of a digest tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelSeen {
    /// 0: blocks, 1: groups, and so on.
    pub level: u8,
    /// Nodes that a tree of this size has on the level, zero ones included.
    pub nodes: u64,
    /// Nodes that are not zero, and neighbours of them as one.
    pub filled: u64,
    /// Runs of neighbouring nodes that are not zero.
    pub runs: u64,
    /// Where the level begins in the file.
    pub offset: u64,
}

/// The head's digests of a disk.
#[derive(Debug)]
pub struct TreeSeen {
    /// The two headers of the file; `None` where a header is empty or damaged.
    pub slots: [Option<SlotSeen>; 2],
    /// Of the slot that counts; without one there is no tree.
    pub levels: Vec<LevelSeen>,
    /// The root that the blocks lead to, and the one of the topmost node.
    pub root_of_blocks: Option<Digest>,
    /// Root computed from the topmost node in the file. `None`: the node could not be read.
    pub root_of_top: Option<Digest>,
}

impl TreeSeen {
    /// The slot that counts.
    pub fn newest(&self) -> Option<&SlotSeen> {
        self.slots.iter().flatten().max_by_key(|slot| slot.sequence)
    }
}

/// Whether a file is one of digests of a head.
pub fn is_tree(file: &File) -> Result<bool> {
    digests::is_one(file).map_err(|e| Error::from_io("cannot read the file", e))
}

/// Reads a file of digests of a head: both headers, then the levels, in pieces and past holes. `Corrupt` where it ends
/// within a level; `seen` has what was read until then.
pub fn tree(file: File, path: &Path) -> Result<(TreeSeen, Option<Error>)> {
    let slots = digests::look(&file).map_err(|e| Error::io("cannot read the digest file", path, e))?;
    let mut seen = TreeSeen { slots, levels: Vec::new(), root_of_blocks: None, root_of_top: None };
    let Some(size) = seen.newest().map(|slot| slot.binding.size) else {
        let e = Error::new(Kind::Corrupt, "neither header of the digest file can be read").offset(0);
        return Ok((seen, Some(e)));
    };
    let len = file.metadata().map_err(|e| Error::io("cannot look at the digest file", path, e))?.len();
    let (shape, nodes) = (TreeShape::new(size), NodeFile::over(file, path.to_owned(), size));
    let mut root = RootBuilder::new(size);
    for level in 0..shape.levels() {
        let (start, count) = (nodes.offset(level, 0), shape.nodes_at(level));
        let end = start + count * Digest::LEN as u64;
        let mut of_level = LevelSeen { level, nodes: count, filled: 0, runs: 0, offset: start };
        let mut last = None;
        let read = filled(nodes.file(), start, end.min(len), &mut |index, digest| {
            of_level.filled += 1;
            of_level.runs += u64::from(last != Some(index));
            last = Some(index + 1);
            match level {
                0 => root.push_block(crate::block::BlockIndex(index), digest),
                _ if level == shape.top() => seen.root_of_top = Some(root_digest(size, digest)),
                _ => {}
            }
        });
        seen.levels.push(of_level);
        if let Err(e) = read {
            return Ok((seen, Some(Error::io("cannot read the digest file", path, e))));
        }
        if end > len {
            let what = format!("the digest file ends within level {level}");
            return Ok((seen, Some(Error::new(Kind::Corrupt, what).path(path).offset(len))));
        }
    }
    seen.root_of_top.get_or_insert(root_digest(size, Digest::ZERO));
    seen.root_of_blocks = Some(root.finish());
    Ok((seen, None))
}

/// Tells every digest between two places of a file that is not zero, by its number. Holes are skipped, so that an empty
/// tree of the largest disk costs nothing.
fn filled(file: &File, start: u64, end: u64, told: &mut dyn FnMut(u64, Digest)) -> std::io::Result<()> {
    const LEN: u64 = Digest::LEN as u64;
    let mut buffer = vec![0; NODES_AT_ONCE * Digest::LEN];
    let mut at = start;
    // A digest that is cut off at the end is none.
    while at + LEN <= end {
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => at = data - data.saturating_sub(start) % LEN,
            Err(Errno::NXIO) => return Ok(()),
            // A file system that knows no holes.
            Err(Errno::INVAL) => {}
            Err(e) => return Err(e.into()),
        }
        let whole = end.saturating_sub(at) / LEN * LEN;
        let len = buffer.len().min(whole as usize);
        if len == 0 {
            return Ok(());
        }
        file.read_exact_at(&mut buffer[..len], at)?;
        for (index, bytes) in ((at - start) / LEN..).zip(buffer[..len].chunks_exact(Digest::LEN)) {
            let digest = Digest(bytes.try_into().expect("chunks of 32 bytes"));
            if !digest.is_zero() {
                told(index, digest);
            }
        }
        at += len as u64;
    }
    Ok(())
}
