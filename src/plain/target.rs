//! An image on this host at the end of a patch.
//!
//! ```text
//! i1 i2 i3   in place, behind a redo file: see redo.rs
//! i4         what will take the image's place is finished and durable
//! i5         it has taken it, durably
//! ```
//!
//! Specified in docs/plain.md.

use super::identity::Identity;
use super::incoming::{Base, Begin, Finished, Incoming, Outcome, Writer};
use super::reading;
use super::source::{ReadOptions, Source, alone, hash};
use super::undo::Undo;
use super::{Committed, FileMeta, Finish, ImageView, PlainTarget, Way, WayWish, Whole, Wish, kept_digests, redo};
use crate::block::digest::{BlockPieces, Digest, piece_digests};
use crate::block::tree::ZeroNodes;
use crate::block::{BlockIndex, DiskSize};
use crate::engine::disk_target::{DiskApplied, DiskTarget, check_blocks};
use crate::engine::nodefile::NodeFile;
use crate::engine::pump::Progress;
use crate::error::{Error, Kind, Result};
use crate::image::foreign::format::{AnyFormat, Foreign};
use crate::image::foreign::writer;
use crate::image::locks::QemuLock;
use crate::image::open::{self, OpenOptions, Opened};
use crate::image::raw::RawImage;
use crate::image::{Format, Image, Layer};
use crate::name::DiskName;
use crate::plain::beside::{self, PartLock, part_of, remove, take_place};
use crate::plain::reading::lock_whole;
use crate::plain::write_target::{Choice, WriteTarget, check_way, check_writable, mended};
use std::cell::RefCell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

/// Why digests are not kept of some images.
const UNTOLD: &str = "nothing tells whether somebody has written to it";

/// What this host allows and has.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// Locks, readers and directory for sockets.
    pub open: OpenOptions,
    /// Threads that read and hash.
    pub workers: usize,
    /// Nothing outside of this directory is read or written.
    pub within: Option<PathBuf>,
    /// As [`ReadOptions::backing`], of an image that is only read.
    pub backing: Vec<PathBuf>,
    /// Where redo files of block devices lie.
    pub redo_dir: PathBuf,
    /// Where to write the patch that leads back.
    pub undo: Option<PathBuf>,
}

/// An image on this host at the end of a patch.
pub struct LocalTarget {
    wish: Wish,
    options: LocalOptions,
    /// With its path real.
    layer: Layer,
    exists: bool,
    view: ImageView,
    state: Mutex<State>,
    whole: Option<QemuLock>,
    source: Option<Source>,
    /// Behind [`Base::image`].
    opened: Option<Opened>,
}

#[derive(Default)]
struct State {
    base: Base,
    /// What is resumed, and its lock, until a patch lands on it.
    part: Option<(PathBuf, PartLock)>,
    /// A patch has come: there will be no second one.
    begun: bool,
    incoming: Option<Incoming>,
    finished: Option<Finished>,
}

impl LocalTarget {
    /// Opens the image at `wish.path`, which need not be there, and ends what was cut short on it. `Busy` if it is in
    /// use; `Refused` where its format or place does not allow it. Blocks.
    pub fn open(wish: &Wish, options: &LocalOptions) -> Result<LocalTarget> {
        let real = match &options.within {
            Some(root) => beside::check_within(&wish.path, root)?,
            None => beside::real_path(&wish.path)?,
        };
        if let (Some(root), Some(dir)) = (&options.within, &wish.digests) {
            beside::check_within(dir, root)?;
        }
        match wish.read_only {
            true => Self::open_read_only(wish, options, real),
            false => Self::open_write(wish, options, real),
        }
    }

    fn open_read_only(wish: &Wish, options: &LocalOptions, real: PathBuf) -> Result<LocalTarget> {
        let read = ReadOptions {
            open: OpenOptions { force_share: wish.force_share, ..options.open.clone() },
            exact: true,
            device_max: wish.size,
            redo_dir: options.redo_dir.clone(),
            within: options.within.clone(),
            backing: options.backing.clone(),
        };
        let source = Source::open_any(&real, wish.format, &read)?;
        let layer = reading::layer(&real, wish.format.of_layer())?;
        let base = Base { image: Some(source.image.clone()), tree: None };
        let mut target = Self::assemble(wish, options, layer, true, base);
        target.source = Some(source);
        target.believe_kept()?;
        Ok(target)
    }

