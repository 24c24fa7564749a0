//! What a guest that is brought up from a point writes to: a directory with an empty overlay for each disk, and a copy
//! of the UEFI variables. The point's images lie below and are only read (I20).

use super::bringup::Coming;
use super::definition::Definition;
use crate::durable::sync_dir;
use crate::error::{Error, Kind, Result};
use crate::file_id::Stamp;
use crate::hypervisor::machine::Machines;
use crate::image::{Format, Layer, qemu_img};
use crate::name::{DiskName, DomainUuid};
use crate::recovery::record::Copied;
use crate::replica::Attachment;
use crate::replica::upkeep::Held;
use crate::replicate::tracking::failover_bitmap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The overlays of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlays {
    /// Each disk of the point, with the absolute path of its overlay.
    pub disks: Vec<(DiskName, PathBuf)>,
    /// A copy of the point's UEFI variables, if it has any.
    pub nvram: Option<PathBuf>,
    /// The point has the state of a TPM; it does not lie here, but where libvirt looks for it.
    pub tpm: bool,
    /// Images that a disk may consist of, the overlay included; `None`: as many as there are.
    pub images_max: Option<u64>,
}

/// How many of the uppermost images below an overlay have to be in it themselves.
fn too_many(images: u64, images_max: Option<u64>) -> u64 {
    // One image and one overlay are the least that there can be.
    images_max.map_or(0, |max| (images + 1).saturating_sub(max.max(2)))
}

/// What would be copied for overlays on `held`. Touches nothing.
pub fn to_copy(held: &dyn Held, images_max: Option<u64>) -> Result<Copied> {
    let mut copied = Copied::default();
    for disk in &held.point().disks {
        let images = held.images(&disk.name)?;
        let deep = images.0.len() as u64;
        let many = too_many(deep, images_max);
        copied.deepest = copied.deepest.max(deep + 1);
        copied.images = copied.images.max(many);
        for layer in &images.0[..many as usize] {
            let at = |e| Error::io("cannot look at the point's image", &layer.path, e);
            copied.bytes += fs::metadata(&layer.path).map_err(at)?.blocks() * 512;
        }
    }
    Ok(copied)
}

/// Where what belongs to `held` lies, or will lie, in `dir`. Touches nothing.
pub fn named(held: &dyn Held, dir: &Path) -> Overlays {
    let point = held.point();
    let disks = point.disks.iter().map(|d| (d.name.clone(), dir.join(format!("{}.qcow2", d.name)))).collect();
    let nvram = point.attachments.contains(&Attachment::Nvram).then(|| dir.join(Attachment::Nvram.file_name()));
    let tpm = point.attachments.contains(&Attachment::Tpm);
    Overlays { disks, nvram, tpm, images_max: None }
}

/// The same of a point that is still to come.
pub fn to_come(coming: &Coming, dir: &Path) -> Overlays {
    let disks = coming.disks.iter().map(|disk| (disk.clone(), dir.join(format!("{disk}.qcow2")))).collect();
    let nvram = coming.nvram.then(|| dir.join(Attachment::Nvram.file_name()));
    Overlays { disks, nvram, tpm: coming.tpm, images_max: None }
}

/// Makes `dir`, which must not exist, with an empty overlay for each disk. Its names are durable when this returns.
pub fn make(held: &dyn Held, dir: &Path) -> Result<Overlays> {
    make_within(held, dir, None)
}

/// The same, and no disk consists of more images than these: what the uppermost ones below it hold is copied into an
/// overlay until it does not. That takes as long as it takes to copy it; what dies meanwhile is to be removed and
/// made anew.
pub fn make_within(held: &dyn Held, dir: &Path, images_max: Option<u64>) -> Result<Overlays> {
    // QEMU may run as a user of its own: it may enter, and does not get to know what else is there.
    let made = fs::DirBuilder::new().mode(0o711).create(dir);
    made.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(Kind::Conflict, "the directory for the overlays is there already").path(dir)
        }
        _ => Error::io("cannot make the directory for the overlays", dir, e),
    })?;
    let overlays = Overlays { images_max, ..named(held, dir) };
    for (disk, path) in &overlays.disks {
        create(held, disk, path, images_max)?;
    }
    if let Some(path) = &overlays.nvram {
        let content = held.attachment(Attachment::Nvram)?.unwrap_or_default();
        let mut file = fs::OpenOptions::new();
        let written = file.write(true).create_new(true).mode(0o600).open(path).and_then(|mut f| {
            use std::io::Write as _;
            f.write_all(&content)?;
            f.sync_all()
        });
        written.map_err(|e| Error::io("cannot write the UEFI variables", path, e))?;
    }
    sync_dir(dir)?;
    dir.parent().map_or(Ok(()), sync_dir).map(|()| overlays)
}

