//! Removing points from the store, against a model: whatever is removed, in whatever order, every point that is left
//! has its content, for us and for QEMU; what is held stays; what is younger than the host allows stays. Crashes:
//! `prune_crash`.

use super::support::*;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use virt_replica::block::BLOCK_LEN;
use virt_replica::error::Kind;
use virt_replica::name::{DiskName, PointId};
use virt_replica::replica::age::BootTime;
use virt_replica::replica::store::{Limits, Store};
use virt_replica::replica::upkeep::{PruneReport, Upkeep};
use virt_replica::replica::{PointView, Replica};

const MIB: usize = 1 << 20;

fn prune(store: &Store, ids: &[PointId]) -> PruneReport {
    store.prune(ids, &mut |_, _| {}).unwrap()
}

fn prune_blocks(words: &str, gone: &[usize]) -> u64 {
    let lab = Lab::in_memory();
    let store = lab.store();
    let mut history = blocks(&store, words);
    let ids: Vec<PointId> = gone.iter().map(|n| history[n - 1].0.clone()).collect();
    let report = prune(&store, &ids);
    assert_eq!((report.removed.len(), report.folded.len()), (gone.len(), gone.len()), "{words}: {report:?}");
    assert!(report.waiting.is_empty() && report.kept.is_empty(), "{report:?}");
    history.retain(|(id, _)| !ids.contains(id));
    assert_history(&store, &history, words);
    assert_no_remains(&store);
    // And it goes on from there.
    let old = history.last().unwrap().1[0].1.clone();
    let mut new = old.clone();
    new[..BLOCK_LEN].fill(b'z');
    let head = store.describe().unwrap().head().cloned();
    let point = sync(&store, 99, head.as_ref(), &[("vda", Some(&old), &new)]);
    history.push((point.id, vec![("vda".to_owned(), new)]));
    assert_history(&store, &history, words);
    report.bytes_copied / BLOCK_LEN as u64
}

#[test]
fn the_smaller_of_the_deltas_is_copied() {
    for (words, gone, copied) in [
        // The oldest, whose image is large: what the next changed goes into it.
        ("aaaaaaaa b....... .c......", &[1][..], 1),
        // One in the middle: what it changed goes up, what the next one changed goes down.
        ("aaaaaaaa b....... .cccc... d.......", &[2], 1),
        ("aaaaaaaa bbbb.... ....c... d.......", &[2], 1),
        // What the next one hides is not copied.
        ("aaaaaaaa bbbbb... cccc.dd. .......e", &[2], 1),
        // Several in a row cost no more than one.
        ("aaaaaaaa b....... c....... d....... .e......", &[2, 3, 4], 1),
        ("aaaaaaaa b....... .c...... ..d..... e.......", &[1, 2, 3], 3),
        // Rows of their own.
        ("aaaaaaaa b....... .c...... ..d..... ...e....", &[2, 4], 2),
        // Zeros hide what lies below, and cost nothing.
        ("aaaaaaaa -----... b....... .c......", &[2], 0),
        ("aaaaaaaa bb...... --...... .c......", &[1, 2], 0),
        // A point that changed nothing.
        ("aaaaaaaa ........ b.......", &[2], 0),
        ("aaaaaaaa b....... ........", &[1, 2], 1),
        // There and back again: the roots below and above are the same.
        ("aaaaaaaa b....... a....... .c......", &[2, 3], 1),
        ("aaaaaaaa b....... a....... .c......", &[2], 0),
        // A disk that grew, shrank, and grew again into what it once was: nothing of that shines through.
        ("aaaa b....... ...c....", &[1], 3),
        ("aaaaaaaa b... c....... .......d", &[2], 0),
        ("aaaaaaaa b... c.......", &[1, 2], 3),
    ] {
        assert_eq!(prune_blocks(words, gone), copied, "{words} without {gone:?}");
    }
}

#[test]
fn every_point_keeps_its_content_whatever_is_removed() {
    let seed = seed();
    println!("REPLICA_SEED={seed}");
    let mut rng = Rng(seed);
    for round in 0..6 {
        random_pruning(&mut rng, round);
    }
}

