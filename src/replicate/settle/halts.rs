//! A halt in words: why nothing was touched, and what an operator does next.

use super::decide::{Halt, HaltReason};
use crate::error::{Error, Kind};
use crate::file_id::Stamp;
use crate::replicate::state::record::Record;

/// What tells the recorded file from the one that is there, where that is why nothing is touched.
fn difference(record: &Record, halt: &Halt) -> String {
    let disk = record.disks.iter().find(|d| Some(&d.name) == halt.disk.as_ref());
    let Some(disk) = disk.filter(|_| halt.reason == HaltReason::OverlayReplaced) else { return String::new() };
    match (disk.overlay_id, Stamp::of(&disk.overlay)) {
        (Some(recorded), Ok(Some(now))) => format!(": the record names {recorded}, and here is {}", now.id),
        _ => String::new(),
    }
}

/// Explains a halt to the operator, as an error.
pub fn halt_error(record: &Record, halt: &Halt) -> Error {
    let (what, advice) = halt.reason.explain();
    let mut e =
        Error::new(Kind::Conflict, format!("{what}{}", difference(record, halt))).advise(advice).domain(&record.domain);
    if let Some(name) = &halt.disk {
        if let Some(disk) = record.disks.iter().find(|d| &d.name == name) {
            let path = if halt.reason == HaltReason::BaseTouched { &disk.base.path } else { &disk.overlay };
            e = e.path(path);
        }
        e = e.disk(name);
    }
    e
}
