//! Room for overlays at the source: refused before the freeze where it will not do, and given back to the guest at once
//! where it runs out all the same.

use super::domain::Disk;
use super::support::{Host, Lab, PATIENCE, SyncResult, Undo};

/// What was foreseen is in the plan; too little room is refused with the numbers, and the domain is not touched.
#[test]
fn too_little_room_for_overlays_is_refused_before_the_freeze() {
    let lab = Lab::get();
    let vm = lab.domain("cramped").disk(Disk::qcow2("64M").then("write -P 0x21 0 4M")).paused();
    let dir = format!("/srv/overlays-{}", vm.name);
    lab.tool(&["small-fs", "a", &dir, "64M"]);
    let _undo = Undo(|| drop(lab.tool(&["small-fs", "a", &dir, "off"])));
    let refused = vm.sync_with("", &["--overlay-dir", &dir]).exit(1);
    assert!(refused.step() <= 3, "the run went on to step {}", refused.step());
    let refused =
        refused.says(&["MiB are free", "256 MiB are to stay free", "--overlay-dir", "--min-free-source", &dir]);
    assert_eq!(refused.report["outcome"], "failed");
    assert_eq!(Host::A.output(&["find", &dir, "-name", "*.vr-*"]), "");
    assert!(!vm.virsh(&["dumpxml"]).contains("virt-replica"), "the domain was touched");
    vm.sync_with("", &["--overlay-dir", &dir, "--min-free-source", "16M"]).sealed();
    vm.compare_with_head();
    vm.assert_home();

    // Half the disk within moments: by that measure the next overlay needs more than there is.
    for at in 0..8 {
        vm.write(0, &format!("-P 0x22 {}M 4M", at * 8));
    }
    let plan = Host::A.virt_replica(&["plan", &vm.name, "--to", &vm.to, "--overlay-dir", &dir, "--json"]);
    let plan: serde_json::Value = serde_json::from_str(&plan.stdout).expect("a plan is JSON");
    assert!(plan["hold_s"].as_u64().unwrap() >= 10, "{plan:#}");
    let grows = plan["disks"][0]["overlay_bytes"].as_u64().expect("the bitmap has seen how fast the guest writes");
    assert!(grows > 1 << 20, "{plan:#}");
    assert_eq!(plan["conflicts"][0]["conflict"], "no_overlay_space", "{plan:#}");
    vm.assert_home();
}

/// The guest fills the file system of its overlay while a slow run reads: the run gives up, the overlay is committed,
/// and the guest has met no error.
#[test]
fn a_source_that_fills_up_gets_its_overlay_committed_at_once() {
    let lab = Lab::get();
    let vm = lab.domain("fillsup").disk(Disk::raw("96M").then("write -P 0x31 0 96M")).running();
    vm.sync().sealed();
    let dir = format!("/srv/overlays-{}", vm.name);
    lab.tool(&["small-fs", "a", &dir, "64M"]);
    let _undo = Undo(|| drop(lab.tool(&["small-fs", "a", &dir, "off"])));
    // Compared whole, in 24 groups, and each takes its time: most of a minute if nobody cuts it short.
    let limits = ["--overlay-dir", &dir, "--min-free-source", "24M", "--compare"];
    let slow: Vec<String> = (1..=24).map(|hit| format!("5b=sleep:2000@{hit}")).collect();
    let mut run = vm.start_sync(&slow.join(","), &limits);
    run.wait_step(5);
    assert!(vm.live_images()[0].starts_with(&dir), "the domain is on its overlay");
    for at in 0..12 {
        vm.write(0, &format!("-P 0x32 {}M 4M", at * 8));
    }
    vm.flush(0);
    let cut = SyncResult::of(run.wait(PATIENCE)).failed(1);
    let cut = cut.says(&["was cut short", "committed at once", &dir, "--overlay-dir"]);
    assert_eq!(cut.report["outcome"], "failed");
    vm.assert_home();
    assert_eq!(vm.state(), "running");
    assert!(vm.virsh(&["domblkerror"]).contains("No errors found"));
    assert_eq!(vm.points().len(), 1, "no point was made of it");
    // Every write the guest made is on its own image, and is told by the bitmap.
    let next = vm.sync().sealed();
    assert_eq!(next.mode("vda"), "bitmap");
    assert_eq!(next.bytes("vda", "blocks_changed"), 12 * 64, "{:#}", next.report);
    vm.compare_with_head();
}

/// The same by backup: what the guest overwrites fills the file system of the scratch files. The job is ended while
/// there is room, so that no write of the guest's fails.
#[test]
fn a_scratch_file_that_fills_up_ends_the_backup_before_the_guest_meets_an_error() {
    let lab = Lab::get();
    let disks = [Disk::raw("96M").then("write -P 0x31 0 96M"), Disk::qcow2("32M")];
    let vm = disks.into_iter().fold(lab.domain("fillsscratch"), |vm, disk| vm.disk(disk)).running();
    vm.sync_with("", &["--capture", "backup"]).sealed();
    let dir = format!("/srv/scratch-{}", vm.name);
    lab.tool(&["small-fs", "a", &dir, "64M"]);
    let _undo = Undo(|| drop(lab.tool(&["small-fs", "a", &dir, "off"])));
    let limits = ["--capture", "backup", "--overlay-dir", &dir, "--min-free-source", "24M", "--compare"];
    let slow: Vec<String> = (1..=24).map(|hit| format!("5b=sleep:1000@{hit}")).collect();
    let mut run = vm.start_sync(&slow.join(","), &limits);
    run.wait_step(5);
    assert!(vm.virsh(&["backup-dumpxml"]).contains(&dir), "the scratch files lie where they are told to");
    for at in 0..12 {
        vm.write(0, &format!("-P 0x32 {}M 4M", at * 8));
    }
    vm.flush(0);
    let cut = SyncResult::of(run.wait(PATIENCE)).failed(1);
    cut.says(&["was cut short", "the backup is ended at once", "scratch file", &dir, "--overlay-dir"]);
    vm.assert_home();
    assert_eq!(vm.state(), "running");
    assert_eq!(vm.points().len(), 1, "no point was made of it");
    let next = vm.sync_with("", &["--capture", "backup"]).sealed();
    assert_eq!(next.mode("vda"), "bitmap");
    assert_eq!(next.bytes("vda", "blocks_changed"), 12 * 64, "every write arrived: {:#}", next.report);
}
