//! What a run is made of, as plain data: the ports to the world, the request, and the run that holds them while it
//! lasts.
//!
//! [`cycle`](super::cycle) tells what is done with it.

use crate::engine::pump::Progress;
use crate::engine::stats::Mode;
use crate::engine::throttle::Throttle;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::departure::Departure;
use crate::hypervisor::guest::GuestAgent;
use crate::hypervisor::{Backups, Hypervisor, Tracking};
use crate::image::Chain;
use crate::image::open::{OpenOptions, Opened};
use crate::name::{DiskName, DomainUuid, RunId, StoreId};
use crate::patch::Compression;
use crate::replica::Replica;
use crate::replicate::capture::freeze_hooks::FreezeHooks;
use crate::replicate::plan::options::PlanOptions;
use crate::replicate::settle::guard::PauseGuard;
use crate::replicate::settle::options::SettleOptions;
use crate::replicate::state::journal::Journal;
use jiff::Timestamp;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

/// The world as a run sees it: ports only. `wiring` chooses the adapters.
pub struct Ports<'a> {
    /// The source's libvirt: domains, freezes, commits and pauses.
    pub hypervisor: &'a dyn Hypervisor,
    /// The bitmaps of a running domain.
    pub tracking: &'a dyn Tracking,
    /// Those that lie in the images of a domain that is off.
    pub stored: &'a dyn Tracking,
    /// The guest agent of a running domain.
    pub guest: &'a dyn GuestAgent,
    /// A domain that was handed to its target and comes back.
    pub custody: &'a dyn Departure,
    /// Backup jobs of a running domain.
    pub backups: &'a dyn Backups,
    /// Connects to the replica of a domain on the target.
    pub replica: &'a dyn Fn(&DomainUuid) -> Result<Box<dyn Replica>>,
    /// Starts a dead-man for a domain.
    pub guard: &'a dyn Fn(&DomainUuid) -> Result<Box<dyn PauseGuard>>,
    /// Opens a chain for reading.
    pub open_image: &'a dyn Fn(&Chain, &OpenOptions) -> Result<Opened>,
    /// Opens an export on a unix socket for reading.
    pub open_export: &'a dyn Fn(&Path, &str, &OpenOptions) -> Result<Opened>,
    /// Says how a chain would be read, and why.
    pub explain_image: &'a dyn Fn(&Chain) -> Result<String>,
    /// The wall clock. An argument, so that tests have one of their own.
    pub clock: &'a (dyn Fn() -> Timestamp + Sync),
}

/// What to do.
#[derive(Debug, Clone)]
pub struct Request {
    /// Name, UUID or id of the domain.
    pub domain: String,
    /// The target's canonical URL.
    pub target: String,
    /// The store that the target was found to be, once it is connected: the key of its dirty bitmaps from then on.
    pub store: Arc<OnceLock<StoreId>>,
    /// Id of this run. Overlays, scratch files, bitmaps and the point carry it.
    pub run: RunId,
    /// State directory of the program on this host.
    pub state: PathBuf,
    /// How the run is planned: capture, quiescing, disks to leave out, mode, audit, space.
    pub plan: PlanOptions,
    /// How long the commit may take, and how long a pause of the guest may last.
    pub settle: SettleOptions,
    /// How images are opened for reading: directory for sockets, number of readers.
    pub open: OpenOptions,
    /// Keep secrets (graphics passwords) in the definitions that travel with the point.
    pub with_secrets: bool,
    /// Number of threads that read, hash and compress.
    pub workers: usize,
    /// How the data is compressed on its way to the target.
    pub compression: Compression,
    /// How fast the run may send; `None`: as fast as it goes.
    pub throttle: Option<Arc<Throttle>>,
    /// Programs of the operator that run before and after the freeze.
    pub hooks: FreezeHooks,
    /// The handover that this run belongs to.
    pub handover: Option<RunId>,
    /// The domain lives elsewhere, and what is here becomes a point of this host's own store; only while it is off.
    pub gives_way: bool,
}

/// Told what happens while it happens. Called from several threads.
pub trait Watch: Sync {
    /// A step of the run begins, by its number in docs/replication.md.
    fn step(&self, number: u8, what: &str);
    /// A disk is about to be read; `progress` counts from now on.
    fn disk(&self, name: &DiskName, size_bytes: u64, mode: Mode, progress: &Arc<Progress>);
    /// Called now and then while a disk is read.
    fn tick(&self);
    /// Receives a warning for the operator, as one sentence or more.
    fn warn(&self, text: &str);
}

/// One run while it lasts.
pub(super) struct Run<'a> {
    pub(super) ports: &'a Ports<'a>,
    pub(super) request: &'a Request,
    pub(super) watch: &'a dyn Watch,
    pub(super) stop: &'a AtomicBool,
    pub(super) journal: &'a Journal,
    /// What must not be lost, however the run ends.
    alarms: RefCell<Vec<String>>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        ports: &'a Ports<'a>,
        request: &'a Request,
        watch: &'a dyn Watch,
        stop: &'a AtomicBool,
        journal: &'a Journal,
    ) -> Self {
        Self { ports, request, watch, stop, journal, alarms: RefCell::default() }
    }

    /// Something that an operator must learn of: said at once, and kept for the report, whether or not a point is made.
    pub(super) fn alarm(&self, text: String) {
        self.watch.warn(&text);
        self.alarms.borrow_mut().push(text);
    }

    /// Takes the alarms out, for the report.
    pub(super) fn take_alarms(&self) -> Vec<String> {
        self.alarms.take()
    }
}

pub(super) fn stopped() -> Error {
    Error::new(Kind::Interrupted, "stopped by a signal")
}
