//! Changed-block tracking under other hands: bitmaps, checkpoints, snapshots and sizes that somebody else changes.

use super::bitmaps::{remove, remove_ours};
use super::domain::Disk;
use super::support::{Host, Lab};
use super::tracked::{Tracked, reason, says};
use serde_json::json;

#[test]
fn bitmap_removed_by_hand() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmgone");
    tracked.write();
    remove_ours(&tracked, 0);
    tracked.write();
    let result = tracked.sealed_by(&["digest", "bitmap"]);
    says(&result, "vda", "no dirty bitmap leads on");
    tracked.by_bitmap_again();
}

#[test]
fn bitmap_disabled_by_hand() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmdisabled");
    for disk in [0, 1] {
        let arguments = json!({"node": tracked.node(disk), "name": tracked.ours(disk)[0]});
        tracked.qmp(json!({"execute": "block-dirty-bitmap-disable", "arguments": arguments}));
    }
    tracked.write();
    let result = tracked.sealed_by(&["digest", "digest"]);
    says(&result, "vda", "somebody disabled the dirty bitmap");
    says(&result, "vdb", "somebody disabled the dirty bitmap");
    tracked.by_bitmap_again();
}

/// Another program's bitmaps go on recording beside ours, and are there after the domain has ended.
#[test]
fn foreign_bitmap_and_checkpoint_stay() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmtheirs");
    let arguments = json!({"node": tracked.node(0), "name": "theirs", "persistent": true});
    tracked.qmp(json!({"execute": "block-dirty-bitmap-add", "arguments": arguments}));
    tracked.vm.virsh(&[
        "checkpoint-create-as",
        "c1",
        "--diskspec",
        "vda,checkpoint=bitmap",
        "--diskspec",
        "vdb,checkpoint=no",
    ]);
    let marked = |tracked: &Tracked, name: &str| {
        let found = tracked.bitmaps(0).into_iter().find(|b| b.name == name).unwrap_or_else(|| panic!("{name} is gone"));
        assert!(found.recording && found.sound, "{found:?}");
        found.dirty_bytes
    };
    let mut before = (0, 0);
    for _ in 0..3 {
        tracked.by_bitmap_again();
        let now = (marked(&tracked, "theirs"), marked(&tracked, "c1"));
        assert!(now.0 > before.0 && now.1 > before.1, "they go on recording: {now:?} after {before:?}");
        before = now;
    }
    assert_eq!(tracked.vm.virsh(&["checkpoint-list", "--name"]).trim(), "c1");
    tracked.vm.virsh(&["checkpoint-delete", "c1"]);
    tracked.by_bitmap_again();
    tracked.write();
    tracked.shut_down();
    tracked.sealed_by(&["bitmap", "digest"]);
    assert!(tracked.bitmaps(0).iter().any(|b| b.name == "theirs" && b.sound));
}

/// Somebody's snapshot, on both disks or on one.
fn snapshot(tracked: &Tracked, disks: &[usize]) -> Vec<String> {
    let mut words =
        vec!["snapshot-create-as".to_owned(), "theirs".into(), "--disk-only".into(), "--no-metadata".into()];
    let mut files = tracked.vm.images.clone();
    for (disk, file) in files.iter_mut().enumerate() {
        let name = super::tracked::disk_name(disk);
        words.push("--diskspec".into());
        match disks.contains(&disk) {
            true => {
                *file = format!("{}/{name}.theirs.qcow2", tracked.vm.dir);
                words.push(format!("{name},file={file}"));
            }
            false => words.push(format!("{name},snapshot=no")),
        }
    }
    tracked.vm.virsh(&words.iter().map(String::as_str).collect::<Vec<_>>());
    files
}

