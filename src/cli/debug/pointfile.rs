//! `debug points` of a point in a file: what it says it carries, and each disk's patch in it.

use super::page::{Finding, List, Page, clean};
use super::patch::{Patch, Walk};
use crate::cli::speak::render;
use serde::Serialize;
use std::io::Read;
use virt_replica::error::{Error, Result};
use virt_replica::replica::pointfile::{self, Carried, Part};

#[derive(Serialize)]
pub struct PointFile {
    /// `null`: not even its second line could be read.
    carried: Option<Carried>,
    sections: List<Section>,
    /// The checksum at the end is right.
    whole: bool,
    findings: List<Finding>,
}

/// What belongs to a disk, or to an attachment.
#[derive(Serialize)]
struct Section {
    name: String,
    /// Byte of the stream at which it begins.
    offset: u64,
    /// Bytes of content, as far as it is there.
    bytes: u64,
    /// Of a disk.
    patch: Option<Patch>,
    /// Why the patch is not whole.
    damage: Option<Finding>,
}

/// Reads the stream to its end, or to where it is damaged.
pub fn read(input: impl Read, max: usize) -> (PointFile, Option<Error>) {
    let file = PointFile { carried: None, sections: List::new(max), whole: false, findings: List::new(max) };
    let mut reading = Reading { file, open: None, max };
    let damage = pointfile::look(input, &mut |part| reading.take(part)).err();
    reading.close(damage.is_none());
    (reading.file, damage)
}

struct Reading {
    file: PointFile,
    open: Option<Open>,
    max: usize,
}

/// The section that is being read. A patch that is damaged is read no further, and the sections behind it are.
struct Open {
    name: String,
    offset: u64,
    bytes: u64,
    walk: Option<Walk>,
    damage: Option<Error>,
}

impl Reading {
    fn take(&mut self, part: Part) -> Result<()> {
        match part {
            Part::Head(carried) => self.file.carried = Some(carried.clone()),
            Part::Disk(disk, at) => self.begin(disk.name.to_string(), at, Some(Walk::new(self.max)?)),
            Part::Attachment(name, at) => self.begin(name.file_name().to_owned(), at, None),
            Part::Bytes(bytes) => self.bytes(bytes),
            Part::End(_) => self.file.whole = true,
        }
        Ok(())
    }

    fn begin(&mut self, name: String, offset: u64, walk: Option<Walk>) {
        self.close(true);
        self.open = Some(Open { name, offset, bytes: 0, walk, damage: None });
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let Some(open) = &mut self.open else { return };
        open.bytes += bytes.len() as u64;
        if let (Some(walk), None) = (&mut open.walk, &open.damage) {
            open.damage = walk.push(bytes).err();
        }
    }

    /// `ended`: the section came to its own end. One that the file cut off is not damaged itself.
    fn close(&mut self, ended: bool) {
        let Some(Open { name, offset, bytes, walk, damage }) = self.open.take() else { return };
        let (patch, unfinished) = walk.map(|walk| walk.finish(ended && damage.is_none())).unzip();
        let damage = damage.or(unfinished.flatten()).as_ref().map(Finding::of);
        if let Some(found) = &damage {
            self.file.findings.push(Finding::new(format!("section {name}, from byte {offset} on: {}", found.what)));
        }
        self.file.sections.push(Section { name, offset, bytes, patch, damage });
    }
}

impl PointFile {
    pub fn page(&self, page: &mut Page) {
        if let Some(head) = &self.carried {
            let generation = head.generation;
            page.line("point", format!("{} of {} ({}), generation {generation}", head.point, head.name, head.uuid));
            page.line("frozen", format!("{}, {}", render::time(head.frozen_at), render::consistency(head.consistency)));
            page.maybe("", head.consistency_reason.as_deref().map(clean));
            page.line("run", head.run.as_str());
            page.line("from", head.since.as_ref().map_or("nothing".to_owned(), |s| format!("point {}", s.point)));
            page.line("whole", if self.whole { "yes: its checksum is right" } else { "no" });
        }
        page.findings(&self.findings);
        let header = ["Section", "Offset", "Bytes", "Records", "Blocks", "Content"];
        page.table("sections", (&header, &[1, 2, 3, 4, 5]), &self.sections, |section| {
            let totals = section.patch.as_ref().map(|patch| patch.totals);
            let of = |number: fn(super::patch::Totals) -> u64| totals.map_or("-".to_owned(), |t| number(t).to_string());
            vec![
                section.name.clone(),
                section.offset.to_string(),
                section.bytes.to_string(),
                of(|t| t.records),
                of(|t| t.blocks_whole + t.blocks_in_pieces + t.blocks_zero),
                of(|t| t.content_bytes),
            ]
        });
    }
}
