//! Typed calls of `qemu-img`: looking at an image, checking it, committing an overlay offline, rebasing, comparing, and
//! its bitmaps.
//!
//! Images are described whole (see `blockdev`) with explicit formats, so that no header opens a file; output is parsed
//! from JSON and tolerantly, because its fields come and go with QEMU's versions. The program is `qemu-img`, or what
//! `QEMU_IMG` says. Every call blocks; those that only look have a deadline.

use super::blockdev::{self, Access};
use super::program::{self, Finished};
use super::qcow2::Header;
use super::{Chain, Format, Layer, raw};
use crate::block::{BLOCK_LEN, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::image::foreign::format::Foreign;
use serde::Deserialize;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Looking at metadata is a matter of milliseconds; storage that hangs is found out after this.
const LOOK_MAX: Duration = Duration::from_secs(60);

/// What `qemu-img info` says of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Size that the guest sees.
    pub virtual_size: DiskSize,
    /// Bytes the file occupies.
    pub actual_size_bytes: u64,
    /// Names as the header has them. A stranger's words: to be shown and compared, never opened.
    pub backing: Option<String>,
    /// Format of the backing image, as the header names it. `None`: the header names none.
    pub backing_format: Option<String>,
    /// Name of the external data file, as the header has it. `None`: the header names none.
    pub data_file: Option<String>,
    /// The image is encrypted, by QEMU's word or by the header.
    pub encrypted: bool,
    /// Names of internal snapshots.
    pub snapshots: Vec<String>,
    /// Persistent bitmaps of the image; empty for a format without any.
    pub bitmaps: Vec<BitmapInfo>,
    /// The image is marked as damaged, by QEMU's word or by the header.
    pub corrupt: bool,
    /// Not closed properly: refcounts (lazy ones) or bitmaps may lag behind.
    pub dirty: bool,
}

/// A persistent bitmap in a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BitmapInfo {
    /// Name of the bitmap, one of each name in an image.
    pub name: String,
    /// Bytes of the disk for one bit of the bitmap.
    #[serde(rename = "granularity")]
    pub granularity_bytes: u64,
    #[serde(default)]
    flags: Vec<String>,
}

impl BitmapInfo {
    /// Not saved properly: what it says is worth nothing.
    pub fn is_inconsistent(&self) -> bool {
        self.flags.iter().any(|f| f == "in-use")
    }

    /// Recording.
    pub fn is_auto(&self) -> bool {
        self.flags.iter().any(|f| f == "auto")
    }
}

/// What `qemu-img check` found.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Damaged places in the image's metadata that the check found.
    #[serde(default)]
    pub corruptions: u64,
    /// Clusters nobody refers to: lost room, not lost data.
    #[serde(default)]
    pub leaks: u64,
    /// Errors of the check itself.
    #[serde(default)]
    pub check_errors: u64,
}

impl CheckReport {
    /// Whether the image's data can be relied on; leaks do no harm to it.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }
}

/// Looks at one image. `force_share` takes no locks: a running QEMU may have it open for writing, and what is said may
/// be stale. Opens nothing but `path`, which is a file or a block device.
pub fn info(path: &Path, format: Format, force_share: bool) -> Result<ImageInfo> {
    let layer = layer_at(path, format)?;
    let header = header_of(&layer)?;
    let access = if force_share { Access::ReadUnlocked } else { Access::Read };
    let has_data_file = header.as_ref().is_some_and(Header::has_data_file);
    let mut command = qemu_img("info");
    command.arg("--output=json").arg("--").arg(blockdev::describe_alone(&layer, has_data_file, access)?);
    let done = program::run(command, Some(LOOK_MAX))?;
    succeeded(&done, "qemu-img cannot look at the image", path)?;
    parse_info(&done.stdout, header).map_err(|e| e.path(path))
}

/// Checks the structure of a qcow2 image; a raw image has none and is sound. Reads all metadata: no deadline.
pub fn check(path: &Path, format: Format) -> Result<CheckReport> {
    let layer = layer_at(path, format)?;
    let Some(header) = header_of(&layer)? else {
        return Ok(CheckReport { corruptions: 0, leaks: 0, check_errors: 0 });
    };
    let mut command = qemu_img("check");
    let image = blockdev::describe_alone(&layer, header.has_data_file(), Access::Read)?;
    command.arg("--output=json").arg("--").arg(image);
    let done = program::run(command, None)?;
    match done.status.code() {
        // 2: corruptions, 3: leaks only. They are findings, and are in the report.
        Some(0 | 2 | 3) => serde_json::from_slice(&done.stdout).map_err(|e| {
            Error::new(Kind::Protocol, "cannot read what qemu-img says of the check").path(path).source(e)
        }),
        _ => Err(done.error(Kind::Refused, "qemu-img cannot check the image").path(path)),
    }
}

