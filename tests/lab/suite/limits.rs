//! What a run may take: of the link, of the time, of the source's disks.

use crate::domain::Disk;
use crate::support::{Host, Lab, PATIENCE, SyncResult};
use std::time::Duration;

/// A rate is kept to, and what is sent uncompressed is sent uncompressed. The lower bound holds on any machine.
#[test]
fn a_run_sends_no_faster_than_it_may() {
    let lab = Lab::get();
    let vm = lab.domain("slow").disk(Disk::qcow2("16M").then("write -P 0x41 0 8M")).paused();
    let run = vm.sync_with("", &["--rate", "2M", "--compress", "no"]).sealed();
    assert!(run.bytes("vda", "bytes_sent") >= 8 << 20, "it was compressed: {:#}", run.report);
    // A second of slack at most.
    assert!(run.done.time >= Duration::from_secs(3), "8 MiB at 2 MiB/s took {:?}", run.done.time);
    // A time of day that is always now.
    vm.write(0, "-P 0x42 0 2M");
    let run = vm.sync_with("", &["--rate", "1G", "--rate", "1M@00:00-24:00", "--compress", "no"]).sealed();
    assert!(run.done.time >= Duration::from_secs(1), "2 MiB at 1 MiB/s took {:?}", run.done.time);
    // Smaller, with more work.
    vm.write(0, "-P 0x43 0 2M");
    let run = vm.sync_with("", &["--compress", "19"]).sealed();
    assert!(run.bytes("vda", "bytes_sent") < 1 << 20, "{:#}", run.report);
    vm.compare_with_head();
    for (wrong, words) in [
        (["--rate", "0"], "nothing can be sent at a rate of 0"),
        (["--rate", "5M@8-18"], "08:00-18:00"),
        (["--compress", "20"], "1 (fast) to 19 (small)"),
    ] {
        Host::A.virt_replica(&[&["sync", &vm.name, "--to", &vm.to][..], &wrong].concat()).exit(2).says(&[words]);
    }
}

/// A link that is too thin is production's trouble for as long as it is allowed to be.
#[test]
fn an_overlay_may_get_so_old_and_so_large() {
    let lab = Lab::get();
    for (way, what) in [("overlay", "the overlay"), ("backup", "the scratch file")] {
        let disk = Disk::raw("64M").then("write -P 0x51 0 64M");
        let vm = lab.domain(&format!("aged{way}")).disk(disk).running();
        let first = ["--capture", way, "--rate", "64K", "--compress", "no", "--overlay-max-age", "2s"];
        let old = vm.sync_with("", &first).failed(130).says(&[what, "older than it may get, 2s", "max_age"]);
        assert_eq!(old.report["outcome"], "failed");
        vm.assert_home();
        vm.sync_with("", &["--capture", way]).sealed();

        let slow: Vec<String> = (1..=24).map(|hit| format!("5b=sleep:1000@{hit}")).collect();
        let limits = ["--capture", way, "--compare", "--overlay-max-bytes", "4M"];
        let mut run = vm.start_sync(&slow.join(","), &limits);
        run.wait_step(5);
        vm.write(0, "-P 0x52 0 8M");
        vm.flush(0);
        let large = SyncResult::of(run.wait(PATIENCE)).failed(1);
        large.says(&[&what[4..], "more than the 4M it may", "max_bytes"]);
        assert_eq!(vm.points().len(), 1, "{way}: no point was made of it");
        vm.assert_home();
        let next = vm.sync_with("", &["--capture", way]).sealed();
        assert_eq!(next.bytes("vda", "blocks_changed"), 128, "{way}: every write arrived: {:#}", next.report);
        vm.compare_with_head();
    }
}
