//! Opens a chain for reading: in process where that is sure, through `qemu-nbd` otherwise, and says which and why.
//!
//! Invariants
//! - Every layer is opened as the format the chain records, every backing image and data file is the chain's. A header
//!   that disagrees with the chain about having one is a conflict, not a hint.
//! - After [`Opened::close`] nobody reads any more, whoever still holds the image: the base of a chain is read only
//!   between freeze and the commit's intent (I5).

use super::nbd::NbdImage;
use super::qcow2::{Header, Qcow2Image};
use super::qemu_nbd::{QemuNbd, Serve};
use super::raw::{self, RawImage};
use super::{Chain, Format, Image, Layer};
use crate::block::extent::Extent;
use crate::block::{ByteRange, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::image::foreign::format::{self, Foreign};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, TryLockError};
use std::time::{Duration, Instant};

/// How long [`Opened::close`] waits for reads that are under way.
const DRAIN_MAX: Duration = Duration::from_secs(30);

/// How a chain is opened for reading.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Directory for sockets; its path is short (at most about 90 bytes).
    pub runtime_dir: PathBuf,
    /// Take no locks: a domain that is off may be started while we read. The run notices and starts over.
    pub force_share: bool,
    /// Threads that will read at once.
    pub readers: usize,
}

/// A chain open for reading.
pub struct Opened {
    /// Content of the chain. After `close` every read of it fails.
    pub image: Arc<dyn Image>,
    /// How it is read, as part of a sentence: `qcow2 read in process`, `qemu-nbd, because vda.qcow2 has zstd clusters`.
    pub how: String,
    door: Arc<Door>,
    child: Option<QemuNbd>,
}

impl Opened {
    fn behind_a_door(image: Box<dyn Image>, how: String, child: Option<QemuNbd>) -> Opened {
        let (size, image) = (image.size(), RwLock::new(Some(image)));
        let door = Arc::new(Door { size, closed: AtomicBool::new(false), image });
        Opened { image: door.clone(), how, door, child }
    }

    /// Ends a `qemu-nbd` child, waits for reads under way, and closes the files. When it returns without an error,
    /// nothing of ours has the chain open, and every later read through a kept [`Opened::image`] fails. Blocks, at most
    /// 45 seconds.
    pub fn close(mut self) -> Result<()> {
        self.shut()
    }

    fn shut(&mut self) -> Result<()> {
        self.door.closed.store(true, Ordering::Release);
        // The child first: reads that wait for it fail at once and leave the door.
        let ended = self.child.take().map_or(Ok(()), QemuNbd::stop);
        let shut = self.door.shut();
        ended.and(shut)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Err(e) = self.shut() {
            tracing::error!(error = %e.chain(), how = self.how, "cannot close the images");
        }
    }
}

/// What [`open_read`] will do with a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    Raw {
        block_device: bool,
    },
    Qcow2,
    /// The layer and what is the matter with it.
    QemuNbd {
        because: String,
    },
}

impl Way {
    fn describe(&self) -> String {
        match self {
            Way::Raw { block_device: false } => "raw file read in process".to_owned(),
            Way::Raw { block_device: true } => "block device read in process".to_owned(),
            Way::Qcow2 => "qcow2 read in process".to_owned(),
            Way::QemuNbd { because } => format!("qemu-nbd, because {because}"),
        }
    }
}

/// Opens the chain. Blocks; may start a process.
///
/// [`Kind::Conflict`] where a header disagrees with the chain, [`Kind::Corrupt`] where a file is not what the chain
/// records, [`Kind::Refused`] where neither we nor `qemu-nbd` can read it (encryption).
pub fn open_read(chain: &Chain, options: &OpenOptions) -> Result<Opened> {
    let way = choose(chain)?;
    let (image, child): (Box<dyn Image>, _) = match &way {
        Way::Raw { .. } => (Box::new(RawImage::open(chain.top())?), None),
        Way::Qcow2 => (Box::new(Qcow2Image::open(chain)?), None),
        Way::QemuNbd { .. } => {
            let (image, child) = served(QemuNbd::start(&serve(chain, options))?, options)?;
            (image, Some(child))
        }
    };
    Ok(Opened::behind_a_door(image, way.describe(), child))
}

fn serve<'a>(chain: &'a Chain, options: &'a OpenOptions) -> Serve<'a> {
    let OpenOptions { runtime_dir, force_share, readers } = options;
    Serve { chain, runtime_dir, force_share: *force_share, connections: *readers, bitmap: None }
}

fn served(mut child: QemuNbd, options: &OpenOptions) -> Result<(Box<dyn Image>, QemuNbd)> {
    let image = NbdImage::connect(child.socket(), "", &[], options.readers)?;
    child.close_the_door();
    Ok((Box::new(image), child))
}

