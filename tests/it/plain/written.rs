//! Images in formats of other hypervisors as targets: written aside, as a whole, with QEMU's tools as the judge.

use super::foreign::KINDS;
use super::patches::program;
use super::support::*;
use super::{SHAPES, path};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use virt_replica::block::DiskSize;
use virt_replica::error::Kind;
use virt_replica::image::Format::{Qcow2, Raw};
use virt_replica::image::foreign::format::{AnyFormat, Foreign};
use virt_replica::image::locks::QemuLock;
use virt_replica::plain::{Way, WayWish};

/// What is there before a copy: nothing, something small, something large with a hole.
const BEFORES: [Option<(&str, usize)>; 3] =
    [None, Some(("ab", 512)), Some(("xbc.........................................z", 65536))];

/// An image of this format, of this size, that holds together.
#[track_caller]
fn judged(t: &Bench, image: &Path, format: Foreign, size: usize, name: &str) -> serde_json::Value {
    let said =
        Command::new("qemu-img").args(["info", "--output=json", "-f", format.as_str(), path(image)]).output().unwrap();
    assert!(said.status.success(), "{name}: {said:?}");
    let info: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(info["virtual-size"], size, "{name}");
    if format != Foreign::Vpc {
        t.qemu(&["check", "-q", "-f", format.as_str(), path(image)]);
    }
    info
}

fn every_shape(format: Foreign) {
    let t = Bench::new();
    let target = t.path("target");
    for before in BEFORES {
        for after in SHAPES {
            let _ = fs::remove_file(&target);
            if let Some(before) = before {
                t.any_image("target", format.into(), before);
            }
            let name = format!("{before:?} -> {after:?} as {format:?}");
            let source = t.image("source", Raw, after);
            let (had, wanted) =
                (before.map(|_| t.content(&target, format)), padded(&fs::read(&source).unwrap(), format));
            let copied = t.copy(&source, Raw, &target, format, &Asked::default());
            if wanted.is_empty() && format == Foreign::Vmdk {
                // QEMU makes one, and cannot open it.
                let e = copied.unwrap_err();
                assert!(e.kind() == Kind::Refused && e.advice().is_some(), "{name}: {e}");
                assert!(before.is_none() || Some(t.content(&target, format)) == had, "{name}");
                t.clean(&name);
                continue;
            }
            let copied = copied.unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
            let way = match had {
                Some(had) if had == wanted => None,
                Some(had) if had.len() == wanted.len() => {
                    Some(copied.way.filter(|w| *w != Way::New).unwrap_or(Way::Copy))
                }
                _ => Some(Way::New),
            };
            assert_eq!(copied.way, way, "{name}");
            t.expect(&target, format, &wanted, &name);
            judged(&t, &target, format, wanted.len(), &name);
            let again = t.copy(&source, Raw, &target, format, &Asked::default()).unwrap();
            assert!(again.equal && again.bytes_sent == 0 && again.way.is_none(), "{name}: {again:?}");
            t.clean(&name);
        }
    }
}

#[test]
fn every_shape_becomes_a_vmdk_image() {
    every_shape(Foreign::Vmdk);
}

#[test]
fn every_shape_becomes_a_vdi_image() {
    every_shape(Foreign::Vdi);
}

#[test]
fn every_shape_becomes_a_vhdx_image() {
    every_shape(Foreign::Vhdx);
}

#[test]
fn every_shape_becomes_a_vpc_image() {
    every_shape(Foreign::Vpc);
}

#[test]
fn every_shape_becomes_a_qed_image() {
    every_shape(Foreign::Qed);
}