    fn open_write(wish: &Wish, options: &LocalOptions, real: PathBuf) -> Result<LocalTarget> {
        let exists = real.symlink_metadata().is_ok();
        let layer = match exists {
            true => reading::layer(&real, wish.format.of_layer())?,
            false => Layer { path: real.clone(), format: wish.format.of_layer(), block_device: false, data_file: None },
        };
        check_way(wish, &layer)?;
        // Asked before hours of comparing, and not when the result is to take its place.
        if !(layer.block_device || exists && wish.way == WayWish::InPlace) {
            beside::check_may_put(&layer.path)?;
        }
        let mut target = Self::assemble(wish, options, layer, exists, Base::default());
        if exists {
            target.whole = Some(lock_whole(&real)?);
            target.view.redone = target.end_redo()?;
            check_writable(&target.layer, wish.format)?;
        }
        target.find_part()?;
        target.open_base()?;
        target.believe_kept()?;
        Ok(target)
    }

    fn assemble(wish: &Wish, options: &LocalOptions, layer: Layer, exists: bool, base: Base) -> LocalTarget {
        let size = base.size();
        let view = ImageView { exists, size, root: None, resumes: false, redone: false, digests_reason: None };
        LocalTarget {
            wish: wish.clone(),
            options: options.clone(),
            layer,
            exists,
            view,
            state: Mutex::new(State { base, ..State::default() }),
            whole: None,
            source: None,
            opened: None,
        }
    }

    fn redo_path(&self) -> Result<PathBuf> {
        redo::path_of(&self.layer.path, self.layer.block_device, &self.options.redo_dir)
    }

    fn end_redo(&self) -> Result<bool> {
        redo::roll(&self.layer, &self.redo_path()?, false)
    }

    /// What a copy that was cut short left is gone on from, where this one could have left it too.
    fn find_part(&mut self) -> Result<()> {
        if self.layer.block_device || matches!(self.wish.way, WayWish::Redo | WayWish::InPlace) && self.exists {
            return Ok(());
        }
        let part = part_of(&self.layer.path)?;
        match part.symlink_metadata() {
            Err(_) => return Ok(()),
            Ok(found) if found.is_file() => {}
            // A link would lead our writing elsewhere.
            Ok(_) => return Err(Error::new(Kind::Conflict, "this is no file of ours").path(part).hint("remove it")),
        }
        let held = beside::hold(&part)?;
        let worthless = match self.wish.format {
            AnyFormat::Own(Format::Raw) => false,
            AnyFormat::Own(Format::Qcow2) => !mended(&part),
            // Its tables may be torn, and nothing tells for sure.
            AnyFormat::Of(_) => true,
        };
        if self.wish.afresh || worthless {
            return remove(&part);
        }
        self.lock().part = Some((part, held));
        (self.view.resumes, self.view.exists) = (true, true);
        Ok(())
    }

    fn open_base(&mut self) -> Result<()> {
        if !self.view.exists {
            return Ok(());
        }
        let path = self.lock().part.as_ref().map_or_else(|| self.layer.path.clone(), |(part, _)| part.clone());
        let layer = Layer { path, ..self.layer.clone() };
        let opened = match self.wish.format {
            AnyFormat::Own(Format::Raw) => None,
            AnyFormat::Own(Format::Qcow2) => Some(open::open_read(&alone(&layer), &self.options.open)?),
            AnyFormat::Of(format) => {
                // We have its whole lock, which shuts QEMU's readers out, too.
                let unlocked = OpenOptions { force_share: true, ..self.options.open.clone() };
                Some(open::open_foreign(&layer, format, &unlocked)?)
            }
        };
        let image: Arc<dyn Image> = match &opened {
            None => Arc::new(RawImage::open_exact(&layer, self.wish.size)?),
            Some(opened) => opened.image.clone(),
        };
        self.opened = opened;
        self.view.size = image.size();
        self.lock().base.image = Some(image);
        Ok(())
    }

