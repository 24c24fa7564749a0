//! An open point: a directory that no manifest names yet, filled disk by disk, and the order in which it is sealed.
//!
//! Invariants
//! - Nothing that exists is modified: an open point's images lie above the head's.
//! - The manifest names the point only after every file of it, and every name of a file, is durable (I11), and only if
//!   the source's roots are ours (I12).
//!
//! Crash order: docs/replication.md, steps 5 and 6; the failpoints carry its numbers.

use super::age::{self, BootClock};
use super::chain;
use super::damage::{self, InHead};
use super::digests::DigestFile;
use super::disk::{DiskWriter, Start};
use super::files::Dir;
use super::head::{HeadImage, NO_PIECES};
use super::lock::WriterLock;
use super::manifest::{
    self, Attached, MANIFEST_FILE, Manifest, Point, SOURCE_MAX, digests_file, seed_list_file, seed_patch_file,
};
use super::manifest_file::write_aside;
use super::reserve::Reservation;
use super::seed::{self, Seed};
use crate::block::digest::{BLOCK_PIECES, BlockPieces, Digest, PieceDigest};
use crate::block::{BlockIndex, FANOUT};
use crate::engine::disk_target::DiskApplied;
use crate::error::advice::Advice;
use crate::error::{Context, Error, Kind, Result, printable};
use crate::name::{DiskName, PointId};
use crate::replica::age::Clock;
use crate::replica::{ATTACHMENT_MAX, Attachment, BeginPoint, Begun, PointView, SealPoint, TpmPrograms};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

pub(super) struct OpenPoint {
    pub id: PointId,
    pub poison: Poison,
    request: BeginPoint,
    /// As it is on disk; nobody else changes it while we hold the lock.
    manifest: Manifest,
    replica: Dir,
    points: Dir,
    dir: Dir,
    heads: BTreeMap<DiskName, Arc<DigestFile>>,
    /// What the head reads that is damaged, of the disks that are to be repaired.
    rotten: Arc<InHead>,
    /// Readers of the head's copies, of the disks whose pieces were asked for and that are not finished.
    head_images: Mutex<BTreeMap<DiskName, Arc<HeadImage>>>,
    disks: Disks,
    attached: Mutex<BTreeMap<Attachment, Attached>>,
    reservation: Arc<Reservation>,
    _lock: WriterLock,
}

impl OpenPoint {
    /// Creates the point's directory, its images and its reservation.
    pub fn begin(
        lock: WriterLock,
        replica: Dir,
        points: Dir,
        manifest: Manifest,
        request: &BeginPoint,
    ) -> Result<Self> {
        let reserve_bytes = reserve_bytes(&replica, &points, request)?;
        let mut heads = BTreeMap::new();
        for disk in request.disks.iter().filter(|d| !d.fresh) {
            let head = chain::mend_head_digests(&replica, &manifest, &disk.name).map_err(|e| e.disk(&disk.name))?;
            heads.extend(head.map(|file| (disk.name.clone(), Arc::new(file))));
        }
        let rotten = Arc::new(to_repair(&replica, &manifest, request));
        let id = PointId::from_parts(manifest.next_seq(), &request.run);
        let dir = points.sub_or_create(id.as_str())?;
        let filled = take_seeds(&replica, &dir, &id, request, &manifest).and_then(|mut seeds| {
            let start = |name: &DiskName| match (heads.get(name), seeds.remove(name)) {
                (Some(file), _) => {
                    let point = manifest.head().expect("it has digests").id.clone();
                    Start::Head { point, digests: file.clone(), rotten: rotten.get(name).cloned().unwrap_or_default() }
                }
                (None, Some(seed)) => Start::Seed(seed),
                (None, None) => Start::Nothing,
            };
            fill(&dir, request, reserve_bytes, start)
        });
        let (reservation, disks) = filled.inspect_err(|_| {
            // What was reserved is missing elsewhere until the next run.
            if let Err(e) = points.remove_all(id.as_str()) {
                tracing::warn!(point = %id, error = %e.chain(), "cannot remove what was begun");
            }
        })?;
        Ok(Self {
            id,
            poison: Poison::default(),
            request: request.clone(),
            manifest,
            replica,
            points,
            dir,
            heads,
            rotten,
            head_images: Mutex::default(),
            disks,
            attached: Mutex::new(BTreeMap::new()),
            reservation,
            _lock: lock,
        })
    }

