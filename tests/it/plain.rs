//! Plain images of every awkward shape, brought into step with one another in every way there is, with real files and
//! QEMU's own tools as the judge. No libvirt, no lab.

mod agent;
#[cfg(feature = "failpoints")]
mod crash;
mod envelope;
mod foreign;
mod named;
mod patches;
mod places;
mod support;
mod written;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use support::*;
use virt_replica::block::{ByteRange, DiskSize};
use virt_replica::error::Kind;
use virt_replica::image::Format::{Qcow2, Raw};
use virt_replica::image::locks::QemuLock;
use virt_replica::plain::{Way, WayWish};

/// Contents as a name and a drawing: a letter for each block of 64 KiB (`.` is a hole, `0` written zeros, a letter
/// data), and the length of the last block.
const SHAPES: [(&str, usize); 13] = [
    ("", 0),
    ("a", 1),
    ("a", 511),
    ("a", 512),
    ("a", 65536),
    ("ab", 1),
    ("ab", 4097),
    ("abc", 65535),
    ("a.c", 65536),
    (".....", 65536),
    ("00a00", 65536),
    ("abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc", 512),
    ("a...............................................................b.....", 100),
];

#[test]
fn every_shape_becomes_every_other_in_every_pair_of_formats() {
    let t = Bench::new();
    let mut copies = 0;
    for (from, to) in [(Raw, Raw), (Raw, Qcow2), (Qcow2, Raw), (Qcow2, Qcow2)] {
        // QEMU's tools, which resize qcow2 images, cost most of the time.
        let befores = SHAPES.into_iter().step_by(if to == Qcow2 { 4 } else { 1 });
        for before in befores {
            for after in SHAPES {
                let (source, target) = (t.image("source", from, after), t.image("target", to, before));
                let (had, wanted) = (t.content(&target, to), t.content(&source, from));
                let copied = t.copy(&source, from, &target, to, &Asked::default()).unwrap();
                let name = format!("{before:?} -> {after:?}, {from:?} -> {to:?}");
                t.expect(&target, to, &wanted, &name);
                assert_eq!(copied.equal, padded(&had, to) == padded(&wanted, to), "{name}");
                let again = t.copy(&source, from, &target, to, &Asked::default()).unwrap();
                assert!(again.equal && again.bytes_sent == 0 && again.way.is_none(), "{name}: {again:?}");
                t.clean(&name);
                copies += 1;
            }
        }
    }
    assert_eq!(copies, (2 * 13 + 2 * 4) * 13);
}

#[test]
fn every_way_of_changing_a_file_leads_to_the_same() {
    let t = Bench::new();
    for way in [WayWish::Auto, WayWish::Copy, WayWish::Redo, WayWish::InPlace] {
        for before in SHAPES.into_iter().step_by(3) {
            for after in SHAPES {
                let (source, target) = (t.image("source", Raw, after), t.image("target", Raw, before));
                let wanted = t.content(&source, Raw);
                let inode = std::fs::metadata(&target).unwrap().ino();
                let copied = t.copy(&source, Raw, &target, Raw, &Asked { way, ..Asked::default() }).unwrap();
                let name = format!("{before:?} -> {after:?} by {way:?}");
                t.expect(&target, Raw, &wanted, &name);
                let kept = std::fs::metadata(&target).unwrap().ino() == inode;
                match (copied.way, way) {
                    (None, _) => assert!(copied.equal, "{name}"),
                    (Some(Way::Redo), WayWish::Redo | WayWish::Auto) => assert!(kept, "{name}"),
                    (Some(Way::InPlace), WayWish::InPlace) => assert!(kept, "{name}"),
                    (Some(Way::Copy), WayWish::Copy) => assert!(!kept, "{name}"),
                    (Some(Way::Reflink), WayWish::Auto) => assert!(!kept, "{name}"),
                    (other, _) => panic!("{name}: {other:?}"),
                }
                t.clean(&name);
            }
        }
    }
}

