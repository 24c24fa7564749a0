//! Changed-block tracking from one point to the next: which bitmap leads on from the head, whether it may be believed,
//! and the turning over from one to its successor.
//!
//! A bitmap is named after the target (its store's id; where that is not known, its URL), the run whose point it leads
//! on from, and the image it was begun on. A run adds its own bitmap before the freeze (recording too much is safe),
//! ships what the head's bitmap marks, and drops that one only after its own point is sealed and the domain is back on
//! its own images (I8). A crash anywhere leaves one of the two or both, and the replica's head says which one counts.
//! Other programs' bitmaps are never touched; other targets' are not ours here.

use crate::block::BLOCK_LEN;
use crate::engine::stats::DiskStats;
use crate::error::Result;
use crate::hypervisor::{BitmapView, Tracking};
use crate::image::Layer;
use crate::name::{DiskName, DomainUuid, RunId};

/// What our bitmaps' names begin with.
const PREFIX: &str = "vr-";

/// Beginning of the names of all our bitmaps for one target.
pub fn prefix(target: &str) -> String {
    let hash = blake3::hash(target.as_bytes()).to_hex();
    format!("{PREFIX}{}-", &hash[..8])
}

/// The bitmap that records on one image (its [`identity`]) what changes after the point of `run` on `target`.
///
/// The image is part of the name because libvirt copies bitmaps by name: into a snapshot's overlay, where the copy
/// begins empty, and from there wherever a blockpull or a blockcopy leads. A copy has missed what was written before it
/// was made; under the name of another image it is never taken for the one that has not.
pub fn bitmap_name(target: &str, run: &RunId, image: &str) -> String {
    format!("{}{run}-{image}", prefix(target))
}

/// Which of these names, the best one first, a disk's layers know anything of: the first, if none.
pub(in crate::replicate) fn known_name(layers: &[Vec<BitmapView>], names: Vec<String>) -> String {
    let is_known = |name: &&String| {
        let begun = without_image(name);
        layers.iter().flatten().any(|b| without_image(&b.name) == begun)
    };
    names.iter().find(is_known).or(names.first()).cloned().unwrap_or_default()
}

/// A bitmap's name but for the image: the same for copies of it on other images.
pub(in crate::replicate) fn without_image(name: &str) -> &str {
    name.rsplit_once('-').map_or(name, |(name, _)| name)
}

/// What tells an image from every other one on this host: eight hex digits of its path, and its file's number and time
/// of birth, as numbers are used again. The path alone if it cannot be looked at, or is a block device, whose node is
/// made anew at every start of the machine.
pub fn identity(layer: &Layer) -> String {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(&layer.path).ok().filter(|m| m.is_file());
    let inode = file.as_ref().map_or(0, |m| m.ino());
    // Not every file system knows it.
    let born = file.and_then(|m| m.created().ok()?.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
    let mut hash = blake3::Hasher::new();
    hash.update(&inode.to_le_bytes()).update(&born.as_nanos().to_le_bytes());
    hash.update(layer.path.as_os_str().as_bytes());
    hash.finalize().to_hex()[..8].to_owned()
}

/// Whether a disk's changes since the head are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tracked {
    /// This bitmap has recorded every change, so many bytes by now.
    By {
        /// Name of the dirty bitmap that leads on from the head.
        bitmap: String,
        /// Bytes that the bitmap marks as changed now.
        dirty_bytes: u64,
    },
    /// They should be, and are not, and why: compare by digest. Two in a row are worth a warning ([`doubted_again`]).
    Doubt(String),
    /// Nothing keeps track of them where the disk is now, and why: compare by digest, every time.
    Untracked(String),
}

