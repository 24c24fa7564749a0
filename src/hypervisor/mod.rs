//! The port to libvirt: plain views of a domain, and the few verbs a run needs. Nothing here reads disk contents.
//!
//! Views are what was observed at one moment; decisions are made on them elsewhere, by pure functions.
//! Every verb blocks, at most its deadline; an error says what libvirt said. After
//! [`Unavailable`](crate::error::Kind::Unavailable) the verb may have taken effect, as the answer is missing: observe.
//! Any other error is a no.

pub mod backup;
#[cfg(feature = "libvirt")]
mod bitmap;
pub mod departure;
pub mod drill_network;
pub(crate) mod element;
pub mod firmware;
pub mod flatten;
pub mod guest;
#[cfg(feature = "libvirt")]
pub mod libvirt;
pub mod machine;
pub mod releases;
pub mod relocate;
#[cfg(feature = "libvirt")]
mod state;
pub mod stored_bitmaps;
pub mod swtpm;
pub mod travel;
#[cfg(feature = "libvirt")]
mod view;
pub mod volumes;
pub mod xml;

use self::backup::{Backup, BackupJob};
use crate::block::{ByteRange, DiskSize};
use crate::error::{Error, Result};
use crate::image::{Chain, Layer};
use crate::name::{DiskName, DomainName, DomainUuid};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The port to libvirt for a run: observe a domain, freeze it, commit, pivot and pause.
pub trait Hypervisor: Send + Sync {
    /// Looks a domain up by name, UUID or running id, and observes it.
    fn find(&self, name_uuid_or_id: &str) -> Result<DomainView>;

    /// Observes a domain again. `NotFound` when it is gone (a transient domain that ended, an undefined one).
    fn observe(&self, uuid: &DomainUuid) -> Result<DomainView>;

    /// As [`Hypervisor::observe`], but no disk has a size: cheap enough to be asked while the guest stands. For each
    /// size that is asked for, QEMU describes every image it has open.
    fn observe_without_sizes(&self, uuid: &DomainUuid) -> Result<DomainView>;

    /// Has libvirt look at the domain's emulator, if that changed since it did so last: it takes up to a minute,
    /// and the next change of the definition would wait for it. To be asked while no guest is held; cheap at all
    /// other times.
    fn warm_up(&self, uuid: &DomainUuid) -> Result<()>;

    /// The file of the UEFI firmware that a domain runs with, or would start with. `None`: it has none, or libvirt does
    /// not say.
    fn firmware(&self, uuid: &DomainUuid) -> Result<Option<PathBuf>>;

    /// All domains, for `status`.
    fn list(&self) -> Result<Vec<DomainView>>;

    /// Puts an overlay on every named disk in one transaction: from the moment inside the call when QEMU has switched,
    /// the former tops stand still. All disks or none. The overlay files must not exist, unless they are prepared: that
    /// makes the call shorter.
    fn freeze(&self, uuid: &DomainUuid, disks: &[FreezeDisk]) -> Result<()>;

    /// Starts committing `top` into `base` (its direct backing image). `active`: `top` is what the guest writes to,
    /// the job then becomes ready and waits for [`Hypervisor::pivot`]; otherwise it ends by itself.
    fn start_commit(&self, uuid: &DomainUuid, disk: &DiskName, top: &Path, base: &Path, active: bool) -> Result<()>;

    /// Waits until the disk's block job is ready or has ended, or the timeout passed; sooner is no error, callers
    /// observe again. Uses libvirt's events and asks in between, as an event can be lost with a connection.
    fn wait_job(&self, uuid: &DomainUuid, disk: &DiskName, timeout: Duration) -> Result<Option<BlockJob>>;

