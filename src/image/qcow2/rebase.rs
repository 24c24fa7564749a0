//! Writing another backing image into the header of an image of our own store, and nothing else.
//!
//! First the new name, where nothing is, durably; then one write within the first sector, which makes it the name.
//! Before that the image reads through the old backing image, after it through the new one, and a power cut leaves one
//! of the two. The caller answers for it that the guest's data is the same through both.

use super::super::Format;
use super::{check_own_name, open_own};
use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The header, its extensions and the name lie in the first cluster.
const FIRST_CLUSTER_LEN: usize = super::CLUSTER_LEN;

/// Where the header says where the name of the backing image lies (8 bytes) and how long it is (4 bytes).
const NAME_AT: u64 = 8;
/// Length of the header without its extensions.
const HEADER_LEN_AT: usize = 100;

/// The name takes turns between two places of this length behind the extensions.
const PLACE_LEN: usize = 1024;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;

/// Makes the image at `path` name `backing` as its backing image, of format qcow2; `None`: it has none. Durable when it
/// returns. For images of our own store only, which have a backing image already; nobody may have it open.
pub fn rebase(path: &Path, backing: Option<&str>) -> Result<()> {
    let (file, header) = open_own(path)?;
    let Some(old) = header.backing else {
        return match backing {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::Usage, "the image has no backing image to be replaced").path(path)),
        };
    };
    if backing == Some(old.as_str()) {
        return Ok(());
    }
    let failed = |e| Error::io("cannot write the header of the image", path, e);
    // Without a name the record of its format means nothing, and may stay.
    let mut name_at = [0u8; 12];
    if let Some(name) = backing {
        check_own_name(name).map_err(|e| e.path(path))?;
        let mut cluster = vec![0u8; FIRST_CLUSTER_LEN];
        file.read_exact_at(&mut cluster, 0).map_err(|e| Error::io("cannot read the header of the image", path, e))?;
        let place = free_place(&cluster, name.len()).map_err(|e| e.path(path))?;
        file.write_all_at(name.as_bytes(), place as u64).and_then(|()| file.sync_all()).map_err(failed)?;
        name_at[..8].copy_from_slice(&(place as u64).to_be_bytes());
        name_at[8..].copy_from_slice(&(name.len() as u32).to_be_bytes());
    }
    file.write_all_at(&name_at, NAME_AT).and_then(|()| file.sync_all()).map_err(failed)?;
    check(&file, path, backing)
}

/// Where a new name may be written without harm to the present one.
fn free_place(cluster: &[u8], name_len: usize) -> Result<usize> {
    let beyond = || Error::new(Kind::Refused, "the image's header is not as our store writes it");
    let word = |at: usize| {
        cluster.get(at..at + 4).map(|b| u32::from_be_bytes(b.try_into().expect("four bytes"))).ok_or_else(beyond)
    };
    let mut at = word(HEADER_LEN_AT)? as usize;
    let mut format_recorded = false;
    loop {
        let (kind, len) = (word(at)?, word(at + 4)? as usize);
        if kind == EXT_BACKING_FORMAT {
            let body = cluster.get(at + 8..at + 8 + len).ok_or_else(beyond)?;
            format_recorded = body == Format::Qcow2.as_str().as_bytes();
        }
        at += 8 + len.next_multiple_of(8);
        if kind == EXT_END {
            break;
        }
    }
    let taken_at = NAME_AT as usize + 4;
    let taken = word(taken_at)? as usize..word(taken_at)? as usize + word(taken_at + 4)? as usize;
    let place = [at, at + PLACE_LEN].into_iter().find(|p| p + PLACE_LEN <= taken.start || *p >= taken.end);
    let place = place.filter(|p| format_recorded && name_len <= PLACE_LEN && p + PLACE_LEN <= cluster.len());
    place.ok_or_else(beyond)
}

