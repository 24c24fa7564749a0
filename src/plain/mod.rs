//! Plain images: files and block devices that are brought into step with one another, without libvirt and without a
//! store.
//!
//! The same engine as a run's: the digest tree finds what differs, the pump sends it as a patch, and whoever writes
//! checks every block and, before anything counts, the root. [`copy`] tells the story of one image, [`diff`] that of a
//! patch for later; [`target`] is an image on this host at the end of a patch, the agent's client one on another, and
//! both are a [`PlainTarget`].
//!
//! Invariants
//! - Nothing is overwritten unless the whole patch is known to be right and can be ended by a later run: it goes into a
//!   file beside the image that then takes its name, or the patch is first durable as a *redo file*. Only
//!   [`WayWish::InPlace`] gives that up, and says so.
//! - No image is read or written that a QEMU has open for writing: its locks are asked for every layer.
//! - Digests are believed of a file only if it is that file, untouched since they were made.
//!
//! Steps and their crashes: docs/plain.md.

mod beside;
pub mod changed;
pub mod copy;
pub mod diff;
pub mod identity;
mod incoming;
pub mod kept_digests;
pub mod merge;
pub mod patchfile;
mod reading;
pub mod redo;
pub mod source;
pub mod target;
pub mod tree;
mod undo;
mod write_target;

pub use beside::meta_of;

use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::engine::disk_target::DiskTarget;
use crate::error::{Error, Kind, Result};
use crate::image::Format;
use crate::image::foreign::format::AnyFormat;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// An image that a patch is for, here or on another host. Methods block.
///
/// First [`PlainTarget::read`], unless [`ImageView::root`] is known; then the patch, by the verbs of [`DiskTarget`];
/// then [`PlainTarget::commit`]. Whoever drops it before has changed nothing that counts, except in place.
pub trait PlainTarget: DiskTarget {
    /// What was found when it was opened.
    fn view(&self) -> Result<ImageView>;

    /// Reads the whole image and gives its root. `progress` gets (done, total) bytes. At once where the root is known.
    fn read(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Whole>;

    /// Puts what the patch brought into its place; without a patch only what `finish` asks for is done. Durable when it
    /// returns.
    fn commit(&self, finish: &Finish) -> Result<Committed>;
}

/// What is to become of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Absolute.
    pub path: PathBuf,
    /// Format of the image, as the operator says or its name implies.
    pub format: AnyFormat,
    /// Only to be compared with.
    #[serde(default)]
    pub read_only: bool,
    /// How an image that is there may be changed.
    #[serde(default)]
    pub way: WayWish,
    /// Directory of kept digests on the image's host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests: Option<PathBuf>,
    /// Size of what is to come. Of a block device only so much is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<DiskSize>,
    /// Read it although a QEMU may be writing to it. Never for writing.
    #[serde(default)]
    pub force_share: bool,
    /// What was cut short on its way into the image's place is thrown away, not gone on from. A patch that was made
    /// earlier is for the image that is there, and not for what something else had begun to make of it.
    #[serde(default)]
    pub afresh: bool,
}

/// How an image that is there is to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WayWish {
    /// The cheapest of those below that never leaves a torn image.
    #[default]
    Auto,
    /// A clone that shares the image's blocks takes its name.
    Reflink,
    /// A copy takes its name.
    Copy,
    /// The patch is kept whole beside the image, then applied to it.
    Redo,
    /// At once. Whatever cuts it short leaves a mixture of old and new.
    InPlace,
}

impl FromStr for WayWish {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(WayWish::Auto),
            "reflink" => Ok(WayWish::Reflink),
            "copy" => Ok(WayWish::Copy),
            "redo" => Ok(WayWish::Redo),
            _ => Err("it is auto, reflink, copy or redo".to_owned()),
        }
    }
}

/// How an image was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// It was not there.
    New,
    /// A patched clone that shares the image's blocks took its name.
    Reflink,
    /// A patched copy took its name.
    Copy,
    /// The patch was durable as a redo file, then applied in place.
    Redo,
    /// The patch was applied in place at once, without protection against a crash.
    InPlace,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::New => "as a new file",
            Way::Reflink => "on a clone that took its place",
            Way::Copy => "on a copy that took its place",
            Way::Redo => "in place, behind a redo file",
            Way::InPlace => "in place, unguarded",
        })
    }
}

/// An image as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageView {
    /// There is something to start from: the image, or what a copy that was cut short left of it.
    pub exists: bool,
    /// 0 where there is nothing.
    pub size: DiskSize,
    /// Its root, where kept digests tell it without reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<Digest>,
    /// A copy that was cut short goes on from what it left.
    #[serde(default)]
    pub resumes: bool,
    /// A redo file was found, and what it says was done.
    #[serde(default)]
    pub redone: bool,
    /// Why kept digests were not believed, where some were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests_reason: Option<String>,
}

/// What reading an image gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whole {
    /// Size of the image.
    pub size: DiskSize,
    /// Root of the image's digest tree.
    pub root: Digest,
    /// 0 where kept digests were believed.
    pub bytes_read: u64,
}

/// What is asked for beside the content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finish {
    /// Owner, mode and time that the file gets. `None`: they stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<FileMeta>,
}

/// Owner, mode and time of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMeta {
    /// User id of the owner.
    pub uid: u32,
    /// Group id of the owner.
    pub gid: u32,
    /// Permission bits only.
    pub mode: u32,
    /// Time of the last write, in seconds since the epoch.
    pub modified_s: i64,
    /// Nanoseconds of the time of the last write.
    pub modified_ns: i64,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// `None`: there was no patch.
    pub way: Option<Way>,
    /// Why digests were not kept, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests_reason: Option<String>,
}

/// The format that a file's name speaks of: qcow2 for `.qcow2` and `.qcow`, else raw. Its content is not asked: a guest
/// can make a raw image look like any other.
pub fn format_by_name(path: &Path) -> Format {
    match path.extension().and_then(|e| e.to_str()) {
        Some("qcow2" | "qcow") => Format::Qcow2,
        _ => Format::Raw,
    }
}

/// An absolute path with a file name.
pub(crate) fn file_name(path: &Path) -> Result<String> {
    match path.file_name().and_then(|n| n.to_str()) {
        Some(name) => Ok(name.to_owned()),
        None => Err(Error::new(Kind::Usage, "this is no name of a file").path(path)),
    }
}