    /// What the source has to know of what is there.
    pub fn begun(&self) -> Begun {
        let seeds = self.disks.values().filter_map(|disk| disk.lock().ok().and_then(|disk| disk.seed_view().cloned()));
        Begun { seeds: seeds.collect() }
    }

    /// Makes seeds of the images that stand alone and hold something, because this point is not going to be sealed. The
    /// next first copy starts from them. What cannot be closed in order is not kept.
    pub fn keep_seeds(&self) {
        for name in self.disks.keys().filter(|name| self.manifest.head_disk(name).is_none()) {
            let kept = self.disk(name).and_then(|mut disk| {
                if !disk.is_worth_keeping() {
                    return Ok(());
                }
                disk.sync_image()?;
                seed::keep(&self.replica, &self.dir, name)
            });
            if let Err(e) = kept {
                tracing::info!(disk = %name, error = %e.chain(), "what arrived of the disk is not kept");
            }
        }
    }

    /// The digests that a disk's patch leads on from: the head's, or a seed's. `None`: it starts from nothing.
    pub fn head_digests(&self, disk: &DiskName) -> Result<Option<Arc<DigestFile>>> {
        if let Some(writer) = self.disks.get(disk).and_then(|d| d.lock().ok()).filter(|w| w.is_seeded()) {
            return Ok(writer.from().cloned());
        }
        match self.heads.get(disk) {
            Some(file) => Ok(Some(file.clone())),
            // Of a disk that starts afresh, or is not part of this run.
            None => Ok(chain::mend_head_digests(&self.replica, &self.manifest, disk)?.map(Arc::new)),
        }
    }