/// Checks the structure of an image in a format of others; of one whose format has no check (vpc) nothing is found.
/// `held`: the caller has [`super::locks::QemuLock`], and QEMU's own locks are not asked. Reads all metadata: no
/// deadline.
pub(super) fn check_foreign(layer: &Layer, format: Foreign, held: bool) -> Result<CheckReport> {
    let access = if held { Access::ReadUnlocked } else { Access::Read };
    let mut command = qemu_img("check");
    command.arg("--output=json").arg("--").arg(blockdev::describe_foreign(layer, format, access)?);
    let done = program::run(command, None)?;
    match done.status.code() {
        Some(0 | 2 | 3) => serde_json::from_slice(&done.stdout).map_err(|e| {
            Error::new(Kind::Protocol, "cannot read what qemu-img says of the check").path(&layer.path).source(e)
        }),
        // The format has none.
        Some(63) => Ok(CheckReport { corruptions: 0, leaks: 0, check_errors: 0 }),
        _ => Err(done.error(Kind::Refused, "qemu-img cannot check the image").path(&layer.path)),
    }
}

/// Makes a new image in a format of others, empty, in QEMU's usual kind of it, of this very size if the format can have
/// it. What lies at `path`, a file, is emptied first. Not durable.
pub(super) fn create_foreign(path: &Path, format: Foreign, size: DiskSize) -> Result<()> {
    let mut command = qemu_img("create");
    command.args(["-q", "-f", format.as_str()]);
    // Else the size is rounded up to what cylinders, heads and sectors make.
    if format == Foreign::Vpc {
        command.args(["-o", "force_size=on"]);
    }
    command.arg("--").arg(path).arg(size.0.to_string());
    succeeded(&program::run(command, Some(LOOK_MAX))?, "qemu-img cannot make such an image", path)
}

/// Counts the clusters of a qcow2 image of our own anew, and writes down what is really in use. No guest data changes.
/// Durable when it returns; nobody else may have it open. No deadline.
pub fn repair(path: &Path) -> Result<()> {
    let layer = layer_at(path, Format::Qcow2)?;
    let mut command = qemu_img("check");
    command.args(["-q", "-r", "all", "--"]).arg(blockdev::describe_alone(&layer, false, Access::Write)?);
    let done = program::run(command, None)?;
    // 2 and 3: something is left that cannot be repaired; a check will say what.
    match done.status.code() {
        Some(0 | 2 | 3) => fsync(path),
        _ => Err(done.error(Kind::Refused, "qemu-img cannot repair the image").path(path)),
    }
}

/// Commits the uppermost layer of `chain` into the one below it, offline. Nobody else may have either open; QEMU's
/// locks keep other writers out, and readers of qcow2. The overlay is kept as it is; afterwards the two read the same.
///
/// Durable when it returns. A failed or killed commit leaves the layer below as a mixture that only the overlay
/// completes; repeating it is harmless. No deadline: it takes as long as the overlay is large.
pub fn commit(chain: &Chain) -> Result<()> {
    let [overlay, below, ..] = chain.0.as_slice() else {
        return Err(Error::new(Kind::Usage, "there is nothing below the image to commit into").path(&chain.top().path));
    };
    chain.0.iter().try_for_each(agrees_on_data_file)?;
    let mut command = qemu_img("commit");
    // -d: do not empty the overlay; until the caller has durably named the base, the overlay is what is valid.
    command.args(["-q", "-d", "--"]).arg(blockdev::describe(&chain.0, Access::Write)?);
    let done = program::run(command, None)?;
    succeeded(&done, "qemu-img cannot commit the overlay", &overlay.path)?;
    // A second opinion: the exit code says that it was done, the check that the result holds together.
    let report = check(&below.path, below.format)?;
    if !report.is_sound() {
        let what = format!("the image is damaged after the commit: {} corruptions", report.corruptions);
        return Err(Error::new(Kind::Corrupt, what).path(&below.path));
    }
    fsync(&below.path)?;
    below.data_file.as_deref().map_or(Ok(()), fsync)
}

