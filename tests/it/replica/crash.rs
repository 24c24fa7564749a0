//! Crashes of the store: a process is killed at every numbered step, and at every pair of steps, and the replica is
//! opened again. Its head is then the old point or the new one, whole, never a mixture, and the next run works (I9,
//! I11, I14).
//!
//! This kills processes, not machines: the order of fsyncs is not tried here.

use super::support::*;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use virt_replica::block::BLOCK_LEN;
use virt_replica::engine::disk_target::DiskTarget as _;
use virt_replica::error::Kind;
use virt_replica::failpoint;
use virt_replica::name::DiskName;
use virt_replica::replica::store::Store;
use virt_replica::replica::{Attachment, PointView, Replica};

/// The steps before the rename of the manifest, and those from it on.
const BEFORE: [&str; 9] = ["3a", "3b", "5c", "5d", "5e", "6a", "6b", "6c", "6d.written"];
const AFTER: [&str; 5] = ["6d.renamed", "6d", "6e.marked", "6e.applied", "6e"];

const ROOT: &str = "REPLICA_CRASH_ROOT";
/// Two groups, so that the digest tree has three levels.
const SIZE: usize = 70 * BLOCK_LEN;

/// Content of both disks at the n-th point.
fn disk_at(n: u64) -> Vec<u8> {
    let mut disk = content(SIZE, &[(0, 10), (63, 3)]);
    for k in 1..n {
        let at = (k as usize * 7 % 68) * BLOCK_LEN;
        disk[at..at + 2 * BLOCK_LEN].fill(k as u8);
        disk[(k as usize * 11 % 70) * BLOCK_LEN..][..BLOCK_LEN].fill(0);
    }
    disk
}

/// One run on whatever is there: asks for the head, as any run does, and makes the point after it.
fn run_once(store: &Store, run: u64) -> virt_replica::error::Result<PointView> {
    let head = store.describe()?.head().cloned();
    let seq = head.as_ref().map_or(0, |h| h.id.seq());
    let (old, new) = (disk_at(seq), disk_at(seq + 1));
    let names = ["vda", "vdb"];
    store.begin(&begin(run, head.map(|h| h.id), &names.map(|n| (n, SIZE, false))))?;
    for name in names {
        let disk = DiskName::new(name).unwrap();
        let patch = patch(name, (seq > 0).then_some(&old[..]), &new, true);
        patch.chunks(100_000).try_for_each(|part| store.apply(&disk, part))?;
        store.finish_disk(&disk)?;
    }
    store.attach(Attachment::InactiveXml, b"<domain/>")?;
    store.seal(&seal(&names.map(|n| (n, &new[..]))))
}

/// Not a test by itself: what the others run as a process of its own, to be killed.
#[test]
fn child() {
    let Ok(root) = std::env::var(ROOT) else { return };
    let run = std::env::var("REPLICA_CRASH_RUN").unwrap().parse().unwrap();
    run_once(&Store::open(Path::new(&root), &uuid(), now).unwrap(), run).unwrap();
}

fn spawn(lab: &Lab, run: u64, failpoint: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "replica::crash::child", "--nocapture"])
        .env(ROOT, lab.root())
        .env("REPLICA_CRASH_RUN", run.to_string())
        .env(failpoint::VARIABLE, failpoint)
        .output()
        .unwrap()
        .status
}

fn kill_at(lab: &Lab, run: u64, step: &str) {
    let status = spawn(lab, run, &format!("{step}=kill"));
    assert_eq!(status.signal(), Some(9), "{step} was not reached: {status}");
}

/// Everything that must hold whatever happened, with `points` in the end.
fn assert_whole(lab: &Lab, points: u64, what: &str) {
    let store = lab.store();
    let view = store.describe().unwrap();
    assert_eq!(view.points.len() as u64, points, "{what}");
    for (n, point) in (1..).zip(&view.points) {
        assert!(store.verify(&point.id, &mut |_, _| {}).unwrap().is_whole(), "{what}: {}", point.id);
        for disk in &point.disks {
            assert_eq!(disk.root, root(&disk_at(n)), "{what}: {}", point.id);
        }
    }
    if points > 0 {
        assert_nodes(&store, "vda", &disk_at(points));
        assert_nodes(&store, "vdb", &disk_at(points));
    }
}

