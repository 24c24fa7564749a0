//! The dirty bitmaps of one run: what they mark while everything stands still, and which of them stay afterwards.
//!
//! The words of [`turnover`], applied to the run's disks. A doubt costs a disk a comparison, never the run its point (I7).

use super::capture::Still;
use super::cycle::Run;
use super::plan::Plan;
use super::report::Report;
use super::turnover;
use crate::block::ByteRange;
use crate::image::Layer;
use crate::name::DiskName;
use crate::replica::Mode;
use std::collections::BTreeMap;

/// The ranges to ship of each disk that is planned by bitmap.
pub(super) type Marked = BTreeMap<DiskName, Vec<ByteRange>>;

/// The layers that the domain runs on before the freeze and after the commit.
pub(super) fn tops(plan: &Plan) -> Vec<Layer> {
    plan.replicated().map(|d| d.chain.top().clone()).collect()
}

impl Run<'_> {
    /// What the dirty bitmaps mark, of the disks planned by bitmap, asked of QEMU while everything stands still. A disk
    /// whose bitmap cannot be read is compared by digest instead: a tracking doubt never fails a run.
    pub(super) fn marked(&self, plan: &mut Plan, still: &Still) -> Marked {
        let mut marked = Marked::new();
        for disk in plan.disks.iter_mut().filter(|d| d.mode == Mode::Bitmap) {
            let Some((_, chain)) = still.disks.iter().find(|(name, _)| *name == disk.name) else { continue };
            let bitmap = disk.bitmap.clone().expect("planned by bitmap");
            match self.ports.tracking.dirty(&plan.uuid, &[(chain.top().clone(), bitmap)]) {
                Ok(mut ranges) if ranges.len() == 1 => {
                    let mut ranges = ranges.remove(0);
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
                other => {
                    let why = other.err().map_or("QEMU gave no answer".to_owned(), |e| e.chain());
                    disk.mode = Mode::Digest;
                    disk.reason =
                        format!("the dirty bitmap cannot be read ({why}): every block is read and compared by digest");
                }
            }
        }
        marked
    }

    /// Step 8c: only the bitmap that leads on from the newest point stays; without a new point, the old one (I8).
    pub(super) fn retire_bitmaps(&self, report: &mut Report, plan: &Plan, sealed: bool) {
        let keep = if sealed {
            Some(turnover::bitmap_name(&self.request.target, &self.request.run))
        } else {
            plan.disks.iter().find_map(|d| d.bitmap.clone())
        };
        let target = &self.request.target;
        match turnover::retire(self.ports.tracking, &plan.uuid, &tops(plan), target, keep.as_deref()) {
            Ok(left) => report.warnings.extend(left),
            // The domain ended meanwhile: its bitmaps ended with it, or are looked at in the next run.
            Err(e) => tracing::debug!("superseded bitmaps are left for the next run: {}", e.chain()),
        }
    }
}
