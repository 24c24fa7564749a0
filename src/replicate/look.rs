//! The documents of a domain's journal, one by one and out of their directory: for a look at files from another host.
//! Pure; what is in them is told, never acted on.
//!
//! Format: docs/formats/journal.md.

use crate::error::{Error, Kind, Result};
use crate::name::Generation;

use crate::replicate::state::journal::{Holder, known_version};
use crate::replicate::state::record::{BackupRecord, OwedHook, Record, StoppedRecord};
use crate::replicate::state::report::Report;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::Path;

/// The file with the reports, one a line, and the one that it takes the place of.
pub const HISTORIES: [&str; 2] = ["history.old.jsonl", crate::replicate::state::history::HISTORY];

/// The documents of a domain's directory, in the order in which they are told.
pub const DOCUMENTS: [&str; 8] = [
    "lock",
    "record.json",
    "backup.json",
    "thaw.json",
    "after-freeze.json",
    "stopped.json",
    "generation.json",
    "last.json",
];

/// One document of a domain's directory.
#[derive(Debug, Clone)]
pub enum Document {
    /// Who works on the domain, or was the last to do so.
    Lock(Holder),
    /// The record of a run by overlay that is under way, or was cut short.
    Record(Record),
    /// The record of a run by backup that is under way, or was cut short.
    Backup(BackupRecord),
    /// The guest may hold its file systems.
    Thaw,
    /// The hook after the freeze that is still owed.
    Hook(OwedHook),
    /// The guest that QEMU stopped after an I/O error.
    Stopped(StoppedRecord),
    /// The generation that this host replicates the domain as.
    Generation(Generation),
    /// The report of the newest run.
    Report(Box<Report>),
}

/// Takes a document apart: by the name that it has in the journal or, under any other name, by the fields that it has.
/// `path` is for errors. `Corrupt` if it is none, or of a version that this program does not know.
pub fn document(path: &Path, json: &[u8]) -> Result<Document> {
    let none = |e: serde_json::Error| {
        // The line and column of the error name the place.
        Error::new(Kind::Corrupt, "this document of a journal cannot be understood").path(path).source(e)
    };
    let named = path.file_name().and_then(|name| name.to_str()).filter(|name| DOCUMENTS.contains(name));
    let name = match named {
        Some(name) => name,
        None => by_fields(&serde_json::from_slice(json).map_err(none)?).ok_or_else(|| {
            Error::new(Kind::Corrupt, "this is no document of a journal")
                .path(path)
                .hint("name a file of a domain's directory below STATE/domains, or that directory")
        })?,
    };
    fn read<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
        serde_json::from_slice(json)
    }
    let document = match name {
        "lock" => read(json).map(Document::Lock),
        "record.json" => read(json).map(Document::Record),
        "backup.json" => read(json).map(Document::Backup),
        "thaw.json" => Ok(Document::Thaw),
        "after-freeze.json" => read(json).map(Document::Hook),
        "stopped.json" => read(json).map(Document::Stopped),
        "generation.json" => read::<Raised>(json).map(|raised| Document::Generation(raised.generation)),
        _ => read(json).map(|report| Document::Report(Box::new(report))),
    };
    let document = document.map_err(none)?;
    match &document {
        Document::Record(record) => known_version(record.format, path)?,
        Document::Backup(record) => known_version(record.format, path)?,
        _ => {}
    }
    Ok(document)
}

#[derive(serde::Deserialize)]
struct Raised {
    generation: Generation,
}

/// The name of the document that has such fields.
fn by_fields(fields: &Map<String, Value>) -> Option<&'static str> {
    let has = |name: &str| fields.contains_key(name);
    match () {
        _ if has("phase") => Some("record.json"),
        _ if has("backup") => Some("backup.json"),
        _ if has("outcome") => Some("last.json"),
        _ if has("pid") => Some("lock"),
        _ if has("command") => Some("after-freeze.json"),
        _ if has("instance") => Some("stopped.json"),
        _ if has("generation") => Some("generation.json"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_known_by_its_name_or_by_its_fields() {
        let lock = br#"{"pid":7,"what":"sync","since":"2026-01-02T03:04:05Z"}"#;
        for name in ["/x/lock", "/x/lock of the second host"] {
            assert!(matches!(document(Path::new(name), lock), Ok(Document::Lock(holder)) if holder.pid == 7), "{name}");
        }
        assert!(matches!(document(Path::new("thaw.json"), b""), Ok(Document::Thaw)));
        for (name, json) in [("record.json", &b"{}"[..]), ("x", b"{}"), ("x", b"[]"), ("lock", b"\xff")] {
            assert_eq!(document(Path::new(name), json).unwrap_err().kind(), Kind::Corrupt, "{name}");
        }
    }
}
