//! The dirty bitmaps of one run: what they mark while everything stands still, and which of them stay afterwards.
//!
//! The words of [`bitmap_rotation`], applied to the run's disks. A doubt costs a disk a comparison, never the run its
//! point (I7).

use crate::block::ByteRange;
use crate::engine::pump::Shipment;
use crate::engine::stats::Mode;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::{Backups, Power, Tracking};
use crate::image::{Image, Layer, chain};
use crate::name::DiskName;
use crate::replica::{PointDisk, PointView, Replica};
use crate::replicate::capture::still::{Frozen, Source};
use crate::replicate::plan::CaptureKind;
use crate::replicate::plan::planned::{Plan, compared};
use crate::replicate::run::{Ports, Request};
use crate::replicate::state::report::Report;
use crate::replicate::state::stores;
use crate::replicate::target_gate::Cut;
use crate::replicate::tracking::{bitmap_rotation, end_of_disk, failover_bitmap};
use std::collections::BTreeMap;

/// The ranges to ship of each disk that is planned by bitmap.
pub(in crate::replicate) type Marked = BTreeMap<DiskName, Vec<ByteRange>>;

/// Where a domain's bitmaps are: in the running QEMU, or in the images of one that is off.
struct Shelf<'a> {
    tracking: &'a dyn Tracking,
    /// The layers that the domain runs on before the freeze and after the commit, as far as they can keep a bitmap.
    tops: Vec<Layer>,
    below: Vec<Layer>,
}

/// What is to be shipped; but a disk by bitmap whose end was cut off since the head and grown again is compared by
/// digest.
pub(in crate::replicate) fn unless_cut(
    image: &dyn Image,
    replica: &dyn Replica,
    shipment: &Shipment,
) -> Result<Shipment> {
    let shipment = shipment.clone();
    let (Some(dirty), Some((head_size, _)), Mode::Bitmap) = (&shipment.dirty, shipment.head, shipment.mode) else {
        return Ok(shipment);
    };
    if end_of_disk::end_unchanged(image, replica, &shipment.disk, head_size, dirty)? {
        return Ok(shipment);
    }
    let reason = compared("the end of the disk is not as the dirty bitmap says (shrunk and grown again?)");
    Ok(Shipment { mode: Mode::Digest, dirty: None, reason, ..shipment })
}

/// The disks of a new point whose tracking was in doubt for the second time in a row, in words.
pub(in crate::replicate) fn doubted_again(plan: &Plan, point: &PointView) -> Vec<String> {
    let again = |disk: &PointDisk| {
        let planned = plan.disk(&disk.name).filter(|_| disk.stats.tracking_doubt)?;
        bitmap_rotation::doubted_again(&disk.name, &planned.head_stats, &disk.stats.reason)
    };
    point.disks.iter().filter_map(again).collect()
}

/// Where the marks are asked for.
struct Marks<'a> {
    tracking: &'a dyn Tracking,
    backups: &'a dyn Backups,
}

impl Marks<'_> {
    /// What the dirty bitmaps mark, of the disks planned by bitmap, asked while everything stands still. A disk whose
    /// bitmap cannot be read is compared by digest instead: a tracking doubt never fails a run. Each question takes at
    /// most its deadline, and no question is asked once the run is cut.
    fn of(&self, plan: &mut Plan, still: &Frozen, cut: &Cut) -> Result<Marked> {
        let mut marked = Marked::new();
        cut.check()?;
        let mut together = self.marked_together(plan, still);
        for disk in plan.disks.iter_mut().filter(|d| d.mode == Mode::Bitmap) {
            let Some((_, source)) = still.disks.iter().find(|(name, _)| *name == disk.name) else { continue };
            let bitmap = disk.bitmap.clone().expect("planned by bitmap");
            cut.check()?;
            let dirty = match source {
                _ if together.contains_key(&disk.name) => Ok(together.remove(&disk.name).unwrap_or_default()),
                Source::Chain(chain) => {
                    let all = self.tracking.dirty(&plan.uuid, &[(chain.top().clone(), bitmap)]);
                    all.and_then(|mut all| all.pop().ok_or_else(|| Error::new(Kind::Protocol, "QEMU gave no answer")))
                }
                Source::Export { socket, .. } => self.backups.marked(&plan.uuid, socket, disk.chain.top(), &bitmap),
            };
            match dirty {
                Ok(mut ranges) => {
                    // QEMU marks nothing in a range that a resize added.
                    if let Some((head_size, _)) = disk.head.filter(|(head_size, _)| *head_size < disk.size) {
                        ranges.retain(|r| r.start < head_size.0);
                        if let Some(last) = ranges.last_mut() {
                            last.end = last.end.min(head_size.0);
                        }
                        ranges.push(ByteRange::new(head_size.0, disk.size.0));
                    }
                    marked.insert(disk.name.clone(), ranges);
                }
                Err(e) => disk.doubt(&format!("the dirty bitmap cannot be read ({})", e.chain())),
            }
        }
        Ok(marked)
    }

    /// The marks of all disks that stand on images, by one question: the domain is on its overlays meanwhile, and each
    /// question has QEMU describe all images of all disks. Nothing if one of them cannot be read: then each is asked
    /// for alone.
    fn marked_together(&self, plan: &Plan, still: &Frozen) -> Marked {
        let wanted = plan.disks.iter().filter(|d| d.mode == Mode::Bitmap).filter_map(|disk| {
            let (_, source) = still.disks.iter().find(|(name, _)| *name == disk.name)?;
            let Source::Chain(chain) = source else { return None };
            Some((disk.name.clone(), (chain.top().clone(), disk.bitmap.clone()?)))
        });
        let (names, wanted): (Vec<DiskName>, Vec<(Layer, String)>) = wanted.unzip();
        if names.len() < 2 {
            return Marked::new();
        }
        match self.tracking.dirty(&plan.uuid, &wanted) {
            Ok(all) if all.len() == names.len() => names.into_iter().zip(all).collect(),
            Ok(_) => Marked::new(),
            Err(e) => {
                tracing::debug!("the dirty bitmaps are read one by one: {}", e.chain());
                Marked::new()
            }
        }
    }
}