#[test]
fn every_format_becomes_every_other() {
    let t = Bench::new();
    let all = || [AnyFormat::from(Raw), Qcow2.into()].into_iter().chain(Foreign::ALL.map(AnyFormat::Of));
    for from in all() {
        let source = t.any_image("source", from, ("aX.0cdefg0.....z", 1024));
        let wanted = t.content(&source, from);
        for to in all() {
            let name = format!("{from:?} -> {to:?}");
            let target = t.any_image("target", to, ("ab..cdefgh.....y", 1024));
            assert_eq!(t.content(&target, to).len(), wanted.len(), "{name}");
            let copied = t.copy(&source, from, &target, to, &Asked::default()).unwrap();
            t.expect(&target, to, &wanted, &name);
            assert!(copied.way.is_some_and(|way| way != Way::New), "{name}: {copied:?}");
            t.qemu(&["compare", "-f", from.as_str(), "-F", to.as_str(), path(&source), path(&target)]);
            assert!(t.copy(&source, from, &target, to, &Asked::default()).unwrap().equal, "{name}");
            t.clean(&name);
        }
    }
}

/// What is changed in a copy stays of its kind, and only what differs is sent.
#[test]
fn the_kind_of_an_image_stays_and_its_last_byte_counts() {
    let t = Bench::new();
    for (format, options) in KINDS {
        let name = format!("{format:?} {options}");
        let target = t.foreign_image("target", format, options, ("abc.0fgh", 65536));
        let source = t.image("source", Raw, ("abc.0fgh", 65536));
        let (info, kind) = (judged(&t, &target, format, 8 << 16, &name), kind(&target, format));
        let file = fs::File::options().read(true).write(true).open(&source).unwrap();
        for at in [8 * 65536 - 1, 3 * 65536 + 5, 0] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            let before = fs::read(&target).unwrap();
            let copied = t.copy(&source, Raw, &target, format, &Asked::default());
            if options.contains("streamOptimized") {
                let e = copied.unwrap_err();
                assert!(e.kind() == Kind::Refused && e.to_string().contains("streamOptimized"), "{e}");
                assert!(fs::read(&target).unwrap() == before);
                continue;
            }
            let copied = copied.unwrap();
            assert!(copied.blocks_changed == 1 && copied.bytes_sent < 8192, "{name}: {copied:?}");
            t.expect(&target, format, &fs::read(&source).unwrap(), &name);
        }
        let now = judged(&t, &target, format, 8 << 16, &name);
        assert_eq!(
            now["format-specific"]["data"]["create-type"], info["format-specific"]["data"]["create-type"],
            "{name}"
        );
        assert_eq!(kind, self::kind(&target, format), "{name}");
        t.clean(&name);
    }
}

/// The bytes of a header that say which kind of its format an image is.
fn kind(image: &Path, format: Foreign) -> Vec<u8> {
    let (at, len) = match format {
        Foreign::Vmdk => (8, 4),
        Foreign::Vdi => (0x4c, 4),
        Foreign::Qed => (4, 12),
        Foreign::Vhdx => return vec![u8::from(fs::metadata(image).unwrap().len() >= 16 << 20)],
        Foreign::Vpc => {
            let file = fs::read(image).unwrap();
            return file[file.len() - 512 + 60..][..4].to_vec();
        }
    };
    let mut bytes = vec![0; len];
    fs::File::open(image).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

#[test]
fn what_is_not_there_is_created_whole_in_one_file() {
    let t = Bench::new();
    let source = t.image("source", Raw, ("ab.0cd", 65536));
    for format in Foreign::ALL {
        let target = t.path(&format!("dir.{}/a long name.img", format.as_str()));
        fs::create_dir(target.parent().unwrap()).unwrap();
        let copied = t.copy(&source, Raw, &target, format, &Asked::default()).unwrap();
        assert!(copied.way == Some(Way::New) && copied.blocks_changed == 4, "{copied:?}");
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1, "{format:?}");
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o600, "{format:?}");
        if format == Foreign::Vmdk {
            let bytes = fs::read(&target).unwrap();
            let text = String::from_utf8_lossy(&bytes[..64 << 10]);
            assert!(text.contains(" SPARSE \"a long name.img\"\n") && !text.contains("vr-part"), "{text}");
        }
        // Mode and time of what is there stay, or those of the source come along.
        t.set_meta(&target, 0o640, 1_000_000);
        t.image("source", Raw, ("aX.0cd", 65536));
        t.copy(&source, Raw, &target, format, &Asked::default()).unwrap();
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o640, "{format:?}");
        t.image("source", Raw, ("aX.0cd", 512));
        let meta = t.set_meta(&source, 0o604, 1_234_567);
        t.copy(&source, Raw, &target, format, &Asked { meta: Some(meta.clone()), ..Asked::default() }).unwrap();
        assert_eq!(t.meta(&target), meta, "{format:?}");
        judged(&t, &target, format, (5 << 16) + 512, "resized");
        t.image("source", Raw, ("ab.0cd", 65536));
    }
}