    /// Ends a ready active commit: the guest writes to the base from now on. Returns when libvirt has pivoted.
    fn pivot(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<()>;

    /// Cancels the disk's block job; the chain stays as it is.
    fn cancel_job(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<()>;

    /// Stops the vCPUs. No error if they stood already.
    fn pause(&self, uuid: &DomainUuid) -> Result<()>;

    /// Lets the vCPUs run. No error if they ran already.
    fn resume(&self, uuid: &DomainUuid) -> Result<()>;

    /// Stores (or with `None` removes) our record in the domain's `<metadata>`, live and persistent, as far as it has
    /// either. It survives libvirtd and QEMU and travels with a migration.
    fn set_record(&self, uuid: &DomainUuid, record: Option<&str>) -> Result<()>;

    /// Points the persistent definition of these disks at these layers. Live definition and running QEMU are untouched.
    fn redefine(&self, uuid: &DomainUuid, disks: &[(DiskName, Layer)]) -> Result<()>;

    /// Why the vCPUs of a running domain stand; `None` if they run, or no QEMU has the domain. Cheaper than
    /// [`Hypervisor::observe`], so that it can be asked every second.
    fn paused(&self, uuid: &DomainUuid) -> Result<Option<PauseReason>> {
        Ok(self.observe(uuid)?.paused)
    }

    /// Closes an image that the running QEMU has open for nothing: what a libvirtd leaves that dies inside a freeze.
    /// `Refused` if QEMU uses it; no error if it is not open.
    fn close_unused(&self, uuid: &DomainUuid, image: &Path) -> Result<()>;

    /// What may keep a running domain's overlay from being committed.
    fn confinement(&self, uuid: &DomainUuid) -> Result<Confinement>;

    /// The definition to keep with a point; `secure` includes secrets (graphics passwords). A disk that is named as a
    /// volume of a pool names its file: no other host has that pool.
    fn definition(&self, uuid: &DomainUuid, inactive: bool, secure: bool) -> Result<String>;
}

/// Dirty bitmaps: QEMU's own record of what the guest changed, in a running domain or in the images of one that is off
/// ([`stored_bitmaps`]). A bitmap is a hint (I7); whoever relies on one has looked at its state in the same run.
pub trait Tracking: Send + Sync {
    /// The bitmaps of each layer, in the order of `layers`; nothing for a layer that the running QEMU does not have, or
    /// that keeps none.
    fn bitmaps(&self, uuid: &DomainUuid, layers: &[Layer]) -> Result<Vec<Vec<BitmapView>>>;

    /// Adds an empty, recording bitmap of one block a bit to every layer, all or none. Persistent on qcow2, where it is
    /// saved with the image; elsewhere it lives as long as the QEMU process. A name that is there already is refused.
    fn add_bitmap(&self, uuid: &DomainUuid, layers: &[Layer], name: &str) -> Result<()>;

    /// Removes a bitmap; no error if it is not there.
    fn remove_bitmap(&self, uuid: &DomainUuid, layer: &Layer, name: &str) -> Result<()>;

    /// What each bitmap marks as changed, in order, within the layer's size. The layers must stand still (frozen, or
    /// off). Of a running domain it uses QEMU's one NBD server: `Refused` while another program does.
    fn dirty(&self, uuid: &DomainUuid, wanted: &[(Layer, String)]) -> Result<Vec<Vec<ByteRange>>>;
}

/// Backups in pull mode: QEMU serves the disks as they were at one moment, while the guest writes on ([`backup`]). One
/// job at a time for a domain, whoever began it.
pub trait Backups: Send + Sync {
    /// Where a backup of the running domain may serve its disks: QEMU may make a socket there, however it is confined.
    fn backup_socket(&self, uuid: &DomainUuid) -> Result<PathBuf>;

    /// Begins a job over all its disks: they are served as they were at one instant inside the call. All disks or none.
    /// The scratch files must not exist. Another program's job is an error, after libvirt's own wait (30 s).
    fn begin_backup(&self, uuid: &DomainUuid, backup: &Backup) -> Result<()>;

    /// The backup that runs, whoever began it.
    fn running_backup(&self, uuid: &DomainUuid) -> Result<BackupJob>;

    /// Ends this very job, and no other: if another one runs, or none, nothing is done. Returns when libvirt was told;
    /// the job may be ending still.
    fn end_backup(&self, uuid: &DomainUuid, backup: &Backup) -> Result<()>;

    /// What a bitmap marks as changed, within the layer's size, asked through the server of the running backup. The
    /// bitmap goes on recording: what was written since the begin is marked too.
    fn marked(&self, uuid: &DomainUuid, socket: &Path, layer: &Layer, bitmap: &str) -> Result<Vec<ByteRange>>;
}

/// How a running domain's QEMU is confined, as far as it decides about commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confinement {
    /// Major, minor, release of the libvirt that runs it.
    pub libvirt: (u32, u32, u32),
    /// By a profile of AppArmor that libvirt made.
    pub apparmor: bool,
}

impl Confinement {
    /// The first libvirt whose AppArmor profiles let a backing image be written to again.
    const COMMITS_UNDER_APPARMOR: (u32, u32, u32) = (12, 1, 0);

    /// Whether a domain that is started while a disk is on an overlay may not write to the image below it: its profile
    /// denies that, and a denial goes before whatever libvirt allows for the commit.
    pub fn denies_commits(&self) -> bool {
        self.apparmor && self.libvirt < Self::COMMITS_UNDER_APPARMOR
    }
}

/// Whether QEMU, or libvirt for it, was not allowed to open a file. Their words are all that tells.
pub fn is_denied(e: &Error) -> bool {
    e.chain().contains("Permission denied")
}

/// One bitmap as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapView {
    /// Name of the bitmap, one of each name in a layer.
    pub name: String,
    /// Bytes marked, in whole granules.
    pub dirty_bytes: u64,
    /// Bytes of the disk for one bit of the bitmap.
    pub granularity_bytes: u64,
    /// QEMU marks new writes in the bitmap.
    pub recording: bool,
    /// QEMU saves the bitmap in the qcow2 image when it closes it.
    pub persistent: bool,
    /// Not saved properly by an earlier QEMU: worth nothing.
    pub inconsistent: bool,
    /// In use by a block job or export.
    pub busy: bool,
}

/// One disk that gets an overlay.
#[derive(Debug, Clone)]
pub struct FreezeDisk {
    /// Name of the disk, for example vda.
    pub name: DiskName,
    /// Where the overlay is to lie. Absolute; ends in `.qcow2`.
    pub overlay: PathBuf,
    /// The image that the guest is to be writing to: `Busy`, and nothing is done, if it is another one by now.
    pub over: PathBuf,
    /// It is there already, empty, on the image that the guest writes to now. All disks of a freeze are alike in this.
    pub prepared: bool,
}

