//! A raw image of its own: the disk is copied to a raw file, then the guest moves over to that.
//!
//! Invariants
//! - Where both images are there, the overlay is the disk, until both definitions name the raw image. So between the
//!   move and the moment in which the overlay's name is durably gone (g2d) the guest runs nothing: an old image never
//!   comes back.
//! - The raw image is complete and durable before the guest moves: the copy keeps the two equal, the guest stands,
//!   fsync, move.
//! - The guest is held for nothing else, and a dead-man is armed first: whoever comes to it, `let_go` does the same.
//!
//! Steps: docs/recovery.md. `next` decides, and is pure.

use super::stopped;
use crate::block::DiskSize;
use crate::durable::sync_dir;
use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::hypervisor::relocate::{Place, Relocating};
use crate::hypervisor::{Power, xml};
use crate::image::locks::ReadLock;
use crate::image::{Chain, Format, Layer, qemu_img};
use crate::name::{DiskName, DomainUuid};
use crate::recovery::definition_of;
use crate::recovery::failover::{self, FailoverState};
use crate::recovery::record::{FailoverRecord, Moving, Stage};
use crate::replica::upkeep::Held;
use crate::replicate::settle::away::rename_durably;
use crate::replicate::state::handover_record::DiskFormat;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longer the guest is never held: a move takes a tenth of a second.
const HOLD_WITHIN: Duration = Duration::from_secs(10);

/// Pauses of the guest after which the move of one disk is left to the next command. QEMU may refuse it again and
/// again.
const MOVES_MAX: u32 = 10;
/// How long the guest runs at least between two of them, times their number.
const BETWEEN_MOVES: Duration = Duration::from_millis(100);

/// Which disks are to have a raw image: as is asked for, or as was when the domain was handed over. What was begun is
/// gone on with.
pub fn disks(record: &FailoverRecord, asked: Option<DiskFormat>, held: &dyn Held) -> Result<Vec<DiskName>> {
    let begun = record.stage != Stage::Committed;
    if begun && asked.is_none() {
        return Ok(record.raw.clone());
    }
    let all = held.point().disks.iter().map(|d| d.name.clone());
    let raw: Vec<DiskName> = match asked.unwrap_or(record.wanted.disk_format) {
        DiskFormat::Qcow2 => Vec::new(),
        DiskFormat::Raw => all.collect(),
        DiskFormat::Same => {
            let source = xml::parse(&definition_of(held)?)?;
            let was_raw = |disk: &DiskName| {
                source.disk(disk).and_then(|d| d.layers.first()).is_some_and(|layer| layer.format == Format::Raw)
            };
            all.filter(was_raw).collect()
        }
    };
    match begun && raw != record.raw {
        true => Err(Error::new(Kind::Conflict, "it was begun with images of another format")
            .advise(advice::Failover::DetachSameFormat)),
        false => Ok(raw),
    }
}

/// The names of a disk's images.
struct Files {
    dir: PathBuf,
    overlay: PathBuf,
    raw: PathBuf,
    /// The overlay, once it is nothing any more.
    old: PathBuf,
}

impl Files {
    fn of(record: &FailoverRecord, disk: &DiskName) -> Files {
        let dir = record.dir.clone();
        let named = |suffix: &str| dir.join(format!("{disk}.{suffix}"));
        Files { overlay: named("qcow2"), raw: named("raw"), old: named("qcow2.old"), dir }
    }

    fn layer(&self) -> Layer {
        Layer { path: self.raw.clone(), format: Format::Raw, block_device: false, data_file: None }
    }

    fn on(&self, image: Option<&Layer>) -> Option<On> {
        image.map(|image| match (&image.path, image.format) {
            (path, Format::Raw) if *path == self.raw => On::Raw,
            (path, Format::Qcow2) if *path == self.overlay => On::Overlay,
            _ => On::Other,
        })
    }

    fn has_overlay(&self) -> bool {
        fs::symlink_metadata(&self.overlay).is_ok()
    }

