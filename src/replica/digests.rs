//! The head's digests of one disk in a sparse file, so that comparing reads neither the replica nor its whole tree.
//!
//! Two header slots, then the levels of the digest tree one after another; a zero digest is a hole. The file is a
//! cache: it says which point it belongs to and that point's root, and whoever opens it says which it wants. Anything
//! else is [`Opened::Unusable`], to be rebuilt from the change lists, never trusted.
//!
//! An update in place is: slot *updating to P*, fsync; nodes; fsync; slot *clean at P*, fsync. The slots alternate, so
//! a torn one leaves the other. A crash leaves *clean at the old point* or *updating to P*, and the update may be done
//! over from either, because applying a change list twice is applying it once.
//!
//! Format: docs/formats/replica.md. Crash order: docs/replication.md, step 6e.

use super::files::Dir;
use super::manifest::{DISK_SIZE_MAX, digests_file};
use crate::block::DiskSize;
use crate::block::changes::Run;
use crate::block::digest::Digest;
use crate::block::tree::{NodeSource, ZeroNodes};
use crate::engine::nodefile::{LEVELS_START, NodeFile};
use crate::error::{Error, Kind, Result};
use crate::name::{DiskName, PointId};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

const MAGIC: [u8; 8] = *b"VREPTREE";
const VERSION: u32 = 1;

/// Slot 0 at byte 0, slot 1 at [`SLOT_STRIDE`]: sectors, and on any disk blocks, of their own.
const SLOT_STRIDE: u64 = 4096;
const SLOT_LEN: usize = 128;

/// The slots fill what stands before the levels.
const _: () = assert!(LEVELS_START == 2 * SLOT_STRIDE);

/// The point a digest file belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The point whose disk the digests are of.
    pub point: PointId,
    /// Size of the disk at that point, in bytes.
    pub size: DiskSize,
    /// Root of the disk's digest tree at that point.
    pub root: Digest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Clean = 0,
    /// Nodes may be of the point before or of this one.
    Updating = 1,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    sequence: u64,
    state: State,
    binding: Binding,
}

/// An open digest file, bound to a point. Reads need no lock of ours; one writer at a time, by the replica's lock.
#[derive(Debug)]
pub struct DigestFile {
    nodes: NodeFile,
    slot: Slot,
}

/// What was found in the place of a digest file.
pub enum Opened {
    /// Clean, and of the point asked for.
    Ready(DigestFile),
    /// Clean at the point below the one asked for, or being updated to it: applying that point's changes mends it.
    Behind(DigestFile),
    /// Nothing to build on; the words say why.
    Unusable(String),
}

impl DigestFile {
    /// Opens the file of `disk` in `dir` and compares it with the point it should be bound to; `below` is the point
    /// under that one on which its image lies.
    pub fn open(dir: &Dir, disk: &DiskName, wanted: &Binding, below: Option<&Binding>) -> Result<Opened> {
        let name = digests_file(disk);
        let Some(file) = dir.open_mut(&name)? else { return Ok(Opened::Unusable("there is none".into())) };
        let path = dir.join(&name);
        let Some(slot) = read_slot(&file).map_err(|e| Error::io("cannot read the digest file", &path, e))? else {
            return Ok(Opened::Unusable("neither of its headers can be read".into()));
        };
        let (state, binding) = (slot.state, slot.binding.clone());
        let this = Self { nodes: NodeFile::over(file, path, slot.binding.size), slot };
        Ok(match state {
            State::Clean if binding == *wanted => Opened::Ready(this),
            State::Updating if binding == *wanted => Opened::Behind(this),
            State::Clean if below == Some(&binding) && binding.size == wanted.size => Opened::Behind(this),
            State::Clean => Opened::Unusable(format!("it belongs to point {}", binding.point)),
            State::Updating => Opened::Unusable(format!("it was being updated to point {}", binding.point)),
        })
    }

    /// Builds the file of `disk` anew from everything that is not zero at the point, in ascending order, and puts it in
    /// place by rename if the root comes out as the binding says: [`Kind::Corrupt`] if not.
    pub fn rebuild(
        dir: &Dir,
        disk: &DiskName,
        binding: &Binding,
        blocks: impl Iterator<Item = Result<Run>>,
    ) -> Result<DigestFile> {
        let name = digests_file(disk);
        let temporary = format!("{name}.new");
        dir.remove_all(&temporary)?;
        let file = dir.create(&temporary)?;
        let slot = Slot { sequence: 1, state: State::Clean, binding: binding.clone() };
        let this = Self { nodes: NodeFile::create(file, dir.join(&name), binding.size)?, slot };
        this.apply(ZeroNodes, binding, blocks)?;
        this.write_slot()?;
        this.sync()?;
        dir.rename(&temporary, &name)?;
        dir.sync()?;
        Ok(this)
    }