/// A domain, as libvirt and its QEMU showed it at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainView {
    /// Name of the domain. An operator may change it; the UUID stays.
    pub name: DomainName,
    /// UUID by which libvirt and the replicas know the domain.
    pub uuid: DomainUuid,
    /// libvirt's id of the running instance; changes with every start.
    pub id: Option<u32>,
    /// Whether the domain runs, is paused, or is off.
    pub power: Power,
    /// Of a domain that is off.
    pub ended: Ended,
    /// Why it is paused; `None` unless it is.
    pub paused: Option<PauseReason>,
    /// The domain has a definition that outlives its running instance. A transient domain has none.
    pub persistent: bool,
    /// A saved memory image that refers to the disks as they were.
    pub managed_save: bool,
    /// A live migration, save, dump or backup job runs on the domain: its kind in words.
    pub domain_job: Option<String>,
    /// In the order of the definition; live ones if it runs, else the persistent ones.
    pub disks: Vec<DiskView>,
    /// Our record in `<metadata>`, live or else persistent, as stored.
    pub record: Option<String>,
    /// UEFI variables file, if the domain has one of its own.
    pub nvram: Option<PathBuf>,
    /// State of its emulated TPM, if it has one and it is known where that lies.
    pub tpm: Option<PathBuf>,
    /// Guest agent channel configured and connected.
    pub guest_agent: bool,
}

impl DomainView {
    /// Disk of this name. `None`: the domain has none.
    pub fn disk(&self, name: &DiskName) -> Option<&DiskView> {
        self.disks.iter().find(|d| &d.name == name)
    }
}

/// State of a domain's vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// The vCPUs run.
    Running,
    /// vCPUs stand: by a user, by us, or after an I/O error. The domain has a QEMU.
    Paused,
    /// The domain has no QEMU.
    Off,
}

/// Why the vCPUs of a domain stand, by libvirt's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// QEMU stopped the guest, as it could not read or write an image.
    IoError,
    /// Somebody paused it: an operator, another program, or a run of ours.
    Asked,
    /// A save, a dump, a crash, sleep, or a reason that we do not know.
    Other,
}

/// One disk of a domain, as it was seen at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskView {
    /// Name of the disk, for example vda.
    pub name: DiskName,
    /// Whether the disk can be frozen, and if not why.
    pub kind: DiskKind,
    /// Chain of the running QEMU as libvirt reports it, uppermost first; `None` if it does not run.
    /// Of an unsupported kind: `None`.
    pub live: Option<Chain>,
    /// Image of the persistent definition; `None` for a transient domain, or if the disk is not in it.
    pub inactive: Option<Layer>,
    /// Size that the guest sees. `None`: the view was made without sizes, or the size is not known.
    pub size: Option<DiskSize>,
    /// Block job at work on the disk, by any program. `None`: there is none.
    pub job: Option<BlockJob>,
    /// Paths of layers that hold internal snapshots are not known here; the definition's own remarks are.
    pub read_only: bool,
    /// The definition says `<shareable/>`: several domains may write to the disk.
    pub shareable: bool,
}

/// What a disk is backed by, as far as it decides whether it can be replicated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskKind {
    /// A file or block device that can be frozen.
    Image,
    /// Something we do not replicate, and what it is, as a sentence part ("is a LUN", "lies on the network (rbd)").
    Unsupported(String),
    /// A drive for a medium that comes and goes, likewise ("is a cdrom").
    Removable(String),
}

impl DiskKind {
    /// Why it cannot be frozen, as a sentence part.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            DiskKind::Image => None,
            DiskKind::Unsupported(why) | DiskKind::Removable(why) => Some(why),
        }
    }
}

/// How libvirt says that a domain came to be off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ended {
    /// The guest shut down, or was asked to.
    ShutDown,
    /// Somebody ended it as a power cut does.
    Destroyed,
    /// Its QEMU died.
    Crashed,
    /// Its memory was saved: the guest is in the middle of its work.
    Saved,
    /// libvirt does not know: it was restarted since, or the last start failed, or the domain never ran.
    Unknown,
}

/// A block job of QEMU's, as it was seen at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockJob {
    /// Kind of the job, as far as it matters to a run.
    pub kind: BlockJobKind,
    /// Ready to pivot, by libvirt's own word (event, or mirror ready in the live XML), never by 100 %.
    pub ready: bool,
    /// Bytes that the job has done. 100 % does not mean that the job is ready.
    pub done_bytes: u64,
    /// Bytes that the job has to do. It may grow while the guest writes.
    pub total_bytes: u64,
}

/// Kind of a block job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockJobKind {
    /// A commit of the image that the guest writes to. It becomes ready and waits for a pivot.
    ActiveCommit,
    /// A commit of an image below the uppermost one. It ends by itself.
    Commit,
    /// Pull, copy, backup or something new: not ours.
    Other,
}
