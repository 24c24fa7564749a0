//! `debug extents`: the chain of an image, layer by layer, and the map of what reads as zeros and what has to be read.
//!
//! No lock is taken: a QEMU that has the image open goes on as if nobody looked. What it writes meanwhile may be
//! missing in the map, or be there half.

use super::file;
use super::page::{Finding, List, Look, Page, View, clean, counted};
use crate::cli::Globals;
use crate::cli::plain::shared::{BackingArgs, FORMATS, format};
use crate::cli::speak::render;
use clap::Args;
use serde::Serialize;
use std::path::{Path, PathBuf};
use virt_replica::block::ByteRange;
use virt_replica::block::extent::{Content, Extent};
use virt_replica::error::{Error, Result};
use virt_replica::image::chain;
use virt_replica::image::foreign::format::AnyFormat;
use virt_replica::image::look::Seen;
use virt_replica::image::open::{self, Opened};
use virt_replica::image::{Chain, Layer};
use virt_replica::wiring::plain as site;

/// Bytes of the disk whose map is asked for at once, while it is full of extents.
const WINDOW: u64 = 1 << 30;

/// A window grows while the map in it has no more extents than this: a large disk with nothing in it is seen at once.
const FEW: usize = 16;

/// Extents after which the map is left: an image of a stranger may claim so many that nobody would wait for the end.
const EXTENTS_MAX: u64 = 20_000_000;

#[derive(Debug, Args)]
pub struct ExtentsArgs {
    #[command(flatten)]
    pub look: super::args::LookArgs,
    /// Format of the image; never guessed from the content [default: raw or qcow2, by its name]
    #[arg(long, value_name = "FORMAT", value_parser = FORMATS)]
    format: Option<String>,
    #[command(flatten)]
    backing: BackingArgs,
}

#[derive(Serialize)]
pub struct ExtentsView {
    format: &'static str,
    /// Uppermost first, as far as it could be followed.
    chain: List<LayerSeen>,
    /// How the map was read; `null`: it was not.
    reader: Option<String>,
    /// As the guest sees it; `null`: it could not be opened.
    size: Option<u64>,
    totals: Totals,
    extents: List<ExtentSeen>,
    findings: List<Finding>,
}

#[derive(Serialize)]
struct LayerSeen {
    path: PathBuf,
    format: &'static str,
    block_device: bool,
    file_bytes: u64,
    occupied_bytes: u64,
    /// As its header says; `null` where there is none.
    size: Option<u64>,
    backing: Option<String>,
    backing_format: Option<String>,
    data_file: Option<String>,
    snapshots: u32,
    encrypted: bool,
    /// Why this program does not read it in process.
    beyond: Option<String>,
    in_qemu: bool,
}

#[derive(Default, Serialize)]
struct Totals {
    data_bytes: u64,
    data_extents: u64,
    zero_bytes: u64,
    zero_extents: u64,
}

#[derive(Clone, Serialize)]
struct ExtentSeen {
    start: u64,
    length: u64,
    content: &'static str,
}

impl From<Seen> for LayerSeen {
    fn from(seen: Seen) -> Self {
        let header = seen.header.as_ref();
        let word = |text: &Option<String>| text.as_deref().map(clean);
        LayerSeen {
            format: seen.layer.format.as_str(),
            block_device: seen.layer.block_device,
            file_bytes: seen.file_bytes,
            occupied_bytes: seen.occupied_bytes,
            size: header.map(|h| h.size.0),
            backing: header.and_then(|h| word(&h.backing)),
            backing_format: header.and_then(|h| word(&h.backing_format)),
            data_file: header.and_then(|h| word(&h.data_file)),
            snapshots: header.map_or(0, |h| h.snapshots),
            encrypted: header.is_some_and(|h| h.encrypted),
            beyond: header.and_then(|h| h.beyond_us()),
            in_qemu: seen.in_qemu,
            path: seen.layer.path,
        }
    }
}

pub fn look(path: &Path, args: &ExtentsArgs, globals: &Globals, max: usize) -> Result<Look<ExtentsView>> {
    let path = &std::path::absolute(path).map_err(|e| Error::io("this is no path", path, e))?;
    let metadata = std::fs::metadata(path).map_err(|e| Error::io("cannot look at the image", path, e))?;
    let format = format(args.format.as_ref(), path);
    let block_device = std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type());
    if !block_device {
        file::refuse_other(path, &metadata)?;
    }
    let layer = Layer { path: path.clone(), format: format.of_layer(), block_device, data_file: None };
    let may = chain::named_beside(path, &args.backing.dirs);
    let (layers, broken) = chain::look_along(&layer, &may);
    if let (true, Some(e)) = (layers.is_empty(), broken.as_ref()) {
        return Err(e.again());
    }
    let chain = Chain(layers.iter().map(|seen| seen.layer.clone()).collect());
    let mut view = ExtentsView {
        format: format.as_str(),
        chain: List::of(layers.into_iter().map(LayerSeen::from), max),
        reader: None,
        size: None,
        totals: Totals::default(),
        extents: List::new(max),
        findings: List::new(max),
    };
    if view.chain.shown.iter().any(|layer| layer.in_qemu) {
        let what =
            "a QEMU program has the image open: what it writes meanwhile may be missing in the map, or half there";
        view.findings.push(Finding::new(what));
    }
    let damage = match broken {
        // Without all of its layers nobody can say what is in it.
        Some(e) => Some(e),
        None => map(&mut view, &chain, format, globals).err(),
    };
    Ok(Look { view, damage })
}