    fn believe_kept(&mut self) -> Result<()> {
        let Some(dir) = self.wish.digests.clone().filter(|_| self.exists) else { return Ok(()) };
        let found = match (self.view.resumes, self.layer.block_device || self.wish.force_share) {
            (true, _) => Err("a copy that was cut short is gone on with".to_owned()),
            (_, true) => Err(UNTOLD.to_owned()),
            _ => kept_digests::load(&dir, &self.layer.path, Identity::of(&self.layer.path)?)?,
        };
        match found {
            Ok((nodes, root)) if nodes.size() == self.view.size => {
                self.view.root = Some(root);
                self.lock().base.tree = Some((Arc::new(nodes), root));
            }
            Ok(_) => self.view.digests_reason = Some("they are of another size".to_owned()),
            Err(why) => self.view.digests_reason = Some(why),
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    /// What is done once the patch's header is known.
    fn begin(&self, base: &Base) -> Result<Begin> {
        let choice = Choice {
            wish: self.wish.clone(),
            layer: self.layer.clone(),
            exists: self.exists,
            part: self.lock().part.take(),
            redo: self.redo_path()?,
            base: base.tree.as_ref().map(|(_, root)| (base.size(), *root)),
            image: base.image.clone(),
            runtime_dir: self.options.open.runtime_dir.clone(),
        };
        Ok(Box::new(move |header| choice.land(header)))
    }

    /// Keeps digests, if that is wished; or says why not.
    fn keep(&self, outcome: Option<Outcome>) -> Result<Option<String>> {
        let Some(dir) = &self.wish.digests else { return Ok(None) };
        if self.layer.block_device || self.wish.force_share {
            return Ok(Some(UNTOLD.to_owned()));
        }
        let Some(identity) = Identity::settled(&self.layer.path)? else {
            return Ok(Some("somebody writes to the image, or the clock was set".to_owned()));
        };
        let base = self.lock().base.clone();
        let (nodes, root) = match (outcome, base.tree) {
            (None, Some(tree)) => tree,
            (None, None) => return Ok(Some("the image was not read".to_owned())),
            (Some(outcome), tree) => {
                let (from_root, size, root) = (outcome.header.from_root, outcome.header.size, outcome.root);
                let nodes = match (from_root, tree) {
                    (Some(_), Some((nodes, _))) if nodes.size() == size => nodes,
                    (None, _) => Arc::new(NodeFile::temporary(size)?),
                    _ => return Ok(Some("the image has another size now; the next run makes them".to_owned())),
                };
                let Some(changes) = outcome.changes()? else { return Ok(None) };
                match from_root {
                    Some(_) => nodes.apply(nodes.as_ref(), changes)?,
                    None => nodes.apply(ZeroNodes, changes)?,
                };
                (nodes, root)
            }
        };
        kept_digests::save(dir, &self.layer.path, identity, &nodes, root).map(|()| None)
    }

    fn put_in_place(&self, landing: WriteTarget, outcome: &Outcome, meta: Option<&FileMeta>) -> Result<()> {
        let size = outcome.header.size;
        let image = &self.layer.path;
        let way = landing.way;
        match landing {
            WriteTarget { into: Writer::Spool(spool), .. } => {
                spool.publish()?;
                redo::roll(&self.layer, &self.redo_path()?, true)?;
            }
            landing if way == Way::InPlace => drop(landing.finish(size, None)?),
            landing => {
                let part = part_of(image)?;
                // Held until the file has its name: whoever else begins to write beside the image has to find it taken.
                let held = landing.finish(size, Some(&part))?;
                if let Some(format) = self.wish.format.foreign() {
                    self.prove(&part, format, (size, outcome.root))?;
                }
                take_place(&part, image, meta)?;
                if let Some(held) = held {
                    held.let_go();
                }
                return Ok(());
            }
        }
        meta.map_or(Ok(()), |meta| beside::set_meta(image, meta))
    }

    /// What QEMU has written is an image of this format that holds together, and reads as it should: asked of the
    /// closed file.
    fn prove(&self, part: &Path, format: Foreign, wanted: (DiskSize, Digest)) -> Result<()> {
        writer::check_sound(part, format)?;
        let layer = Layer { path: part.to_owned(), ..self.layer.clone() };
        let opened = open::open_foreign(&layer, format, &self.options.open)?;
        let hashed = hash(opened.image.as_ref(), self.options.workers, &Progress::default(), &|| Ok(()));
        let (size, closed) = (opened.image.size(), opened.close());
        let (root, (wanted_size, wanted_root)) = (hashed.map_err(|e| e.path(part))?.root, wanted);
        closed?;
        if (size, root) == wanted {
            return Ok(());
        }
        let what = format!(
            "what QEMU has written reads as root {root} ({size} bytes), and {wanted_root} ({wanted_size} bytes) was meant"
        );
        Err(Error::new(Kind::Corrupt, what).path(part).hint("nothing was put in place; copy to a raw or qcow2 image"))
    }
}

impl DiskTarget for LocalTarget {
    fn nodes(&self, _: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        match &self.lock().base.tree {
            Some((nodes, _)) => nodes.nodes(level, range),
            None => Err(Error::new(Kind::Usage, "the image was not read yet")),
        }
    }

    fn pieces(&self, _: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        check_blocks(blocks)?;
        // The lock is not held while the image is read: several threads ask.
        let base = self.lock().base.clone();
        blocks.iter().map(|block| Ok(piece_digests(&base.block(*block, base.size())?))).collect()
    }

    fn apply(&self, _: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        if self.wish.read_only {
            return Err(Error::new(Kind::Refused, "the image was opened to be compared with").path(&self.layer.path));
        }
        let taken = self.lock().incoming.take();
        let mut incoming = match taken {
            Some(incoming) => incoming,
            None => {
                let mut state = self.lock();
                if std::mem::replace(&mut state.begun, true) {
                    return Err(Error::new(Kind::Usage, "the patch was refused or ended already"));
                }
                let base = state.base.clone();
                drop(state);
                let undo = self.options.undo.clone().map(Undo::create).transpose()?;
                let begin = self.begin(&base)?;
                Incoming::new(base, begin, undo, self.wish.digests.is_some())?
            }
        };
        // After an error it is not put back: what follows is refused.
        incoming.apply(patch_bytes).map_err(|e| e.path(&self.layer.path))?;
        self.lock().incoming = Some(incoming);
        Ok(())
    }

    fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
        let mut state = self.lock();
        if let Some(finished) = &state.finished {
            return Ok(finished.applied.clone());
        }
        let incoming = state.incoming.take();
        let mut incoming = incoming.ok_or_else(|| Error::new(Kind::Usage, "there is no patch to end"))?;
        let finished = incoming.finish().map_err(|e| e.path(&self.layer.path))?;
        let applied = finished.applied.clone();
        state.finished = Some(finished);
        Ok(applied)
    }
}

impl PlainTarget for LocalTarget {
    fn view(&self) -> Result<ImageView> {
        Ok(self.view.clone())
    }