#[test]
fn kept_digests_spare_such_a_target_until_somebody_touches_it() {
    let t = Bench::new();
    for format in Foreign::ALL {
        let (source, target) = (t.image("source", Raw, ("abcdef", 65536)), t.path("target"));
        let _ = fs::remove_file(&target);
        let asked = Asked { digests: Some(t.path("kept")), ..Asked::default() };
        t.copy(&source, Raw, &target, format, &asked).unwrap();
        let second = t.copy(&source, Raw, &target, format, &asked).unwrap();
        assert!(second.equal && second.bytes_read_target == 0, "{format:?}: {second:?}");
        fs::File::options().write(true).open(&source).unwrap().write_all_at(&[1], 70_000).unwrap();
        let third = t.copy(&source, Raw, &target, format, &asked).unwrap();
        assert!(third.bytes_read_target == 0 && third.blocks_changed == 1, "{format:?}: {third:?}");
        t.expect(&target, format, &fs::read(&source).unwrap(), "kept");
        let done = Command::new("qemu-io")
            .args(["-f", format.as_str(), "-c", "write -P 9 0 512", path(&target)])
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        let fourth = t.copy(&source, Raw, &target, format, &asked).unwrap();
        assert!(fourth.bytes_read_target > 0 && fourth.blocks_changed == 1, "{format:?}: {fourth:?}");
        t.expect(&target, format, &fs::read(&source).unwrap(), "touched");
        t.clean("kept");
    }
}

#[test]
fn in_place_they_are_not_written_and_on_devices_neither() {
    let t = Bench::new();
    let source = t.image("source", Raw, ("aX", 65536));
    for format in Foreign::ALL {
        let target = t.any_image("target", format.into(), ("ab", 65536));
        let before = fs::read(&target).unwrap();
        for way in [WayWish::InPlace, WayWish::Redo] {
            let e = t.copy(&source, Raw, &target, format, &Asked { way, ..Asked::default() }).unwrap_err();
            assert!(e.kind() == Kind::Refused && e.to_string().contains("torn") && e.advice().is_some(), "{e}");
        }
        let held = QemuLock::take(&target).unwrap().unwrap();
        let e = t.copy(&source, Raw, &target, format, &Asked::default()).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy, "{e}");
        drop(held);
        assert!(fs::read(&target).unwrap() == before);
        t.clean("refused");
    }
    let backing = t.image("disk", Raw, ("abcdefgh", 65536));
    if let Some(device) = Loop::over(&backing) {
        let e = t.copy(&source, Raw, device.path(), Foreign::Vdi, &Asked::default()).unwrap_err();
        assert!(e.kind() == Kind::Refused && e.to_string().contains("block device"), "{e}");
    }
}

/// A raw image would be gone on from; of these nothing can be, so nothing is left to fill somebody's file system.
#[test]
fn a_copy_that_breaks_off_leaves_nothing_behind() {
    let t = Bench::new();
    for format in Foreign::ALL {
        for is_there in [false, true] {
            let target = t.path("target");
            let _ = fs::remove_file(&target);
            if is_there {
                t.any_image("target", format.into(), ("ab", 65536));
            }
            let before = fs::read(&target).ok();
            let source = t.image("source", Raw, ("aXcd", 65536));
            let touched = || fs::File::options().write(true).open(&source).unwrap().write_all_at(b"Y", 7).unwrap();
            let asked = Asked { meanwhile: Some(&touched), ..Asked::default() };
            let e = t.copy(&source, Raw, &target, format, &asked).unwrap_err();
            assert_eq!(fs::read(&target).ok(), before, "{format:?}: {e}");
            t.clean(&format!("{format:?}, {is_there}"));
        }
    }
}

