//! Whole points in files: what comes out of one store goes into another, all of it or nothing, and onto the right point
//! only.

use super::support::{
    self, Lab, Rng, assert_history, assert_image, assert_nodes, begin, content, now, patch, seal, send, sync, uuid,
};
use std::path::Path;
use virt_replica::engine::disk_target::DiskTarget as _;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DiskName, DomainName, PointId};
use virt_replica::replica::pointfile::{self, Brought, Written};
use virt_replica::replica::store::Store;
use virt_replica::replica::upkeep::Upkeep as _;
use virt_replica::replica::{Attachment, Replica as _, SealPoint};

fn name() -> DomainName {
    DomainName::new("db01").unwrap()
}

fn write(store: &Store, since: Option<&PointId>, point: Option<&PointId>) -> Result<(Written, Vec<u8>)> {
    let mut out = Vec::new();
    let written = pointfile::write(store, (&uuid(), &name()), (since, point), &mut out, &mut |_| Ok(()))?;
    assert_eq!(written.bytes, out.len() as u64);
    Ok((written, out))
}

fn apply(root: &Path, file: &[u8]) -> Result<Brought> {
    pointfile::apply(file, |head| Store::open(root, &head.uuid, now), &mut |_| Ok(()))
}

/// Two points of two disks, with attachments; the second disk grows, and the third comes with the second point.
fn two_points(store: &Store) -> Vec<(PointId, support::Model)> {
    let mut rng = Rng(7);
    let vda = content(700_000, &[(0, 3), (7, 2)]);
    let vdb = content(300_000, &[(1, 1)]);
    store.begin(&begin(1, None, &[("vda", vda.len(), false), ("vdb", vdb.len(), false)])).unwrap();
    send(store, "vda", None, &vda);
    send(store, "vdb", None, &vdb);
    store.attach(Attachment::InactiveXml, b"<domain>1</domain>").unwrap();
    let first = store.seal(&seal(&[("vda", &vda), ("vdb", &vdb)])).unwrap();

    let mut new_a = vda.clone();
    rng.fill(&mut new_a[70_000..70_100]);
    new_a[131_072..196_608].fill(0);
    rng.fill(&mut new_a[600_000..]);
    let mut new_b = vdb.clone();
    new_b.resize(400_000, 9);
    let vdc = content(65_536, &[(0, 1)]);
    let disks = [("vda", new_a.len(), false), ("vdb", new_b.len(), false), ("vdc", vdc.len(), true)];
    store.begin(&begin(2, Some(first.id.clone()), &disks)).unwrap();
    send(store, "vda", Some(&vda), &new_a);
    send(store, "vdb", Some(&vdb), &new_b);
    send(store, "vdc", None, &vdc);
    store.attach(Attachment::InactiveXml, b"<domain>2</domain>").unwrap();
    store.attach(Attachment::Nvram, &vec![3; 600_000]).unwrap();
    let request = seal(&[("vda", &new_a), ("vdb", &new_b), ("vdc", &vdc)]);
    let second = store.seal(&SealPoint { autostart: Some(true), ..request }).unwrap();
    let model = |disks: &[(&str, &Vec<u8>)]| disks.iter().map(|(n, c)| ((*n).to_owned(), (*c).clone())).collect();
    vec![
        (first.id, model(&[("vda", &vda), ("vdb", &vdb)])),
        (second.id, model(&[("vda", &new_a), ("vdb", &new_b), ("vdc", &vdc)])),
    ]
}

/// The promise: seeded by a file, carried on by files, and the same again is no error.
#[test]
fn points_go_from_store_to_store_in_files() {
    let (from, to) = (Lab::new(), Lab::new());
    let store = from.store();
    let history = two_points(&store);
    let (_, whole) = write(&store, None, Some(&history[0].0)).unwrap();
    let (_, delta) = write(&store, Some(&history[0].0), None).unwrap();

    let brought = apply(to.root(), &whole).unwrap();
    assert!(!brought.already && brought.point_here == history[0].0);
    assert!(apply(to.root(), &whole).unwrap().already);
    let brought = apply(to.root(), &delta).unwrap();
    assert_eq!((brought.already, &brought.point_here), (false, &history[1].0));
    for again in [&whole, &delta] {
        assert!(apply(to.root(), again).unwrap().already);
    }
    let there = to.store();
    let (ours, theirs) = (store.describe().unwrap(), there.describe().unwrap());
    for (a, b) in ours.points.iter().zip(&theirs.points) {
        assert_eq!(
            (a.frozen_at, &a.run, a.consistency, a.autostart, &a.attachments),
            (b.frozen_at, &b.run, b.consistency, b.autostart, &b.attachments)
        );
    }
    let mut nvram = there.attachment(&history[1].0, Attachment::Nvram).unwrap();
    let mut found = Vec::new();
    loop {
        match nvram.next_chunk().unwrap() {
            chunk if chunk.is_empty() => break,
            chunk => found.extend(chunk),
        }
    }
    assert_eq!(found, vec![3; 600_000]);
    assert_eq!(there.attachment(&history[0].0, Attachment::Nvram).err().unwrap().kind(), Kind::NotFound);
    assert!(delta.len() < 600_000 + 400_000, "{} bytes: only what changed travels", delta.len());
    assert_history(&there, &history, "brought in files");
}

