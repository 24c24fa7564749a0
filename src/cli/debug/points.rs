//! `debug points`: a replica's directory, a manifest, or a point in a file.

use super::page::{Finding, List, Look, Page, View, clean};
use super::pointfile::{self, PointFile};
use super::protection::{self, Protected, Protection};
use crate::cli::plain::envelope::KeyArgs;
use crate::cli::speak::render;
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DiskName, PointId};
use virt_replica::replica::look::{self, FileSeen, ManifestSeen};
use virt_replica::replica::manifest::{Disk, MANIFEST_MAX, Manifest, Pinned, Point, REPLICAS_DIR};
use virt_replica::replica::pointfile as format;
use virt_replica::replica::upkeep::{Damage, Lease};

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PointsView {
    Replica(Box<Replica>),
    PointFile(Box<Carrier>),
}

/// A file that carries a point.
#[derive(Serialize)]
pub struct Carrier {
    bytes: u64,
    protection: Protection,
    /// `null`: it is encrypted, and no key was named.
    point: Option<PointFile>,
}

/// A manifest, and what lies beside it where the directory was named.
#[derive(Serialize)]
pub struct Replica {
    manifest_bytes: u64,
    version: Option<u64>,
    /// As it was read; `null`: it is refused, and `sketch` has its words.
    manifest: Option<Header>,
    sketch: List<String>,
    points: List<PointSeen>,
    files: List<FileLine>,
    /// Directories that the manifest does not name.
    unnamed: List<String>,
    leases: List<LeaseSeen>,
    /// What scrubs found.
    damaged: List<Damage>,
    findings: List<Finding>,
}

#[derive(Serialize)]
struct Header {
    uuid: String,
    name: String,
    generation: u64,
    owner: Option<virt_replica::replica::source::Owner>,
    promotion: Option<virt_replica::replica::upkeep::Promoted>,
}

#[derive(Serialize)]
struct PointSeen {
    id: PointId,
    /// It was removed, and the point above still reads through it.
    link: bool,
    generation: u64,
    frozen_at: Timestamp,
    sealed_at: Timestamp,
    consistency: virt_replica::replica::Consistency,
    run: String,
    pinned: Option<Pinned>,
    disks: Vec<DiskSeen>,
    attachments: Vec<&'static str>,
    /// Disks of the domain that are in no point.
    left_out: Vec<String>,
}

#[derive(Serialize)]
struct DiskSeen {
    name: DiskName,
    size: u64,
    root: String,
    backing: Option<PointId>,
    detaching: bool,
    mode: virt_replica::engine::stats::Mode,
    /// Images that the disk consists of at this point, links included.
    depth: u64,
}

#[derive(Serialize)]
struct FileLine {
    name: String,
    bytes: Option<u64>,
    occupied_bytes: Option<u64>,
    missing: Option<String>,
}

#[derive(Serialize)]
struct LeaseSeen {
    file: String,
    lease: Option<Lease>,
    in_force: bool,
    wrong: Option<String>,
}

pub fn look(path: &Path, keys: &KeyArgs, now: Timestamp, max: usize) -> Result<Look<PointsView>> {
    if std::fs::metadata(path).is_ok_and(|m| m.is_dir()) {
        return replica(path, now, max);
    }
    let Protected { protection, bytes, content } = protection::open(path, keys)?;
    let Some(content) = content else {
        // Only what travels is encrypted: a point in a file.
        return Ok(Look { view: PointsView::carrier(bytes, protection, None), damage: None });
    };
    let mut content = BufReader::new(content);
    let beginning = content.fill_buf().map_err(|e| Error::io("cannot read the file", path, e))?;
    if format::is_one(beginning) {
        let (point, damage) = pointfile::read(content, max);
        return Ok(Look { view: PointsView::carrier(bytes, protection, Some(point)), damage });
    }
    let mut json = Vec::new();
    let read = content.take(MANIFEST_MAX as u64 + 1).read_to_end(&mut json);
    read.map_err(|e| Error::io("cannot read the file", path, e))?;
    let (replica, damage) = Replica::of(look::manifest(&json, max), max);
    let damage = damage.map(|e| match e.hint_text() {
        Some(_) => e,
        None => e.hint("name a manifest.json, a replica's directory, or a point in a file"),
    });
    Ok(Look { view: PointsView::Replica(Box::new(replica)), damage })
}

