//! Reading all points again: what has rotted is named with point, disk, range and readers; what was read stays read;
//! and the next run mends the head. Over the wire: tests/it/agent; on two hosts: tests/lab/suite/scrub.rs.

use super::support::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use virt_replica::block::BLOCK_LEN;
use virt_replica::block::digest::Digest;
use virt_replica::engine::disk_target::DiskTarget as _;
use virt_replica::error::Kind;
use virt_replica::name::{DiskName, PointId};
use virt_replica::replica::store::Store;
use virt_replica::replica::upkeep::{Damage, DamageKind, Held as _, ScrubStep, Scrubbing, Upkeep};
use virt_replica::replica::{Attachment, BeginPoint, Replica};

const BLOCK: u64 = BLOCK_LEN as u64;

fn vda() -> DiskName {
    DiskName::new("vda").unwrap()
}

/// A history of which only the end counts.
fn last(store: &Store, words: &str) -> Vec<u8> {
    blocks(store, words).pop().unwrap().1.pop().unwrap().1
}

fn points(store: &Store) -> Vec<PointId> {
    store.describe().unwrap().points.into_iter().map(|p| p.id).collect()
}

fn file(store: &Store, point: &PointId, name: &str) -> PathBuf {
    store.path().join("points").join(point.as_str()).join(name)
}

/// Inverts a byte in the block of this letter, in the image of a point (counted from 1).
fn rot(store: &Store, point: usize, letter: u8) {
    let image = file(store, &points(store)[point - 1], "vda.qcow2");
    flip(&image, find(&image, &[letter; 4096]) + 4711);
}

/// All steps to the end.
fn finish(mut scrub: Box<dyn Scrubbing>) -> (u64, Vec<Damage>) {
    let (mut bytes, mut found) = (0, Vec::new());
    loop {
        let step = scrub.step(u64::MAX).unwrap();
        bytes += step.bytes_read;
        found.extend(step.found);
        if step.end {
            scrub.close().unwrap();
            return (bytes, found);
        }
    }
}

fn scrub(store: &Store) -> (u64, Vec<Damage>) {
    finish(store.scrub(false).unwrap())
}

/// `"1:3 2 3"`: damage in point 1, block 3, read by 2 and 3. In the order of points and blocks.
fn shown(damage: &[Damage]) -> String {
    let one = |d: &Damage| {
        assert_eq!((d.what, &d.disk), (DamageKind::Content, &Some(vda())));
        let blocks = match (d.start / BLOCK, d.end.div_ceil(BLOCK)) {
            (first, end) if end == first + 1 => first.to_string(),
            (first, end) => format!("{first}-{}", end - 1),
        };
        let readers: String = d.dependants.iter().map(|p| format!(" {}", p.seq())).collect();
        (d.point.seq(), d.start, format!("{}:{blocks}{readers}", d.point.seq()))
    };
    let mut all: Vec<_> = damage.iter().map(one).collect();
    all.sort();
    all.into_iter().map(|(_, _, text)| text).collect::<Vec<_>>().join(", ")
}

fn known(store: &Store) -> String {
    shown(&store.holds().unwrap().scrub.damage)
}

#[test]
fn flipped_bytes_are_named_with_point_disk_range_and_readers() {
    let lab = Lab::in_memory();
    let store = lab.store();
    blocks(&store, "abcdef.. .x..y... ...z.... ....v..w");
    assert_eq!(scrub(&store), (11 * BLOCK, vec![]), "six, two, one and two blocks are the points' own");
    rot(&store, 1, b'b'); // hidden by point 2
    rot(&store, 1, b'c'); // read by all
    rot(&store, 1, b'd'); // until point 3, and next to the one before
    rot(&store, 2, b'y'); // in the middle, until point 4
    rot(&store, 4, b'w'); // in the head
    let (bytes, found) = scrub(&store);
    assert_eq!(bytes, 11 * BLOCK);
    assert_eq!(shown(&found), "1:1-3 2 3 4, 2:4 3, 4:7");
    assert_eq!(known(&store), shown(&found), "it is on record");
    let view = store.describe().unwrap();
    // Of point 1 only block 2; of point 2 nothing; its own.
    assert_eq!(view.damaged.len(), 1);
    assert_eq!((view.damaged[0].bytes, view.damaged[0].beyond_repair), (2 * BLOCK, false));
    // Another process knows it too, and a newer point that has the block reads it no more.
    let again = lab.store();
    let head = again.describe().unwrap().head().cloned();
    again.begin(&begin(9, head.map(|h| h.id), &[("vda", 8 * BLOCK_LEN, false)])).unwrap();
    assert_eq!(known(&again), "1:1-3 2 3 4, 2:4 3, 4:7", "a run under way is in nobody's way");
    assert_eq!(shown(&scrub(&store).1), "1:1-3 2 3 4, 2:4 3, 4:7");
    again.abandon().unwrap();
}

