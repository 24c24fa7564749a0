//! Images in formats of other hypervisors: which there are, how they are read, and how they are written.

pub mod format;
pub mod writer;