/// Two disks that come, go, start afresh and change their size; points removed in between.
fn random_pruning(rng: &mut Rng, round: u64) {
    let lab = Lab::in_memory();
    let store = lab.store();
    let mut history: History = Vec::new();
    for n in 1..=10 {
        let before = history.last().map(|(_, disks)| disks.clone()).unwrap_or_default();
        let mut disks = Vec::new();
        for name in ["vda", "vdb"] {
            if rng.below(8) == 0 && !(name == "vdb" && disks.is_empty()) {
                continue;
            }
            let old = before.iter().find(|(d, _)| d == name).map(|(_, c)| c.clone());
            let mut new = old.clone().unwrap_or_else(|| vec![0; 512 * (1 + rng.below(6_000) as usize)]);
            if rng.below(5) == 0 {
                new.resize(rng.below(3 * MIB as u64) as usize + 1, 0);
            }
            scribble(rng, &mut new);
            disks.push((name.to_owned(), old, new, rng.below(12) == 0));
        }
        let head = store.describe().unwrap().head().map(|h| h.id.clone());
        let begun: Vec<_> = disks.iter().map(|(name, _, new, fresh)| (name.as_str(), new.len(), *fresh)).collect();
        store.begin(&begin(n, head, &begun)).unwrap();
        for (name, old, new, fresh) in &disks {
            send(&store, name, old.as_deref().filter(|_| !fresh), new);
        }
        let sealed: Vec<_> = disks.iter().map(|(name, _, new, _)| (name.as_str(), &new[..])).collect();
        let point = store.seal(&seal(&sealed)).unwrap();
        history.push((point.id, disks.into_iter().map(|(name, _, new, _)| (name, new)).collect()));
        if rng.below(3) == 0 {
            let shallow = lab.store().with_limits(Limits { depth_max: 2 + rng.below(3), ..Limits::default() });
            let steps = if rng.below(3) == 0 { rng.below(4) } else { u64::MAX };
            shorten(&shallow, steps).unwrap();
        }
        if rng.below(3) == 0 {
            let gone: Vec<PointId> =
                history[..history.len() - 1].iter().filter(|_| rng.below(2) == 0).map(|(id, _)| id.clone()).collect();
            let report = prune(&store, &gone);
            assert_eq!((&report.removed, report.waiting.len()), (&gone, 0), "round {round}, point {n}: {report:?}");
            history.retain(|(id, _)| !gone.contains(id));
            assert_history(&store, &history, &format!("round {round}, point {n}, without {gone:?}"));
            // What a shortening left that was broken off is no part of it.
            shorten(&store, u64::MAX).unwrap();
            assert_no_remains(&store);
        }
    }
    let all: Vec<PointId> = history[..history.len() - 1].iter().map(|(id, _)| id.clone()).collect();
    prune(&store, &all);
    history.drain(..history.len() - 1);
    assert_history(&store, &history, "the head alone");
    assert_eq!(store.holds().unwrap().depth, 1);
}

#[test]
fn what_is_asked_for_wrongly_is_refused_as_a_whole() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let history = blocks(&store, "aa b. .c");
    let id = |n: usize| history[n].0.clone();
    let none = PointId::new("000007-00000000").unwrap();
    for (ids, kind) in [(vec![id(0), id(2)], Kind::Refused), (vec![id(0), none], Kind::NotFound)] {
        assert_eq!(store.prune(&ids, &mut |_, _| {}).unwrap_err().kind(), kind);
    }
    assert_history(&store, &history, "nothing was removed");
    let nobody = Store::open(lab.root(), &"0a1b2c3d-0000-4000-8000-000000000009".parse().unwrap(), now).unwrap();
    assert_eq!(nobody.prune(&[], &mut |_, _| {}).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(nobody.holds().unwrap().depth, 0);
    // One writer: a run that goes on is not disturbed.
    let other = lab.store();
    other.begin(&begin(9, Some(id(2)), &[("vda", 2 * BLOCK_LEN, false)])).unwrap();
    assert_eq!(store.prune(&[id(0)], &mut |_, _| {}).unwrap_err().kind(), Kind::Busy);
    assert_eq!(other.prune(&[id(0)], &mut |_, _| {}).unwrap_err().kind(), Kind::Usage);
}