/// The steps are cut off at every place, with and without a goodbye; the rest is read, and nothing twice.
#[test]
fn an_interrupted_scrub_reads_only_the_rest() {
    let lab = Lab::in_memory();
    let store = lab.store();
    blocks(&store, "abcdef.. .x..y... ...z.... ....v..w");
    rot(&store, 1, b'c');
    rot(&store, 4, b'w');
    for steps in 1..16 {
        let mut first = store.scrub(true).unwrap();
        assert!(!first.start().resumed);
        assert_eq!(first.start().bytes_total, 11 * BLOCK);
        let read: Vec<ScrubStep> = (0..steps).map(|_| first.step(1).unwrap()).take_while(|s| !s.end).collect();
        let before: u64 = read.iter().map(|s| s.bytes_read).sum();
        let ended = read.len() < steps;
        if steps % 2 == 0 {
            first.close().unwrap()
        } else {
            drop(first)
        }
        if ended {
            assert_eq!(before, 11 * BLOCK);
            continue;
        }
        let under_way = store.holds().unwrap().scrub.under_way.expect("it was left");
        assert_eq!((under_way.bytes_read, under_way.finished_at), (before, None));
        let rest = lab.store().scrub(false).unwrap();
        assert_eq!((rest.start().resumed, rest.start().bytes_done), (true, before));
        let (after, _) = finish(rest);
        assert_eq!(before + after, 11 * BLOCK, "{steps}");
        assert_eq!(known(&store), "1:2 2 3 4, 4:7", "{steps}");
        let told = store.holds().unwrap().scrub;
        assert_eq!((told.under_way, told.last.unwrap().bytes_read), (None, 11 * BLOCK));
    }
}

#[test]
fn one_scrub_at_a_time_and_an_account_that_cannot_be_read_is_begun_anew() {
    let lab = Lab::in_memory();
    let store = lab.store();
    assert_eq!(store.scrub(false).err().unwrap().kind(), Kind::NotFound);
    blocks(&store, "ab");
    let first = store.scrub(false).unwrap();
    assert_eq!(store.scrub(false).err().unwrap().kind(), Kind::Busy);
    finish(first);
    std::fs::write(store.path().join("scrub.json"), "{").unwrap();
    assert!(store.holds().unwrap().scrub.damage.is_empty() && store.describe().unwrap().damaged.is_empty());
    assert_eq!(store.scrub(false).err().unwrap().kind(), Kind::Corrupt);
    assert_eq!(finish(store.scrub(true).unwrap()).0, 2 * BLOCK);
    assert_eq!(scrub(&store).0, 2 * BLOCK);
}

/// What is there no more is forgotten by the scrub that did not find it again, and not before.
#[test]
fn damage_that_is_gone_is_forgotten() {
    let lab = Lab::in_memory();
    let store = lab.store();
    blocks(&store, "abc .x.");
    rot(&store, 1, b'c');
    scrub(&store);
    let image = file(&store, &points(&store)[0], "vda.qcow2");
    flip(&image, find(&image, &[b'c'; 4096]) + 4711);
    let mut again = store.scrub(false).unwrap();
    again.step(1).unwrap();
    again.close().unwrap();
    assert_eq!(known(&store), "1:2 2", "block 2 was not read again yet");
    scrub(&store);
    assert_eq!(known(&store), "");
}

