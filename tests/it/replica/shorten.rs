//! Keeping chains short, against a model: whatever is read, before, between and after, is what was sealed; no point
//! goes; runs and readers are not in the way, or are told of. With removals in between: `prune`. Crashes:
//! `shorten_crash`.

use super::support::*;
use std::path::PathBuf;
use virt_replica::block::BLOCK_LEN;
use virt_replica::error::Kind;
use virt_replica::name::{DiskName, PointId};
use virt_replica::replica::Replica;
use virt_replica::replica::store::{Limits, Store};
use virt_replica::replica::upkeep::Upkeep;

/// The store of a host that allows so many images.
fn shallow(lab: &Lab, depth_max: u64) -> Store {
    lab.store().with_limits(Limits { depth_max, ..Limits::default() })
}

fn file(store: &Store, point: &PointId, name: &str) -> PathBuf {
    store.path().join("points").join(point.as_str()).join(name)
}

/// One more point: block `n` of the disk is filled.
fn one_more(store: &Store, history: &mut History, n: usize, byte: u8) {
    let old = history.last().unwrap().1[0].1.clone();
    let mut new = old.clone();
    new[n * BLOCK_LEN..][..BLOCK_LEN].fill(byte);
    let head = store.describe().unwrap().head().cloned();
    let point = sync(store, head.as_ref().unwrap().id.seq() + 1, head.as_ref(), &[("vda", Some(&old), &new)]);
    history.push((point.id, vec![("vda".to_owned(), new)]));
}

/// The target's own bound holds, however many points there are, and none of them is lost.
#[test]
fn a_hundred_points_stay_below_the_depth_that_the_host_allows() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 8);
    let mut history = blocks(&store, "aaaaaaaabbbb----");
    let mut shortened = Vec::new();
    for n in 2..=100usize {
        one_more(&store, &mut history, n * 5 % 16, n as u8);
        if shorten(&store, u64::MAX).unwrap() {
            shortened.push(n as u64);
        }
        assert!(store.holds().unwrap().depth < 8, "point {n}");
    }
    // Once in as many runs as make the chain deep again.
    assert_eq!(shortened, (8..=100).step_by(7).collect::<Vec<u64>>());
    assert_history(&store, &history, "a hundred points");
    assert_no_remains(&store);
    // What nobody reads through any more goes without copying.
    let gone: Vec<PointId> = history.drain(..98).map(|(id, _)| id).collect();
    let report = store.prune(&gone, &mut |_, _| {}).unwrap();
    assert_eq!((report.removed.len(), report.folded.len(), report.waiting.len()), (98, 98, 0), "{report:?}");
    assert_history(&store, &history, "two points");
}

#[test]
fn a_chain_that_is_short_enough_is_left_alone() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 4);
    assert_eq!(store.shorten().err().map(|e| e.kind()), Some(Kind::NotFound), "no replica yet");
    blocks(&store, "ab .c d.");
    assert!(store.shorten().unwrap().is_none());
    assert!(!store.path().join("shorten.lock").exists());
    // One image is as few as it gets, whatever is asked for.
    let absurd = shallow(&lab, 0);
    assert!(shorten(&absurd, u64::MAX).unwrap());
    assert!(absurd.shorten().unwrap().is_none());
}

/// Zeros of an upper image hide what lies below, and must not come back when nothing hides it any more.
#[test]
fn zeros_stay_zeros_and_blocks_beyond_a_shorter_disk_too() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 3);
    let mut history = blocks(&store, "abcd --.. ..--");
    assert!(shorten(&store, u64::MAX).unwrap());
    assert_history(&store, &history, "all zero");
    // Shrunk, and grown again.
    for (n, blocks) in [(4u64, 1usize), (5, 4)] {
        let old = history.last().unwrap().1[0].1.clone();
        let mut new = old.clone();
        new.resize(blocks * BLOCK_LEN, 0);
        let head = store.describe().unwrap().head().cloned();
        let point = sync(&store, n, head.as_ref(), &[("vda", Some(&old), &new)]);
        history.push((point.id, vec![("vda".to_owned(), new)]));
    }
    assert!(shorten(&store, u64::MAX).unwrap());
    assert_history(&store, &history, "shrunk and grown");
}

