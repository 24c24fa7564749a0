//! `debug patch`: header, groups and records of a patch, with their offsets. What stands before damage is shown.

use super::page::{Finding, List, Look, Page, View, counted, ratio};
use super::protection::{self, Protection};
use crate::cli::plain::envelope::KeyArgs;
use crate::cli::speak::render;
use serde::Serialize;
use std::io::Read;
use std::path::Path;
use virt_replica::block::digest::{Digest, block_digest};
use virt_replica::block::{BlockIndex, DiskSize};
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DiskName, DomainUuid};
use virt_replica::patch::{Decoder, Header, Item, Limits, RECORD_HEAD_LEN, Trailer};

/// Bytes read at once.
const CHUNK_LEN: usize = 256 << 10;

#[derive(Serialize)]
pub struct PatchView {
    /// Of the file.
    bytes: u64,
    protection: Protection,
    /// `null`: it is encrypted, and no key was named.
    patch: Option<Patch>,
}

/// A patch, as far as it could be read.
#[derive(Debug, Serialize)]
pub struct Patch {
    /// `null`: not even the header could be read.
    header: Option<HeaderSeen>,
    /// `null`: its end is not there.
    to_root: Option<Digest>,
    pub totals: Totals,
    groups: List<Group>,
    records: List<Record>,
    pub findings: List<Finding>,
}

#[derive(Debug, Serialize)]
struct HeaderSeen {
    /// `null`: of a plain image.
    domain: Option<DomainUuid>,
    disk: Option<DiskName>,
    /// `null`: it starts from nothing.
    from_root: Option<Digest>,
    size_from: DiskSize,
    size: DiskSize,
    /// Bytes, banner included.
    length: u64,
}

impl HeaderSeen {
    fn of(header: &Header, length: u64) -> Self {
        let of_disk = (!header.is_plain()).then(|| (header.domain.clone(), header.disk.clone()));
        let (domain, disk) = of_disk.unzip();
        HeaderSeen { domain, disk, from_root: header.from_root, size_from: header.size_from, size: header.size, length }
    }
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Totals {
    /// Of the patch, as far as it was read.
    pub bytes: u64,
    pub records: u64,
    pub blocks_whole: u64,
    pub blocks_in_pieces: u64,
    pub blocks_zero: u64,
    /// Of content: before compression, and as it travels.
    pub content_bytes: u64,
    pub payload_bytes: u64,
}

/// Neighbouring records of the same 64 blocks.
#[derive(Debug, Clone, Serialize)]
struct Group {
    group: u64,
    offset: u64,
    records: u64,
    /// Of the records, headers included.
    length: u64,
    content_bytes: u64,
    payload_bytes: u64,
}

#[derive(Debug, Clone, Serialize)]
struct Record {
    record: u64,
    offset: u64,
    kind: &'static str,
    /// First block, and how many.
    block: u64,
    blocks: u64,
    /// Pieces that travel; `null`: all of the block.
    pieces: Option<u32>,
    compressed: bool,
    /// Bytes, header included.
    length: u64,
    content_bytes: u64,
    payload_bytes: u64,
}

pub fn look(path: &Path, keys: &KeyArgs, max: usize) -> Result<Look<PatchView>> {
    let opened = protection::open(path, keys)?;
    let (patch, damage) = match opened.content {
        Some(content) => {
            let (patch, damage) = read(content, max)?;
            (Some(patch), damage)
        }
        None => (None, None),
    };
    Ok(Look { view: PatchView { bytes: opened.bytes, protection: opened.protection, patch }, damage })
}

/// Reads a patch to its end, or to where it is damaged.
pub fn read(mut input: impl Read, max: usize) -> Result<(Patch, Option<Error>)> {
    let mut walk = Walk::new(max)?;
    let mut chunk = vec![0; CHUNK_LEN];
    let damage = loop {
        let len = match input.read(&mut chunk) {
            Ok(0) => break None,
            Ok(len) => len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => break Some(Error::from_io("cannot read the patch", e).offset(walk.patch.totals.bytes)),
        };
        if let Err(e) = walk.push(&chunk[..len]) {
            break Some(e);
        }
    };
    let (patch, unfinished) = walk.finish(damage.is_none());
    // Its structure may be whole, and the content of a block be another.
    let damage = damage.or(unfinished).or_else(|| patch.wrong_content());
    Ok((patch, damage))
}

/// Gathers what comes out of the decoder.
pub struct Walk {
    decoder: Decoder,
    group: Option<Group>,
    size: DiskSize,
    patch: Patch,
}

impl Walk {
    pub fn new(max: usize) -> Result<Walk> {
        let patch = Patch {
            header: None,
            to_root: None,
            totals: Totals::default(),
            groups: List::new(max),
            records: List::new(max),
            findings: List::new(max),
        };
        Ok(Walk { decoder: Decoder::new(Limits::default())?, group: None, size: DiskSize(0), patch })
    }

    pub fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.decoder.push(bytes);
        loop {
            let at = self.decoder.position();
            let Some(item) = self.decoder.next_item()? else { return Ok(()) };
            let length = self.decoder.position() - at;
            self.patch.totals.bytes = at + length;
            self.take(item, at, length);
        }
    }

    /// The patch as it was read; and why it is not whole, if that was not found out `so_far`.
    pub fn finish(mut self, so_far: bool) -> (Patch, Option<Error>) {
        self.close_group();
        let damage = if so_far { self.decoder.finish().err() } else { None };
        (self.patch, damage)
    }