/// Makes an empty qcow2 overlay on `base`, which may be in use, as libvirt's own snapshot would. It must not exist yet.
/// Not durable: an overlay that nothing was written to may be lost.
pub fn create_overlay(path: &Path, base: &Layer, size: DiskSize) -> Result<()> {
    let (backing, format) = (base.path.as_os_str(), base.format.as_str());
    let mut command = qemu_img("create");
    // -u: the base is not opened, whoever holds it.
    command.args(["-q", "-u", "-f", "qcow2", "-F", format, "-b"]).arg(backing).arg("--").arg(path);
    command.arg(size.0.to_string());
    succeeded(&program::run(command, Some(LOOK_MAX))?, "qemu-img cannot create the overlay", path)
}

/// Rewrites which backing image a qcow2 image names, and nothing else: the caller answers for it that the guest's data
/// stays the same. `None`: no backing image. Durable when it returns.
pub fn rebase_unsafe(path: &Path, backing: Option<(&str, Format)>) -> Result<()> {
    let layer = layer_at(path, Format::Qcow2)?;
    let header = header_of(&layer)?.expect("a qcow2 layer has a header");
    let mut command = qemu_img("rebase");
    command.args(["-q", "-u"]);
    match backing {
        Some((name, format)) => command.args(["-F", format.as_str(), "-b", name]),
        None => command.args(["-b", ""]),
    };
    command.arg("--").arg(blockdev::describe_alone(&layer, header.has_data_file(), Access::Write)?);
    let done = program::run(command, Some(LOOK_MAX))?;
    succeeded(&done, "qemu-img cannot rebase the image", path)?;
    let now = header_of(&layer)?.expect("a qcow2 layer has a header");
    if now.backing.as_deref() != backing.map(|(name, _)| name) {
        return Err(Error::new(Kind::Refused, "qemu-img rebased the image to something else").path(path));
    }
    fsync(path)
}

/// Copies what the uppermost layer of `chain` has only in those below it into it, so that it stands alone, offline.
/// Nobody else may have it open. No deadline: it takes as long as there is data.
///
/// Durable when it returns. One that failed or was killed leaves the image as a mixture: while its header names a
/// backing image, repeating it is harmless; if it names none any more, its tables may not be complete, and it has to be
/// given its backing image back ([`rebase_unsafe`]) before it is repeated.
pub fn stand_alone(chain: &Chain) -> Result<()> {
    chain.0.iter().try_for_each(agrees_on_data_file)?;
    let path = &chain.top().path;
    let mut command = qemu_img("rebase");
    command.args(["-q", "-b", "", "--"]).arg(blockdev::describe(&chain.0, Access::Write)?);
    succeeded(&program::run(command, None)?, "qemu-img cannot make the image stand alone", path)?;
    let now = header_of(chain.top())?.expect("only qcow2 has a backing image");
    match now.backing {
        None => fsync(path),
        Some(_) => Err(Error::new(Kind::Refused, "qemu-img left the image with its backing image").path(path)),
    }
}

/// Has an overlay of our own making lie on `below`, an image further down its chain, and copies what the images in
/// between hold into it: it reads the same afterwards. Reads no more than those. Nobody else may have it open. No
/// deadline: it takes as long as there is data. Durable when it returns; one that failed or was killed is to be made
/// anew.
pub fn take_over(overlay: &Path, below: &Layer) -> Result<()> {
    let mut command = qemu_img("rebase");
    // By their names, not described: only so qemu-img sees that `below` is part of the chain, and skips what lies in
    // it.
    command.args(["-q", "-f", "qcow2", "-F", below.format.as_str(), "-b"]).arg(&below.path).arg("--").arg(overlay);
    succeeded(&program::run(command, None)?, "qemu-img cannot copy the images in between", overlay)?;
    let now = header_of(&layer_at(overlay, Format::Qcow2)?)?.expect("a qcow2 layer has a header");
    if now.backing.as_deref() != below.path.to_str() {
        return Err(Error::new(Kind::Refused, "qemu-img left the overlay where it was").path(overlay));
    }
    fsync(overlay)
}

