//! Crashes of a shortening: a process is killed at every numbered step, and the one that goes on with it as well. Every
//! point reads as before, for us and for QEMU, at once and after whatever comes next: a shortening, a prune, a run.
//!
//! This kills processes, not machines. What a power cut would take back is seen by the order in which the next one
//! syncs.

use super::support::*;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use virt_replica::failpoint;
use virt_replica::name::PointId;
use virt_replica::replica::Replica;
use virt_replica::replica::store::{Limits, Store};
use virt_replica::replica::upkeep::Upkeep;

/// Every step; those of a disk once for each of the two disks, those of a block in the middle of either.
const STEPS: [&str; 13] = ["s1", "s1@3", "s1@7", "s2", "s2@2", "s3", "s3@2", "s4", "s5", "s5@2", "s6", "s6@2", "s7"];

const ROOT: &str = "REPLICA_SHORTEN_ROOT";
const DEPTH: u64 = 3;

/// Both disks at each point, with zeros that hide what lies below.
const VDA: [&str; 4] = ["aaaaaa..", "bb--....", "....-c..", "d......."];
const VDB: [&str; 4] = ["eeeeee..", "-.......", "......f.", ".......g"];

/// Makes the n-th point.
fn make(store: &Store, history: &mut History, n: usize) {
    let head = store.describe().unwrap().head().cloned();
    let before = |words: &[&str]| (n > 1).then(|| disk_at(words, n - 1));
    let (old_a, old_b) = (before(&VDA), before(&VDB));
    let (new_a, new_b) = (disk_at(&VDA, n), disk_at(&VDB, n));
    let disks: [Step; 2] = [("vda", old_a.as_deref(), &new_a), ("vdb", old_b.as_deref(), &new_b)];
    let point = sync(store, n as u64, head.as_ref(), &disks);
    history.push((point.id, vec![("vda".to_owned(), new_a), ("vdb".to_owned(), new_b)]));
}

fn shallow(root: &Path) -> Store {
    Store::open(root, &uuid(), now).unwrap().with_limits(Limits { depth_max: DEPTH, ..Limits::default() })
}

fn three_points() -> (Lab, History) {
    let (lab, mut history) = (Lab::in_memory(), History::new());
    (1..=3).for_each(|n| make(&lab.store(), &mut history, n));
    (lab, history)
}

/// Not a test by itself: what the others run as a process of its own, to be killed.
#[test]
fn child() {
    let Ok(root) = std::env::var(ROOT) else { return };
    shorten(&shallow(Path::new(&root)), u64::MAX).unwrap();
}

fn spawn(lab: &Lab, failpoint: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "replica::shorten_crash::child", "--nocapture"])
        .env(ROOT, lab.root())
        .env(failpoint::VARIABLE, failpoint)
        .output()
        .unwrap()
        .status
}

/// The killed reader's lease is over, as it is ten minutes later.
fn expire_leases(store: &Store) {
    for entry in std::fs::read_dir(store.path().join("leases")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") {
            std::fs::remove_file(path).unwrap();
        }
    }
}

fn remove(store: &Store, history: &mut History, at: usize) {
    let (gone, _): (PointId, _) = history.remove(at);
    let report = store.prune(&[gone], &mut |_, _| {}).unwrap();
    assert!(report.kept.is_empty() && report.waiting.is_empty(), "{report:?}");
}

/// Afterwards comes one of: a shortening, a run, a prune of a point below, a prune of the point itself when it is not
/// the newest any more.
#[test]
fn shortening_killed_at_any_step_leaves_every_point_whole() {
    for step in STEPS {
        for next in ["shorten", "run", "prune below", "run and prune it"] {
            let what = format!("killed at {step}, then {next}");
            let (lab, mut history) = three_points();
            let store = shallow(lab.root());
            assert_eq!(spawn(&lab, &kill(step)).signal(), Some(9), "{what}: not reached");
            assert_history(&store, &history, &what);
            expire_leases(&store);
            match next {
                "shorten" => {}
                "run" => make(&store, &mut history, 4),
                "prune below" => remove(&store, &mut history, 1),
                _ => {
                    make(&store, &mut history, 4);
                    remove(&store, &mut history, 2);
                }
            }
            assert_history(&store, &history, &what);
            shorten(&store, u64::MAX).unwrap();
            assert!(store.holds().unwrap().depth < DEPTH, "{what}");
            store.prune(&[], &mut |_, _| {}).unwrap();
            assert_history(&store, &history, &format!("{what}, in the end"));
            assert_no_remains(&store);
        }
    }
}

