//! Changed-block tracking from one point to the next: which bitmap leads on from the head, whether it may be believed,
//! and the turning over from one to its successor.
//!
//! A bitmap is named after the target and the run whose point it leads on from. A run adds its own bitmap before the
//! freeze (recording too much is safe), ships what the head's bitmap marks, and drops that one only after its own point
//! is sealed and the domain is back on its own images (I8). A crash anywhere leaves one of the two or both, and the
//! replica's head says which one counts. Other programs' bitmaps are never touched; other targets' are not ours here.

use crate::block::BLOCK_LEN;
use crate::error::Result;
use crate::hypervisor::{BitmapView, Tracking};
use crate::image::Layer;
use crate::name::{DomainUuid, RunId};

/// What our bitmaps' names begin with.
const PREFIX: &str = "vr-";

/// Beginning of the names of all our bitmaps for one target.
pub fn prefix(target: &str) -> String {
    let hash = blake3::hash(target.as_bytes()).to_hex();
    format!("{PREFIX}{}-", &hash[..8])
}

/// The bitmap that records what changes after the point of `run` on `target`.
pub fn bitmap_name(target: &str, run: &RunId) -> String {
    format!("{}{run}", prefix(target))
}

/// Whether a disk's changes since the head are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tracked {
    /// This bitmap has recorded every change, so many bytes by now.
    By { bitmap: String, dirty_bytes: u64 },
    /// They are not, and why: compare by digest.
    Doubt(String),
}

/// Judges the bitmaps of a running domain's layers, uppermost first. Pure.
///
/// Only a bitmap of the uppermost layer alone is believed. libvirt gives an overlay copies of the bitmaps below it, which
/// begin empty: where a lower layer has it too, somebody put a snapshot in between, and neither marks everything.
pub fn judge(layers: &[Vec<BitmapView>], wanted: &str) -> Tracked {
    let (bitmaps, below) = layers.split_first().map_or((&[][..], &[][..]), |(top, below)| (top.as_slice(), below));
    if below.iter().flatten().any(|b| b.name == wanted) {
        return Tracked::Doubt("a snapshot was put above the image that the dirty bitmap was begun on".into());
    }
    let Some(found) = bitmaps.iter().find(|b| b.name == wanted) else {
        let others = bitmaps.iter().any(|b| b.name.starts_with(PREFIX));
        return Tracked::Doubt(match others {
            true => "the dirty bitmap that leads on from the newest point is gone (only others are there)".into(),
            false => "no dirty bitmap leads on from the newest point (first run with it, or QEMU was restarted on an image that keeps none)".into(),
        });
    };
    if found.inconsistent {
        return Tracked::Doubt("QEMU ended without saving the dirty bitmap".into());
    }
    if !found.recording {
        return Tracked::Doubt("somebody disabled the dirty bitmap: it may have missed changes".into());
    }
    if found.busy {
        return Tracked::Doubt("another program uses the dirty bitmap".into());
    }
    if found.granularity_bytes == 0 || found.granularity_bytes > BLOCK_LEN as u64 * 64 {
        return Tracked::Doubt(format!("the dirty bitmap counts in units of {} bytes", found.granularity_bytes));
    }
    Tracked::By { bitmap: wanted.to_owned(), dirty_bytes: found.dirty_bytes }
}

/// Step 3c: the successor starts to record on every layer, before anything is frozen. What cannot be tracked costs the next
/// run a comparison, not this one its point. Returns what went wrong, in words.
pub fn begin(tracking: &dyn Tracking, uuid: &DomainUuid, layers: &[Layer], name: &str) -> Vec<String> {
    // A disk whose image is short of space or already holds too many bitmaps must not cost the others theirs.
    let mut problems = Vec::new();
    for layer in layers {
        if let Err(e) = tracking.add_bitmap(uuid, std::slice::from_ref(layer), name) {
            problems.push(format!("{}: changes are not tracked from here on: {}", layer.path.display(), e.chain()));
        }
    }
    problems
}

/// Step 8b: drops every bitmap of ours for this target but `keep`, and makes sure that they are gone. Runs after the
/// commit, on the layers the domain runs on again.
pub fn retire(
    tracking: &dyn Tracking,
    uuid: &DomainUuid,
    layers: &[Layer],
    target: &str,
    keep: Option<&str>,
) -> Result<Vec<String>> {
    let prefix = prefix(target);
    let superseded = |b: &BitmapView| b.name.starts_with(&prefix) && Some(b.name.as_str()) != keep;
    for (layer, bitmaps) in layers.iter().zip(tracking.bitmaps(uuid, layers)?) {
        for bitmap in bitmaps.into_iter().filter(superseded) {
            tracking.remove_bitmap(uuid, layer, &bitmap.name)?;
        }
    }
    let left = tracking.bitmaps(uuid, layers)?.into_iter().flatten().filter(superseded);
    Ok(left.map(|b| format!("the superseded dirty bitmap {} could not be removed", b.name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(name: &str, flags: &str) -> BitmapView {
        BitmapView {
            name: name.into(),
            dirty_bytes: 0,
            granularity_bytes: if flags.contains('g') { 1 << 30 } else { 65536 },
            recording: !flags.contains('d'),
            persistent: true,
            inconsistent: flags.contains('i'),
            busy: flags.contains('b'),
        }
    }

    #[test]
    fn only_a_sound_recording_bitmap_of_the_head_is_believed() {
        let sound = Tracked::By { bitmap: "vr-a-1".into(), dirty_bytes: 0 };
        assert_eq!(judge(&[vec![bitmap("vr-a-1", "")]], "vr-a-1"), sound);
        for flags in ["i", "d", "b", "g", "idbg"] {
            assert!(matches!(judge(&[vec![bitmap("vr-a-1", flags)]], "vr-a-1"), Tracked::Doubt(_)), "{flags}");
        }
        assert!(matches!(judge(&[vec![bitmap("vr-a-2", "")]], "vr-a-1"), Tracked::Doubt(_)));
        assert!(matches!(judge(&[], "vr-a-1"), Tracked::Doubt(_)));
    }

    #[test]
    fn a_bitmap_that_libvirt_copied_into_a_snapshot_is_not_believed() {
        // The copy begins empty: it knows nothing of what was written between the freeze and the snapshot.
        let copied = [vec![bitmap("vr-a-1", "")], vec![bitmap("vr-a-1", "")]];
        assert!(matches!(judge(&copied, "vr-a-1"), Tracked::Doubt(why) if why.contains("snapshot")));
        let foreign_below = [vec![bitmap("vr-a-1", "")], vec![bitmap("theirs", "")], vec![]];
        assert!(matches!(judge(&foreign_below, "vr-a-1"), Tracked::By { .. }));
    }

    #[test]
    fn two_targets_never_share_a_name() {
        let run = RunId::from_bits(7);
        let (a, b) = (bitmap_name("ssh://dr1", &run), bitmap_name("ssh://dr2", &run));
        assert_ne!(a, b);
        assert!(a.starts_with(&prefix("ssh://dr1")) && !a.starts_with(&prefix("ssh://dr2")));
        assert!(a.len() < 64, "QEMU allows 1023 bytes, people fewer: {a}");
    }
}
