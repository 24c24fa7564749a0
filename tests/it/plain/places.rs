//! Where images lie: devices with sectors of 4 KiB, and file systems that share blocks between files. And how fast a
//! copy may be.

use super::patches::program;
use super::support::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use virt_replica::block::DiskSize;
use virt_replica::error::Kind;
use virt_replica::image::Format::{Qcow2, Raw};
use virt_replica::image::foreign::format::{AnyFormat, Foreign};
use virt_replica::plain::{Way, WayWish};

/// Contents as in the table of all pairs of formats: around the sectors of 512 bytes and of 4 KiB, zeros that end
/// within one, and the whole device.
const SHAPES: [(&str, usize); 12] = [
    ("a", 1),
    ("a", 511),
    ("a", 512),
    ("a", 4095),
    ("a", 4096),
    ("a", 4097),
    ("ab", 512),
    ("a0", 513),
    ("ab0", 4608),
    ("0.0a", 7),
    ("abcdefg.", 65024),
    ("x.c0efgh", 65536),
];

/// A device whose sectors are larger than QEMU's of 512 bytes takes images of any size, and behind the end of what was
/// copied it is as it was.
#[test]
fn a_device_with_sectors_of_4_kib_takes_images_of_any_size() {
    let t = Bench::new();
    let backing = t.image("disk", Raw, ("ABCDEFGH", 65536));
    let Some(device) = Loop::with(&backing, &["--sector-size", "4096"]) else { return };
    let before = fs::read(device.path()).unwrap();
    let put_back = || {
        let file = fs::File::options().write(true).open(device.path()).unwrap();
        file.write_all_at(&before, 0).unwrap();
        file.sync_all().unwrap();
    };
    for from in [Raw, Qcow2] {
        for way in [WayWish::Redo, WayWish::InPlace] {
            for shape in SHAPES {
                let name = format!("{shape:?}, {from:?}, {way:?}");
                let source = t.image("source", from, shape);
                // As the copy is told to see it: to its very end, also behind a sector of a file.
                let wanted = t.content(&source, from);
                let copied = t.copy(&source, from, device.path(), Raw, &Asked { way, ..Asked::default() }).unwrap();
                assert_eq!(copied.size_before, DiskSize(wanted.len() as u64), "{name}");
                let now = fs::read(device.path()).unwrap();
                assert!(now[..wanted.len()] == wanted[..], "{name}: the content");
                assert!(now[wanted.len()..] == before[wanted.len()..], "{name}: behind its end");
                assert!(t.copy(&source, from, device.path(), Raw, &Asked::default()).unwrap().equal, "{name}");
                t.clean(&name);
                put_back();
            }
        }
    }
    let larger = t.image("larger", Raw, ("abcdefghi", 1));
    let e = t.copy(&larger, Raw, device.path(), Raw, &Asked::default()).unwrap_err();
    assert!(e.kind() == Kind::Refused && e.to_string().contains("not resized"), "{e}");
    assert!(fs::read(device.path()).unwrap() == before);
}

/// It is a source as any other, in both formats, and of an image that is larger or smaller only what there is.
#[test]
fn a_device_with_sectors_of_4_kib_is_a_source() {
    let t = Bench::new();
    let backing = t.image("disk", Raw, ("a.c0efgh", 65536));
    let Some(device) = Loop::with(&backing, &["--sector-size", "4096"]) else { return };
    let wanted = fs::read(device.path()).unwrap();
    for to in [Raw, Qcow2] {
        for before in [None, Some(("ab", 4097)), Some(("abcdefghijk", 512))] {
            let target = t.path("target");
            let _ = fs::remove_file(&target);
            if let Some(before) = before {
                t.image("target", to, before);
            }
            t.copy(device.path(), Raw, &target, to, &Asked::default()).unwrap();
            t.expect(&target, to, &wanted, &format!("{before:?} -> {to:?}"));
        }
    }
    // A qcow2 image that lies on the device itself.
    let image = t.image("inside.qcow2", Qcow2, ("ab.d", 65536));
    let bytes = fs::read(&image).unwrap();
    let large = t.path("large");
    let file = fs::File::create(&large).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len((bytes.len() as u64).next_multiple_of(1 << 20)).unwrap();
    let Some(device) = Loop::with(&large, &["--sector-size", "4096"]) else { return };
    let target = t.path("outside.raw");
    t.copy(device.path(), Qcow2, &target, Raw, &Asked::default()).unwrap();
    t.expect(&target, Raw, &t.content(&image, Qcow2), "a qcow2 image on a device");
}

/// A file system in a file, mounted; unmounted with the value.
struct Mounted(PathBuf);

