//! The manifest replaced: written aside, read back, renamed, synced.

use crate::error::{Error, Kind, Result};
use crate::replica::files::Dir;
use crate::replica::manifest::{self, MANIFEST_FILE, MANIFEST_MAX, Manifest};

/// Writes the manifest, of at most `bytes_max`, into a new file, synced, and gives its name: to be renamed to
/// [`MANIFEST_FILE`]. It is read back first: what this program could not read must never take the place of what it can.
pub(super) fn write_aside(dir: &Dir, manifest: &Manifest, bytes_max: usize) -> Result<&'static str> {
    let name = const { concat!("manifest.json", ".new") };
    let json = manifest.to_json()?;
    if json.len() > bytes_max {
        return Err(manifest::no_room());
    }
    dir.remove_all(name)?;
    dir.write_new(name, &json)?;
    let back = dir.read(name, MANIFEST_MAX)?.unwrap_or_default();
    let sound = match back == json {
        true => Manifest::parse_sound(&back).map(drop),
        false => Err(Error::new(Kind::Corrupt, "other bytes are read than were written")),
    };
    if let Err(e) = sound {
        dir.remove(name)?;
        let what = "the new manifest could not be read again; the old one stays, and nothing was changed";
        return Err(Error::new(Kind::Corrupt, what).path(dir.join(MANIFEST_FILE)).source(e));
    }
    Ok(name)
}

/// Replaces the manifest: what it says holds, durably, when this returns.
pub(super) fn publish(dir: &Dir, manifest: &Manifest) -> Result<()> {
    publish_within(dir, manifest, MANIFEST_MAX)
}

/// The same, of a manifest of at most so many bytes.
pub(super) fn publish_within(dir: &Dir, manifest: &Manifest, bytes_max: usize) -> Result<()> {
    let name = write_aside(dir, manifest, bytes_max)?;
    dir.rename(name, MANIFEST_FILE)?;
    dir.sync()
}