/// bdsync missed this one for ten years.
#[test]
fn the_last_byte_of_a_block_is_a_change() {
    let t = Bench::new();
    for at in [0, 65535, 65536, 131071, 4095, 4096, 3 * 65536 + 99] {
        let (source, target) = (t.image("source", Raw, ("abcd", 100)), t.image("target", Raw, ("abcd", 100)));
        let file = std::fs::File::options().read(true).write(true).open(&source).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let copied = t.copy(&source, Raw, &target, Raw, &Asked::default()).unwrap();
        assert_eq!(copied.blocks_changed, 1, "{at}");
        assert!(std::fs::read(&source).unwrap() == std::fs::read(&target).unwrap(), "{at}");
    }
}

#[test]
fn holes_stay_holes_and_sixteen_tebibytes_of_them_cost_nothing() {
    let t = Bench::new();
    let (source, target) = (t.path("big.raw"), t.path("copy.raw"));
    let huge = 15u64 << 40;
    let file = std::fs::File::create(&source).unwrap();
    file.set_len(huge).unwrap();
    file.write_all_at(&[7; 70_000], 1 << 40).unwrap();
    file.write_all_at(&[8; 5], huge - 5).unwrap();
    let copied = t.copy(&source, Raw, &target, Raw, &Asked::default()).unwrap();
    assert_eq!((copied.size, copied.way), (DiskSize(huge), Some(Way::New)));
    let there = std::fs::metadata(&target).unwrap();
    assert!(there.len() == huge && there.blocks() * 512 < 1 << 20, "{}", there.blocks());
    file.write_all_at(&[9; 5], 2 << 40).unwrap();
    file.write_all_at(&[0; 65536], 1 << 40).unwrap();
    let copied = t.copy(&source, Raw, &target, Raw, &Asked::default()).unwrap();
    assert!(copied.blocks_changed == 2 && copied.bytes_read < 2 << 20, "{copied:?}");
    assert!(t.copy(&source, Raw, &target, Raw, &Asked::default()).unwrap().equal);
}

#[test]
fn qemu_agrees_with_what_was_written() {
    let t = Bench::new();
    for (from, to) in [(Raw, Qcow2), (Qcow2, Qcow2), (Qcow2, Raw)] {
        let (source, target) = (t.image("source", from, ("ab.0cd", 512)), t.image("target", to, ("xb1y", 65536)));
        t.copy(&source, from, &target, to, &Asked::default()).unwrap();
        t.qemu(&["compare", "-f", from.as_str(), "-F", to.as_str(), path(&source), path(&target)]);
        if to == Qcow2 {
            t.qemu(&["check", "-q", "-f", "qcow2", path(&target)]);
        }
    }
    // An overlay is read with what lies below it.
    let base = t.image("base", Raw, ("abc", 65536));
    let overlay = t.path("overlay.qcow2");
    t.qemu(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", path(&base), path(&overlay)]);
    let target = t.path("flat.raw");
    t.copy(&overlay, Qcow2, &target, Raw, &Asked::default()).unwrap();
    assert!(std::fs::read(&target).unwrap() == std::fs::read(&base).unwrap());
    // But it is not written: others may read what it names.
    let e = t.copy(&target, Raw, &overlay, Qcow2, &Asked::default()).unwrap_err();
    assert!(e.kind() == Kind::Refused && e.to_string().contains("backing image"), "{e}");
}

#[test]
fn an_image_in_use_is_left_alone() {
    let t = Bench::new();
    let (source, target) = (t.image("source", Raw, ("a", 65536)), t.image("target", Raw, ("b", 65536)));
    for used in [&source, &target] {
        let held = QemuLock::take(used).unwrap().unwrap();
        let e = t.copy(&source, Raw, &target, Raw, &Asked::default()).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy, "{e}");
        drop(held);
    }
    let held = QemuLock::take(&source).unwrap().unwrap();
    t.copy(&source, Raw, &target, Raw, &Asked { force_share: true, ..Asked::default() }).unwrap();
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&target).unwrap());
    drop(held);
    // Nor is it copied onto itself.
    let e = t.copy(&source, Raw, &source, Raw, &Asked::default()).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
}

