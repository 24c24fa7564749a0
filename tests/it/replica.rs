//! The store against a model: a disk is an array of bytes, a point a copy of it.
//!
//! Kept here: what a point holds is what was sent, whatever comes later (I9, I10); damage is found and named (I12);
//! what is rebuilt equals what was there; one writer (I15); a full file system costs the open point and nothing else
//! (I18); nothing is followed out of the store (I21). Crashes: tests/it/replica/crash.rs.

mod bounds;
#[cfg(feature = "failpoints")]
mod crash;
mod pieces;
mod pointfile;
mod promote;
mod prune;
#[cfg(feature = "failpoints")]
mod prune_crash;
mod recover;
mod scrub;
mod seed;
mod shorten;
#[cfg(feature = "failpoints")]
mod shorten_crash;
mod support;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use support::*;
use virt_replica::block::digest::Digest;
use virt_replica::block::{BLOCK_LEN, DiskSize};
use virt_replica::engine::disk_target::{DiskTarget as _, NODES_MAX};
use virt_replica::error::Kind;
use virt_replica::name::{DiskName, Generation, PointId};
use virt_replica::replica::store::{Store, list};
use virt_replica::replica::{Attachment, BeginDisk, Replica};

const MIB: usize = 1 << 20;

#[test]
fn a_first_point_can_be_read_by_qemu_and_tells_what_it_is() {
    let lab = Lab::new();
    let store = lab.store();
    let nothing = store.describe().unwrap();
    assert!(nothing.points.is_empty() && nothing.open_point.is_none() && !lab.root().join("replicas").exists());
    let disk = content(5 * MIB + 512, &[(0, 3), (17, 1), (70, 11)]);
    store.begin(&begin(1, None, &[("vda", disk.len(), false)])).unwrap();
    send(&store, "vda", None, &disk);
    store.attach(Attachment::InactiveXml, b"<domain/>").unwrap();
    assert_eq!(store.describe().unwrap().open_point.as_ref().unwrap().seq(), 1);
    let point = store.seal(&seal(&[("vda", &disk)])).unwrap();
    assert_eq!(store.describe().unwrap().head(), Some(&point));
    assert_eq!(point.disks[0].stats.blocks_changed, 15);
    assert_eq!(point.attachments, [Attachment::InactiveXml]);
    assert_image(&point.disks[0].image, &disk);
    assert!(store.verify(&point.id, &mut |_, _| {}).unwrap().is_whole());
    let listed = list(lab.root()).unwrap();
    assert_eq!((listed[0].0.as_str(), listed[0].1.as_str(), listed[0].2.points.len()), (UUID, "db01", 1));
}

#[test]
fn every_point_keeps_its_content_through_random_histories() {
    let seed = seed();
    println!("REPLICA_SEED={seed}");
    let mut rng = Rng(seed);
    for _ in 0..6 {
        random_history(&mut rng);
    }
}

