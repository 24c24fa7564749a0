//! `debug digests`: the digests of a head, digests in a file, those kept of an image, or the change list of a point.

use super::file;
use super::page::{Finding, List, Look, Page, View, clean};
use crate::cli::speak::render;
use serde::Serialize;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use virt_replica::block::changes::{ChangesReader, Run};
use virt_replica::block::digest::Digest;
use virt_replica::block::tree::{RootBuilder, TreeShape};
use virt_replica::block::{BlockIndex, DiskSize, FANOUT};
use virt_replica::error::{Error, Kind, Result};
use virt_replica::plain::identity::Identity;
use virt_replica::plain::kept_digests;
use virt_replica::replica::look::{self, LevelSeen, SlotSeen};

/// Longest first line of kept digests.
const LINE_MAX: u64 = 16 << 10;

#[derive(Serialize)]
pub struct DigestsView {
    /// `tree` (of a head), `digests` (of an image), `kept` (of an image as it is), `changes` (of a point).
    kind: &'static str,
    bytes: u64,
    size: Option<u64>,
    /// The image that kept digests are of, and how it was then.
    image: Option<(PathBuf, Identity)>,
    /// Both headers of a tree, and which of them counts.
    slots: Vec<Slot>,
    /// Of a change list: the root of the point before.
    from_root: Option<Digest>,
    /// The root that the file says it leads to.
    root: Option<Digest>,
    /// The root that its blocks lead to; `null`: they are not all, or not all there.
    root_of_blocks: Option<Digest>,
    levels: List<Level>,
    runs: List<RunSeen>,
    findings: List<Finding>,
}

#[derive(Serialize)]
struct Slot {
    slot: usize,
    /// `null`: it is not whole.
    sequence: Option<u64>,
    updating: bool,
    point: Option<String>,
    root: Option<Digest>,
    counts: bool,
}

#[derive(Serialize)]
struct Level {
    level: u8,
    nodes: u64,
    filled: u64,
    /// Neighbours that are not zero count as one.
    runs: u64,
    /// Byte at which the level begins; `null`: the file has no levels.
    offset: Option<u64>,
}

#[derive(Serialize)]
struct RunSeen {
    /// Byte at which the run begins.
    offset: u64,
    block: u64,
    blocks: u64,
    kind: &'static str,
}

impl DigestsView {
    fn new(kind: &'static str, bytes: u64, max: usize) -> Self {
        DigestsView {
            kind,
            bytes,
            size: None,
            image: None,
            slots: Vec::new(),
            from_root: None,
            root: None,
            root_of_blocks: None,
            levels: List::new(max),
            runs: List::new(max),
            findings: List::new(max),
        }
    }

    /// What is wrong with a file whose every byte could be read.
    fn judge(&self) -> Option<Error> {
        let (root, of_blocks) = (self.root?, self.root_of_blocks?);
        (root != of_blocks).then(|| {
            Error::new(Kind::Corrupt, format!("the blocks lead to root {of_blocks}, and the file says {root}"))
                .hint("a file of digests is a cache: the next run makes the one of a head anew from the change lists")
        })
    }
}

pub fn look(path: &Path, max: usize) -> Result<Look<DigestsView>> {
    let input = file::open(path)?;
    if look::is_tree(&input.file).map_err(|e| e.path(path))? {
        return tree(path, input, max);
    }
    let bytes = input.len;
    let mut view = DigestsView::new("digests", bytes, max);
    let mut counted = Counted { input: BufReader::with_capacity(256 << 10, input.into_reader()), at: 0 };
    let beginning = counted.input.fill_buf().map_err(|e| Error::io("cannot read the file", path, e))?;
    if beginning.first() == Some(&b'{') {
        let mut line = Vec::new();
        let read = (&mut counted).take(LINE_MAX).read_until(b'\n', &mut line);
        read.map_err(|e| Error::io("cannot read the file", path, e))?;
        view.kind = "kept";
        view.image = kept_digests::image_of_line(&line);
        if view.image.is_none() {
            view.findings.push(Finding::at("the first line does not say which image the digests are of", 0));
        }
    }
    let damage = changes(&mut view, &mut counted).err().or_else(|| view.judge());
    Ok(Look { view, damage })
}

