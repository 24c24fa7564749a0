//! Who this source is: the machine, and this state directory.
//!
//! The id of the state directory is drawn once and kept in `STATE/source.json`. A host that was cloned together with
//! its state directory cannot be told from the original.
//!
//! Format: docs/formats/journal.md.

use crate::durable::{read_json, sync_dir, to_json};
use crate::error::{Error, Kind, Result};
use crate::name::{Fingerprint, HostLabel};
use crate::replica::source::SourceId;
use crate::replicate::state::locked_dir;
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::path::Path;

const FILE: &str = "source.json";

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    /// Version of this document: 1.
    format: u32,
    id: Fingerprint,
}

/// Facts of this host, as the system tells them.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Name of the host, as the kernel tells it; empty if it cannot be read.
    pub hostname: String,
    /// Content of `/etc/machine-id`; empty if it cannot be read. Only a hash of it leaves the host.
    pub machine_id: String,
}

impl Machine {
    /// Reads the facts of this host. Never fails: a fact that cannot be read is empty.
    pub fn here() -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
        let machine_id = read("/etc/machine-id").or_else(|| read("/var/lib/dbus/machine-id"));
        Machine {
            hostname: read("/proc/sys/kernel/hostname").unwrap_or_default(),
            machine_id: machine_id.unwrap_or_default(),
        }
    }
}

/// This source. `fresh`: the id that a state directory gets which has none. With `keep` it is durable when this
/// returns; without, nothing is written.
pub fn source(state: &Path, machine: &Machine, fresh: u128, keep: bool) -> Result<SourceId> {
    // systemd asks that the machine id itself is not shown to others.
    let machine_hash = blake3::derive_key("virt-replica source machine v1", machine.machine_id.as_bytes());
    let hex = blake3::Hash::from(machine_hash).to_hex();
    Ok(SourceId {
        host: HostLabel::new(machine.hostname.clone()).or_else(|_| HostLabel::new("unknown"))?,
        machine: Fingerprint::new(&hex[..32])?,
        state: state_id(state, fresh, keep)?,
    })
}

fn state_id(state: &Path, fresh: u128, keep: bool) -> Result<Fingerprint> {
    let path = state.join(FILE);
    if let Some(id) = stored(&path)? {
        return Ok(id);
    }
    if !keep {
        return Ok(Fingerprint::from_bits(fresh));
    }
    locked_dir::make(state)?;
    let fail = |e: std::io::Error| Error::io("cannot write the id of the state directory", &path, e);
    let mut temp = tempfile::Builder::new().prefix(".new-").tempfile_in(state).map_err(fail)?;
    let document = Stored { format: 1, id: Fingerprint::from_bits(fresh) };
    temp.write_all(&to_json(&document)).map_err(fail)?;
    temp.as_file().sync_all().map_err(fail)?;
    // Two first runs at once: the one that comes second takes the id of the first.
    match temp.persist_noclobber(&path) {
        Ok(_) => {}
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(fail(e.error)),
    }
    sync_dir(state)?;
    stored(&path)?.ok_or_else(|| Error::new(Kind::Io, "the id of the state directory vanished").path(&path))
}

fn stored(path: &Path) -> Result<Option<Fingerprint>> {
    match read_json::<Stored>(path)? {
        None => Ok(None),
        Some(Stored { format: 1, id }) => Ok(Some(id)),
        Some(Stored { format, .. }) => {
            let what = format!("the state directory's id has version {format}, this program reads version 1");
            Err(Error::new(Kind::Protocol, what).path(path).hint("use the version of virt-replica that wrote it"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_keeps_its_id_and_another_has_another() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let machine = |id: &str| Machine { hostname: "a.example".into(), machine_id: id.into() };
        let made = one.path().join("made");
        source(&made, &machine("m1"), 9, false).unwrap();
        assert!(!made.exists(), "a plan leaves nothing behind");
        let first = source(&made, &machine("m1"), 1, true).unwrap();
        assert_eq!(source(&made, &machine("m1"), 2, true).unwrap(), first);
        assert_eq!(source(&made, &machine("m1"), 2, false).unwrap(), first);
        assert_ne!(source(two.path(), &machine("m1"), 2, true).unwrap().state, first.state);
        assert_ne!(source(&made, &machine("m2"), 2, true).unwrap().machine, first.machine);
        assert!(!first.machine.as_str().contains("m1"));
        let odd = Machine { hostname: "\u{1b}[31m".into(), machine_id: String::new() };
        assert_eq!(source(two.path(), &odd, 3, true).unwrap().host.as_str(), "unknown");
    }
}