#[test]
fn a_source_that_is_written_to_meanwhile_is_noticed() {
    let t = Bench::new();
    let (source, target) = (t.image("source", Raw, ("abc", 65536)), t.image("target", Raw, ("xyz", 65536)));
    let before = std::fs::read(&target).unwrap();
    let touch = || std::fs::File::options().write(true).open(&source).unwrap().write_all_at(&[1], 70_000).unwrap();
    let e = t.copy(&source, Raw, &target, Raw, &Asked { meanwhile: Some(&touch), ..Asked::default() }).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.to_string().contains("written to while"), "{e}");
    assert!(std::fs::read(&target).unwrap() == before);
}

#[test]
fn a_copy_that_was_cut_short_is_gone_on_with() {
    let t = Bench::new();
    for format in [Raw, Qcow2] {
        let source = t.image("source", Raw, ("abcdefghijklmnop", 65536));
        let target = t.path("fresh");
        // What a killed copy leaves: some of it.
        let part = t.path(".fresh.vr-part");
        std::fs::rename(t.image("part", format, ("abcdefgh....xxxx", 65536)), &part).unwrap();
        let copied = t.copy(&source, Raw, &target, format, &Asked::default()).unwrap();
        assert!(copied.resumed && copied.blocks_changed == 8 && copied.way == Some(Way::New), "{copied:?}");
        t.expect(&target, format, &std::fs::read(&source).unwrap(), "resumed");
        t.clean("resumed");
        std::fs::remove_file(&target).unwrap();
    }
    // One that holds nothing of use is no obstacle.
    let (source, target) = (t.image("source", Raw, ("abc", 65536)), t.path("fresh"));
    std::fs::write(t.path(".fresh.vr-part"), b"no qcow2").unwrap();
    assert!(!t.copy(&source, Raw, &target, Qcow2, &Asked::default()).unwrap().resumed);
    // A link in its place would have us write elsewhere.
    let elsewhere = t.image("elsewhere", Raw, ("z", 65536));
    std::os::unix::fs::symlink(&elsewhere, t.path(".linked.vr-part")).unwrap();
    let e = t.copy(&source, Raw, &t.path("linked"), Raw, &Asked::default()).unwrap_err();
    assert!(e.kind() == Kind::Conflict && std::fs::read(&elsewhere).unwrap() == noise(b'z', 65536), "{e}");
}

#[test]
fn kept_digests_spare_the_target_until_somebody_touches_it() {
    let t = Bench::new();
    let (source, target) = (t.image("source", Raw, ("abcdef", 65536)), t.image("target", Raw, ("abcxef", 65536)));
    let asked = Asked { digests: Some(t.path("kept")), ..Asked::default() };
    let first = t.copy(&source, Raw, &target, Raw, &asked).unwrap();
    assert!(first.bytes_read_target == 6 << 16 && first.blocks_changed == 1, "{first:?}");
    let second = t.copy(&source, Raw, &target, Raw, &asked).unwrap();
    assert!(second.equal && second.bytes_read_target == 0 && second.digests_reasons.is_empty(), "{second:?}");
    std::fs::File::options().write(true).open(&source).unwrap().write_all_at(&[1], 70_000).unwrap();
    let third = t.copy(&source, Raw, &target, Raw, &asked).unwrap();
    assert!(third.bytes_read_target == 0 && third.blocks_changed == 1, "{third:?}");
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&target).unwrap());
    std::fs::File::options().write(true).open(&target).unwrap().write_all_at(&[9], 5).unwrap();
    let fourth = t.copy(&source, Raw, &target, Raw, &asked).unwrap();
    assert!(fourth.bytes_read_target > 0 && fourth.blocks_changed == 1, "{fourth:?}");
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&target).unwrap());
    // Of a new file they are made as it is written.
    let new = t.path("new.qcow2");
    t.copy(&source, Raw, &new, Qcow2, &asked).unwrap();
    assert_eq!(t.copy(&source, Raw, &new, Qcow2, &asked).unwrap().bytes_read_target, 0);
}