    fn read(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Whole> {
        let base = self.lock().base.clone();
        let Some(image) = base.image else {
            return Err(Error::new(Kind::NotFound, "there is no such image").path(&self.layer.path));
        };
        let size = image.size();
        if let Some((_, root)) = base.tree {
            return Ok(Whole { size, root, bytes_read: 0 });
        }
        let counted = Progress::default();
        let progress = RefCell::new(progress);
        let good = || {
            (progress.borrow_mut())(counted.scanned.load(Ordering::Relaxed), size.0);
            self.source.as_ref().map_or(Ok(()), Source::keep_going)
        };
        let hashed = hash(image.as_ref(), self.options.workers, &counted, &good);
        let hashed = hashed.map_err(|e| e.path(&self.layer.path))?;
        self.lock().base.tree = Some((Arc::new(hashed.nodes), hashed.root));
        Ok(Whole { size, root: hashed.root, bytes_read: counted.read.load(Ordering::Relaxed) })
    }

    fn commit(&self, finish: &Finish) -> Result<Committed> {
        let finished = {
            let mut state = self.lock();
            if state.begun && state.finished.is_none() {
                return Err(Error::new(Kind::Usage, "the patch was refused, or is not ended"));
            }
            state.finished.take()
        };
        let meta = finish.meta.as_ref();
        let Some(Finished { landing, outcome, .. }) = finished else {
            // Nothing was to be changed; but "done" means durable, whoever made it equal.
            if self.exists && !self.wish.read_only {
                meta.map_or(Ok(()), |meta| beside::set_meta(&self.layer.path, meta))?;
                beside::make_durable(&self.layer.path)?;
            }
            return Ok(Committed { way: None, digests_reason: self.keep(None)? });
        };
        let way = landing.way;
        self.put_in_place(landing, &outcome, meta)?;
        Ok(Committed { way: Some(way), digests_reason: self.keep(Some(outcome))? })
    }
}