/// The bitmaps of one run's disks.
pub(in crate::replicate) struct Bitmaps<'a> {
    pub ports: &'a Ports<'a>,
    pub request: &'a Request,
}

impl Bitmaps<'_> {
    /// Where the bitmaps of the plan's disks are now; `None` if the domain has gone.
    fn shelf(&self, plan: &Plan) -> Option<Shelf<'_>> {
        let off = self.ports.hypervisor.observe_without_sizes(&plan.uuid).ok()?.power == Power::Off;
        let keeps = |layer: &&Layer| !off || chain::keeps_no_bitmap(layer).is_none();
        let chains = || plan.replicated().map(|d| d.chain.0.as_slice());
        Some(Shelf {
            tracking: if off { self.ports.stored } else { self.ports.tracking },
            tops: chains().filter_map(|c| c.first()).filter(keeps).cloned().collect(),
            below: chains().filter_map(|c| c.get(1..)).flatten().filter(keeps).cloned().collect(),
        })
    }

    /// Step 3c: this run's own bitmap on every disk. Returns what is not tracked from here on, in words.
    pub(in crate::replicate) fn begin(&self, plan: &Plan) -> Vec<String> {
        let name = |layer: &Layer| self.successor(layer);
        // A domain that has gone since it was planned: the freeze finds out, and says so.
        let Some(shelf) = self.shelf(plan) else { return Vec::new() };
        let layers: Vec<Layer> =
            shelf.tops.into_iter().filter(|layer| chain::must_not_be_tracked(layer).is_none()).collect();
        bitmap_rotation::begin(shelf.tracking, &plan.uuid, &layers, &name)
    }

    fn successor(&self, layer: &Layer) -> String {
        let keys = self.keys();
        bitmap_rotation::bitmap_name(
            keys.first().unwrap_or(&self.request.target),
            &self.request.run,
            &bitmap_rotation::identity(layer),
        )
    }

    /// What this target's bitmaps may be named after: see [`stores::keys`].
    fn keys(&self) -> Vec<String> {
        stores::keys(&self.request.state, &self.request.target, self.request.store.get())
    }

    /// What the dirty bitmaps mark: see [`Marks::of`].
    pub(in crate::replicate) fn marked(&self, plan: &mut Plan, still: &Frozen, cut: &Cut) -> Result<Marked> {
        let tracking = if plan.capture == CaptureKind::Off { self.ports.stored } else { self.ports.tracking };
        Marks { tracking, backups: self.ports.backups }.of(plan, still, cut)
    }

    /// Step 8b: only the bitmaps that lead on from the newest point stay (I8). Without a new point these are the old
    /// ones, and our own as well: a seal whose answer was lost may have made the point, and the next run will know.
    pub(in crate::replicate) fn retire(&self, report: &mut Report, plan: &Plan, sealed: bool) {
        let keys = self.keys();
        let keep = |layer: &Layer| {
            if chain::must_not_be_tracked(layer).is_some() {
                return Vec::new();
            }
            let head = plan.head_run.as_ref().filter(|_| !sealed);
            let identity = bitmap_rotation::identity(layer);
            let old = head
                .into_iter()
                .flat_map(|run| keys.iter().map(|key| bitmap_rotation::bitmap_name(key, run, &identity)));
            old.chain([self.successor(layer)]).collect()
        };
        let Some(shelf) = self.shelf(plan) else { return };
        // Also what is named after other URLs of the same store: each of them would stay in the live QEMU for ever.
        for key in &keys {
            if sealed {
                bitmap_rotation::sweep(shelf.tracking, &plan.uuid, &shelf.below, key);
            }
            match bitmap_rotation::retire(shelf.tracking, &plan.uuid, &shelf.tops, key, &keep) {
                Ok(left) => report.warnings.extend(left),
                // The domain ended or was started meanwhile: its bitmaps are looked at in the next run.
                Err(e) => tracing::debug!("superseded bitmaps are left for the next run: {}", e.chain()),
            }
        }
        self.retire_births(report, plan, &shelf, sealed);
    }

    /// Step 8b as well: the bitmaps of a failover that have done what they were for (see [`failover_bitmap`]). A run
    /// without a point drops none: the next one begins from where this one did.
    fn retire_births(&self, report: &mut Report, plan: &Plan, shelf: &Shelf, sealed: bool) {
        for disk in plan.replicated().filter(|d| shelf.tops.contains(d.chain.top())) {
            let forbidden = chain::must_not_be_tracked(disk.chain.top()).is_some();
            if !sealed && !forbidden {
                continue;
            }
            let stands_alone = disk.chain.0.len() == 1;
            let over = forbidden || stands_alone || disk.tracked_from_failover();
            match failover_bitmap::retire(shelf.tracking, &plan.uuid, &disk.chain.0, over) {
                Ok(left) => report.warnings.extend(left),
                Err(e) => tracing::debug!("the failover's bitmap is left for the next run: {}", e.chain()),
            }
        }
    }
}

#[cfg(test)]
#[path = "dirty_ranges_tests.rs"]
mod tests;