fn tree(path: &Path, input: file::Input, max: usize) -> Result<Look<DigestsView>> {
    let mut view = DigestsView::new("tree", input.len, max);
    let (seen, damage) = look::tree(input.file, path)?;
    let newest = seen.newest().cloned();
    view.slots = (0..).zip(&seen.slots).map(|(n, slot)| Slot::of(n, slot.as_ref(), newest.as_ref())).collect();
    if let Some(newest) = newest {
        (view.size, view.root) = (Some(newest.binding.size.0), Some(newest.binding.root));
        if newest.updating {
            view.findings.push(Finding::new("an update was begun and did not end: nodes may be of the point before"));
        }
    }
    view.root_of_blocks = seen.root_of_blocks;
    let of_top = seen.root_of_top.filter(|root| Some(*root) != view.root && damage.is_none());
    if let Some(root) = of_top {
        view.findings.push(Finding::new(format!("the topmost node leads to root {root}")));
    }
    view.levels = List::of(seen.levels.into_iter().map(Level::from), max);
    let damage = damage.or_else(|| view.judge());
    Ok(Look { view, damage })
}

impl Slot {
    fn of(slot: usize, seen: Option<&SlotSeen>, newest: Option<&SlotSeen>) -> Slot {
        Slot {
            slot,
            sequence: seen.map(|s| s.sequence),
            updating: seen.is_some_and(|s| s.updating),
            point: seen.map(|s| s.binding.point.to_string()),
            root: seen.map(|s| s.binding.root),
            counts: seen.is_some() && seen == newest,
        }
    }

    fn text(&self) -> String {
        let (Some(point), Some(root), Some(sequence)) = (&self.point, self.root, self.sequence) else {
            return format!("header {}: not whole", self.slot);
        };
        let state = if self.updating { "being updated to" } else { "clean at" };
        let counts = if self.counts { "; this one counts" } else { "" };
        format!("header {}, number {sequence}: {state} point {point}, root {root}{counts}", self.slot)
    }
}

impl From<LevelSeen> for Level {
    fn from(seen: LevelSeen) -> Self {
        let LevelSeen { level, nodes, filled, runs, offset } = seen;
        Level { level, nodes, filled, runs, offset: Some(offset) }
    }
}

/// A reader that knows how far it is.
struct Counted<R> {
    input: R,
    at: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, len: usize) {
        self.at += len as u64;
        self.input.consume(len);
    }
}

/// Reads a change list run by run. An error names its byte of the file, whatever stands in front of the list.
fn changes(view: &mut DigestsView, input: &mut Counted<impl BufRead>) -> Result<()> {
    let before = input.at;
    let shifted = |e: Error| match (before, e.context().offset_bytes) {
        (0, _) | (_, None) => e,
        // The offset of an error stays as it was first said, so that it is said anew.
        (_, Some(at)) => Error::new(e.kind(), e.what().to_owned()).offset(before + at),
    };
    let at = std::cell::Cell::new(before);
    let mut list = ChangesReader::new(Telling { input, at: &at }).map_err(shifted)?;
    let header = *list.header();
    (view.size, view.from_root) = (Some(header.size.0), header.from_root);
    if header.from_root.is_some() {
        view.kind = "changes";
    }
    let mut tree = Tree::new(header.size);
    loop {
        let offset = at.get();
        let Some(run) = list.next() else { break };
        match run {
            Ok(run) => {
                let kind = match run {
                    Run::Zero { .. } => "zero",
                    Run::Digests { .. } => "digests",
                };
                view.runs.push(RunSeen { offset, block: run.first().0, blocks: run.count(), kind });
                tree.take(run);
            }
            Err(e) => {
                view.levels = tree.levels();
                return Err(shifted(e));
            }
        }
    }
    view.root = list.trailer().map(|trailer| trailer.to_root);
    view.levels = tree.levels();
    // What a point changed says nothing of the blocks that it left alone.
    view.root_of_blocks = header.from_root.is_none().then(|| tree.root.finish());
    match list.trailer() {
        Some(_) => Ok(()),
        None => Err(Error::new(Kind::Corrupt, "the change list has no end").offset(at.get())),
    }
}

