//! All that one domain has on one target, and the port to it. Near and far are the same trait: [`store`] is the
//! replica on this host, [`crate::agent::client`] the one on another, and the story of a run cannot tell them apart.
//!
//! A recovery point exists if and only if the manifest names it. An open point is rubbish until it is sealed.
//! Format: docs/formats/replica.md.

pub mod adopt;
pub mod age;
mod begin;
mod chain;
mod copy;
mod damage;
mod digests;
mod disk;
mod export;
mod file_names;
mod files;
mod fold;
pub mod generation;
mod head;
pub mod lag;
mod lease;
pub mod left_out;
mod lock;
pub mod look;
pub mod lookup;
pub mod manifest;
mod manifest_file;
mod point;
pub mod pointfile;
mod promote;
mod prune;
mod reading;
pub mod receive;
mod reserve;
pub mod root;
mod scrub;
mod seed;
pub mod serve_nbd;
mod shorten;
pub mod source;
pub mod store;
pub mod upkeep;
mod verify;

use self::left_out::LeftOut;
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::engine::disk_target::DiskTarget;
use crate::engine::stats::DiskStats;
use crate::error::Result;
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The replica of one domain. Methods block; any of them may fail with the connection, after which the state is
/// learned by [`Replica::describe`] of a new one (a lost acknowledgement is resolved by asking for the head, I14).
pub trait Replica: DiskTarget {
    /// What is there. Of a domain never replicated: no points, generation 1.
    fn describe(&self) -> Result<ReplicaView>;

    /// Says which source the points are of that are begun from now on. [`Kind::Conflict`](crate::error::Kind::Conflict)
    /// if the replica follows another one, and this one does not take over. Changes nothing before a point is sealed.
    /// What cannot tell sources apart accepts all of them.
    fn claim(&self, _: &source::Claim) -> Result<source::Claimed> {
        Ok(source::Claimed { how: source::How::Same, before: None })
    }

    /// Opens an unnamed point above the head, throwing away any earlier unsealed one, and reserves space.
    /// Refuses when the head is not `expected_head`, the generation is older, or the space is not there.
    /// Takes the replica's lock: one writer at a time.
    ///
    /// A disk that the head lacks may start from a seed, if `request` allows: it is read whole first, which takes its
    /// time.
    fn begin(&self, request: &BeginPoint) -> Result<Begun>;

    /// Adds a file (domain XML, NVRAM, TPM) to the open point; the whole content in one call, at most
    /// [`ATTACHMENT_MAX`].
    fn attach(&self, name: Attachment, content: &[u8]) -> Result<()>;

    /// Makes the open point exist, durably (I11): images and digests fsynced, then the manifest replaced.
    fn seal(&self, request: &SealPoint) -> Result<PointView>;

    /// Throws the open point away. Idempotent.
    fn abandon(&self) -> Result<()>;

    /// Re-reads a point's images and compares every block with its digest. `progress` gets (done, total) bytes.
    fn verify(&self, point: &PointId, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport>;
}

/// Largest attachment in bytes.
pub const ATTACHMENT_MAX: usize = 64 << 20;

/// State of a replica, as the target describes it to a source or an operator.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReplicaView {
    /// Generation of the replica. A source of a lower generation is refused.
    pub generation: Generation,
    /// Oldest first; the last one is the head.
    pub points: Vec<PointView>,
    /// Bytes an unprivileged writer may still write to the file system of the store.
    pub free_bytes: u64,
    /// Absolute path of the replica's directory on the target.
    pub path: PathBuf,
    /// An unsealed point left by a broken run, if any.
    pub open_point: Option<PointId>,
    /// Disks of which a copy is there that is in no point, with the bytes that it occupies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<(DiskName, u64)>,
    /// Disks of which the head reads what a scrub found damaged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<HeadDamage>,
    /// The domain was brought up on the target: no run is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promoted: Option<upkeep::Promoted>,
}

/// What a scrub found damaged of a disk, as far as the head reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadDamage {
    /// Name of the disk whose copy in the head is damaged.
    pub disk: DiskName,
    /// Bytes of blocks whose content is not what was sealed.
    pub bytes: u64,
    /// An image or a change list is damaged: there is nothing to compare with, the disk has to start anew.
    pub beyond_repair: bool,
}