    /// As [`DiskTarget::pieces`](super::DiskTarget::pieces). Takes no lock that an `apply` holds.
    pub fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        if !self.disks.contains_key(disk) {
            return Err(Error::new(Kind::Usage, "the open point has no such disk"));
        }
        if !self.heads.contains_key(disk) {
            let writer = self.disk(disk)?;
            if writer.is_seeded() {
                return writer.seed_pieces(blocks);
            }
        }
        let Some(image) = self.head_image(disk)? else { return Ok(vec![NO_PIECES; blocks.len()]) };
        let Some(rotten) = self.rotten.get(disk) else { return image.pieces(blocks) };
        // What is damaged is not even read: no piece of it is of use.
        let sound: Vec<BlockIndex> = blocks.iter().copied().filter(|b| !rotten.has(b.0)).collect();
        let mut pieces = image.pieces(&sound)?.into_iter();
        let of = |block: &BlockIndex| if rotten.has(block.0) { Some(ROTTEN_PIECES) } else { pieces.next() };
        Ok(blocks.iter().filter_map(of).collect())
    }

    /// Puts into the place of nodes that have damaged blocks below them some that no content has.
    pub fn make_differ(&self, disk: &DiskName, level: u8, first: u64, nodes: &mut [Digest]) {
        let Some(rotten) = self.rotten.get(disk) else { return };
        let Some(span) = (FANOUT as u64).checked_pow(u32::from(level)) else { return };
        for (index, node) in (first..).zip(nodes) {
            let start = index.saturating_mul(span);
            if rotten.touches(&(start..start.saturating_add(span))) {
                *node = ROTTEN;
            }
        }
    }

    /// The reader of the head's copy, opened once; `None` if the disk starts from nothing.
    fn head_image(&self, disk: &DiskName) -> Result<Option<Arc<HeadImage>>> {
        let (Some(digests), Some(head)) = (self.heads.get(disk), self.manifest.head()) else { return Ok(None) };
        // Held while the chain is opened: who asks at the same time would open it too.
        let mut images = self.head_images.lock().expect("no code panics with this lock");
        if let Some(image) = images.get(disk) {
            return Ok(Some(image.clone()));
        }
        let image = Arc::new(HeadImage::open(&self.points, &self.manifest, &head.id, disk, digests.size())?);
        images.insert(disk.clone(), image.clone());
        Ok(Some(image))
    }

    fn disk(&self, name: &DiskName) -> Result<MutexGuard<'_, DiskWriter>> {
        let disk = self.disks.get(name).ok_or_else(|| Error::new(Kind::Usage, "the open point has no such disk"))?;
        disk.lock().map_err(|_| Error::new(Kind::Corrupt, "an earlier call on this disk panicked"))
    }

    pub fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        self.disk(disk)?.apply(patch_bytes)?;
        // step 5c
        crate::failpoint!("5c");
        Ok(())
    }

    pub fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        let applied = self.disk(disk)?.finish()?;
        self.head_images.lock().expect("no code panics with this lock").remove(disk);
        // step 5d
        crate::failpoint!("5d");
        Ok(applied)
    }

    pub fn attach(&self, name: Attachment, content: &[u8]) -> Result<()> {
        if content.len() > ATTACHMENT_MAX {
            let what = format!("an attachment of {} bytes is larger than any is meant to be", content.len());
            return Err(Error::new(Kind::Usage, what));
        }
        let mut attached = self.attached.lock().expect("no code panics with this lock");
        if attached.contains_key(&name) {
            return Err(Error::new(Kind::Usage, format!("{} is attached already", name.file_name())));
        }
        // Durable with its content; its name follows with the directory's.
        self.dir.write_new(name.file_name(), content)?;
        let blake3 = Digest(*blake3::hash(content).as_bytes());
        attached.insert(name, Attached { name, size_bytes: content.len() as u64, blake3 });
        // step 5e
        crate::failpoint!("5e");
        Ok(())
    }

    /// Steps 6a to 6e. After an error the point may exist if 6d was begun; the manifest knows.
    pub fn seal(&self, request: &SealPoint, clock: &Clock, boot: &BootClock) -> Result<PointView> {
        let disks = self.check_roots(request)?;
        self.reservation.release(&self.dir)?;
        self.seal_disks()?;
        self.seal_names()?;
        let sealed_at = clock();
        let sealed_clock_s = age::observe(&self.replica, &self.manifest, &boot(), sealed_at).now_s;
        let attachments = self.attached.lock().expect("no code panics with this lock").values().cloned().collect();
        let point = Point {
            id: self.id.clone(),
            generation: self.request.generation,
            frozen_at: request.frozen_at,
            sealed_at,
            consistency: request.consistency,
            consistency_reason: request.consistency_reason.as_deref().map(|why| printable(why, REASON_MAX)),
            autostart: request.autostart,
            tpm_programs: request.tpm_programs.as_ref().map(TpmPrograms::bounded),
            run: self.request.run.clone(),
            disks,
            attachments,
            left_out: request.left_out.clone(),
            pinned: None,
            sealed_clock_s: Some(sealed_clock_s),
        };
        let view = point.view(self.points.path());
        let manifest = self.publish(point)?;
        if let Err(e) = self.update_digests(&manifest) {
            tracing::warn!(point = %self.id, error = %e.chain(), "the head's digests were not updated; the next run mends them");
        }
        Ok(view)
    }

    /// The records of the disks, if they are exactly those of `begin`, each finished and with the source's root.
    fn check_roots(&self, request: &SealPoint) -> Result<Vec<manifest::Disk>> {
        if request.disks.len() != self.request.disks.len() {
            let what = format!("a seal of {} disks for a point of {}", request.disks.len(), self.request.disks.len());
            return Err(Error::new(Kind::Usage, what));
        }
        let mut records = Vec::new();
        for begun in &self.request.disks {
            let wanted = request.disks.iter().find(|d| d.name == begun.name);
            let wanted =
                wanted.ok_or_else(|| Error::new(Kind::Usage, "the seal leaves out a disk").disk(&begun.name))?;
            let disk = self.disk(&begun.name)?;
            let applied =
                disk.applied().ok_or_else(|| Error::new(Kind::Usage, "the disk is not finished").disk(&begun.name))?;
            if applied.root != wanted.root {
                let what = format!("the source has root {}, the target has {}", wanted.root, applied.root);
                return Err(Error::new(Kind::Corrupt, what).disk(&begun.name));
            }
            let mut stats = wanted.stats.clone();
            // What was written here, here is known best.
            stats.bytes_written = applied.bytes_written;
            stats.blocks_changed = applied.blocks_changed;
            records.push(manifest::Disk {
                name: begun.name.clone(),
                size: begun.size,
                root: applied.root,
                backing: disk.backing().cloned(),
                detaching: false,
                stats,
            });
        }
        Ok(records)
    }

    fn seal_disks(&self) -> Result<()> {
        // step 6a: the images' content and metadata
        for name in self.disks.keys() {
            self.disk(name)?.sync_image().map_err(|e| e.disk(name))?;
        }
        crate::failpoint!("6a");
        // step 6b: what they changed
        for name in self.disks.keys() {
            self.disk(name)?.sync_changes().map_err(|e| e.disk(name))?;
        }
        crate::failpoint!("6b");
        Ok(())
    }

    /// Step 6c: attachments, modes, and every name from the files up to the replica.
    fn seal_names(&self) -> Result<()> {
        for name in self.disks.keys() {
            for made_for_seeds in [seed_list_file(name), seed_patch_file(name), digests_file(name)] {
                self.dir.remove(&made_for_seeds)?;
            }
            self.dir.seal_file(&manifest::image_file(name))?;
            self.dir.seal_file(&manifest::changes_file(name))?;
        }
        for name in self.attached.lock().expect("no code panics with this lock").keys() {
            self.dir.seal_file(name.file_name())?;
        }
        self.dir.sync()?;
        self.points.sync()?;
        crate::failpoint!("6c");
        Ok(())
    }

    /// Step 6d: the point exists when this returns, durably.
    fn publish(&self, point: Point) -> Result<Manifest> {
        let mut manifest = self.manifest.clone();
        manifest.name = self.request.name.clone();
        manifest.push(point)?;
        let temporary = write_aside(&self.replica, &manifest, SOURCE_MAX)?;
        crate::failpoint!("6d.written");
        self.replica.rename(temporary, MANIFEST_FILE)?;
        crate::failpoint!("6d.renamed");
        self.replica.sync()?;
        crate::failpoint!("6d");
        Ok(manifest)
    }

    /// Step 6e: the head's digest files. The point exists whether this succeeds or not.
    fn update_digests(&self, manifest: &Manifest) -> Result<()> {
        for disk in self.disks.keys() {
            chain::mend_head_digests(&self.replica, manifest, disk).map_err(|e| e.disk(disk))?;
        }
        chain::drop_other_digests(&self.replica, manifest)?;
        crate::failpoint!("6e");
        Ok(())
    }
}

