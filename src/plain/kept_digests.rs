//! Digests in files: of an image as it is, to be carried elsewhere, and those kept of an image that only we write to.
//!
//! Both are change lists that start from nothing (docs/formats/changes.md); in front of kept ones stands a line that
//! says which file they are of, and when it was last touched.

use super::file_name;
use super::identity::Identity;
use crate::block::changes::{ChangesHeader, ChangesReader, ChangesWriter, RUN_DIGESTS_MAX};
use crate::block::digest::Digest;
use crate::block::tree::ZeroNodes;
use crate::block::{BlockIndex, FANOUT};
use crate::engine::nodefile::NodeFile;
use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Group nodes looked at at once.
const WINDOW: u64 = 4096;

/// Longest first line of kept digests.
const LINE_MAX: u64 = 16 << 10;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Of {
    kept: u32,
    path: PathBuf,
    identity: Identity,
}

const VERSION: u32 = 1;

/// The image that kept digests are of, and how it was then, by their first line; `None` if it is no such line.
pub fn image_of_line(line: &[u8]) -> Option<(PathBuf, Identity)> {
    let of: Of = serde_json::from_slice(line).ok()?;
    (of.kept == VERSION).then_some((of.path, of.identity))
}

/// Writes every digest that is not zero.
pub fn write(nodes: &NodeFile, root: Digest, out: impl Write) -> Result<()> {
    let size = nodes.size();
    let mut list = ChangesWriter::new(out, &ChangesHeader { size, from_root: None })?;
    let groups = size.groups();
    let mut window = 0;
    while window < groups {
        let end = groups.min(window + WINDOW);
        let of_groups = nodes.nodes(1, window..end)?;
        for (group, _) in (window..).zip(of_groups).filter(|(_, digest)| !digest.is_zero()) {
            let blocks = group * FANOUT as u64..((group + 1) * FANOUT as u64).min(size.blocks());
            let digests = nodes.nodes(0, blocks.clone())?;
            for (block, digest) in blocks.zip(digests).filter(|(_, digest)| !digest.is_zero()) {
                list.push(BlockIndex(block), digest)?;
            }
        }
        window = end;
    }
    list.finish(root).map(drop)
}

/// Reads what [`write()`] wrote. `Corrupt` if it is anything else: of a point with one before it, cut, or damaged.
pub fn read(input: impl Read) -> Result<(NodeFile, Digest)> {
    let mut list = ChangesReader::new(input)?;
    let header = *list.header();
    if header.from_root.is_some() {
        return Err(Error::new(Kind::Usage, "this is the change list of a point, not the digests of an image"));
    }
    if header.size.0 > i64::MAX as u64 {
        return Err(Error::new(Kind::Corrupt, "the digests are of an image that is larger than any file"));
    }
    let nodes = NodeFile::temporary(header.size)?;
    let root = nodes.apply(ZeroNodes, list.by_ref())?;
    let trailer = list.into_trailer()?;
    match root == trailer.to_root {
        true => Ok((nodes, root)),
        false => Err(Error::new(Kind::Corrupt, format!("the digests have root {root}, and say {}", trailer.to_root))),
    }
}

const _: () = assert!(RUN_DIGESTS_MAX >= FANOUT);

fn path_in(dir: &Path, image: &Path) -> Result<PathBuf> {
    let hash = blake3::hash(image.as_os_str().as_encoded_bytes()).to_hex();
    Ok(dir.join(format!("{}-{}.digests", file_name(image)?, &hash[..16])))
}

/// Keeps the digests of the image at `image`, as it is while it has this identity. Durable when it returns.
pub fn save(dir: &Path, image: &Path, identity: Identity, nodes: &NodeFile, root: Digest) -> Result<()> {
    let path = path_in(dir, image)?;
    let cannot = |e| Error::io("cannot keep the digests", &path, e);
    fs::create_dir_all(dir).map_err(cannot)?;
    let part = tempfile::NamedTempFile::new_in(dir).map_err(cannot)?;
    let mut out = BufWriter::with_capacity(1 << 20, part.as_file());
    let of = Of { kept: VERSION, path: image.to_owned(), identity };
    writeln!(out, "{}", serde_json::to_string(&of).expect("paths and numbers")).map_err(cannot)?;
    write(nodes, root, &mut out).map_err(|e| e.path(&path))?;
    out.flush().and_then(|()| out.get_ref().sync_all()).map_err(cannot)?;
    drop(out);
    part.persist(&path).map_err(|e| cannot(e.error))?;
    crate::plain::beside::sync_dir(dir)
}

