//! Seeds: what a broken first copy leaves, and what an operator brings, is built on by the next first copy, and never
//! believed.

use super::support::*;
use std::path::PathBuf;
use virt_replica::block::digest::piece_digests;
use virt_replica::block::{BLOCK_LEN, BlockIndex, DiskSize};
use virt_replica::engine::disk_target::DiskTarget as _;
use virt_replica::error::Kind;
use virt_replica::image::raw::RawImage;
use virt_replica::image::{Format, Layer};
use virt_replica::name::DiskName;
use virt_replica::replica::store::Store;
use virt_replica::replica::{BeginPoint, Begun, PointView, Replica as _};

const B: usize = BLOCK_LEN;

fn resuming(run: u64, disks: &[(&str, usize)]) -> BeginPoint {
    let disks: Vec<_> = disks.iter().map(|(name, size)| (*name, *size, true)).collect();
    let mut request = begin(run, None, &disks);
    request.disks.iter_mut().for_each(|d| d.resume = true);
    request
}

fn vda() -> DiskName {
    DiskName::new("vda").unwrap()
}

fn seed_file(store: &Store) -> PathBuf {
    store.path().join("seeds/vda.qcow2")
}

/// Sends the first part of a first copy from nothing, and gives up.
fn break_off(store: &Store, run: u64, content: &[u8], part: f64) {
    store.begin(&begin(run, None, &[("vda", content.len(), true)])).unwrap();
    let patch = patch("vda", None, content, false);
    store.apply(&vda(), &patch[..(patch.len() as f64 * part) as usize]).unwrap();
    store.abandon().unwrap();
}

/// Begins a run that may start from a seed, sends what differs from `there`, seals, and looks at everything.
fn finish(store: &Store, run: u64, there: &[u8], content: &[u8]) -> (Begun, PointView) {
    let begun = store.begin(&resuming(run, &[("vda", content.len())])).unwrap();
    let seed = begun.seeds.iter().find(|s| s.name == vda());
    assert_eq!(seed.map(|s| (s.size, s.root)), Some((DiskSize(there.len() as u64), root(there))));
    assert_nodes(store, "vda", there);
    send(store, "vda", Some(there), content);
    let point = store.seal(&seal(&[("vda", content)])).unwrap();
    check(store, &point, content);
    (begun, point)
}

/// The point is whole by every way there is to look at it, and its list tells all of it.
fn check(store: &Store, point: &PointView, content: &[u8]) {
    assert_image(&point.disks[0].image, content);
    assert!(store.verify(&point.id, &mut |_, _| {}).unwrap().is_whole());
    assert_nodes(store, "vda", content);
    // Made anew from the change list alone.
    std::fs::remove_dir_all(store.path().join("digests")).unwrap();
    assert_nodes(store, "vda", content);
    let mut left: Vec<_> = std::fs::read_dir(point.disks[0].image.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["vda.changes", "vda.qcow2"], "nothing of the seed is left in the point");
    assert!(!seed_file(store).exists());
}

/// `content` as far as a broken copy has it: whole blocks from the start.
fn prefix(content: &[u8], blocks: usize) -> Vec<u8> {
    let mut there = content[..blocks * B].to_vec();
    there.resize(content.len(), 0);
    there
}

fn blocks_there(image: &std::path::Path, content: &[u8]) -> usize {
    let raw = tempfile::NamedTempFile::new().unwrap();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), raw.path().to_str().unwrap()]);
    let there = std::fs::read(raw.path()).unwrap();
    content.chunks(B).zip(there.chunks(B)).take_while(|(a, b)| a == b).count()
}