/// Longest reason for a point's consistency, in bytes.
const REASON_MAX: usize = 400;

/// Digests that no content has.
const ROTTEN: Digest = Digest([0xff; 32]);
const ROTTEN_PIECES: BlockPieces = [PieceDigest([0xff; PieceDigest::LEN]); BLOCK_PIECES];

/// The damage of the disks whose run compares by digest, and so sends again what seems to differ.
fn to_repair(replica: &Dir, manifest: &Manifest, request: &BeginPoint) -> InHead {
    let wanted = |name: &DiskName| request.disks.iter().any(|d| d.repair && !d.fresh && d.name == *name);
    if !request.disks.iter().any(|d| d.repair) {
        return InHead::new();
    }
    damage::in_head(replica, manifest).into_iter().filter(|(name, _)| wanted(name)).collect()
}

type Disks = BTreeMap<DiskName, Mutex<DiskWriter>>;

/// Bytes to reserve; [`Kind::Space`] if they are not there. What a seed holds is there already.
fn reserve_bytes(replica: &Dir, points: &Dir, request: &BeginPoint) -> Result<u64> {
    let seeds = seed::list(replica)?;
    let mut disks = request.disks.clone();
    for disk in disks.iter_mut().filter(|d| d.resume) {
        let there = seeds.iter().find(|(name, _)| *name == disk.name).map_or(0, |(_, bytes)| *bytes);
        disk.reserve_bytes = disk.reserve_bytes.saturating_sub(there);
    }
    let need_bytes = Reservation::check(points.space()?, &disks)?;
    Ok(if disks.iter().any(|d| d.reserve_bytes > 0) { need_bytes } else { 0 })
}