#[test]
fn shortening_killed_twice_leaves_every_point_whole() {
    let mut died = 0;
    for first in STEPS {
        for second in STEPS {
            let what = format!("killed at {first}, and again at {second}");
            let (lab, history) = three_points();
            let store = shallow(lab.root());
            assert_eq!(spawn(&lab, &kill(first)).signal(), Some(9), "{what}");
            expire_leases(&store);
            let status = spawn(&lab, &kill(second));
            // What is done already is not done again.
            assert!(status.success() || status.signal() == Some(9), "{what}: {status}");
            died += u32::from(!status.success());
            expire_leases(&store);
            for (id, disks) in &history {
                let report = store.verify(id, &mut |_, _| {}).unwrap();
                assert!(report.is_whole(), "{what}: {report:?}");
                let roots: Vec<_> = report.disks.iter().map(|d| d.root).collect();
                assert_eq!(roots, disks.iter().map(|(_, c)| root(c)).collect::<Vec<_>>(), "{what}");
            }
            store.prune(&[], &mut |_, _| {}).unwrap();
            shorten(&store, u64::MAX).unwrap();
            assert!(store.holds().unwrap().depth < DEPTH, "{what}");
            assert_no_remains(&store);
        }
    }
    assert!(died > 60, "only {died} of 169 died twice");
}

/// An error in place of the crash: it is said, nothing is lost, and the next one goes on.
#[test]
fn shortening_failed_at_any_step_is_done_by_the_next() {
    for step in STEPS {
        let (lab, history) = three_points();
        let store = shallow(lab.root());
        assert!(!spawn(&lab, &kill(step).replace("=kill", "=error")).success(), "{step}");
        assert_history(&store, &history, step);
        store.prune(&[], &mut |_, _| {}).unwrap();
        shorten(&store, u64::MAX).unwrap();
        assert!(store.holds().unwrap().depth < DEPTH, "{step}");
        assert_history(&store, &history, step);
        assert_no_remains(&store);
    }
}

/// What is found aside, or in its place, is made durable before the manifest says anything that rests on it.
#[test]
fn what_is_found_aside_or_in_its_place_is_made_durable_before_the_manifest_rests_on_it() {
    let aside = ["vda.qcow2.alone", "vda.changes.alone", "vdb.qcow2.alone", "vdb.changes.alone", ""];
    for (step, wanted) in [("s3@2", aside.as_slice()), ("s5", &[""]), ("s6@2", &[""])] {
        let (lab, history) = three_points();
        let store = shallow(lab.root());
        assert_eq!(spawn(&lab, &kill(step)).signal(), Some(9), "not reached: {step}");
        expire_leases(&store);
        let dir = store.path().join("points").join(history[2].0.as_str());
        let (done, steps) = match step {
            "s3@2" => failpoint::traced(|| shorten(&store, u64::MAX).map(drop)),
            _ => failpoint::traced(|| store.prune(&[], &mut |_, _| {}).map(drop)),
        };
        done.unwrap();
        let manifest = format!("rename {}", store.path().join("manifest.json").display());
        let published = steps.iter().position(|s| *s == manifest);
        assert!(published.is_some(), "killed at {step}: {steps:#?}");
        for file in wanted {
            let file = if file.is_empty() { dir.clone() } else { dir.join(file) };
            let synced = steps.iter().position(|s| *s == format!("sync {}", file.display()));
            assert!(synced.is_some() && synced < published, "killed at {step}: {file:?} is not synced: {steps:#?}");
        }
    }
}