#[test]
fn a_broken_first_copy_goes_on_where_it_was_broken_off() {
    let lab = Lab::new();
    let store = lab.store();
    let mut content = vec![0; 200 * B + 777];
    Rng(7).fill(&mut content);
    content[50 * B..60 * B].fill(0);
    break_off(&store, 1, &content, 0.6);
    assert!(store.describe().unwrap().open_point.is_none());
    let kept = store.describe().unwrap().seeds;
    assert!(matches!(&kept[..], [(name, bytes)] if *name == vda() && *bytes > 100 * B as u64), "{kept:?}");

    let blocks = blocks_there(&seed_file(&store), &content);
    assert!((100..140).contains(&blocks), "{blocks} of 200 blocks arrived");
    // The guest went on writing meanwhile: before, behind and at the place, and a block became zero.
    let there = prefix(&content, blocks);
    for at in [3, blocks - 1, blocks, 190] {
        content[at * B + 5] ^= 0xff;
    }
    content[9 * B..10 * B].fill(0);
    let (begun, point) = finish(&store, 2, &there, &content);
    assert_eq!(begun.seeds[0].data_bytes, (blocks as u64 - 10) * B as u64, "ten of them are zero");
    assert!(point.disks[0].stats.bytes_written < (200 - blocks as u64 + 4) * B as u64, "only what differs was written");
    // From here on it is a replica as any other.
    let next: Vec<u8> = content.iter().map(|b| b ^ 1).collect();
    let second = sync(&store, 3, Some(&point), &[("vda", Some(&content), &next)]);
    assert_image(&second.disks[0].image, &next);
    assert_image(&point.disks[0].image, &content);
}

#[test]
fn broken_off_again_and_again_it_gets_on() {
    let lab = Lab::new();
    let store = lab.store();
    let mut content = vec![0; 120 * B];
    Rng(9).fill(&mut content);
    break_off(&store, 1, &content, 0.3);
    let mut there = blocks_there(&seed_file(&store), &content);
    for run in 2..5 {
        store.begin(&resuming(run, &[("vda", content.len())])).unwrap();
        let rest = patch("vda", Some(&prefix(&content, there)), &content, false);
        store.apply(&vda(), &rest[..rest.len() / 3]).unwrap();
        store.abandon().unwrap();
        let now = blocks_there(&seed_file(&store), &content);
        assert!(now > there, "run {run}: {there} blocks before, {now} after");
        there = now;
    }
    // A run that comes to nothing before it sent anything keeps what was there.
    store.begin(&resuming(8, &[("vda", content.len())])).unwrap();
    store.abandon().unwrap();
    finish(&store, 9, &prefix(&content, there), &content);
}

#[test]
fn pieces_of_a_seed_are_told_and_built_on() {
    let lab = Lab::new();
    let store = lab.store();
    let mut content = vec![0; 40 * B];
    Rng(11).fill(&mut content);
    break_off(&store, 1, &content, 0.9);
    let blocks = blocks_there(&seed_file(&store), &content);
    let there = prefix(&content, blocks);
    content[7 * B + 4096] ^= 1;
    store.begin(&resuming(2, &[("vda", content.len())])).unwrap();
    let asked = [BlockIndex(7), BlockIndex(39), BlockIndex(1 << 40)];
    let told = store.pieces(&vda(), &asked).unwrap();
    assert_eq!(told[0], piece_digests(&there[7 * B..8 * B]));
    assert_eq!(told[1], piece_digests(&there[39 * B..]));
    store.apply(&vda(), &patch("vda", Some(&there), &content, true)).unwrap();
    assert_eq!(store.finish_disk(&vda()).unwrap().root, root(&content));
    let point = store.seal(&seal(&[("vda", &content)])).unwrap();
    check(&store, &point, &content);
}