impl ReplicaView {
    /// Gives the newest point. `None`: the domain has no point here.
    pub fn head(&self) -> Option<&PointView> {
        self.points.last()
    }
}

/// A sealed point. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PointView {
    /// Id of the point, unique in its replica.
    pub id: PointId,
    /// Generation that the source had when it made the point.
    pub generation: Generation,
    /// When the source's disks stood still, by the source's clock.
    pub frozen_at: Timestamp,
    /// When it began to exist, by the target's clock.
    pub sealed_at: Timestamp,
    /// What the point promises of the guest's file systems.
    pub consistency: Consistency,
    /// What is known beside that: why it is no more than this, or how a domain that is off came to be so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency_reason: Option<String>,
    /// Whether the domain started with its host. `None`: made by a program that did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
    /// What has written the state of the TPM. `None`: there is none, or its maker did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm_programs: Option<TpmPrograms>,
    /// Id of the run that made the point.
    pub run: RunId,
    /// Disks of the point, from 1 to 256.
    pub disks: Vec<PointDisk>,
    /// File names of the attachments, relative to the point's directory.
    #[serde(default)]
    pub attachments: Vec<Attachment>,
    /// Disks of the domain that are not in the point.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
}

impl PointView {
    /// From when its age counts: no clock that was ahead makes it younger.
    pub fn as_of(&self) -> Timestamp {
        lag::as_of(self.frozen_at, self.sealed_at)
    }

    /// Finds a disk of the point by its name. `None`: the disk is not in the point.
    pub fn disk(&self, name: &DiskName) -> Option<&PointDisk> {
        self.disks.iter().find(|d| &d.name == name)
    }
}

/// One disk of a sealed point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PointDisk {
    /// Name of the disk as the domain has it, for example `vda`.
    pub name: DiskName,
    /// In a view: the absolute path on the target of an image that any `qemu-img` can open.
    /// In the manifest: relative to the replica's directory.
    pub image: PathBuf,
    /// Virtual size of the disk in bytes, when the point was frozen.
    pub size: DiskSize,
    /// Root of the digest tree over the whole disk; binds the size.
    pub root: Digest,
    /// How the run read and sent the disk. In JSON its fields stand beside those of the disk.
    #[serde(flatten)]
    pub stats: DiskStats,
}

/// What a point promises of the state of the guest's file systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// As after a power cut, all disks at one instant.
    Crash,
    /// The guest agent had flushed and held the file systems.
    FileSystem,
    /// The domain was off, and nothing says that its guest did not shut down in order.
    Off,
}

/// Versions of the programs that emulate a TPM: only their like can read the state that they write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmPrograms {
    /// Version of swtpm at the source; at most 24 bytes are kept.
    pub swtpm: String,
    /// Version of libtpms at the source; at most 24 bytes are kept. `None`: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub libtpms: Option<String>,
}

impl TpmPrograms {
    /// Longest version that is kept, in bytes.
    const VERSION_MAX: usize = 24;

    /// Without what a stranger may have put there in the place of a version.
    pub fn bounded(&self) -> TpmPrograms {
        let cut = |text: &String| crate::error::printable(text, Self::VERSION_MAX);
        TpmPrograms { swtpm: cut(&self.swtpm), libtpms: self.libtpms.as_ref().map(cut) }
    }
}

/// Files a point carries beside its disks. A closed list: the peer names nothing (I21).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attachment {
    /// The persistent definition.
    InactiveXml,
    /// The definition of the running domain.
    LiveXml,
    /// UEFI variables.
    Nvram,
    /// State of an emulated TPM, as swtpm keeps it.
    Tpm,
    /// Which build of the UEFI firmware the source boots from.
    Firmware,
}

impl Attachment {
    /// Gives the name of the file in the point's directory.
    pub fn file_name(self) -> &'static str {
        match self {
            Attachment::InactiveXml => "domain.xml",
            Attachment::LiveXml => "domain-live.xml",
            Attachment::Nvram => "nvram.fd",
            Attachment::Tpm => "tpm.permall",
            Attachment::Firmware => "firmware.json",
        }
    }
}