fn create(held: &dyn Held, disk: &DiskName, path: &Path, images_max: Option<u64>) -> Result<()> {
    let images = held.images(disk)?;
    let size = held.point().disk(disk).expect("it is named after it").size;
    let size = size.whole_sectors();
    qemu_img::create_overlay(path, images.top(), size).map_err(|e| e.disk(disk))?;
    match too_many(images.0.len() as u64, images_max) as usize {
        0 => Ok(()),
        many => qemu_img::take_over(path, &images.0[many]).map_err(|e| e.disk(disk)),
    }
}

/// Begins a dirty bitmap of ours on each of these overlays, which nobody has written to yet: it leads on from the point
/// (see [`failover_bitmap`]). Durable when it returns. Returns what is not tracked, in words: without it the way home
/// costs a comparison, and no more (I7). Such an overlay is made anew, so that nothing lies in it that a program died
/// over.
pub fn track(held: &dyn Held, overlays: &Overlays) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for (disk, path) in &overlays.disks {
        let root = held.point().disk(disk).expect("it is named after it").root;
        let layer = Layer { path: path.clone(), format: Format::Qcow2, block_device: false, data_file: None };
        if let Err(e) = qemu_img::add_bitmap(&layer, &failover_bitmap::name(&root, &layer)) {
            problems
                .push(format!("disk '{disk}': what is written here is not tracked from the beginning: {}", e.chain()));
            fs::remove_file(path).map_err(|e| Error::io("cannot remove the overlay", path, e))?;
            create(held, disk, path, overlays.images_max)?;
            path.parent().map_or(Ok(()), sync_dir)?;
        }
    }
    Ok(problems)
}

/// Gives the domain of this UUID, which is off, the state of a TPM that the point has. Durable when it returns.
pub fn bring_tpm(machines: &dyn Machines, held: &dyn Held, uuid: &DomainUuid, definition: &Definition) -> Result<()> {
    let Some(tpm) = &definition.tpm else { return Ok(()) };
    match held.attachment(Attachment::Tpm)? {
        Some(state) => machines.put_tpm(uuid, tpm.version, &state),
        None => Ok(()),
    }
}

/// Lets QEMU through to the images of the point, if it runs as a user of its own: directories of a store are closed to
/// others. To pass is all that it may; the files are given to it by libvirt, for as long as it runs.
pub fn let_qemu_pass(held: &dyn Held, qemu_uid: Option<u32>) -> Result<()> {
    if qemu_uid == Some(0) {
        return Ok(());
    }
    for disk in &held.point().disks {
        for layer in held.images(&disk.name)?.0 {
            // ROOT/replicas/UUID/points/POINT/DISK.qcow2
            for dir in layer.path.ancestors().skip(1).take(5) {
                let at = |e| Error::io("cannot let QEMU through to the point's images", dir, e);
                let mut mode = fs::metadata(dir).map_err(at)?.permissions();
                if mode.mode() & 0o001 == 0 {
                    mode.set_mode(mode.mode() | 0o001);
                    fs::set_permissions(dir, mode).map_err(at)?;
                }
            }
        }
    }
    Ok(())
}

/// Whether overlays in `dir`, where so many bytes are free, can take all that they have only by the point; of the disks
/// that are to be `raw`, a copy of all that they have. [`Kind::Space`] otherwise.
pub fn room_for_all(held: &dyn Held, dir: &Path, free_bytes: Option<u64>, raw: &[DiskName]) -> Result<()> {
    let mut needed = 0;
    for (disk, overlay) in held.point().disks.iter().zip(named(held, dir).disks) {
        let mut occupied = 0;
        if raw.contains(&disk.name) {
            occupied += fs::metadata(&overlay.1).map_or(0, |m| m.blocks() * 512);
        }
        for layer in held.images(&disk.name)?.0 {
            let at = |e| Error::io("cannot look at the point's image", &layer.path, e);
            occupied += fs::metadata(&layer.path).map_err(at)?.blocks() * 512;
        }
        // What lower images have may be hidden by upper ones; more than the disk it cannot be.
        needed += occupied.min(disk.size.0);
    }
    match free_bytes {
        Some(free) if free < needed => {
            let what =
                format!("{} MiB are free, and up to {} MiB would be copied", free >> 20, needed.div_ceil(1 << 20));
            Err(Error::new(Kind::Space, what).path(dir).hint("make room there first"))
        }
        _ => Ok(()),
    }
}

/// Removes `dir` and all in it; no error if it is not there. The caller answers for it that it is ours.
pub fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot remove the overlays", dir, e)),
        _ => Ok(()),
    }
}

/// How the images of a point stand: which files, how long, written when. Equal before and after: nobody has written.
pub fn stamps(held: &dyn Held) -> Result<Vec<Option<Stamp>>> {
    let mut stamps = Vec::new();
    for disk in &held.point().disks {
        for layer in held.images(&disk.name)?.0 {
            stamps.push(Stamp::of(&layer.path)?);
        }
    }
    Ok(stamps)
}