/// Copies what `chain` reads as into a new raw file, sparse where there are zeros. Whoever has the chain open for
/// writing is refused; the file is replaced. Durable when it returns, its name excepted. No deadline: it takes as long
/// as there is data.
pub fn to_raw(chain: &Chain, path: &Path) -> Result<()> {
    chain.0.iter().try_for_each(agrees_on_data_file)?;
    let mut command = qemu_img("convert");
    command.args(["-q", "-O", "raw", "--"]).arg(blockdev::describe(&chain.0, Access::Read)?).arg(path);
    succeeded(&program::run(command, None)?, "qemu-img cannot make a raw image of it", path)?;
    fsync(path)
}

/// Gives a qcow2 image without backing image, which nobody else has open, another size. What is beyond a smaller one is
/// gone; what a larger one has more reads as zeros. Durable when it returns.
pub fn resize(path: &Path, size: DiskSize) -> Result<()> {
    let layer = layer_at(path, Format::Qcow2)?;
    agrees_on_data_file(&layer)?;
    let mut command = qemu_img("resize");
    command.args(["-q", "--shrink", "--"]).arg(blockdev::describe(std::slice::from_ref(&layer), Access::Write)?);
    command.arg(size.0.to_string());
    succeeded(&program::run(command, Some(LOOK_MAX))?, "qemu-img cannot resize the image", path)?;
    fsync(path)
}

/// Whether two chains read the same; a longer one has to end in zeros. Reads both whole: no deadline.
pub fn compare(one: &Chain, other: &Chain) -> Result<bool> {
    one.0.iter().chain(&other.0).try_for_each(agrees_on_data_file)?;
    let mut command = qemu_img("compare");
    command.args(["-q", "--"]);
    command.arg(blockdev::describe(&one.0, Access::Read)?).arg(blockdev::describe(&other.0, Access::Read)?);
    let done = program::run(command, None)?;
    match done.status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(done.error(Kind::Refused, "qemu-img cannot compare the images").path(&one.top().path)),
    }
}

/// Whether a layer can keep a bitmap from one QEMU to the next: qcow2 from version 3 on. Reads the header.
pub fn keeps_bitmaps(layer: &Layer) -> Result<bool> {
    Ok(header_of(layer)?.is_some_and(|h| h.version >= 3))
}

/// Whether a qcow2 layer holds internal snapshots. Reads the header.
pub fn holds_snapshots(layer: &Layer) -> Result<bool> {
    Ok(header_of(layer)?.is_some_and(|h| h.snapshots != 0))
}

/// Adds an empty bitmap of one block a bit to an image that nobody has open; every QEMU that opens the image for
/// writing records in it from then on. `Refused` if a QEMU has the image, or the name is there. Durable when it
/// returns.
pub fn add_bitmap(layer: &Layer, name: &str) -> Result<()> {
    let granularity = BLOCK_LEN.to_string();
    edit_bitmap(layer, &["--add", "-g", &granularity], name, "qemu-img cannot add a dirty bitmap")
}

/// Removes a bitmap, a sound one or not, from an image that nobody has open. Durable when it returns.
pub fn remove_bitmap(layer: &Layer, name: &str) -> Result<()> {
    edit_bitmap(layer, &["--remove"], name, "qemu-img cannot remove a dirty bitmap")
}

fn edit_bitmap(layer: &Layer, verb: &[&str], name: &str, failed: &'static str) -> Result<()> {
    agrees_on_data_file(layer)?;
    let mut command = qemu_img("bitmap");
    // What lies below the image is not opened; its name stays in the header as it is.
    command.args(verb).arg("--").arg(blockdev::describe(std::slice::from_ref(layer), Access::Write)?).arg(name);
    let done = program::run(command, Some(LOOK_MAX))?;
    succeeded(&done, failed, &layer.path)?;
    fsync(&layer.path)
}

fn qemu_img(verb: &str) -> Command {
    let mut command = program::command("QEMU_IMG", "qemu-img");
    command.arg(verb);
    command
}

fn succeeded(done: &Finished, what: &'static str, path: &Path) -> Result<()> {
    if done.status.success() { Ok(()) } else { Err(done.error(Kind::Refused, what).path(path)) }
}

/// The layer at a path of which only the format is known.
fn layer_at(path: &Path, format: Format) -> Result<Layer> {
    use std::os::unix::fs::FileTypeExt;
    let kind = std::fs::metadata(path).map_err(|e| Error::io("cannot look at the image", path, e))?.file_type();
    Ok(Layer { path: path.to_owned(), format, block_device: kind.is_block_device(), data_file: None })
}