/// Only what belongs there is there.
fn assert_tidy(lab: &Lab, what: &str) {
    let store = lab.store();
    let view = store.describe().unwrap();
    assert!(view.open_point.is_none(), "{what}");
    let names = |dir: &Path| -> Vec<String> {
        let mut names: Vec<_> =
            dir.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&store.path()), ["clock.json", "digests", "leases", "lock", "manifest.json", "points"], "{what}");
    assert_eq!(names(&store.path().join("digests")), ["vda.tree", "vdb.tree"], "{what}");
    let points = names(&store.path().join("points"));
    assert_eq!(points, view.points.iter().map(|p| p.id.to_string()).collect::<Vec<_>>(), "{what}");
    for point in points {
        let files = ["domain.xml", "vda.changes", "vda.qcow2", "vdb.changes", "vdb.qcow2"];
        assert_eq!(names(&store.path().join("points").join(point)), files, "{what}");
    }
}

/// Points that a run adds which was killed at `step`.
fn outcome(step: &str) -> u64 {
    u64::from(AFTER.contains(&step))
}

/// The same for a run after one that was killed at `first`: what that one left of step 6e comes first.
fn outcome_after(first: &str, step: &str) -> u64 {
    let mends = ["6d.renamed", "6d", "6e.marked", "6e.applied"].contains(&first);
    if mends && ["6e.marked", "6e.applied"].contains(&step) { 0 } else { outcome(step) }
}

#[test]
fn killed_at_any_step_the_head_is_the_old_point_or_the_new_one() {
    // The second point and, where there is nothing to go back to, the first.
    for sealed in [1, 0] {
        for step in BEFORE.iter().chain(&AFTER) {
            if sealed == 0 && ["6e.marked", "6e.applied"].contains(step) {
                // The first digest file is not updated but made and put in place.
                continue;
            }
            let lab = Lab::in_memory();
            if sealed == 1 {
                run_once(&lab.store(), 1).unwrap();
            }
            kill_at(&lab, 2, step);
            let points = sealed + outcome(step);
            assert_whole(&lab, points, step);
            run_once(&lab.store(), 3).unwrap();
            assert_whole(&lab, points + 1, step);
            assert_tidy(&lab, step);
        }
    }
}

/// The run that finds the ruins dies as well.
#[test]
fn killed_twice_at_any_two_steps_it_is_the_same() {
    for first in BEFORE.iter().chain(&AFTER) {
        for second in BEFORE.iter().chain(&AFTER) {
            let what = format!("{first}, then {second}");
            let lab = Lab::in_memory();
            run_once(&lab.store(), 1).unwrap();
            kill_at(&lab, 2, first);
            kill_at(&lab, 3, second);
            let points = 1 + outcome(first) + outcome_after(first, second);
            run_once(&lab.store(), 4).unwrap();
            assert_whole(&lab, points + 1, &what);
            assert_tidy(&lab, &what);
        }
    }
}

/// An error in place of the crash: said by every later call, and undone by abandon, twice if need be. From the rename
/// on the point exists whatever the caller was told (a lost acknowledgement: the head is asked for).
#[test]
fn failed_at_any_step_the_point_is_condemned_and_abandoned() {
    for step in BEFORE.iter().chain(&AFTER) {
        let lab = Lab::in_memory();
        run_once(&lab.store(), 1).unwrap();
        let status = spawn(&lab, 2, &format!("{step}=error"));
        // Behind 6d only the digest file is left, and that is mended by the next run.
        let sealed = step.starts_with("6e");
        assert_eq!(status.success(), sealed, "{step}: {status}");
        let store = lab.store();
        if ["3a", "3b"].contains(step) {
            assert!(store.describe().unwrap().open_point.is_none(), "a begin that failed leaves nothing");
        }
        store.abandon().unwrap();
        store.abandon().unwrap();
        assert!(store.describe().unwrap().open_point.is_none(), "{step}");
        assert_whole(&lab, 1 + outcome(step), step);
        run_once(&store, 3).unwrap();
        assert_tidy(&lab, step);
    }
}

/// A writer that is only slow keeps the others out, and a reader sees the old head until the new one exists.
#[test]
fn readers_need_no_lock_and_writers_do() {
    let lab = Lab::in_memory();
    run_once(&lab.store(), 1).unwrap();
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| spawn(&lab, 2, "6c=sleep:1500"));
        let store = lab.store();
        while store.describe().unwrap().open_point.is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let busy = run_once(&store, 3).unwrap_err();
        assert_eq!(busy.kind(), Kind::Busy);
        assert_whole(&lab, 1, "beside a writer");
        assert!(slow.join().unwrap().success());
    });
    assert_whole(&lab, 2, "afterwards");
    assert_tidy(&lab, "afterwards");
}