/// Left there: libvirt copies the bitmap into the overlay, empty, and below it marks only what came before.
#[test]
fn foreign_snapshot_between_runs() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmsnap");
    let bases = tracked.vm.images.clone();
    tracked.write();
    tracked.vm.images = snapshot(&tracked, &[0, 1]);
    tracked.write();
    let result = tracked.sealed_by(&["digest", "digest"]);
    for disk in ["vda", "vdb"] {
        says(&result, disk, "not on the image that the dirty bitmap was begun on");
    }
    tracked.by_bitmap_again();

    // Committed by the same hand: nothing is believed across that either, and all of ours is cleaned away.
    tracked.write();
    for disk in ["vda", "vdb"] {
        tracked.vm.virsh(&["blockcommit", disk, "--active", "--pivot", "--wait"]);
    }
    tracked.vm.images = bases;
    tracked.write();
    tracked.sealed_by(&["digest", "digest"]);
    tracked.by_bitmap_again();
}

/// Made and committed between two runs: libvirt has put the marks together, and they are right.
#[test]
fn foreign_snapshot_made_and_committed_between_runs() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmcommit");
    tracked.write();
    snapshot(&tracked, &[0, 1]);
    let commands: Vec<(usize, String)> = [0, 1].map(|disk| (disk, "write -P 0x99 40M 192k".to_owned())).into();
    tracked.hmp(&commands);
    for disk in ["vda", "vdb"] {
        tracked.vm.virsh(&["blockcommit", disk, "--active", "--pivot", "--wait"]);
    }
    tracked.write();
    tracked.sealed_by(&["bitmap", "bitmap"]);
    tracked.by_bitmap_again();
}

/// The base pulled into the snapshot's overlay: one layer again, with a bitmap of our name, begun when half was over.
#[test]
fn foreign_snapshot_pulled_between_runs() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmpull");
    tracked.write();
    tracked.vm.images = snapshot(&tracked, &[0]);
    tracked.write();
    tracked.vm.virsh(&["blockpull", "vda", "--wait"]);
    let result = tracked.sealed_by(&["digest", "bitmap"]);
    says(&result, "vda", "not on the image that the dirty bitmap was begun on");
    tracked.by_bitmap_again();
}

/// Removed by hand below a snapshot, ours cannot come back; what is left on the lower layer goes with a run while off.
#[test]
fn bitmaps_below_a_snapshot_are_swept_when_they_can_be() {
    let lab = Lab::get();
    let mut tracked = Tracked::with(&lab, "bmbelow", &[Disk::qcow2("64M")]);
    let base = tracked.vm.images[0].clone();
    tracked.write();
    tracked.vm.images = snapshot(&tracked, &[0]);
    tracked.sealed_by(&["digest"]);
    let ours =
        |tracked: &Tracked, image: &str| tracked.bitmaps_of(image).iter().filter(|b| b.name.starts_with("vr-")).count();
    assert_eq!(ours(&tracked, &base), 1, "QEMU does not let go of it while it is read-only");
    tracked.by_bitmap_again();
    tracked.shut_down();
    tracked.write_off();
    tracked.sealed_by(&["bitmap"]);
    assert_eq!(ours(&tracked, &base), 0);
    tracked.start();
    tracked.by_bitmap_again();
}

/// QEMU goes back to no internal snapshot while there is a bitmap, so an image that holds one gets none of ours.
#[test]
fn internal_snapshot_made_and_gone_back_to() {
    let lab = Lab::get();
    let mut tracked = Tracked::with(&lab, "bminternal", &[Disk::qcow2("64M")]);
    tracked.by_bitmap_again();
    tracked.vm.virsh(&["snapshot-create-as", "inside"]);
    tracked.write();
    for _ in 0..2 {
        tracked.write();
        let result = tracked.vm.sync().sealed();
        assert_eq!(result.mode("vda"), "digest");
        says(&result, "vda", "the image holds internal snapshots");
        assert_eq!(result.report["warnings"], json!([]), "it is known why");
        assert_eq!(tracked.ours(0), [""; 0]);
        tracked.vm.compare_with_head();
    }
    tracked.vm.virsh(&["snapshot-revert", "inside"]);
    assert_eq!(tracked.vm.state(), "running");
    let result = tracked.vm.sync().sealed();
    assert_eq!(result.mode("vda"), "digest");
    tracked.vm.compare_with_head();
    tracked.vm.virsh(&["snapshot-delete", "inside"]);
    tracked.sealed_by(&["digest"]);
    tracked.by_bitmap_again();
}

