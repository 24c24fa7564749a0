//! What goes on while the disks stand still: they are read one after the other, and their limits are watched meanwhile.

use crate::block::ByteRange;
use crate::engine::pump::{self, Progress, Shipment};
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::image::Image;
use crate::image::open::OpenOptions;
use crate::name::DiskName;
use crate::replicate::capture::space_watch::RoomWatch;
use crate::replicate::capture::still::{Capture, Frozen, Source};
use crate::replicate::plan::planned::Plan;
use crate::replicate::run::{Run, stopped};
use crate::replicate::target_gate::{TargetGate, watched};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What is done with a frozen image while it is open.
pub(in crate::replicate) type ReadDisk<'a, T> =
    &'a mut dyn FnMut(&dyn Image, &Shipment, &Progress, pump::KeepGoing) -> Result<T>;

/// How the disks of one run stand still.
pub(in crate::replicate) struct Standing<'a> {
    pub run: &'a Run<'a>,
    pub plan: &'a Plan,
    pub still: &'a Frozen,
    pub capture: &'a dyn Capture,
    pub gate: &'a TargetGate,
}

/// Runs `body` while a thread of its own watches the limits: age and size of the overlays, room, signals. A limit that
/// is reached cuts every wait for the target, however little of the disks moves. Whatever asks QEMU many questions
/// looks at the cut between them.
pub(in crate::replicate) fn while_held<T>(
    run: &Run,
    (plan, still): (&Plan, &Frozen),
    gate: &TargetGate,
    body: impl FnOnce() -> T,
) -> T {
    let room = RoomWatch::new(plan, &run.request.run, &run.request.plan.space);
    let (stop, clock, frozen_at) = (run.stop, run.ports.clock, still.frozen_at);
    let good = || {
        if stop.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        room.check(&|| clock().duration_since(frozen_at))
    };
    watched(gate.cut(), &good, body)
}

impl Standing<'_> {
    /// As [`while_held`].
    pub(in crate::replicate) fn while_held<T>(&self, body: impl FnOnce() -> T) -> T {
        while_held(self.run, (self.plan, self.still), self.gate, body)
    }

    /// Opens a frozen image, lets `read` work on it, and closes it however that ended: it must be closed before the
    /// commit starts.
    pub(in crate::replicate) fn read_disk<T>(
        &self,
        (name, source): &(DiskName, Source),
        dirty: Option<Vec<ByteRange>>,
        read: ReadDisk<T>,
    ) -> Result<T> {
        let planned = self.plan.disk(name).expect("what was frozen was planned");
        let options = OpenOptions { force_share: self.still.may_start, ..self.run.request.open.clone() };
        let opened = match source {
            Source::Chain(chain) => (self.run.ports.open_image)(chain, &options)?,
            Source::Export { socket, name } => (self.run.ports.open_export)(socket, name, &options)?,
        };
        if opened.image.size() != planned.size {
            let (was, is) = (planned.size, opened.image.size());
            return Err(Error::new(Kind::Busy, format!("the disk was resized meanwhile, from {was} to {is} bytes"))
                .hint("run again"));
        }
        failpoint!("5a");
        let shipment = Shipment {
            uuid: self.plan.uuid.clone(),
            disk: name.clone(),
            size: planned.size,
            head: planned.head,
            mode: planned.mode,
            reason: planned.reason.clone(),
            dirty,
            compare_only: false,
            workers: self.run.request.workers,
            compression: self.run.request.compression,
            throttle: self.run.request.throttle.clone(),
        };
        let progress = Arc::new(Progress::default());
        self.run.watch.disk(name, planned.size.0, planned.mode, &progress);
        let keep_going = || {
            self.run.watch.tick();
            failpoint!("5b");
            if self.run.stop.load(Ordering::Relaxed) {
                return Err(stopped());
            }
            self.gate.cut().check()?;
            self.capture.check()
        };
        let result = read(opened.image.as_ref(), &shipment, &progress, &keep_going);
        let closed = opened.close();
        let result = result?;
        closed?;
        Ok(result)
    }
}
