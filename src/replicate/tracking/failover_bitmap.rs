//! The dirty bitmap that an overlay of a failover is born with: it leads on from what the failover began from.
//!
//! Every other bitmap of ours leads on from the point of one run at one target ([`bitmap_rotation`]). This one leads on
//! from content: its name says which, by the root of the disk's digests, which binds the size too. So it serves for the
//! first run to whatever target has exactly that as its newest point: a home that has given way after a planned
//! failover, above all. A home that has something else is compared by digest. It belongs to one image like every bitmap
//! of ours.
//!
//! It is dropped when the run that used it has sealed its point. As long as the disk reads the failover's point below
//! it, no other run drops it, whatever its target: the way home is still to come. A disk that stands alone (`detach`)
//! has come to stay, and there the first point that is sealed ends it. With the overlay it goes in any case.

use crate::block::digest::Digest;
use crate::error::Result;
use crate::hypervisor::{BitmapView, Tracking};
use crate::image::Layer;
use crate::name::DomainUuid;
use crate::replicate::tracking::bitmap_rotation::{self, Tracked};

/// What the names of these bitmaps begin with. No target's prefix is like it: that has hex digits there.
const PREFIX: &str = "vr-failover-";

/// What the reason of a disk begins with whose changes are told by such a bitmap.
pub const REASON: &str =
    "the newest point is what the failover began from, and its dirty bitmap has recorded every change since";

/// The bitmap that records on `layer`, an overlay, what changes after the content with this root.
pub fn name(root: &Digest, layer: &Layer) -> String {
    named(root, &bitmap_rotation::identity(layer))
}

fn named(root: &Digest, image: &str) -> String {
    format!("{PREFIX}{root}-{image}")
}

/// Whether a bitmap of this name is one of a failover's overlay.
pub fn is_birth(bitmap: &str) -> bool {
    bitmap.starts_with(PREFIX)
}

/// Judges the bitmaps of a disk's layers, uppermost first: [`bitmap_rotation::judge`] for what leads on from the run
/// that made the head (`wanted`), and where no layer has anything of that run, the bitmap of the failover, if `head` is
/// the root that it leads on from. `image`: the uppermost layer's [`bitmap_rotation::identity`]. Pure.
pub fn judge(layers: &[Vec<BitmapView>], wanted: &str, head: Option<&Digest>, image: &str) -> Tracked {
    let any = |test: &dyn Fn(&str) -> bool| layers.iter().flatten().any(|b| test(&b.name));
    let begun = bitmap_rotation::without_image(wanted);
    let Some(root) = head.filter(|_| any(&is_birth) && !any(&|name| bitmap_rotation::without_image(name) == begun))
    else {
        return bitmap_rotation::judge(layers, wanted);
    };
    let born = named(root, image);
    let begun = bitmap_rotation::without_image(&born);
    if any(&|name| bitmap_rotation::without_image(name) == begun) {
        return bitmap_rotation::judge(layers, &born);
    }
    Tracked::Doubt("the newest point is not what the failover began from, and no dirty bitmap leads on from it".into())
}

/// Which of them go from the uppermost layer when a point is sealed. `over`: nobody is to be led by one any more. What
/// can never be believed goes in any case; but not a copy of what a layer below has still, because libvirt puts the
/// marks of the two together when it commits the snapshot that lies between them. Pure.
fn superseded(layers: &[Vec<BitmapView>], image: &str, over: bool) -> Vec<String> {
    let Some((top, below)) = layers.split_first() else { return Vec::new() };
    let worthless =
        |b: &BitmapView| b.inconsistent || !b.recording || b.name.rsplit_once('-').unwrap_or(("", "")).1 != image;
    let is_copy = |b: &BitmapView| below.iter().flatten().any(|other| other.name == b.name);
    let goes = |b: &&BitmapView| is_birth(&b.name) && !is_copy(b) && (over || worthless(b));
    top.iter().filter(goes).map(|b| b.name.clone()).collect()
}