fn random_history(rng: &mut Rng) {
    let lab = Lab::new();
    let store = lab.store();
    type Model = Vec<(String, Vec<u8>)>;
    let mut history: Vec<(PointId, Model)> = Vec::new();
    for n in 1..=8 {
        let before = history.last().map(|(_, disks)| disks.clone()).unwrap_or_default();
        let mut disks = Vec::new();
        for name in ["vda", "vdb"] {
            if rng.below(8) == 0 && !(name == "vdb" && disks.is_empty()) {
                continue;
            }
            let old = before.iter().find(|(d, _)| d == name).map(|(_, c)| c.clone());
            let mut new = old.clone().unwrap_or_else(|| vec![0; 512 * (1 + rng.below(12_000) as usize)]);
            if rng.below(4) == 0 {
                // Any size, also one that is no multiple of a sector.
                new.resize(rng.below(6 * MIB as u64) as usize + 1, 0);
            }
            scribble(rng, &mut new);
            disks.push((name.to_owned(), old, new, rng.below(10) == 0));
        }
        let head = history.last().map(|(id, _)| id.clone());
        let begun: Vec<_> = disks.iter().map(|(name, _, new, fresh)| (name.as_str(), new.len(), *fresh)).collect();
        store.begin(&begin(n, head, &begun)).unwrap();
        for (name, old, new, fresh) in &disks {
            let old = old.as_deref().filter(|_| !fresh);
            let patch = patch(name, old, new, rng.below(3) == 0);
            for part in rng.cuts(&patch) {
                store.apply(&DiskName::new(name.as_str()).unwrap(), part).unwrap();
            }
            store.finish_disk(&DiskName::new(name.as_str()).unwrap()).unwrap();
        }
        let sealed: Vec<_> = disks.iter().map(|(name, _, new, _)| (name.as_str(), &new[..])).collect();
        let point = store.seal(&seal(&sealed)).unwrap();
        history.push((point.id, disks.into_iter().map(|(name, _, new, _)| (name, new)).collect()));
        for (name, content) in &history.last().unwrap().1 {
            assert_nodes(&store, name, content);
        }
    }
    let view = store.describe().unwrap();
    for ((id, disks), point) in history.iter().zip(&view.points) {
        assert_eq!(*id, point.id);
        assert!(store.verify(id, &mut |_, _| {}).unwrap().is_whole(), "{id}");
        for (name, content) in disks {
            assert_image(&point.disk(&DiskName::new(name.as_str()).unwrap()).unwrap().image, content);
        }
    }
    // Made anew from the change lists, they are what they were.
    std::fs::remove_dir_all(view.path.join("digests")).unwrap();
    for (name, content) in &history.last().unwrap().1 {
        assert_nodes(&store, name, content);
    }
}