fn map(view: &mut ExtentsView, chain: &Chain, format: AnyFormat, globals: &Globals) -> Result<()> {
    let options = site::read_options(&globals.state_dir, true, &[]).open;
    let opened = match format {
        AnyFormat::Own(_) => open::open_read(chain, &options)?,
        AnyFormat::Of(format) => open::open_foreign(chain.top(), format, &options)?,
    };
    let walked = walk(view, &opened);
    walked.and(opened.close())
}

/// Counts the map piece by piece; neighbours on both sides of a cut between two pieces may be alike.
fn walk(view: &mut ExtentsView, opened: &Opened) -> Result<()> {
    let image = opened.image.as_ref();
    let (size, mut at, mut window) = (image.size().0, 0, WINDOW);
    (view.reader, view.size) = (Some(clean(&opened.how)), Some(size));
    let mut open: Option<Extent> = None;
    while at < size {
        let range = ByteRange::new(at, at.saturating_add(window).min(size));
        let extents = image.extents(range)?;
        window = if extents.len() <= FEW { window.saturating_mul(2) } else { WINDOW };
        for extent in extents {
            match &mut open {
                Some(last) if last.content == extent.content => last.range.end = extent.range.end,
                _ => open.replace(extent).into_iter().for_each(|whole| view.count(whole)),
            }
        }
        at = range.end;
        if view.extents.count >= EXTENTS_MAX && at < size {
            view.findings
                .push(Finding::at(format!("the map has more than {EXTENTS_MAX} extents; the rest is left out"), at));
            break;
        }
    }
    open.into_iter().for_each(|last| view.count(last));
    Ok(())
}

impl ExtentsView {
    fn count(&mut self, extent: Extent) {
        let (length, totals) = (extent.range.len(), &mut self.totals);
        let content = match extent.content {
            Content::Data => {
                (totals.data_bytes, totals.data_extents) = (totals.data_bytes + length, totals.data_extents + 1);
                "data"
            }
            Content::Zero => {
                (totals.zero_bytes, totals.zero_extents) = (totals.zero_bytes + length, totals.zero_extents + 1);
                "zero"
            }
        };
        self.extents.push(ExtentSeen { start: extent.range.start, length, content });
    }
}

impl View for ExtentsView {
    fn page(&self, page: &mut Page) {
        page.line("format", self.format);
        page.maybe("size", self.size.map(|size| format!("{} ({size} bytes)", render::bytes(size))));
        page.maybe("read", self.reader.as_ref().map(|how| format!("{how}; no lock was taken")));
        page.findings(&self.findings);
        page.lines("chain", "layers", &self.chain, LayerSeen::text);
        if self.size.is_some() {
            let of = |bytes, extents| format!("{} in {}", render::bytes(bytes), counted(extents, "extent"));
            page.line("data", of(self.totals.data_bytes, self.totals.data_extents));
            page.line("zero", of(self.totals.zero_bytes, self.totals.zero_extents));
        }
        page.table("extents", (&["Start", "Length", "What"], &[0, 1]), &self.extents, |extent| {
            vec![extent.start.to_string(), extent.length.to_string(), extent.content.to_owned()]
        });
    }
}

impl LayerSeen {
    fn text(&self) -> String {
        let mut text = format!("{}, {}", clean(self.path.to_string_lossy()), self.format);
        match self.block_device {
            true => text += ", a block device",
            false => {
                text += &format!(", {}, {} on disk", render::bytes(self.file_bytes), render::bytes(self.occupied_bytes))
            }
        }
        if let Some(size) = self.size {
            text += &format!(", a disk of {}", render::bytes(size));
        }
        if let Some(backing) = &self.backing {
            let format = self.backing_format.as_deref().unwrap_or("a format that it does not name");
            text += &format!("; over {backing}, {format}");
        }
        if let Some(file) = &self.data_file {
            text += &format!("; data in {file}");
        }
        if let Some(beyond) = &self.beyond {
            text += &format!("; it {beyond}");
        }
        if self.in_qemu {
            text += "; open in a QEMU program";
        }
        text
    }
}