/// Takes the seeds of the disks that can start from one. On an error those that were taken are put back: nothing was
/// written to them.
fn take_seeds(
    replica: &Dir,
    point: &Dir,
    id: &PointId,
    request: &BeginPoint,
    manifest: &Manifest,
) -> Result<BTreeMap<DiskName, Seed>> {
    let mut taken = BTreeMap::new();
    let wanted = request.disks.iter().filter(|d| d.resume && manifest.head_disk(&d.name).is_none());
    for disk in wanted {
        match seed::take(replica, point, id, disk) {
            Ok(found) => taken.extend(found.map(|seed| (disk.name.clone(), seed))),
            Err(e) => {
                let names: Vec<DiskName> = taken.into_keys().chain([disk.name.clone()]).collect();
                for name in names {
                    if let Err(e) = seed::keep(replica, point, &name) {
                        tracing::warn!(disk = %name, error = %e.chain(), "the seed cannot be put back");
                    }
                }
                return Err(e.disk(&disk.name));
            }
        }
    }
    Ok(taken)
}

/// Reserves the space and creates the images in a new point's directory.
fn fill(
    dir: &Dir,
    request: &BeginPoint,
    reserve_bytes: u64,
    mut start: impl FnMut(&DiskName) -> Start,
) -> Result<(Arc<Reservation>, Disks)> {
    let reservation = Arc::new(Reservation::hold(dir, reserve_bytes)?);
    let mut disks = Disks::new();
    for disk in &request.disks {
        let writer = DiskWriter::create(dir, disk, &request.uuid, start(&disk.name), &reservation);
        disks.insert(disk.name.clone(), Mutex::new(writer.map_err(|e| e.disk(&disk.name))?));
    }
    // step 3b
    crate::failpoint!("3b");
    Ok((reservation, disks))
}

/// The first error of an open point, for every call after it.
#[derive(Default)]
pub(super) struct Poison(Mutex<Option<Remembered>>);

struct Remembered {
    kind: Kind,
    what: String,
    context: Context,
    advice: Option<Advice>,
}

impl Poison {
    pub fn check(&self) -> Result<()> {
        match &*self.0.lock().expect("no code panics with this lock") {
            None => Ok(()),
            Some(r) => Err(r.again()),
        }
    }

    /// Remembers the first error; hands back the one it was given.
    pub fn put(&self, error: Error) -> Error {
        let mut slot = self.0.lock().expect("no code panics with this lock");
        slot.get_or_insert_with(|| Remembered {
            kind: error.kind(),
            what: match std::error::Error::source(&error) {
                Some(cause) => format!("{}: {cause}", error.what()),
                None => error.what().to_owned(),
            },
            context: error.context().clone(),
            advice: error.advice().cloned(),
        });
        error
    }
}

impl Remembered {
    fn again(&self) -> Error {
        let mut e = Error::new(self.kind, self.what.clone());
        if let Some(advice) = &self.advice {
            e = e.advise(advice.clone());
        }
        let c = &self.context;
        if let Some(domain) = &c.domain {
            e = e.domain(domain);
        }
        if let Some(disk) = &c.disk {
            e = e.disk(disk);
        }
        if let Some(point) = &c.point {
            e = e.point(point);
        }
        if let Some(path) = &c.path {
            e = e.path(path);
        }
        if let Some(offset) = c.offset_bytes {
            e = e.offset(offset);
        }
        e
    }
}