/// Reads it again as anybody would.
fn check(file: &File, path: &Path, backing: Option<&str>) -> Result<()> {
    let header = super::Header::read(file, path)?;
    let as_asked = header.backing.as_deref() == backing
        && (backing.is_none() || header.backing_format.as_deref() == Some(Format::Qcow2.as_str()));
    match as_asked {
        true => Ok(()),
        false => Err(Error::new(Kind::Corrupt, "the image names another backing image than was written").path(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BLOCK_LEN, DiskSize};
    use crate::image::qcow2::{Qcow2Image, create, open_write_over, own_chain};
    use crate::image::{Chain, Image, ImageMut, Layer};
    use std::path::PathBuf;

    const SIZE: DiskSize = DiskSize(4 * BLOCK_LEN as u64);

    fn image(dir: &Path, name: &str, backing: Option<&str>, fill: &[(u64, u8)]) -> PathBuf {
        let path = dir.join(name);
        let writer = create(&path, SIZE, backing.map(|b| (b, Format::Qcow2))).unwrap();
        for (block, byte) in fill {
            writer.write_at(block * BLOCK_LEN as u64, &vec![*byte; BLOCK_LEN]).unwrap();
        }
        writer.sync().unwrap();
        path
    }

    fn blocks(path: &Path) -> Vec<u8> {
        let image = Qcow2Image::open(&own_chain(path).unwrap()).unwrap();
        let byte = |block: u64| {
            let mut byte = [0];
            image.read_at(block * BLOCK_LEN as u64, &mut byte).unwrap();
            byte[0]
        };
        (0..4).map(byte).collect()
    }

    fn qemu_img(args: &[&str]) {
        let done = std::process::Command::new("qemu-img").args(args).output().unwrap();
        assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    #[test]
    fn an_image_reads_through_the_backing_image_it_was_given() {
        let t = tempfile::tempdir().unwrap();
        image(t.path(), "a.qcow2", None, &[(0, 1), (1, 1)]);
        image(t.path(), "b.qcow2", Some("a.qcow2"), &[(1, 2), (2, 2)]);
        let c = image(t.path(), "c.qcow2", Some("b.qcow2"), &[(3, 3)]);
        assert_eq!(blocks(&c), [1, 2, 2, 3]);
        // Another length of name, longer and shorter.
        std::fs::rename(t.path().join("a.qcow2"), t.path().join("a-with-a-longer-name.qcow2")).unwrap();
        for (name, expected) in [("a-with-a-longer-name.qcow2", [1, 1, 0, 3]), ("b.qcow2", [0, 2, 2, 3])] {
            if name == "b.qcow2" {
                rebase(&t.path().join(name), None).unwrap();
            }
            rebase(&c, Some(name)).unwrap();
            rebase(&c, Some(name)).unwrap();
            assert_eq!(blocks(&c), expected);
            qemu_img(&["check", "-q", "-f", "qcow2", c.to_str().unwrap()]);
        }
        rebase(&c, None).unwrap();
        rebase(&c, None).unwrap();
        assert_eq!(blocks(&c), [0, 0, 0, 3]);
        qemu_img(&["check", "-q", "-f", "qcow2", c.to_str().unwrap()]);
        assert_eq!(rebase(&c, Some("b.qcow2")).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn what_qemu_made_is_rebased_as_well_and_names_that_climb_are_refused() {
        let t = tempfile::tempdir().unwrap();
        image(t.path(), "a.qcow2", None, &[(0, 1)]);
        let b = t.path().join("b.qcow2");
        let path = b.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "none.qcow2", "-u", path, "256K"]);
        assert_eq!(rebase(&b, Some("/etc/hostname")).unwrap_err().kind(), Kind::Refused);
        rebase(&b, Some("a.qcow2")).unwrap();
        assert_eq!(blocks(&b), [1, 0, 0, 0]);
        qemu_img(&["info", "--backing-chain", path]);
    }

    #[test]
    fn an_image_is_written_over_what_will_lie_below_it() {
        let t = tempfile::tempdir().unwrap();
        let a = image(t.path(), "a.qcow2", None, &[(0, 1), (1, 1)]);
        let b = image(t.path(), "b.qcow2", Some("a.qcow2"), &[]);
        // Through b's own backing image these are zero; through a they are not, and have to be hidden.
        image(t.path(), "b.qcow2.below", None, &[]);
        let layer =
            |path: &Path| Layer { path: path.into(), format: Format::Qcow2, block_device: false, data_file: None };
        let c = image(t.path(), "c.qcow2", Some("b.qcow2.below"), &[(2, 3)]);
        let writer = open_write_over(&c, &[layer(&b), layer(&a)]).unwrap();
        writer.zero(crate::block::ByteRange::new(0, 2 * BLOCK_LEN as u64)).unwrap();
        writer.sync_data().unwrap();
        writer.sync().unwrap();
        drop(writer);
        rebase(&c, Some("b.qcow2")).unwrap();
        assert_eq!(blocks(&c), [0, 0, 3, 0]);
        let chain = Chain(vec![layer(&c), layer(&b), layer(&a)]);
        assert_eq!(own_chain(&c).unwrap(), chain);
        qemu_img(&["check", "-q", "-f", "qcow2", c.to_str().unwrap()]);
    }
}
