//! Changed-block tracking under everything that may happen to a bitmap: kills between the steps of the turnover, QEMU's
//! deaths and restarts, other targets. docs/replication.md has the table.
//!
//! After each: the run does not fail, the head is what the disks hold, bit for bit; a doubt costs its own disk one
//! comparison, with the reason in the report; one bitmap of ours for each disk and target is left; the next run is by
//! bitmap again.

use super::domain::by_backup;
use super::support::{Host, Lab, SyncResult};
use super::tracked::{Tracked, disk_name, reason, says};
use serde_json::json;

/// Kills the run at `point`, writes on, and demands that the next run, and the one after it, are by bitmap.
fn killed_at(tracked: &mut Tracked, point: &str) {
    println!("--- killed at {point}");
    tracked.write();
    tracked.vm.sync_with(&format!("{point}=kill"), &[]).exit(137);
    // Those that hold the guest are let go by the dead-man.
    tracked.vm.wait_state("running");
    tracked.by_bitmap_again();
}

/// One of the two, or both, are left, and the head says which leads on from it: the old one, as no point was made.
#[test]
fn killed_before_the_seal_the_old_bitmap_leads_on() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmold");
    let overlay: &[&str] = &["3", "3c", "4a", "4d", "4f", "5b", "5f"];
    for point in if by_backup() { &["3c", "b1", "b3", "5f"] } else { overlay } {
        killed_at(&mut tracked, point);
    }
}

/// The point is there, so the successor leads on from it.
#[test]
fn killed_after_the_seal_the_new_bitmap_leads_on() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmnew");
    let overlay: &[&str] = &["6f", "6g", "7b", "7c", "7e", "7f", "7j", "7n", "8a", "8b"];
    for point in if by_backup() { &["6f", "b4", "8b"] } else { overlay } {
        killed_at(&mut tracked, point);
    }
}

/// Several in a row: nothing piles up.
#[test]
fn killed_again_and_again_leaks_no_bitmap() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmleak");
    for point in ["3c", "5b", "3c", "6g"] {
        tracked.write();
        tracked.vm.sync_with(&format!("{point}=kill"), &[]).exit(137);
        tracked.vm.wait_state("running");
    }
    tracked.by_bitmap_again();
}

/// What was not saved is not believed: in use on qcow2, gone with the process on raw.
#[test]
fn qemu_killed() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmdead");
    // QEMU writes a bitmap into its image when it lets go of it, which an overlay makes it do, and a backup does not.
    let qcow2 = match by_backup() {
        true => "no dirty bitmap leads on",
        false => "QEMU ended without saving the dirty bitmap",
    };
    tracked.by_bitmap_again();
    tracked.write();
    tracked.kill_qemu();
    tracked.start();
    tracked.write();
    let result = tracked.sealed_by(&["digest", "digest"]);
    says(&result, "vda", qcow2);
    says(&result, "vdb", "QEMU was restarted");
    assert_eq!(result.report["warnings"], json!([]), "once is no alarm");
    tracked.by_bitmap_again();

    // Dead before the successor was ever saved, and off while it is replicated.
    tracked.write();
    tracked.kill_qemu();
    let result = tracked.sealed_by(&["digest", "digest"]);
    says(&result, "vda", qcow2);
    says(&result, "vdb", "a raw image keeps no dirty bitmap");
}

/// A second doubt in a row is no accident any more.
#[test]
fn two_doubts_in_a_row_are_told() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmtwice");
    tracked.kill_qemu();
    tracked.start();
    let first = tracked.sealed_by(&["digest", "digest"]);
    assert_eq!(first.report["warnings"], json!([]));
    remove_ours(&tracked, 0);
    tracked.write();
    let second = tracked.sealed_by(&["digest", "bitmap"]);
    let warnings = second.report["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{:#}", second.report);
    let told = warnings[0].as_str().unwrap();
    for words in ["'vda'", "twice in a row", &reason(&first, "vda"), &reason(&second, "vda")] {
        assert!(told.contains(words), "{words:?} in {told:?}");
    }
    tracked.by_bitmap_again();
}

/// The bitmap of a qcow2 image is saved with it; that of a raw image ends with its QEMU.
#[test]
fn shut_down_and_started() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmdown");
    tracked.write();
    tracked.shut_down();
    tracked.start();
    tracked.write();
    let result = tracked.sealed_by(&["bitmap", "digest"]);
    says(&result, "vdb", "QEMU was restarted");
    tracked.by_bitmap_again();
}