/// The kept digests of an image that has this identity now; or why there are none that can be believed.
pub fn load(dir: &Path, image: &Path, identity: Identity) -> Result<Result<(NodeFile, Digest), String>> {
    let path = path_in(dir, image)?;
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Err("there are none yet".to_owned())),
        Err(e) => return Err(Error::io("cannot read the kept digests", &path, e)),
    };
    let mut input = BufReader::with_capacity(1 << 20, file);
    let mut line = Vec::new();
    let read_line = (&mut input).take(LINE_MAX).read_until(b'\n', &mut line);
    read_line.map_err(|e| Error::io("cannot read the kept digests", &path, e))?;
    match serde_json::from_slice::<Of>(&line) {
        Ok(of) if of.kept == VERSION && of.path == image && of.identity.is(&identity) => {}
        Ok(of) if of.path == image => return Ok(Err("the image was touched since they were made".to_owned())),
        _ => return Ok(Err("they are of another image".to_owned())),
    }
    Ok(read(input).map_err(|e| format!("they are damaged ({})", e.chain())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::changes::Run;
    use crate::block::{BLOCK_LEN, DiskSize};
    use crate::file_id::FileId;
    use std::os::unix::fs::FileExt;

    fn tree(size: u64, content: &[(u64, u8)]) -> (NodeFile, Digest) {
        let nodes = NodeFile::temporary(DiskSize(size)).unwrap();
        let runs =
            content.iter().map(|(b, n)| Ok(Run::Digests { first: BlockIndex(*b), digests: vec![Digest([*n; 32])] }));
        let root = nodes.apply(ZeroNodes, runs).unwrap();
        (nodes, root)
    }

    #[test]
    fn what_was_written_is_read_and_costs_what_is_in_it() {
        let far = (1u64 << 44) / BLOCK_LEN as u64 - 1;
        for (size, content) in [(0, vec![]), (1, vec![(0, 3)]), (1 << 44, vec![(0, 1), (1, 2), (64, 1), (far, 9)])] {
            let (nodes, root) = tree(size, &content);
            let mut bytes = Vec::new();
            write(&nodes, root, &mut bytes).unwrap();
            assert!(bytes.len() < 1000, "{}", bytes.len());
            let (again, same) = read(bytes.as_slice()).unwrap();
            assert_eq!((same, again.size()), (root, DiskSize(size)));
            for (block, n) in content {
                assert_eq!(again.nodes(0, block..block + 1).unwrap(), [Digest([n; 32])]);
            }
            let cut = &bytes[..bytes.len() - 1];
            assert_eq!(read(cut).err().unwrap().kind(), Kind::Corrupt);
        }
    }

    /// The same line stands in docs/formats/redo.md.
    #[test]
    fn the_first_line_is_what_the_format_says() {
        let id = FileId { device: 1, inode: 2, born: None, boot: None };
        let identity = Identity { id, len_bytes: 3, modified: (4, 5), changed: (6, 7) };
        // As earlier versions wrote it.
        let line = r#"{"kept":1,"path":"/srv/a.raw","identity":{"device":1,"inode":2,"len_bytes":3,"modified":[4,5],"changed":[6,7]}}"#;
        let of = Of { kept: VERSION, path: "/srv/a.raw".into(), identity };
        assert_eq!(serde_json::to_string(&of).unwrap(), line);
        assert_eq!(serde_json::from_str::<Of>(line).unwrap(), of);
        let line = line.replace(r#""len"#, r#""born":[8,9],"boot":"0b5c8d4e-1f2a-4b3c-8d4e-5f6a7b8c9d0e","len"#);
        let of = serde_json::from_str::<Of>(&line).unwrap();
        assert_eq!((of.identity.id.born, of.identity.is(&identity)), (Some((8, 9)), true));
        assert_eq!(serde_json::to_string(&of).unwrap(), line);
    }

    #[test]
    fn digests_are_believed_of_the_file_they_were_made_of_only() {
        let dir = tempfile::tempdir().unwrap();
        let (image, kept) = (dir.path().join("a.raw"), dir.path().join("digests"));
        fs::write(&image, [1; 100]).unwrap();
        let (nodes, root) = tree(100, &[(0, 7)]);
        let seen = Identity::settled(&image).unwrap().unwrap();
        assert_eq!(load(&kept, &image, seen).unwrap().err().unwrap(), "there are none yet");
        save(&kept, &image, seen, &nodes, root).unwrap();
        assert_eq!(load(&kept, &image, Identity::of(&image).unwrap()).unwrap().unwrap().1, root);
        let other = dir.path().join("b").join("a.raw");
        assert_eq!(load(&kept, &other, seen).unwrap().err().unwrap(), "there are none yet");
        File::options().write(true).open(&image).unwrap().write_all_at(&[2], 5).unwrap();
        let why = load(&kept, &image, Identity::of(&image).unwrap()).unwrap().err().unwrap();
        assert_eq!(why, "the image was touched since they were made");
        let file = fs::read_dir(&kept).unwrap().next().unwrap().unwrap().path();
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(load(&kept, &image, seen).unwrap().err().unwrap().starts_with("they are damaged"));
    }
}