/// Opens an image in a format of others for reading. Blocks; starts a process. The errors are those of [`open_read`].
/// Of the layer only the place counts.
pub fn open_foreign(layer: &Layer, format: Foreign, options: &OpenOptions) -> Result<Opened> {
    format::check(layer, format)?;
    let chain = Chain(vec![layer.clone()]);
    let (image, child) = served(QemuNbd::start_foreign(&serve(&chain, options), format)?, options)?;
    let how = format!("qemu-nbd, because it is a {} image", format.as_str());
    Ok(Opened::behind_a_door(image, how, Some(child)))
}

/// Opens an export of a server that is there already, for reading: a running QEMU's, which serves a backup. Blocks.
pub fn open_export(socket: &Path, export: &str, options: &OpenOptions) -> Result<Opened> {
    let image = NbdImage::connect(socket, export, &[], options.readers)?;
    Ok(Opened::behind_a_door(Box::new(image), EXPORT.to_owned(), None))
}

/// How the disks of a backup are read, in the words of [`explain`].
pub const EXPORT: &str = "served by the running QEMU, over NBD";

/// What [`open_read`] would choose, and why; the same sentence as [`Opened::how`], the same refusals. Reads headers
/// only.
pub fn explain(chain: &Chain) -> Result<String> {
    choose(chain).map(|way| way.describe())
}

/// Looks at every layer's header, and decides.
fn choose(chain: &Chain) -> Result<Way> {
    let Some((bottom, uppers)) = chain.0.split_last() else {
        return Err(Error::new(Kind::Usage, "a chain has at least one layer"));
    };
    let mut because = None;
    for layer in uppers {
        because = because.or(doubt(layer, true)?);
    }
    because = because.or(doubt(bottom, false)?);
    Ok(match because {
        Some(because) => Way::QemuNbd { because },
        None if uppers.is_empty() && bottom.format == Format::Raw => Way::Raw { block_device: bottom.block_device },
        None => Way::Qcow2,
    })
}

/// Checks that a layer is what the chain says; returns why it cannot be read in process, if so.
fn doubt(layer: &Layer, has_layer_below: bool) -> Result<Option<String>> {
    let file = raw::open_file(layer, false)?;
    let conflict = |what: &'static str| Error::new(Kind::Conflict, what).path(&layer.path);
    if layer.format == Format::Raw {
        return match (has_layer_below, &layer.data_file) {
            (true, _) => Err(conflict("the chain records a backing image below a raw image")),
            (_, Some(_)) => Err(conflict("the chain records a data file for a raw image")),
            (false, None) => Ok(None),
        };
    }
    let header = Header::read(&file, &layer.path)?;
    match (header.has_backing(), has_layer_below) {
        (true, false) => return Err(conflict("the image names a backing image, and the chain ends with it")),
        (false, true) => return Err(conflict("the chain goes on below the image, which names no backing image")),
        _ => {}
    }
    match (header.has_data_file(), &layer.data_file) {
        (true, None) => return Err(conflict("the image keeps its data in another file, and the chain records none")),
        (false, Some(_)) => return Err(conflict("the chain records a data file, and the image has none")),
        _ => {}
    }
    if header.encrypted {
        return Err(Error::new(Kind::Refused, "the image is encrypted, and only its domain has the key")
            .path(&layer.path)
            .hint("encrypt inside the guest, or below the image, to replicate it"));
    }
    let name = layer.path.file_name().unwrap_or(layer.path.as_os_str()).display().to_string();
    Ok(header.beyond_us().map(|why| format!("{name} {why}")))
}

/// The image, until it is shut. Readers hold the door open for the time of one call.
struct Door {
    size: DiskSize,
    closed: AtomicBool,
    image: RwLock<Option<Box<dyn Image>>>,
}

impl Door {
    fn enter(&self) -> Result<RwLockReadGuard<'_, Option<Box<dyn Image>>>> {
        let shut = || Error::new(Kind::Interrupted, "the image was closed while it was read");
        // Asked before the lock, so that readers in a row cannot keep whoever closes waiting.
        if self.closed.load(Ordering::Acquire) {
            return Err(shut());
        }
        // A reader that panicked changed nothing.
        let guard = self.image.read().unwrap_or_else(|e| e.into_inner());
        if guard.is_some() { Ok(guard) } else { Err(shut()) }
    }

    fn shut(&self) -> Result<()> {
        let deadline = Instant::now() + DRAIN_MAX;
        loop {
            let image = match self.image.try_write() {
                Ok(mut guard) => guard.take(),
                Err(TryLockError::Poisoned(e)) => e.into_inner().take(),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::new(Kind::Busy, "the image is still being read; its storage may hang"));
                }
            };
            drop(image);
            return Ok(());
        }
    }
}

impl Image for Door {
    fn size(&self) -> DiskSize {
        self.size
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.enter()?.as_ref().expect("an entered door has an image").extents(range)
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        self.enter()?.as_ref().expect("an entered door has an image").read_at(offset_bytes, buf)
    }

    fn expect(&self, range: ByteRange) {
        // Whoever may not enter finds out when he reads.
        if let Ok(image) = self.enter() {
            image.as_ref().expect("an entered door has an image").expect(range);
        }
    }
}
