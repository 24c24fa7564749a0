//! A generation that a peer drove too far: how it is refused, and how the operator of this host sets it right.
//!
//! Invariants
//! - A generation is never lower than 1 and never above [`Generation::MAX`]; one step of a peer is at most
//!   [`Generation::STEP_MAX`].
//! - Setting it changes generations alone: of the replica, and of points above it. It needs the writer's lock, and is
//!   durable.
//! - A manifest whose only fault are its generations can be set right, too: an earlier version could write one.

use super::files::Dir;
use super::lock::WriterLock;
use super::manifest::{MANIFEST_FILE, MANIFEST_MAX, REPLICAS_DIR};
use super::store::Store;
use crate::error::{Error, Kind, Result};
use crate::name::{DomainName, DomainUuid, Generation};
use crate::replica::manifest::set;
use crate::replica::manifest_file::publish;
use serde_json::Value;
use std::path::Path;

/// A replica of this host whose generation may be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// UUID of the replica's domain.
    pub uuid: DomainUuid,
    /// Name of the replica's domain, as its manifest has it.
    pub name: DomainName,
    /// As its manifest has it, which may be more than there are.
    pub generation: String,
}

/// The replicas of this name or UUID in the store at `root`, also those whose generations cannot be read.
pub fn find(root: &Path, wanted: &str) -> Result<Vec<Found>> {
    let Some(replicas) = Dir::open_root(root)?.map(|r| r.sub(REPLICAS_DIR)).transpose()?.flatten() else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for uuid in replicas.entries()?.into_iter().filter_map(|name| DomainUuid::new(name).ok()) {
        let Some(dir) = replicas.sub(uuid.as_str())? else { continue };
        let Some(json) = dir.read(MANIFEST_FILE, MANIFEST_MAX)? else { continue };
        let Ok(manifest) = set(&json, Generation(1)) else { continue };
        if manifest.uuid == uuid && (uuid.as_str() == wanted || manifest.name.as_str() == wanted) {
            let document: Value = serde_json::from_slice(&json).unwrap_or_default();
            let generation = document["generation"].to_string();
            found.push(Found { uuid, name: manifest.name, generation });
        }
    }
    Ok(found)
}

impl Store {
    /// Sets the replica's generation; points above it get this one. [`Kind::Busy`] while somebody writes to the
    /// replica. Durable when it returns.
    pub fn set_generation(&self, generation: Generation) -> Result<()> {
        if !(Generation(1)..=Generation::MAX).contains(&generation) {
            let what = format!("a generation is a number from 1 to {}", Generation::MAX);
            return Err(Error::new(Kind::Usage, what));
        }
        let missing = || Error::new(Kind::NotFound, "there is no replica of this domain").path(self.path());
        let dir = self.replica_dir()?.ok_or_else(missing)?;
        let _lock = WriterLock::take(&dir, None, (self.clock)())?;
        let json = dir.read(MANIFEST_FILE, MANIFEST_MAX)?.ok_or_else(missing)?;
        let manifest = set(&json, generation).map_err(|e| e.path(dir.join(MANIFEST_FILE)))?;
        publish(&dir, &manifest)
    }
}
