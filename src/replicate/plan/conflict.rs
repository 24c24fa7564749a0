//! Why a run must not begin: the facts, their kind and the way out.

use crate::error::Kind;
use crate::error::advice::{self, Advice};
use crate::name::{DiskName, Generation};
use crate::replica::upkeep::Promoted;
use serde::Serialize;
use std::path::PathBuf;

/// Why a run must not begin; the facts, not a sentence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "conflict")]
pub enum Conflict {
    /// Another block job runs on a disk.
    BlockJob {
        /// Name of the disk that the other job works on.
        disk: DiskName,
    },
    /// A migration, save, dump or backup runs on the domain.
    DomainJob {
        /// What runs on the domain, as part of a sentence.
        job: String,
    },
    /// The running domain and its definition name different images.
    DefinitionDiffers {
        /// Name of the disk whose images differ.
        disk: DiskName,
        /// Image that the running domain writes to.
        live: PathBuf,
        /// Image that the persistent definition names.
        defined: PathBuf,
    },
    /// An overlay of ours without a record: an earlier run's state directory was lost.
    StrayOverlay {
        /// Name of the disk that stands on the overlay.
        disk: DiskName,
        /// Path of the overlay; no record on this host knows it.
        overlay: PathBuf,
    },
    /// Something was begun with the domain and could not be ended.
    Unsettled {
        /// What was found and could not be ended, in words.
        what: String,
    },
    /// The replica belongs to a later direction of replication than this host knows.
    Promoted {
        /// Generation that this host knows for the domain.
        ours: Generation,
        /// Generation of the replica; it is higher.
        theirs: Generation,
    },
    /// The domain was brought up on the target.
    BroughtUp {
        /// The promotion at the target: its point, its time, and whether it is committed.
        promoted: Promoted,
    },
    /// No disk is left to replicate.
    NoDisks,
    /// An image's size is not known: libvirt cannot look at it.
    SizeUnknown {
        /// Name of the disk whose size libvirt does not tell.
        disk: DiskName,
    },
    /// The overlays of a file system would have no room to grow: this disk's, and others beside it.
    NoOverlaySpace {
        /// First disk whose overlay would lie on the file system that is too small.
        disk: DiskName,
        /// Directory for that disk's overlay.
        dir: PathBuf,
        /// Bytes that are free on the file system now.
        free_bytes: u64,
        /// Bytes that all overlays on the file system and their commits are expected to need.
        growth_bytes: u64,
        /// Bytes that must stay free there in any case.
        floor_bytes: u64,
        /// Seconds that the disks are expected to stand still.
        hold_s: u64,
    },
    /// A block device's overlay needs a directory that is not there.
    NoOverlayDir {
        /// Name of the disk whose overlay has no directory.
        disk: DiskName,
        /// The directory that does not exist.
        dir: PathBuf,
    },
    /// The target has less room than this run may need.
    NoTargetSpace {
        /// Bytes that an unprivileged writer may still write to the file system of the store.
        free_bytes: u64,
        /// Most bytes that the run may write at the target, all disks together.
        needed_bytes: u64,
    },
    /// The guest's file systems are to be held, and cannot be.
    CannotQuiesce {
        /// Why the guest's file systems cannot be held, for example that no guest agent is connected.
        why: String,
    },
    /// This process may not do what the run needs, or a name is too long.
    Hindered(Hindrance),
    /// An image cannot be read, and why.
    Unreadable {
        /// Name of the disk whose image cannot be read.
        disk: DiskName,
        /// Why the image cannot be read, in words.
        why: String,
    },
}

impl Conflict {
    /// Gives the disk that the conflict is about. `None`: it is about the domain, the replica or the target.
    pub fn disk(&self) -> Option<&DiskName> {
        match self {
            Conflict::BlockJob { disk }
            | Conflict::DefinitionDiffers { disk, .. }
            | Conflict::StrayOverlay { disk, .. }
            | Conflict::SizeUnknown { disk }
            | Conflict::NoOverlaySpace { disk, .. }
            | Conflict::NoOverlayDir { disk, .. }
            | Conflict::Hindered(Hindrance { disk, .. })
            | Conflict::Unreadable { disk, .. } => Some(disk),
            _ => None,
        }
    }

    /// Gives the kind of error that a run with this conflict ends with; it decides the exit code.
    pub fn kind(&self) -> Kind {
        match self {
            Conflict::BlockJob { .. } | Conflict::DomainJob { .. } => Kind::Busy,
            Conflict::NoOverlaySpace { .. } | Conflict::NoTargetSpace { .. } => Kind::Space,
            Conflict::NoOverlayDir { .. } => Kind::Usage,
            Conflict::CannotQuiesce { .. } => Kind::Refused,
            _ => Kind::Conflict,
        }
    }