/// Request to open a point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BeginPoint {
    /// UUID of the domain that is replicated.
    pub uuid: DomainUuid,
    /// Name of the domain; the manifest records it.
    pub name: DomainName,
    /// Id of the run that makes the point.
    pub run: RunId,
    /// Generation of the source. The target refuses it if the replica's is higher.
    pub generation: Generation,
    /// The point the patches start from; `None` for a first run.
    pub expected_head: Option<PointId>,
    /// Disks that the point will have. The seal must name exactly these.
    pub disks: Vec<BeginDisk>,
}

/// One disk of a point that is about to be opened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BeginDisk {
    /// Name of the disk as the domain has it.
    pub name: DiskName,
    /// Virtual size of the disk at the source, in bytes.
    pub size: DiskSize,
    /// Start from nothing even if the head has this disk.
    pub fresh: bool,
    /// Most bytes of guest data this run expects to write; reserved.
    pub reserve_bytes: u64,
    /// The run can start from a seed, if there is one and the head does not have this disk.
    #[serde(default)]
    pub resume: bool,
    /// The run compares the disk by digest: blocks that a scrub found damaged in the head are to look as if they
    /// differed, and to be written whether they do or not.
    #[serde(default)]
    pub repair: bool,
}

/// What a point was begun with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Begun {
    /// Disks that start from a seed: their patch leads on from it, and [`DiskTarget::nodes`] and [`DiskTarget::pieces`]
    /// answer for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<SeedView>,
}

/// A copy of a disk at the target that is in no point, as it was found when it was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedView {
    /// Name of the disk that the seed is a copy of.
    pub name: DiskName,
    /// Size of the disk in bytes. A seed of another size is not used, but thrown away.
    pub size: DiskSize,
    /// Root of the digest tree over the seed, as it was just read.
    pub root: Digest,
    /// Bytes of blocks that are not zero.
    pub data_bytes: u64,
}

/// Request to seal the open point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SealPoint {
    /// When the source's disks stood still, by the source's clock.
    pub frozen_at: Timestamp,
    /// What the point promises of the guest's file systems.
    pub consistency: Consistency,
    /// Why the consistency is no better, or how a domain that is off came to be so. `None`: nothing to add.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency_reason: Option<String>,
    /// Whether the domain started with its host. `None`: made by a program that did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
    /// What has written the state of the TPM. `None`: there is none, or it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm_programs: Option<TpmPrograms>,
    /// Exactly the disks of `begin`, each finished.
    pub disks: Vec<SealDisk>,
    /// Disks of the domain that are not in the point.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
}

/// One finished disk in a request to seal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SealDisk {
    /// Name of the disk, as in the request that opened the point.
    pub name: DiskName,
    /// What the source computed over the frozen image; must equal what the target has (I12).
    pub root: Digest,
    /// How the run read and sent the disk; the manifest keeps it.
    pub stats: DiskStats,
}

/// Result of `verify`: what was read of a point, and which blocks are damaged.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyReport {
    /// The point that was read.
    pub point: PointId,
    /// One entry for each disk of the point.
    pub disks: Vec<VerifyDisk>,
    /// Attachments whose content is not what was sealed, or is gone.
    #[serde(default)]
    pub damaged_attachments: Vec<Attachment>,
}

/// Result of `verify` for one disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyDisk {
    /// Name of the disk as the domain has it.
    pub name: DiskName,
    /// Bytes that were read from the images. Holes are not read.
    pub bytes_read: u64,
    /// Number of blocks of the whole disk, 64 KiB each.
    pub blocks: u64,
    /// First damaged blocks (at most 64), by number; empty when all is well.
    pub damaged: Vec<u64>,
    /// Number of all damaged blocks, also of those that `damaged` does not list.
    pub damaged_count: u64,
    /// Root over the bytes as read now, to compare with the manifest's.
    pub root: Digest,
    /// Root that the manifest has for the disk.
    pub root_expected: Digest,
}

impl VerifyReport {
    /// Says whether no block and no attachment is damaged and every root is as expected.
    pub fn is_whole(&self) -> bool {
        self.damaged_attachments.is_empty()
            && self.disks.iter().all(|d| d.damaged_count == 0 && d.root == d.root_expected)
    }
}

/// That the domain was brought up on the host of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promoted {
    /// Recovery point that the domain was brought up from. It is not removed while the promotion is in force.
    pub point: PointId,
    /// When the replica began to refuse its source, by the target's clock.
    pub since: Timestamp,
    /// It is not to be undone any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub committed: bool,
}