#[test]
fn nothing_of_a_seed_is_believed() {
    let lab = Lab::new();
    let store = lab.store();
    let mut content = vec![0; 60 * B];
    Rng(13).fill(&mut content);
    // Data that rotted: read as it is, and so it is only another difference.
    break_off(&store, 1, &content, 0.9);
    let blocks = blocks_there(&seed_file(&store), &content);
    flip(&seed_file(&store), find(&seed_file(&store), &content[20 * B..20 * B + 64]));
    let mut there = prefix(&content, blocks);
    there[20 * B] ^= 0xff;
    let begun = store.begin(&resuming(2, &[("vda", content.len())])).unwrap();
    assert_eq!(begun.seeds[0].root, root(&there));
    store.abandon().unwrap();

    // A header or a table that rotted, another size, a backing image slipped under: thrown away, and begun from
    // nothing.
    type Damage<'a> = (&'a str, &'a dyn Fn(&std::path::Path));
    let damages: [Damage; 4] = [
        ("no qcow2", &|p| std::fs::write(p, "not an image").unwrap()),
        ("cut off", &|p| std::fs::File::options().write(true).open(p).unwrap().set_len(70_000).unwrap()),
        ("another size", &|p| qemu_img(&["resize", "-q", "-f", "qcow2", p.to_str().unwrap(), "+64k"])),
        ("a backing image", &|p| {
            let below = p.with_file_name("below.qcow2");
            qemu_img(&["create", "-q", "-f", "qcow2", below.to_str().unwrap(), "1M"]);
            std::fs::remove_file(p).unwrap();
            let (p, size) = (p.to_str().unwrap(), (60 * B).to_string());
            qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "below.qcow2", p, &size]);
        }),
    ];
    for (run, (what, damage)) in damages.iter().enumerate() {
        let run = 10 + 2 * run as u64;
        break_off(&store, run, &content, 0.9);
        damage(&seed_file(&store));
        let begun = store.begin(&resuming(run + 1, &[("vda", content.len())])).unwrap();
        assert!(begun.seeds.is_empty(), "{what}: {begun:?}");
        send(&store, "vda", None, &content);
        store.abandon().unwrap();
    }
}

#[test]
fn only_who_can_use_a_seed_gets_it_and_a_disk_in_the_head_has_none() {
    let lab = Lab::new();
    let store = lab.store();
    let content = vec![5; 30 * B];
    break_off(&store, 1, &content, 0.9);
    // A source that knows nothing of seeds, or an operator who wants everything sent.
    let begun = store.begin(&begin(2, None, &[("vda", content.len(), true)])).unwrap();
    assert!(begun.seeds.is_empty());
    send(&store, "vda", None, &content);
    let point = store.seal(&seal(&[("vda", &content)])).unwrap();
    assert!(seed_file(&store).exists(), "not used, not yet in the way");
    // The next run sweeps it, as the head has the disk now.
    let next = vec![6; 30 * B];
    sync(&store, 3, Some(&point), &[("vda", Some(&content), &next)]);
    assert!(!seed_file(&store).exists());
    assert!(store.describe().unwrap().seeds.is_empty());
    // A later point that is given up leaves nothing: it lies on the head.
    let head = store.describe().unwrap().head().unwrap().id.clone();
    let mut request = begin(4, Some(head), &[("vda", next.len(), false)]);
    request.disks[0].resume = true;
    store.begin(&request).unwrap();
    store.apply(&vda(), &patch("vda", Some(&next), &content, false)).unwrap();
    store.abandon().unwrap();
    assert!(store.describe().unwrap().seeds.is_empty());
}

#[test]
fn a_copy_that_came_by_car_is_adopted_and_only_the_difference_sent() {
    let lab = Lab::new();
    let store = lab.store();
    let mut content = vec![0; 90 * B + 1024];
    Rng(17).fill(&mut content[..40 * B]);
    let brought = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(brought.path(), &content).unwrap();
    let layer = Layer { path: brought.path().into(), format: Format::Raw, block_device: false, data_file: None };
    let image = RawImage::open(&layer).unwrap();
    let mut told = (0, 0);
    let copied = store.adopt(&vda(), &image, &mut |done, all| told = (done, all)).unwrap();
    assert_eq!(copied, 40 * B as u64, "zeros are not copied");
    assert_eq!(told, (content.len() as u64, content.len() as u64));
    assert_eq!(std::fs::read(brought.path()).unwrap(), content, "what was brought is as it was");

    let there = content.clone();
    content[B] ^= 1;
    let (_, point) = finish(&store, 1, &there, &content);
    assert_eq!(point.disks[0].stats.blocks_changed, 1);
    assert_eq!(store.adopt(&vda(), &image, &mut |_, _| {}).unwrap_err().kind(), Kind::Conflict);
}