#[test]
fn a_list_of_changes_is_all_that_is_read() {
    let t = Bench::new();
    let (source, target) = (t.image("source", Raw, ("xbxdefgh", 65536)), t.image("target", Raw, ("abcdef", 65536)));
    let changed = Some(vec![ByteRange::new(5, 6)]);
    let copied = t.copy(&source, Raw, &target, Raw, &Asked { changed, ..Asked::default() }).unwrap();
    assert_eq!((copied.bytes_read, copied.blocks_changed), (3 << 16, 3), "the block of the list, and what grew");
    let (ours, theirs) = (std::fs::read(&target).unwrap(), std::fs::read(&source).unwrap());
    assert!(ours[..2 << 16] == theirs[..2 << 16] && ours[3 << 16..] == theirs[3 << 16..]);
    assert!(ours[2 << 16..3 << 16] != theirs[2 << 16..3 << 16], "what the list leaves out is not looked at");
}

#[test]
fn owner_mode_and_time_come_along_on_request() {
    let t = Bench::new();
    let (source, target) = (t.image("source", Raw, ("a", 65536)), t.path("new.raw"));
    let meta = t.set_meta(&source, 0o640, 1_500_000_000);
    t.copy(&source, Raw, &target, Raw, &Asked::default()).unwrap();
    assert_eq!(std::fs::metadata(&target).unwrap().mode() & 0o777, 0o600, "a new file is its owner's");
    for way in [WayWish::Copy, WayWish::Redo, WayWish::InPlace] {
        std::fs::File::options().write(true).open(&target).unwrap().write_all_at(b"x", 0).unwrap();
        let asked = Asked { meta: Some(meta.clone()), way, ..Asked::default() };
        t.copy(&source, Raw, &target, Raw, &asked).unwrap();
        assert_eq!(t.meta(&target), meta, "{way:?}");
    }
    t.set_meta(&target, 0o600, 5);
    t.copy(&source, Raw, &target, Raw, &Asked { meta: Some(meta.clone()), ..Asked::default() }).unwrap();
    assert_eq!(t.meta(&target), meta, "also where nothing else differs");
}

#[test]
fn a_dry_run_counts_and_changes_nothing() {
    let t = Bench::new();
    let (source, target) = (t.image("source", Raw, ("abx", 65536)), t.image("target", Raw, ("abc", 65536)));
    let before = std::fs::read(&target).unwrap();
    let asked = Asked { dry_run: true, ..Asked::default() };
    let copied = t.copy(&source, Raw, &target, Raw, &asked).unwrap();
    assert!(copied.blocks_changed == 1 && copied.bytes_sent == 0 && copied.way.is_none() && !copied.equal);
    assert!(std::fs::read(&target).unwrap() == before);
    let copied = t.copy(&source, Raw, &t.path("none"), Raw, &asked).unwrap();
    assert!(copied.blocks_changed == 3 && !t.path("none").exists());
    t.clean("dry run");
}

/// A block device where a loop device can be had; what cannot be had here is covered by files.
#[test]
fn a_block_device_is_changed_behind_a_redo_file() {
    let t = Bench::new();
    let backing = t.image("disk", Raw, ("abcdefgh", 65536));
    let Some(device) = Loop::over(&backing) else { return };
    let source = t.image("source", Raw, ("xb.d0f", 65536));
    let copied = t.copy(&source, Raw, device.path(), Raw, &Asked::default()).unwrap();
    assert_eq!((copied.way, copied.size_before), (Some(Way::Redo), DiskSize(6 << 16)));
    assert!(t.copy(&source, Raw, device.path(), Raw, &Asked::default()).unwrap().equal);
    t.copy(&source, Raw, device.path(), Raw, &Asked { way: WayWish::InPlace, ..Asked::default() }).unwrap();
    let back = t.path("back.raw");
    t.copy(device.path(), Raw, &back, Raw, &Asked::default()).unwrap();
    let (back, source) = (std::fs::read(&back).unwrap(), std::fs::read(&source).unwrap());
    assert!(back.len() == 8 << 16 && back[..6 << 16] == source[..]);
    let larger = t.image("larger", Raw, ("abcdefghi", 65536));
    let e = t.copy(&larger, Raw, device.path(), Raw, &Asked::default()).unwrap_err();
    assert!(e.kind() == Kind::Refused && e.to_string().contains("not resized"), "{e}");
    t.clean("device");
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