/// Judges the bitmaps of a disk's layers, uppermost first, as a running QEMU or the images of a domain that is off have
/// them. Pure.
///
/// Only a bitmap of the uppermost layer alone is believed. libvirt gives an overlay copies of the bitmaps below it,
/// which begin empty: where a lower layer has it too, somebody put a snapshot in between, and neither marks everything.
pub fn judge(layers: &[Vec<BitmapView>], wanted: &str) -> Tracked {
    let (bitmaps, below) = layers.split_first().map_or((&[][..], &[][..]), |(top, below)| (top.as_slice(), below));
    if below.iter().flatten().any(|b| b.name == wanted) {
        return Tracked::Doubt("a snapshot was put above the image that the dirty bitmap was begun on".into());
    }
    let Some(found) = bitmaps.iter().find(|b| b.name == wanted) else {
        // The name without the image is the same: begun on another image, and copied or moved here.
        let begun = without_image(wanted);
        if layers.iter().flatten().any(|b| without_image(&b.name) == begun) {
            return Tracked::Doubt("the disk is not on the image that the dirty bitmap was begun on".into());
        }
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

/// What an operator is told of a disk whose tracking failed twice in a row: once may be a crash, twice is no accident,
/// and every run costs a reading of the whole disk. `before`: how the head's copy came about; `now`: why this one.
/// Pure.
pub fn doubted_again(disk: &DiskName, before: &DiskStats, now: &str) -> Option<String> {
    before.tracking_doubt.then(|| {
        format!(
            "disk '{disk}' was compared by digest twice in a row although its changes are tracked; before: {}; now: {now}",
            before.reason
        )
    })
}

/// Step 3c: the successor starts to record on every layer, before anything is frozen. What cannot be tracked costs the
/// next run a comparison, not this one its point. Returns what went wrong, in words.
pub fn begin(
    tracking: &dyn Tracking,
    uuid: &DomainUuid,
    layers: &[Layer],
    name: &dyn Fn(&Layer) -> String,
) -> Vec<String> {
    // A disk whose image is short of space or already holds too many bitmaps must not cost the others theirs.
    let mut problems = Vec::new();
    for layer in layers {
        if let Err(e) = begin_on(tracking, uuid, layer, &name(layer)) {
            problems.push(format!("{}: changes are not tracked from here on: {}", layer.path.display(), e.chain()));
        }
    }
    problems
}

fn begin_on(tracking: &dyn Tracking, uuid: &DomainUuid, layer: &Layer, name: &str) -> Result<()> {
    let one = std::slice::from_ref(layer);
    // A run that begins again, because the domain was started meanwhile, finds its own: it has recorded since earlier.
    match tracking.bitmaps(uuid, one)?.into_iter().flatten().find(|b| b.name == name) {
        Some(b) if b.recording && !b.inconsistent => return Ok(()),
        Some(_) => tracking.remove_bitmap(uuid, layer, name)?,
        None => {}
    }
    tracking.add_bitmap(uuid, one, name)
}

/// Step 8b: drops every bitmap of ours for this target but those to `keep` of each layer, and makes sure that they are
/// gone. Runs after the commit, on the layers the domain runs on again. Returns what could not be removed, in words.
pub fn retire(
    tracking: &dyn Tracking,
    uuid: &DomainUuid,
    layers: &[Layer],
    target: &str,
    keep: &dyn Fn(&Layer) -> Vec<String>,
) -> Result<Vec<String>> {
    let superseded = |layer: &Layer| {
        let (prefix, keep) = (prefix(target), keep(layer));
        move |b: &BitmapView| b.name.starts_with(&prefix) && !keep.contains(&b.name)
    };
    for (layer, bitmaps) in layers.iter().zip(tracking.bitmaps(uuid, layers)?) {
        for bitmap in bitmaps.into_iter().filter(superseded(layer)) {
            if let Err(e) = tracking.remove_bitmap(uuid, layer, &bitmap.name) {
                tracing::debug!("{}: the dirty bitmap {} stays: {}", layer.path.display(), bitmap.name, e.chain());
            }
        }
    }
    let mut left = Vec::new();
    for (layer, bitmaps) in layers.iter().zip(tracking.bitmaps(uuid, layers)?) {
        for bitmap in bitmaps.into_iter().filter(superseded(layer)) {
            left.push(format!(
                "the superseded dirty bitmap {} of {} could not be removed",
                bitmap.name,
                layer.path.display()
            ));
        }
    }
    Ok(left)
}

/// Drops what of ours lies on layers below the uppermost, where a snapshot was put above the image that we tracked. Of
/// a running domain QEMU lets go only of what was never saved; the rest goes when the domain is off, or when the layer
/// is the uppermost again. Nobody believes any of it, so what stays is not worth a warning.
pub fn sweep(tracking: &dyn Tracking, uuid: &DomainUuid, layers: &[Layer], target: &str) {
    let keep = |_: &Layer| Vec::new();
    match retire(tracking, uuid, layers, target, &keep) {
        Ok(left) => left.iter().for_each(|what| tracing::debug!("{what}")),
        Err(e) => tracing::debug!("dirty bitmaps below a snapshot stay: {}", e.chain()),
    }
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
    fn the_bitmap_of_another_image_is_not_believed_and_it_is_said() {
        let doubt = |layers: &[Vec<BitmapView>]| match judge(layers, "vr-a-1-x") {
            Tracked::Doubt(why) => why,
            other => panic!("{other:?}"),
        };
        // A snapshot whose base was pulled into it, an image copied elsewhere.
        assert!(doubt(&[vec![bitmap("vr-a-1-y", "")]]).contains("not on the image"));
        assert!(doubt(&[vec![], vec![bitmap("vr-a-1-y", "")]]).contains("not on the image"));
        assert!(doubt(&[vec![bitmap("vr-a-2-x", "")]]).contains("only others"));
        assert!(doubt(&[vec![bitmap("theirs-x", "")]]).contains("no dirty bitmap"));
    }

    #[test]
    fn an_image_is_its_path_and_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let layer = |name: &str| Layer {
            path: dir.path().join(name),
            format: crate::image::Format::Qcow2,
            block_device: false,
            data_file: None,
        };
        std::fs::write(dir.path().join("a"), b"x").unwrap();
        let first = identity(&layer("a"));
        assert_eq!(first.len(), 8);
        std::fs::write(dir.path().join("a"), b"longer").unwrap();
        assert_eq!(identity(&layer("a")), first, "its content does not matter");
        // Made beside it and put in its place, and at another place.
        std::fs::write(dir.path().join("b"), b"x").unwrap();
        std::fs::rename(dir.path().join("a"), dir.path().join("c")).unwrap();
        assert_ne!(identity(&layer("c")), first);
        std::fs::rename(dir.path().join("b"), dir.path().join("a")).unwrap();
        assert_ne!(identity(&layer("a")), first);
        assert_ne!(identity(&layer("none")), identity(&layer("other")), "what is not there has a path all the same");
    }

    /// A host's bitmaps by image, and what was asked.
    #[derive(Default)]
    struct Shelf {
        bitmaps: std::sync::Mutex<std::collections::BTreeMap<String, Vec<BitmapView>>>,
        stuck: Vec<String>,
    }

    impl Shelf {
        fn with(content: &[(&str, &[BitmapView])]) -> Shelf {
            let bitmaps = content.iter().map(|(image, all)| ((*image).to_owned(), all.to_vec())).collect();
            Shelf { bitmaps: std::sync::Mutex::new(bitmaps), stuck: Vec::new() }
        }

        fn names(&self, image: &str) -> Vec<String> {
            self.bitmaps.lock().unwrap()[image].iter().map(|b| b.name.clone()).collect()
        }
    }

    impl Tracking for Shelf {
        fn bitmaps(&self, _: &DomainUuid, layers: &[Layer]) -> Result<Vec<Vec<BitmapView>>> {
            let all = self.bitmaps.lock().unwrap();
            Ok(layers.iter().map(|l| all.get(l.path.to_str().unwrap()).cloned().unwrap_or_default()).collect())
        }

        fn add_bitmap(&self, _: &DomainUuid, layers: &[Layer], name: &str) -> Result<()> {
            for layer in layers {
                let path = layer.path.to_str().unwrap().to_owned();
                let mut all = self.bitmaps.lock().unwrap();
                let here =
                    all.get_mut(&path).ok_or_else(|| crate::error::Error::new(crate::error::Kind::Space, "full"))?;
                assert!(here.iter().all(|b| b.name != name), "QEMU refuses a name twice");
                here.push(bitmap(name, ""));
            }
            Ok(())
        }

        fn remove_bitmap(&self, _: &DomainUuid, layer: &Layer, name: &str) -> Result<()> {
            if self.stuck.iter().any(|s| s == name) {
                return Err(crate::error::Error::new(crate::error::Kind::Refused, "read-only"));
            }
            let mut all = self.bitmaps.lock().unwrap();
            all.get_mut(layer.path.to_str().unwrap()).unwrap().retain(|b| b.name != name);
            Ok(())
        }

        fn dirty(&self, _: &DomainUuid, _: &[(Layer, String)]) -> Result<Vec<Vec<crate::block::ByteRange>>> {
            unreachable!("turning over asks for no marks")
        }
    }

    fn layer(path: &str) -> Layer {
        Layer { path: path.into(), format: crate::image::Format::Qcow2, block_device: false, data_file: None }
    }

    fn uuid() -> DomainUuid {
        DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap()
    }

    #[test]
    fn a_run_that_begins_again_keeps_its_sound_successor_and_renews_an_unsound_one() {
        let shelf = Shelf::with(&[("/a", &[bitmap("new", "")]), ("/b", &[bitmap("new", "i")]), ("/c", &[])]);
        let layers = [layer("/a"), layer("/full"), layer("/b"), layer("/c")];
        let problems = begin(&shelf, &uuid(), &layers, &|_| "new".to_owned());
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("/full: changes are not tracked"), "{problems:?}");
        for image in ["/a", "/b", "/c"] {
            assert_eq!(shelf.names(image), ["new"]);
            assert!(!shelf.bitmaps.lock().unwrap()[image][0].inconsistent);
        }
    }

    #[test]
    fn only_what_leads_on_stays_and_others_are_not_touched() {
        let ours = |run| bitmap(&bitmap_name("t", &RunId::from_bits(run), "i"), "");
        let (old, new, foreign) = (ours(1), ours(2), bitmap("theirs", ""));
        let other_target = bitmap(&bitmap_name("other", &RunId::from_bits(1), "i"), "");
        let all = [old.clone(), foreign.clone(), new.clone(), other_target.clone()];
        let shelf = Shelf::with(&[("/a", &all), ("/b", &all)]);
        let keep = |_: &Layer| vec![new.name.clone()];
        let left = retire(&shelf, &uuid(), &[layer("/a"), layer("/b")], "t", &keep).unwrap();
        assert_eq!(left, [""; 0]);
        for image in ["/a", "/b"] {
            assert_eq!(shelf.names(image), [foreign.name.clone(), new.name.clone(), other_target.name.clone()]);
        }
        // One that cannot be removed is told, and costs no other its removal.
        let stuck = bitmap(&format!("{}x", prefix("t")), "");
        let name = stuck.name.clone();
        let shelf = Shelf { stuck: vec![name.clone()], ..Shelf::with(&[("/a", &[stuck, old])]) };
        let left = retire(&shelf, &uuid(), &[layer("/a")], "t", &keep).unwrap();
        assert!(left.len() == 1 && left[0].contains("/a could not be removed"), "{left:?}");
        assert_eq!(shelf.names("/a"), [name]);
    }

    #[test]
    fn below_a_snapshot_nothing_of_ours_is_kept() {
        let shelf = Shelf::with(&[("/a", &[bitmap(&format!("{}x", prefix("t")), ""), bitmap("theirs", "")])]);
        sweep(&shelf, &uuid(), &[layer("/a")], "t");
        assert_eq!(shelf.names("/a"), ["theirs"]);
    }

    #[test]
    fn the_second_doubt_in_a_row_is_told_with_both_reasons() {
        let disk = DiskName::new("vda").unwrap();
        let stats = |tracking_doubt| DiskStats { tracking_doubt, reason: "the first".into(), ..DiskStats::default() };
        assert_eq!(doubted_again(&disk, &stats(false), "the second"), None);
        let told = doubted_again(&disk, &stats(true), "the second").unwrap();
        assert!(told.contains("'vda'") && told.contains("the first") && told.contains("the second"), "{told}");
    }

    /// Case B3: a store that was reached by another spelling of its URL was compared in full.
    #[test]
    fn a_bitmap_is_found_under_every_name_that_its_target_has_had() {
        let run = RunId::from_bits(7);
        let name = |key: &str| bitmap_name(key, &run, "image");
        let names = || vec![name("store:1"), name("ssh://b"), name("ssh://root@b")];
        let layers = [vec![bitmap("theirs", ""), bitmap(&name("ssh://root@b"), "")], vec![]];
        assert_eq!(known_name(&layers, names()), name("ssh://root@b"));
        let both = [vec![bitmap(&name("ssh://b"), ""), bitmap(&name("store:1"), "")]];
        assert_eq!(known_name(&both, names()), name("store:1"));
        let of_another_run = bitmap(&bitmap_name("ssh://b", &RunId::from_bits(8), "image"), "");
        assert_eq!(known_name(&[vec![of_another_run]], names()), name("store:1"));
        let on_another_image = bitmap(&bitmap_name("ssh://b", &run, "other"), "");
        assert_eq!(known_name(&[vec![on_another_image]], names()), name("ssh://b"), "the doubt is about that one");
    }

    #[test]
    fn two_targets_and_two_images_never_share_a_name() {
        let run = RunId::from_bits(7);
        let (a, b) = (bitmap_name("ssh://dr1", &run, "00000000"), bitmap_name("ssh://dr2", &run, "00000000"));
        assert_ne!(a, b);
        assert_ne!(a, bitmap_name("ssh://dr1", &run, "00000001"));
        assert!(a.starts_with(&prefix("ssh://dr1")) && !a.starts_with(&prefix("ssh://dr2")));
        assert!(a.len() < 64, "QEMU allows 1023 bytes, people fewer: {a}");
    }
}