/// The header as we read it; none for raw.
fn header_of(layer: &Layer) -> Result<Option<Header>> {
    match layer.format {
        Format::Raw => Ok(None),
        Format::Qcow2 => Header::read(&raw::open_file(layer, false)?, &layer.path).map(Some),
    }
}

/// Refuses a layer whose header and chain disagree about an external data file: QEMU would follow the header.
fn agrees_on_data_file(layer: &Layer) -> Result<()> {
    let has = header_of(layer)?.is_some_and(|h| h.has_data_file());
    if has == layer.data_file.is_some() {
        return Ok(());
    }
    Err(Error::new(Kind::Conflict, "the image and the chain disagree about an external data file").path(&layer.path))
}

/// What was written of the image is durable when this returns.
pub fn fsync(path: &Path) -> Result<()> {
    std::fs::File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::io("cannot make the image durable", path, e))
}

/// Field names as QEMU has them; everything that is not always there has a default.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawInfo {
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    dirty_flag: bool,
    #[serde(default)]
    snapshots: Vec<RawSnapshot>,
    #[serde(default)]
    format_specific: RawSpecific,
}

#[derive(Deserialize)]
struct RawSnapshot {
    #[serde(default)]
    name: String,
}

#[derive(Deserialize, Default)]
struct RawSpecific {
    #[serde(default)]
    data: RawData,
}

#[derive(Deserialize, Default)]
struct RawData {
    #[serde(default)]
    corrupt: bool,
    #[serde(default)]
    bitmaps: Vec<BitmapInfo>,
}

/// Names come from the header as we read it ourselves; QEMU may show where they led it instead.
fn parse_info(stdout: &[u8], header: Option<Header>) -> Result<ImageInfo> {
    let raw: RawInfo = serde_json::from_slice(stdout)
        .map_err(|e| Error::new(Kind::Protocol, "cannot read what qemu-img says of the image").source(e))?;
    let dirty = header.as_ref().is_some_and(Header::is_dirty);
    let corrupt = header.as_ref().is_some_and(Header::is_corrupt);
    let encrypted = header.as_ref().is_some_and(|h| h.encrypted);
    let (backing, backing_format, data_file) =
        header.map(|h| (h.backing, h.backing_format, h.data_file)).unwrap_or_default();
    Ok(ImageInfo {
        virtual_size: DiskSize(raw.virtual_size),
        actual_size_bytes: raw.actual_size,
        backing,
        backing_format,
        data_file,
        encrypted: raw.encrypted || encrypted,
        snapshots: raw.snapshots.into_iter().map(|s| s.name).collect(),
        bitmaps: raw.format_specific.data.bitmaps,
        corrupt: raw.format_specific.data.corrupt || corrupt,
        dirty: raw.dirty_flag || dirty,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_passed_over_and_missing_ones_have_defaults() {
        let info =
            parse_info(br#"{"virtual-size": 512, "children": [{"name": "file"}], "new": {"x": 1}}"#, None).unwrap();
        assert_eq!(info.virtual_size, DiskSize(512));
        assert!(info.bitmaps.is_empty() && !info.corrupt && info.backing.is_none());
        assert_eq!(parse_info(b"{}", None).unwrap_err().kind(), Kind::Protocol);
        assert_eq!(parse_info(b"", None).unwrap_err().kind(), Kind::Protocol);
    }

    #[test]
    fn bitmaps_snapshots_and_flags_are_found() {
        let json = br#"{"virtual-size": 1024, "dirty-flag": true, "snapshots": [{"id": "1", "name": "s1"}],
            "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "corrupt": true, "bitmaps": [
                {"name": "b0", "granularity": 65536, "flags": ["auto"]},
                {"name": "b1", "granularity": 65536, "flags": ["in-use", "auto"]}]}}}"#;
        let info = parse_info(json, None).unwrap();
        assert_eq!(info.snapshots, ["s1"]);
        assert!(info.corrupt && info.dirty);
        assert!(info.bitmaps[0].is_auto() && !info.bitmaps[0].is_inconsistent());
        assert!(info.bitmaps[1].is_inconsistent());
    }

    #[test]
    fn leaks_are_not_damage() {
        let report: CheckReport =
            serde_json::from_str(r#"{"leaks": 3, "check-errors": 0, "format": "qcow2"}"#).unwrap();
        assert!(report.is_sound() && report.leaks == 3);
        let report: CheckReport = serde_json::from_str(r#"{"corruptions": 1, "check-errors": 0}"#).unwrap();
        assert!(!report.is_sound());
    }
}
