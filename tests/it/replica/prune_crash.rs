//! Crashes of a prune: a process is killed at every numbered step, and at every pair of steps, and the replica is
//! opened again. What was removed is gone or whole, every other point reads as before, at once and after the next prune
//! or run.
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
use virt_replica::replica::store::Store;
use virt_replica::replica::upkeep::Upkeep;

/// Every step; those of a disk once for each of the two disks.
const STEPS: [&str; 13] =
    ["p1", "p2", "p2@2", "p3.part", "p3.part@2", "p3", "p3@2", "p4", "p4@2", "p5", "p5@2", "p6", "p7"];

const ROOT: &str = "REPLICA_PRUNE_ROOT";
const GONE: &str = "REPLICA_PRUNE_GONE";

/// Blocks of both disks at each point: of `vda` the second point changes more than the third, which is folded down, of
/// `vdb` less, and that is folded up. Both have zeros that hide what lies below.
const VDA: [&str; 5] = ["aaaaaaaa", "bbbb--..", "....-c..", "d.......", ".......e"];
const VDB: [&str; 5] = ["aaaaaaaa", "b......-", ".cccc-..", "..d.....", "e......."];

/// Makes the n-th point.
fn make(store: &Store, n: usize) -> PointId {
    let head = store.describe().unwrap().head().cloned();
    let before = |words: &[&str]| (n > 1).then(|| disk_at(words, n - 1));
    let (old_a, old_b) = (before(&VDA), before(&VDB));
    let (new_a, new_b) = (disk_at(&VDA, n), disk_at(&VDB, n));
    let disks: [Step; 2] = [("vda", old_a.as_deref(), &new_a), ("vdb", old_b.as_deref(), &new_b)];
    sync(store, n as u64, head.as_ref(), &disks).id
}

/// A replica with four points.
fn four_points() -> Lab {
    let lab = Lab::in_memory();
    (1..=4).for_each(|n| drop(make(&lab.store(), n)));
    lab
}

fn prune(store: &Store, gone: &[u64]) -> virt_replica::error::Result<()> {
    let points = store.describe()?.points;
    let ids: Vec<PointId> = points.into_iter().map(|p| p.id).filter(|id| gone.contains(&id.seq())).collect();
    let report = store.prune(&ids, &mut |_, _| {})?;
    assert!(report.kept.is_empty() && report.waiting.is_empty(), "{report:?}");
    Ok(())
}

/// Not a test by itself: what the others run as a process of its own, to be killed.
#[test]
fn child() {
    let Ok(root) = std::env::var(ROOT) else { return };
    let gone = std::env::var(GONE).unwrap();
    let gone: Vec<u64> = gone.split_whitespace().map(|n| n.parse().unwrap()).collect();
    prune(&Store::open(Path::new(&root), &uuid(), now).unwrap(), &gone).unwrap();
}

fn spawn(lab: &Lab, gone: &str, failpoint: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "replica::prune_crash::child", "--nocapture"])
        .env(ROOT, lab.root())
        .env(GONE, gone)
        .env(failpoint::VARIABLE, failpoint)
        .output()
        .unwrap()
        .status
}

/// These points are there, and whole; with `by_qemu`, it reads the same.
fn assert_points(lab: &Lab, points: &[usize], by_qemu: bool, what: &str) {
    let store = lab.store();
    let view = store.describe().unwrap();
    assert_eq!(view.points.iter().map(|p| p.id.seq() as usize).collect::<Vec<_>>(), points, "{what}");
    assert!(view.open_point.is_none(), "{what}");
    for (n, point) in points.iter().zip(&view.points) {
        let report = store.verify(&point.id, &mut |_, _| {}).unwrap();
        assert!(report.is_whole(), "{what}: {report:?}");
        for (disk, words) in point.disks.iter().zip([&VDA, &VDB]) {
            assert_eq!(disk.root, root(&disk_at(words, *n)), "{what}: {}", point.id);
            if by_qemu {
                assert_image(&disk.image, &disk_at(words, *n));
            }
        }
    }
    let head = *points.last().unwrap();
    assert_nodes(&store, "vda", &disk_at(&VDA, head));
    assert_nodes(&store, "vdb", &disk_at(&VDB, head));
}

