//! Changed-block tracking of a domain that is shut off, by the bitmaps that lie in its images.

use super::domain::Disk;
use super::support::{Host, Lab, PATIENCE, SyncResult};
use super::tracked::{Tracked, says};
use serde_json::json;

/// What was written before the domain ended, and what its owner does to the image with QEMU's own programs.
#[test]
fn off_by_bitmap() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmoff");
    tracked.write();
    tracked.shut_down();
    let result = tracked.sealed_by(&["bitmap", "digest"]);
    assert_eq!(result.report["capture"], "off");
    assert_eq!(result.report["consistency"], "crash", "it was ended by hand, and no guest shut down");
    says(&result, "vdb", "a raw image keeps no dirty bitmap");
    assert!(result.bytes("vda", "blocks_changed") > 0);
    let written = result.bytes("vda", "bytes_read");
    assert!(written > 0 && written < 2 << 20, "only what is marked is read: {written} bytes");

    // Nothing happened: nothing is read. That raw is compared every time is no alarm.
    let result = tracked.sealed_by(&["bitmap", "digest"]);
    assert_eq!((result.bytes("vda", "bytes_read"), result.bytes("vda", "blocks_changed")), (0, 0));
    assert_eq!(result.report["warnings"], json!([]));

    tracked.write_off();
    let result = tracked.sealed_by(&["bitmap", "digest"]);
    assert!(result.bytes("vda", "blocks_changed") > 0);

    tracked.start();
    tracked.write();
    let result = tracked.sealed_by(&["bitmap", "digest"]);
    says(&result, "vdb", "QEMU was restarted");
    tracked.by_bitmap_again();
}

/// Killed between the halves of the turnover: one or both lie in the image, and the head says which counts.
#[test]
fn off_and_killed_at_each_step() {
    let lab = Lab::get();
    let mut tracked = Tracked::with(&lab, "bmoffkill", &[Disk::qcow2("64M")]);
    tracked.shut_down();
    for point in ["3", "3c", "5b", "5f", "6f", "8b"] {
        println!("--- off, killed at {point}");
        tracked.write_off();
        tracked.vm.sync_with(&format!("{point}=kill"), &[]).exit(137);
        tracked.write_off();
        let result = tracked.sealed_by(&["bitmap"]);
        assert!(result.bytes("vda", "blocks_changed") > 0);
    }
}

/// Begun as off, ended as running, with the successor added while it was off.
#[test]
fn started_from_off_while_it_is_read() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmstart");
    for point in ["3c", "5b", "5f"] {
        println!("--- started at {point}");
        tracked.write();
        tracked.shut_down();
        tracked.write_off();
        let mut run = tracked.vm.start_sync(&format!("{point}=sleep:2500"), &[]);
        match point {
            "3c" => run.wait_step(3),
            _ => run.wait_step(5),
        }
        // What holds the image for the length of a turnover refuses a start, which then is to be repeated.
        super::support::eventually("the domain starts", PATIENCE, || {
            (Host::A.run(&["virsh", "start", &tracked.vm.name]).code == 0).then_some(())
        });
        tracked.write();
        let result = SyncResult::of(run.wait(PATIENCE)).sealed();
        assert_eq!(result.report["consistency"], "crash", "the point is one of a running domain");
        tracked.check(&result, &["bitmap", "digest"]);
        tracked.by_bitmap_again();
    }
}

/// A bitmap that a killed QEMU left in the image is removed, and its successor put there in the same run.
#[test]
fn off_after_qemu_was_killed() {
    let lab = Lab::get();
    let mut tracked = Tracked::with(&lab, "bmoffdead", &[Disk::qcow2("64M")]);
    tracked.by_bitmap_again();
    tracked.write();
    tracked.kill_qemu();
    let result = tracked.sealed_by(&["digest"]);
    says(&result, "vda", "QEMU ended without saving the dirty bitmap");
    tracked.write_off();
    tracked.sealed_by(&["bitmap"]);
}

/// The old version of qcow2 has no place for bitmaps: tracked while it runs, compared while it is off.
#[test]
fn qcow2_of_version_2() {
    let lab = Lab::get();
    let mut tracked = Tracked::with(&lab, "bmv2", &[Disk::qcow2_with("64M", "compat=0.10")]);
    tracked.by_bitmap_again();
    tracked.write();
    tracked.shut_down();
    let result = tracked.vm.sync().sealed();
    assert_eq!(result.mode("vda"), "digest");
    says(&result, "vda", "qcow2 version 2 keeps no dirty bitmap");
    assert_eq!(result.report["warnings"], json!([]));
    tracked.vm.compare_with_head();
    tracked.start();
    tracked.sealed_by(&["digest"]);
    tracked.by_bitmap_again();
}

/// An image over a golden one, and one whose data lies in another file: the turnover leaves the names in the headers
/// alone.
#[test]
fn off_on_a_golden_image_and_with_a_data_file() {
    let lab = Lab::get();
    let golden = r#"qemu-img create -q -f raw "$2/golden.raw" 64M
        qemu-io -f raw -c 'write -P 0x77 32M 1M' "$2/golden.raw" >&2
        qemu-img create -q -f qcow2 -F raw -b golden.raw "$1""#;
    let apart = r#"qemu-img create -q -f qcow2 -o data_file="$2/data.raw" "$1" 64M"#;
    let disks = [Disk::made_by("qcow2", golden), Disk::made_by("qcow2", apart)];
    let mut tracked = Tracked::with(&lab, "bmgold", &disks);
    let names = |image: &str| {
        let info: serde_json::Value =
            serde_json::from_str(&Host::A.output(&["qemu-img", "info", "--output=json", image])).unwrap();
        (
            info["backing-filename"].clone(),
            info["backing-filename-format"].clone(),
            info["format-specific"]["data"]["data-file"].clone(),
        )
    };
    tracked.shut_down();
    let before: Vec<_> = tracked.vm.images.iter().map(|i| names(i)).collect();
    for _ in 0..2 {
        tracked.write_off();
        tracked.sealed_by(&["bitmap", "bitmap"]);
    }
    assert_eq!(tracked.vm.images.iter().map(|i| names(i)).collect::<Vec<_>>(), before);
    for image in &tracked.vm.images {
        Host::A.ok(&["qemu-img", "check", "-q", image]);
    }
    tracked.start();
    tracked.by_bitmap_again();
}

/// Shrunk and grown again by the owner's own hand, while it is off.
#[test]
fn off_and_shrunk_and_grown_again() {
    let lab = Lab::get();
    let mut tracked = Tracked::with(&lab, "bmoffcut", &[Disk::qcow2("64M")]);
    tracked.hmp(&[(0, "write -P 0x55 60M 1M".into())]);
    tracked.vm.sync().sealed();
    tracked.shut_down();
    let image = tracked.vm.images[0].clone();
    Host::A.ok(&["qemu-img", "resize", "-q", "--shrink", &image, "32M"]);
    Host::A.ok(&["qemu-img", "resize", "-q", &image, "64M"]);
    let result = tracked.sealed_by(&["digest"]);
    says(&result, "vda", "shrunk and grown again");
    tracked.write_off();
    tracked.sealed_by(&["bitmap"]);
}
