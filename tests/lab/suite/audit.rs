//! Dirty bitmaps that lie: writes that QEMU never saw, found by the audit.

use super::domain::{Disk, Domain};
use super::support::{Host, Lab};
use serde_json::Value;

/// Writes to a running domain's raw image from outside, as a mount on the host would.
fn write_behind_qemus_back(vm: &Domain, image: &str, offset_bytes: u64) {
    let script = "printf 'nobody told the bitmap' | dd of=\"$1\" bs=1 seek=\"$2\" conv=notrunc,fsync status=none";
    Host::A.script(script, &[image, &offset_bytes.to_string()]);
    assert!(vm.live_images().contains(&image.to_owned()), "the domain runs on the image that was written to");
}

fn status(vm: &Domain) -> Value {
    let status = Host::A.json(&["status", &vm.name, "--json"]);
    status["domains"][0].clone()
}

/// Found in the run itself, the point is right, and whoever looks is told: exit code, report, status.
#[test]
fn a_planted_lie_is_found_told_and_put_right() {
    let lab = Lab::get();
    let disk = Disk::raw("64M").then("write -P 0x21 0 64M");
    let vm = lab.domain("lie").disk(disk).disk(Disk::raw("16M").then("write -P 0x22 0 1M")).paused();
    vm.sync().sealed();
    vm.write(0, "-P 0x23 1M 64k");
    let honest = vm.sync_with("", &["--audit-runs", "1"]).sealed();
    assert_eq!(honest.mode("vda"), "bitmap");
    let audit = &honest.disk("vda")["audit"];
    assert_eq!((&audit["lies"], &audit["next_offset"]), (&0.into(), &(64 << 20).into()), "{audit}");
    assert!(audit["blocks"].as_u64().unwrap() >= 1023, "all but the one that was marked: {audit}");
    assert_eq!(status(&vm)["state"], "ok");

    write_behind_qemus_back(&vm, &vm.live_images()[0], 40 << 20);
    vm.write(0, "-P 0x24 2M 64k");
    let caught = vm.sync_with("", &["--audit-runs", "1"]).exit(14);
    assert_eq!((caught.mode("vda"), caught.mode("vdb")), ("digest", "bitmap"), "the other disk is still believed");
    let alarms = caught.report["alarms"].as_array().unwrap();
    assert_eq!(alarms.len(), 1, "{:#}", caught.report);
    let first = (40u64 << 20).to_string();
    assert!(alarms[0].as_str().unwrap().contains(&first), "the alarm names the place: {}", alarms[0]);
    assert!(caught.disk("vda")["reason"].as_str().unwrap().contains("the audit found 1 of"), "{:#}", caught.report);
    assert_eq!(caught.bytes("vda", "blocks_changed"), 2, "the one that was marked, and the lie");
    assert_eq!(caught.report["outcome"], "sealed");
    vm.compare_with_head();
    vm.assert_home();
    let seen = status(&vm);
    assert_eq!(seen["state"], "needs_attention");
    assert_eq!(seen["alarms"][0]["message"], alarms[0]);

    let next = vm.sync_with("", &["--audit-runs", "1"]).sealed();
    assert_eq!((next.mode("vda"), &next.disk("vda")["audit"]["lies"]), ("bitmap", &0.into()));
    let seen = status(&vm);
    assert_eq!((&seen["state"], seen["alarms"].as_array().unwrap().len()), (&"ok".into(), 1), "told, but over");
    vm.compare_with_head();
}

/// Slices go round: whatever the sample misses is found when its turn comes, and budgets are kept.
#[test]
fn slices_go_round_from_run_to_run() {
    const RUNS: u64 = 4;
    let lab = Lab::get();
    let vm = lab.domain("slices").disk(Disk::raw("64M").then("write -P 0x31 0 64M")).paused();
    vm.sync().sealed();
    let runs = RUNS.to_string();
    for turn in 1..=RUNS {
        let run = vm.sync_with("", &["--audit-runs", &runs]).sealed();
        assert_eq!(run.mode("vda"), "bitmap");
        let audit = &run.disk("vda")["audit"];
        assert_eq!(audit["next_offset"], turn * (16 << 20), "{audit}");
        let read = audit["bytes_read"].as_u64().unwrap();
        assert!((16 << 20..=(16 << 20) + (4 << 20)).contains(&read), "a slice and the sample: {read}");
        assert_eq!(run.bytes("vda", "bytes_read"), 0, "what the bitmap marks, counted for itself");
    }
    let again = vm.sync_with("", &["--audit-runs", &runs, "--audit-bytes", "6M"]).sealed();
    let audit = &again.disk("vda")["audit"];
    let next = audit["next_offset"].as_u64().unwrap();
    assert!((4 << 20..16 << 20).contains(&next), "a new round, cut short by its budget: {audit}");
    let off = vm.sync_with("", &["--audit-runs", "0"]).sealed();
    assert!(off.disk("vda").get("audit").is_none(), "{:#}", off.report);
    vm.compare_with_head();
}