    /// Carries the file to `to` by that point's own changes, in ascending order. [`Kind::Corrupt`] if the root does not
    /// come out as `to` says; the file is then marked as being updated and has to be rebuilt.
    pub fn update(&mut self, to: &Binding, changes: impl Iterator<Item = Result<Run>>) -> Result<()> {
        debug_assert_eq!(self.nodes.size(), to.size, "a resized disk is rebuilt");
        self.mark(State::Updating, to)?;
        crate::failpoint!("6e.marked");
        self.apply(&self.nodes, to, changes)?;
        self.sync()?;
        crate::failpoint!("6e.applied");
        self.mark(State::Clean, to)
    }

    pub fn size(&self) -> DiskSize {
        self.slot.binding.size
    }

    /// Root of the point it is bound to.
    pub fn root(&self) -> Digest {
        self.slot.binding.root
    }

    /// Whether nobody began an update since it was opened: for those who read without the lock, after reading.
    pub fn is_as_opened(&self) -> Result<bool> {
        Ok(read_slot(self.nodes.file()).map_err(|e| self.io("cannot read", e))?.as_ref() == Some(&self.slot))
    }

    /// Takes both headers away, so that the next to open it makes it anew. Somebody has found it wrong.
    pub fn condemn(&self) {
        let nothing = [0; SLOT_LEN];
        let outcome = self
            .nodes
            .file()
            .write_all_at(&nothing, 0)
            .and_then(|()| self.nodes.file().write_all_at(&nothing, SLOT_STRIDE));
        if let Err(e) = outcome {
            tracing::warn!(path = %self.nodes.path().display(), error = %e, "cannot condemn the digest file");
        }
    }

    /// Nodes of the tree; zero beyond its shape.
    pub fn nodes(&self, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        self.nodes.nodes(level, range)
    }

    fn apply(&self, old: impl NodeSource, to: &Binding, changes: impl Iterator<Item = Result<Run>>) -> Result<()> {
        let root = self.nodes.apply(old, changes)?;
        if root != to.root {
            return Err(Error::new(Kind::Corrupt, format!("the change lists lead to root {root}, not to {}", to.root))
                .point(&to.point));
        }
        Ok(())
    }
}

impl DigestFile {
    /// Writes the next state into the slot that does not hold the present one, durably.
    fn mark(&mut self, state: State, binding: &Binding) -> Result<()> {
        self.slot = Slot { sequence: self.slot.sequence + 1, state, binding: binding.clone() };
        self.write_slot()?;
        self.sync()
    }

    fn write_slot(&self) -> Result<()> {
        let place = self.slot.sequence % 2 * SLOT_STRIDE;
        self.nodes.file().write_all_at(&self.slot.encode(), place).map_err(|e| self.io("cannot write", e))
    }

    fn sync(&self) -> Result<()> {
        self.nodes.file().sync_all().map_err(|e| self.io("cannot sync", e))
    }

    fn io(&self, verb: &str, e: std::io::Error) -> Error {
        self.nodes.io(verb, e)
    }
}

/// The newer of the slots that are whole.
fn read_slot(file: &File) -> std::io::Result<Option<Slot>> {
    Ok(read_slots(file)?.into_iter().flatten().max_by_key(|s| s.sequence))
}

/// Both slots; `None` in the place of one that is not whole.
fn read_slots(file: &File) -> std::io::Result<[Option<Slot>; 2]> {
    let mut slots = [None, None];
    for (place, slot) in (0..).zip(&mut slots) {
        let mut bytes = [0; SLOT_LEN];
        match file.read_exact_at(&mut bytes, place * SLOT_STRIDE) {
            Ok(()) => *slot = Slot::decode(&bytes),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(e),
        }
    }
    Ok(slots)
}

/// A header of a digest file, for a look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSeen {
    /// The one with the higher number counts.
    pub sequence: u64,
    /// An update was begun: nodes may be of the point before or of this one.
    pub updating: bool,
    /// What the digests of this slot are of.
    pub binding: Binding,
}

/// Whether a file begins as one of its slots does.
pub(super) fn is_one(file: &File) -> std::io::Result<bool> {
    for place in 0..2 {
        let mut bytes = [0; MAGIC.len()];
        match file.read_exact_at(&mut bytes, place * SLOT_STRIDE) {
            Ok(()) if bytes == MAGIC => return Ok(true),
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(e),
        }
    }
    Ok(false)
}