fn replica(path: &Path, now: Timestamp, max: usize) -> Result<Look<PointsView>> {
    let seen = look::replica(path, max).map_err(|e| match path.join(REPLICAS_DIR).is_dir() {
        true => Error::new(Kind::Usage, "this is a store with its replicas")
            .path(path)
            .hint(format!("name one of them: {}/UUID", path.join(REPLICAS_DIR).display())),
        false => e,
    })?;
    let (mut replica, damage) = Replica::of(seen.manifest, max);
    let files: Vec<FileLine> = seen.files.into_iter().map(FileLine::from).collect();
    for file in files.iter().filter(|file| file.missing.is_some()) {
        let why = file.missing.as_deref().unwrap_or_default();
        replica.findings.push(Finding::new(format!("{}: {why}", file.name)));
    }
    replica.files = List::newest_of(files, max);
    replica.unnamed = List::of(seen.unnamed.iter().map(clean), max);
    replica.leases = List::of(seen.leases.into_iter().map(|(file, lease)| LeaseSeen::of(&file, lease, now)), max);
    match seen.damage {
        Ok(damage) => replica.damaged = List::of(damage, max),
        Err(e) => replica.findings.push(Finding::of(&e)),
    }
    Ok(Look { view: PointsView::Replica(Box::new(replica)), damage })
}

impl PointsView {
    fn carrier(bytes: u64, protection: Protection, point: Option<PointFile>) -> PointsView {
        PointsView::PointFile(Box::new(Carrier { bytes, protection, point }))
    }
}

impl Replica {
    fn of(seen: ManifestSeen, max: usize) -> (Replica, Option<Error>) {
        let mut replica = Replica {
            manifest_bytes: seen.bytes,
            version: seen.version,
            manifest: None,
            sketch: List::of(seen.sketch, max),
            points: List::new(max),
            files: List::new(max),
            unnamed: List::new(max),
            leases: List::new(max),
            damaged: List::new(max),
            findings: List::of(seen.findings.iter().map(Finding::new), max),
        };
        let manifest = match seen.manifest {
            Ok(manifest) => manifest,
            Err(e) => return (replica, Some(e)),
        };
        replica.manifest = Some(Header {
            uuid: manifest.uuid.to_string(),
            name: manifest.name.to_string(),
            generation: manifest.generation.0,
            owner: manifest.owner.clone(),
            promotion: manifest.promotion.clone(),
        });
        // Each image lies on that of the point just below, so its depth follows from the one before.
        let mut depths = BTreeMap::new();
        let points = manifest.all().into_iter().map(|point| PointSeen::of(&manifest, point, &mut depths));
        replica.points = List::newest_of(points, max);
        (replica, None)
    }
}

impl PointSeen {
    fn of(manifest: &Manifest, point: &Point, depths: &mut BTreeMap<DiskName, u64>) -> PointSeen {
        let depth = |disk: &Disk| match &disk.backing {
            Some(_) => depths.get(&disk.name).map_or(1, |below| below + 1),
            None => 1,
        };
        *depths = point.disks.iter().map(|disk| (disk.name.clone(), depth(disk))).collect();
        let disks = point.disks.iter().map(|disk| DiskSeen {
            name: disk.name.clone(),
            size: disk.size.0,
            root: disk.root.to_string(),
            backing: disk.backing.clone(),
            detaching: disk.detaching,
            mode: disk.stats.mode,
            depth: depths[&disk.name],
        });
        PointSeen {
            id: point.id.clone(),
            link: manifest.is_link(&point.id),
            generation: point.generation.0,
            frozen_at: point.frozen_at,
            sealed_at: point.sealed_at,
            consistency: point.consistency,
            run: point.run.to_string(),
            pinned: point.pinned.clone(),
            disks: disks.collect(),
            attachments: point.attachments.iter().map(|attached| attached.name.file_name()).collect(),
            left_out: point.left_out.iter().map(|disk| format!("{}: it {}", disk.name, clean(&disk.reason))).collect(),
        }
    }