    /// The overlay's name is gone, durably, and with it all that was named before in the same directory is there.
    fn put_away(&self) -> Result<()> {
        match self.has_overlay() {
            true => rename_durably(&self.overlay, &self.old),
            false => sync_dir(&self.dir),
        }
    }

    /// An empty file of the disk's size. What was there is of a copy that did not come to its end.
    fn make_raw(&self) -> Result<()> {
        let DiskSize(size) = qemu_img::info(&self.overlay, Format::Qcow2, true)?.virtual_size;
        let cannot = |e| Error::io("cannot make the raw image", &self.raw, e);
        remove(&self.raw)?;
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create_new(true).open(&self.raw).map_err(cannot)?;
        file.set_len(size).map_err(cannot)
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot remove an old image", path, e)),
        _ => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    Overlay,
    Raw,
    Other,
}

/// A disk on its way to a raw image, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// What its guest writes to; `None`: it does not run.
    pub live: Option<On>,
    /// What it will be started on.
    pub inactive: Option<On>,
    /// The overlay has its name.
    pub overlay: bool,
    pub job: Job,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    None,
    /// A copy that is not ready, or a job of another kind.
    AtWork,
    /// Our copy.
    Ready,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Wait,
    /// Let QEMU copy.
    Copy,
    /// Hold the guest, and move it over.
    Move,
    /// Copy it here: the domain is off.
    Convert,
    /// The raw image is the disk, and the definition does not say so.
    Define,
    /// The raw image is the disk, and the overlay has its name still.
    PutAway,
    Done,
    /// The disk is on another image, or its definitions contradict each other.
    Strange,
}

/// Pure; the whole of it is walked through in a test.
pub(super) fn next(seen: Seen) -> Next {
    use On::{Overlay, Raw};
    match (seen.live, seen.inactive) {
        (Some(Overlay), Some(Overlay)) if seen.overlay => match seen.job {
            Job::None => Next::Copy,
            Job::AtWork => Next::Wait,
            Job::Ready => Next::Move,
        },
        (Some(Raw), Some(Overlay)) => Next::Define,
        (None, Some(Overlay)) if seen.overlay => Next::Convert,
        // The overlay gives up its name only after the raw image is the disk.
        (None, Some(Overlay)) => Next::Define,
        (Some(Raw) | None, Some(Raw)) if seen.overlay => Next::PutAway,
        (Some(Raw) | None, Some(Raw)) => Next::Done,
        _ => Next::Strange,
    }
}

/// Lets a guest go that a [`Moving`] may hold: first whatever it has moved to is made the only one, durably. Nothing is
/// done without one. For the driver and for its dead-man.
pub(super) fn let_go(relocating: &dyn Relocating, state: &FailoverState, record: &mut FailoverRecord) -> Result<()> {
    let Some(moving) = record.moving.clone() else { return Ok(()) };
    let (uuid, files) = (record.uuid.clone(), Files::of(record, &moving.disk));
    let place = relocating.place(&uuid, &moving.disk)?;
    if files.on(place.live.as_ref()) == Some(On::Raw) {
        if files.on(place.inactive.as_ref()) != Some(On::Raw) {
            relocating.define_on(&uuid, &moving.disk, &files.layer())?;
        }
        files.put_away()?;
    }
    failpoint!("g2d");
    if moving.resume && place.power != Power::Off {
        relocating.let_run(&uuid)?;
    }
    failpoint!("g2e");
    record.moving = None;
    state.write(record)
}

/// For the dead-man of a driver that is gone. [`Kind::Busy`] as long as another hand is on it.
pub fn release(relocating: &dyn Relocating, state: &Path, uuid: &DomainUuid) -> Result<()> {
    if failover::peek(state, uuid)?.is_none_or(|record| record.moving.is_none()) {
        return Ok(());
    }
    let held = FailoverState::open(state, uuid)?;
    match held.record()? {
        Some(mut record) => let_go(relocating, &held, &mut record),
        None => Ok(()),
    }
}

