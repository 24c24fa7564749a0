//! Compares a live domain with its newest point: `verify --against-source`. The same freeze as a run, nothing sent.

use super::cycle::settle_domain;
use super::target_gate::{Patience, TargetGate};
use crate::engine::pump::{self, Shipment};
use crate::error::{Error, Kind, Result, ResultExt, advice};
use crate::name::{DiskName, DomainUuid};
use crate::replicate::capture::held::Standing;
use crate::replicate::plan::survey::make_plan;
use crate::replicate::run::{Ports, Request, Run, Watch};
use crate::replicate::settle::observe;
use crate::replicate::state::journal::Journal;
use crate::replicate::state::report::millis;
use jiff::Timestamp;
use std::sync::atomic::{AtomicBool, Ordering};

/// A live domain compared with its newest point.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Comparison {
    /// When the disks stood still for the comparison, by the source's clock.
    pub frozen_at: Timestamp,
    /// One entry for each disk that was compared.
    pub disks: Vec<ComparedDisk>,
    /// Duration of the freeze call in milliseconds; 0 for a domain that is off.
    pub freeze_ms: f64,
    /// The longest pause.
    pub pause_ms: f64,
    /// All pauses together.
    pub pause_sum_ms: f64,
    /// How often the guest was paused on the way home.
    pub pauses: u32,
    /// Messages for the operator, for example a commit that is still pending.
    pub warnings: Vec<String>,
}

/// Result of the comparison for one disk.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ComparedDisk {
    /// Name of the disk as the domain has it.
    pub name: DiskName,
    /// Virtual size of the disk at the source, in bytes.
    pub size: crate::block::DiskSize,
    /// Blocks whose content is not the point's: written since its freeze, or damaged on one side.
    pub blocks_differ: u64,
    /// Bytes that were read from the source's image.
    pub bytes_read: u64,
    /// Size and root are those of the newest point.
    pub equal: bool,
}

/// Freezes the domain, reads every block and compares it with the head's digests; sends and changes nothing at the
/// target. The freeze is a full one: recorded, guarded and committed like that of a run.
pub fn compare(ports: &Ports, request: &Request, watch: &dyn Watch, stop: &AtomicBool) -> Result<Comparison> {
    let found = observe::find(ports.hypervisor, &request.domain)?;
    let what = format!("verify against {}", request.target);
    let journal =
        Journal::open_after_deadman(&request.state, &found.uuid, &what, (ports.clock)()).on_domain(&found.name)?;
    let run = Run::new(ports, request, watch, stop, &journal);
    compared(&run, &found.uuid).on_domain(&found.name)
}

fn compared(run: &Run, uuid: &DomainUuid) -> Result<Comparison> {
    let (_, _, left_open) = settle_domain(run.ports, run.journal, uuid, &run.request.settle)?;
    if let Some(what) = left_open {
        return Err(Error::new(Kind::Conflict, format!("an earlier run could not be settled: {what}")));
    }
    let domain = run.ports.hypervisor.observe(uuid)?;
    let replica = (run.ports.replica)(uuid)?;
    let view = replica.describe()?;
    if view.head().is_none() {
        return Err(
            Error::new(Kind::NotFound, "the target has no point to compare with").advise(advice::Run::FirstPoint)
        );
    }
    let plan = make_plan(run.ports, run.request, &domain, &view)?;
    run.ready_to_freeze(&plan)?;
    let gate = TargetGate::new(replica, Patience::of(plan.capture, false));
    let mut guard = run.guard(&plan)?;
    let mut capture = run.capture(&mut guard, &plan, &domain);
    let still = capture.freeze()?;
    let standing = Standing { run, plan: &plan, still: &still, capture: capture.as_ref(), gate: &gate };
    let compared = standing.while_held(|| compare_disks(&standing));
    let released = capture.release()?;
    let pauses = released.account.pauses;
    let mut warnings = released.account.alarms;
    warnings.extend(released.left_open);
    Ok(Comparison {
        frozen_at: still.frozen_at,
        disks: compared?,
        freeze_ms: still.freeze.map_or(0.0, millis),
        pause_ms: millis(pauses.longest),
        pause_sum_ms: millis(pauses.sum),
        pauses: pauses.count,
        warnings,
    })
}

fn compare_disks(standing: &Standing) -> Result<Vec<ComparedDisk>> {
    let mut disks = Vec::new();
    for disk in &standing.still.disks {
        let name = &disk.0;
        let compared = standing.read_disk(disk, None, &mut |image, shipment, progress, good| {
            let shipment = &Shipment { compare_only: true, ..shipment.clone() };
            let (root, blocks_differ) = pump::compare(image, standing.gate, shipment, progress, good)?;
            let equal = shipment.head == Some((shipment.size, root));
            let bytes_read = progress.read.load(Ordering::Relaxed);
            Ok(ComparedDisk { name: name.clone(), size: shipment.size, blocks_differ, bytes_read, equal })
        });
        disks.push(compared.on_disk(name)?);
    }
    standing.capture.confirm()?;
    Ok(disks)
}