    /// What to do about it.
    pub fn advice(&self) -> Advice {
        match self {
            Conflict::BlockJob { disk } => format!("let it finish, or end it: virsh blockjob DOMAIN {disk} --info").into(),
            Conflict::DomainJob { .. } => "wait until it has ended (virsh domjobinfo DOMAIN), then run again".into(),
            Conflict::DefinitionDiffers { .. } => {
                "make the definition name the image the domain runs on (virsh edit), or restart the domain from its definition".into()
            }
            Conflict::StrayOverlay { disk, .. } => format!(
                "commit it: virsh blockcommit DOMAIN {disk} --active --shallow --pivot --wait; then delete the file"
            )
            .into(),
            Conflict::Unsettled { .. } => advice::Repair::Explain.into(),
            Conflict::Promoted { .. } => advice::TakeOver::IfMovedHere.into(),
            Conflict::BroughtUp { promoted } => promoted.advice(),
            Conflict::NoDisks => "see the reasons of the skipped disks".into(),
            Conflict::SizeUnknown { .. } => "check that libvirt can open the image: virsh domblkinfo DOMAIN DISK".into(),
            Conflict::NoOverlaySpace { .. } => advice::Overlay::MakeRoom.into(),
            Conflict::NoOverlayDir { .. } => advice::Overlay::NeedsDirectory.into(),
            Conflict::NoTargetSpace { .. } => "free space at the target, or choose a store on another file system".into(),
            Conflict::CannotQuiesce { .. } => advice::Run::InstallGuestAgent.into(),
            Conflict::Hindered(hindrance) => hindrance.advice.clone(),
            Conflict::Unreadable { .. } => advice::Run::ExcludeDisk.into(),
        }
    }
}

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Conflict::BlockJob { .. } => write!(f, "another block job runs on it"),
            Conflict::DomainJob { job } => write!(f, "{job} runs on the domain"),
            Conflict::DefinitionDiffers { live, defined, .. } => {
                write!(f, "the domain runs on {} while its definition names {}", live.display(), defined.display())
            }
            Conflict::StrayOverlay { overlay, .. } => {
                write!(f, "it is on {}, an overlay of virt-replica that this host has no record of", overlay.display())
            }
            Conflict::Unsettled { what } => write!(f, "an earlier run could not be settled: {what}"),
            Conflict::BroughtUp { promoted } => f.write_str(&promoted.why()),
            Conflict::Promoted { ours, theirs } => {
                write!(f, "the replica has generation {theirs}, this host only knows generation {ours}")
            }
            Conflict::NoDisks => write!(f, "no disk is left to replicate"),
            Conflict::SizeUnknown { .. } => write!(f, "its size is not known"),
            Conflict::NoOverlaySpace { dir, free_bytes, growth_bytes, floor_bytes, hold_s, .. } => write!(
                f,
                "what the guest writes meanwhile would go to {}, where {} MiB are free: in the {hold_s} s that the run may take \
                 it needs about {} MiB, and {} MiB are to stay free",
                dir.display(),
                free_bytes >> 20,
                growth_bytes.div_ceil(1 << 20),
                floor_bytes.div_ceil(1 << 20)
            ),
            Conflict::NoOverlayDir { dir, .. } => {
                write!(
                    f,
                    "it is a block device, and the directory for what is written meanwhile, {}, is not there",
                    dir.display()
                )
            }
            Conflict::NoTargetSpace { free_bytes, needed_bytes } => write!(
                f,
                "the run may write {} MiB at the target, where {} MiB are free",
                needed_bytes >> 20,
                free_bytes >> 20
            ),
            Conflict::CannotQuiesce { why } => write!(f, "the guest's file systems cannot be held: {why}"),
            Conflict::Hindered(hindrance) => f.write_str(&hindrance.why),
            Conflict::Unreadable { why, .. } => write!(f, "its image cannot be read: {why}"),
        }
    }
}

/// A right that is missing, or a name that the file system does not take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hindrance {
    /// Name of the disk whose overlay or scratch file is affected.
    pub disk: DiskName,
    /// Directory in which the overlay or scratch file would lie.
    pub path: PathBuf,
    /// A sentence.
    pub why: String,
    /// What the operator should do.
    #[serde(skip)]
    pub advice: Advice,
}
