//! Images of other hypervisors as sources, made by qemu-img; and those that are not whole in themselves, refused.

use super::patches::program;
use super::support::*;
use std::fs;
use std::os::unix::fs::FileExt;
use virt_replica::block::{BLOCK_LEN, DiskSize};
use virt_replica::error::{Error, Kind};
use virt_replica::image::Format::{self, Qcow2, Raw};
use virt_replica::image::foreign::format::Foreign;
use virt_replica::plain::source::Source;

/// With options of qemu-img, where the format has kinds.
pub const KINDS: [(Foreign, &str); 9] = [
    (Foreign::Vmdk, "subformat=monolithicSparse"),
    (Foreign::Vmdk, "subformat=streamOptimized"),
    (Foreign::Vdi, "static=off"),
    (Foreign::Vdi, "static=on"),
    (Foreign::Vhdx, "subformat=dynamic"),
    (Foreign::Vhdx, "subformat=fixed"),
    (Foreign::Vpc, "subformat=dynamic,force_size=on"),
    (Foreign::Vpc, "subformat=fixed,force_size=on"),
    (Foreign::Qed, "cluster_size=65536"),
];

const SHAPES: [(&str, usize); 4] =
    [("a", 512), ("ab.d", 65536), ("a..............................z", 4096), ("......", 65536)];

fn open(t: &Bench, name: &str, format: Foreign) -> Result<Source, Error> {
    Source::open_foreign(&t.path(name), format, &t.read_options())
}

#[test]
fn every_kind_of_every_format_is_copied_to_raw_and_qcow2() {
    let t = Bench::new();
    for (format, options) in KINDS {
        for shape in SHAPES {
            let raw = t.image("raw", Raw, shape);
            let _ = fs::remove_file(t.path("source"));
            let (from, to) = (t.path("raw"), t.path("source"));
            t.qemu(&["convert", "-O", format.as_str(), "-o", options, from.to_str().unwrap(), to.to_str().unwrap()]);
            // Some round their sizes up; what QEMU reads is what is wanted.
            let (judge, name) = (t.path("judge"), format!("{format:?} {options} {shape:?}"));
            let judge_text = judge.to_str().unwrap();
            t.qemu(&["convert", "-f", format.as_str(), "-O", "raw", to.to_str().unwrap(), judge_text]);
            let wanted = fs::read(&judge).unwrap();
            assert!(wanted.starts_with(&fs::read(&raw).unwrap()), "{name}");
            for (target, before) in
                [("out.raw", None), ("out.raw", Some(("xb", 100))), ("out.qcow2", Some(("xbcdefgh", 512)))]
            {
                let to = if target.ends_with("raw") { Raw } else { Format::Qcow2 };
                let _ = fs::remove_file(t.path(target));
                if let Some(before) = before {
                    t.image(target, to, before);
                }
                let args = ["copy", "--source-format", format.as_str(), "source", target];
                let done = program(&t, "", &args);
                assert!(done.status.success(), "{name}: {done:?}");
                t.expect(&t.path(target), to, &wanted, &name);
                let again = program(&t, "", &args);
                assert!(String::from_utf8(again.stdout).unwrap().contains("is as its source"), "{name}");
                t.clean(&name);
            }
        }
    }
}

/// A patch is made of one, and fits the raw image that it was compared with.
#[test]
fn a_patch_is_made_of_an_image_of_another_format() {
    let t = Bench::new();
    t.image("new", Raw, ("aXc.e", 65536));
    t.image("old", Raw, ("abcde", 65536));
    t.qemu(&["convert", "-O", "vdi", t.path("new").to_str().unwrap(), t.path("new.vdi").to_str().unwrap()]);
    for args in [
        &["diff", "new.vdi", "--source-format", "vdi", "--base", "old", "-o", "a.patch"][..],
        &["apply", "a.patch", "old"],
        &["digest", "new.vdi", "--format", "vdi", "-o", "d"],
    ] {
        let done = program(&t, "", args);
        assert!(done.status.success(), "{done:?}");
    }
    assert!(fs::read(t.path("old")).unwrap() == fs::read(t.path("new")).unwrap());
}

/// QEMU's driver would open whatever such a header names.
#[test]
fn what_names_other_files_is_refused() {
    let t = Bench::new();
    let raw = t.image("raw", Raw, ("ab", 65536));
    let (raw, path) = (raw.to_str().unwrap(), |name: &str| t.path(name).to_str().unwrap().to_owned());
    let refused = |name: &str, format: Foreign, kind: Kind| {
        let e = open(&t, name, format).err().unwrap_or_else(|| panic!("{name} was opened"));
        assert!(e.kind() == kind && e.hint_text().is_some(), "{name}: {}", e.chain());
    };
    for kind in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let name = format!("{kind}.vmdk");
        t.qemu(&["convert", "-O", "vmdk", "-o", &format!("subformat={kind}"), raw, &path(&name)]);
        refused(&name, Foreign::Vmdk, Kind::Conflict);
    }
    t.qemu(&["convert", "-O", "vmdk", raw, &path("base.vmdk")]);
    t.qemu(&["create", "-f", "vmdk", "-F", "vmdk", "-b", &path("base.vmdk"), &path("child.vmdk")]);
    refused("child.vmdk", Foreign::Vmdk, Kind::Refused);
    t.qemu(&["create", "-f", "qed", "-F", "raw", "-b", raw, &path("child.qed")]);
    refused("child.qed", Foreign::Qed, Kind::Refused);
    // A sparse file that leaves its size to its description.
    let file = fs::File::options().write(true).open(t.path("base.vmdk")).unwrap();
    file.write_all_at(&[0; 8], 12).unwrap();
    refused("base.vmdk", Foreign::Vmdk, Kind::Conflict);
    t.qemu(&["convert", "-O", "vpc", raw, &path("child.vhd")]);
    fs::File::options().write(true).open(t.path("child.vhd")).unwrap().write_all_at(&[0, 0, 0, 4], 60).unwrap();
    refused("child.vhd", Foreign::Vpc, Kind::Refused);
}

#[test]
fn what_is_of_another_format_is_told_so() {
    let t = Bench::new();
    t.image("qcow2", Qcow2, ("ab", 65536));
    for name in ["raw", "empty", "short"] {
        t.image(
            name,
            Raw,
            [("ab", 65536), ("", 0), ("a", 3)][["raw", "empty", "short"].iter().position(|n| *n == name).unwrap()],
        );
    }
    for format in Foreign::ALL {
        for name in ["raw", "qcow2", "empty", "short"] {
            assert_eq!(open(&t, name, format).err().map(|e| e.kind()), Some(Kind::Conflict), "{name} as {format:?}");
        }
    }
    let source = t.image("raw", Raw, ("ab", 65536));
    t.qemu(&["convert", "-O", "vhdx", source.to_str().unwrap(), t.path("a.vhdx").to_str().unwrap()]);
    let opened = open(&t, "a.vhdx", Foreign::Vhdx).unwrap();
    assert!(opened.size() == DiskSize(2 * BLOCK_LEN as u64) && opened.how.contains("vhdx"));
    opened.close().unwrap();
}