/// Our bitmaps hinder no resize, but for one that a killed QEMU left: until the next run has taken it away.
#[test]
fn resize_after_qemu_was_killed() {
    let lab = Lab::get();
    let mut tracked = Tracked::with(&lab, "bmstuck", &[Disk::qcow2("64M")]);
    tracked.by_bitmap_again();
    tracked.kill_qemu();
    tracked.start();
    let resize = ["virsh", "blockresize", &tracked.vm.name.clone(), "vda", "80M"];
    Host::A.run(&resize).exit(1).says(&["inconsistent"]);
    tracked.sealed_by(&["digest"]);
    Host::A.ok(&resize);
    tracked.sealed_by(&["bitmap"]);
}

/// Grown while it runs: what is new counts as changed. Our bitmaps do not stand in the way.
#[test]
fn disk_grown() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmgrow");
    tracked.write();
    for disk in ["vda", "vdb"] {
        tracked.vm.virsh(&["blockresize", disk, "96M"]);
    }
    tracked.write();
    tracked.hmp(&[(0, "write -P 0x44 80M 1M".into()), (1, "write -P 0x44 95M 1M".into())]);
    let result = tracked.sealed_by(&["bitmap", "bitmap"]);
    says(&result, "vda", "the disk grew");
    tracked.by_bitmap_again();
}

/// Shrunk, as libvirt allows to whoever knows what he does; and shrunk and grown back between two runs, which no bitmap
/// marks.
#[test]
fn disk_shrunk() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmshrink");
    let both = |tracked: &Tracked, size: &str| {
        for disk in ["vda", "vdb"] {
            tracked.vm.virsh(&["blockresize", disk, size]);
        }
    };
    both(&tracked, "80M");
    tracked.hmp(&[(0, "write -P 0x44 70M 1M".into()), (1, "write -P 0x44 70M 1M".into())]);
    tracked.sealed_by(&["bitmap", "bitmap"]);
    both(&tracked, "64M");
    tracked.write();
    let result = tracked.sealed_by(&["digest", "digest"]);
    says(&result, "vda", "shrank");
    tracked.by_bitmap_again();

    tracked.hmp(&[(0, "write -P 0x45 60M 1M".into()), (1, "write -P 0x45 60M 1M".into())]);
    tracked.sealed_by(&["bitmap", "bitmap"]);
    both(&tracked, "32M");
    both(&tracked, "64M");
    let result = tracked.sealed_by(&["digest", "digest"]);
    for disk in ["vda", "vdb"] {
        says(&result, disk, "shrunk and grown again");
        assert!(result.bytes(disk, "blocks_changed") >= 16, "{}", reason(&result, disk));
    }
    tracked.by_bitmap_again();
}

/// A new disk alone starts from nothing; one that is gone is no longer in the point.
#[test]
fn disk_added_and_removed() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmdisks");
    let third = format!("{}/vdc.qcow2", tracked.vm.dir);
    Host::A.ok(&["qemu-img", "create", "-q", "-f", "qcow2", &third, "64M"]);
    tracked.vm.virsh(&[
        "attach-disk",
        &third,
        "vdc",
        "--live",
        "--config",
        "--subdriver",
        "qcow2",
        "--targetbus",
        "virtio",
    ]);
    tracked.vm.images.push(third);
    tracked.write_two();
    let result = tracked.sealed_by(&["bitmap", "bitmap", "full"]);
    says(&result, "vdc", "does not have this disk");
    tracked.write_two();
    tracked.sealed_by(&["bitmap", "bitmap", "bitmap"]);

    tracked.shut_down();
    tracked.vm.virsh(&["detach-disk", "vdc", "--config"]);
    tracked.vm.images.pop();
    tracked.start();
    tracked.write();
    let result = tracked.sealed_by(&["bitmap", "digest"]);
    assert_eq!(result.report["disks"].as_array().unwrap().len(), 2);
    tracked.by_bitmap_again();
}