#[test]
fn unchanged_blocks_are_neither_written_nor_listed() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(8 * MIB, &[(0, 100)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    // The source sends everything once more, zeros included.
    store.begin(&begin(2, Some(first.id), &[("vda", disk.len(), false)])).unwrap();
    let vda = DiskName::new("vda").unwrap();
    store.apply(&vda, &whole_patch("vda", &disk, &disk)).unwrap();
    let applied = store.finish_disk(&vda).unwrap();
    assert_eq!((applied.blocks_changed, applied.bytes_written), (0, 0));
    let second = store.seal(&seal(&[("vda", &disk)])).unwrap();
    assert!(std::fs::metadata(&second.disks[0].image).unwrap().len() < MIB as u64);
    assert_image(&second.disks[0].image, &disk);
}

#[test]
fn a_flipped_byte_is_found_and_its_block_named() {
    let lab = Lab::new();
    let store = lab.store();
    let mut disk = content(8 * MIB, &[(0, 20), (100, 5)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    let old = disk.clone();
    disk[103 * BLOCK_LEN..104 * BLOCK_LEN].fill(0x5a);
    let second = sync(&store, 2, Some(&first), &[("vda", Some(&old), &disk)]);
    for (image, block) in [(&second.disks[0].image, 103), (&first.disks[0].image, 7)] {
        let at = find(image, &disk[block * BLOCK_LEN..][..4096]) + 1000;
        flip(image, at);
        let report = store.verify(&second.id, &mut |_, _| {}).unwrap();
        assert!(!report.is_whole());
        assert_eq!(report.disks[0].damaged, [block as u64]);
        assert_ne!(report.disks[0].root, report.disks[0].root_expected);
        flip(image, at);
    }
    assert!(store.verify(&second.id, &mut |_, _| {}).unwrap().is_whole());
}

#[test]
fn damage_beside_the_images_is_found_too() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(MIB, &[(0, 3)]);
    store.begin(&begin(1, None, &[("vda", disk.len(), false)])).unwrap();
    send(&store, "vda", None, &disk);
    store.attach(Attachment::Nvram, &[7; 1000]).unwrap();
    let first = store.seal(&seal(&[("vda", &disk)])).unwrap();
    let second = sync(&store, 2, Some(&first), &[("vda", Some(&disk), &disk)]);
    let dir = first.disks[0].image.parent().unwrap();

    flip(&dir.join("nvram.fd"), 500);
    let report = store.verify(&first.id, &mut |_, _| {}).unwrap();
    assert!(!report.is_whole() && report.damaged_attachments == [Attachment::Nvram]);
    flip(&dir.join("nvram.fd"), 500);

    flip(&dir.join("vda.changes"), 90);
    assert_eq!(store.verify(&second.id, &mut |_, _| {}).unwrap_err().kind(), Kind::Corrupt);
    flip(&dir.join("vda.changes"), 90);

    // Somebody rebased the image: what QEMU would read is no longer what we would.
    let alien = dir.join("alien.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", alien.to_str().unwrap(), "1M"]);
    let image = second.disks[0].image.to_str().unwrap();
    for backing in ["../000001-00000001/alien.qcow2", "../000001-00000001/gone.qcow2", "/etc/hostname"] {
        qemu_img(&["rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, image]);
        assert_eq!(store.verify(&second.id, &mut |_, _| {}).unwrap_err().kind(), Kind::Corrupt, "{backing}");
    }
}

/// Lost, damaged, stale, of another disk: it is made anew and says the same. Also when the change lists are gone too.
#[test]
fn a_digest_file_that_does_not_match_is_rebuilt() {
    let lab = Lab::new();
    let store = lab.store();
    let mut disk = content(9 * MIB, &[(0, 90), (120, 3)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk), ("vdb", None, &disk)]);
    let tree = store.path().join("digests/vda.tree");
    let stale = std::fs::read(&tree).unwrap();
    let old = disk.clone();
    disk[5 * BLOCK_LEN..7 * BLOCK_LEN].fill(1);
    disk[60 * BLOCK_LEN..61 * BLOCK_LEN].fill(0);
    let second = sync(&store, 2, Some(&first), &[("vda", Some(&old), &disk), ("vdb", Some(&old), &old)]);
    let good = std::fs::read(&tree).unwrap();
    let harm: [(&str, &dyn Fn()); 7] = [
        ("removed", &|| std::fs::remove_file(&tree).unwrap()),
        ("empty", &|| std::fs::write(&tree, b"").unwrap()),
        ("stale", &|| std::fs::write(&tree, &stale).unwrap()),
        ("of vdb", &|| {
            std::fs::copy(store.path().join("digests/vdb.tree"), &tree).unwrap();
        }),
        ("noise", &|| std::fs::write(&tree, vec![0xa5; good.len()]).unwrap()),
        ("headers flipped", &|| {
            std::fs::write(&tree, &good).unwrap();
            flip(&tree, 70);
            flip(&tree, 4096 + 70);
        }),
        ("lists gone", &|| {
            std::fs::remove_file(&tree).unwrap();
            std::fs::remove_file(second.disks[0].image.with_file_name("vda.changes")).unwrap();
        }),
    ];
    for (what, act) in harm {
        act();
        println!("{what}");
        assert_nodes(&store, "vda", &disk);
        assert_eq!(store.nodes(&DiskName::new("vda").unwrap(), 0, 0..144).unwrap(), leaves(&disk), "{what}");
    }
}

/// A node that rotted in the digest file makes the roots differ; the run fails, and the next one is well again.
#[test]
fn a_rotten_node_fails_one_run_and_no_other() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(9 * MIB, &[(0, 144)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    flip(&store.path().join("digests/vda.tree"), 8192 + 32 * 100);
    let mut new = disk.clone();
    new[101 * BLOCK_LEN] ^= 1;
    let vda = DiskName::new("vda").unwrap();
    store.begin(&begin(2, Some(first.id.clone()), &[("vda", new.len(), false)])).unwrap();
    store.apply(&vda, &patch("vda", Some(&disk), &new, false)).unwrap();
    assert_eq!(store.finish_disk(&vda).unwrap_err().kind(), Kind::Corrupt);
    store.abandon().unwrap();
    sync(&store, 3, Some(&first), &[("vda", Some(&disk), &new)]);
    assert_nodes(&store, "vda", &new);
}

/// Pieces are laid over the head's own block: if that one rotted, the head is named, not the patch.
#[test]
fn a_rotten_block_under_pieces_is_not_blamed_on_the_patch() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(MIB, &[(0, 3)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    let image = &first.disks[0].image;
    flip(image, find(image, &disk[BLOCK_LEN + 8192..][..4096]));
    let mut new = disk.clone();
    new[BLOCK_LEN + 5] ^= 1;
    store.begin(&begin(2, Some(first.id.clone()), &[("vda", MIB, false)])).unwrap();
    let e = store.apply(&DiskName::new("vda").unwrap(), &patch("vda", Some(&disk), &new, true)).unwrap_err();
    assert!(e.to_string().contains("block 1 of the head is not what was sealed"), "{e}");
    assert_eq!(e.context().point.as_deref(), Some(first.id.as_str()));
}

#[test]
fn a_replica_that_cannot_be_read_does_not_hide_the_others() {
    let lab = Lab::new();
    sync(&lab.store(), 1, None, &[("vda", None, &content(MIB, &[(0, 3)]))]);
    let other = lab.root().join("replicas/ffffffff-0000-4000-8000-000000000001");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("manifest.json"), "{").unwrap();
    assert_eq!(list(lab.root()).unwrap().len(), 1);
}

#[test]
fn a_patch_for_another_base_is_refused_and_condemns_the_point() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(MIB, &[(0, 3)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    let other = content(MIB, &[(0, 4)]);
    let vda = DiskName::new("vda").unwrap();
    let bad: [(&str, Vec<u8>); 4] = [
        ("another root", patch("vda", Some(&other), &disk, false)),
        ("from nothing", patch("vda", None, &disk, false)),
        ("another disk", patch("vdb", Some(&disk), &disk, false)),
        ("another size", patch("vda", Some(&disk), &content(2 * MIB, &[]), false)),
    ];
    for (what, patch) in bad {
        store.begin(&begin(2, Some(first.id.clone()), &[("vda", MIB, false)])).unwrap();
        let e = store.apply(&vda, &patch).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict, "{what}");
        if what == "another root" {
            assert!(
                e.to_string().contains(&root(&other).to_string()) && e.to_string().contains(&root(&disk).to_string())
            );
        }
        // The same error from every later call.
        assert_eq!(store.finish_disk(&vda).unwrap_err().to_string(), e.to_string());
        assert_eq!(store.seal(&seal(&[("vda", &disk)])).unwrap_err().to_string(), e.to_string());
        store.abandon().unwrap();
        store.abandon().unwrap();
        assert!(store.describe().unwrap().open_point.is_none());
    }
    // A block whose content is not what its digest promises.
    store.begin(&begin(2, Some(first.id.clone()), &[("vda", MIB, false)])).unwrap();
    let mut torn = patch("vda", Some(&disk), &other, false);
    let at = torn.len() - 96 - 1;
    torn[at] ^= 1;
    assert_eq!(store.apply(&vda, &torn).unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(store.describe().unwrap().points.len(), 1);
}

#[test]
fn a_seal_must_name_the_disks_and_roots_that_are_there() {
    let lab = Lab::new();
    let store = lab.store();
    let (a, b) = (content(MIB, &[(0, 3)]), content(MIB, &[(1, 3)]));
    let wrong: [&[(&str, &[u8])]; 4] = [&[("vda", &a)], &[("vda", &a), ("vda", &a)], &[("vda", &b), ("vdb", &b)], &[]];
    for disks in wrong {
        store.begin(&begin(1, None, &[("vda", MIB, false), ("vdb", MIB, false)])).unwrap();
        send(&store, "vda", None, &a);
        send(&store, "vdb", None, &b);
        store.seal(&seal(disks)).unwrap_err();
        assert!(store.describe().unwrap().points.is_empty());
    }
    store.begin(&begin(1, None, &[("vda", MIB, false), ("vdb", MIB, false)])).unwrap();
    send(&store, "vda", None, &a);
    let e = store.seal(&seal(&[("vda", &a), ("vdb", &b)])).unwrap_err();
    assert!(e.to_string().contains("not finished"), "{e}");
}

#[test]
fn one_writer_the_right_head_and_no_older_generation() {
    let lab = Lab::new();
    let (one, two) = (lab.store(), lab.store());
    let disk = content(MIB, &[(0, 3)]);
    let at = |n, head, generation| {
        let mut request = begin(n, head, &[("vda", MIB, false)]);
        request.generation = Generation(generation);
        request
    };
    one.begin(&at(1, None, 2)).unwrap();
    let e = two.begin(&at(2, None, 2)).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy);
    assert!(e.to_string().contains("0000000100000000"), "{e}");
    two.abandon().unwrap();
    assert!(one.describe().unwrap().open_point.is_some(), "somebody else's point stays");
    send(&one, "vda", None, &disk);
    let first = one.seal(&seal(&[("vda", &disk)])).unwrap();
    assert_eq!(two.describe().unwrap().generation, Generation(2));

    let e = two.begin(&at(3, Some(first.id.clone()), 1)).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.to_string().contains("generation 2"), "{e}");
    let e = two.begin(&at(3, None, 2)).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.to_string().contains(first.id.as_str()), "{e}");
    two.begin(&at(3, Some(first.id), 3)).unwrap();
    assert_eq!(one.describe().unwrap().generation, Generation(2), "a generation is recorded by a seal");
}

#[test]
fn what_a_peer_asks_for_is_bounded() {
    let lab = Lab::new();
    let store = lab.store();
    let vda = DiskName::new("vda").unwrap();
    assert_eq!(store.nodes(&vda, 0, 0..NODES_MAX + 1).unwrap_err().kind(), Kind::Usage);
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = 5..2;
    assert_eq!(store.nodes(&vda, 0, reversed).unwrap_err().kind(), Kind::Usage);
    assert_eq!(store.nodes(&vda, 255, u64::MAX - 3..u64::MAX).unwrap(), [Digest::ZERO; 3]);
    let mut request = begin(1, None, &[("vda", MIB, false)]);
    request.disks[0].size = DiskSize(u64::MAX);
    assert_eq!(store.begin(&request).unwrap_err().kind(), Kind::Usage);
    request.disks[0].size = DiskSize(1 << 40);
    request.disks[0].reserve_bytes = u64::MAX;
    assert_eq!(store.begin(&request).unwrap_err().kind(), Kind::Space);
    request.disks = (0..300)
        .map(|n| BeginDisk {
            name: DiskName::new(format!("vd{n}")).unwrap(),
            size: DiskSize(512),
            fresh: false,
            reserve_bytes: 0,
            resume: false,
            repair: false,
        })
        .collect();
    assert_eq!(store.begin(&request).unwrap_err().kind(), Kind::Usage);
    assert!(store.describe().unwrap().points.is_empty());
}

#[test]
fn a_link_in_the_place_of_our_own_is_refused() {
    let disk = content(MIB, &[(0, 3)]);
    for name in ["manifest.json", "lock", "points", "digests", "digests/vda.tree", "points/000001-00000001/vda.changes"]
    {
        let lab = Lab::new();
        let store = lab.store();
        let first = sync(&store, 1, None, &[("vda", None, &disk)]);
        let (path, moved) = (store.path().join(name), lab.root().join("elsewhere"));
        std::fs::rename(&path, &moved).unwrap();
        symlink(&moved, &path).unwrap();
        let begun = store.begin(&begin(2, Some(first.id.clone()), &[("vda", MIB, false)]));
        let verified = store.verify(&first.id, &mut |_, _| {});
        let errors: Vec<_> = [begun.err(), verified.err()].into_iter().flatten().collect();
        assert!(!errors.is_empty() && errors.iter().all(|e| e.kind() == Kind::Refused), "{name}: {errors:?}");
    }
    // The directory of the replica itself.
    let (lab, outside) = (Lab::new(), tempfile::tempdir().unwrap());
    std::fs::create_dir_all(lab.root().join("replicas")).unwrap();
    symlink(outside.path(), lab.root().join("replicas").join(UUID)).unwrap();
    let store = lab.store();
    assert_eq!(store.describe().unwrap_err().kind(), Kind::Refused);
    assert_eq!(store.begin(&begin(1, None, &[("vda", MIB, false)])).unwrap_err().kind(), Kind::Refused);
    assert!(outside.path().read_dir().unwrap().next().is_none());
}

#[test]
fn a_full_file_system_costs_the_open_point_and_nothing_else() {
    let Some(mount) = SmallFs::mount("100M") else {
        eprintln!("SKIPPED: needs the right to mount a tmpfs; run the tests as root");
        return;
    };
    let store = Store::open(mount.path(), &uuid(), now).unwrap();
    let disk = content(4 * MIB, &[(0, 64)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    let big = content(110 * MIB, &[(0, 110 * 16)]);

    // Asked for honestly, it is refused before anything is written.
    let mut request = begin(2, Some(first.id.clone()), &[("vda", big.len(), false)]);
    request.disks[0].reserve_bytes = 80 << 20;
    let free_bytes = store.describe().unwrap().free_bytes;
    assert_eq!(store.begin(&request).unwrap_err().kind(), Kind::Space);
    assert!(store.describe().unwrap().open_point.is_none());
    assert_eq!(store.describe().unwrap().free_bytes, free_bytes);
    request.disks[0].reserve_bytes = 16 << 20;
    store.begin(&request).unwrap();
    assert!(store.describe().unwrap().free_bytes + (16 << 20) <= free_bytes, "really reserved");
    store.abandon().unwrap();

    // Not asked for, it is met in the middle.
    request.disks[0].reserve_bytes = 0;
    store.begin(&request).unwrap();
    let vda = DiskName::new("vda").unwrap();
    let patch = patch("vda", Some(&disk), &big, false);
    let e = patch.chunks(MIB).find_map(|part| store.apply(&vda, part).err()).expect("more than fits");
    assert_eq!(e.kind(), Kind::Space, "{}", e.chain());
    assert_eq!(store.seal(&seal(&[("vda", &big)])).unwrap_err().kind(), Kind::Space);
    assert!(store.verify(&first.id, &mut |_, _| {}).unwrap().is_whole());
    store.abandon().unwrap();
    sync(&store, 3, Some(&first), &[("vda", Some(&disk), &disk)]);
}

#[test]
fn files_are_closed_to_others_and_sealed_against_ourselves() {
    use std::os::unix::fs::MetadataExt;
    let lab = Lab::new();
    let store = lab.store();
    let point = sync(&store, 1, None, &[("vda", None, &content(MIB, &[(0, 3)]))]);
    let dir = point.disks[0].image.parent().unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o7777, 0o400, "{:?}", entry.path());
    }
    let up: Vec<&Path> = dir.ancestors().take_while(|a| *a != lab.root()).collect();
    assert!(up.iter().all(|d| d.metadata().unwrap().mode() & 0o7777 == 0o700));
}

struct SmallFs(tempfile::TempDir);

impl SmallFs {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).status();
        status.ok()?.success().then_some(Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}