#[test]
fn the_floor_of_the_host_is_not_to_be_talked_down() {
    let lab = Lab::in_memory();
    let floor = Limits { min_age: Duration::from_secs(7 * 86_400), ..Limits::default() };
    // Its host is up since the wall clock's zero, and never sleeps.
    let at = |time: &str| {
        let now: jiff::Timestamp = time.parse().unwrap();
        let up_s = now.as_second() as u64;
        let boot = move || BootTime { boot: "one".to_owned(), up_s };
        Store::open(lab.root(), &uuid(), move || now).unwrap().with_limits(floor).with_boot_clock(boot)
    };
    let history = blocks(&at("2024-05-01T12:00:05Z"), "aa b. .c");
    for early in ["2024-05-08T12:00:04Z", "2024-04-01T00:00:00Z"] {
        let e = at(early).prune(&[history[0].0.clone()], &mut |_, _| {}).unwrap_err();
        assert_eq!(e.kind(), Kind::Refused, "{early}");
        assert!(e.to_string().contains("none of less than 604800 s"), "{e}");
    }
    assert_history(&lab.store(), &history, "nothing was removed");
    let late = at("2024-05-08T12:00:05Z");
    assert_eq!(late.holds().unwrap().min_age_s, 604_800);
    assert_eq!(late.prune(&[history[0].0.clone()], &mut |_, _| {}).unwrap().removed.len(), 1);
}

#[test]
fn pinned_points_and_points_in_use_are_passed_by() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let mut history = blocks(&store, "aaaa b... .c.. ..d. e...");
    let id = |n: usize| history[n].0.clone();
    let (first, second, third, fourth) = (id(0), id(1), id(2), id(3));
    store.pin(&second, Some("before the\x1bupgrade")).unwrap();
    assert_eq!(store.holds().unwrap().pins[0].reason, "before the upgrade");
    // Read by us: the stream of an export is a lease.
    let mut stream = store.export(&fourth, &DiskName::new("vda").unwrap()).unwrap();
    stream.next_chunk().unwrap();
    assert_eq!(store.holds().unwrap().leases.len(), 1);
    let report = prune(&store, &[first.clone(), second.clone(), third.clone(), fourth.clone()]);
    assert_eq!(report.removed, [first.clone(), third.clone()]);
    let kept: Vec<_> = report.kept.iter().map(|k| (k.point.clone(), k.why.split(',').next().unwrap())).collect();
    let in_use = "in use: export";
    assert_eq!(kept, [(second.clone(), "pinned: before the upgrade"), (fourth.clone(), in_use)]);
    // What the export reads through stays as it is until it is over.
    assert_eq!((report.folded.len(), report.waiting.len()), (0, 2), "{report:?}");
    assert!(report.waiting[0].why.contains("export"), "{report:?}");
    history.retain(|(id, _)| *id != first && *id != third);
    assert_history(&store, &history, "links wait");
    stream.close().unwrap();
    assert_eq!(store.holds().unwrap().links.len(), 2);
    let report = prune(&store, &[]);
    assert_eq!((report.folded.len(), report.waiting.len()), (2, 0), "{report:?}");
    assert_history(&store, &history, "folded later");
    assert_no_remains(&store);
    store.pin(&second, None).unwrap();
    let report = prune(&store, &[second.clone(), fourth.clone()]);
    assert_eq!(report.removed.len(), 2);
    history.retain(|(id, _)| *id != second && *id != fourth);
    assert_history(&store, &history, "nothing held");
    assert_eq!(store.pin(&second, Some("")).unwrap_err().kind(), Kind::NotFound);
}

/// Keeps an image open as a drill does, until dropped.
struct Reader(std::process::Child);