    fn disks(&self) -> String {
        let disk = |disk: &DiskSeen| {
            let detaching = if disk.detaching { ", detaching" } else { "" };
            format!("{} {} ({}, depth {}{detaching})", disk.name, render::bytes(disk.size), disk.mode, disk.depth)
        };
        let missing = self.left_out.iter().map(|missing| format!("not in it: {missing}"));
        clean(self.disks.iter().map(disk).chain(missing).collect::<Vec<_>>().join("; "))
    }
}

impl From<FileSeen> for FileLine {
    fn from(seen: FileSeen) -> Self {
        let (bytes, missing) = match seen.bytes {
            Ok(bytes) => (Some(bytes), None),
            Err(why) => (None, Some(clean(why))),
        };
        FileLine { name: seen.name, bytes: bytes.map(|b| b.0), occupied_bytes: bytes.map(|b| b.1), missing }
    }
}

impl LeaseSeen {
    fn of(file: &str, lease: Result<Lease, String>, now: Timestamp) -> LeaseSeen {
        let (lease, wrong) = match lease {
            Ok(lease) => (Some(lease), None),
            Err(why) => (None, Some(clean(why))),
        };
        LeaseSeen { file: clean(file), in_force: lease.as_ref().is_some_and(|l| l.expires > now), lease, wrong }
    }

    fn text(&self) -> String {
        match &self.lease {
            None => format!("{}: this is no lease ({})", self.file, self.wrong.as_deref().unwrap_or_default()),
            Some(lease) => {
                let over = if self.in_force { "" } else { ", and is over" };
                let (owner, purpose) = (clean(&lease.owner), clean(&lease.purpose));
                format!("{}: {purpose}, by {owner}, until {}{over}", lease.point, render::time(lease.expires))
            }
        }
    }
}

impl View for PointsView {
    fn page(&self, page: &mut Page) {
        match self {
            PointsView::Replica(replica) => replica.page(page),
            PointsView::PointFile(carrier) => {
                page.line("bytes", render::bytes(carrier.bytes));
                carrier.protection.page(page);
                carrier.point.iter().for_each(|point| point.page(page));
            }
        }
    }
}

impl Replica {
    fn page(&self, page: &mut Page) {
        let version = self.version.map_or("unknown".to_owned(), |v| v.to_string());
        page.line("manifest", format!("{}, version {version}", render::bytes(self.manifest_bytes)));
        if let Some(header) = &self.manifest {
            page.line("of", format!("{} ({}), generation {}", header.name, header.uuid, header.generation));
            let owner = header.owner.as_ref().map(|owner| {
                let source = serde_json::to_string(&owner.source).unwrap_or_default();
                format!("{}, since {}", clean(source), render::time(owner.since))
            });
            page.maybe("source", owner);
            page.maybe(
                "promoted",
                header.promotion.as_ref().map(|p| {
                    let committed = if p.committed { ", for good" } else { "" };
                    format!("to point {}, since {}{committed}", p.point, render::time(p.since))
                }),
            );
        }
        page.lines("says", "lines", &self.sketch, Clone::clone);
        page.findings(&self.findings);
        page.lines("damage", "places", &self.damaged, |damage| clean(render::damage(damage)));
        page.lines("leases", "leases", &self.leases, LeaseSeen::text);
        page.lines("unnamed", "directories", &self.unnamed, |name| {
            format!("points/{name}: the manifest does not name it")
        });
        let header = ["Point", "Generation", "Frozen", "State", "Disks"];
        page.table("older points", (&header, &[1]), &self.points, |point| {
            let state = match (&point.pinned, point.link) {
                (_, true) => "link".to_owned(),
                (Some(pin), _) if pin.reason.is_empty() => "pinned".to_owned(),
                (Some(pin), _) => format!("pinned: {}", clean(&pin.reason)),
                (None, _) => "-".to_owned(),
            };
            let generation = point.generation.to_string();
            vec![point.id.to_string(), generation, render::time(point.frozen_at), state, point.disks()]
        });
        page.table("files of older points", (&["File", "Length", "On disk"], &[1, 2]), &self.files, |file| {
            let bytes = |bytes: Option<u64>| bytes.map_or("missing".to_owned(), |b| b.to_string());
            vec![file.name.clone(), bytes(file.bytes), bytes(file.occupied_bytes)]
        });
    }
}