/// What a scrub reads just now is not removed, and points that go meanwhile are passed by.
#[test]
fn prune_goes_around_a_scrub_and_the_scrub_around_what_is_gone() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let content = last(&store, "abcd .x.. ..y. ...z");
    let ids = points(&store);
    let mut scrub = store.scrub(false).unwrap();
    scrub.step(1).unwrap();
    let report = lab.store().prune(&[ids[0].clone()], &mut |_, _| {}).unwrap();
    assert!(report.removed.is_empty() && report.kept[0].why.contains("scrub"), "{report:?}");
    let report = lab.store().prune(&[ids[1].clone()], &mut |_, _| {}).unwrap();
    assert_eq!((report.removed.len(), report.waiting.len()), (1, 0), "nobody reads through that: {report:?}");
    let (rest, found) = finish(scrub);
    assert!(found.is_empty(), "{found:?}");
    // a was read; b c d, what was folded into point 3 (x and y), and z remain.
    assert_eq!(rest, 6 * BLOCK);
    assert!(store.holds().unwrap().leases.is_empty());
    assert_image(&file(&store, &ids[3], "vda.qcow2"), &content);
}

/// A removed point that others still read through is read, too; what is damaged there stands in the way of its folding,
/// and its readers are named.
#[test]
fn links_are_read_like_points() {
    let lab = Lab::in_memory();
    let store = lab.store();
    blocks(&store, "abcd .xy. ...z");
    let ids = points(&store);
    rot(&store, 2, b'x');
    let reader = Box::new(store.hold(&ids[2], "a test").unwrap());
    let report = store.prune(&[ids[1].clone()], &mut |_, _| {}).unwrap();
    assert_eq!(report.waiting.len(), 1, "{report:?}");
    let (bytes, found) = scrub(&store);
    assert_eq!((bytes, shown(&found).as_str()), (7 * BLOCK, "2:1 3"));
    reader.release();
    // Folded or not: the head goes on to be known as damaged.
    store.prune(&[], &mut |_, _| {}).unwrap();
    assert_eq!(store.describe().unwrap().damaged[0].bytes, BLOCK);
}

fn repairing(store: &Store, run: u64, size: usize) -> BeginPoint {
    let head = store.describe().unwrap().head().map(|h| h.id.clone());
    let mut request = begin(run, head, &[("vda", size, false)]);
    request.disks[0].repair = true;
    request
}

/// Damaged blocks differ from everything, at every level of the tree and piece by piece; sent again they are written,
/// and then the head is whole. Nothing else is written.
#[test]
fn a_run_writes_again_what_is_damaged_in_the_head() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let content = last(&store, "abcdefgh .x...... ........");
    rot(&store, 1, b'b'); // hidden
    rot(&store, 1, b'c');
    rot(&store, 1, b'h');
    scrub(&store);
    // A run that knows nothing of it sees the head as it was sealed.
    let head = store.describe().unwrap().head().cloned().unwrap();
    store.begin(&begin(8, Some(head.id), &[("vda", content.len(), false)])).unwrap();
    assert_nodes(&store, "vda", &content);
    store.abandon().unwrap();
    store.begin(&repairing(&store, 9, content.len())).unwrap();
    let nodes = store.nodes(&vda(), 0, 0..8).unwrap();
    let differ: Vec<usize> = (0..8).filter(|n| nodes[*n] != leaves(&content)[*n]).collect();
    assert_eq!(differ, [2, 7]);
    assert_eq!(store.nodes(&vda(), 1, 0..1).unwrap(), [Digest([0xff; 32])]);
    let asked = [1, 2].map(virt_replica::block::BlockIndex);
    let pieces = store.pieces(&vda(), &asked).unwrap();
    assert_eq!(pieces.len(), 2);
    assert!(pieces[1].iter().all(|p| p.0 == [0xff; 16]) && pieces[0].iter().all(|p| p.0 != [0xff; 16]));
    store.apply(&vda(), &whole_patch("vda", &content, &content)).unwrap();
    let applied = store.finish_disk(&vda()).unwrap();
    assert_eq!((applied.bytes_written, applied.blocks_changed), (2 * BLOCK, 2));
    store.seal(&seal(&[("vda", &content)])).unwrap();
    let view = store.describe().unwrap();
    assert!(view.damaged.is_empty(), "{:?}", view.damaged);
    assert!(store.verify(&view.head().unwrap().id, &mut |_, _| {}).unwrap().is_whole());
    assert_image(&view.head().unwrap().disks[0].image, &content);
    assert_nodes(&store, "vda", &content);
    // The older points are as they were, and a new scrub says the same.
    assert_eq!(known(&store), "1:1-2 2 3, 1:7 2 3");
    let (_, found) = scrub(&store);
    assert_eq!(shown(&found), "1:1-2 2 3, 1:7 2 3");
}