/// A run that begins, ships and seals in the middle of the copying, and the next one on top of what was switched
/// beneath it.
#[test]
fn runs_go_on_beside_it() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 3);
    let mut history = blocks(&store, "abcdefgh .x...... ..y.....");
    let mut shortening = store.shorten().unwrap().expect("three images");
    assert_eq!(shortening.start().bytes_total, 8 * BLOCK_LEN as u64);
    assert!(!shortening.step(1).unwrap().end);
    one_more(&store, &mut history, 5, b'z');
    while !shortening.step(1).unwrap().end {}
    shortening.close().unwrap();
    assert_history(&store, &history, "a run beside it");
    assert_eq!(store.holds().unwrap().depth, 2, "the new point lies on the image that stands alone");
    one_more(&store, &mut history, 0, b'q');
    assert_history(&store, &history, "a run after it");
    assert_no_remains(&store);
}

/// What was copied is kept, and the second time it takes a moment.
#[test]
fn a_writer_and_a_reader_are_waited_for_and_nothing_is_copied_twice() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 3);
    let history = blocks(&store, "abcd .x.. ..y.");
    let vda = DiskName::new("vda").unwrap();
    let in_the_way = |what: &str| {
        let e = shorten(&shallow(&lab, 3), u64::MAX).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy, "{what}: {e}");
        assert!(file(&store, &history[2].0, "vda.changes.alone").exists(), "{what}");
    };
    let reading = store.export(&history[2].0, &vda).unwrap();
    in_the_way("a reader");
    reading.close().unwrap();
    let writer = lab.store();
    writer.begin(&begin(9, Some(history[2].0.clone()), &[("vda", 4 * BLOCK_LEN, false)])).unwrap();
    in_the_way("a writer");
    writer.abandon().unwrap();
    // Who reads an older point is in nobody's way.
    let reading = store.export(&history[0].0, &vda).unwrap();
    let mut shortening = store.shorten().unwrap().unwrap();
    assert_eq!(shortening.start().bytes_total, 0, "it is copied already");
    assert!(shortening.step(1).unwrap().end);
    shortening.close().unwrap();
    reading.close().unwrap();
    assert_history(&store, &history, "in the end");
    assert_no_remains(&store);
}

#[test]
fn there_is_one_at_a_time() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 2);
    let history = blocks(&store, "ab .x");
    let first = store.shorten().unwrap().unwrap();
    assert_eq!(store.shorten().err().map(|e| e.kind()), Some(Kind::Busy));
    // It is a reader like any other: the point is not removed under it.
    one_more(&store, &mut history.clone(), 0, b'z');
    let report = store.prune(&[history[1].0.clone()], &mut |_, _| {}).unwrap();
    assert!(report.kept[0].why.contains("shorten"), "{report:?}");
    first.close().unwrap();
    assert!(shorten(&store, u64::MAX).unwrap());
}

/// What was left aside of a point that is not the newest any more takes no room for long.
#[test]
fn what_was_left_aside_is_removed() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 3);
    let mut history = blocks(&store, "abcd .x.. ..y.");
    assert!(!shorten(&store, 2).unwrap());
    assert!(file(&store, &history[2].0, "vda.qcow2.alone").exists());
    one_more(&store, &mut history, 1, b'z');
    assert!(!shorten(&shallow(&lab, 9), u64::MAX).unwrap());
    assert_no_remains(&store);
    assert_history(&store, &history, "nothing was changed");
}

/// A block that rotted is not copied into an image that would vouch for it.
#[test]
fn damage_is_not_carried_on() {
    let lab = Lab::in_memory();
    let store = shallow(&lab, 3);
    let history = blocks(&store, "abcd .x.. ..y.");
    let image = file(&store, &history[0].0, "vda.qcow2");
    flip(&image, find(&image, &vec![b'd'; BLOCK_LEN]) + 77);
    let e = shorten(&store, u64::MAX).unwrap_err();
    assert!(e.kind() == Kind::Corrupt && e.chain().contains("block 3 is not what was sealed"), "{e}");
    assert_no_remains(&store);
    let damaged = store.verify(&history[2].0, &mut |_, _| {}).unwrap();
    assert_eq!(damaged.disks[0].damaged, [3]);
    // What nobody reads of the newest point does not matter to it.
    let mut history = history;
    one_more(&store, &mut history, 3, b'z');
    assert!(shorten(&store, u64::MAX).unwrap());
    assert!(store.verify(&history[3].0, &mut |_, _| {}).unwrap().is_whole());
}
