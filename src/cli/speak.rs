//! What the program says: results, messages, progress, the log, and how it is told to end.

pub(super) mod advice;
pub(super) mod logging;
pub(super) mod output;
pub(super) mod progress;
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub(super) mod render;
pub(super) mod signals;
