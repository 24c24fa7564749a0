//! The story of one copy: both ends are read at once, what differs is sent as a patch, and the patch is put in place.
//!
//! Which blocks are read, and how often: with kept digests at the target, or nothing there, the source is read once and
//! the target not at all. Otherwise both ends hash what they have at the same time, equal roots end it, and only blocks
//! that differ are read again. A change list from elsewhere replaces the reading of the source.

use super::source::{Hashed, Source, hash};
use super::{Finish, PlainTarget, Way};
use crate::block::digest::Digest;
use crate::block::{BLOCK_LEN, ByteRange, DiskSize};
use crate::engine::disk_target::DiskTarget;
use crate::engine::find::{Found, Remembered, differing};
use crate::engine::pump::{self, KeepGoing, Progress, Shipment};
use crate::engine::stats::{CompressionStats, Mode};
use crate::engine::throttle::Throttle;
use crate::error::Result;
use crate::patch::{Compression, plain_names};
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Least number of threads where a question is asked of the target for each group: most of them wait for an answer.
const ASKING: usize = 6;

/// What is to be copied, and how.
pub struct Copy<'a> {
    /// Image to copy, open for reading.
    pub source: &'a Source,
    /// Image that gets the content, on this host or on another.
    pub target: &'a dyn PlainTarget,
    /// The only ranges that may differ from the target, ascending, without overlap; believed.
    pub changed: Option<Vec<ByteRange>>,
    /// Owner, mode and time that the target gets beside the content.
    pub finish: Finish,
    /// Say what would be sent, and change nothing.
    pub dry_run: bool,
    /// Threads, compression and rate of the patch.
    pub sending: Sending,
}

/// How a patch is made and sent.
#[derive(Debug, Clone)]
pub struct Sending {
    /// Threads that read, hash and compress.
    pub workers: usize,
    /// How the content is compressed before it is sent.
    pub compression: Compression,
    /// How fast; `None`: as fast as it goes.
    pub throttle: Option<Arc<Throttle>>,
}

/// What a copy did, or would do. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct Copied {
    /// Size of the source, and of the target afterwards.
    pub size: DiskSize,
    /// 0 where there was nothing.
    pub size_before: DiskSize,
    /// Root of the source as it was read; absent of a copy that was only thought through and need not read it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<Digest>,
    /// Source and target were equal: nothing was sent.
    pub equal: bool,
    /// How the differences were found.
    pub mode: Mode,
    /// Why it was read in this way, as a sentence.
    pub reason: String,
    /// How the target was changed; absent if it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way: Option<Way>,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes read from the target to learn its digests.
    pub bytes_read_target: u64,
    /// Bytes of patch.
    pub bytes_sent: u64,
    /// Bytes of content written at the target; 0 in a dry run.
    pub bytes_written: u64,
    /// Blocks that differed, zeroed ones included.
    pub blocks_changed: u64,
    /// Which way the content was sent; absent where that was said and not tried, and where nothing was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionStats>,
    /// It went on from what a copy that was cut short had left.
    pub resumed: bool,
    /// Before anything else, a change that was cut short was ended.
    pub redone: bool,
    /// Why kept digests were not believed or not kept, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub digests_reasons: Vec<String>,
}

/// How the two ends are compared.
pub(super) struct Comparison {
    pub(super) shipment: Shipment,
    pub(super) bytes_read_target: u64,
    /// The source's root where it was hashed: it must come out again.
    pub(super) root: Option<Digest>,
    /// What the target said of itself where both were hashed.
    found: Found,
}

impl Comparison {
    pub(super) fn is_equal(&self) -> bool {
        self.root.is_some() && self.root == self.shipment.head.map(|(_, root)| root)
    }
}

/// Decides how to compare, and reads what that needs. Blocks.
pub(super) fn compare(
    source: &Source,
    target: &dyn PlainTarget,
    changed: Option<&[ByteRange]>,
    sending: &Sending,
    progress: &Progress,
    keep_going: KeepGoing,
) -> Result<Comparison> {
    let (view, size) = (target.view()?, source.size());
    let (uuid, disk) = plain_names();
    let shipment = |head, mode, reason: &str, dirty| Shipment {
        uuid: uuid.clone(),
        disk: disk.clone(),
        size,
        head,
        mode,
        reason: reason.to_owned(),
        dirty,
        compare_only: false,
        workers: sending.workers,
        compression: sending.compression,
        throttle: sending.throttle.clone(),
    };
    if !view.exists {
        let shipment = shipment(None, Mode::Full, "there is nothing to compare with", None);
        return Ok(Comparison { shipment, bytes_read_target: 0, root: None, found: Found::default() });
    }
    if let Some(changed) = changed {
        let whole = target.read(&mut |_, _| {})?;
        let (dirty, found) = (completed(changed, size, whole.size), Found::default());
        let shipment = shipment(Some((whole.size, whole.root)), Mode::Bitmap, "a list says what changed", Some(dirty));
        return Ok(Comparison { shipment, bytes_read_target: whole.bytes_read, root: None, found });
    }
    if let Some(root) = view.root {
        let reason = "the digests of the target are kept";
        let shipment = shipment(Some((view.size, root)), Mode::Digest, reason, None);
        return Ok(Comparison { shipment, bytes_read_target: 0, root: None, found: Found::default() });
    }
    let (hashed, whole) = std::thread::scope(|scope| {
        let far = scope.spawn(|| target.read(&mut |_, _| {}));
        let near: Result<Hashed> = hash(source.image.as_ref(), sending.workers, progress, keep_going);
        (near, far.join().expect("a panic of the target ends the copy"))
    });
    let (hashed, whole) = (hashed?, whole?);
    let equal = hashed.root == whole.root;
    let mut found = match equal {
        true => Found::default(),
        false => differing(&hashed.nodes, target, &disk, whole.size)?,
    };
    let reason = "both ends were read at once, and what differs once more";
    let dirty = Some(std::mem::take(&mut found.ranges));
    let mut shipment = shipment(Some((whole.size, whole.root)), Mode::Digest, reason, dirty);
    shipment.workers = shipment.workers.max(ASKING);
    Ok(Comparison { shipment, bytes_read_target: whole.bytes_read, root: Some(hashed.root), found })
}

