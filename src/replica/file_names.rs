//! Every file name inside a replica's directory. Pure: ids in, names out.

use crate::name::{DiskName, PointId};

/// Directory of all replicas, below the root of a store.
pub const REPLICAS_DIR: &str = "replicas";
/// Name of the manifest in a replica's directory.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the writer's lock in a replica's directory: one writer at a time.
pub const LOCK_FILE: &str = "lock";
/// Directory in a replica's directory with one subdirectory for each point and link.
pub const POINTS_DIR: &str = "points";
/// Directory in a replica's directory with the digests of the head's disks.
pub const DIGESTS_DIR: &str = "digests";
/// Who uses which point.
pub const LEASES_DIR: &str = "leases";
/// Copies of disks that are in no point, by the names of their images.
pub const SEEDS_DIR: &str = "seeds";
/// Holds disk space for an open point; gone before it is sealed.
pub const RESERVATION_FILE: &str = "reservation";

/// Of a disk's image, in a point's directory.
pub fn image_file(disk: &DiskName) -> String {
    format!("{disk}.qcow2")
}

/// Of the list of blocks a point changed on a disk, in the point's directory.
pub fn changes_file(disk: &DiskName) -> String {
    format!("{disk}.changes")
}

/// Of the list that takes the place of [`changes_file`] when links were folded into the point.
pub fn folded_changes_file(disk: &DiskName) -> String {
    format!("{disk}.changes.new")
}

/// Of an image that is to take the place of [`image_file`] and stands alone, and of its list.
pub fn alone_image_file(disk: &DiskName) -> String {
    format!("{disk}.qcow2.alone")
}

/// Gives the name of the change list that goes with `alone_image_file`.
pub fn alone_changes_file(disk: &DiskName) -> String {
    format!("{disk}.changes.alone")
}

/// Of all blocks of a seed, in the directory of the open point that is built on it; gone before that is sealed.
pub fn seed_list_file(disk: &DiskName) -> String {
    format!("{disk}.seed")
}

/// Of what the patch changed of a seed, there too.
pub fn seed_patch_file(disk: &DiskName) -> String {
    format!("{disk}.patch")
}

/// Of the head's digests of a disk, in [`DIGESTS_DIR`].
pub fn digests_file(disk: &DiskName) -> String {
    format!("{disk}.tree")
}

/// What an overlay's header says of its backing image: relative, so that a replica may be moved as a whole.
pub fn backing_reference(backing: &PointId, disk: &DiskName) -> String {
    format!("../{backing}/{}", image_file(disk))
}
