//! Recovering without this program: what docs/formats/replica.md says is done, word by word, with qemu-img alone, for
//! every point of a replica with a history: also while removed points are only half folded.

use super::support::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use virt_replica::block::BLOCK_LEN;
use virt_replica::name::{DiskName, PointId};
use virt_replica::replica::upkeep::Upkeep;
use virt_replica::replica::{Attachment, Replica};

/// The commands of the page, in its order.
fn commands_of_the_page() -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/formats/replica.md");
    let page = std::fs::read_to_string(page).unwrap();
    let section = page.split("## Recovering a point without this program").nth(1).expect("the section");
    let section = section.split("\n## ").next().unwrap();
    let block = section.split("```").nth(1).expect("commands");
    let line = |l: &str| l.split('#').next().unwrap().trim().to_owned();
    block.lines().map(line).filter(|l| !l.is_empty()).collect()
}

/// Does what the page says for one disk of one point; gives the raw copy and the throw-away overlay.
fn recover(root: &Path, point: &str, disk: &str, place: &Path) -> (PathBuf, PathBuf) {
    let commands = commands_of_the_page();
    assert_eq!(commands.len(), 3, "{commands:?}");
    let script: Vec<String> = commands
        .iter()
        .map(|command| {
            command
                // First what is in the page: a path that was put in may end with a P, too.
                .replace("P/", &format!("{point}/"))
                .replace("vda", disk)
                .replace("UUID", UUID)
                .replace("/new/place", place.to_str().unwrap())
                .replace("ROOT/", &format!("{}/", root.display()))
        })
        .collect();
    let done = Command::new("sh").args(["-ec", &script.join("\n")]).output().unwrap();
    assert!(done.status.success(), "{script:?}: {}", String::from_utf8_lossy(&done.stderr));
    (place.join(format!("{disk}.raw")), place.join(format!("{disk}.qcow2")))
}

/// Every disk of every point of the manifest, by the page alone.
fn recover_everything(root: &Path, expected: &BTreeMap<(String, String), Vec<u8>>, what: &str) {
    let replica = root.join("replicas").join(UUID);
    let manifest: Value = serde_json::from_slice(&std::fs::read(replica.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["format"], "virt-replica manifest");
    let mut seen = 0;
    for point in manifest["points"].as_array().unwrap() {
        let id = point["id"].as_str().unwrap();
        for disk in point["disks"].as_array().unwrap() {
            let name = disk["name"].as_str().unwrap();
            let place = tempfile::tempdir().unwrap();
            let (raw, overlay) = recover(root, id, name, place.path());
            // "Cut the copy to `size`."
            let size = disk["size"].as_u64().unwrap();
            std::fs::File::options().write(true).open(&raw).unwrap().set_len(size).unwrap();
            let content = &expected[&(id.to_owned(), name.to_owned())];
            assert!(std::fs::read(&raw).unwrap() == *content, "{what}: {name} of {id}");
            // What is booted is written, and the point stays as it is.
            qemu_img(&["check", "-q", "-f", "qcow2", overlay.to_str().unwrap()]);
            let written = Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", "write -P 7 0 512", overlay.to_str().unwrap()])
                .output()
                .unwrap();
            assert!(written.status.success(), "{written:?}");
            let (again, _) = {
                let place = tempfile::tempdir().unwrap();
                let (raw, overlay) = recover(root, id, name, place.path());
                (std::fs::read(raw).unwrap(), overlay)
            };
            assert!(again[..content.len()] == **content, "{what}: {name} of {id} was changed by a boot");
            seen += 1;
        }
        for attachment in point["attachments"].as_array().unwrap() {
            let file = match attachment["name"].as_str().unwrap() {
                "inactive_xml" => "domain.xml",
                other => panic!("unexpected {other}"),
            };
            let content = std::fs::read(replica.join("points").join(id).join(file)).unwrap();
            assert_eq!(attachment["blake3"], blake3::hash(&content).to_string());
        }
    }
    assert_eq!(seen, expected.len(), "{what}");
}

#[test]
fn every_point_is_recovered_by_the_page_alone() {
    let lab = Lab::new();
    let store = lab.store();
    let mut expected = BTreeMap::new();
    // Sizes that are no multiples of a sector, too; a disk that grows; one that comes later and starts afresh.
    let mut vda = content(20 * BLOCK_LEN + 700, &[(0, 12), (18, 2)]);
    let mut vdb: Option<Vec<u8>> = None;
    let mut rng = Rng(seed());
    println!("REPLICA_SEED={}", rng.0);
    for n in 1..=6u64 {
        let head = store.describe().unwrap().head().map(|h| h.id.clone());
        let (old_a, old_b) = (vda.clone(), vdb.clone());
        if n == 4 {
            vda.resize(24 * BLOCK_LEN + 100, 0);
        }
        scribble(&mut rng, &mut vda);
        if n >= 3 {
            let mut new = old_b.clone().unwrap_or_else(|| content(9 * BLOCK_LEN, &[(0, 5)]));
            scribble(&mut rng, &mut new);
            vdb = Some(new);
        }
        let fresh_b = n == 5;
        let mut disks = vec![("vda", vda.len(), false)];
        disks.extend(vdb.as_ref().map(|b| ("vdb", b.len(), fresh_b)));
        store.begin(&begin(n, head, &disks)).unwrap();
        send(&store, "vda", (n > 1).then_some(&old_a[..]), &vda);
        if let Some(new) = &vdb {
            send(&store, "vdb", old_b.as_deref().filter(|_| !fresh_b), new);
        }
        store.attach(Attachment::InactiveXml, format!("<domain>{n}</domain>").as_bytes()).unwrap();
        let mut sealed = vec![("vda", &vda[..])];
        sealed.extend(vdb.as_ref().map(|b| ("vdb", &b[..])));
        let point = store.seal(&seal(&sealed)).unwrap();
        expected.insert((point.id.to_string(), "vda".to_owned()), vda.clone());
        expected.extend(vdb.clone().map(|b| ((point.id.to_string(), "vdb".to_owned()), b)));
    }
    recover_everything(lab.root(), &expected, "six points");

    // Removed, and kept from being folded by a reader: the links are read through.
    let points: Vec<PointId> = store.describe().unwrap().points.into_iter().map(|p| p.id).collect();
    let stream = store.export(&points[5], &DiskName::new("vda").unwrap()).unwrap();
    let report = store.prune(&[points[1].clone(), points[3].clone()], &mut |_, _| {}).unwrap();
    assert_eq!((report.removed.len(), report.folded.len()), (2, 0));
    expected.retain(|(id, _), _| *id != *points[1].as_str() && *id != *points[3].as_str());
    recover_everything(lab.root(), &expected, "two are links");
    stream.close().unwrap();
    assert_eq!(store.prune(&[], &mut |_, _| {}).unwrap().folded.len(), 2);
    recover_everything(lab.root(), &expected, "folded");
}