/// Only what belongs there is there.
fn assert_tidy(lab: &Lab, what: &str) {
    let view = lab.store().describe().unwrap();
    let names = |dir: &Path| -> Vec<String> {
        let mut names: Vec<_> =
            dir.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let points = names(&view.path.join("points"));
    assert_eq!(points, view.points.iter().map(|p| p.id.to_string()).collect::<Vec<_>>(), "{what}");
    for point in points {
        let files = ["vda.changes", "vda.qcow2", "vdb.changes", "vdb.qcow2"];
        assert_eq!(names(&view.path.join("points").join(point)), files, "{what}");
    }
    assert_eq!(names(&view.path), ["clock.json", "digests", "leases", "lock", "manifest.json", "points"], "{what}");
    assert!(lab.store().holds().unwrap().links.is_empty(), "{what}");
}

/// Afterwards by a prune or by a run, whichever comes first.
#[test]
fn killed_at_any_step_the_other_points_are_whole() {
    for (gone, left) in [("2", vec![1, 3, 4]), ("1 2", vec![3, 4]), ("1 3", vec![2, 4]), ("1 2 3", vec![4])] {
        for (number, step) in STEPS.iter().enumerate() {
            let what = format!("removing {gone}, killed at {step}");
            let lab = four_points();
            let status = spawn(&lab, gone, &kill(step));
            assert_eq!(status.signal(), Some(9), "{what}: not reached: {status}");
            assert_points(&lab, &left, true, &what);
            let mut left = left.clone();
            if number % 2 == 0 {
                prune(&lab.store(), &[]).unwrap();
            } else {
                make(&lab.store(), 5);
                left.push(5);
            }
            assert_tidy(&lab, &what);
            assert_points(&lab, &left, true, &what);
        }
    }
}

/// The prune that goes on with it dies as well; it removes one more point, so that the row of links is another one.
#[test]
fn killed_twice_at_any_two_steps_it_is_the_same() {
    let mut died = 0;
    for (second_gone, left) in [("2", [1, 3, 4].as_slice()), ("1 2", &[3, 4]), ("2 3", &[1, 4])] {
        for first in STEPS {
            for second in STEPS {
                let what = format!("killed at {first}, then removing {second_gone} and killed at {second}");
                let lab = four_points();
                assert_eq!(spawn(&lab, "2", &kill(first)).signal(), Some(9), "{what}");
                let status = spawn(&lab, second_gone, &kill(second));
                // What is done already is not done again.
                assert!(status.success() || status.signal() == Some(9), "{what}: {status}");
                died += u32::from(!status.success());
                assert_points(&lab, left, false, &what);
                prune(&lab.store(), &[]).unwrap();
                assert_tidy(&lab, &what);
                assert_points(&lab, left, false, &what);
            }
        }
    }
    assert!(died > 300, "only {died} of 507 died twice");
}

/// An error in place of the crash: the prune says what waits, and the next one goes on.
#[test]
fn failed_at_any_step_it_waits() {
    for step in STEPS {
        let lab = four_points();
        let fail = kill(step).replace("=kill", "=error");
        // The child expects that nothing waits.
        assert!(!spawn(&lab, "1 2", &fail).success(), "{step}");
        assert_points(&lab, &[3, 4], true, step);
        prune(&lab.store(), &[]).unwrap();
        assert_tidy(&lab, step);
        assert_points(&lab, &[3, 4], true, step);
    }
}

/// What is visible is not yet durable: the fold that finds a step done makes it durable before the manifest forgets
/// what it was made of, and the prune that finds a manifest makes that durable before it touches an image.
#[test]
fn a_step_that_is_found_done_is_made_durable_before_anything_rests_on_it() {
    // Killed there; what the next prune has to sync before it publishes the manifest, relative to the replica's
    // directory.
    let (lower, upper) = ("points/2", "points/3");
    let cases: [(&str, &[&str]); 6] = [
        ("p1", &[]),
        ("p4", &[lower, upper]),
        ("p4@2", &[lower, upper, "points/3/vdb.qcow2"]),
        ("p5", &[lower, upper]),
        ("p5@2", &[lower, upper, "points/3/vda.qcow2", "points/3/vdb.qcow2"]),
        ("p6", &[]),
    ];
    for (step, wanted) in cases {
        let lab = four_points();
        let points = lab.store().describe().unwrap().points;
        let path = |name: &str| {
            // "points/3" stands for the directory of the third point.
            let named = |word: &str| word.parse::<u64>().ok().and_then(|seq| points.iter().find(|p| p.id.seq() == seq));
            let words = name.split('/').filter(|word| !word.is_empty());
            let word = |word: &str| named(word).map_or(word.to_owned(), |point| point.id.to_string());
            words.fold(lab.store().path(), |path, part| path.join(word(part))).display().to_string()
        };
        assert_eq!(spawn(&lab, "2", &kill(step)).signal(), Some(9), "not reached: {step}");
        let (done, steps) = failpoint::traced(|| prune(&lab.store(), &[]));
        done.unwrap();
        assert_eq!(steps.first(), Some(&format!("sync {}", path(""))), "killed at {step}: {steps:#?}");
        let published = steps.iter().position(|s| *s == format!("rename {}", path("manifest.json")));
        assert_eq!(published.is_none(), step == "p6", "killed at {step}: {steps:#?}");
        for file in wanted {
            let synced = steps.iter().position(|s| *s == format!("sync {}", path(file)));
            assert!(synced.is_some() && synced < published, "killed at {step}: {file} is not synced: {steps:#?}");
        }
    }
}