impl Reader {
    fn of(image: &Path) -> Reader {
        use std::io::{BufRead, Write};
        let mut child = Command::new("qemu-io")
            .args(["-r", "-f", "qcow2", image.to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut said = String::new();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        while !said.contains("read 512/512") {
            said.clear();
            assert!(output.read_line(&mut said).unwrap() > 0, "qemu-io reads and says so");
        }
        Reader(child)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_a_qemu_has_open_is_in_use() {
    let lab = Lab::new();
    let store = lab.store();
    let mut history = blocks(&store, "aaaa b... .c.. ..d.");
    let view = store.describe().unwrap();
    let image = |n: usize| view.points[n].disks[0].image.clone();
    let ids: Vec<PointId> = history[..3].iter().map(|(id, _)| id.clone()).collect();
    let reader = Reader::of(&image(1));
    let report = prune(&store, &ids);
    // It reads the second point, and the first one through it.
    assert_eq!(report.removed, [ids[0].clone(), ids[2].clone()], "{report:?}");
    assert!(report.kept[0].why.contains("a QEMU program"), "{report:?}");
    assert_eq!(report.folded, [ids[2].clone()], "{report:?}");
    history.retain(|(id, _)| *id != ids[0] && *id != ids[2]);
    drop(reader);
    assert_history(&store, &history, "beside a reader");
    let report = prune(&store, &[ids[1].clone()]);
    assert_eq!((report.removed.len(), report.folded.len()), (1, 2));
    history.remove(0);
    assert_history(&store, &history, "afterwards");
    assert_no_remains(&store);
}

#[test]
fn damage_is_not_carried_on() {
    let lab = Lab::new();
    let store = lab.store();
    let history = blocks(&store, "aaaaaaaa bcd..... ..e.....");
    let view = store.describe().unwrap();
    // Of the second point, and needed by the third.
    let image = &view.points[1].disks[0].image;
    flip(image, find(image, &[b'c'; BLOCK_LEN]) + 9);
    // Here only what the third point changed is copied, into the image that has the damage.
    let report = prune(&store, &[history[1].0.clone()]);
    assert_eq!((report.removed.len(), report.folded.len()), (1, 1), "{report:?}");
    // Now the damaged block would have to be copied.
    let report = prune(&store, &[history[0].0.clone()]);
    assert_eq!((report.removed.len(), report.folded.len()), (1, 0), "{report:?}");
    assert!(report.waiting[0].why.contains("block 1 is not what was sealed"), "{report:?}");
    let damaged = store.verify(&history[2].0, &mut |_, _| {}).unwrap();
    assert_eq!(damaged.disks[0].damaged, [1]);
}

fn deep(store: &Store, points: u64) -> Vec<PointView> {
    let mut disk = content(64 * BLOCK_LEN, &[(0, 40)]);
    let mut made = vec![sync(store, 1, None, &[("vda", None, &disk)])];
    for n in 2..=points {
        let old = disk.clone();
        disk[(n as usize * 5 % 64) * BLOCK_LEN..][..BLOCK_LEN].fill(n as u8);
        made.push(sync(store, n, made.last(), &[("vda", Some(&old), &disk)]));
    }
    made
}

/// Listing, reading the oldest and the newest, adding one: with 100 points as with one.
#[test]
fn a_hundred_points_are_listed_read_and_pruned() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let points = deep(&store, 100);
    let timed = |what: &str, act: &mut dyn FnMut()| {
        let started = std::time::Instant::now();
        act();
        println!("{what}: {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    };
    timed("list", &mut || assert_eq!(store.describe().unwrap().points.len(), 100));
    timed("verify the oldest", &mut || assert!(store.verify(&points[0].id, &mut |_, _| {}).unwrap().is_whole()));
    timed("verify the newest", &mut || assert!(store.verify(&points[99].id, &mut |_, _| {}).unwrap().is_whole()));
    let vda = DiskName::new("vda").unwrap();
    for point in [&points[0], &points[99]] {
        timed("export", &mut || {
            let mut stream = store.export(&point.id, &vda).unwrap();
            while !stream.next_chunk().unwrap().is_empty() {}
            stream.close().unwrap();
        });
    }
    let holds = store.holds().unwrap();
    assert_eq!((holds.depth, holds.depth_max), (100, 64));
    timed("prune 90 of them", &mut || {
        let gone: Vec<PointId> = points[..95].iter().filter(|p| p.id.seq() % 20 != 0).map(|p| p.id.clone()).collect();
        assert_eq!(prune(&store, &gone).folded.len(), gone.len());
    });
    assert_eq!(store.holds().unwrap().depth, store.describe().unwrap().points.len() as u64);
    for point in store.describe().unwrap().points {
        assert!(store.verify(&point.id, &mut |_, _| {}).unwrap().is_whole());
    }
}
