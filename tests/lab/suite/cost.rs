//! What a run costs: what changed, not what exists; and that many of them in a row leave nothing behind.

use super::domain::Disk;
use super::support::{Host, Lab, SyncResult};
use super::tracked::Tracked;

const GIB: u64 = 1 << 30;
const BLOCK: u64 = 64 << 10;

/// The bytes that host a has put on the link so far, by the kernel's count.
fn on_the_wire() -> u64 {
    let count = Host::A.output(&["cat", "/sys/class/net/eth0/statistics/tx_bytes"]);
    count.parse().expect("a counter is a number")
}

#[track_caller]
fn within_5_percent(what: &str, bytes: u64, changed_bytes: u64) {
    println!("{what}: {bytes} bytes for {changed_bytes} that changed");
    assert!(
        bytes >= changed_bytes / 100 * 95 && bytes <= changed_bytes / 100 * 105,
        "{what}: {bytes} bytes for {changed_bytes} that changed"
    );
}

/// One block in a hundred of a disk of 16 GiB, each far from the next, and what was written cannot be compressed. The
/// audit reads beside it, within a budget of its own and on an account of its own, so it is off here; the kernel counts
/// what travels, with everything that ssh and TCP put around it.
#[test]
fn a_run_costs_what_changed() {
    const CHANGED: u64 = 16 * GIB / BLOCK / 100;
    let lab = Lab::get();
    let disk = Disk::qcow2("16G").then("write -P 0x11 0 64M").then("write -P 0x12 8G 64M").run(
        "head -c 1M /dev/urandom | split --bytes=64K --numeric-suffixes - \"$2/random.\"; chmod 644 \"$2\"/random.*",
    );
    let vm = lab.domain("cost").disk(disk).paused();
    vm.sync().sealed();
    let tracked = Tracked::around(vm);
    let writes: Vec<(usize, String)> = (0..CHANGED)
        .map(|n| (0, format!("write -s {}/random.{:02} {} 64k", tracked.vm.dir, n % 16, n * 100 * BLOCK)))
        .collect();
    for some in writes.chunks(500) {
        tracked.hmp(some);
    }
    drop(lab);
    // Nobody else on the link while its bytes are counted.
    let _lab = Lab::alone();
    let before = on_the_wire();
    let run = tracked.vm.sync_with("", &["--audit-runs", "0"]).sealed();
    let wire_bytes = on_the_wire() - before;
    assert_eq!(run.mode("vda"), "bitmap");
    assert_eq!(run.bytes("vda", "blocks_changed"), CHANGED, "{:#}", run.report);
    within_5_percent("read at the source", run.bytes("vda", "bytes_read"), CHANGED * BLOCK);
    within_5_percent("sent, by the report", run.bytes("vda", "bytes_sent"), CHANGED * BLOCK);
    within_5_percent("on the wire, by the kernel", wire_bytes, CHANGED * BLOCK);
    tracked.vm.compare_with_head();
    tracked.vm.assert_home();
}

/// How many runs in a row; the suite has a few minutes for all its tests, a patient person sets more.
fn cycles() -> u64 {
    std::env::var("VIRT_REPLICA_LAB_CYCLES").map_or(40, |n| n.parse().expect("VIRT_REPLICA_LAB_CYCLES is a number"))
}

/// Back to back under a guest that writes all the while. At every tenth the point is what the disk held while it was
/// frozen; in the end nothing has piled up.
#[test]
fn back_to_back_runs_leave_nothing_behind() {
    let lab = Lab::get();
    let mut vm = lab.domain("cycles").disk(Disk::ext4("64M", "qcow2")).guest().delay("0.02").running();
    let _ = vm.own_store();
    vm.sync().sealed();
    let tracked = Tracked::around(vm);
    let started = std::time::Instant::now();
    let cycles = cycles();
    for cycle in 1..=cycles {
        let acked = tracked.vm.acked();
        let run = if cycle % 10 == 0 {
            let mut run = tracked.vm.start_sync("5f=sleep:1500", &["--keep", "last=5"]);
            run.wait_step(5);
            let frozen = tracked.vm.copy_frozen(0);
            let run = SyncResult::of(run.wait(super::support::PATIENCE)).sealed();
            tracked.vm.compare_with_frozen(&run.report, 0, &frozen);
            assert!(tracked.vm.lines(&run.report, 0) >= acked, "cycle {cycle}: acknowledged lines are missing");
            tracked.check_one_each(1);
            run
        } else {
            tracked.vm.sync_with("", &["--keep", "last=5"]).sealed()
        };
        assert_eq!(run.mode("vda"), "bitmap", "cycle {cycle}: {:#}", run.report);
        assert_eq!(run.report["warnings"], serde_json::json!([]), "cycle {cycle}: {:#}", run.report);
    }
    println!("{cycles} cycles in {:.0?}", started.elapsed());
    tracked.vm.still_writes();
    tracked.check_one_each(1);
    tracked.vm.assert_home();
    assert_eq!(tracked.vm.points().len(), 5);
}