/// Migrated to the other host and back, with the storage copied: the image here is another file, whatever bitmaps came
/// with it.
#[test]
fn migrated_away_and_back_with_its_storage() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmmove");
    let _there = super::support::Undo(undo_on_b(&tracked));
    tracked.write();
    let make = r#"mkdir -p "$(dirname "$1")"; rm -f "$1" "$2"
        qemu-img create -q -f qcow2 "$1" 64M; qemu-img create -q -f raw "$2" 64M"#;
    let [a, b] = [0, 1].map(|disk| tracked.vm.images[disk].clone());
    Host::B.script(make, &[&a, &b]);
    migrate(Host::A, &tracked.vm.name, "192.0.2.2", &["--copy-storage-all"]);
    Host::A.script(make, &[&a, &b]);
    migrate(Host::B, &tracked.vm.name, "192.0.2.1", &["--copy-storage-all"]);
    tracked.write();
    tracked.sealed_by(&["digest", "digest"]);
    tracked.by_bitmap_again();
}

/// Migrated on storage that both hosts see: QEMU saves the bitmap here, goes on with it there, and brings it back.
#[test]
fn migrated_away_and_back_on_shared_storage() {
    let lab = Lab::get();
    let shared = r#"qemu-img create -q -f qcow2 "/lab/shared/${2##*/}/vda.qcow2" 64M"#;
    let builder = lab.domain("bmshare").disk(Disk::made_by("qcow2", shared)).xml(|xml, dir| {
        let name = dir.rsplit('/').next().expect("a path has a last part");
        xml.replace(dir, &format!("/lab/shared/{name}"))
    });
    let mut tracked = Tracked::of(builder, |vm| vm.images[0] = format!("{}/vda.qcow2", vm.shared()));
    let _there = super::support::Undo(undo_on_b(&tracked));
    tracked.by_bitmap_again();
    tracked.write();
    migrate(Host::A, &tracked.vm.name, "192.0.2.2", &[]);
    let hmp = "qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend \"write -P 0xee 50M 192k\"";
    Host::B.ok(&["virsh", "-q", "qemu-monitor-command", &tracked.vm.name, "--hmp", hmp]);
    migrate(Host::B, &tracked.vm.name, "192.0.2.1", &[]);
    tracked.write();
    tracked.sealed_by(&["bitmap"]);
    tracked.by_bitmap_again();
}

fn migrate(from: Host, name: &str, to: &str, options: &[&str]) {
    let (uri, way) = (format!("qemu+ssh://root@{to}/system"), format!("tcp://{to}"));
    let mut words = vec!["virsh", "-q", "migrate", "--live", "--persistent", "--undefinesource", "--unsafe"];
    words.extend(options);
    words.extend([name, &uri, &way]);
    from.ok(&words);
}

/// Whatever a failed migration leaves on the other host.
fn undo_on_b(tracked: &Tracked) -> impl FnMut() + use<> {
    let (name, dir) = (tracked.vm.name.clone(), tracked.vm.dir.clone());
    let script = "virsh -q destroy $1; virsh -q undefine $1; rm -rf \"${2:?}\"";
    move || {
        Host::B.run(&["bash", "-c", script, "undo", &name, &dir]);
    }
}

/// A bitmap that was put back under its old name by whoever knows how: it leads on from a point that is not the head.
#[test]
fn the_bitmap_of_an_older_point_is_not_taken_for_the_newest() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmolder");
    let old = tracked.ours(0)[0].clone();
    tracked.by_bitmap_again();
    let new = tracked.ours(0)[0].clone();
    remove(&tracked, 0, &new);
    let arguments = json!({"node": tracked.node(0), "name": old, "persistent": true});
    tracked.qmp(json!({"execute": "block-dirty-bitmap-add", "arguments": arguments}));
    tracked.write();
    let result = tracked.sealed_by(&["digest", "bitmap"]);
    says(&result, "vda", "only others are there");
    tracked.by_bitmap_again();
}