/// Step 8b: drops what is superseded on a disk's chain, on which the domain runs again. Returns what could not be
/// removed, in words.
pub fn retire(tracking: &dyn Tracking, uuid: &DomainUuid, chain: &[Layer], over: bool) -> Result<Vec<String>> {
    let Some(top) = chain.first() else { return Ok(Vec::new()) };
    let mut left = Vec::new();
    for name in superseded(&tracking.bitmaps(uuid, chain)?, &bitmap_rotation::identity(top), over) {
        if let Err(e) = tracking.remove_bitmap(uuid, top, &name) {
            let path = top.path.display();
            left.push(format!("the superseded dirty bitmap {name} of {path} could not be removed: {}", e.chain()));
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Digest = Digest([7; 32]);
    const OTHER: Digest = Digest([8; 32]);
    /// What leads on from the head's run.
    const WANTED: &str = "vr-0123abcd-run1-image";

    fn bitmap(name: &str, flags: &str) -> BitmapView {
        BitmapView {
            name: name.into(),
            dirty_bytes: 65536,
            granularity_bytes: if flags.contains('g') { 1 << 30 } else { 65536 },
            recording: !flags.contains('d'),
            persistent: true,
            inconsistent: flags.contains('i'),
            busy: flags.contains('b'),
        }
    }

    fn born(flags: &str) -> BitmapView {
        bitmap(&named(&ROOT, "image"), flags)
    }

    #[track_caller]
    fn doubts(layers: &[Vec<BitmapView>], head: Option<&Digest>, word: &str) {
        match judge(layers, WANTED, head, "image") {
            Tracked::Doubt(why) => assert!(why.contains(word), "{why}"),
            other => panic!("{other:?} instead of a doubt about {word}"),
        }
    }

    #[test]
    fn it_leads_on_where_the_head_is_what_it_began_from_and_nothing_of_the_heads_run_is_there() {
        let by = |bitmap: &str| Tracked::By { bitmap: bitmap.into(), dirty_bytes: 65536 };
        let foreign = bitmap("theirs", "");
        let other_target = bitmap("vr-89abcdef-run1-image", "");
        let layers = [vec![foreign.clone(), other_target, born("")], vec![foreign]];
        assert_eq!(judge(&layers, WANTED, Some(&ROOT), "image"), by(&born("").name));
        // The head's own run counts for more, as soon as it has led on.
        let both = [vec![born(""), bitmap(WANTED, "")]];
        assert_eq!(judge(&both, WANTED, Some(&ROOT), "image"), by(WANTED));
        assert!(is_birth(&born("").name) && !is_birth(WANTED));
    }

    #[test]
    fn every_doubt_is_compared_with_its_reason() {
        let layers = [vec![born("")], vec![]];
        doubts(&layers, Some(&OTHER), "not what the failover began from");
        doubts(&layers, None, "is gone");
        for (flags, word) in
            [("i", "without saving"), ("d", "disabled"), ("b", "another program"), ("g", "in units of")]
        {
            doubts(&[vec![born(flags)]], Some(&ROOT), word);
        }
        // A snapshot above the overlay, with libvirt's empty copy or without; the overlay pulled into it; moved
        // elsewhere.
        doubts(&[vec![born("")], vec![born("")]], Some(&ROOT), "a snapshot was put above");
        doubts(&[vec![], vec![born("")]], Some(&ROOT), "a snapshot was put above");
        doubts(&[vec![bitmap(&named(&ROOT, "another"), "")]], Some(&ROOT), "not on the image");
        // Something of the head's run is there and is in doubt: it is no better by way of another one.
        doubts(&[vec![born(""), bitmap(WANTED, "i")]], Some(&ROOT), "without saving");
        doubts(&[vec![born(""), bitmap("vr-0123abcd-run1-another", "")]], Some(&ROOT), "not on the image");
        // No failover at all.
        doubts(&[vec![]], Some(&ROOT), "no dirty bitmap leads on");
        doubts(&[vec![bitmap("vr-0123abcd-run0-image", "")]], Some(&ROOT), "is gone");
    }

    #[test]
    fn it_stays_until_it_is_over_and_what_is_never_believed_goes() {
        let none = [""; 0];
        let another = bitmap(&named(&ROOT, "another"), "");
        let all = [vec![born(""), bitmap(WANTED, ""), bitmap("theirs", "")]];
        assert_eq!(superseded(&all, "image", false), none);
        assert_eq!(superseded(&all, "image", true), [born("").name]);
        for flags in ["i", "d"] {
            assert_eq!(superseded(&[vec![born(flags)]], "image", false), [born("").name]);
        }
        // A copy that a snapshot has brought: left to libvirt while it is below too.
        assert_eq!(superseded(&[vec![another.clone()], vec![another.clone()]], "image", true), none);
        assert_eq!(superseded(&[vec![another.clone()], vec![]], "image", false), [another.name]);
        assert_eq!(superseded(&[], "image", true), none);
    }

    /// It has no target's prefix: what turns bitmaps over by target goes by it.
    #[test]
    fn no_targets_turnover_takes_it_for_its_own() {
        let hex = &bitmap_rotation::prefix("ssh://dr1")["vr-".len()..];
        assert!(hex[..8].bytes().all(|b| b.is_ascii_hexdigit()) && hex[8..] == *"-");
        assert!(!PREFIX["vr-".len()..][..8].bytes().all(|b| b.is_ascii_hexdigit()));
    }
}