impl Mounted {
    /// `None` where this machine mounts nothing, or has no such file system.
    fn new(t: &Bench, kind: &str) -> Option<Mounted> {
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let (file, at) = (t.path(kind), t.path(&format!("{kind}.mount")));
        fs::File::create(&file).unwrap().set_len(320 << 20).unwrap();
        fs::create_dir(&at).unwrap();
        let run = |name: &str, args: &[&Path]| Command::new(name).args(args).output();
        let made = run(&format!("mkfs.{kind}"), &[&file]);
        let made = made.unwrap_or_else(|e| panic!("mkfs.{kind}: {e}; tests/run/setup installs it"));
        assert!(made.status.success(), "{made:?}");
        let mounted = run("mount", &[Path::new("-o"), Path::new("loop"), &file, &at]).unwrap();
        match mounted.status.success() {
            true => Some(Mounted(at)),
            false => {
                let may = rustix::process::geteuid().is_root() && known.contains(kind);
                assert!(!may, "{mounted:?}");
                eprintln!("skipped: {kind} cannot be mounted here (needs root and the kernel's {kind})");
                None
            }
        }
    }

    fn used_bytes(&self) -> u64 {
        rustix::fs::syncfs(fs::File::open(&self.0).unwrap()).unwrap();
        let s = rustix::fs::statvfs(&self.0).unwrap();
        (s.f_blocks - s.f_bfree) * s.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Where the file system can, a clone is changed and takes the place, unasked; what both have in common is there once.
#[test]
fn where_blocks_can_be_shared_a_clone_takes_the_place_unasked() {
    const BLOCKS: usize = 256;
    let outer = Bench::new();
    for kind in ["xfs", "btrfs"] {
        let Some(mounted) = Mounted::new(&outer, kind) else { continue };
        let t = Bench::within(&mounted.0);
        let letters: String = (0..BLOCKS).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
        for format in [Raw, Qcow2].map(AnyFormat::from).into_iter().chain([Foreign::Vmdk.into(), Foreign::Vhdx.into()])
        {
            let name = format!("{kind}, {format:?}");
            let (source, target) =
                (t.any_image("source", format, (&letters, 65536)), t.any_image("target", format, (&letters, 65536)));
            let kept = t.path("kept");
            fs::hard_link(&target, &kept).unwrap();
            let changed = t.any_image("source", format, (&format!("Z{}", &letters[1..]), 65536));
            assert_eq!(source, changed);
            let (old, used) = (t.content(&target, format), mounted.used_bytes());
            let copied = t.copy(&source, format, &target, format, &Asked::default()).unwrap();
            assert_eq!((copied.way, copied.blocks_changed), (Some(Way::Reflink), 1), "{name}");
            t.expect(&target, format, &t.content(&source, format), &name);
            t.expect(&kept, format, &old, &format!("{name}: the old one, by its other name"));
            let grown = mounted.used_bytes().saturating_sub(used);
            assert!(grown < (BLOCKS as u64 * 65536) / 2, "{name}: {grown} bytes more are used");
            let asked = Asked { way: WayWish::Reflink, ..Asked::default() };
            t.any_image("source", format, (&format!("Y{}", &letters[1..]), 65536));
            assert_eq!(t.copy(&source, format, &target, format, &asked).unwrap().way, Some(Way::Reflink), "{name}");
            fs::remove_file(kept).unwrap();
            t.clean(&name);
        }
    }
}

/// From below only: how long it takes beyond that is the machine's affair.
#[test]
fn a_copy_takes_at_least_as_long_as_its_rate_says() {
    let t = Bench::new();
    let letters: String = ('a'..='x').cycle().take(48).collect();
    t.image("source", Raw, (&letters, 65536));
    for target in ["new", "there"] {
        if target == "there" {
            t.image("there", Raw, (".", 65536));
        }
        let began = Instant::now();
        let done = program(&t, "", &["copy", "source", target, "--rate", "1M", "--json"]);
        let took_s = began.elapsed().as_secs_f64();
        assert!(done.status.success(), "{done:?}");
        let said = String::from_utf8(done.stdout).unwrap();
        let copied: serde_json::Value = said.lines().map(|l| serde_json::from_str(l).unwrap()).next_back().unwrap();
        let sent = find(&copied, "bytes_sent").unwrap_or_else(|| panic!("{said}"));
        assert!(sent >= 48 << 16, "noise does not compress: {sent}");
        let least_s = sent as f64 / f64::from(1 << 20);
        assert!(took_s >= least_s * 0.98, "{target}: {sent} bytes in {took_s} s; at 1 MiB/s at least {least_s} s");
        assert!(fs::read(t.path("source")).unwrap() == fs::read(t.path(target)).unwrap());
    }
}

/// A number of this name, wherever it stands.
fn find(value: &serde_json::Value, name: &str) -> Option<u64> {
    match value {
        serde_json::Value::Object(fields) => {
            fields.get(name).and_then(|v| v.as_u64()).or_else(|| fields.values().find_map(|v| find(v, name)))
        }
        serde_json::Value::Array(all) => all.iter().find_map(|v| find(v, name)),
        _ => None,
    }
}
