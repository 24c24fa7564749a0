//! The check of an image that is going to be built on, against QEMU's own: what ours calls sound, QEMU does not call
//! corrupt.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use virt_replica::block::{ByteRange, DiskSize};
use virt_replica::error::Kind;
use virt_replica::image::ImageMut;
use virt_replica::image::qcow2::{self, check::check_plain};

const MIB: u64 = 1 << 20;

/// An image as the store writes it: data here and there, some of it given back.
fn image(path: &Path) {
    let writer = qcow2::create(path, DiskSize(3 << 30), None).unwrap();
    for at in [0, 5, 6, 7, 600, 601, 2000, 3071] {
        writer.write_at(at * MIB, &vec![at as u8 | 1; 300_000]).unwrap();
    }
    writer.zero(ByteRange::new(6 * MIB, 7 * MIB)).unwrap();
    writer.sync().unwrap();
}

fn verdict(path: &Path) -> Result<(), Kind> {
    check_plain(&File::open(path).unwrap(), path).map_err(|e| e.kind())
}

/// Exit code of `qemu-img check`: 0 sound, 2 corrupt, 3 leaks only; 1 not checked.
fn qemu_says(path: &Path) -> i32 {
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    output.status.code().unwrap()
}

#[test]
fn images_of_the_store_and_of_qemu_are_sound() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours.qcow2");
    image(&ours);
    assert_eq!((verdict(&ours), qemu_says(&ours)), (Ok(()), 0));
    let raw = dir.path().join("raw");
    std::fs::write(&raw, vec![7; 5 << 20]).unwrap();
    let theirs = dir.path().join("theirs.qcow2");
    let done = Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &theirs]).status();
    assert!(done.unwrap().success());
    assert_eq!(verdict(&theirs), Ok(()));
}

#[test]
fn images_that_are_not_plain_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for options in ["cluster_size=4096", "compat=0.10", "refcount_bits=64", "extended_l2=on,cluster_size=128k"] {
        let path = dir.path().join(format!("{options}.qcow2"));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg("64M");
        assert!(create.status().unwrap().success());
        assert_eq!(verdict(&path), Err(Kind::Refused), "{options}");
    }
    let nothing = dir.path().join("nothing");
    std::fs::write(&nothing, "").unwrap();
    assert_eq!(verdict(&nothing), Err(Kind::Corrupt));
}

/// Bits flipped at random in every table, ends cut off: QEMU finds nothing wrong where we found nothing.
#[test]
fn whatever_is_called_sound_qemu_calls_sound() {
    let seed: u64 = std::env::var("VR_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into());
    println!("VR_SEED={seed}");
    let mut state = seed | 1;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    image(&path);
    let sound = std::fs::read(&path).unwrap();
    let tables: Vec<u64> = (0..sound.len() as u64 / 65536)
        .filter(|n| {
            let cluster = &sound[(n * 65536) as usize..][..65536];
            // Data of the model is one byte over and over.
            cluster.iter().any(|b| *b != cluster[0]) && cluster.iter().filter(|b| **b == 0).count() > 60_000
        })
        .collect();
    assert!(tables.len() >= 4, "header, tables and blocks: {tables:?}");
    let mut found = 0;
    for turn in 0..150 {
        std::fs::write(&path, &sound).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        if turn % 10 == 0 {
            file.set_len(random(sound.len() as u64)).unwrap();
        } else {
            for _ in 0..1 + random(3) {
                // Where entries stand, mostly at the start of a table.
                let at = tables[random(tables.len() as u64) as usize] * 65536 + random(400);
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << random(8)], at).unwrap();
            }
        }
        let ours = verdict(&path);
        found += u32::from(ours.is_err());
        if ours.is_ok() {
            let theirs = qemu_says(&path);
            assert!(matches!(theirs, 0 | 3), "turn {turn}: we say sound, QEMU says {theirs}");
        }
    }
    assert!(found > 30, "only {found} of 150 damages were found: the test damages nothing");
}