/// A block that is to be zero and is not, found by the map alone, and zeroed again.
#[test]
fn data_where_zeros_should_be_is_found_and_mended() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let content = last(&store, "abcdef .--... ......");
    let image = file(&store, &points(&store)[1], "vda.qcow2");
    let write = format!("write -q -P 0x55 {} 512", 2 * BLOCK + 1024);
    let done = std::process::Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(&image).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let (bytes, found) = scrub(&store);
    assert_eq!((bytes, shown(&found).as_str()), (7 * BLOCK, "2:2 3"));
    store.begin(&repairing(&store, 9, content.len())).unwrap();
    assert_ne!(store.nodes(&vda(), 0, 2..3).unwrap(), [Digest::ZERO]);
    let patch = patch_of("vda", Some(&content), &content, |n, _, out, encoder| {
        if n == 1 {
            encoder.zero(virt_replica::block::BlockIndex(1), 2, out);
        }
    });
    store.apply(&vda(), &patch).unwrap();
    assert_eq!(store.finish_disk(&vda()).unwrap().blocks_changed, 1);
    store.seal(&seal(&[("vda", &content)])).unwrap();
    let view = store.describe().unwrap();
    assert!(view.damaged.is_empty());
    assert!(store.verify(&view.head().unwrap().id, &mut |_, _| {}).unwrap().is_whole());
    assert_image(&view.head().unwrap().disks[0].image, &content);
}

/// Change lists, images and attachments: named as a whole; a head that stands on the first two cannot be compared with.
#[test]
fn files_that_are_damaged_as_a_whole_are_named() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let content = last(&store, "abcd .x..");
    let head = store.describe().unwrap().head().cloned().unwrap();
    store.begin(&begin(3, Some(head.id), &[("vda", content.len(), false)])).unwrap();
    send(&store, "vda", Some(&content), &content);
    store.attach(Attachment::InactiveXml, b"<domain/>").unwrap();
    store.seal(&seal(&[("vda", &content)])).unwrap();
    let ids = points(&store);
    assert_eq!(scrub(&store).1, vec![]);
    let mut all = BTreeMap::new();
    for (point, name, at) in [(1, "domain.xml", 3), (0, "vda.changes", 80), (1, "vda.qcow2", 0)] {
        let point = if name == "domain.xml" { 2 } else { point };
        flip(&file(&store, &ids[point], name), at);
        let (_, found) = scrub(&store);
        for d in found {
            all.insert((d.point.seq(), format!("{:?}", d.what)), d);
        }
        if name == "domain.xml" {
            assert!(store.describe().unwrap().damaged.is_empty(), "no disk reads it");
        }
    }
    let named: Vec<_> = all.keys().map(|(seq, what)| format!("{seq} {what}")).collect();
    assert_eq!(named, ["1 Changes", "2 Image", "3 Attachment", "3 Image"], "{all:?}");
    assert_eq!(all[&(1, "Changes".to_owned())].dependants, ids[1..]);
    assert_eq!(all[&(3, "Attachment".to_owned())].attachment, Some(Attachment::InactiveXml));
    assert!(store.describe().unwrap().damaged[0].beyond_repair);
}
