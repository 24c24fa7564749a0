//! Commands for images of no domain: files and block devices that are brought into step.

pub(super) mod copy;
pub(super) mod copy_tree;
pub(super) mod digest;
pub(super) mod envelope;
pub(super) mod patch;
pub(super) mod shared;