impl super::One<'_> {
    /// The disk's image is raw, stands alone, and is the only one, durably, when it returns.
    pub(super) fn become_raw(&mut self, chain: &Chain) -> Result<()> {
        let files = Files::of(self.record, self.disk);
        let (relocating, mut copied, mut moves) = (self.ports.relocating, 0, 0);
        loop {
            stopped(self.stop)?;
            let seen = self.look_at(&files)?.1;
            match next(seen) {
                Next::Wait => self.wait()?,
                Next::Copy => {
                    self.again(&mut copied, &files.raw)?;
                    files.make_raw()?;
                    relocating.begin_copy(&self.record.uuid, self.disk, &files.raw, self.rate_bytes)?;
                }
                Next::Move if moves == MOVES_MAX => {
                    let what = format!(
                        "QEMU has refused {moves} times to move the guest to the new image; it runs on the old one"
                    );
                    return Err(Error::new(Kind::Busy, what).path(&files.raw).advise(advice::Failover::DetachAgain));
                }
                Next::Move => {
                    std::thread::sleep(BETWEEN_MOVES * moves);
                    moves += 1;
                    self.move_over(&files)?;
                }
                Next::Convert => {
                    self.again(&mut copied, &files.raw)?;
                    convert(chain, &files)?;
                }
                Next::Define => relocating.define_on(&self.record.uuid, self.disk, &files.layer())?,
                Next::PutAway => files.put_away()?,
                Next::Done => return remove(&files.old),
                Next::Strange => {
                    tracing::warn!(disk = %self.disk, ?seen, "where the images of the disk are");
                    let what = "the disk is not where it was left";
                    return Err(Error::new(Kind::Conflict, what).path(&files.dir).hint(
                        "`virsh domblklist DOMAIN` and the same with --inactive: both have to name its image in this directory",
                    ));
                }
            }
        }
    }

    fn look_at(&self, files: &Files) -> Result<(Place, Seen)> {
        let place = self.ports.relocating.place(&self.record.uuid, self.disk)?;
        let ours = place.copy.as_ref().is_some_and(|copy| copy.ready && copy.to == files.raw);
        let job = match ours {
            true => Job::Ready,
            false if place.power == Power::Off => Job::None,
            false if self.ports.flattening.job(&self.record.uuid, self.disk)?.is_some() => Job::AtWork,
            false => Job::None,
        };
        let (live, inactive) = (files.on(place.live.as_ref()), files.on(place.inactive.as_ref()));
        Ok((place, Seen { live, inactive, overlay: files.has_overlay(), job }))
    }

    fn move_over(&mut self, files: &Files) -> Result<()> {
        let relocating = self.ports.relocating;
        let mut guard = (self.ports.guard)()?;
        let resume = relocating.place(&self.record.uuid, self.disk)?.power == Power::Running;
        self.record.moving = Some(Moving { disk: self.disk.clone(), resume });
        self.state.write(self.record)?;
        guard.arm(HOLD_WITHIN)?;
        failpoint!("g2a");
        relocating.hold(&self.record.uuid)?;
        failpoint!("g2b");
        let moved = self.move_held(files);
        failpoint!("g2c");
        // Whether or not it has moved.
        let_go(relocating, self.state, self.record)?;
        guard.disarm()?;
        moved
    }

    /// The guest stands, so the two are equal and stay so.
    fn move_held(&self, files: &Files) -> Result<()> {
        if next(self.look_at(files)?.1) != Next::Move {
            return Ok(());
        }
        qemu_img::fsync(&files.raw)?;
        sync_dir(&files.dir)?;
        match self.ports.relocating.move_over(&self.record.uuid, self.disk) {
            Err(e) if e.kind() == Kind::Busy => Ok(()),
            other => other,
        }
    }
}

/// Of a domain that is off, and that nobody starts meanwhile: as long as the lock is held QEMU does not open the
/// overlay, and then it does not find it.
fn convert(chain: &Chain, files: &Files) -> Result<()> {
    let busy = || Error::new(Kind::Busy, "the image is in use: was the domain started?").path(&files.overlay);
    let _lock = ReadLock::take(&files.overlay)?.ok_or_else(busy)?;
    qemu_img::to_raw(chain, &files.raw)?;
    files.put_away()
}

#[cfg(test)]
#[path = "raw_tests.rs"]
mod tests;