/// Both headers of a digest file, whoever's it is.
pub(super) fn look(file: &File) -> std::io::Result<[Option<SlotSeen>; 2]> {
    let seen = |slot: Slot| SlotSeen {
        sequence: slot.sequence,
        updating: slot.state == State::Updating,
        binding: slot.binding,
    };
    Ok(read_slots(file)?.map(|slot| slot.map(seen)))
}

impl Slot {
    fn encode(&self) -> [u8; SLOT_LEN] {
        let mut bytes = [0; SLOT_LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.state as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.binding.size.0.to_le_bytes());
        let id = self.binding.point.as_str().as_bytes();
        bytes[32..32 + id.len()].copy_from_slice(id);
        bytes[64..96].copy_from_slice(&self.binding.root.0);
        let check = blake3::hash(&bytes[..96]);
        bytes[96..].copy_from_slice(check.as_bytes());
        bytes
    }

    /// `None` for anything that this version did not write whole.
    fn decode(bytes: &[u8; SLOT_LEN]) -> Option<Slot> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let whole =
            bytes[..8] == MAGIC && u32_at(8) == VERSION && blake3::hash(&bytes[..96]).as_bytes()[..] == bytes[96..];
        let state = match u32_at(12) {
            0 => State::Clean,
            1 => State::Updating,
            _ => return None,
        };
        let id = bytes[32..64].split(|b| *b == 0).next()?;
        let point = PointId::new(std::str::from_utf8(id).ok()?).ok()?;
        let root = Digest(bytes[64..96].try_into().expect("32 bytes"));
        let binding = Binding { point, size: DiskSize(u64_at(24)), root };
        (whole && binding.size.0 <= DISK_SIZE_MAX).then_some(Slot { sequence: u64_at(16), state, binding })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockIndex;
    use crate::block::digest::block_digest;
    use crate::block::tree::RootBuilder;
    use crate::engine::nodefile::Pending;
    use crate::name::RunId;
    use std::os::unix::fs::MetadataExt;

    const BLOCKS: u64 = 200;
    const SIZE: DiskSize = DiskSize(BLOCKS << 16);

    fn vda() -> DiskName {
        DiskName::new("vda").unwrap()
    }

    fn temp() -> (tempfile::TempDir, Dir) {
        let t = tempfile::tempdir().unwrap();
        let d = Dir::open_root(t.path()).unwrap().unwrap();
        (t, d)
    }

    /// `"3a 70b"`: block 3 has content a, block 70 content b; `-` is zero.
    fn runs(text: &str) -> Vec<Result<Run>> {
        let one = |item: &str| {
            let (block, kind) = item.split_at(item.len() - 1);
            let first = BlockIndex(block.parse().unwrap());
            match kind {
                "-" => Ok(Run::Zero { first, count: 1 }),
                _ => Ok(Run::Digests { first, digests: vec![block_digest(kind.as_bytes())] }),
            }
        };
        text.split_whitespace().map(one).collect()
    }

    fn binding(seq: u64, content: &str) -> Binding {
        let mut root = RootBuilder::new(SIZE);
        for run in runs(content) {
            if let Run::Digests { first, digests } = run.unwrap() {
                root.push_block(first, digests[0]);
            }
        }
        Binding { point: PointId::from_parts(seq, &RunId::from_bits(seq)), size: SIZE, root: root.finish() }
    }

    const ONE: &str = "3a 70b 71c 199d";
    const CHANGES: &str = "3x 70- 130y";
    const TWO: &str = "3x 71c 130y 199d";

    fn built(dir: &Dir, seq: u64, content: &str) -> DigestFile {
        DigestFile::rebuild(dir, &vda(), &binding(seq, content), runs(content).into_iter()).unwrap()
    }

    fn open(dir: &Dir) -> Opened {
        DigestFile::open(dir, &vda(), &binding(2, TWO), Some(&binding(1, ONE))).unwrap()
    }

    fn all_nodes(file: &DigestFile) -> Vec<Vec<Digest>> {
        (0..4).map(|level| file.nodes(level, 0..BLOCKS + 3).unwrap()).collect()
    }

    #[test]
    fn an_update_equals_a_rebuild() {
        let (_t, dir) = temp();
        let expected = all_nodes(&built(&dir, 2, TWO));
        assert!(matches!(open(&dir), Opened::Ready(_)));
        built(&dir, 1, ONE);
        let Opened::Behind(mut file) = open(&dir) else { panic!("clean at the point below") };
        file.update(&binding(2, TWO), runs(CHANGES).into_iter()).unwrap();
        assert_eq!(all_nodes(&file), expected);
        let Opened::Ready(again) = open(&dir) else { panic!("updated") };
        assert_eq!(all_nodes(&again), expected);
    }