/// Neither is a torn image compared with, nor is a file opened that a header names; what is there stays as it is.
#[test]
fn a_target_that_is_torn_or_names_other_files_is_refused() {
    let t = Bench::new();
    let source = t.image("source", Raw, ("aXcd", 65536));
    let secret = t.image("secret", Raw, ("ssss", 65536));
    let refused = |name: &str, format: Foreign, kind: Kind, word: &str| {
        let (target, before) = (t.path(name), fs::read(t.path(name)).unwrap());
        let e = t
            .copy(&source, Raw, &target, format, &Asked::default())
            .err()
            .unwrap_or_else(|| panic!("{name} was written"));
        assert!(e.kind() == kind && e.chain().contains(word), "{name}: {:?} {}", e.kind(), e.chain());
        assert!(fs::read(&target).unwrap() == before, "{name}");
        t.clean(name);
    };
    let overwrite = |name: &str, at: u64, bytes: &[u8]| {
        fs::File::options().write(true).open(t.path(name)).unwrap().write_all_at(bytes, at).unwrap();
    };
    for format in Foreign::ALL {
        t.image("raw", Raw, ("abcd", 65536));
        refused("raw", format, Kind::Conflict, "no ");
    }
    t.qemu(&["convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", path(&secret), path(&t.path("flat.vmdk"))]);
    refused("flat.vmdk", Foreign::Vmdk, Kind::Conflict, "not all in one file");
    t.qemu(&["create", "-q", "-f", "qed", "-F", "raw", "-b", path(&secret), path(&t.path("child.qed"))]);
    refused("child.qed", Foreign::Qed, Kind::Refused, "parent");
    // Two blocks in one place of the file.
    t.any_image("torn.vdi", Foreign::Vdi.into(), ("a................b", 65536));
    overwrite("torn.vdi", 512, &[0; 8]);
    refused("torn.vdi", Foreign::Vdi, Kind::Corrupt, "faults");
    // A table that lies behind the end of the file.
    t.any_image("torn.qed", Foreign::Qed.into(), ("ab", 65536));
    let mut table = [0; 8];
    let file = fs::File::open(t.path("torn.qed")).unwrap();
    file.read_exact_at(&mut table, 40).unwrap();
    overwrite("torn.qed", u64::from_le_bytes(table), &(1u64 << 40).to_le_bytes());
    refused("torn.qed", Foreign::Qed, Kind::Corrupt, "faults");
    // Both of its headers are gone.
    t.any_image("torn.vhdx", Foreign::Vhdx.into(), ("abcd", 65536));
    overwrite("torn.vhdx", 64 << 10, &[0; 4]);
    overwrite("torn.vhdx", 128 << 10, &[0; 4]);
    refused("torn.vhdx", Foreign::Vhdx, Kind::Refused, "qemu-img cannot check the image");
    // Nothing checks these: two blocks in one place, so that what is written to one is found in both.
    let source = t.image("source", Raw, ("x...............................b", 65536));
    t.any_image("torn.vhd", Foreign::Vpc.into(), ("a...............................b", 65536));
    let mut entry = [0; 4];
    let file = fs::File::open(t.path("torn.vhd")).unwrap();
    file.read_exact_at(&mut entry, 1536).unwrap();
    overwrite("torn.vhd", 1540, &entry);
    let (target, before) = (t.path("torn.vhd"), fs::read(t.path("torn.vhd")).unwrap());
    let e = t.copy(&source, Raw, &target, Foreign::Vpc, &Asked::default()).unwrap_err();
    assert!(e.kind() == Kind::Corrupt && e.to_string().contains("QEMU has written reads as root"), "{e}");
    assert!(fs::read(&target).unwrap() == before);
}