    fn take(&mut self, item: Item, at: u64, length: u64) {
        let payload_bytes = length.saturating_sub(RECORD_HEAD_LEN as u64);
        let mut record = Record {
            record: self.patch.totals.records,
            offset: at,
            kind: "zero",
            block: 0,
            blocks: 1,
            pieces: None,
            compressed: false,
            length,
            content_bytes: 0,
            payload_bytes,
        };
        let totals = &mut self.patch.totals;
        match item {
            Item::Header(header) => {
                self.size = header.size;
                self.patch.header = Some(HeaderSeen::of(&header, length));
                return;
            }
            Item::Trailer(Trailer { to_root, .. }) => {
                self.patch.to_root = Some(to_root);
                return;
            }
            Item::Data { block, digest, bytes } => {
                totals.blocks_whole += 1;
                if block_digest(&bytes) != digest {
                    let what = format!("the content of block {} does not have the digest of its record", block.0);
                    self.patch.findings.push(Finding::at(what, at));
                }
                (record.kind, record.block, record.content_bytes) = ("data", block.0, bytes.len() as u64);
            }
            Item::Pieces { block, mask, bytes, .. } => {
                totals.blocks_in_pieces += 1;
                (record.kind, record.block, record.content_bytes) = ("pieces", block.0, bytes.len() as u64);
                record.pieces = Some(mask.count());
            }
            Item::Zero { first, count } => {
                totals.blocks_zero += count;
                (record.block, record.blocks) = (first.0, count);
            }
        }
        // What does not become smaller travels as it is.
        record.compressed = record.payload_bytes < record.content_bytes;
        totals.records += 1;
        totals.content_bytes += record.content_bytes;
        totals.payload_bytes += record.payload_bytes;
        self.add_to_group(&record);
        self.patch.records.push(record);
    }

    fn add_to_group(&mut self, record: &Record) {
        let group = BlockIndex(record.block).group().0;
        if self.group.as_ref().is_some_and(|open| open.group != group) {
            self.close_group();
        }
        let empty = Group { group, offset: record.offset, records: 0, length: 0, content_bytes: 0, payload_bytes: 0 };
        let open = self.group.get_or_insert(empty);
        open.records += 1;
        open.length += record.length;
        open.content_bytes += record.content_bytes;
        open.payload_bytes += record.payload_bytes;
    }

    fn close_group(&mut self) {
        if let Some(group) = self.group.take() {
            self.patch.groups.push(group);
        }
    }
}

impl View for PatchView {
    fn page(&self, page: &mut Page) {
        page.line("bytes", render::bytes(self.bytes));
        self.protection.page(page);
        if let Some(patch) = &self.patch {
            patch.page(page);
        }
    }
}

impl Patch {
    fn wrong_content(&self) -> Option<Error> {
        let first = self.findings.shown.first()?;
        let e = Error::new(Kind::Corrupt, "the content of a block is not what its record promises");
        Some(first.offset.into_iter().fold(e, Error::offset))
    }

    pub fn page(&self, page: &mut Page) {
        self.summary(page);
        page.findings(&self.findings);
        let header = ["Group", "Offset", "Records", "Length", "Content", "Ratio"];
        page.table("groups", (&header, &[0, 1, 2, 3, 4, 5]), &self.groups, |group| {
            vec![
                group.group.to_string(),
                group.offset.to_string(),
                group.records.to_string(),
                group.length.to_string(),
                group.content_bytes.to_string(),
                ratio(group.content_bytes, group.payload_bytes),
            ]
        });
        let header = ["Record", "Offset", "Block", "What", "Length", "Content", "Ratio"];
        page.table("records", (&header, &[0, 1, 2, 4, 5, 6]), &self.records, |record| {
            vec![
                record.record.to_string(),
                record.offset.to_string(),
                record.block.to_string(),
                record.what(),
                record.length.to_string(),
                record.content_bytes.to_string(),
                ratio(record.content_bytes, record.payload_bytes),
            ]
        });
    }

    /// The lines without the tables.
    pub fn summary(&self, page: &mut Page) {
        let Some(header) = &self.header else { return };
        page.line(
            "of",
            match (&header.domain, &header.disk) {
                (Some(domain), Some(disk)) => format!("disk {disk} of domain {domain}"),
                _ => "a plain image".to_owned(),
            },
        );
        page.line(
            "from",
            match header.from_root {
                Some(root) => format!("root {root}, {} bytes", header.size_from),
                None => "nothing".to_owned(),
            },
        );
        page.line(
            "to",
            match self.to_root {
                Some(root) => format!("root {root}, {} bytes", header.size),
                None => format!("{} bytes; its root is at the end, which is not there", header.size),
            },
        );
        let t = &self.totals;
        page.line(
            "holds",
            format!(
                "{}: {} whole, {} in pieces, {} zero",
                counted(t.records, "record"),
                counted(t.blocks_whole, "block"),
                t.blocks_in_pieces,
                t.blocks_zero
            ),
        );
        let ratio = match ratio(t.content_bytes, t.payload_bytes).as_str() {
            "-" => String::new(),
            ratio => format!(", {ratio} as large before compression"),
        };
        page.line("content", format!("{}{ratio}", render::bytes(t.content_bytes)));
    }
}

impl Record {
    fn what(&self) -> String {
        let how = if self.compressed { "zstd" } else { "stored" };
        match self.pieces {
            Some(pieces) => format!("{}, {how}", counted(pieces.into(), "piece")),
            None if self.kind == "data" => format!("data, {how}"),
            None => format!("zeros, {}", counted(self.blocks, "block")),
        }
    }
}
