//! What is known of a disk before a run is planned, beyond libvirt's view of it.

use crate::image::Chain;
use crate::name::DiskName;
use crate::replicate::tracking::bitmap_rotation::Tracked;

/// Where a disk's overlay would lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Tells the file system from others: overlays on the same one share its room.
    pub file_system: u64,
    /// Bytes that are free on the file system.
    pub free_bytes: u64,
    /// The image that the overlay is committed into lies on it too.
    pub beside_image: bool,
}

/// What was found out about a disk beyond libvirt's view; gathered by the caller, so that planning stays pure.
#[derive(Debug, Clone)]
pub struct DiskFacts {
    /// Name of the disk as the domain has it.
    pub name: DiskName,
    /// The chain to read: the live one, or for a domain that is off the resolved one; or why there is none.
    pub chain: Result<Chain, String>,
    /// Bytes the chain's images occupy, all together.
    pub allocated_bytes: u64,
    /// How the image will be read.
    pub reader: String,
    /// Where the overlay would lie; `None` if there is no such directory.
    pub overlay_room: Option<Room>,
    /// Whether the changes since the head are known.
    pub tracked: Tracked,
}