/// After a seed by file a run builds on it: its patch starts from the head that the file made.
#[test]
fn a_run_goes_on_from_a_point_that_a_file_brought() {
    let (from, to) = (Lab::new(), Lab::new());
    let store = from.store();
    let history = two_points(&store);
    let (_, whole) = write(&store, None, None).unwrap();
    apply(to.root(), &whole).unwrap();
    let there = to.store();
    let head = there.describe().unwrap().head().cloned().unwrap();
    let old: Vec<Vec<u8>> = history[1].1.iter().map(|(_, content)| content.clone()).collect();
    let mut new = old[0].clone();
    new[5] ^= 1;
    assert!(patch("vda", Some(&old[0]), &new, true).len() < 10_000);
    let point = sync(&there, 3, Some(&head), &[("vda", Some(&old[0]), &new), ("vdb", Some(&old[1]), &old[1])]);
    assert_image(&point.disk(&DiskName::new("vda").unwrap()).unwrap().image, &new);
    assert_nodes(&there, "vda", &new);
}

#[test]
fn any_other_base_is_refused_and_nothing_is_changed() {
    let (from, to) = (Lab::new(), Lab::new());
    let store = from.store();
    let history = two_points(&store);
    let (_, delta) = write(&store, Some(&history[0].0), None).unwrap();
    let refused = |result: Result<Brought>, words: &[&str]| {
        let e: Error = result.unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict, "{}", e.chain());
        words.iter().for_each(|word| assert!(e.what().contains(word), "{} lacks {word}", e.what()));
    };
    refused(apply(to.root(), &delta), &[history[0].0.as_str(), "the newest point here is nothing"]);
    // Another first point.
    let other = content(700_000, &[(1, 1)]);
    sync(&to.store(), 9, None, &[("vda", None, &other)]);
    refused(apply(to.root(), &delta), &["leads on from point", "and the newest point here is point 000001"]);
    let (_, whole) = write(&store, None, None).unwrap();
    refused(apply(to.root(), &whole), &["leads on from nothing"]);
    assert_eq!(to.store().describe().unwrap().points.len(), 1);
    assert!(to.store().describe().unwrap().open_point.is_none());
    let unknown = PointId::new("000009-00000009").unwrap();
    assert_eq!(write(&store, Some(&unknown), None).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(write(&store, None, Some(&unknown)).unwrap_err().kind(), Kind::NotFound);
}

/// However a stream is cut or touched, no point comes of it, and the whole one is taken afterwards.
#[test]
fn a_stream_that_is_cut_or_touched_makes_no_point() {
    let (from, to) = (Lab::in_memory(), Lab::in_memory());
    let store = from.store();
    sync(&store, 1, None, &[("vda", None, &content(200_000, &[(0, 2)]))]);
    let (_, whole) = write(&store, None, None).unwrap();
    let mut rng = Rng(11);
    for _ in 0..60 {
        let at = rng.below(whole.len() as u64) as usize;
        assert!(apply(to.root(), &whole[..at]).is_err(), "cut at {at}");
        let mut touched = whole.clone();
        touched[at] ^= 1 << rng.below(8);
        assert!(apply(to.root(), &touched).is_err(), "touched at {at}");
        let view = to.store().describe().unwrap();
        assert!(view.points.is_empty() && view.open_point.is_none());
    }
    assert!(apply(to.root(), &[&whole[..], b"x"].concat()).is_err());
    assert!(apply(to.root(), &[b"x", &whole[..]].concat()).is_err());
    let e = apply(to.root(), &[b"virt-replica point 2\n", &whole[21..]].concat()).unwrap_err();
    assert_eq!(e.kind(), Kind::Protocol);
    let e = apply(to.root(), b"virt-replica patch 1\n").unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt);
    assert!(!apply(to.root(), &whole).unwrap().already);
}

/// The changes between any two points are found, whatever was removed and folded between them.
#[test]
fn the_changes_between_any_two_points_lead_from_one_to_the_other() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let mut history = support::blocks(&store, "aab..cc.. ..b-.c.zz .a...-... aaaaaaaaa ---------");
    store.prune(&[history[1].0.clone()], &mut |_, _| {}).unwrap();
    history.remove(1);
    let vda = DiskName::new("vda").unwrap();
    for (since, old) in &history {
        for (point, new) in &history {
            let mut stream = store.changes(since, point, &vda).unwrap();
            let mut found = Vec::new();
            loop {
                match stream.next_chunk().unwrap() {
                    chunk if chunk.is_empty() => break,
                    chunk => found.extend(chunk),
                }
            }
            stream.close().unwrap();
            let target = Lab::in_memory();
            let there = target.store();
            let head = sync(&there, 1, None, &[("vda", None, &old[0].1)]);
            there.begin(&begin(2, Some(head.id), &[("vda", new[0].1.len(), false)])).unwrap();
            there.apply(&vda, &found).unwrap();
            assert_eq!(there.finish_disk(&vda).unwrap().root, support::root(&new[0].1), "{since} to {point}");
        }
    }
}

/// Written once, and read for ever.
#[test]
fn the_golden_file_is_written_and_read_as_ever() {
    let (from, to) = (Lab::in_memory(), Lab::in_memory());
    let store = from.store();
    let disk = content(70_000, &[(1, 1)]);
    store.begin(&begin(1, None, &[("vda", disk.len(), false)])).unwrap();
    send(&store, "vda", None, &disk);
    store.attach(Attachment::InactiveXml, b"<domain/>").unwrap();
    store.seal(&seal(&[("vda", &disk)])).unwrap();
    let (_, written) = write(&store, None, None).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/v1/point.bin");
    if std::env::var_os("VIRT_REPLICA_BLESS").is_some() && !path.exists() {
        std::fs::write(&path, &written).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert!(written == golden, "the file is written otherwise than it was");
    apply(to.root(), &golden).unwrap();
    assert_nodes(&to.store(), "vda", &disk);
}