/// Says how far a reader is that somebody else holds.
struct Telling<'a, R> {
    input: &'a mut Counted<R>,
    at: &'a std::cell::Cell<u64>,
}

impl<R: Read> Read for Telling<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.at.set(self.input.at);
        Ok(len)
    }
}

/// The tree above blocks that come in ascending order: how many nodes it has at each level, and its root.
struct Tree {
    shape: TreeShape,
    root: RootBuilder,
    /// Of each level: the last node that is not zero, how many there are, and how many runs of neighbours.
    levels: Vec<(Option<u64>, u64, u64)>,
}

impl Tree {
    fn new(size: DiskSize) -> Tree {
        let shape = TreeShape::new(size);
        Tree { shape, root: RootBuilder::new(size), levels: vec![(None, 0, 0); shape.levels().into()] }
    }

    fn take(&mut self, run: Run) {
        let Run::Digests { first, digests } = run else { return };
        for (block, digest) in (first.0..).zip(digests) {
            self.root.push_block(BlockIndex(block), digest);
            let mut index = block;
            for (last, filled, runs) in &mut self.levels {
                if *last != Some(index) {
                    *filled += 1;
                    *runs += u64::from(index == 0 || *last != Some(index - 1));
                    *last = Some(index);
                }
                index /= FANOUT as u64;
            }
        }
    }

    fn levels(&self) -> List<Level> {
        let level = |(level, (_, filled, runs)): (u8, &(Option<u64>, u64, u64))| Level {
            level,
            nodes: self.shape.nodes_at(level),
            filled: *filled,
            runs: *runs,
            offset: None,
        };
        List::of((0..).zip(&self.levels).map(level), self.levels.len())
    }
}

impl View for DigestsView {
    fn page(&self, page: &mut Page) {
        let kind = match self.kind {
            "tree" => "digests of a head",
            "kept" => "digests kept of an image",
            "changes" => "what a point changed",
            _ => "digests of an image, or of a first point",
        };
        page.line("kind", format!("{kind}, {}", render::bytes(self.bytes)));
        page.maybe("size", self.size.map(|size| format!("{} ({size} bytes)", render::bytes(size))));
        if let Some((image, identity)) = &self.image {
            page.line("image", clean(image.to_string_lossy()));
            let inode = identity.id.inode;
            page.line(
                "",
                format!(
                    "as it was with inode {inode}, {} bytes, written at {} s",
                    identity.len_bytes, identity.modified.0
                ),
            );
        }
        page.lines("bound", "headers", &List::of(&self.slots, 2), |slot| slot.text());
        page.maybe("from", self.from_root.map(|root| format!("root {root}")));
        page.maybe(
            "root",
            self.root.map(|root| {
                let checked = self.root_of_blocks == Some(root);
                format!("{root}{}", if checked { ", to which the blocks lead" } else { "" })
            }),
        );
        page.findings(&self.findings);
        let header = ["Level", "Nodes", "Not zero", "In runs", "Offset"];
        page.table("levels", (&header, &[0, 1, 2, 3, 4]), &self.levels, |level| {
            let offset = level.offset.map_or("-".to_owned(), |offset| offset.to_string());
            let numbers = [level.nodes, level.filled, level.runs].map(|n| n.to_string());
            [vec![level.level.to_string()], numbers.to_vec(), vec![offset]].concat()
        });
        page.table("runs", (&["Offset", "Block", "Blocks", "What"], &[0, 1, 2]), &self.runs, |run| {
            vec![run.offset.to_string(), run.block.to_string(), run.blocks.to_string(), run.kind.to_owned()]
        });
    }
}