#[test]
fn patches_are_applied_to_them_and_undone() {
    let t = Bench::new();
    for format in Foreign::ALL {
        let (f, image) = (format.as_str(), t.any_image("image", format.into(), ("abc.ef", 65536)));
        t.image("old", Raw, ("abc.ef", 65536));
        for (new, undone) in
            [(("aXc.0f", 65536), true), (("aXc.0fgh", 512), true), (("aX", 512), true), (("a", 511), false)]
        {
            let source = t.image("new", Raw, new);
            for args in [
                &["diff", "new", "--base", "image", "--base-format", f, "-o", "a.patch", "--force"][..],
                &["apply", "a.patch", "image", "--format", f, "--undo", "back.patch"],
                &["apply", "a.patch", "image", "--format", f],
            ] {
                let done = program(&t, "", args);
                let refused = !undone && args[0] == "apply";
                assert_eq!(done.status.success(), !refused, "{f} {new:?} {args:?}: {done:?}");
                if refused {
                    let said = String::from_utf8(done.stderr).unwrap();
                    assert!(said.contains("511 bytes is not a size") && said.contains("hint"), "{said}");
                }
            }
            if undone {
                t.expect(&image, format, &fs::read(&source).unwrap(), f);
                let done = program(&t, "", &["apply", "back.patch", "image", "--format", f]);
                assert!(done.status.success(), "{f} {new:?}: {done:?}");
            }
            t.expect(&image, format, &fs::read(t.path("old")).unwrap(), f);
            judged(&t, &image, format, 6 << 16, f);
            let _ = fs::remove_file(t.path("back.patch"));
            t.clean(f);
        }
    }
}

/// A name says nothing of these formats, and a dry run takes nothing and changes nothing.
#[test]
fn only_where_it_is_named_is_such_a_format_written() {
    let t = Bench::new();
    let source = t.image("source", Raw, ("ab.d", 5));
    for format in Foreign::ALL {
        let name = format!("image.{}", format.as_str());
        let plain = program(&t, "", &["copy", "source", &name]);
        assert!(plain.status.success() && fs::read(t.path(&name)).unwrap() == fs::read(&source).unwrap(), "{plain:?}");
        let named = ["copy", "source", &name, "--target-format", format.as_str()];
        let done = program(&t, "", &named);
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.contains("this is no ") && said.contains("hint"), "{said}");
        assert!(fs::read(t.path(&name)).unwrap() == fs::read(&source).unwrap());
        fs::remove_file(t.path(&name)).unwrap();
        let dry = program(&t, "", &[&named[..], &["-n"]].concat());
        assert!(dry.status.success() && !t.path(&name).exists(), "{dry:?}");
        assert!(program(&t, "", &named).status.success());
        let before = fs::read(t.path(&name)).unwrap();
        let changed = t.image("changed", Raw, ("aX.d", 5));
        let dry = program(&t, "", &["copy", path(&changed), &name, "--target-format", format.as_str(), "-n"]);
        let said = String::from_utf8(dry.stdout).unwrap();
        assert!(said.contains("would change in 1 blocks") && fs::read(t.path(&name)).unwrap() == before, "{said}");
        t.clean(&name);
    }
}

#[test]
fn a_large_sparse_image_costs_little() {
    let t = Bench::new();
    let (source, size) = (t.path("big.raw"), 200u64 << 30);
    let file = fs::File::create(&source).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(&[7; 70_000], 100 << 30).unwrap();
    file.write_all_at(&[8; 5], size - 5).unwrap();
    for format in [Foreign::Vmdk, Foreign::Qed] {
        let target = t.path("target");
        let _ = fs::remove_file(&target);
        let copied = t.copy(&source, Raw, &target, format, &Asked::default()).unwrap();
        assert!(copied.size == DiskSize(size) && copied.blocks_changed <= 4, "{copied:?}");
        assert!(fs::metadata(&target).unwrap().blocks() * 512 < 64 << 20, "{format:?}");
        assert!(t.copy(&source, Raw, &target, format, &Asked::default()).unwrap().equal);
    }
}