/// QEMU ends in order while a run has the domain on overlays: what they held is committed by `qemu-img`, which has to
/// mark it in the base's bitmaps.
#[test]
fn shut_down_on_the_overlay() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmmid");
    for by_sync in [true, false] {
        tracked.write();
        let mut run = tracked.vm.start_sync("5b=sleep:1500", &[]);
        run.wait_step(5);
        tracked.write();
        tracked.shut_down();
        let _ = SyncResult::of(run.wait(super::support::PATIENCE));
        assert_eq!(tracked.vm.state(), "shut off");
        tracked.vm.assert_home();
        if by_sync {
            let result = tracked.vm.sync().sealed();
            tracked.check(&result, &["bitmap", "digest"]);
        }
        tracked.start();
        tracked.write();
        let result = tracked.vm.sync().sealed();
        tracked.check(&result, &["bitmap", "digest"]);
    }
    tracked.by_bitmap_again();
}

/// Two targets keep their own accounts.
#[test]
fn two_targets_are_independent() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmtwo");
    let first = tracked.vm.to.clone();
    tracked.vm.own_store();
    let second = tracked.vm.to.clone();
    tracked.write();
    tracked.vm.sync().sealed();
    for target in [&first, &second, &first, &first, &second] {
        tracked.vm.to = target.clone();
        tracked.write();
        let result = tracked.vm.sync().sealed();
        assert_eq!([result.mode("vda"), result.mode("vdb")], ["bitmap"; 2], "{target}: {:#}", result.report);
        tracked.vm.compare_with_head();
        tracked.check_one_each(2);
    }
    // One's is lost; the other's is not touched by that.
    tracked.vm.to = first.clone();
    let before = tracked.ours(0);
    tracked.vm.sync().sealed();
    let of_first: Vec<String> = before.into_iter().filter(|n| !tracked.ours(0).contains(n)).collect();
    assert_eq!(of_first.len(), 1, "a run turns over its own alone");
    let prefix = &of_first[0][..12];
    let now = tracked.ours(0).into_iter().find(|n| n.starts_with(prefix)).unwrap();
    remove(&tracked, 0, &now);
    tracked.write();
    for (target, modes) in
        [(&second, ["bitmap", "bitmap"]), (&first, ["digest", "bitmap"]), (&first, ["bitmap", "bitmap"])]
    {
        tracked.vm.to = target.clone();
        let result = tracked.vm.sync().sealed();
        assert_eq!([result.mode("vda"), result.mode("vdb")], modes, "{target}: {:#}", result.report);
        tracked.vm.compare_with_head();
    }
    tracked.check_one_each(2);
}

/// libvirt keeps no account of bitmaps: it may come and go.
#[test]
fn libvirtd_restarted() {
    let lab = Lab::alone();
    let mut tracked = Tracked::pair(&lab, "bmlibvirt");
    tracked.write();
    lab.tool(&["libvirtd", "a", "restart"]);
    tracked.by_bitmap_again();
    // During a run: while it reads.
    tracked.write();
    let mut run = tracked.vm.start_sync("5b=sleep:2500", &[]);
    run.wait_step(5);
    lab.tool(&["libvirtd", "a", "restart"]);
    let result = SyncResult::of(run.wait(super::support::PATIENCE)).sealed();
    tracked.check(&result, &["bitmap", "bitmap"]);
    tracked.by_bitmap_again();
}

#[track_caller]
pub fn remove(tracked: &Tracked, disk: usize, name: &str) {
    let arguments = json!({"node": tracked.node(disk), "name": name});
    tracked.qmp(json!({"execute": "block-dirty-bitmap-remove", "arguments": arguments}));
}

#[track_caller]
pub fn remove_ours(tracked: &Tracked, disk: usize) {
    let ours = tracked.ours(disk);
    assert_eq!(ours.len(), 1, "{}", disk_name(disk));
    remove(tracked, disk, &ours[0]);
}

/// What a host says of our processes' traces: nothing of an export is left behind by any run.
#[test]
fn no_export_is_left_behind() {
    let lab = Lab::get();
    let mut tracked = Tracked::pair(&lab, "bmexport");
    tracked.by_bitmap_again();
    tracked.write();
    tracked.vm.sync_with("5a=kill", &[]).exit(137);
    tracked.vm.wait_state("running");
    tracked.by_bitmap_again();
    assert_eq!(tracked.qmp(json!({"execute": "query-block-exports"})), json!([]));
    let sockets = "find /var/lib/libvirt/qemu -path \"*-$1/virt-replica*.sock\"";
    assert_eq!(Host::A.script(sockets, &[&tracked.vm.name]), "");
}
