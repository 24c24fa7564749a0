//! Which parts of a disk changed since the head: the dirty bitmaps that say it, and the doubts about them.
//!
//! A bitmap is a hint, never a proof. Any doubt makes its disk, in this run, one that is compared by digest.

pub mod audit;
pub mod bitmap_rotation;
pub(super) mod dirty_ranges;
pub(super) mod end_of_disk;
pub mod failover_bitmap;