    /// Cut off after any number of nodes, an update is done over and comes out the same.
    #[test]
    fn an_update_may_be_done_over() {
        let (_t, dir) = temp();
        let expected = all_nodes(&built(&dir, 2, TWO));
        for done in 0..4 {
            let mut file = built(&dir, 1, ONE);
            file.mark(State::Updating, &binding(2, TWO)).unwrap();
            let cut = runs(CHANGES).into_iter().take(done).chain([Err(Error::new(Kind::Interrupted, "cut off"))]);
            file.apply(&file.nodes, &binding(2, TWO), cut).unwrap_err();
            for run in runs(CHANGES).into_iter().take(done) {
                let digest = match run.unwrap() {
                    Run::Zero { first, .. } => (first, Digest::ZERO),
                    Run::Digests { first, digests } => (first, digests[0]),
                };
                file.nodes.write_pending(0, &mut Pending { start: digest.0.0, digests: vec![digest.1] }).unwrap();
            }
            let Opened::Behind(mut file) = open(&dir) else { panic!("being updated") };
            file.update(&binding(2, TWO), runs(CHANGES).into_iter()).unwrap();
            assert_eq!(all_nodes(&file), expected, "{done}");
        }
    }

    #[test]
    fn a_torn_slot_leaves_the_other() {
        let (_t, dir) = temp();
        let mut file = built(&dir, 1, ONE);
        let clean = file.slot.clone();
        file.mark(State::Updating, &binding(2, TWO)).unwrap();
        let place = file.slot.sequence % 2 * SLOT_STRIDE;
        for torn in [0, 8, 20, 40, 70, 127] {
            let mut bytes = file.slot.encode();
            bytes[torn] ^= 1;
            file.nodes.file().write_all_at(&bytes, place).unwrap();
            assert_eq!(read_slot(file.nodes.file()).unwrap(), Some(clean.clone()), "byte {torn}");
        }
        file.condemn();
        assert!(matches!(open(&dir), Opened::Unusable(_)));
    }

    #[test]
    fn what_belongs_elsewhere_is_unusable() {
        let (_t, dir) = temp();
        for (seq, content) in [(7, ONE), (1, TWO), (2, ONE)] {
            built(&dir, seq, content);
            assert!(matches!(open(&dir), Opened::Unusable(_)), "{seq} {content}");
        }
    }

    #[test]
    fn lists_that_lead_elsewhere_are_corruption_and_replace_nothing() {
        let (_t, dir) = temp();
        built(&dir, 2, TWO);
        for bad in ["3a", "3x 71c 130y 199d 200e", "71c 3x 130y 199d"] {
            let e = DigestFile::rebuild(&dir, &vda(), &binding(2, TWO), runs(bad).into_iter()).err().unwrap();
            assert_eq!(e.kind(), Kind::Corrupt, "{bad}");
            assert!(matches!(open(&dir), Opened::Ready(_)));
        }
    }

    /// A terabyte that is mostly holes costs what is in it.
    #[test]
    fn zeros_are_holes() {
        let (t, dir) = temp();
        let size = DiskSize(1 << 40);
        let mut root = RootBuilder::new(size);
        let content = [Run::Digests { first: BlockIndex(9_999_999), digests: vec![block_digest(b"x"); 70] }];
        (9_999_999..).zip([block_digest(b"x"); 70]).for_each(|(b, d)| root.push_block(BlockIndex(b), d));
        let to = Binding { size, root: root.finish(), ..binding(1, ONE) };
        let file = DigestFile::rebuild(&dir, &vda(), &to, content.into_iter().map(Ok)).unwrap();
        assert_eq!(file.nodes(0, 9_999_998..10_000_000).unwrap(), [Digest::ZERO, block_digest(b"x")]);
        let meta = std::fs::metadata(t.path().join("vda.tree")).unwrap();
        assert!(meta.len() > 512 << 20 && meta.blocks() * 512 < 128 << 10, "{} of {}", meta.blocks(), meta.len());
    }

    /// The same bytes stand in docs/formats/replica.md.
    #[test]
    fn the_slot_is_what_the_format_says() {
        let binding =
            Binding { point: PointId::new("000002-0badcafe").unwrap(), size: DiskSize(0x1234), root: Digest([7; 32]) };
        let slot = Slot { sequence: 5, state: State::Updating, binding };
        let bytes = slot.encode();
        assert_eq!(&bytes[..32], b"VREPTREE\x01\0\0\0\x01\0\0\0\x05\0\0\0\0\0\0\0\x34\x12\0\0\0\0\0\0");
        assert_eq!(&bytes[32..64], b"000002-0badcafe\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(bytes[64..96], [7; 32]);
        assert_eq!(bytes[96..], *blake3::hash(&bytes[..96]).as_bytes());
        assert_eq!(Slot::decode(&bytes), Some(slot));
    }
}