/// A list that somebody gave, whole: what grew has changed too, and so has the block that a cut goes through.
fn completed(changed: &[ByteRange], size: DiskSize, head: DiskSize) -> Vec<ByteRange> {
    let inside = changed.iter().filter_map(|r| r.intersect(size.range()));
    let last_block = (size.0.max(1) - 1) / BLOCK_LEN as u64 * BLOCK_LEN as u64;
    let rest = match size.cmp(&head) {
        std::cmp::Ordering::Greater => Some(ByteRange::new(head.0, size.0)),
        std::cmp::Ordering::Less if size.0 > 0 => Some(ByteRange::new(last_block, size.0)),
        _ => None,
    };
    let mut all: Vec<ByteRange> = inside.chain(rest).collect();
    all.sort_by_key(|r| r.start);
    let mut merged: Vec<ByteRange> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Sends what differs to `end`, which knows what the comparison was with. Returns the root of what was sent.
pub(super) fn ship(
    source: &Source,
    end: &dyn DiskTarget,
    comparison: &Comparison,
    progress: &Progress,
    keep_going: KeepGoing,
) -> Result<pump::Shipped> {
    progress.scanned.store(0, Ordering::Relaxed);
    let end = Remembered { target: end, found: &comparison.found };
    let shipped = pump::ship(source.image.as_ref(), &end, &comparison.shipment, progress, keep_going)?;
    source.keep_going()?;
    Ok(shipped)
}

/// Copies. `keep_going` is asked again and again: an error of it ends the copy, and nothing is put in place. Blocks.
pub fn copy(copy: &Copy, progress: &Progress, keep_going: KeepGoing) -> Result<Copied> {
    let view = copy.target.view()?;
    let good = || keep_going().and_then(|()| copy.source.keep_going());
    let compared = compare(copy.source, copy.target, copy.changed.as_deref(), &copy.sending, progress, &good)?;
    let Shipment { size, mode, reason, head, .. } = compared.shipment.clone();
    let mut copied = Copied {
        size,
        size_before: head.map_or(DiskSize(0), |(size, _)| size),
        root: compared.root,
        equal: compared.is_equal(),
        mode,
        reason,
        way: None,
        bytes_read: 0,
        bytes_read_target: compared.bytes_read_target,
        bytes_sent: 0,
        bytes_written: 0,
        blocks_changed: 0,
        compression: None,
        resumed: view.resumes,
        redone: view.redone,
        digests_reasons: view.digests_reason.into_iter().collect(),
    };
    if copy.dry_run {
        think(copy, &compared, &mut copied, progress, &good)?;
    } else {
        if !copied.equal || view.resumes {
            let shipped = ship(copy.source, copy.target, &compared, progress, &good)?;
            // A target that was known without a reading of the source may turn out to be equal.
            copied.equal = head.is_some_and(|(_, root)| root == shipped.root);
            copied.root = Some(shipped.root);
            copied.bytes_sent = shipped.stats.bytes_sent;
            copied.bytes_written = shipped.stats.bytes_written;
            copied.blocks_changed = shipped.stats.blocks_changed;
            copied.compression = shipped.stats.compression;
        }
        let committed = copy.target.commit(&copy.finish)?;
        copied.way = committed.way;
        copied.digests_reasons.extend(committed.digests_reason);
    }
    copied.bytes_read = progress.read.load(Ordering::Relaxed);
    Ok(copied)
}

/// What would be done, as far as reading tells.
fn think(
    copy: &Copy,
    compared: &Comparison,
    copied: &mut Copied,
    progress: &Progress,
    keep_going: KeepGoing,
) -> Result<()> {
    if copied.equal {
        return Ok(());
    }
    let shipment = Shipment { compare_only: true, ..compared.shipment.clone() };
    progress.scanned.store(0, Ordering::Relaxed);
    let (root, blocks) = pump::compare(copy.source.image.as_ref(), copy.target, &shipment, progress, keep_going)?;
    copied.root = Some(root);
    copied.blocks_changed = blocks;
    copied.equal = shipment.head == Some((shipment.size, root));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_changes_is_completed_where_the_size_changed() {
        let list = |ranges: &[(u64, u64)]| ranges.iter().map(|(a, b)| ByteRange::new(*a, *b)).collect::<Vec<_>>();
        let (b, given) = (BLOCK_LEN as u64, list(&[(5, 10), (2 * BLOCK_LEN as u64, 3 * BLOCK_LEN as u64)]));
        let done = |size: u64, head: u64| completed(&given, DiskSize(size), DiskSize(head));
        assert_eq!(done(4 * b, 4 * b), given);
        assert_eq!(done(4 * b, 3 * b), list(&[(5, 10), (2 * b, 4 * b)]));
        assert_eq!(done(4 * b + 7, 4 * b), list(&[(5, 10), (2 * b, 3 * b), (4 * b, 4 * b + 7)]));
        assert_eq!(done(b + 1, 4 * b), list(&[(5, 10), (b, b + 1)]));
        assert_eq!(done(7, 4 * b), list(&[(0, 7)]));
        assert_eq!(done(0, 4 * b), []);
    }
}
